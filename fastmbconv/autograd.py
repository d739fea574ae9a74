"""The fused operations as one `torch.autograd.Function`: what is saved between a part's forward and its backward.

What the parts launch is in `fused/`; derivation of the backward: CONTRIBUTING.md.
Images go in as [N, C, H, W] and come out as [N, H, W, C]: a Function's output that is a view can't be changed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmbconv import dispatch, eager_backward, ops
from fastmbconv.call import Settings, Tensors
from fastmbconv.fused import PARTS

_TWICE = f"double backward: fastmbconv's kernels have first derivatives only; {dispatch.WAY_OUT}"


class Fused(torch.autograd.Function):
    """A part of `fused.PARTS`, the one that `settings` names; its weights come first in `tensors`, then its statistics.

    Gradients flow to x, to the shortcut, which is the output's own, and to the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, x: Tensor, shortcut: Tensor | None, keep: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        part = PARTS[settings.part]
        count = len(part.weights._fields)
        weights, statistics = part.weights(*tensors[:count]), tensors[count:]
        added = None if shortcut is None else channels_last(shortcut)
        y, saved = ops.forward(settings, channels_last(x), added, keep, weights, statistics)
        ctx.save_for_backward(x, keep, *saved, *weights)
        ctx.settings, ctx.shortcut = settings, shortcut is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensors:
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        saved = ctx.saved_tensors  # unpacked once: a checkpoint gives them no second time
        if twice and (eager_backward.is_batched(dy) or dispatch.functorch_transforms()):
            # A vmap hides what dy follows from, and torch.func takes no function like the one that marks gradients.
            raise RuntimeError(_TWICE)
        with torch.no_grad():
            gradients = _gradients(ctx, saved, dy)
        return _marked(saved, dy, gradients) if twice else gradients


def _gradients(ctx: Any, tensors: Tensors, dy: Tensor) -> Tensors:
    """Of everything that `Fused.forward` takes."""
    settings: Settings = ctx.settings
    part, needs = PARTS[settings.part], ctx.needs_input_grad
    kept, count = 2 + len(part.saved._fields), len(part.weights._fields)
    x, keep = tensors[:2]
    assert x is not None
    saved, weights = part.saved(*tensors[2:kept]), part.weights(*tensors[kept:])
    wanted = (needs[1], *needs[4 : 4 + count])
    if eager_backward.is_transformed(dy):
        dx, *d_weights = eager_backward.gradients(settings, dy, x, keep, saved, weights, wanted)
    else:
        dy = dy.contiguous()
        dx, *d_weights = ops.backward(settings, dy, channels_last(x), keep, saved, weights, wanted)
        dx = None if dx is None else dx.permute(0, 3, 1, 2)
        d_weights = _split(d_weights, weights)
    d_shortcut = dy.permute(0, 3, 1, 2) if ctx.shortcut else None
    return None, dx, d_shortcut, None, *d_weights, *(None,) * (len(needs) - 4 - count)


def _split(gradients: list[Tensor | None], weights: Any) -> list[Tensor | None]:
    """Weights' gradients in their own dtypes and shapes, a BatchNorm's two taken apart."""
    found: list[Tensor | None] = []
    pair = None
    for name, gradient, weight in zip(weights._fields, gradients, weights, strict=True):
        if name.startswith("bn"):
            pair = gradient if name.endswith("_weight") else pair
            gradient = None if pair is None else pair[int(name.endswith("_bias"))]
        found.append(_cast(gradient, weight))
    return found


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] in any layout as contiguous [N, H, W, C]; no copy for channels_last.

    x itself is saved, not this view of it: a view made in a Function would not tell autograd who changed x in place.
    """
    return x.permute(0, 2, 3, 1).contiguous()


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """With the weight's strides, where only axes of one entry differ: DistributedDataParallel asks for them."""
    if gradient is None or like is None:
        return None
    gradient = gradient.reshape(like.shape).to(like.dtype)
    if gradient.stride() == like.stride() or not (gradient.is_contiguous() and like.is_contiguous()):
        return gradient
    return gradient.as_strided(like.shape, like.stride())


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are, and an error where somebody differentiates them by one of the first `anchors` tensors."""

    @staticmethod
    def forward(ctx: Any, anchors: int, *tensors: Tensor | None) -> Tensors:
        return tensors[anchors:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensors:
        raise RuntimeError(_TWICE)


def _marked(saved: Tensors, dy: Tensor, gradients: Tensors) -> Tensors:
    """The gradients, with the error of who differentiates them.

    torch's own `once_differentiable` has none where dy is a constant. Autograd visits what lies between the gradients
    and what they are differentiated by: it must find all that they follow from.
    """
    anchors = [t for t in (dy, *saved) if t is not None and t.requires_grad]
    return _FirstDerivative.apply(len(anchors) + 1, *anchors, dy.new_empty(0).requires_grad_(), *gradients)
