"""1x1 convolutions forward, as matrix products over pixels, with BatchNorm folded into both ends.

u[m, o] = sum_i w[o, i] * a[m, i], a = act(scale * x + shift) * gate[n, i]; epilogue: moments of u. Their backward is in
project_backward.py and expand_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import store_moments
from .launching import kernel
from .math import activate, at_least, dot, stored, sum_rows
from .running import load_norm
from .tables import tiles as chosen
from .traffic import state
from .tuning import accumulator, cdiv, groups, matmul_tiles, numeric, precision


@triton.jit
def load_input(
    x_ptr, norm_ptr, gate_ptr, o_m, m_m, o_c, HW, C, ACT: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """act(scale * x + shift) * gate[n, c] for a tile of pixels and channels; 0 outside the channels."""
    m_c = o_c < C
    m = m_m[:, None] & m_c[None, :]
    b_a = tl.load(x_ptr + o_m[:, None].to(tl.int64) * C + o_c[None, :], mask=m, other=0.0)
    if HAS_NORM:
        b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, C)
        b_a = activate(b_a.to(ACC) * b_scale[None, :] + b_shift[None, :], ACT, FAST)
        if HAS_GATE:
            b_a = b_a * tl.load(gate_ptr + (o_m // HW)[:, None] * C + o_c[None, :], mask=m, other=0.0)
    return b_a


@kernel
@triton.jit
def _pointwise_fwd_kernel(
    x_ptr,
    w_ptr,
    norm_ptr,
    gate_ptr,
    u_ptr,
    partials_ptr,
    M,
    HW,
    TILES,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
):
    # One axis, columns first: the second would end at 65535 rows of tiles, and neighbours share their pixels in L2.
    columns = (CO + BO - 1) // BO
    group = tl.program_id(0) // columns
    o_o = tl.program_id(0) % columns * BO + tl.arange(0, BO)
    m_o = o_o < CO
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pivot = tl.zeros((1, BO), ACC)
    s1 = tl.zeros((BM, BO), ACC)
    s2 = tl.zeros((BM, BO), ACC)
    for tile in range(0, TILES):
        o_m = (group * TILES + tile) * BM + tl.arange(0, BM)
        m_m = o_m < M
        acc = tl.zeros((BM, BO), ACC)
        for k in range(0, CI, BK):
            o_k = k + tl.arange(0, BK)
            b_x = load_input(x_ptr, norm_ptr, gate_ptr, o_m, m_m, o_k, HW, CI, ACT, HAS_NORM, HAS_GATE, ACC, FAST)
            m_w = (o_k < CI)[:, None] & m_o[None, :]
            b_w = tl.load(w_ptr + o_o[None, :] * CI + o_k[:, None], mask=m_w, other=0.0)  # [BK, BO]
            acc = dot(b_x, b_w, acc, DTYPE, PRECISION)
        m = m_m[:, None] & m_o[None, :]
        b_u = acc
        if u_ptr is not None:
            b_stored = stored(acc, DTYPE)
            tl.store(u_ptr + o_m[:, None].to(tl.int64) * CO + o_o[None, :], b_stored, mask=m)
            b_u = b_stored.to(ACC)  # what is normalised later, rounded as stored
        if HAS_MOMENTS:
            # Sums about the first tile's mean stay in their lanes to the end.
            if tile == 0:
                b_rows = tl.sum(tl.where(m_m, 1.0, 0.0).to(ACC), 0)
                pivot = (tl.sum(tl.where(m, b_u, 0.0), 0) / b_rows)[None, :]
            b_u = tl.where(m, b_u - pivot, 0.0)
            s1 += b_u
            s2 += b_u * b_u
    if HAS_MOMENTS:
        count = tl.zeros((BO,), ACC) + tl.minimum(M - group * TILES * BM, TILES * BM)
        delta = sum_rows(s1) / count
        m2 = at_least(sum_rows(s2) - delta * delta * count, 0.0)
        store_moments(partials_ptr, group, count, tl.sum(pivot, 0) + delta, m2, o_o, m_o, CO)


def _launch(
    launcher: str,
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    gate: Tensor | None,
    u: Tensor | None,
    activation: str,
    moments: bool,
) -> Tensor | None:
    n, h, w, channels = x.shape
    out, rows = weight.shape[0], n * h * w
    traits = dict(activation=activation, norm=norm is not None, gate=gate is not None, moments=moments)
    tiles = chosen(launcher, x, matmul_tiles, (rows, channels, out), **traits)
    columns = cdiv(out, tiles["BO"])
    per_program = groups(cdiv(rows, tiles["BM"]), columns) if moments else 1
    programs = cdiv(rows, tiles["BM"] * per_program)
    partials = torch.empty(programs, 3, out, dtype=accumulator(x.dtype), device=x.device) if moments else None
    _pointwise_fwd_kernel[(columns * programs,)](
        x_ptr=x,
        w_ptr=weight,
        norm_ptr=norm,
        gate_ptr=gate,
        u_ptr=u,
        partials_ptr=partials,
        M=rows,
        HW=h * w,
        TILES=per_program,
        CI=channels,
        CO=out,
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_GATE=gate is not None,
        HAS_MOMENTS=moments,
        PRECISION=precision(x.dtype),
        **numeric(x.dtype),
        **tiles,
    )
    state(launcher, (x, weight, norm, gate), (u, partials))
    return partials


def pointwise_fwd(
    x: Tensor, weight: Tensor, norm: Tensor | None, gate: Tensor | None, activation: str, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """(u [N, H, W, O], partial moments [P, 3, O] if asked) of x [N, H, W, I] and weight [O, I, 1, 1]."""
    u = torch.empty(*x.shape[:3], weight.shape[0], dtype=x.dtype, device=x.device)
    return u, _launch("pointwise_fwd", x, weight, norm, gate, u, activation, moments)


def pointwise_moments(x: Tensor, weight: Tensor) -> Tensor:
    """Partial moments [P, 3, O] of an output that is not kept: before rounding, as a walk computes it again."""
    partials = _launch("pointwise_moments", x, weight, norm=None, gate=None, u=None, activation="none", moments=True)
    assert partials is not None
    return partials
