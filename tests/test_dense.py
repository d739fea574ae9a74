"""Fused-MBConv blocks: everything behind the dense convolution, against timm's and torchvision's own blocks."""

import copy

import pytest
import torch
from agreement import assert_kernels_agree, assert_same, assert_same_masks, outcome, randomised
from blocks import shrink
from libraries import library
from torch import nn

import fastmbconv
from fastmbconv import dense, explain, fuse, reference, unfuse
from fastmbconv.block import DenseBlock
from fastmbconv.kernels.traffic import recorded
from fastmbconv.swap.fused import FusedBlock, fusible
from fastmbconv.traffic import count_dense

library("timm")
library("torchvision")
timm_blocks = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm has no _efficientnet_blocks")
timm_layers = pytest.importorskip("timm.layers", reason="timm has no layers")
efficientnet = pytest.importorskip("torchvision.models.efficientnet", reason="torchvision has no efficientnet")


def edge(out_chs=8, act_layer=nn.SiLU, se=False, **options):
    se_layer = timm_blocks.SqueezeExcite if se else None
    return timm_blocks.EdgeResidual(8, out_chs, exp_ratio=4, act_layer=act_layer, se_layer=se_layer, **options)


def single(out_chs=8, act_layer=nn.SiLU, skip=True, **options):
    return timm_blocks.ConvBnAct(8, out_chs, 3, act_layer=act_layer, skip=skip, **options)


def torchvision_block(expand=4, stride=1, out_channels=8, rate=0.0):
    config = efficientnet.FusedMBConvConfig(expand, 3, stride, 8, out_channels, 1)
    return efficientnet.FusedMBConv(config, rate, nn.BatchNorm2d)


def changed(change, make=edge):
    module = make()
    change(module)
    return module


