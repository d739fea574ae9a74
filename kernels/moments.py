"""Moments of an image that another library's convolution wrote: partial [count, mean, M2] per channel, one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import store_moments
from .launching import kernel
from .math import at_least, sum_rows
from .tables import tiles as chosen
from .traffic import state
from .tuning import accumulator, cdiv, groups, numeric, row_tiles


@kernel
@triton.jit
def _moments_kernel(
    u_ptr,
    partials_ptr,
    M,
    TILES,
    C: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    group = tl.program_id(0)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    first = group.to(tl.int64) * TILES * BM
    pivot = tl.load(u_ptr + first * C + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    s1 = tl.zeros((BM, BC), ACC)
    s2 = tl.zeros((BM, BC), ACC)
    for tile in range(0, TILES):
        o_m = (group * TILES + tile) * BM + tl.arange(0, BM)
        m = (o_m < M)[:, None] & m_c[None, :]
        b_u = tl.load(u_ptr + o_m[:, None].to(tl.int64) * C + o_c[None, :], mask=m, other=0.0).to(ACC)  # [BM, BC]
        b_u = tl.where(m, b_u - pivot, 0.0)
        s1 += b_u
        s2 += b_u * b_u
    count = tl.zeros((BC,), ACC) + tl.minimum(M - group * TILES * BM, TILES * BM)
    delta = sum_rows(s1) / count
    m2 = at_least(sum_rows(s2) - delta * delta * count, 0.0)
    store_moments(partials_ptr, group, count, tl.sum(pivot, 0) + delta, m2, o_c, m_c, C)


def moments(u: Tensor) -> Tensor:
    """Partial moments [P, 3, C] of u [N, H, W, C]."""
    n, h, w, c = u.shape
    tiles = chosen("moments", u, row_tiles, (n * h * w, c))
    rows, columns = cdiv(n * h * w, tiles["BM"]), cdiv(c, tiles["BC"])
    per_program = groups(rows, columns)
    programs = cdiv(rows, per_program)
    partials = torch.empty(programs, 3, c, dtype=accumulator(u.dtype), device=u.device)
    _moments_kernel[(programs, columns)](
        u_ptr=u, partials_ptr=partials, M=n * h * w, TILES=per_program, C=c, **numeric(u.dtype), **tiles
    )
    state("moments", (u,), (partials,))
    return partials
