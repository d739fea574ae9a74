"""Fused-MBConv blocks: everything behind the dense convolution, against timm's and torchvision's own blocks."""

import copy

import pytest
import torch
from agreement import (
    assert_inference_agrees,
    assert_kernels_agree,
    assert_same,
    assert_same_masks,
    outcome,
    randomised,
)
from blocks import launches, shrink
from libraries import library
from parity import assert_parity
from torch import nn

import fastmbconv
from benchmarks.launches import counted
from fastmbconv import dense, explain, fuse, reference, unfuse
from fastmbconv.block import DenseBlock
from fastmbconv.kernels.traffic import recorded
from fastmbconv.swap.fused import FusedBlock, fusible
from fastmbconv.swap.saving import saving
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


def without_affine(module):
    module.bn1.affine, module.bn1.weight, module.bn1.bias = False, None, None


DESCRIBED = {
    "edge": edge,
    "edge-se": lambda: edge(se=True, drop_path_rate=0.5),
    "edge-same-stride2": lambda: edge(12, pad_type="same", stride=2, act_layer=nn.ReLU6),
    "edge-groups": lambda: edge(group_size=8),
    "edge-momentum": lambda: changed(lambda m: setattr(m.bn1, "momentum", None)),
    "edge-untracked": lambda: changed(lambda m: setattr(m, "bn2", nn.BatchNorm2d(8, track_running_stats=False))),
    "edge-late-act": lambda: changed(lambda m: setattr(m.bn2, "act", nn.ReLU())),
    "single": single,
    "single-hard-swish": lambda: single(act_layer=nn.Hardswish),
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
    "mish": (lambda: single(act_layer=nn.Mish), "the activation after the dense convolution is Mish"),
    "group-norm": (
        lambda: changed(lambda m: setattr(m, "bn1", nn.GroupNorm(4, 32))),
        "the norm after the dense convolution is a Group",
    ),
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


PROJECT = {"_pointwise_kernel": 1}
EXCITED = PROJECT | {"_pool_kernel": 1, "_excite_fwd_kernel": 1}
INFERENCE = {
    "edge": (edge, PROJECT),
    "edge-se": (lambda: edge(se=True, drop_path_rate=0.5), EXCITED),
    "edge-se-same-stride2": (lambda: edge(12, se=True, pad_type="same", stride=2, act_layer=nn.ReLU6), EXCITED),
    "edge-bare": (lambda: changed(without_affine), PROJECT),
    "single-drop": (lambda: single(drop_path_rate=0.5), {"_bn_act_fwd_kernel": 1}),
    "single-stride2": (lambda: single(12, stride=2, act_layer=nn.ReLU), {"_bn_act_fwd_kernel": 1}),
    "torchvision-stride2": (lambda: torchvision_block(stride=2, out_channels=12), PROJECT),
    "torchvision-no-expand": (lambda: torchvision_block(expand=1), {"_bn_act_fwd_kernel": 1}),
}


@pytest.mark.parametrize("tiles", [None, dict(BM=16, BK=16, BO=16, BC=16)], ids=["large-tiles", "small-tiles"])
@pytest.mark.parametrize("make, kernels", INFERENCE.values(), ids=INFERENCE)
def test_inference(make, kernels, tiles, device, monkeypatch):
    if tiles:
        shrink(monkeypatch, **tiles)
    module = randomised(make()).to(device)
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        with counted() as found:
            assert_inference_agrees(module, x, dtype)
        assert found == kernels


def test_which_calls_infer(device):
    """Only what needs no gradient, with statistics that stay; a moved one is seen at once."""
    module, x = fuse(edge(drop_path_rate=0.5)).eval().to(device), torch.randn(2, 8, 4, 4, device=device)

    def infers():
        with fastmbconv.backend("triton"), launches() as seen:
            y = module(x)
        return any("dense_infer" in name for name in seen), y

    assert not infers()[0]  # its weights want gradients
    with torch.no_grad():
        found, before = infers()
        assert found
        module.bn1.running_mean.add_(1.0)
        assert not torch.allclose(before, infers()[1])
        module.bn2.train()
        assert not infers()[0] and module.bn2.num_batches_tracked == 1
        module.bn2.eval(), module.drop_path.train()
        assert not infers()[0]
    module.eval().requires_grad_(False)
    assert infers()[0]
    x.requires_grad_()
    assert not infers()[0]


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
        with torch.no_grad():
            inferred = module.eval()(x)
    y.float().sum().backward()
    assert y.dtype == inferred.dtype == x.dtype and module.conv.weight.grad.dtype == torch.float32
    with fastmbconv.backend("eager"), torch.autocast(device.type, dtype=torch.bfloat16), torch.no_grad():
        assert_parity("y", inferred.bfloat16(), module(x).bfloat16(), copy.deepcopy(module).double()(x.double()))


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
    with fastmbconv.backend("triton"), torch.set_grad_enabled(training):
        expected = copy.deepcopy(model)(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


PASSES = {  # training: eager, fused; inference: eager, with folded BatchNorms, fused
    "edge": (edge, (24, 12.25), (7.75, 5.25, 2.75)),
    "edge-se": (lambda: edge(se=True), (37, 13.25), (10.75, 8.25, 3.75)),
    "single": (single, (25, 18), (9, 7, 5)),
}


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_traced_without_a_warning(device):
    module, x = fuse(edge(se=True)).eval().to(device), torch.randn(2, 8, 4, 4, device=device)
    traced = torch.jit.trace(module, x)
    assert "fastmbconv::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), unfuse(module)(x))


@pytest.mark.parametrize("make, training, inference", PASSES.values(), ids=PASSES)
def test_traffic(make, training, inference, device):
    """The count is dense.py's, and what our launches state is the count without the library's convolution."""
    block, shape = fusible(make().train()), (4, 8, 24, 24)
    u, traffic = count_dense(block, shape)
    assert (traffic.eager_training / u, traffic.fused_training / u) == training
    counts = (traffic.eager_inference, traffic.eager_inference_folded, traffic.fused_inference)
    assert tuple(count / u for count in counts) == inference
    assert saving(block, False, shape).passes == (inference[0], inference[2])
    module, x = make().train().to(device), torch.randn(shape, device=device, requires_grad=True)
    with fastmbconv.backend("triton"), recorded() as trained:
        y = dense.dense_mbconv(x, fusible(module))
        y.sum().backward()
    with fastmbconv.backend("triton"), recorded() as inferred, torch.no_grad():
        dense.dense_mbconv(x, fusible(module.eval()))

    def images(launches):
        moved = [m for launch in launches for m in (*launch.reads, *launch.writes) if m.shape[:3] == (4, 24, 24)]
        return sum(m.size for m in moved) / 4

    convolution = 3 * (x.numel() + u) + 3 * x.numel()  # and the sum of the branch's and the residual's gradient
    assert images(trained) == traffic.fused_training - convolution
    assert images(inferred) == traffic.fused_inference - x.numel() - u


def test_smaller_than_a_tile(device, monkeypatch):
    shrink(monkeypatch, BM=4, BC=16)
    assert_kernels_agree(
        randomised(single()).train().to(device), torch.randn(3, 8, 3, 5, dtype=torch.float64).to(device)
    )
