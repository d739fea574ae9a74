"""transformers' EfficientNet, and ALIGN's copy of it, through the swap."""

import copy
import io
import itertools

import pytest
import torch
from agreement import (
    assert_described,
    assert_inference_agrees,
    assert_kernels_agree,
    assert_same,
    outcome,
    randomised,
    training_only,
)
from libraries import library
from torch import nn

from fastmbconv import explain, fuse, unfuse
from fastmbconv.swap.fused import FusedBlock, fusible

transformers = library("transformers")
PLACES = {
    "efficientnet": ("modeling_efficientnet", "EfficientNetBlock", "EfficientNetConfig"),
    "align": ("modeling_align", "AlignVisionBlock", "AlignVisionConfig"),
}
modeling = {
    home: pytest.importorskip(f"transformers.models.{home}.{file}", reason=f"transformers has no {file}")
    for home, (file, _, _) in PLACES.items()
}
DROPPED = "elementwise dropout while training (p 0.5), not stochastic depth"


def mbconv(home="efficientnet", kernel=3, stride=1, expand=4, out=8, rate=0.0, id_skip=None, adjust=False, **options):
    """A block for 8 channels; it adds its input where id_skip is false, by default at stride 1."""
    _, block, config = PLACES[home]
    return getattr(modeling[home], block)(
        getattr(transformers, config)(**options),
        in_dim=8,
        out_dim=out,
        stride=stride,
        expand_ratio=expand,
        kernel_size=kernel,
        drop_rate=rate,
        id_skip=stride == 2 if id_skip is None else id_skip,
        adjust_padding=adjust,
    )


def _with(change, **options):
    module = mbconv(**options)
    change(module)
    return module


