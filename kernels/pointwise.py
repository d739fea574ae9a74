"""1x1 convolutions as matrix products over pixels, with BatchNorm folded into both ends.

Forward: u[m, o] = sum_i w[o, i] * a[m, i], a = act(scale * x + shift) * gate[n, i]; epilogue: moments of u.
Backward: du = p * (dy * keep[n]) + q * u + r is a prologue, so BatchNorm's own backward is never a pass of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_coef, store_moments
from .launching import kernel
from .math import activate, activate_grad, at_least, dot, stored
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


@triton.jit
def load_grad(
    dy_ptr, u_ptr, coef_ptr, keep_ptr, o_m, m_m, o_c, HW, C, HAS_KEEP: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """du = p * (dy * keep[n]) + q * u + r for a tile of pixels and channels; 0 outside the channels."""
    m_c = o_c < C
    m = m_m[:, None] & m_c[None, :]
    o = o_m[:, None].to(tl.int64) * C + o_c[None, :]
    b_p, b_q, b_r = load_coef(coef_ptr, o_c, m_c, C)
    b_d = tl.load(dy_ptr + o, mask=m, other=0.0).to(ACC)
    b_u = tl.load(u_ptr + o, mask=m, other=0.0).to(ACC)
    if HAS_KEEP:
        b_d = b_d * tl.load(keep_ptr + o_m // HW, mask=m_m, other=0.0)[:, None]
    return b_p[None, :] * b_d + b_q[None, :] * b_u + b_r[None, :]


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
        b_u = stored(acc, DTYPE)
        tl.store(u_ptr + o_m[:, None].to(tl.int64) * CO + o_o[None, :], b_u, mask=m)
        if HAS_MOMENTS:
            # Sums about the first tile's mean stay in their lanes to the end; of what is normalised, rounded as stored.
            b_u = b_u.to(ACC)
            if tile == 0:
                b_rows = tl.sum(tl.where(m_m, 1.0, 0.0).to(ACC), 0)
                pivot = (tl.sum(tl.where(m, b_u, 0.0), 0) / b_rows)[None, :]
            b_u = tl.where(m, b_u - pivot, 0.0)
            s1 += b_u
            s2 += b_u * b_u
    if HAS_MOMENTS:
        count = tl.zeros((BO,), ACC) + tl.minimum(M - group * TILES * BM, TILES * BM)
        delta = tl.sum(s1, 0) / count
        m2 = at_least(tl.sum(s2, 0) - delta * delta * count, 0.0)
        store_moments(partials_ptr, group, count, tl.sum(pivot, 0) + delta, m2, o_o, m_o, CO)


@kernel
@triton.jit
def _pointwise_dgrad_kernel(
    dy_ptr,
    u_ptr,
    coef_ptr,
    keep_ptr,
    w_ptr,
    in_ptr,
    in_norm_ptr,
    gate_ptr,
    offset_ptr,
    in_coef_ptr,
    du_ptr,
    M,
    HW,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ACT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
):
    columns = (CI + BO - 1) // BO
    o_i = tl.program_id(0) % columns * BO + tl.arange(0, BO)
    m_i = o_i < CI
    o_m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    m_m = o_m < M
    DTYPE: tl.constexpr = du_ptr.dtype.element_ty
    acc = tl.zeros((BM, BO), ACC)
    for k in range(0, CO, BK):
        o_k = k + tl.arange(0, BK)
        b_du = load_grad(dy_ptr, u_ptr, coef_ptr, keep_ptr, o_m, m_m, o_k, HW, CO, HAS_KEEP, ACC)
        m_w = (o_k < CO)[:, None] & m_i[None, :]
        b_w = tl.load(w_ptr + o_k[:, None] * CI + o_i[None, :], mask=m_w, other=0.0)  # [BK, BO]
        acc = dot(b_du, b_w, acc, DTYPE, PRECISION)
    m = m_m[:, None] & m_i[None, :]
    o = o_m[:, None].to(tl.int64) * CI + o_i[None, :]
    b_scale, b_shift = load_norm(in_norm_ptr, o_i, m_i, CI)
    b_p, b_q, b_r = load_coef(in_coef_ptr, o_i, m_i, CI)
    b_u = tl.load(in_ptr + o, mask=m, other=0.0).to(ACC)
    _, b_g = activate_grad(b_u * b_scale[None, :] + b_shift[None, :], ACT, FAST)
    if HAS_GATE:
        o_nc = (o_m // HW)[:, None] * CI + o_i[None, :]
        acc = acc * tl.load(gate_ptr + o_nc, mask=m, other=0.0) + tl.load(offset_ptr + o_nc, mask=m, other=0.0)
    b_du = b_p[None, :] * (acc * b_g) + b_q[None, :] * b_u + b_r[None, :]
    tl.store(du_ptr + o, stored(b_du, DTYPE), mask=m)


def pointwise_fwd(
    x: Tensor, weight: Tensor, norm: Tensor | None, gate: Tensor | None, activation: str, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """(u [N, H, W, O], partial moments [P, 3, O] if asked) of x [N, H, W, I] and weight [O, I, 1, 1]."""
    n, h, w, channels = x.shape
    out, rows = weight.shape[0], n * h * w
    u = torch.empty(n, h, w, out, dtype=x.dtype, device=x.device)
    traits = dict(activation=activation, norm=norm is not None, gate=gate is not None, moments=moments)
    tiles = chosen("pointwise_fwd", x, matmul_tiles, (rows, channels, out), **traits)
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
    state("pointwise_fwd", (x, weight, norm, gate), (u, partials))
    return u, partials


def pointwise_dgrad(
    dy: Tensor,
    u: Tensor,
    coef: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    inputs: Tensor,
    in_norm: Tensor,
    gate: Tensor | None,
    offset: Tensor | None,
    in_coef: Tensor,
    activation: str,
) -> Tensor:
    """Gradient at `inputs` [N, H, W, I], the pre-activation of the product's input, from dy and u [N, H, W, O].

    p' * (dz * gate + offset) * act'(scale * inputs + shift) + q' * inputs + r', where dz = du @ weight.
    """
    n, h, w, out = dy.shape
    channels, rows = weight.shape[1], n * h * w
    du = torch.empty_like(inputs)
    traits = dict(activation=activation, keep=keep is not None, gate=gate is not None)
    tiles = chosen("pointwise_dgrad", dy, matmul_tiles, (rows, out, channels), **traits)
    _pointwise_dgrad_kernel[(cdiv(channels, tiles["BO"]) * cdiv(rows, tiles["BM"]),)](
        dy_ptr=dy,
        u_ptr=u,
        coef_ptr=coef,
        keep_ptr=keep,
        w_ptr=weight,
        in_ptr=inputs,
        in_norm_ptr=in_norm,
        gate_ptr=gate,
        offset_ptr=offset,
        in_coef_ptr=in_coef,
        du_ptr=du,
        M=rows,
        HW=h * w,
        CI=channels,
        CO=out,
        ACT=activation,
        HAS_KEEP=keep is not None,
        HAS_GATE=gate is not None,
        PRECISION=precision(dy.dtype),
        **numeric(dy.dtype),
        **tiles,
    )
    state("pointwise_dgrad", (dy, u, coef, keep, weight, inputs, in_norm, gate, offset, in_coef), (du,))
    return du