DESCRIBED = {
    "edge": edge,
    "edge-se": lambda: edge(se=True, drop_path_rate=0.5),
    "edge-same-stride2": lambda: edge(12, pad_type="same", stride=2, act_layer=nn.ReLU6),
    "edge-groups": lambda: edge(group_size=8),
    "edge-momentum": lambda: changed(lambda m: setattr(m.bn1, "momentum", None)),
    "edge-untracked": lambda: changed(lambda m: setattr(m, "bn2", nn.BatchNorm2d(8, track_running_stats=False))),
    "single": single,
    "single-drop": lambda: single(drop_path_rate=0.5),
    "single-stride2": lambda: single(12, stride=2, act_layer=nn.ReLU),
    "torchvision": lambda: torchvision_block(rate=0.5),
    "torchvision-stride2": lambda: torchvision_block(stride=2, out_channels=12),
    "torchvision-no-expand": lambda: torchvision_block(expand=1, rate=0.5),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", DESCRIBED.values(), ids=DESCRIBED)
def test_described(make, training):
    own = randomised(make()).train(training)
    described = copy.deepcopy(own)
    block, x = fusible(described), torch.randn(4, 8, 7, 6, dtype=torch.float64)
    assert isinstance(block, DenseBlock), block
    ours = outcome(described, lambda x: reference.dense_mbconv(x, block), x)
    assert_same(ours, outcome(own, own, x), rtol=1e-9, atol=1e-9)


UNFUSIBLE = {
    "dilation": (lambda: edge(dilation=2), "the dense convolution has dilation 2"),
    "anti-aliasing": (lambda: edge(stride=2, aa_layer=timm_layers.BlurPool2d), "anti-aliasing (BlurPool2d)"),
    "hard-swish": (lambda: single(act_layer=nn.Hardswish), "the activation after the dense convolution is Hardswish"),
    "group-norm": (
        lambda: changed(lambda m: setattr(m, "bn1", nn.GroupNorm(4, 32))),
        "the norm after the dense convolution is a Group",
    ),
    "bias": (lambda: changed(lambda m: setattr(m, "conv_exp", nn.Conv2d(8, 32, 3, padding=1))), "has a bias"),
    "pw-kernel": (lambda: edge(pw_kernel_size=3), "the projection is 3x3"),
    "new-child": (lambda: changed(lambda m: m.add_module("gamma", nn.Identity()), single), "unknown submodule gamma"),
    "longer": (
        lambda: changed(lambda m: m.block.append(nn.Identity()), torchvision_block),
        "its block is a Sequential, not a Sequential of 1 or 2 stages",
    ),
}


@pytest.mark.parametrize("make, reason", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(make, reason):
    module = make()
    row = explain(fuse(module)).rows[0]
    assert not isinstance(module, FusedBlock) and row.path == "eager" and reason in row.reason


KERNELS = {
    "edge-se": (lambda: edge(se=True), True),
    "edge-same-stride2": (lambda: edge(12, pad_type="same", stride=2, act_layer=nn.ReLU6), True),
    "edge-eval": (edge, False),
    "single": (single, True),
    "torchvision-no-expand-eval": (lambda: torchvision_block(expand=1), False),
}


@pytest.mark.parametrize("make, training", KERNELS.values(), ids=KERNELS)
def test_through_the_kernels(make, training, device):
    module = randomised(make()).train(training).to(device)
    assert_kernels_agree(module, torch.randn(2, 8, 6, 5, dtype=torch.float64, device=device))


@pytest.mark.parametrize("make", [lambda: single(drop_path_rate=0.5), lambda: torchvision_block(rate=0.5)])
def test_same_masks_through_the_kernels(make, device):
    assert_same_masks(make().to(device).train(), torch.randn(8, 8, 3, 3, device=device))


@pytest.mark.parametrize("wide", [True, False])
def test_autocast(wide, device):
    """A wider shortcut stays wide, and the weights get their gradients in their own dtype."""
    module = fuse(single()).train().to(device)
    x = torch.randn(2, 8, 4, 4, device=device, dtype=torch.float32 if wide else torch.bfloat16)
    with fastmbconv.backend("triton"), torch.autocast(device.type, dtype=torch.bfloat16):
        y = module(x)
    y.float().sum().backward()
    assert y.dtype == x.dtype and module.conv.weight.grad.dtype == torch.float32


def test_frozen_and_hooked_blocks(device):
    module, x = fuse(edge()).train().to(device), torch.randn(2, 8, 4, 4, device=device)
    handle = module.conv_pwl.register_forward_pre_hook(lambda *_: None)
    assert explain(module).rows[0].reason == "a hook on conv_pwl"
    handle.remove()
    module.bn1.eval()
    mean = module.bn1.running_mean.clone()
    with fastmbconv.backend("triton"):
        module(x)
    assert torch.equal(module.bn1.running_mean, mean) and module.bn2.num_batches_tracked == 1
    assert type(unfuse(module)) is timm_blocks.EdgeResidual


@pytest.mark.usefixtures("triton_backend")
def test_refused_before_anything_changes(device):
    module = edge().train().to(device)
    with pytest.raises(ValueError, match="x has 4 channels"):
        dense.dense_mbconv(torch.randn(1, 4, 4, 4, device=device), fusible(module))
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        dense.dense_mbconv(torch.randn(1, 8, 1, 1, device=device), fusible(module))
    assert module.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training, device):
    model = nn.Sequential(fuse(edge(se=True)), fuse(single())).train(training).to(device)
    x = torch.randn(2, 8, 4, 4, device=device)
    with fastmbconv.backend("triton"):
        expected = copy.deepcopy(model)(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("make, eager, fused", [(edge, 24, 12), (lambda: edge(se=True), 37, 13), (single, 25, 18)])
def test_traffic(make, eager, fused, device):
    """The count is dense.py's, and what our launches state is the count without the library's convolution."""
    block, shape = fusible(make().train()), (4, 8, 16, 16)
    u, traffic = count_dense(block, shape)
    assert (traffic.eager_training / u, traffic.fused_training / u) == (eager, fused)
    module, x = make().train().to(device), torch.randn(shape, device=device, requires_grad=True)
    with fastmbconv.backend("triton"), recorded() as launches:
        y = dense.dense_mbconv(x, fusible(module))
        y.sum().backward()
    images = [m for launch in launches for m in (*launch.reads, *launch.writes) if m.shape[:3] == (4, 16, 16)]
    convolution = 3 * (x.numel() + u) + 3 * x.numel()  # and the sum of the branch's and the residual's gradient
    assert sum(m.size for m in images) / 4 == traffic.fused_training - convolution


def test_smaller_than_a_tile(device, monkeypatch):
    shrink(monkeypatch, BM=4, BC=16)
    assert_kernels_agree(
        randomised(single()).train().to(device), torch.randn(3, 8, 3, 5, dtype=torch.float64).to(device)
    )