DESCRIBED = {
    "expand": (mbconv, 1),
    "align": (lambda: mbconv("align"), 1),
    "align-stride2": (lambda: mbconv("align", stride=2, adjust=True), (0, 1)),
    "stride2": (lambda: mbconv(stride=2), 1),
    "adjusted": (lambda: mbconv(stride=2, adjust=True), (0, 1)),
    "adjusted-k5": (lambda: mbconv(stride=2, kernel=5, out=12, adjust=True), (1, 2)),
    "adjusted-stride1": (lambda: mbconv(kernel=5, adjust=True), 2),  # stride 1 does not run its padding module
    "no-expand": (lambda: mbconv(expand=1, id_skip=True), 1),
    "silu": (lambda: mbconv(hidden_act="silu"), 1),
    "relu6": (lambda: mbconv(hidden_act="relu6"), 1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make, padding", DESCRIBED.values(), ids=DESCRIBED)
def test_described(make, padding, training):
    block = assert_described(randomised(make()).train(training), torch.randn(4, 8, 9, 7, dtype=torch.float64))
    assert block.padding == padding


def test_described_details():
    block = fusible(mbconv(batch_norm_momentum=0.99))
    assert (block.bn1.momentum, block.bn2.momentum, block.bn3.momentum) == (0.1, 0.99, 0.99)  # as the library has it
    assert block.bn1.eps == 1e-3 and block.residual and block.se.activation == "silu"
    assert not fusible(mbconv(id_skip=True)).residual


def test_frozen_norm_is_described():
    module = randomised(mbconv()).train()
    module.depthwise_conv.depthwise_norm.eval()
    block = assert_described(module, torch.randn(4, 8, 9, 7, dtype=torch.float64))
    assert block.bn1.training and not block.bn2.training and block.bn3.training


def test_elementwise_dropout_runs_eager_while_it_is_active(calls):
    module = randomised(mbconv(rate=0.5)).train()
    fused = fuse(copy.deepcopy(module))
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    assert_same(outcome(fused, fused, x), outcome(module, module, x), rtol=0, atol=0)
    row = explain(fused).rows[0]
    assert isinstance(fused, FusedBlock) and not calls
    assert (row.path, row.reason, row.geometry.channels) == ("eager", DROPPED, (8, 32, 8))
    assert "not fused" in explain(module).rows[0].reason
    fused.projection.dropout.eval()
    fused(x)
    fused.train().projection.dropout.p = 0.0
    fused(x)
    assert len(calls) == 2 and explain(fused).fused == 1


def test_dropout_without_a_residual_is_never_run(calls):
    fuse(mbconv(rate=0.5, stride=2)).train()(torch.randn(2, 8, 6, 6))
    assert len(calls) == 1


def _depthwise(name, value):
    return lambda m: setattr(m.depthwise_conv, name, value)


def _child(layer, name, value):
    return lambda m: setattr(getattr(m, layer), name, value)


UNFUSIBLE = {
    "kernel": (lambda: mbconv(kernel=7), "kernel size 7"),
    "gelu": (lambda: mbconv(hidden_act="gelu"), "is GELUActivation"),
    "different-acts": (
        lambda: _with(_child("expansion", "expand_act", nn.Mish())),
        "the activation after the expansion is Mish",
    ),
    "pads-twice": (
        lambda: _with(lambda m: setattr(m.depthwise_conv.depthwise_conv, "padding", (1, 1)), stride=2),
        "pads twice",
    ),
    "reflection": (lambda: _with(_depthwise("depthwise_conv_pad", nn.ReflectionPad2d(1)), stride=2), "pads with Refl"),
    "rectangle": (
        lambda: _with(_depthwise("depthwise_conv_pad", nn.ZeroPad2d((0, 1, 1, 1))), stride=2),
        "pads height and width differently",
    ),
    "dilation": (
        lambda: _with(lambda m: setattr(m.depthwise_conv.depthwise_conv, "dilation", (2, 2))),
        "dilation 2",
    ),
    "pool": (
        lambda: _with(_child("squeeze_excite", "squeeze", nn.AdaptiveMaxPool2d(1))),
        "the squeeze-excite pools with AdaptiveMaxPool2d",
    ),
    "gate": (
        lambda: _with(_child("squeeze_excite", "act_expand", nn.Tanh())),
        "the squeeze-excite gate is Tanh",
    ),
    "drop": (
        lambda: _with(_child("projection", "dropout", nn.Dropout2d(0.1))),
        "the residual branch is dropped by a Dropout2d",
    ),
    "norm": (lambda: _with(_depthwise("depthwise_norm", nn.GroupNorm(2, 32))), "is a GroupNorm"),
    "lora": (
        lambda: _with(_child("projection", "project_conv", type("Lora", (nn.Conv2d,), {})(32, 8, 1, bias=False))),
        "the projection is a Lora",
    ),
    "layer": (
        lambda: _with(lambda m: setattr(m, "expansion", mbconv("align").expansion)),
        "expansion is a transformers.models.align.modeling_align.AlignVisionExpansionLayer",
    ),
    "new-child": (
        lambda: _with(lambda m: m.projection.add_module("gamma", nn.Identity())),
        "projection: an unknown submodule gamma",
    ),
    "lost-child": (lambda: _with(lambda m: delattr(m, "squeeze_excite")), "no submodule squeeze_excite"),
}


@pytest.mark.parametrize("make, reason", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(make, reason):
    module = make()
    row = explain(fuse(module)).rows[0]
    assert not isinstance(module, FusedBlock)
    assert row.path == "eager" and reason in row.reason


def b0(home="efficientnet", **options):
    """B0: the configuration's own default is B7."""
    cls = {"efficientnet": "EfficientNetForImageClassification", "align": "AlignVisionModel"}[home]
    config = getattr(transformers, PLACES[home][2])(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=32, num_labels=3, **options
    )
    return getattr(transformers, cls)(config)


@pytest.mark.parametrize("home", PLACES)
def test_models_are_fused(home):
    with torch.device("meta"):
        net = b0(home)
    state, parameters = list(net.state_dict()), list(net.parameters())
    assert explain(fuse(net.train())).fused == 7  # elementwise dropout in the other nine
    explanation = explain(net.eval())
    assert explanation.fused == len(explanation) == 16
    assert list(net.state_dict()) == state
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert not any(isinstance(m, FusedBlock) for m in unfuse(net).modules())


def small_model(**options):
    """The library's own EfficientNet, small, with every stride and kernel size; its third block is padded evenly."""
    config = transformers.EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=[32, 8, 16],
        out_channels=[8, 16, 24],
        kernel_sizes=[3, 5, 3],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 4, 4],
        depthwise_padding=[3],
        hidden_dim=1280,
        dropout_rate=0.0,
        num_labels=3,
        **options,
    )
    return transformers.EfficientNetForImageClassification(config)


@pytest.mark.parametrize("training, rate, fused_calls", [(True, 0.0, 4), (True, 0.5, 3), (False, 0.5, 4)])
@pytest.mark.parametrize("size", [32, 33])
def test_model_computes_the_same(size, training, rate, fused_calls, calls):
    net = small_model(drop_connect_rate=rate).double().train(training)
    fused = fuse(copy.deepcopy(net))
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    ours = outcome(fused, lambda x: fused(x).logits, x)
    assert_same(ours, outcome(net, lambda x: net(x).logits, x), rtol=1e-6, atol=1e-8)
    assert len(calls) == fused_calls


def test_hidden_states(calls):
    net = small_model().eval()
    x = torch.randn(1, 3, 32, 32)
    expected = net(x, output_hidden_states=True).hidden_states
    ours = fuse(net)(x, output_hidden_states=True).hidden_states
    assert len(calls) == 4 and len(ours) == len(expected)
    for a, b in itertools.zip_longest(ours, expected):
        torch.testing.assert_close(a, b)


def test_unfuse_is_bitwise_and_save_loads(tmp_path):
    net = b0().eval()
    x = torch.randn(1, 3, 32, 32)
    types, before, keys = [type(m) for m in net.modules()], net(x).logits, list(net.state_dict())
    buffer = io.BytesIO()
    torch.save(fuse(net), buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(net)):
        assert explain(twin).fused == 16 and list(twin.state_dict()) == keys
    net.save_pretrained(tmp_path)
    plain = type(net).from_pretrained(tmp_path).eval()
    assert explain(plain).fused == 0 and torch.equal(plain(x).logits, before)
    assert torch.equal(unfuse(net)(x).logits, before)
    assert [type(m) for m in net.modules()] == types


def test_hook_on_the_padding(calls):
    module, seen = fuse(mbconv(stride=2)).eval(), []
    module.depthwise_conv.depthwise_conv_pad.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(1, 8, 8, 8))
    assert seen and not calls
    assert explain(module).rows[0].reason == "a hook on depthwise_conv.depthwise_conv_pad"


