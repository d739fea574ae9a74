"""efficientnet_pytorch's models through the swap."""

import copy
import io

import pytest
import torch
from agreement import (
    assert_described,
    assert_inference_agrees,
    assert_kernels_agree,
    assert_same,
    assert_same_masks,
    outcome,
    randomised,
    training_only,
)
from libraries import library
from torch import nn

from fastmbconv import backend, explain, fuse, unfuse
from fastmbconv.parity import assert_parity
from fastmbconv.swap.fused import FusedBlock, fusible
from fastmbconv.swap.lukemelas import drop_connect

library("efficientnet_pytorch")
model = pytest.importorskip("efficientnet_pytorch.model", reason="efficientnet_pytorch has no model")
utils = pytest.importorskip("efficientnet_pytorch.utils", reason="efficientnet_pytorch has no utils")

GLOBALS = utils.GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3)


def mbconv(image_size=None, kernel=3, stride=1, expand=4, out_channels=8, se=0.25, id_skip=True):
    """A block for 8 channels; image_size None pads at run time."""
    arguments = utils.BlockArgs(1, kernel, stride, expand, 8, out_channels, se, id_skip)
    return model.MBConvBlock(arguments, GLOBALS, image_size)


def _with(change, **options):
    module = mbconv(**options)
    change(module)
    return module


