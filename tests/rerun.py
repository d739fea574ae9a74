"""Stands for `torch.cuda.make_graphed_callables` where there is no GPU: what a graph would replay runs again.

It keeps what torch's keeps: inputs, outputs and gradients have one place each, into which every call writes, and what a
backward has read is gone. Autocast is the capture's. A random number is drawn anew, as a replay draws it.
"""

import torch
from torch import nn


def make_graphed_callables(function, example, num_warmup_iters=3, allow_unused_input=False):
    """As torch's, for one function that returns a tuple of tensors."""
    assert not isinstance(function, nn.Module) and not (
        torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    )
    kind = example[0].device.type
    amp = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind), "cache_enabled": False}
    wanted = [tensor for tensor in example if tensor.requires_grad]

    def backward(outputs, gradients):
        ends = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if y.requires_grad]
        if not ends or not wanted:
            return [None] * len(example)
        ys, dys = zip(*ends, strict=True)
        new = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=allow_unused_input))
        return [next(new) if tensor.requires_grad else None for tensor in example]

    def both():
        outputs = function(*example)
        return outputs, backward(outputs, [torch.full_like(y, float("nan")) if y.requires_grad else y for y in outputs])

    for _ in range(num_warmup_iters):
        both()
    outputs, gradients = both()
    live = []

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            for place, tensor in zip(example, given, strict=True):
                if place.data_ptr() != tensor.data_ptr():
                    with torch.no_grad():
                        place.copy_(tensor)
            with torch.enable_grad(), torch.autocast(kind, **amp):
                live[:] = function(*example)
            for place, tensor in zip(outputs, live, strict=True):
                place.detach().copy_(tensor.detach())
            return tuple(place.detach() for place in outputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *dys):
            for place, tensor in zip(gradients, backward(live, dys), strict=True):
                if place is not None:
                    place.copy_(tensor)
            return tuple(None if place is None else place.detach() for place in gradients)

    return Replay.apply
