"""What is in a file or folder of weights: found where libraries put it, believed in what it says, else named."""

import argparse
import collections
import json
import os
import pathlib
import struct
import sys
import types

import numpy as np
import pytest
import torch
from libraries import library
from torch import nn

from fastmbconv.checkpoints import CheckpointError, NoWeightsError, convert, identify, load, numerics, read_contents
from fastmbconv.efficientnet import EfficientNet, efficientnet
from fastmbconv.scaling import COEFFICIENTS, Coefficients
from fastmbconv.sources.facts import HALF, IMAGENET
from fastmbconv.sources.reading import read_stored

TINY = Coefficients(width=0.25, depth=0.5, resolution=32, dropout=0.2)


def weights(seed, scheme="timm", **options):
    """A tiny model's entries under a library's names; another seed, other values."""
    torch.manual_seed(seed)
    model = EfficientNet(TINY, num_classes=3, **options)
    return convert(model, model.state_dict(), to=scheme)


RAW, EMA = weights(1), weights(2)


def prefixed(entries, prefix):
    return {f"{prefix}{name}": value for name, value in entries.items()}


def inside(entries, wrapper):
    """Wrapped in the middle of its names, as FSDP and checkpointing wrap blocks."""
    return {name.replace("blocks.1.", f"blocks.1.{wrapper}."): value for name, value in entries.items()}


