"""Squeeze-and-excitation backward: all that is [N, C], and the coefficients of the BatchNorm before the pool.

p, z, gate as in squeeze_excite.py; q = Wx z + bx. Of the five sums over pixels pool.py took two, `act_sums` [N, 2, C];
project_backward.py takes 0 da * act', 1 da * act' * xhat, 2 da * a, where da is the gradient of the projection's input.

    dq = sum 2 gate',    dz = Wx^T dq,    dr = dz act'(r),    dp = Wr^T dr / HW, the offset of each pixel
    dbias = sum over n of gate sum 0 + dp act_sums 0,    dweight likewise of sum 1 and act_sums 1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import store_coef
from .launching import kernel
from .math import INTERPRETED, activate, activate_grad, dot, gate_slope, sum_rows
from .squeeze_excite import AT_ONCE, load_parts, load_sums, parts_tiles, store_products
from .traffic import state
from .tuning import MIN_DOT, cdiv, numeric, pow2


@kernel
@triton.jit
def _excite_bwd_kernel(
    sums_ptr,
    gate_ptr,
    wx_ptr,
    dq_ptr,
    parts_ptr,
    gated_ptr,
    N,
    P,
    C: tl.constexpr,
    R: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m = (o_n < N)[:, None] & (o_c < C)[None, :]
    o_nc = o_n[:, None] * C + o_c[None, :]  # [BN, BC]
    GATE_ROW: tl.constexpr = 2 if ROWS == 3 else 0
    b_gate = tl.load(gate_ptr + o_nc, mask=m, other=0.0)
    b_dq = load_sums(sums_ptr, o_n, GATE_ROW, o_c, m, N, P, C, ROWS, ACC, BN, BC) * gate_slope(b_gate, GATE)
    tl.store(dq_ptr + o_nc, b_dq, mask=m)
    store_products(parts_ptr, tl.program_id(1), wx_ptr, b_dq, o_n, o_c, N, R, C, R, 1, ACC, BN, BR)
    if ROWS == 3:
        for row in tl.static_range(2):
            b_s = b_gate * load_sums(sums_ptr, o_n, row, o_c, m, N, P, C, 3, ACC, BN, BC)
            tl.store(gated_ptr + o_nc + (o_n[:, None] + row) * C, b_s, mask=m)


@triton.jit
def load_dr(
    dz_ptr, r_ptr, o_n, o_r, N, PARTS, R: tl.constexpr, ACT: tl.constexpr, AT_ONCE: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """[BN, BR]: the gradient of the reduced vector before its activation."""
    m = (o_n < N)[:, None] & (o_r < R)[None, :]
    _, b_g = activate_grad(tl.load(r_ptr + o_n[:, None] * R + o_r[None, :], mask=m, other=0.0), ACT, False)
    return load_parts(dz_ptr, o_n, o_r, m, N, PARTS, R, AT_ONCE, ACC, BN, BR) * b_g


@kernel
@triton.jit
def _excite_finish_kernel(
    gated_ptr,
    act_sums_ptr,
    p_ptr,
    r_ptr,
    dq_ptr,
    dz_ptr,
    wr_ptr,
    norm_ptr,
    offset_ptr,
    dweight_ptr,
    dbias_ptr,
    coef_ptr,
    dwr_ptr,
    dbr_ptr,
    dwx_ptr,
    dbx_ptr,
    N,
    HW,
    PARTS,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    BATCH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    BLOCKS: tl.constexpr = (R + BR - 1) // BR
    if tl.program_id(1) == 0:  # the pool's gradient, and what is summed with it
        b_db = tl.zeros((BN, BC), ACC)
        b_dg = tl.zeros((BN, BC), ACC)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            b_dp = tl.zeros((BN, BC), ACC)
            for r0 in range(0, R, BR):
                o_r = r0 + tl.arange(0, BR)
                m_w = (o_r < R)[:, None] & m_c[None, :]
                b_w = tl.load(wr_ptr + o_r[:, None] * C + o_c[None, :], mask=m_w, other=0.0).to(ACC)  # [BR, BC]
                b_dr = load_dr(dz_ptr, r_ptr, o_n, o_r, N, PARTS, R, ACT, AT_ONCE, ACC, BN, BR)
                b_dp = dot(b_dr, b_w, b_dp, ACC, "ieee")
            b_dp = b_dp / HW
            m_nc = (o_n < N)[:, None] & m_c[None, :]
            o_nc = o_n[:, None] * C + o_c[None, :]  # [BN, BC]
            tl.store(offset_ptr + o_nc, b_dp, mask=m_nc)
            if norm_ptr is not None:
                o_two = o_nc + o_n[:, None] * C  # of [N, 2, C]
                b_db += tl.load(gated_ptr + o_two, mask=m_nc, other=0.0)
                b_db += b_dp * tl.load(act_sums_ptr + o_two, mask=m_nc, other=0.0)
                b_dg += tl.load(gated_ptr + o_two + C, mask=m_nc, other=0.0)
                b_dg += b_dp * tl.load(act_sums_ptr + o_two + C, mask=m_nc, other=0.0)
        if norm_ptr is not None:
            b_dweight, b_dbias = sum_rows(b_dg), sum_rows(b_db)
            tl.store(dweight_ptr + o_c, b_dweight, mask=m_c)
            tl.store(dbias_ptr + o_c, b_dbias, mask=m_c)
            store_coef(norm_ptr, coef_ptr, o_c, m_c, C, b_dweight, b_dbias, N * HW, BATCH)
    elif tl.program_id(1) <= BLOCKS:  # the reduce weight's gradient, of a block of reduced channels
        o_r = (tl.program_id(1) - 1) * BR + tl.arange(0, BR)
        b_dwr = tl.zeros((BR, BC), ACC)
        b_dbr = tl.zeros((BN, BR), ACC)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            m_nc = (o_n < N)[:, None] & m_c[None, :]
            b_p = tl.load(p_ptr + o_n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0).to(ACC)  # [BN, BC]
            b_dr = load_dr(dz_ptr, r_ptr, o_n, o_r, N, PARTS, R, ACT, AT_ONCE, ACC, BN, BR)
            b_dwr = dot(tl.trans(b_dr), b_p, b_dwr, ACC, "ieee")
            b_dbr += b_dr
        tl.store(dwr_ptr + o_r[:, None] * C + o_c[None, :], b_dwr, mask=(o_r < R)[:, None] & m_c[None, :])
        if tl.program_id(0) == 0:
            tl.store(dbr_ptr + o_r, sum_rows(b_dbr), mask=o_r < R)
    else:  # the expand weight's
        o_r = (tl.program_id(1) - BLOCKS - 1) * BR + tl.arange(0, BR)
        b_dwx = tl.zeros((BC, BR), ACC)
        b_dbx = tl.zeros((BN, BC), ACC)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            m_nc = (o_n < N)[:, None] & m_c[None, :]
            m_nr = (o_n < N)[:, None] & (o_r < R)[None, :]
            b_dq = tl.load(dq_ptr + o_n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)  # [BN, BC]
            b_r = tl.load(r_ptr + o_n[:, None] * R + o_r[None, :], mask=m_nr, other=0.0)  # [BN, BR]
            b_dwx = dot(tl.trans(b_dq), activate(b_r, ACT, False), b_dwx, ACC, "ieee")
            b_dbx += b_dq
        tl.store(dwx_ptr + o_c[:, None] * R + o_r[None, :], b_dwx, mask=m_c[:, None] & (o_r < R)[None, :])
        if tl.program_id(1) == BLOCKS + 1:
            tl.store(dbx_ptr + o_c, sum_rows(b_dbx), mask=m_c)


def finish_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """[BN images a step, BR reduced channels, BC channels]; up to 48 reduced ones are as good as none idle in 16."""
    if INTERPRETED:
        return dict(BN=pow2(images, MIN_DOT, 256), BR=pow2(reduced, MIN_DOT, 1024), BC=pow2(channels, MIN_DOT, 1024))
    rows = MIN_DOT if reduced <= 48 else 64
    return dict(BN=32, BR=rows, BC=32, num_warps=4 if rows == MIN_DOT else 8, num_stages=1)


def excite_bwd(
    sums: Tensor,
    act_sums: Tensor | None,
    pooled: Tensor,
    r: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    pixels: int,
    activation: str,
    gate_function: str,
    norm: Tensor | None = None,
    batch_statistics: bool = False,
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], Tensor] | None, Tensor, Tensor, Tensor, Tensor]:
    """Backward of pool and excite from `sums` [P, N, 3, C] and `act_sums` [N, 2, C], or [P, N, 1, C] of da * a.

    Returns (offset [N, C], the pool's gradient per pixel; gradients of weight and bias [C] and coef [4, C] of the
    BatchNorm before the pool, whose vectors are `norm`, None without it; gradients of reduce weight [R, C], reduce bias
    [R], expand weight [C, R], expand bias [C]). One launch for what an image's gate tells, one for what is left of a
    block of channels.
    """
    n, c = gate.shape
    parts, _, rows, _ = sums.shape
    reduced = r.shape[1]
    dq, offset = torch.empty_like(gate), torch.empty_like(gate)
    gated = None if norm is None else gate.new_empty(n, 2, c)
    acc = numeric(gate.dtype)["ACC"]
    tiles = parts_tiles(n, c, reduced)
    grid = cdiv(n, tiles["BN"]), cdiv(c, tiles["BC"])
    dz = gate.new_empty(grid[1], n, reduced)
    _excite_bwd_kernel[grid](
        sums_ptr=sums,
        gate_ptr=gate,
        wx_ptr=expand_weight,
        dq_ptr=dq,
        parts_ptr=dz,
        gated_ptr=gated,
        N=n,
        P=parts,
        C=c,
        R=reduced,
        GATE=gate_function,
        ROWS=rows,
        ACC=acc,
        **tiles,
    )
    state("excite_bwd", (sums, gate, expand_weight), (dq, dz, gated))
    bn = None if norm is None else ((gate.new_empty(c), gate.new_empty(c)), gate.new_empty(4, c))
    (d_weight, d_bias), coef = bn or ((None, None), None)
    d_reduce, d_reduce_bias = gate.new_empty(reduced, c), gate.new_empty(reduced)
    d_expand, d_expand_bias = gate.new_empty(c, reduced), gate.new_empty(c)
    tiles = finish_tiles(n, c, reduced)
    _excite_finish_kernel[(cdiv(c, tiles["BC"]), 1 + 2 * cdiv(reduced, tiles["BR"]))](
        gated_ptr=gated,
        act_sums_ptr=None if norm is None else act_sums,
        p_ptr=pooled,
        r_ptr=r,
        dq_ptr=dq,
        dz_ptr=dz,
        wr_ptr=reduce_weight,
        norm_ptr=norm,
        offset_ptr=offset,
        dweight_ptr=d_weight,
        dbias_ptr=d_bias,
        coef_ptr=coef,
        dwr_ptr=d_reduce,
        dbr_ptr=d_reduce_bias,
        dwx_ptr=d_expand,
        dbx_ptr=d_expand_bias,
        N=n,
        HW=pixels,
        C=c,
        R=reduced,
        ACT=activation,
        BATCH=batch_statistics,
        PARTS=len(dz),
        AT_ONCE=AT_ONCE,
        ACC=acc,
        **tiles,
    )
    state(
        "excite_finish",
        (gated, None if norm is None else act_sums, pooled, r, dq, dz, reduce_weight, norm),
        (offset, d_weight, d_bias, coef, d_reduce, d_reduce_bias, d_expand, d_expand_bias),
    )
    return offset, bn, d_reduce, d_reduce_bias, d_expand, d_expand_bias
