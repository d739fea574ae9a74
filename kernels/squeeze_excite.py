"""Squeeze-and-excitation: pool over the image, reduce, act, expand, sigmoid; and all of the backward that is [N, C].

p[n, c] = mean of act(scale * u + shift); z = act(Wr p + br); gate = sigmoid(Wx z + bx). The sums over pixels that the
backward needs come from one sweep (project_sweep.py), `sums` [OB, N, 5, C] in OB parts:
0 da * act', 1 da * act' * xhat, 2 da * a, 3 act', 4 act' * xhat, where da is the gradient of the project conv's input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .math import activate, activate_grad, dot, stored
from .running import Running, given, load_map
from .tables import tiles as chosen
from .traffic import state
from .tuning import INTERPRETED, MIN_DOT, PROGRAMS, accumulator, cdiv, numeric, pow2, row_tiles


@kernel
@triton.jit
def _pool_kernel(
    u_ptr,
    norm_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    var_ptr,
    dy_ptr,
    out_ptr,
    N,
    HW,
    SCALE,
    PIXELS,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DY: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    n, first, end = tl.program_id(0), 0, HW
    if PIXELS is not None:
        n, first = tl.program_id(0) % N, tl.program_id(0) // N * PIXELS
        end = tl.minimum(first + PIXELS, HW)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    if HAS_NORM:
        b_scale, b_shift = load_map(norm_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_c, m_c, C, EPS, ACC)
    acc = tl.zeros((BM, BC), ACC)
    for m0 in range(first, end, BM):
        o_m = m0 + tl.arange(0, BM)
        m = (o_m < end)[:, None] & m_c[None, :]
        o = (n.to(tl.int64) * HW + o_m[:, None]) * C + o_c[None, :]  # [BM, BC]
        b_a = tl.load(u_ptr + o, mask=m, other=0.0).to(ACC)
        if HAS_NORM:
            b_a = activate(b_a * b_scale[None, :] + b_shift[None, :], ACT, FAST)
            b_a = tl.where(m, b_a, 0.0)
        if HAS_DY:
            b_a = b_a * tl.load(dy_ptr + o, mask=m, other=0.0).to(ACC)
        acc += b_a
    tl.store(out_ptr + tl.program_id(0) * C + o_c, stored(tl.sum(acc, 0) / SCALE, out_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def store_gate(
    gate_ptr, wx_ptr, bx_ptr, b_r, n, C, R: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """An image's gate from the pre-activation of its reduced vector [BR]."""
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_z = tl.where(m_r, activate(b_r, ACT, False), 0.0)
    for c0 in range(0, C, BC):
        o_c = c0 + tl.arange(0, BC)
        m = m_r[None, :] & (o_c < C)[:, None]
        b_w = tl.load(wx_ptr + o_c[:, None] * R + o_r[None, :], mask=m, other=0.0).to(ACC)  # [BC, BR]
        b_q = tl.sum(b_w * b_z[None, :], 1) + tl.load(bx_ptr + o_c, mask=o_c < C, other=0.0).to(ACC)
        tl.store(gate_ptr + n * C + o_c, 1.0 / (1.0 + tl.exp(-b_q)), mask=o_c < C)


