"""A block is read once, and again as soon as anything that it was read off is another: no change goes unseen."""

import copy
import gc
import random
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from agreement import randomised
from test_swap_traps import lukemelas_block, timm_block, torchvision_block, transformers_block
from torch import nn

import fastmbconv
from fastmbconv import ahead, call, dispatch, functional, fuse, prepared, readings, reference
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
CHANGES = 160  # of one block, one after the other


@dataclass
class Seen:
    """What kernels would get of a call: everything but the image."""

    settings: call.Settings
    signature: int
    step: str
    compute: torch.dtype
    wide: bool
    drop: object
    tensors: list = field(default_factory=list)

    @classmethod
    def of(cls, x, u, block, ready, step, shortcut=None):
        weights, statistics, settings, signature = ready.call
        seen = cls(settings, signature, step, ready.compute, ready.wide, block.drop is None)
        seen.tensors = [t if t is None else t.detach().clone() for t in (*weights, *statistics, *ready.counts)]
        return seen


@pytest.fixture
def seen(monkeypatch, triton_backend):
    """Calls that take the kernels return what these would get, at once."""
    monkeypatch.setattr(functional, "run_prepared", Seen.of)
    monkeypatch.setattr(ahead, "block_called", lambda *_: None)


def outcome(block, x):
    """What kernels get of a call, what eager gives, or the error."""
    torch.manual_seed(3)
    try:
        return block(x)
    except Exception as error:
        return type(error), str(error)


def same(ours, fresh):
    if type(ours) is not type(fresh) or isinstance(ours, tuple):
        return ours == fresh
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours.nan_to_num(7.0), fresh.nan_to_num(7.0))
    tensors = zip(ours.tensors, fresh.tensors, strict=True)
    equal = all(a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)
    return equal and replace(ours, tensors=[]) == replace(fresh, tensors=[])


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
@pytest.mark.parametrize(("seed", "guards"), [(0, True), (1, False)], ids=["torch-guards", "own-look"])
def test_after_any_change_a_call_is_a_fresh_blocks(make, seed, guards, seen, monkeypatch):
    """To kernels with the same tensors and settings, to eager with the same numbers, or to the same error."""
    if not guards:
        monkeypatch.setattr(prepared, "_has_guards", lambda: False)
    rng, x = random.Random(seed), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    origin = randomised(make()).double().train()
    kinds = {Seen: 0, torch.Tensor: 0, tuple: 0}
    for number in range(CHANGES):
        if number % 4 == 0:  # what piles up is eager's soon
            block, made = fuse(copy.deepcopy(origin)), []
            assert isinstance(outcome(block, x), Seen) and isinstance(outcome(block, x), Seen)
        made.append(change(block, rng))
        ours, fresh = outcome(block, x), outcome(copy.deepcopy(block), x)
        assert same(ours, fresh), made
        kinds[type(ours)] += 1
    assert kinds[Seen] > CHANGES / 4 and kinds[torch.Tensor] > 0 and kinds[tuple] > 0


def test_guards_that_miss_a_change_are_not_used(monkeypatch):
    """They are private to PyTorch: what this one is pinned to has them, and another one's are tried before use."""
    prepared._has_guards.cache_clear()
    assert prepared._has_guards()

    class Blind:
        def __init__(self, *tensors, **kinds):
            pass

        def check(self, *tensors):
            return True

    for name, value in (("TensorGuards", Blind), ("TensorGuards", None), ("TensorGuards", dict)):
        with monkeypatch.context() as patch:
            patch.setattr(torch._C._dynamo.guards, name, value)
            prepared._has_guards.cache_clear()
            assert not prepared._has_guards()
            weight = torch.zeros(2, 3)
            unchanged = prepared.watch([weight])
            assert unchanged()
            weight.data = weight.data.view(3, 2).t()
            assert not unchanged()
    prepared._has_guards.cache_clear()


def test_a_remembered_block_runs_eager_in_a_transform(seen, monkeypatch):
    """Called as data, without a module that asks first; guards of torch's would notice."""
    monkeypatch.setattr(prepared, "_has_guards", lambda: False)
    monkeypatch.setattr(dispatch, "device_reason", lambda x: None)
    block, x = MBConv(4, 4).eval().describe(), torch.randn(2, 4, 3, 3)

    def run(x):
        return functional.mbconv(x, block, eager=lambda x: reference.mbconv(x, block))

    with fastmbconv.backend("auto"):
        assert isinstance(run(x), Seen) and isinstance(run(x), Seen)
        assert torch.func.grad(lambda x: run(x).sum())(x).shape == x.shape


def test_modes_that_take_turns_take_the_kernels(seen):
    """A guard of one mode says no in another: the block is prepared again."""
    block, x = MBConv(4, 4).eval(), torch.randn(2, 4, 3, 3)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert isinstance(block(x), Seen) and isinstance(block(x), Seen)


def test_an_unchanged_block_is_read_once(monkeypatch, seen):
    reads = []
    block = MBConv(4, 4).train()
    monkeypatch.setattr(MBConv, "describe", lambda self, real=MBConv.describe: reads.append(self) or real(self))
    for _ in range(3):
        block(torch.randn(2, 4, 3, 3))
    assert len(reads) == 1
    block.eval()
    block(torch.randn(2, 4, 3, 3))
    assert len(reads) == 2


def test_a_reading_keeps_no_block_alive(seen):
    block = fuse(nn.Sequential(timm_block()))
    block(torch.randn(2, 8, 4, 4))
    gone, count = weakref.ref(block[0]), len(readings._readings)
    assert gone() in readings._readings
    del block
    gc.collect()
    assert gone() is None and len(readings._readings) < count
