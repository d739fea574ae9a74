"""The fused operations as one `torch.autograd.Function`: what is saved between a part's forward and its backward.

What the parts launch is in `fused/`; derivation of the backward: CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmbconv import dispatch, eager_backward, ops
from fastmbconv.call import Settings, Tensors
from fastmbconv.fused import PARTS

_TWICE = f"double backward: fastmbconv's kernels have first derivatives only; {dispatch.WAY_OUT}"


class Fused(torch.autograd.Function):
    """A part of `fused.PARTS`, the one that `settings` names, with its weights.

    Images are [N, C, H, W] in channels_last. Gradients flow to x, to the shortcut, which is the output's own, and to
    the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        signature: int,
        statistics: Tensors,
        x: Tensor,
        shortcut: Tensor | None,
        keep: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        weights = PARTS[settings.part].weights(*tensors)
        y, saved = ops.forward(settings, x, shortcut, keep, weights, statistics, signature)
        ctx.save_for_backward(x, keep, *saved, *weights)
        ctx.settings, ctx.signature, ctx.shortcut = settings, signature, shortcut is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensors:
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        saved = ctx.saved_tensors  # unpacked once: a checkpoint gives them no second time
        if twice and (eager_backward.is_batched(dy) or dispatch.functorch_transforms()):
            # A vmap hides what dy follows from, and torch.func takes no function like the one that marks gradients.
            raise RuntimeError(_TWICE)
        if not twice:
            return _gradients(ctx, saved, dy)
        with torch.no_grad():
            gradients = _gradients(ctx, saved, dy)
        return _marked(saved, dy, gradients)


FIRST = 6  # of a part's weights, among what `Fused.forward` takes


def _gradients(ctx: Any, tensors: Tensors, dy: Tensor) -> Tensors:
    """Of everything that `Fused.forward` takes."""
    settings: Settings = ctx.settings
    part, needs = PARTS[settings.part], ctx.needs_input_grad
    kept = 2 + len(part.saved._fields)
    x, keep = tensors[:2]
    assert x is not None
    saved, weights = part.saved(*tensors[2:kept]), part.weights(*tensors[kept:])
    wanted = (needs[3], *needs[FIRST:])
    gradients: Sequence[Tensor | None]
    if eager_backward.is_transformed(dy):
        gradients = eager_backward.gradients(settings, dy, x, keep, saved, weights, wanted)
    else:
        gradients = ops.backward(
            settings, dy.contiguous(memory_format=torch.channels_last), x, keep, saved, weights, wanted, ctx.signature
        )
    dx, *d_weights = gradients
    d_shortcut = dy if ctx.shortcut else None
    return None, None, None, dx, d_shortcut, None, *d_weights


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
