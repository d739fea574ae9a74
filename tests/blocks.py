"""What the kernel tests share: random BatchNorms and blocks, small tiles, and outcomes compared by the parity rule."""

import copy
import itertools
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from parity import assert_parity
from torch import nn

import fastmbconv
from fastmbconv import dispatch, functional
from fastmbconv.block import BatchNorm
from fastmbconv.call import Norm, NormSettings
from fastmbconv.mbconv import MBConv

INTERPRETED = dispatch.interpreted()
HALVES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]
FLOATS = [pytest.param(torch.float32, id="fp32"), *HALVES]
PRECISE = torch.float64 if INTERPRETED else torch.float32  # the widest type that the kernels take here
KERNEL_MODULES = (
    "depthwise", "pointwise", "batch_norm", "pool", "squeeze_excite", "excite_backward", "project_backward",
    "expand_backward", "depthwise_inference", "ends",
)  # fmt: skip
TILES = (
    "walk_tiles", "row_tiles", "product_tiles", "project_tiles", "pass_tiles", "excite_tiles", "finish_tiles",
    "parts_tiles", "expand_tiles", "pool_tiles", "walk_inference_tiles", "finalize_tiles", "weight_tiles",
)  # fmt: skip


def nhwc(x):
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x):
    return x.permute(0, 3, 1, 2)


def normal(*shape, dtype=torch.float64, device="cpu", mean=0.0, std=1.0):
    """Drawn in float64 on the CPU and rounded to `dtype`, so that every dtype and device sees the same numbers."""
    return (torch.randn(*shape, dtype=torch.float64) * std + mean).to(dtype).to(device)


def as_dtype(tree, dtype):
    """Every floating tensor of a dict in another dtype, as a leaf of its own."""
    return {k: v.detach().to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in tree.items()}


def norm_vectors(channels, dtype, device):
    """[4, C] (mean, rstd, scale, shift) of a BatchNorm with both signs of weight, in the accumulator's dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, rstd = normal(channels), torch.rand(channels, dtype=torch.float64) + 0.5
    weight, bias = normal(channels), normal(channels)
    return torch.stack((mean, rstd, weight * rstd, bias - mean * weight * rstd)).to(wide).to(device)


def randomise(module):
    """Parameters and statistics that no wrong path would get right by chance."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(normal(*p.shape, std=0.5, mean=1.0 if "bn.weight" in name else 0.0))
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(normal(*b.shape))
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, dtype=torch.float64) + 0.5)
    return module


def make_block(*args, dtype=torch.float32, device="cpu", **kwargs):
    """A randomised MBConv whose BatchNorms keep their parameters and statistics in fp32 (fp64 for fp64)."""
    module = randomise(MBConv(*args, **kwargs).double()).to(dtype).to(device)
    for bn in batch_norms(module):
        bn.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return module


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def norm_data(weight=None, bias=None, running=(None, None, None), eps=1e-3, momentum=0.1, training=True):
    """A BatchNorm of a call: batch statistics while training or without `running`, which training moves."""
    return Norm(weight, bias, *running, NormSettings(eps, momentum, training, running[0] is not None, None))


def bn_module(channels, dtype=torch.float64, device="cpu", **kwargs):
    module = nn.Module()
    module.bn = nn.BatchNorm2d(channels, **kwargs).double()
    return randomise(module).bn.to(dtype).to(device)


def fused(module):
    """The module's forward through the kernels, or an error."""

    def forward(x):
        with fastmbconv.backend("triton"):
            return functional.mbconv(x, module.describe(), memory=getattr(module, "memory", "fast"))

    return forward


def outcome(module, forward, x, dy):
    """Output, gradients and buffers of one call; `forward` is called with a fresh leaf of x's layout."""
    x = x.detach().requires_grad_()
    y = forward(x)
    y.backward(dy.to(y.dtype))
    grads = {f"d {name}": p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(module.named_buffers())}


def assert_outcomes(ours, eager, truth):
    """The parity rule for each floating tensor, equality for counters; ours and eager's dtypes are the same."""
    assert ours.keys() == eager.keys() == truth.keys()
    for name, value in ours.items():
        if value is None or not value.is_floating_point():
            assert value is None and eager[name] is None or torch.equal(value, eager[name]), name
            continue
        assert value.dtype == eager[name].dtype, name
        assert_parity(name, value, eager[name], truth[name])


def outcomes(module, x, dy):
    """Of the kernels and of eager in the module's dtype, and of eager in float64."""
    eager, truth = copy.deepcopy(module), copy.deepcopy(module).double()
    for owner in (eager, truth):
        owner.drop_path = module.drop_path
    theirs = outcome(eager, eager.forward_eager, x, dy)
    exact = outcome(truth, truth.forward_eager, x.double(), dy.double())
    return outcome(module, fused(module), x, dy), theirs, exact


def assert_module_parity(module, x, dy):
    """Kernels and eager in the module's dtype, both against eager in float64."""
    ours, theirs, exact = outcomes(module, x, dy)
    assert_outcomes(ours, theirs, exact)
    return ours


class Drop(nn.Module):
    """Stochastic depth with a mask that is the same in every dtype: every second sample is dropped."""

    rate = 0.5

    def forward(self, x):
        mask = torch.arange(x.shape[0], device=x.device) % 2 * 2.0
        return x * mask.to(x.dtype).reshape(-1, 1, 1, 1)


def shrink(monkeypatch, group=None, **tiles):
    """Force tile sizes (NB, BC, R, SPAN, BM, BK, BO, BE, SLICE) and row tiles a program: many, for a tiny image."""

    def smaller(function):
        def wrapped(*args, **kwargs):
            sizes = function(*args, **kwargs)
            return {**sizes, **{k: min(sizes[k], v) for k, v in tiles.items() if k in sizes}}

        return wrapped

    patched = []
    for name in KERNEL_MODULES:
        module = import_module(f"fastmbconv.kernels.{name}")
        for function in TILES:
            if hasattr(module, function):
                monkeypatch.setattr(module, function, smaller(getattr(module, function)))
                patched.append(function)
        if group is not None and hasattr(module, "groups"):
            monkeypatch.setattr(module, "groups", lambda *args, **kwargs: group)
    assert {"walk_tiles", "row_tiles", "product_tiles"} <= set(patched)


@contextmanager
def launches():
    """Names of our operators that ran inside the `with` block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        sees_fastmbconv = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastmbconv":
                seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        yield seen


def state(module):
    """Everything that a refused call must leave alone: parameters, buffers, the random state."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return {**{name: t.detach().clone() for name, t in tensors}, "random state": torch.get_rng_state()}


def assert_untouched(before, module):
    after = state(module)
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} changed"


__all__ = [
    "FLOATS", "HALVES", "INTERPRETED", "PRECISE", "BatchNorm", "Drop", "as_dtype", "assert_module_parity",
    "assert_outcomes", "assert_untouched", "batch_norms", "bn_module", "fused", "launches", "make_block", "nchw",
    "nhwc", "norm_vectors", "normal", "outcome", "randomise", "shrink", "state",
]  # fmt: skip
