"""A block's description must compute what the block itself computes: in float64, so that nothing hides in rounding."""

import copy

import torch
from parity import assert_parity
from torch import nn

from fastmbconv import backend, fuse, reference, unfuse
from fastmbconv.block import Block
from fastmbconv.swap.fused import fusible
from fastmbconv.swap.proving import Exact


def randomised(module: nn.Module) -> nn.Module:
    """float64, with parameters and statistics that no wrong path would get right by chance."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p) + 0.1)
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.normal_()
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2.0)
    return module


def outcome(module, forward, x):
    """Output, gradients (with the input's) and buffers of one call with a fixed seed."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = forward(x)
    torch.manual_seed(8)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y))
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y, "dx": x.grad, **grads, **{f"{name} (buffer)": b for name, b in module.named_buffers()}}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def assert_described(module: nn.Module, x: torch.Tensor) -> Block:
    """reference.mbconv on the block's description does what the block's own forward does; its training flags stay."""
    own, described = copy.deepcopy(module), copy.deepcopy(module)
    block = fusible(described)
    assert isinstance(block, Block), block
    with Exact():
        theirs = outcome(own, unfuse(own), x)
    ours = outcome(described, lambda x: reference.mbconv(x, block), x)
    assert_same(ours, theirs, rtol=1e-9, atol=1e-9)
    return block


def training_only(module: nn.Module, *names: str) -> nn.Module:
    """All else frozen: a bias just before a norm of batch statistics has no gradient but rounding."""
    module.eval()
    for name in names:
        module.get_submodule(name).train()
    return module


def assert_kernels_agree(module: nn.Module, x: torch.Tensor, filter_fn=None) -> None:
    """A fused block, through the kernels, keeps the parity rule: output, gradients and buffers. Both in float64."""
    eager, fused = copy.deepcopy(module).float(), fuse(copy.deepcopy(module).float(), filter_fn)
    truth = outcome(module, module, x)  # after the copies: it moves the running statistics
    with backend("eager"):
        theirs = outcome(eager, eager, x.float())
    with backend("triton"):
        ours = outcome(fused, fused, x.float())
    for name, value in truth.items():
        if value is None:
            assert ours[name] is None, name
        elif value.is_floating_point():
            assert_parity(name, ours[name], theirs[name], value)


def assert_inference_agrees(module: nn.Module, x: torch.Tensor, narrow: torch.dtype = torch.float32) -> None:
    """A fused block in eval mode without gradients, which the kernels run in another form, keeps the parity rule."""
    outputs = []
    with torch.no_grad():
        for dtype, make, path in (
            (torch.float64, unfuse, "eager"),
            (narrow, unfuse, "eager"),
            (narrow, fuse, "triton"),
        ):
            block = make(copy.deepcopy(module).eval().to(dtype))
            with backend(path):
                outputs.append(block(x.to(dtype)))
    assert outputs[2].dtype == outputs[1].dtype
    truth, theirs, ours = outputs
    assert_parity("y", ours, theirs, truth)


def assert_same_masks(module: nn.Module, x: torch.Tensor, *args: float) -> None:
    """A residual block in training drops the same samples through the kernels as by itself, from the same seed."""
    kept = []
    for make in (unfuse, fuse):
        block = make(copy.deepcopy(module))
        torch.manual_seed(5)
        with backend("triton"):
            kept.append((block(x, *args) != x).flatten(1).any(1))
    assert torch.equal(*kept) and 0 < kept[0].sum() < len(x)
