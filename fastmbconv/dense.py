"""Fused-MBConv (EfficientNetV2's early stages): the library's dense convolution, and everything behind it fused.

Passes of u, the dense convolution's output, of a training step; x and the output are u/4, no squeeze-excite:

    forward    eager: conv 1.25, statistics 1, BN 2, act 2, project 1.25, its BN 0.75, + x 0.75             9
               fused: conv 1.25, statistics 1, project with BN and act as its prologue 1.25, BN and + x 0.75 4.25
    backward   eager: BN 1.25, project 2.5, act 3, BN 5, conv 2.5, + x 0.75                                  15
               fused: BN's sums 0.5, its du 0.75, project's sums 1.25, its du 2.25, conv 2.5, + x 0.75        8

With squeeze-excite eager moves 13 passes more, fused one. A block that ends after its activation, x and u of one size:
25 eager, 18 fused. Without gradients and with running statistics:

    inference  eager: conv 1.25, BN 2, act 2, project 1.25, its BN 0.5, + x 0.75                             7.75
               eager, BN folded into both convolutions                                                       5.25
               fused: conv 1.25, project with BN and act as its prologue, its BN and + x as epilogue 1.5     2.75

With squeeze-excite eager moves 3 more, fused one, for the pool. A block that ends after its activation: 9 eager, 7
folded, 5 fused. `fastmbconv.traffic.count_dense` counts a given block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmbconv import checks, dispatch, reference
from fastmbconv.block import DenseBlock
from fastmbconv.functional import choose_step, compute_dtype, run_prepared, use_kernels
from fastmbconv.prepared import Prepared, find_prepared


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
    compute = compute_dtype(x)
    ready = find_prepared(x, block, "fast", compute, lambda: _prepare(x, block, compute))
    if ready is None:
        return reference.dense_mbconv(x, block) if eager is None else eager(x)
    checks.check_dense_input(x, block)
    u = block.conv(x.contiguous(memory_format=torch.channels_last))
    checks.check_dense(x, u, block)
    return run_prepared(x, u, block, ready, choose_step(ready, u, x), x if ready.settings.residual else None)


def _prepare(x: Tensor, block: DenseBlock, compute: torch.dtype) -> Prepared | None:
    if not use_kernels(dispatch.supports(block, x), x):
        return None
    from fastmbconv.fused import dense

    described = dense.describe(block, block.residual and compute == x.dtype)
    return Prepared(x, block, described, compute)
