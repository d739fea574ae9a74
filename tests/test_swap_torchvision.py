"""torchvision's EfficientNets through the swap."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from agreement import assert_described, assert_kernels_agree, assert_same, assert_same_masks, outcome, randomised
from libraries import library
from torch import nn

from fastmbconv import backend, explain, fuse, unfuse
from fastmbconv.swap.fused import FusedBlock, fusible

torchvision = library("torchvision")
efficientnet = pytest.importorskip("torchvision.models.efficientnet", reason="torchvision has no efficientnet")
mobilenetv2 = pytest.importorskip("torchvision.models.mobilenetv2", reason="torchvision has no mobilenetv2")
mobilenetv3 = pytest.importorskip("torchvision.models.mobilenetv3", reason="torchvision has no mobilenetv3")
mnasnet = pytest.importorskip("torchvision.models.mnasnet", reason="torchvision has no mnasnet")


def mbconv(expand=4.0, kernel=3, stride=1, out_channels=8, rate=0.0, mode="row", norm_layer=nn.BatchNorm2d):
    config = efficientnet.MBConvConfig(expand, kernel, stride, 8, out_channels, 1)
    module = efficientnet.MBConv(config, rate, norm_layer)
    module.stochastic_depth.mode = mode
    return module


def mobile_v2(out_channels=8, stride=1, expand=4, **options):
    return mobilenetv2.InvertedResidual(8, out_channels, stride, expand, **options)


def mobile_v3(expanded=24, se=False, activation="RE", stride=1, dilation=1):
    config = mobilenetv3.InvertedResidualConfig(8, 5, expanded, 8, se, activation, stride, dilation, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


def _with(change, make=mbconv):
    module = make()
    change(module)
    return module


DESCRIBED = {
    "expand": mbconv,
    "k5-stride2": lambda: mbconv(kernel=5, stride=2, out_channels=12),
    "no-expand": lambda: mbconv(expand=1.0),
    "row": lambda: mbconv(rate=0.5),
    "batch": lambda: mbconv(rate=0.5, mode="batch"),
    "no-expand-row": lambda: mbconv(expand=1.0, rate=0.5),
    "eps": lambda: mbconv(norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)),
    "no-se": lambda: _with(lambda m: m.block.__setitem__(2, nn.Identity())),
    "mobile-v2": mobile_v2,
    "mobile-v2-stride2": lambda: mobile_v2(12, stride=2),
    "mobile-v2-no-expand": lambda: mobile_v2(expand=1),
    "mobile-v3": mobile_v3,
    "mobile-v3-no-expand": lambda: mobile_v3(expanded=8),
    "mobile-v3-hard": lambda: mobile_v3(se=True, activation="HS"),
    "mobile-v2-late-act": lambda: _with(lambda m: m.conv.append(nn.ReLU6()), mobile_v2),
    "mnasnet": lambda: mnasnet._InvertedResidual(8, 8, 3, 1, 3, bn_momentum=0.01),
    "mnasnet-stride2": lambda: mnasnet._InvertedResidual(8, 12, 5, 2, 3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", DESCRIBED.values(), ids=DESCRIBED)
def test_described(make, training):
    assert_described(randomised(make()).train(training), torch.randn(4, 8, 9, 7, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_seed_same_masks(mode, dtype):
    module = mbconv(rate=0.5, mode=mode).train()
    drop = fusible(module).drop
    torch.manual_seed(3)
    ours = drop(torch.ones(64, 1, 1, 1, dtype=dtype))
    torch.manual_seed(3)
    theirs = module.stochastic_depth(torch.ones(64, 8, 2, 2, dtype=dtype))
    assert torch.equal(ours.expand_as(theirs), theirs)
    assert fusible(module.eval()).drop is None


def _se(module):
    return module.block[2]


UNFUSIBLE = {
    "kernel": (lambda: mbconv(kernel=7), "kernel size 7"),
    "dilation": (lambda: _with(lambda m: setattr(m.block[1][0], "dilation", (2, 2))), "dilation 2"),
    "norm": (lambda: mbconv(norm_layer=lambda c: nn.GroupNorm(1, c)), "is a GroupNorm"),
    "frozen-norm": (lambda: mbconv(norm_layer=torchvision.ops.FrozenBatchNorm2d), "is a FrozenBatchNorm2d"),
    "gate": (
        lambda: _with(lambda m: setattr(_se(m), "scale_activation", nn.Tanh())),
        "gate is Tanh",
    ),
    "pool": (lambda: _with(lambda m: setattr(_se(m), "avgpool", nn.AdaptiveMaxPool2d(1))), "pools with Adaptive"),
    "other-se": (lambda: _with(lambda m: m.block.__setitem__(2, nn.Dropout())), "the squeeze-excite is a torch.nn"),
    "act": (lambda: _with(lambda m: m.block[1].__setitem__(2, nn.Mish())), "the depthwise convolution is Mish"),
    "late-act": (lambda: _with(lambda m: m.block[3].append(nn.Mish())), "the projection is Mish"),
    "new-child": (lambda: _with(lambda m: m.add_module("gamma", nn.Identity())), "an unknown submodule gamma"),
    "longer": (lambda: _with(lambda m: m.block.insert(0, copy.deepcopy(m.block[0]))), "4 convolutions"),
    "mobile-v2-norm": (lambda: mobile_v2(norm_layer=torchvision.ops.FrozenBatchNorm2d), "is a FrozenBatchNorm2d"),
    "mobile-v2-longer": (
        lambda: _with(lambda m: m.conv.extend((nn.ReLU6(), nn.Dropout())), mobile_v2),
        "a Dropout where a convolution is expected",
    ),
    "mobile-v2-wrapped": (
        lambda: _with(lambda m: m.conv.__setitem__(2, nn.ModuleDict({"base": m.conv[2]})), mobile_v2),
        "a ModuleDict where a convolution is expected",
    ),
    "mobile-v2-norm-lost": (lambda: _with(lambda m: m.conv.pop(3), mobile_v2), "a convolution without a norm"),
    "mobile-v3-dilation": (lambda: mobile_v3(stride=2, dilation=2), "dilation 2"),
    "mnasnet-new-child": (
        lambda: _with(lambda m: m.add_module("gamma", nn.Identity()), lambda: mnasnet._InvertedResidual(8, 8, 3, 1, 3)),
        "an unknown submodule gamma",
    ),
}


@pytest.mark.parametrize("make, reason", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(make, reason):
    module = make()
    row = explain(fuse(module)).rows[0]
    assert not isinstance(module, FusedBlock)
    assert row.path == "eager" and reason in row.reason


MODELS = {
    "efficientnet_b0": (16, 16),
    "efficientnet_b7": (55, 55),
    "efficientnet_v2_s": (40, 40),
    "mobilenet_v2": (17, 17),
    "mobilenet_v3_large": (15, 15),
    "mnasnet1_0": (17, 17),  # the first lies flat in a Sequential
}


@pytest.mark.parametrize("name, counts", MODELS.items(), ids=MODELS)
def test_models_are_fused(name, counts):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=3)
    state, parameters = list(model.state_dict()), list(model.parameters())
    explanation = explain(fuse(model))
    assert (explanation.fused, len(explanation)) == counts
    assert list(model.state_dict()) == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(isinstance(m, FusedBlock) for m in unfuse(model).modules())


def test_quantisable_blocks():
    """A class that no adapter knows: fused by structure, until it is prepared for quantisation."""
    model = torchvision.models.quantization.mobilenet_v2(width_mult=0.25).eval()
    assert explain(fuse(model)).fused == len(explain(model)) == 17
    model.qconfig = torch.ao.quantization.default_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.prepare(model, inplace=True)
    assert explain(model).fused == 0
    x = torch.randn(1, 3, 32, 32)
    with backend("triton"):
        y = model(x)
    assert torch.equal(y, unfuse(model)(x))


def small_model():
    """torchvision's own EfficientNet, small, with every stride and kernel size."""
    config = efficientnet.MBConvConfig
    stages = [config(1, 3, 1, 8, 8, 1), config(4, 5, 2, 8, 16, 2), config(4, 3, 2, 16, 24, 1)]
    return efficientnet.EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.5, num_classes=3)