def test_image_by_keyword(calls):
    module = fuse(mbconv()).eval()
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(module(hidden_states=x), module(x))
    assert len(calls) == 2


def test_compiles_to_one_graph(calls):
    module = fuse(mbconv(stride=2, adjust=True)).train()
    x = torch.randn(2, 8, 7, 7)
    torch._dynamo.reset()
    y = torch.compile(module, backend="eager", fullgraph=True)(x)
    assert y.shape == (2, 8, 3, 3) and len(calls) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [mbconv, lambda: mbconv(kernel=5, stride=2, expand=1, out=12, adjust=True)],
    ids=["residual", "adjusted-odd"],
)
def test_through_the_kernels(make, training, device):
    module = randomised(make()).train(training).to(device)
    assert_kernels_agree(module, torch.randn(2, 8, 7, 5, dtype=torch.float64, device=device))


def test_align_and_frozen_norm_through_the_kernels(device):
    module = randomised(mbconv("align", stride=2, adjust=True)).train().to(device)
    module.expansion.expand_bn.eval()
    assert_kernels_agree(module, torch.randn(2, 8, 4, 5, dtype=torch.float64, device=device))


def test_inference_through_the_kernels(device):
    module = randomised(mbconv(rate=0.5)).to(device)
    assert_inference_agrees(module, torch.randn(2, 8, 7, 5, dtype=torch.float64, device=device))


class Logits(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).logits


def test_model_through_the_kernels(device):
    name = "net.efficientnet.encoder.blocks.2"
    net = training_only(randomised(Logits(small_model(drop_connect_rate=0.0))).to(device), name)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64, device=device)
    assert_kernels_agree(net, x, lambda module, found: found == name)
