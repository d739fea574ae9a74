"""A block is read once, and again as soon as anything that it was read off is another: no change goes unseen."""

import copy
import gc
import random
import weakref

import pytest
import torch
from agreement import randomised
from test_swap_traps import lukemelas_block, timm_block, torchvision_block, transformers_block
from torch import nn

import fastmbconv
from fastmbconv import fuse, readings
from fastmbconv.kernels import launching
from fastmbconv.mbconv import MBConv


def own_block():
    return MBConv(8, 8, expand_ratio=4, drop_path=0.5)


BLOCKS = {
    "ours": own_block,
    "timm": timm_block,
    "torchvision": torchvision_block,
    "lukemelas": lukemelas_block,
    "transformers": transformers_block,
}
CHANGES = 40  # of one block, one after the other


def outcome(block, x):
    """Output, gradients and statistics of a call, or the error that it gives."""
    x = x.clone().requires_grad_()
    for parameter in block.parameters():
        parameter.grad = None
    torch.manual_seed(3)
    try:
        with fastmbconv.backend("triton" if x.dtype == torch.float64 else "auto"):
            y = block(x)
        y.sum().backward()
    except Exception as error:
        return type(error), str(error)
    gradients = [p.grad for p in block.parameters()]
    return [t if t is None else t.clone() for t in (y.detach(), x.grad, *gradients, *block.buffers())]


def same(ours, fresh):
    if isinstance(ours, tuple) or isinstance(fresh, tuple):
        return ours == fresh
    return len(ours) == len(fresh) and all(
        a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(ours, fresh, strict=True)
    )


def change(block, rng):
    """Set a random attribute of a random module, or what is inside of a tensor of it, to another value; its name."""
    owner_name, owner = rng.choice(list(block.named_modules()))
    plain = [name for name in vars(owner) if not name.startswith("_") and not callable(getattr(owner, name))]
    tensors = [name for name, t in (*owner._parameters.items(), *owner._buffers.items()) if t is not None]
    name = rng.choice([*plain, *tensors * 3, *owner._modules])
    value = getattr(owner, name)
    if isinstance(value, nn.Module):
        setattr(owner, name, rng.choice([nn.ReLU, nn.SiLU, nn.Identity])())
    elif isinstance(value, torch.Tensor):
        _change_tensor(owner, name, value, rng)
    elif isinstance(value, bool):
        owner.train(not value) if name == "training" else setattr(owner, name, not value)
    elif isinstance(value, (int, float)):
        setattr(owner, name, rng.choice([value + 1, value * 0.5, 0]) if isinstance(value, int) else value * 0.7 + 0.05)
    elif isinstance(value, tuple) and value and all(isinstance(one, int) for one in value):
        setattr(owner, name, tuple(one + rng.choice([1, -1]) for one in value))
    elif value is None:
        setattr(owner, name, 0.25)
    return f"{owner_name}.{name}"


def _change_tensor(owner, name, value, rng):
    with torch.no_grad():
        kind = rng.choice(["values", "data", "replace", "freeze", "layout", "narrow"])
        if kind == "freeze" and isinstance(value, nn.Parameter):
            value.requires_grad_(not value.requires_grad)
        elif kind == "layout" and value.dim() == 4:
            value.data = value.data.transpose(0, 1).contiguous().transpose(0, 1)
        elif kind == "narrow" and value.is_floating_point():
            value.data = value.data.float() if value.dtype == torch.float64 else value.data.double()
        elif kind == "replace" and isinstance(value, nn.Parameter):
            setattr(owner, name, nn.Parameter(value * 1.25))
        elif kind == "data" and value.is_floating_point():
            value.data = value.data * 1.5
        elif value.is_floating_point():
            value.mul_(0.75)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_after_any_change_a_block_computes_what_a_fresh_one_does(make, seed):
    """Both by kernels, both by eager, or both with the same error; calls before were recorded and replayed."""
    rng, x = random.Random(seed), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    origin = randomised(make()).double().train()
    block = fuse(copy.deepcopy(origin))
    made = []
    for number in range(CHANGES):
        if number % 8 == 7:  # what piles up is eager's soon
            block, made = fuse(copy.deepcopy(origin)), []
        for _ in range(3 if not made else 1):
            outcome(block, x)
        made.append(change(block, rng))
        fresh = copy.deepcopy(block)
        ours = outcome(block, x)
        with launching.watching():
            expected = outcome(fresh, x)
        assert same(ours, expected), made


def test_an_unchanged_block_is_read_once(monkeypatch):
    reads = []
    block = MBConv(4, 4).train()
    monkeypatch.setattr(MBConv, "describe", lambda self, real=MBConv.describe: reads.append(self) or real(self))
    with fastmbconv.backend("triton"), torch.no_grad():
        for _ in range(3):
            block(torch.randn(2, 4, 3, 3))
    assert len(reads) == 1
    block.eval()
    with fastmbconv.backend("triton"), torch.no_grad():
        block(torch.randn(2, 4, 3, 3))
    assert len(reads) == 2


def test_a_reading_keeps_no_block_alive():
    block = fuse(nn.Sequential(timm_block()))
    with fastmbconv.backend("triton"), torch.no_grad():
        block(torch.randn(2, 8, 4, 4))
    gone, count = weakref.ref(block[0]), len(readings._readings)
    assert gone() in readings._readings
    del block
    gc.collect()
    assert gone() is None and len(readings._readings) < count