@pytest.mark.parametrize("training", [True, False])
def test_model_computes_the_same(training, calls):
    model = small_model().double().train(training)
    fused = fuse(copy.deepcopy(model))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert_same(outcome(fused, fused, x), outcome(model, model, x), rtol=1e-6, atol=1e-8)
    assert len(calls) == 4


def test_unfuse_is_bitwise_and_save_loads():
    model = torchvision.models.efficientnet_b0(num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    types, before = [type(m) for m in model.modules()], model(x)
    buffer = io.BytesIO()
    torch.save(fuse(model), buffer)
    buffer.seek(0)
    assert explain(torch.load(buffer, weights_only=False)).fused == 16
    assert torch.equal(unfuse(model)(x), before)
    assert [type(m) for m in model.modules()] == types


def test_feature_extraction_by_fx(calls):
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision has no extraction")
    model = fuse(torchvision.models.efficientnet_b0(num_classes=3)).eval()
    x = torch.randn(1, 3, 32, 32)
    features = extraction.create_feature_extractor(model, {"features.2.1.block.1": "inner", "flatten": "last"})(x)
    assert features["inner"].shape == (1, 144, 8, 8)
    torch.testing.assert_close(model.classifier(features["last"]), model(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [mbconv, lambda: mbconv(expand=1.0, kernel=5, stride=2, out_channels=12), mobile_v2],
    ids=["residual", "stride-2", "mobile-v2"],
)
def test_through_the_kernels(make, training, device):
    module = randomised(make()).train(training).to(device)
    assert_kernels_agree(module, torch.randn(2, 8, 6, 5, dtype=torch.float64, device=device))


def test_same_masks_through_the_kernels(device):
    assert_same_masks(mbconv(rate=0.5).to(device).train(), torch.randn(8, 8, 3, 3, device=device))
