"""What somebody's functions of one tensor compute, told by their values: an activation, stochastic depth, a mean.

However it is spelled (`x * torch.sigmoid(x)`, `F.silu(x)`, a module of one's own), a function that agrees with a known
one in float64 at some thousand values, its kinks' neighbourhoods among them, is taken for it. What a block becomes by
that is proved as a whole afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmbconv import reference
from fastmbconv.block import pads

Behaviour = Literal["same", "drop", "dropout", "mean", "other"]
CLOSE = 1e-9


@cache
def probe(*shape: int) -> Tensor:
    """Values from -12 to 12, in no order."""
    spread = torch.linspace(-12.0, 12.0, prod(shape), dtype=torch.float64)
    return spread[torch.randperm(len(spread), generator=torch.Generator().manual_seed(0))].reshape(shape)


def probed(function: Callable[[Tensor], Any], x: Tensor, seed: int = 0) -> Any:
    """function(x) with random numbers of its own, None where it fails; nothing else sees that it ran."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # of no GPU
        try:
            return function(x.clone())
        except Exception:  # whatever somebody's code does with values that it was not made for
            return None


def same(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and bool(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE))


def activation_named(function: Callable[[Tensor], Any], x: Tensor | None = None) -> Any:
    """The name that `reference.ACTIVATIONS` has for a function, going by its values at x; None for another one."""
    return _named(function, reference.ACTIVATIONS, x)


def gate_named(function: Callable[[Tensor], Any], x: Tensor | None = None) -> Any:
    """The name of a squeeze-excite's last activation, or None."""
    return _named(function, reference.GATES, x)


def is_known(function: Callable[[Tensor], Any]) -> bool:
    """Whether a function is an activation or a gate with a name."""
    return activation_named(function) is not None or gate_named(function) is not None


def is_mean(function: Callable[[Tensor], Any], image: Tensor) -> bool:
    """Whether a function takes the mean over an image, [N, C] or [N, C, 1, 1]."""
    found, mean = probed(function, image), image.mean((2, 3))
    return any(same(found, each) for each in (mean, mean[:, :, None, None]))


def _named(function: Callable[[Tensor], Any], known: Any, x: Tensor | None) -> str | None:
    x = probe(4, 8, 6, 6) if x is None else x
    found, again = probed(function, x), probed(function, x, seed=1)
    if found is None or again is None or not same(found, again):
        return None
    return next((name for name, one in known.items() if same(found, one(x))), None)


def behaviour_of(module: nn.Module) -> Behaviour:
    """What a module without tensors does of an image: "drop" is stochastic depth, "dropout" drops something smaller."""
    x = probe(4, 8, 6, 6)
    trains, infers = (_in_mode(module, training) for training in (True, False))
    found, fixed = probed(trains, x), probed(infers, x)
    if found is None or fixed is None:
        return "other"
    if not same(fixed, x):
        mean = x.mean((2, 3))
        return "mean" if any(same(fixed, each) for each in (mean, mean[:, :, None, None])) else "other"
    many = torch.ones(4096, 1, 1, 1, dtype=torch.float64)
    if same(probed(trains, x), x) and same(probed(trains, many), many):
        return "same"
    tries = [(probed(trains, x, seed), probed(trains, torch.ones_like(x[:, :1, :1, :1]), seed)) for seed in range(8)]
    return "drop" if all(isinstance(k, Tensor) and same(y, x * k) for y, k in tries) else "dropout"


def _in_mode(module: nn.Module, training: bool) -> nn.Module:
    twin = deepcopy(module)
    for each in twin.modules():
        each.training = training
    return twin


def pads_same(conv: nn.Conv2d) -> bool:
    """Whether a convolution of somebody's own pads as TensorFlow's SAME does, whatever the image's size."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if conv.padding_mode != "zeros" or conv.kernel_size != (kernel, kernel) or conv.stride != (stride, stride):
        return False
    twin = deepcopy(conv).to(device="cpu", dtype=torch.float64)
    twin.weight.data = probe(*conv.weight.shape)
    for size in range(2 * kernel, 2 * kernel + stride + 1):
        x = probe(1, conv.in_channels, size, size + 1)
        sides = (pads(each, kernel, stride, "same") for each in (size + 1, size))
        padded = F.pad(x, [side for pair in sides for side in pair])
        bias = None if twin.bias is None else twin.bias.detach()
        if not same(probed(twin, x), F.conv2d(padded, twin.weight.detach(), bias, stride, 0, 1, conv.groups)):
            return False
    return conv.dilation == (1, 1)
