"""A convolution's bias in front of its BatchNorm, by PyTorch's operations: no kernel knows of it.

The kernels' BatchNorm takes u, the convolution's output without its bias b: with running statistics the bias is part of
the shift, with those of the batch it is part of the mean, which is taken off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastmbconv.block import BatchNorm


def affine(bn: BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a BatchNorm of u; gradients reach all that they are made of.

    No halves where the bias is a sum: rounded, a large one would be wrong for every pixel alike, and so would the
    weight's gradient, which is a sum too.
    """
    weight, bias, added = bn.weight, bn.bias, bn.conv_bias
    if bias is None or added is None:
        return weight, bias
    wide = torch.promote_types(bias.dtype, torch.float32)
    weight, bias, added = None if weight is None else weight.to(wide), bias.to(wide), added.to(wide)
    if bn.batch_statistics:
        return weight, bias + 0 * added  # its gradient is 0 and not None, and NaN stays NaN
    assert bn.running_var is not None
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    return weight, bias + added * (scale if weight is None else scale * weight)


def shifted(weights: Any, bns: dict[str, BatchNorm]) -> Any:
    """A part's weights with those of these BatchNorms of u, by their names there."""
    changed = {}
    for name, bn in bns.items():
        changed[f"{name}_weight"], changed[f"{name}_bias"] = affine(bn)
    return weights._replace(**changed) if changed else weights


@torch.no_grad()
def move_means(bns: Iterable[BatchNorm]) -> None:
    """Add to running means that have moved by u's what their biases add to that."""
    for bn in bns:
        if not bn.updates or bn.conv_bias is None or bn.running_mean is None:
            continue
        if bn.momentum is not None:
            bn.running_mean.add_(bn.conv_bias, alpha=bn.momentum)
        elif bn.num_batches_tracked is not None:
            bn.running_mean.add_(bn.conv_bias / bn.num_batches_tracked)