DESCRIBED = {
    "dynamic": (mbconv, "same"),
    "dynamic-k5-stride2": (lambda: mbconv(kernel=5, stride=2, out_channels=12), "same"),
    "stride-list": (lambda: mbconv(stride=[2]), "same"),
    "static": (lambda: mbconv((9, 7)), 1),
    "static-odd-stride2": (lambda: mbconv((9, 7), stride=2), 1),
    "static-even-stride2": (lambda: mbconv(8, stride=[2]), (0, 1)),
    "static-even-k5-stride2": (lambda: mbconv(8, kernel=5, stride=2, out_channels=12), (1, 2)),
    "no-expand": (lambda: mbconv(8, expand=1), 1),
    "no-se": (lambda: mbconv(se=None), "same"),
    "no-id-skip": (lambda: mbconv(id_skip=False), "same"),
    "swish": (lambda: _with(lambda m: m.set_swish(False)), "same"),
    "padded-convolution": (
        lambda: _with(lambda m: setattr(m._depthwise_conv, "padding", (1, 1)), image_size=8, kernel=5, stride=2),
        (2, 3),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make, padding", DESCRIBED.values(), ids=DESCRIBED)
def test_described(make, padding, training):
    """Static padding keeps what it was built for: the same odd image here, whatever size that was."""
    block = assert_described(randomised(make()).train(training), torch.randn(4, 8, 9, 7, dtype=torch.float64))
    assert block.padding == padding


def test_described_details():
    block = fusible(mbconv())
    assert block.residual and block.bn1.eps == 1e-3 and block.bn1.momentum == pytest.approx(0.01)
    assert not fusible(mbconv(stride=[1])).residual  # the library compares a list with 1, and adds no input


def test_frozen_norm_is_described():
    module = randomised(mbconv()).train()
    module._bn1.eval()
    block = assert_described(module, torch.randn(4, 8, 9, 7, dtype=torch.float64))
    assert block.bn1.training and not block.bn2.training and block.bn3.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_seed_same_masks(dtype):
    torch.manual_seed(3)
    ours = drop_connect(torch.ones(64, 1, 1, 1, dtype=dtype), 0.3)
    torch.manual_seed(3)
    theirs = utils.drop_connect(torch.ones(64, 8, 2, 2, dtype=dtype), 0.3, training=True)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.to(dtype).expand_as(theirs), theirs)


@pytest.mark.parametrize("call", [lambda m, x: m(x, 0.5), lambda m, x: m(inputs=x, drop_connect_rate=0.5)])
def test_drop_rate_of_the_call(call, calls):
    module = randomised(mbconv()).train()
    fused = fuse(copy.deepcopy(module))
    x = torch.randn(8, 8, 5, 5, dtype=torch.float64)
    assert_same(
        outcome(fused, lambda x: call(fused, x), x), outcome(module, lambda x: call(module, x), x), rtol=1e-9, atol=1e-9
    )
    assert calls[0].drop is not None
    call(fused.eval(), x)
    fused.train()(x, drop_connect_rate=0)
    assert [block.drop for block in calls[1:]] == [None, None]


def test_drop_rate_without_a_residual(calls):
    fuse(mbconv(stride=2)).train()(torch.randn(2, 8, 6, 6), 0.5)
    assert calls[0].drop is None


@pytest.mark.parametrize("rate, error", [(2, AssertionError), ("a", TypeError)])
def test_bad_drop_rate_is_the_librarys_error(rate, error, calls):
    with pytest.raises(error):
        fuse(mbconv()).train()(torch.randn(2, 8, 6, 6), drop_connect_rate=rate)
    with pytest.raises(TypeError):
        fuse(mbconv())(torch.randn(2, 8, 6, 6), 0.1, 0.2)
    assert not calls


def _static(padding):
    return lambda m: setattr(m._depthwise_conv, "static_padding", padding)


UNFUSIBLE = {
    "kernel": (lambda: mbconv(kernel=7), "kernel size 7"),
    "dilation": (lambda: _with(lambda m: setattr(m._depthwise_conv, "dilation", (2, 2))), "dilation 2"),
    "rectangle": (
        lambda: mbconv((8, 7), stride=2),
        "_depthwise_conv pads (0, 1) pixels vertically and (1, 1) horizontally",
    ),
    "reflection": (
        lambda: _with(_static(nn.ReflectionPad2d(1)), image_size=8),
        "_depthwise_conv pads with ReflectionPad2d",
    ),
    "crop": (lambda: _with(_static(nn.ZeroPad2d(-1)), image_size=8), "padding -1"),
    "large-pad": (lambda: _with(_static(nn.ZeroPad2d((1, 3, 1, 3))), image_size=8), "padding (1, 3)"),
    "pads-twice": (lambda: _with(lambda m: setattr(m._depthwise_conv, "padding", (1, 1))), "pads twice"),
    "padded-project": (
        lambda: _with(lambda m: setattr(m._project_conv, "static_padding", nn.ZeroPad2d(1)), image_size=8),
        "the projection has padding 1",
    ),
    "padded-se": (lambda: _with(lambda m: setattr(m._se_reduce, "padding", (1, 1))), "_se_reduce pads"),
    "norm": (lambda: _with(lambda m: setattr(m, "_bn1", nn.GroupNorm(2, 32))), "is a GroupNorm"),
    "swish": (lambda: _with(lambda m: setattr(m, "_swish", nn.Mish())), "is Mish"),
    "convolution": (
        lambda: _with(lambda m: setattr(m._expand_conv, "__class__", type("Lora", (nn.Conv2d,), {}))),
        "the expansion is a Lora",
    ),
    "new-child": (lambda: _with(lambda m: m.add_module("gamma", nn.Identity())), "an unknown submodule gamma"),
    "lost-child": (lambda: _with(lambda m: delattr(m, "_bn2")), "no submodule _bn2"),
    "other-version": (lambda: _with(lambda m: delattr(m, "has_se")), "another version of this class"),
}


@pytest.mark.parametrize("make, reason", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(make, reason):
    module = make()
    row = explain(fuse(module)).rows[0]
    assert not isinstance(module, FusedBlock)
    assert row.path == "eager" and reason in row.reason


def _foreign(module_name, forward):
    """An MBConvBlock of another library: the same name, another forward."""
    cls = type("MBConvBlock", (nn.Module,), {"__module__": module_name, "forward": forward})
    block = cls()
    block._depthwise_conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    block._project_conv = nn.Conv2d(8, 8, 1, bias=False)
    return block


def test_a_refused_block_shows_its_squeeze_excite():
    module = mbconv()
    module._swish = nn.Mish()
    (row,) = explain(module).rows
    assert row.path == "eager" and row.geometry.squeeze_excite


@pytest.mark.parametrize("home", ["monai.networks.nets.efficientnet", "image_classification.models.efficientnet"])
def test_same_name_is_not_the_same_block(home):
    block = _foreign(home, lambda self, x: self._project_conv(self._depthwise_conv(x)))
    row = explain(fuse(nn.Sequential(block))).rows[0]
    assert type(block).__name__ == "MBConvBlock" and row.reason == "no BatchNorm after the projection"


@pytest.mark.parametrize("name, blocks", [("efficientnet-b0", 16), ("efficientnet-b7", 55)])
def test_models_are_fused(name, blocks):
    with torch.device("meta"):
        net = model.EfficientNet.from_name(name, num_classes=3)
    state, parameters = list(net.state_dict()), list(net.parameters())
    explanation = explain(fuse(net))
    assert explanation.fused == len(explanation) == blocks
    assert list(net.state_dict()) == state
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert not any(isinstance(m, FusedBlock) for m in unfuse(net).modules())


def small_model(image_size=32, drop_connect_rate=0.8):
    """The library's own EfficientNet, small, with every stride and kernel size."""
    stages = ["r1_k3_s11_e1_i32_o8_se0.25", "r2_k5_s22_e4_i8_o16_se0.25", "r1_k3_s22_e4_i16_o24"]
    options = {"image_size": image_size, "num_classes": 3, "dropout_rate": 0.0, "drop_connect_rate": drop_connect_rate}
    return model.EfficientNet(
        utils.BlockDecoder.decode(stages),
        GLOBALS._replace(width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=8, include_top=True, **options),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("image_size, size", [(32, 32), (32, 33), (33, 32), (None, 33)])
def test_model_computes_the_same(image_size, size, training, calls):
    """At the resolution that static padding was built for, and off it."""
    net = small_model(image_size).double().train(training)
    fused = fuse(copy.deepcopy(net))
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    assert_same(outcome(fused, fused, x), outcome(net, net, x), rtol=1e-6, atol=1e-8)
    assert len(calls) == 4
    drops = [block.drop is not None for block in calls]
    assert drops == [False, False, training, False]


def test_endpoints_and_swish(calls):
    net = small_model().eval()
    x = torch.randn(1, 3, 32, 32)
    expected = net.extract_endpoints(x)
    fuse(net).set_swish(memory_efficient=False)
    ours = net.extract_endpoints(x)
    assert len(calls) == 4 and ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_unfuse_is_bitwise_and_save_loads():
    net = model.EfficientNet.from_name("efficientnet-b0", num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    types, before, keys = [type(m) for m in net.modules()], net(x), list(net.state_dict())
    buffer = io.BytesIO()
    torch.save(fuse(net), buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(net)):
        assert explain(twin).fused == 16 and list(twin.state_dict()) == keys
    assert torch.equal(unfuse(net)(x), before)
    assert [type(m) for m in net.modules()] == types


def test_hook_on_the_static_padding(calls):
    module, seen = fuse(mbconv(8)).eval(), []
    module._depthwise_conv.static_padding.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(1, 8, 8, 8))
    assert seen and not calls
    assert explain(module).rows[0].reason == "a hook on _depthwise_conv.static_padding"


def test_replaced_forward_inside(calls):
    """As offloading tools do it: they wrap the forward of each leaf."""
    module, seen = fuse(mbconv(8)).eval(), []
    forward = module._bn1.forward
    module._bn1.forward = lambda x: seen.append(1) or forward(x)
    module(torch.randn(1, 8, 8, 8))
    assert seen and not calls
    assert explain(module).rows[0].reason == "a forward replaced on _bn1"


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training, calls):
    module = fuse(mbconv(8)).train(training)
    x = torch.randn(4, 8, 6, 6)
    torch._dynamo.reset()
    y = torch.compile(module, backend="eager", fullgraph=True)(x, drop_connect_rate=0.5)
    assert y.shape == x.shape and len(calls) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [mbconv, lambda: mbconv(8, kernel=5, stride=2, expand=1, out_channels=12)],
    ids=["residual", "static-off-native"],
)
def test_through_the_kernels(make, training, device):
    module = randomised(make()).train(training).to(device)
    assert_kernels_agree(module, torch.randn(2, 8, 7, 5, dtype=torch.float64, device=device))


def test_frozen_norm_through_the_kernels(device):
    module = randomised(mbconv(8)).train().to(device)
    module._bn2.eval()
    assert_kernels_agree(module, torch.randn(2, 8, 4, 4, dtype=torch.float64, device=device))


@pytest.mark.parametrize("make", [mbconv, lambda: mbconv(8, stride=2)], ids=["residual", "static-off-native"])
def test_inference_through_the_kernels(make, device):
    assert_inference_agrees(randomised(make()).to(device), torch.randn(2, 8, 7, 5, dtype=torch.float64, device=device))


def test_model_through_the_kernels(device):
    """Off the resolution that the padding was built for; two blocks run kernels."""
    names = ("_blocks.1", "_blocks.2")
    net = training_only(randomised(small_model(drop_connect_rate=0.0)).to(device), "_blocks.2")
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64, device=device)
    assert_kernels_agree(net, x, lambda module, name: name in names)


def test_same_masks_through_the_kernels(device):
    module = mbconv().to(device).train()
    assert_same_masks(module, torch.randn(8, 8, 3, 3, device=device), 0.5)


def test_masks_in_half_precision_keep_the_rule(device):
    """1 / keep rounded to bf16 would be an error of its own."""
    module = randomised(mbconv(8)).train().to(device)
    x = torch.randn(8, 8, 3, 3, dtype=torch.float64, device=device).bfloat16()
    truth, eager, fused = copy.deepcopy(module), copy.deepcopy(module).bfloat16(), copy.deepcopy(module).bfloat16()
    outputs = []
    for net, image in ((truth, x.double()), (eager, x), (fuse(fused), x)):
        torch.manual_seed(5)
        with backend("triton" if net is fused else "eager"):
            outputs.append(net(image, drop_connect_rate=0.0625))
    exact, theirs, ours = outputs
    assert_parity("y", ours, theirs, exact)
