"""Every door that weights come in by, with files as they are and as they shouldn't be.

A load is right, or told: never silent and wrong, never a traceback, and what is refused changes nothing.
"""

import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from libraries import library
from tiny import CLASSES, TINY, tiny_b0, tiny_weights

for needed in ("torchvision", "timm", "rich", "matplotlib"):
    library(needed)
Image = library("PIL.Image")
library("safetensors.torch")

from safetensors.torch import save_file  # noqa: E402

from fastmbconv.checkpoints import SCHEMES, CheckpointError, convert, identify, load  # noqa: E402
from fastmbconv.efficientnet import EfficientNet  # noqa: E402
from fastmbconv.training.config import Config  # noqa: E402
from fastmbconv.training.errors import TrainingError  # noqa: E402
from fastmbconv.training.loader import eval_transform  # noqa: E402
from fastmbconv.training.model import build  # noqa: E402
from fastmbconv.training.restore import restore  # noqa: E402
from fastmbconv.training.weights import load_weights, settle_weights  # noqa: E402

MANY = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # a case is small as it is
    suppress_health_check=list(HealthCheck),
)


SOUND = {scheme: tiny_weights(scheme) for scheme in SCHEMES}
OTHER = {scheme: tiny_weights(scheme, 2) for scheme in SCHEMES}


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


# How weights are stored, and whether another set lies beside them that mustn't be taken.
CONTAINERS = {
    "bare": lambda own, other: own,
    "state_dict": lambda own, other: {"epoch": 1, "state_dict": own, "optimizer": {"state": {"a": torch.ones(2)}}},
    "model": lambda own, other: {"model": own, "args": {"lr": 1}},
    "average": lambda own, other: {"state_dict": other, "state_dict_ema": own},
    "average of torchvision": lambda own, other: {"model": other, "model_ema": prefixed(own, "module.")},
    "DDP": lambda own, other: prefixed(own, "module."),
    "compiled": lambda own, other: prefixed(own, "_orig_mod.module."),
    "Lightning": lambda own, other: {
        "state_dict": {**prefixed(own, "net."), "loss.weight": torch.ones(2)},
        "loops": {},
    },
    "nested": lambda own, other: {"state": {"model": own}},
}


@st.composite
def damages(draw):
    """(a name, a function of the entries): what it gives is another checkpoint, or the same values."""
    kind = draw(
        st.sampled_from(
            ("none", "half", "double", "drop", "extra", "swap", "flat", "scalar", "whole", "some prefixed", "text")
        )
    )
    place, other = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))

    def damage(weights):
        names = [name for name in weights if not name.endswith("num_batches_tracked")]
        name, second = names[place % len(names)], names[other % len(names)]
        changed = dict(weights)
        if kind in ("half", "double"):
            dtype = torch.float16 if kind == "half" else torch.float64
            changed = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
        elif kind == "drop":
            del changed[name]
        elif kind == "extra":
            changed[f"{name}_more"] = torch.ones(3)
        elif kind == "swap":
            changed[name], changed[second] = weights[second], weights[name]
        elif kind == "flat":
            changed[name] = weights[name].reshape(-1, 1, 1, 1, 1)
        elif kind == "scalar":
            changed[name] = torch.tensor(1.0)
        elif kind == "whole":
            changed[name] = weights[name].to(torch.int32)
        elif kind == "some prefixed":
            changed = {
                f"module.{key}" if index % 2 else key: value for index, (key, value) in enumerate(weights.items())
            }
        elif kind == "text":
            changed[name] = "gone"
        return changed

    return kind, damage


def same_values(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.float(), theirs[name].float()) for name, value in ours.items()
    )


def stored(path, content, layout):
    """The file, or its folder, that a door is given."""
    if layout == "safetensors":
        tensors = {k: v.contiguous().clone() for k, v in content.items() if isinstance(v, torch.Tensor)}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path / "model.safetensors"
    if layout == "folder":
        torch.save(content, path / "pytorch_model.bin")
        return path
    torch.save(content, path / "x.pth", _use_new_zipfile_serialization=layout == "zip")
    return path / "x.pth"


def doors(source):
    """Each door as a function that gives the model which it made; what it refuses is one of three errors."""
    model = EfficientNet(TINY, num_classes=3, family="torch")

    def by_load(strict):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            report = load(model, source, strict=strict)
        except BaseException:
            assert same_values(model.state_dict(), before), "a refused load changed the model"
            raise
        return model, report.kept, report.unused

    def by_identify():
        identity = identify(source)
        made = identity.model(family="torch")
        load(made, source)
        return made, (), ()

    def by_convert():
        made = convert(model, source, to="fastmbconv")
        ours = EfficientNet(TINY, num_classes=3, family="torch")
        ours.load_state_dict(made)
        return ours, (), ()

    def by_train():
        config, contents, _ = settle_weights(Config(data="-", weights=str(source), width=0.1, depth=0.1, resolution=32))
        network = build(config, 3)
        told = load_weights(network, contents, str(source), "--weights", CLASSES)
        assert any("the classifier is" in note for note in told)
        kept = [] if any("is kept" in note for note in told) else ["classifier"]
        return network, kept, ()

    def by_restore():
        trained = restore(str(source), {})
        assert trained.notes and len(trained.classes) == 3
        return trained.model, (), ()

    return {
        "load": lambda: by_load(True), "load, not strict": lambda: by_load(False), "identify": by_identify,
        "convert": by_convert, "train": by_train, "predict": by_restore,
    }  # fmt: skip


