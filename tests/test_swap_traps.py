"""What people do to a model besides running it: a fused block must then compute what the library's own block would.

Each row of `TRAPS` is done before `fuse` and after it, to a block of each library. The block runs its own submodules,
bit for bit, `explain` says why, and it is fused again once the trap is undone.
"""

import copy
import warnings

import pytest
import torch
from agreement import assert_same, outcome, randomised
from libraries import library
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.testing._internal.two_tensor import TwoTensor

import fastmbconv
from fastmbconv import explain, fuse, unfuse
from fastmbconv.mbconv import MBConv

library("timm")
library("torchvision")
timm_blocks = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm has no _efficientnet_blocks")
timm_layers = pytest.importorskip("timm.layers", reason="timm has no layers")
efficientnet = pytest.importorskip("torchvision.models.efficientnet", reason="torchvision has no efficientnet")


def timm_block():
    options = dict(exp_ratio=4, act_layer=nn.SiLU, se_layer=timm_blocks.SqueezeExcite, drop_path_rate=0.5)
    return timm_blocks.InvertedResidual(8, 8, **options)


def torchvision_block():
    return efficientnet.MBConv(efficientnet.MBConvConfig(4.0, 3, 1, 8, 8, 1), 0.5, nn.BatchNorm2d)


def lukemelas_block():
    library("efficientnet_pytorch")
    from efficientnet_pytorch import model, utils

    arguments = utils.BlockArgs(1, 3, 1, 4, 8, 8, 0.25, True)
    options = utils.GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3)
    return model.MBConvBlock(arguments, options, image_size=8)


def transformers_block():
    config = library("transformers").EfficientNetConfig()
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetBlock

    options = dict(in_dim=8, out_dim=8, stride=1, expand_ratio=4, kernel_size=3, drop_rate=0.0, id_skip=False)
    return EfficientNetBlock(config, adjust_padding=False, **options)


BLOCKS = {
    "timm": (timm_block, ("conv_pw", "bn1", "conv_dw", "conv_pwl", "se.conv_reduce")),
    "torchvision": (torchvision_block, ("block.0.0", "block.0.1", "block.1.0", "block.3.0", "block.2.fc1")),
    "lukemelas": (lukemelas_block, ("_expand_conv", "_bn0", "_depthwise_conv", "_project_conv", "_se_reduce")),
    "transformers": (
        transformers_block,
        (
            "expansion.expand_conv",
            "expansion.expand_bn",
            "depthwise_conv.depthwise_conv",
            "projection.project_conv",
            "squeeze_excite.reduce",
        ),
    ),
}
ROLES = ("expand", "norm", "depthwise", "project", "reduce")


class Adapted(nn.Module):
    """A convolution with a low-rank change beside it, as fine-tuning libraries put it in a model."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Conv2d(base_layer.in_channels, rank, base_layer.kernel_size, bias=False)
        self.lora_B = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class InheritedAdapted(nn.Conv2d):
    """The same, as a convolution itself."""

    def forward(self, x):
        return super().forward(x) * 1.5


def _swap(block, path, module):
    block.set_submodule(path, module)


def _adapt(block, path):
    leaf = block.get_submodule(path)
    _swap(block, path, Adapted(leaf).double())
    return lambda: _swap(block, path, leaf)


def _inherit(block, path):
    leaf = block.get_submodule(path)
    plain, leaf.__class__ = type(leaf), InheritedAdapted
    return lambda: setattr(leaf, "__class__", plain)


def _patch(block, path):
    leaf = block.get_submodule(path)
    original = leaf.forward
    leaf.forward = lambda x: original(x) * 2
    return lambda: delattr(leaf, "forward")


def _parametrise(make):
    def trap(block, path):
        leaf = block.get_submodule(path)
        make(leaf)
        return lambda: parametrize.remove_parametrizations(leaf, "weight")

    return trap


def _hook(register):
    def trap(block, path):
        return getattr(block.get_submodule(path), register)(lambda *_: None).remove

    return trap


def _make(make, undo):
    def trap(block, path):
        leaf = block.get_submodule(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            make(leaf)
        return lambda: undo(leaf)

    return trap


def _wrap_weight(block, path):
    leaf, plain = block.get_submodule(path), block.get_submodule(path).weight
    leaf.weight = nn.Parameter(TwoTensor(plain.detach().clone(), plain.detach().clone()))
    return lambda: setattr(leaf, "weight", plain)


TRAPS = {
    "lora": (_adapt, "expand", ["is a Adapted"]),
    "lora-in-se": (_adapt, "reduce", ["a squeeze-excite convolution is a Adapted"]),
    "inherited-lora": (_inherit, "project", ["is a InheritedAdapted"]),
    "patched": (_patch, "depthwise", ["a forward replaced on"]),
    "forward-hook": (_hook("register_forward_hook"), "norm", ["a hook on"]),
    "pre-hook": (_hook("register_forward_pre_hook"), "project", ["a hook on"]),
    "backward-hook": (_hook("register_full_backward_hook"), "project", ["a hook on"]),
    "backward-pre-hook": (_hook("register_full_backward_pre_hook"), "expand", ["a hook on"]),
    "weight-norm": (_parametrise(parametrizations.weight_norm), "expand", ["parametrization", "is a Parametrized"]),
    "spectral": (_parametrise(parametrizations.spectral_norm), "depthwise", ["parametrization", "is a Parametrized"]),
    "orthogonal": (_parametrise(parametrizations.orthogonal), "project", ["parametrization", "is a Parametrized"]),
    "parametrised-se": (_parametrise(parametrizations.weight_norm), "reduce", ["parametrization", "Parametrized"]),
    "old-weight-norm": (_make(old_weight_norm, remove_weight_norm), "expand", ["a hook on"]),
    "old-spectral-norm": (_make(old_spectral_norm, remove_spectral_norm), "project", ["a hook on"]),
    "pruned": (
        _make(lambda leaf: prune.l1_unstructured(leaf, "weight", 0.5), lambda leaf: prune.remove(leaf, "weight")),
        "depthwise",
        ["a hook on"],
    ),
    "wrapped-weight": (_wrap_weight, "project", ["the projection's weight is a TwoTensor"]),
}


@pytest.mark.parametrize("trap, role, reasons", TRAPS.values(), ids=TRAPS)
@pytest.mark.parametrize("make, paths", BLOCKS.values(), ids=BLOCKS)
def test_trap_keeps_the_block_eager(make, paths, trap, role, reasons, calls):
    path = paths[ROLES.index(role)]
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    for before in (True, False):
        block = randomised(make()).eval()
        if not before:
            fuse(block)
        undo = trap(block, path)
        row = explain(fuse(block)).rows[0]
        assert row.path == "eager" and any(reason in row.reason for reason in reasons), row.reason
        assert torch.equal(block(x), unfuse(block)(x)) and not calls
        undo()
        assert explain(fuse(block)).fused == 1
        block(x)
        assert len(calls) == 1
        calls.clear()


CONVERTERS = {"torch": nn.SyncBatchNorm.convert_sync_batchnorm, "timm": timm_layers.convert_sync_batchnorm}


@pytest.mark.parametrize("convert", CONVERTERS.values(), ids=CONVERTERS)
@pytest.mark.parametrize("make", [timm_block, torchvision_block])
def test_synchronised_norms_before_and_after(make, convert, calls):
    """torch's converter makes norms of timm's that don't call their activation: that block is another one."""
    block = randomised(make()).eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    plain = convert(copy.deepcopy(block)).eval()
    for converted in (fuse(convert(copy.deepcopy(block))), convert(fuse(copy.deepcopy(block)))):
        torch.testing.assert_close(converted.eval()(x), plain(x))
        row, forgets = explain(converted).rows[0], make is timm_block and CONVERTERS["torch"] is convert
        assert (row.path == "eager" and "does not call" in row.reason) if forgets else row.path == "fused"
        assert bool(calls) != forgets
        calls.clear()
        assert type(unfuse(converted)) is type(block)


