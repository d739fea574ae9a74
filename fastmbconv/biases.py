"""A convolution's bias in front of its BatchNorm, by PyTorch's operations: no kernel knows of it.

The kernels' BatchNorm takes u, the convolution's output without its bias b: with running statistics the bias is part of
the shift, with those of the batch it is part of the mean, which is taken off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmbconv.block import BatchNorm


def shift(bn: BatchNorm) -> Tensor | None:
    """The bias that a BatchNorm of u has, in its own bias's dtype; gradients reach all that it is made of."""
    bias, added = bn.bias, bn.conv_bias
    if bias is None or added is None:
        return bias
    if bn.batch_statistics:
        wants = torch.is_grad_enabled() and added.requires_grad
        return (bias + 0 * added).to(bias.dtype) if wants else bias  # its gradient is 0, and no None
    assert bn.running_var is not None
    wide = torch.promote_types(bias.dtype, torch.float32)
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight
    return (bias + added * scale).to(bias.dtype)


def shifted(weights: Any, bns: dict[str, BatchNorm]) -> Any:
    """A part's weights with the biases, by their names there, of these BatchNorms of u."""
    return weights._replace(**{name: shift(bn) for name, bn in bns.items()})


@torch.no_grad()
def move_mean(bn: BatchNorm) -> None:
    """Add to a running mean that has moved by u's mean what the bias adds to that."""
    if not bn.updates or bn.conv_bias is None or bn.running_mean is None:
        return
    if bn.momentum is not None:
        bn.running_mean.add_(bn.conv_bias, alpha=bn.momentum)
    elif bn.num_batches_tracked is not None:
        bn.running_mean.add_(bn.conv_bias / bn.num_batches_tracked)
