"""Proof that a module computes an MBConv block: both run once in float64, in the module's mode, with random tensors.

Random ones, for those of a real block may hide a difference: a BatchNorm of weight 0 behind the projection hides all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastmbconv import reference
from fastmbconv.block import Block
from fastmbconv.mbconv import NORMS

CLOSE = 1e-9
IMAGES, SMALLEST = 2, 5


def why_not(twin: nn.Module, block_of: Callable[[nn.Module], Block | str]) -> str | None:
    """Where a module and the block that it is read as part, or None: output, gradients, running statistics.

    Args:
        twin: a shadow (tracing.py) of the module, in the mode to look at; it is copied, not run.
        block_of: reads a copy of it as a block.
    """
    mode = "training" if twin.training else "eval mode"
    try:
        theirs = _randomised(twin)
        ours = copy.deepcopy(theirs)
    except Exception as error:  # whatever somebody's module holds
        return f"it can't be copied for the proof: {type(error).__name__}: {error}"
    block = block_of(ours)
    if isinstance(block, str):
        return block
    side = max(SMALLEST, block.kernel_size)
    x = _random((IMAGES, block.in_channels, side, side + 1))  # one of them even
    try:
        expected = dict(_outcome(theirs, theirs, x))
    except Exception as error:
        return f"it fails in the proof, on {tuple(x.shape)} in float64: {type(error).__name__}: {error}"
    found = dict(_outcome(ours, lambda image: reference.mbconv(image, block), x))
    for name, value in expected.items():
        apart = _apart(value, found[name])
        if not apart <= CLOSE:
            return f"it looks like an MBConv block, but in {mode} its {name} is {apart:.1e} apart from the block's"
    return None


def _randomised(twin: nn.Module) -> nn.Module:
    """A copy on the CPU in float64 with random tensors, wide enough to reach every kink of an activation."""
    tensors = {id(each): each for each in (*twin.parameters(), *twin.buffers())}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module = copy.deepcopy(twin, tensors)  # without them
        for holder in module.modules():
            norm = isinstance(holder, (nn.BatchNorm2d, nn.SyncBatchNorm))
            if norm and type(holder) in NORMS:
                holder.__class__ = nn.BatchNorm2d  # a synchronised one would wait for other processes
            for name, p in holder._parameters.items():
                if p is not None:
                    drawn = _random(p.shape, generator) / max(1.0, p.shape[1:].numel() ** 0.5)
                    wide = drawn * 3 + 3 * drawn.sign() if norm and name == "weight" else drawn * (2 if norm else 1)
                    holder._parameters[name] = nn.Parameter(wide)
            for name, b in holder._buffers.items():
                if b is not None and b.is_floating_point():
                    drawn = _random(b.shape, generator)
                    holder._buffers[name] = drawn.abs() + 0.5 if name.endswith("var") else drawn
                elif b is not None:
                    holder._buffers[name] = torch.ones(b.shape, dtype=b.dtype)
    return module


class Exact(TorchFunctionMode):
    """Hard-sigmoid by its formula: the derivative of torch's own has a sixth in float32 in it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("hardsigmoid", "hardsigmoid_"):
            return nn.functional.relu6(args[0] + 3.0) / 6.0
        return func(*args, **(kwargs or {}))


def _outcome(module: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Everything that a call computes or moves, by name; what has no gradient has one of zeros."""
    given = x.clone().requires_grad_()
    image = given * 1.0  # no leaf: a forward may write to it
    kept = image.detach().clone()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), Exact():
        torch.default_generator.manual_seed(0)  # of no GPU
        y = forward(image)
    yield "output", y.detach()
    yield "input, afterwards,", image.detach() - kept
    y.backward(_random(y.shape))
    yield "input's gradient", given.grad if given.grad is not None else torch.zeros_like(given)
    for name, p in module.named_parameters():
        yield f"gradient of {name}", torch.zeros_like(p) if p.grad is None else p.grad
    yield from ((name, b.double()) for name, b in module.named_buffers())


def _random(shape: Any, generator: torch.Generator | None = None) -> Tensor:
    """The same numbers for the same shape, but from a generator of one's own."""
    generator = torch.Generator().manual_seed(1) if generator is None else generator
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value; infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    scale = max(1.0, float(a.abs().max())) if a.numel() else 1.0
    return float((a - b).abs().max()) / scale if a.numel() else 0.0