@MANY
@given(
    scheme=st.sampled_from(SCHEMES),
    container=st.sampled_from(sorted(CONTAINERS)),
    damage=damages(),
    layout=st.sampled_from(("zip", "legacy", "safetensors", "folder")),
)
def test_each_door_loads_what_is_there_or_says_why_not(scheme, container, damage, layout, tmp_path_factory):
    kind, change = damage
    own = change(SOUND[scheme])
    content = own if layout == "safetensors" else CONTAINERS[container](own, OTHER[scheme])
    source = stored(tmp_path_factory.mktemp("file"), content, layout)
    expected = entries_of(SOUND[scheme], scheme)
    with tiny_b0(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, door in doors(source).items():
            try:
                made, kept, unused = door()
            except (CheckpointError, TrainingError) as error:
                told = str(error)
                assert told and "weights_only" not in told and "Errno" not in told and "\n" not in told, (name, told)
                assert kind not in ("none", "half", "double"), (name, told)
                continue
            ours = made.state_dict()
            wrong = {
                key
                for key, value in expected.items()
                if key not in ours or not torch.allclose(ours[key].float(), value.float(), rtol=1e-3, atol=1e-3)
            }
            told = {key.removesuffix(".weight").removesuffix(".bias").split(".")[0] for key in kept}
            silent = {key for key in wrong if key not in kept and key.split(".")[0] not in told}
            assert not silent or kind == "swap", (name, kind, silent)
            assert kind != "extra" or name == "load, not strict" and unused or not wrong, (name, unused)


def entries_of(weights, scheme):
    with tiny_b0():
        return convert(EfficientNet(TINY, num_classes=3, family="torch"), weights, to="fastmbconv")


@MANY
@given(
    cut=st.floats(0, 1), flip=st.booleans(), layout=st.sampled_from(("zip", "legacy", "safetensors")), at=st.integers(0)
)
def test_a_damaged_file_is_an_error_or_whole(cut, flip, layout, at, tmp_path_factory):
    """Cut anywhere, or a byte changed in what describes the tensors: torch's archives know by their check sums."""
    source = stored(tmp_path_factory.mktemp("file"), SOUND["timm"], layout)
    content = bytearray(source.read_bytes())
    if flip:
        where = at % (2000 if layout != "zip" else len(content))
        content[where] ^= 1 + at % 255
    else:
        content = content[: int(cut * len(content))]
    source.write_bytes(content)
    expected = entries_of(SOUND["timm"], "timm")
    with tiny_b0():
        for name, door in doors(source).items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made, kept, _ = door()
            except (CheckpointError, TrainingError) as error:
                told = str(error)
                assert told and "weights_only" not in told and "Errno" not in told and "\n" not in told, (name, told)
            else:
                # Only torch's archives have check sums; another kind of file that was cut isn't read to its end.
                assert flip and layout != "zip" or same_values(made.state_dict(), expected), (name, kept)


RUN = {"format": 1, "config": {"width": 0.1, "depth": 0.1}, "classes": list(CLASSES), "state_dict": SOUND["fastmbconv"]}
LOOK = {"resolution": 32, "crop": 0.9, "interpolation": "bicubic", "normalize": "half"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"look": {}}, "it doesn't say how its pictures looked"),
        ({"look": LOOK, "classes": None}, "is damaged: it has no classes"),
        ({"look": LOOK, "config": 3}, "is damaged: it has no config"),
        ({"look": LOOK, "classes": ["a"]}, "classifier.weight is "),
        ({"look": LOOK, "config": {"model": "resnet50"}}, "--model is 'resnet50'"),
        ({"look": LOOK, "config": {"later": 1}}, "has 'later': that is no option"),
        ({"look": LOOK, "config": {"width": "wide"}}, "has width = 'wide': allowed is a float"),
    ],
)
def test_a_run_that_lacks_something_says_what(changes, told, tmp_path):
    torch.save({**RUN, **changes}, tmp_path / "best.pt")
    with pytest.raises((CheckpointError, TrainingError), match=told):
        restore(str(tmp_path), {})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2000) | st.floats() | st.sampled_from(("tf_efficientnet_b0", "x", "")),
    lambda some: st.lists(some, max_size=4) | st.dictionaries(st.sampled_from(("mean", "height", "0", "a")), some),
    max_leaves=6,
)
KEYS = (
    "architecture", "num_classes", "label_names", "pretrained_cfg", "model_type", "batch_norm_eps", "hidden_act",
    "image_size", "id2label", "width_coefficient", "mean", "std", "input_size", "crop_pct", "interpolation",
)  # fmt: skip


@settings(MANY, max_examples=10)
@given(config=st.dictionaries(st.sampled_from(KEYS), VALUES), images=st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_any_config_is_believed_or_named(config, images, tmp_path_factory):
    path = stored(tmp_path_factory.mktemp("hub"), SOUND["timm"], "folder")
    for model_type in ({}, {"model_type": "efficientnet"}, {"architecture": "efficientnet_b0"}):
        (path / "config.json").write_text(json.dumps({"pretrained_cfg": images, **config, **model_type}))
        (path / "preprocessor_config.json").write_text(json.dumps(images))
        with tiny_b0():
            try:
                trained = restore(str(path), {})
            except (CheckpointError, TrainingError) as error:
                assert "json" in str(error), str(error)
            else:
                eval_transform(trained.look)(Image.new("RGB", (40, 40)))