@kernel
@triton.jit
def _excite_fwd_kernel(
    p_ptr,
    wr_ptr,
    br_ptr,
    wx_ptr,
    bx_ptr,
    r_ptr,
    gate_ptr,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_r = tl.load(br_ptr + o_r, mask=m_r, other=0.0).to(ACC)
    for c0 in range(0, C, BC):
        o_c = c0 + tl.arange(0, BC)
        b_p = tl.load(p_ptr + n * C + o_c, mask=o_c < C, other=0.0).to(ACC)
        m = m_r[:, None] & (o_c < C)[None, :]
        b_w = tl.load(wr_ptr + o_r[:, None] * C + o_c[None, :], mask=m, other=0.0).to(ACC)  # [BR, BC]
        b_r += tl.sum(b_w * b_p[None, :], 1)
    tl.store(r_ptr + n * R + o_r, b_r, mask=m_r)
    store_gate(gate_ptr, wx_ptr, bx_ptr, b_r, n, C, R, ACT, ACC, BR, BC)


@triton.jit
def load_sum(
    sums_ptr, n, row, o_c, m_c, N, C, ROWS: tl.constexpr, OB: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr
):
    """One of an image's sums, its OB parts added."""
    b_s = tl.zeros((BC,), ACC)
    for part in tl.static_range(OB):
        b_s += tl.load(sums_ptr + ((part * N + n) * ROWS + row) * C + o_c, mask=m_c, other=0.0)
    return b_s


@kernel
@triton.jit
def _excite_bwd_kernel(
    sums_ptr,
    gate_ptr,
    r_ptr,
    wr_ptr,
    wx_ptr,
    dq_ptr,
    dr_ptr,
    offset_ptr,
    bn_sums_ptr,
    N,
    SCALE,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    OB: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    GATE_ROW: tl.constexpr = 2 if ROWS == 5 else 0
    b_dz = tl.zeros((BR,), ACC)
    for c0 in range(0, C, BC):
        o_c = c0 + tl.arange(0, BC)
        m_c = o_c < C
        b_gate = tl.load(gate_ptr + n * C + o_c, mask=m_c, other=0.0)
        b_dq = load_sum(sums_ptr, n, GATE_ROW, o_c, m_c, N, C, ROWS, OB, ACC, BC) * b_gate * (1.0 - b_gate)
        tl.store(dq_ptr + n * C + o_c, b_dq, mask=m_c)
        m = m_r[:, None] & m_c[None, :]
        b_w = tl.load(wx_ptr + o_c[None, :] * R + o_r[:, None], mask=m, other=0.0).to(ACC)  # [BR, BC]
        b_dz += tl.sum(b_w * b_dq[None, :], 1)
    _, b_g = activate_grad(tl.load(r_ptr + n * R + o_r, mask=m_r, other=0.0), ACT, False)
    b_dr = b_dz * b_g
    tl.store(dr_ptr + n * R + o_r, b_dr, mask=m_r)
    for c0 in range(0, C, BC):
        o_c = c0 + tl.arange(0, BC)
        m_c = o_c < C
        m = m_r[None, :] & m_c[:, None]
        b_w = tl.load(wr_ptr + o_r[None, :] * C + o_c[:, None], mask=m, other=0.0).to(ACC)  # [BC, BR]
        b_dp = tl.sum(b_w * b_dr[None, :], 1) / SCALE
        tl.store(offset_ptr + n * C + o_c, b_dp, mask=m_c)
        if ROWS == 5:
            b_gate = tl.load(gate_ptr + n * C + o_c, mask=m_c, other=0.0)
            b_db = b_gate * load_sum(sums_ptr, n, 0, o_c, m_c, N, C, ROWS, OB, ACC, BC)
            b_db += b_dp * load_sum(sums_ptr, n, 3, o_c, m_c, N, C, ROWS, 1, ACC, BC)
            b_dg = b_gate * load_sum(sums_ptr, n, 1, o_c, m_c, N, C, ROWS, OB, ACC, BC)
            b_dg += b_dp * load_sum(sums_ptr, n, 4, o_c, m_c, N, C, ROWS, 1, ACC, BC)
            tl.store(bn_sums_ptr + n * 2 * C + o_c, b_db, mask=m_c)
            tl.store(bn_sums_ptr + n * 2 * C + C + o_c, b_dg, mask=m_c)


@kernel
@triton.jit
def _excite_wgrad_kernel(
    p_ptr,
    r_ptr,
    dq_ptr,
    dr_ptr,
    dwr_ptr,
    dbr_ptr,
    dwx_ptr,
    dbx_ptr,
    N,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    m_c, m_r = o_c < C, o_r < R
    b_dwr = tl.zeros((BR, BC), ACC)
    b_dwx = tl.zeros((BC, BR), ACC)
    b_dbr = tl.zeros((BR,), ACC)
    b_dbx = tl.zeros((BC,), ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_nc = (o_n < N)[:, None] & m_c[None, :]
        m_nr = (o_n < N)[:, None] & m_r[None, :]
        b_p = tl.load(p_ptr + o_n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0).to(ACC)  # [BN, BC]
        b_dq = tl.load(dq_ptr + o_n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)
        b_r = tl.load(r_ptr + o_n[:, None] * R + o_r[None, :], mask=m_nr, other=0.0)  # [BN, BR]
        b_dr = tl.load(dr_ptr + o_n[:, None] * R + o_r[None, :], mask=m_nr, other=0.0)
        b_dwr = dot(tl.trans(b_dr), b_p, b_dwr, ACC, "ieee")
        b_dwx = dot(tl.trans(b_dq), activate(b_r, ACT, False), b_dwx, ACC, "ieee")
        b_dbr += tl.sum(b_dr, 0)
        b_dbx += tl.sum(b_dq, 0)
    tl.store(dwr_ptr + o_r[:, None] * C + o_c[None, :], b_dwr, mask=m_r[:, None] & m_c[None, :])
    tl.store(dwx_ptr + o_c[:, None] * R + o_r[None, :], b_dwx, mask=m_c[:, None] & m_r[None, :])
    if tl.program_id(1) == 0:
        tl.store(dbx_ptr + o_c, b_dbx, mask=m_c)
    if tl.program_id(0) == 0:
        tl.store(dbr_ptr + o_r, b_dbr, mask=m_r)


def pool(u: Tensor, norm: Tensor | None, dy: Tensor | None, activation: str) -> Tensor:
    """[N, C]: per image and channel the mean of a = act(scale * u + shift), or with `dy` the sum of a * dy.

    The mean is kept for the backward and comes in u's dtype, as eager's does; the sum is as wide as accumulators.
    """
    n, h, w, c = u.shape
    out = torch.empty(n, c, dtype=u.dtype if dy is None else accumulator(u.dtype), device=u.device)
    _launch_pool(u, norm, dy, activation, _pool_tiles(u, norm, dy, activation), out, None)
    state("pool", (u, norm, dy), (out,))
    return out


def pool_inference(u: Tensor, bn: Running, activation: str) -> Tensor:
    """Sums of act(BN(u)) per image and channel, [P, N, C], over P parts of the image."""
    n, h, w, c = u.shape
    tiles = _pool_tiles(u, bn, None, activation)
    parts = min(cdiv(PROGRAMS, n * cdiv(c, tiles["BC"])), cdiv(h * w, tiles["BM"]))
    pixels = cdiv(h * w, parts)
    out = torch.empty(cdiv(h * w, pixels), n, c, dtype=accumulator(u.dtype), device=u.device)
    _launch_pool(u, bn, None, activation, tiles, out, pixels)
    state("pool", (u, *bn.tensors), (out,))
    return out


def _pool_tiles(u: Tensor, norm: Tensor | Running | None, dy: Tensor | None, activation: str) -> dict[str, int]:
    n, h, w, c = u.shape
    traits = dict(images=n, activation=activation, norm=norm is not None, dy=dy is not None)
    return chosen("pool", u, row_tiles, (h * w, c), **traits)


def _launch_pool(
    u: Tensor,
    norm: Tensor | Running | None,
    dy: Tensor | None,
    activation: str,
    tiles: dict[str, int],
    out: Tensor,
    pixels: int | None,
) -> None:
    n, h, w, c = u.shape
    _pool_kernel[(out.numel() // c, cdiv(c, tiles["BC"]))](
        u_ptr=u,
        norm_ptr=None if isinstance(norm, Running) else norm,
        **given(norm),
        dy_ptr=dy,
        out_ptr=out,
        N=None if pixels is None else n,
        HW=h * w,
        SCALE=h * w if dy is None and pixels is None else 1,
        PIXELS=pixels,
        C=c,
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_DY=dy is not None,
        **numeric(u.dtype),
        **tiles,
    )


def excite_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """[BR, BC]: all reduced channels and a step's others; training and inference."""
    rows = pow2(reduced, MIN_DOT, 1024)
    if INTERPRETED:
        return dict(BR=rows, BC=pow2(channels, MIN_DOT, 1024))
    few = images < PROGRAMS  # one wave or less: what counts is how long an image takes, and so its number of steps
    block = max(MIN_DOT, min((16384 if few else 4096) // rows, 256))
    return dict(BR=rows, BC=pow2(channels, MIN_DOT, block), num_warps=8 if few else 4)


def _wgrad_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """2 x [BR, BC] sums: at 64 x 64 they spill."""
    rows = pow2(reduced, MIN_DOT, 32)
    if INTERPRETED:
        return dict(BN=pow2(images, MIN_DOT, 256), BR=rows, BC=pow2(channels, MIN_DOT, 1024))
    return dict(BN=MIN_DOT, BR=rows, BC=pow2(channels, MIN_DOT, 64))


def excite_fwd(
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(pre-activation of the reduced vector [N, R], gate [N, C]) of pooled [N, C]."""
    n, c = pooled.shape
    reduced = reduce_weight.shape[0]
    r = torch.empty(n, reduced, dtype=accumulator(pooled.dtype), device=pooled.device)
    gate = torch.empty(n, c, dtype=r.dtype, device=pooled.device)
    _excite_fwd_kernel[(n,)](
        p_ptr=pooled,
        wr_ptr=reduce_weight,
        br_ptr=reduce_bias,
        wx_ptr=expand_weight,
        bx_ptr=expand_bias,
        r_ptr=r,
        gate_ptr=gate,
        C=c,
        R=reduced,
        ACT=activation,
        ACC=numeric(pooled.dtype)["ACC"],
        **excite_tiles(n, c, reduced),
    )
    state("excite_fwd", (pooled, reduce_weight, reduce_bias, expand_weight, expand_bias), (r, gate))
    return r, gate


def excite_bwd(
    sums: Tensor,
    pooled: Tensor,
    r: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    pixels: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of pool and excite from `sums` [OB, N, 5, C], or [1, N, 1, C] holding the gate's gradient alone.

    Returns (offset [N, C], the pool's gradient per pixel; BN2's sums [N, 2, C], unwritten for one row; gradients of
    reduce weight [R, C], reduce bias [R], expand weight [C, R], expand bias [C]).
    """
    n, c = gate.shape
    parts, _, rows, _ = sums.shape
    reduced = r.shape[1]
    dq, offset = torch.empty_like(gate), torch.empty_like(gate)
    dr = torch.empty_like(r)
    bn_sums = torch.empty(n, 2, c, dtype=gate.dtype, device=gate.device)
    acc = numeric(gate.dtype)["ACC"]
    _excite_bwd_kernel[(n,)](
        sums_ptr=sums,
        gate_ptr=gate,
        r_ptr=r,
        wr_ptr=reduce_weight,
        wx_ptr=expand_weight,
        dq_ptr=dq,
        dr_ptr=dr,
        offset_ptr=offset,
        bn_sums_ptr=bn_sums,
        N=n,
        SCALE=pixels,
        C=c,
        R=reduced,
        ACT=activation,
        ROWS=rows,
        OB=parts,
        ACC=acc,
        **excite_tiles(n, c, reduced),
    )
    state(
        "excite_bwd",
        (sums, gate, r, reduce_weight, expand_weight),
        (dq, dr, offset, bn_sums if rows == 5 else None),
    )
    d_reduce = torch.empty(reduced, c, dtype=gate.dtype, device=gate.device)
    d_expand = torch.empty(c, reduced, dtype=gate.dtype, device=gate.device)
    d_reduce_bias = torch.empty(reduced, dtype=gate.dtype, device=gate.device)
    d_expand_bias = torch.empty(c, dtype=gate.dtype, device=gate.device)
    tiles = _wgrad_tiles(n, c, reduced)
    _excite_wgrad_kernel[(cdiv(c, tiles["BC"]), cdiv(reduced, tiles["BR"]))](
        p_ptr=pooled,
        r_ptr=r,
        dq_ptr=dq,
        dr_ptr=dr,
        dwr_ptr=d_reduce,
        dbr_ptr=d_reduce_bias,
        dwx_ptr=d_expand,
        dbx_ptr=d_expand_bias,
        N=n,
        C=c,
        R=reduced,
        ACT=activation,
        ACC=acc,
        **tiles,
    )
    state("excite_wgrad", (pooled, r, dq, dr), (d_reduce, d_reduce_bias, d_expand, d_expand_bias))
    return offset, bn_sums, d_reduce, d_reduce_bias, d_expand, d_expand_bias
