"""Fused-MBConv (EfficientNetV2's early stages): the library's dense convolution, and everything behind it fused.

Passes of u, the dense convolution's output, of a training step; x and the output are u/4, no squeeze-excite:

    forward    eager: conv 1.25, statistics 1, BN 2, act 2, project 1.25, its BN 0.75, + x 0.75             9
               fused: conv 1.25, statistics 1, project with BN and act as its prologue 1.25, BN and + x 0.75 4.25
    backward   eager: BN 1.25, project 2.5, act 3, BN 5, conv 2.5, + x 0.75                                  15
               fused: BN's sums 0.5, the sweep 1.5, project and the first BN 2.5, conv 2.5, + x 0.75          7.75

With squeeze-excite eager moves 13 passes more, fused one. A block that ends after its activation, x and u of one size:
25 eager, 18 fused. Inference without a projection saves the activation's two passes, with one all four of BN and act.
`fastmbconv.traffic.count_dense` counts a given block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmbconv import checks, dispatch, reference
from fastmbconv.block import DenseBlock
from fastmbconv.functional import _affine, _compute_dtype, _count_batch, _keep, _running, _setting, _use_kernels


def dense_mbconv(x: Tensor, block: DenseBlock, *, eager: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """One Fused-MBConv block, fused around its convolution where `dispatch.supports` says so, else `eager(x)`.

    Args:
        x: [N, C_in, H, W], fp32, fp16 or bf16, in any memory format.
        block: the weights and settings; BatchNorms that are training move their running statistics in place.
        eager: what to run instead where no kernel does; default `reference.dense_mbconv`.

    Returns:
        [N, C_out, H', W'], channels_last where the kernels ran.

    Raises:
        ValueError, RuntimeError: as `functional.mbconv` does.
    """
    if not _use_kernels(dispatch.supports(block, x), x):
        return reference.dense_mbconv(x, block) if eager is None else eager(x)
    checks.check_dense_input(x, block)
    u = block.conv(x.contiguous(memory_format=torch.channels_last))
    checks.check_dense(x, u, block)
    from fastmbconv.autograd import DenseFunction

    # As in eager under autocast: the branch is computed in autocast's dtype, a wider shortcut is added in its own.
    compute, se = _compute_dtype(x), block.se
    wide = block.residual and compute != x.dtype
    with torch.autocast(x.device.type, enabled=False):
        keep = _keep(x, block, compute)
        _count_batch(block.bn1)
        _count_batch(block.bn2)
        y = DenseFunction.apply(
            u, x if block.residual and not wide else None, *_affine(block.bn1),
            *((None,) * 4 if se is None else (se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias)),
            block.project_weight, *_affine(block.bn2), keep, block.activation, "none" if se is None else se.activation,
            _setting(block.bn1), None if block.bn2 is None else _setting(block.bn2),
            *_running(block.bn1), *_running(block.bn2),
        ).permute(0, 3, 1, 2)  # fmt: skip
        return x + y if wide else y