QAT = "ignore:.*torch.ao.quantization.*:DeprecationWarning"


@pytest.mark.filterwarnings(QAT)
@pytest.mark.parametrize("make", [timm_block, torchvision_block])
def test_modules_prepared_for_quantisation(make, calls):
    from torch.ao import quantization

    for before in (True, False):
        block = make().train()
        if not before:
            fuse(block)
        block.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        prepared = fuse(quantization.prepare_qat(block))
        row = explain(prepared).rows[0]
        assert row.path == "eager" and ("a hook on" in row.reason or "torch.ao.nn.qat" in row.reason), row.reason
        prepared(torch.randn(2, 8, 5, 5))
        assert not calls


NORMS = {
    "momentum": lambda norm: setattr(norm, "momentum", None),
    "frozen": lambda norm: norm.eval(),
    "fixed-affine": lambda norm: norm.requires_grad_(False),
}


@pytest.mark.parametrize("change", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("make", [timm_block, torchvision_block])
def test_norms_that_train_otherwise(make, change, calls):
    block = randomised(make()).train()
    for norm in [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][:2]:
        change(norm)
    fused, x = fuse(copy.deepcopy(block)), torch.randn(4, 8, 5, 5, dtype=torch.float64)
    assert_same(outcome(fused, fused, x), outcome(block, block, x), rtol=1e-9, atol=1e-9)
    assert len(calls) == 1


def test_in_place_around_a_block(device):
    block = fuse(torchvision_block()).train().to(device)
    x = torch.randn(2, 8, 3, 3, device=device, requires_grad=True)
    before = x.detach().clone()
    with fastmbconv.backend("triton"):
        torch.manual_seed(1)
        y = block(x)
        torch.manual_seed(1)
        (expected,) = torch.autograd.grad(block(x).mul(2).relu().square().sum(), x)
    assert torch.equal(x.detach(), before)
    y.mul_(2).relu_().square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_checkpointed_sequence(calls):
    builder = pytest.importorskip("timm.models._efficientnet_builder", reason="timm has no _efficientnet_builder")
    models = pytest.importorskip("timm.models", reason="timm has no models")
    stages = builder.decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e4_c8_se0.25"]])
    options = dict(num_classes=3, stem_size=8, num_features=16, drop_path_rate=0.5, act_layer=nn.SiLU)
    model = models.EfficientNet(stages, se_layer=timm_blocks.SqueezeExcite, **options).double().train()
    model.set_grad_checkpointing()
    fused, x = fuse(copy.deepcopy(model)), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert_same(outcome(fused, fused, x), outcome(model, model, x), rtol=1e-6, atol=1e-8)
    assert len(calls) == 2 * 3  # forward, and once more in the backward


def test_names_that_other_libraries_share():
    theirs = type("InvertedResidual", (MBConv,), {"forward": MBConv.forward, "__module__": "geffnet.builder"})
    (row,) = explain(fuse(nn.Sequential(theirs(8, 8)))).rows
    assert row.reason == "its forward takes another way for other values or sizes of its input"
