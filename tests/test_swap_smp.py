"""segmentation_models_pytorch's encoders through the swap: its copy of efficientnet_pytorch, and those of timm."""

import copy
import io

import pytest
import torch
from agreement import (
    assert_described,
    assert_kernels_agree,
    assert_same,
    assert_same_masks,
    outcome,
    randomised,
)
from libraries import library
from torch import nn

from fastmbconv import backend, explain, fuse, unfuse
from fastmbconv.parity import assert_parity
from fastmbconv.swap.fused import FusedBlock

smp = library("segmentation_models_pytorch")
efficientnet = pytest.importorskip(
    "segmentation_models_pytorch.encoders._efficientnet", reason="segmentation_models_pytorch has no _efficientnet"
)

GLOBALS = efficientnet.GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3)


def mbconv(image_size=8, kernel=3, stride=1, expand=4, out_channels=8, se=0.25, id_skip=True):
    """A block for 8 channels; image_size None pads at run time."""
    arguments = efficientnet.BlockArgs(1, kernel, stride, expand, 8, out_channels, se, id_skip)
    return efficientnet.MBConvBlock(arguments, GLOBALS, image_size)


def _with(change, **options):
    module = mbconv(**options)
    change(module)
    return module


DESCRIBED = {
    "static": (mbconv, 1),
    "static-stride2": (lambda: mbconv(stride=[2]), (0, 1)),
    "static-odd-k5": (lambda: mbconv(7, kernel=5, stride=2, out_channels=12), 2),
    "dynamic": (lambda: mbconv(None, stride=2), "same"),
    "no-expand": (lambda: mbconv(expand=1), 1),
    "no-se": (lambda: mbconv(se=None), 1),
    "no-id-skip": (lambda: mbconv(id_skip=False), 1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make, padding", DESCRIBED.values(), ids=DESCRIBED)
def test_described(make, padding, training):
    block = assert_described(randomised(make()).train(training), torch.randn(4, 8, 9, 7, dtype=torch.float64))
    assert block.padding == padding and block.bn2.eps == 1e-3 and block.bn2.momentum == pytest.approx(0.01)


@pytest.mark.parametrize("rate, drops", [(None, False), (0.0, False), (0.5, True)])
def test_drop_rate_of_the_call(rate, drops, calls):
    module = randomised(mbconv()).train()
    fused = fuse(copy.deepcopy(module))
    x = torch.randn(8, 8, 5, 5, dtype=torch.float64)
    ours = outcome(fused, lambda x: fused(x, rate), x)
    assert_same(ours, outcome(module, lambda x: module(x, drop_connect_rate=rate), x), rtol=1e-9, atol=1e-9)
    assert [block.drop is not None for block in calls] == [drops]


UNFUSIBLE = {
    "dilation": (lambda: _with(lambda m: setattr(m._depthwise_conv, "dilation", (2, 2))), "dilation 2"),
    "rectangle": (lambda: mbconv((8, 7), stride=2), "pads (0, 1) pixels vertically and (1, 1) horizontally"),
    "swish": (lambda: _with(lambda m: setattr(m, "_swish", nn.Mish())), "is Mish"),
    "norm": (lambda: _with(lambda m: setattr(m, "_bn2", nn.InstanceNorm2d(8))), "is a InstanceNorm2d"),
    "new-child": (lambda: _with(lambda m: m.add_module("scse", nn.Identity())), "an unknown submodule scse"),
    "other-version": (lambda: _with(lambda m: delattr(m, "_has_se")), "another version of this class"),
}


@pytest.mark.parametrize("make, reason", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(make, reason):
    module = make()
    row = explain(fuse(module)).rows[0]
    assert not isinstance(module, FusedBlock)
    assert row.path == "eager" and reason in row.reason


MODELS = {
    "efficientnet-b0": ("Unet", 16, 16),
    "efficientnet-b7": ("FPN", 55, 55),
    "timm-efficientnet-b0": ("Unet", 16, 16),
    "timm-tf_efficientnet_lite0": ("Unet", 16, 16),
    "tu-efficientnet_b0": ("Unet", 16, 16),
    "tu-tf_efficientnetv2_b0": ("Unet", 21, 21),
    "mobilenet_v2": ("Unet", 17, 17),
}


@pytest.mark.parametrize("encoder", MODELS)
def test_encoders_are_fused(encoder):
    kind, fused, total = MODELS[encoder]
    with torch.device("meta"):
        net = getattr(smp, kind)(encoder, encoder_weights=None)
    state, parameters = list(net.state_dict()), list(net.parameters())
    rows = [row for row in explain(fuse(net)) if row.name.startswith("encoder.")]
    assert (sum(row.path == "fused" for row in rows), len(rows)) == (fused, total)
    assert list(net.state_dict()) == state
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert not any(isinstance(m, FusedBlock) for m in unfuse(net).modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timm_encoder_with_its_own_swish():
    encoder = smp.encoders.get_encoder("timm-efficientnet-b0", weights=None).eval()
    block = encoder.blocks[1][1]
    assert type(block.bn1.act) is not nn.SiLU
    assert_described(randomised(block), torch.randn(2, 24, 5, 5, dtype=torch.float64))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return smp.Unet("efficientnet-b0", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))


@pytest.mark.parametrize("training", [True, False])
def test_unet_computes_the_same(unet, training, calls):
    net = copy.deepcopy(unet).double().train(training)
    fused = fuse(copy.deepcopy(net))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_same(outcome(fused, fused, x), outcome(net, net, x), rtol=1e-6, atol=1e-8)
    assert len(calls) == 9  # as many as the encoder's depth needs
    assert any(block.drop is not None for block in calls) is training


def test_dilated_stages_stay_eager(calls):
    """An output stride below 32 takes away strides and static padding, and dilates: in the last stages, if at all."""
    net = smp.DeepLabV3Plus("efficientnet-b0", encoder_weights=None, encoder_output_stride=16).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = net(x)
    explanation = explain(fuse(net))
    eager = [row for row in explanation if row.name.startswith("encoder.") and row.path == "eager"]
    assert explanation.fused == 9 and {row.reason for row in eager} == {"the depthwise convolution has dilation 2"}
    torch.testing.assert_close(net(x), expected)
    assert len(calls) == 9


def test_unfuse_is_bitwise_and_save_loads(unet):
    net = copy.deepcopy(unet).eval()
    x = torch.randn(1, 3, 32, 32)
    types, before, keys = [type(m) for m in net.modules()], net(x), list(net.state_dict())
    buffer = io.BytesIO()
    torch.save(fuse(net), buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert explain(twin).fused == 16 and list(twin.state_dict()) == keys
    assert torch.equal(unfuse(net)(x), before)
    assert [type(m) for m in net.modules()] == types


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted():
    module = fuse(mbconv()).eval()
    x = torch.randn(1, 8, 8, 8)
    assert torch.equal(torch.jit.script(copy.deepcopy(module))(x), unfuse(module)(x))


@pytest.mark.parametrize("training", [True, False])
def test_through_the_kernels(training, device):
    module = randomised(mbconv(stride=2)).train(training).to(device)
    assert_kernels_agree(module, torch.randn(2, 8, 7, 5, dtype=torch.float64, device=device))


def test_same_masks_through_the_kernels(device):
    assert_same_masks(mbconv().to(device).train(), torch.randn(8, 8, 3, 3, device=device), 0.5)


def without_drop(unet):
    """Different dtypes would draw different masks."""
    net = copy.deepcopy(unet).train()
    net.encoder._drop_connect_rate = 0.0
    return net


def one_block(module, name):
    return name == "encoder._blocks.2"


def test_unet_trains(unet, device):
    x, target = (torch.rand(4, n, 16, 16, dtype=torch.float64, device=device) for n in (3, 1))
    runs = {"truth": (torch.float64, "eager"), "eager": (torch.float32, "eager"), "fused": (torch.float32, "triton")}
    losses = {}
    for name, (dtype, path) in runs.items():
        net = fuse(without_drop(unet).to(device, dtype), one_block)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        found = []
        for _ in range(2):
            optimizer.zero_grad()
            with backend(path):
                loss = nn.functional.mse_loss(net(x.to(dtype)), target.to(dtype))
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses[name] = torch.stack(found)
    assert_parity("losses", losses["fused"], losses["eager"], losses["truth"])
    assert losses["fused"][1] < losses["fused"][0]