LIGHTNING = {
    "epoch": 1,
    "pytorch-lightning_version": "2.5",
    "loops": {},
    "callbacks": {},
    "hyper_parameters": {"lr": 1.0},
}
CONTAINERS = {
    "bare": (RAW, RAW, ""),
    "state_dict": ({"epoch": 3, "state_dict": RAW}, RAW, "state_dict"),
    "torchvision's references": (
        {"model": RAW, "optimizer": {"state": {0: {"m": torch.ones(2)}}}, "args": argparse.Namespace(lr=1), "epoch": 1},
        RAW, "model",
    ),
    "timm's, with its average": ({"state_dict": RAW, "state_dict_ema": EMA, "epoch": 1}, EMA, "state_dict_ema"),
    "torchvision's, with its average": ({"model": RAW, "model_ema": prefixed(EMA, "module.")}, EMA, "model_ema"),
    "the average alone": ({"epoch": 3, "ema": EMA}, EMA, "ema"),
    "mmlab": ({"meta": {}, "state_dict": RAW, "ema_state_dict": EMA}, EMA, "ema_state_dict"),
    "AveragedModel": ({"n": 1, "swa": {"n_averaged": torch.tensor(3), **prefixed(EMA, "module.")}}, EMA, "swa"),
    "Lightning": (
        {**LIGHTNING, "state_dict": {**prefixed(RAW, "net."), "criterion.weight": torch.ones(2)}}, RAW, "state_dict",
    ),
    "Lightning's averaging": ({**LIGHTNING, "state_dict": EMA, "current_model_state": RAW}, EMA, "state_dict"),
    "an average in a wrapper": ({"model": RAW, "ema": {"module": EMA, "updates": 3}}, EMA, "ema/module"),
    "nested": ({"state": {"model": RAW, "optimizers": {}}}, RAW, "state/model"),
    "DDP and compile": (prefixed(RAW, "module._orig_mod."), RAW, "module."),
    "FSDP": (inside(prefixed(RAW, "_fsdp_wrapped_module."), "_fsdp_wrapped_module"), RAW, ""),
    "checkpointed blocks": (inside(RAW, "_checkpoint_wrapped_module"), RAW, ""),
    "compiled blocks": (inside(RAW, "_orig_mod"), RAW, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_weights_are_found_in_what_a_library_wraps_them_in(name, tmp_path):
    content, expected, part = CONTAINERS[name]
    torch.save(content, tmp_path / "x.pth")
    model = EfficientNet(TINY, num_classes=3, family="torch")
    report = load(model, tmp_path / "x.pth")
    assert (report.scheme, report.part, report.kept) == ("timm", part, ())
    mine = convert(model, model.state_dict(), to="timm")
    assert all(torch.equal(mine[key], value) for key, value in expected.items())


def test_a_choice_is_told_and_part_chooses_otherwise():
    both = {"state_dict": RAW, "state_dict_ema": EMA}
    model = EfficientNet(TINY, num_classes=3, family="torch")
    assert "'state_dict_ema' is taken, the moving average; part='state_dict' takes" in str(load(model, both))
    assert load(model, both, part="state_dict").part == "state_dict"
    assert torch.equal(model.stem.conv.weight, RAW["conv_stem.weight"])
    teaching = {"state_dict": {**prefixed(RAW, "student."), **prefixed(EMA, "teacher.")}}
    load(model, teaching, part="teacher")
    assert torch.equal(model.stem.conv.weight, EMA["conv_stem.weight"])


SEVERAL = {
    "two networks": (
        {**prefixed(RAW, "student."), **prefixed(EMA, "teacher.")}, "several networks, below 'student.', 'teacher.'",
    ),
    "two sets": ({"generator": RAW, "discriminator": EMA}, "several sets of weights, 'generator', 'discriminator'"),
    "two averages": ({"model": RAW, "ema_slow": EMA, "ema_fast": EMA}, "several sets of weights, 'model', 'ema_slow'"),
    "none": ({"epoch": 3, "args": argparse.Namespace()}, r"holds epoch \(int\), args \(\w+"),
    "a number among tensors": ({"a.weight": torch.ones(1), "b": 3}, r"holds a.weight \(Tensor\), b \(int\): expected"),
    "a whole model": (nn.Linear(2, 2), "a torch.nn.modules.linear.Linear, more than tensors; store model.state_dict"),
    "a whole model in a dict": ({"model": nn.Linear(2, 2), "epoch": 1}, r"\(torch.nn.modules.linear.Linear\), .*store"),
    "a list": ([torch.ones(2)], "holds a list"),
    "nothing": ({}, "holds an empty dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_what_nothing_chooses_from_is_listed(name, tmp_path):
    content, told = SEVERAL[name]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(NoWeightsError, match=told):
        read_contents(tmp_path / "x.pth")


def test_an_unknown_part_lists_what_there_is():
    with pytest.raises(NoWeightsError, match="part is 'ema': source has 'state_dict', 'state_dict_ema'"):
        read_contents({"state_dict": RAW, "state_dict_ema": EMA}, part="ema")
    with pytest.raises(NoWeightsError, match="part is 'ema': source has one set of weights only"):
        read_contents(RAW, part="ema")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_a_training_script_stores_beside_weights_is_read_and_never_run(zipped, tmp_path, monkeypatch, capfd):
    """Stand-ins take the place of what the file names: its classes need not be there, its functions aren't called."""
    gone = types.ModuleType("a_training_library")
    gone.Options = type("Options", (dict,), {"__module__": gone.__name__})
    gone.Rows = type("Rows", (list,), {"__module__": gone.__name__})
    gone.Run = type("Run", (), {"__module__": gone.__name__, "__reduce__": lambda self: (print, ("RAN",))})
    monkeypatch.setitem(sys.modules, gone.__name__, gone)
    content = {
        "state_dict": RAW, "args": argparse.Namespace(model="tf_efficientnet_b0", path=pathlib.Path("x")),
        "best": np.float64(3), "options": gone.Options(a=gone.Options(b=1)), "rows": gone.Rows([1]), "run": gone.Run(),
        "counts": collections.defaultdict(int, a=1), "optimizer": torch.optim.SGD,
    }  # fmt: skip
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, gone.__name__)
    contents = read_contents(tmp_path / "x.ckpt")
    assert contents.entries.keys() == RAW.keys() and contents.facts.value("family") == "tf"
    assert "RAN" not in capfd.readouterr().out


def test_what_wants_the_system_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("echo ran > ran",)

    torch.save({"state_dict": RAW, "x": Evil()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"it wants (posix|nt).system to be run, which no weights need"):
        read_stored(tmp_path / "x.pth")


ZIP = "is cut off: its end is missing"
FILES = {
    "missing": (None, "there is no such file"),
    "empty": (lambda whole: b"", r"is empty \(0 bytes\)"),
    "web page": (lambda whole: b"\n<!DOCTYPE html><html>404</html>", "is a web page, not a checkpoint"),
    "Git LFS": (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    "Keras": (lambda whole: b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "gzip": (lambda whole: b"\x1f\x8b\x08", "packed with gzip"),
    "JSON": (lambda whole: b'{"a": 1}', r"text \(JSON\)"),
    "picture": (lambda whole: b"\x89PNG\r\n", "a picture"),
    "words": (lambda whole: b"no checkpoint", r"is no checkpoint, or is cut off or damaged \(13 bytes\)"),
    "half": (lambda whole: whole[: len(whole) // 2], ZIP),
    "all but the end": (lambda whole: whole[:-20], ZIP),
    "a changed byte": (
        lambda whole: whole.replace(b"\x00\x00\x80?", b"\x00\x00\x80@", 1),
        "the check sum of .* is wrong",
    ),
    "a few bytes": (lambda whole: whole[:10], r"cut off or damaged \(10 bytes\)"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_says_what_it_is(name, tmp_path):
    make, told = FILES[name]
    torch.save({"a.weight": torch.ones(100)}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").unlink() if make is None else (tmp_path / "x.pth").write_bytes(make(whole))
    with pytest.raises(CheckpointError, match=told) as caught:
        read_stored(tmp_path / "x.pth")
    assert "x.pth" in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("cut", "told"),
    [(-3, "cut off or damaged"), (40, "its header alone takes"), (5, "no .safetensors file, or is cut off")],
)
def test_a_cut_safetensors_file_says_so(cut, told, tmp_path):
    file = library("safetensors.torch")
    file.save_file({"a.weight": torch.ones(100)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=told):
        read_stored(tmp_path / "x.safetensors")


def test_a_file_is_read_as_what_it_is_whatever_its_name(tmp_path):
    file = library("safetensors.torch")
    file.save_file(RAW, tmp_path / "x.pth", metadata={"architecture": "tf_efficientnet_b0"})
    torch.save(RAW, tmp_path / "y.safetensors")
    assert read_contents(tmp_path / "x.pth").facts.value("family") == "tf"
    assert read_contents(tmp_path / "y.safetensors").entries.keys() == RAW.keys()


def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="a TorchScript archive: store model.state_dict"):
        read_stored(tmp_path / "x.pt")


def test_a_sharded_folder_is_put_together_and_a_missing_shard_named(tmp_path):
    file = library("safetensors.torch")
    names = sorted(RAW)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, some in halves.items():
        file.save_file({name: RAW[name] for name in some}, tmp_path / shard)
    table = {name: shard for shard, some in halves.items() for name in some}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert read_contents(tmp_path).entries.keys() == RAW.keys()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names b.safetensors, and there is no such file"):
        read_contents(tmp_path)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ((), "it holds no checkpoint"),
        (("a.pth", "b.pth"), "it holds a.pth, b.pth: name one of them"),
        ((".metadata", "__0_0.distcp"), "dcp_to_torch_save"),
    ],
)
def test_a_folder_that_is_no_checkpoint_says_what_it_holds(files, told, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=told):
        read_stored(tmp_path)


CFG = {"architecture": "tf_efficientnet_b0", "mean": [0.5] * 3, "std": [0.5] * 3, "input_size": (3, 32, 40)}
SAYING = {
    "pretrained_cfg": {"pretrained_cfg": CFG},
    "timm's options": {"args": argparse.Namespace(model="tf_efficientnet_b0", **CFG, crop_pct=None, interpolation="")},
    "a configuration of one's own": {"config": {"family": "tf", **CFG}},
}


@pytest.mark.parametrize("name", SAYING)
def test_what_lies_beside_the_weights_is_believed(name, tmp_path):
    torch.save({"state_dict": RAW, **SAYING[name]}, tmp_path / "x.pth")
    facts = read_contents(tmp_path / "x.pth").facts
    expected = {"variant": "b0", "family": "tf", "mean_std": HALF, "resolution": 40, "interpolation": None}
    assert {key: facts.value(key) for key in expected} == expected


def test_options_that_mean_something_else_are_no_facts(tmp_path):
    options = {
        "model": "resnet50",
        "backbone": 3,
        "interpolation": 2,
        "crop_pct": 224,
        "input_size": ["3", "x"],
        "mean": 0,
    }
    torch.save({"state_dict": RAW, "args": argparse.Namespace(**options), "cfg": options}, tmp_path / "x.pth")
    facts = read_contents(tmp_path / "x.pth").facts
    assert not any(facts.get(name) for name in ("variant", "family", "interpolation", "crop", "resolution", "mean_std"))


def test_a_hubs_folder_has_the_models_name(tmp_path):
    (tmp_path / "tf_efficientnet_b0.ap_in1k").mkdir()
    torch.save(RAW, tmp_path / "tf_efficientnet_b0.ap_in1k" / "pytorch_model.bin")
    facts = read_contents(tmp_path / "tf_efficientnet_b0.ap_in1k").facts
    assert (facts.value("family"), facts.value("named_mean_std")) == ("tf", HALF)


def hub(path, config, **files):
    """A folder as a hub has it."""
    library("safetensors.torch").save_file(RAW, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return read_contents(path).facts


def test_timms_config_is_believed(tmp_path):
    cfg = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "input_size": [3, 192, 160],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
    }
    config = {
        "architecture": "tf_efficientnet_b0",
        "num_classes": 3,
        "label_names": ["x", "y", "z"],
        "pretrained_cfg": cfg,
    }
    facts = hub(tmp_path, config)
    expected = {
        "variant": "b0", "family": "tf", "mean_std": HALF, "resolution": 160, "crop": 0.9, "interpolation": "bilinear",
        "classes": ("x", "y", "z"), "num_classes": 3,
    }  # fmt: skip
    assert {name: facts.value(name) for name in expected} == expected


def test_hugging_faces_config_is_believed(tmp_path):
    config = {
        "model_type": "efficientnet", "width_coefficient": 1.0, "depth_coefficient": 1.1, "batch_norm_eps": 1e-4,
        "hidden_act": "swish", "image_size": 240, "id2label": {"1": "b", "0": "a", "10": "k"},
    }  # fmt: skip
    images = {"image_mean": list(IMAGENET[0]), "image_std": list(IMAGENET[1]), "size": {"height": 200}, "resample": 0}
    facts = hub(tmp_path, config, preprocessor_config=images)
    expected = {
        "variant": "b1", "family": "tf", "eps": 1e-4, "activation": "silu", "classes": ("a", "b", "k"),
        "mean_std": IMAGENET, "resolution": 240, "interpolation": "nearest",
    }  # fmt: skip
    assert {name: facts.value(name) for name in expected} == expected


NAMES = {
    "tf_efficientnet_b0_ap-f262efe1.pth": ("b0", "tf", HALF),
    "tf_efficientnet_b4_ns-d6313a46.pth": ("b4", "tf", None),
    "tf_efficientnet_lite3-b733e338.pth": ("lite3", "tf", HALF),
    "tf_something_of_mine.pt": (None, "tf", None),
    "efficientnet_b0_ra-3dd342df.pth": ("b0", "torch", None),
    "efficientnet_lite0_ra-37913777.pth": ("lite0", "torch", None),
    "efficientnet-b0-355c32eb.pth": ("b0", "tf", None),
    "adv-efficientnet-b1-0f3ce85a.pth": ("b1", "tf", HALF),
    "efficientnet_b0.pth": (None, None, None),
    "effnetb1_pruned-bea43a3a.pth": (None, None, None),
    "efficientnet_b0_gn-3dd342df.pth": (None, None, None),
    "model_best.pth.tar": (None, None, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_files_name_is_believed_where_it_says_something(name, tmp_path):
    torch.save(RAW, tmp_path / name)
    facts = read_contents(tmp_path / name).facts
    family = facts.value("family") or facts.value("named_family")
    assert (facts.value("variant"), family, facts.value("named_mean_std")) == NAMES[name]


def b0(scheme):
    with torch.device("meta"):
        model = efficientnet("b0", num_classes=3)
    return convert(model, model.state_dict(), to=scheme)


@pytest.mark.parametrize(
    ("said", "scheme", "told"),
    [
        ({"arch": "tf_efficientnet_b0", "args": argparse.Namespace(model="efficientnet_b0")}, "timm",
         r"the checkpoint \(arch 'tf_efficientnet_b0'\) says family tf, and the checkpoint's 'args' .* torch"),
        ({"arch": "tf_efficientnet_b0"}, "torchvision", "family tf, and a torchvision checkpoint says family torch"),
        ({"arch": "efficientnet_b1"}, "timm", "says b1, and the entries are those of b0"),
    ],
)  # fmt: skip
def test_two_sources_that_disagree_are_both_named(said, scheme, told):
    with pytest.raises(CheckpointError, match=told):
        contents = read_contents({**said, "state_dict": b0(scheme)})
        identify(contents)
        numerics(contents, COEFFICIENTS["b0"])


@pytest.mark.parametrize(
    ("content", "scheme", "expected"),
    [
        ({}, "timm", (None, None)),
        ({"arch": "efficientnet_b5"}, "timm", ("torch", 1e-5)),
        ({"args": {"model": "efficientnet_b0", "bn_eps": 1e-4}}, "timm", ("torch", 1e-4)),
        ({"hyper_parameters": {"backbone": "efficientnet_b0"}}, "huggingface", ("tf", 1e-3)),
        ({}, "lukemelas", ("tf", 1e-3)),
        ({}, "torchvision", ("torch", 1e-5)),
    ],
)
def test_the_numerics_are_those_that_names_and_source_tell(content, scheme, expected):
    found = numerics(read_contents({**content, "state_dict": b0(scheme)}), COEFFICIENTS["b0"])
    assert tuple(fact and fact.value for fact in found) == expected


def test_torchvisions_largest_have_the_other_eps():
    with torch.device("meta"):
        model = efficientnet("b5", num_classes=3)
    entries = convert(model, model.state_dict(), to="torchvision")
    assert [fact.value for fact in numerics(entries, COEFFICIENTS["b5"])] == ["torch", 1e-3]


def test_our_own_state_dict_says_its_family(tmp_path, recwarn):
    source = EfficientNet(TINY, num_classes=3, family="tf", eps=1e-4)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pt")
    load(EfficientNet(TINY, num_classes=3, family="tf", eps=1e-4), tmp_path / "x.pt")
    assert not recwarn
    with pytest.warns(UserWarning, match="the state dict says family='tf', eps=0.0001; this model has family='torch'"):
        load(EfficientNet(TINY, num_classes=3), tmp_path / "x.pt")


def test_what_is_assumed_is_told_and_a_model_that_was_told_is_not_doubted(recwarn):
    with pytest.warns(UserWarning, match="family='torch', eps=1e-05 is assumed: .* make the model with family='tf' or"):
        report = load(EfficientNet(TINY, num_classes=3), RAW)
    assert "is assumed" in str(report)
    recwarn.clear()
    assert load(EfficientNet(TINY, num_classes=3, family="tf"), RAW).notes == () and not recwarn


def changed(name, value):
    return {**RAW, name: value}


BN = "blocks.1.0.bn1.running_var"
VALUES = {
    "whole numbers": (changed("conv_stem.weight", RAW["conv_stem.weight"].char()), "is torch.int8: expected floating"),
    "complex": (changed(BN, RAW[BN].to(torch.complex64)), "is torch.complex64: expected floating"),
    "meta": (changed(BN, RAW[BN].to("meta")), "is on the meta device"),
    "sparse": (changed(BN, RAW[BN].to_sparse()), "is sparse: expected plain values"),
    "twice": ({**RAW, f"_orig_mod.{BN}": RAW[BN]}, "twice, the second time as _orig_mod"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_mean_something_else_are_refused(name):
    entries, told = VALUES[name]
    model = EfficientNet(TINY, num_classes=3, family="torch")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=told):
        load(model, entries)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_values_that_are_not_finite_are_told():
    with pytest.warns(UserWarning, match="running_var has values that are not finite"):
        load(EfficientNet(TINY, num_classes=3, family="torch"), changed(BN, RAW[BN] * float("inf")))


def test_half_a_classifier_is_none():
    model = EfficientNet(TINY, num_classes=3, family="torch")
    own = model.classifier.weight.clone()
    entries = {name: value for name, value in RAW.items() if name != "classifier.bias"}
    report = load(model, entries, strict=False)
    assert report.kept == ("classifier.weight", "classifier.bias") and torch.equal(model.classifier.weight, own)


def test_a_header_that_lies_about_its_length_is_no_reason_to_read_on(tmp_path):
    library("safetensors")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**7) + b"{" + b" " * 100)
    with pytest.raises(CheckpointError, match="cut off"):
        read_stored(tmp_path / "x.safetensors")


def test_an_average_that_lost_its_stem_is_not_passed_over():
    broken = {name: value for name, value in EMA.items() if name != "conv_stem.weight"}
    model = EfficientNet(TINY, num_classes=3, family="torch")
    with pytest.raises(CheckpointError, match="stem.conv.weight has no counterpart"):
        load(model, {"state_dict": RAW, "state_dict_ema": broken})


def test_half_a_classifier_makes_no_model_without_classes():
    entries = b0("lukemelas")
    del entries["_fc.bias"]
    with pytest.raises(CheckpointError, match="source has _fc.weight, and no _fc.bias"):
        identify(entries)


def test_another_activation_is_an_error(tmp_path):
    library("safetensors.torch").save_file(weights(1, "huggingface"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "efficientnet", "hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match="config.json says activation gelu, and the model has silu"):
        load(EfficientNet(TINY, num_classes=3, family="tf"), tmp_path)
