"""Squeeze-and-excitation: pool over the image, reduce, act, expand, sigmoid; and all of the backward that is [N, C].

p[n, c] = mean of a = act(scale * u + shift); z = act(Wr p + br); gate = sigmoid(Wx z + bx). Per image and channel the
backward needs five sums over pixels. Two need no gradient, so the pool takes them: its `sums` [P, N, 3, C], over P
parts of each image, are those of 0 a, 1 act', 2 act' * xhat, of which `act_sums` [N, 2, C] is kept. The others, of
project_backward.py, are 0 da * act', 1 da * act' * xhat, 2 da * a, where da is the gradient of the projection's input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_xhat, store_coef
from .launching import kernel
from .math import (
    INTERPRETED,
    activate,
    activate_grad,
    activate_grad_halved,
    activate_halved,
    dot,
    halved,
    stored,
    sum_rows,
)
from .running import Running, given, load_map
from .tables import processors
from .tables import tiles as chosen
from .traffic import state
from .tuning import MIN_DOT, PROGRAMS, accumulator, cdiv, channel_block, numeric, pow2, row_tiles

RESIDENT, ONCE, MOST_PARTS = 16, 8, 64  # of the pool: warps of 128 registers, and what weighs as much as 8 tiles


@triton.jit
def add_pixels(
    s_a, s_g, s_gx, u_ptr, dy_ptr, o, m, maps, ACT: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GRAD: tl.constexpr,
    HAS_DY: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The sums with a tile more of a (times dy), act' and act' * xhat; a WHOLE tile has no pixel to leave out."""
    b_a = tl.load(u_ptr + o, mask=m, other=0.0).to(ACC)
    if HAS_GRAD:
        b_x = b_a * maps[2] + maps[3]
        b_a, b_g = activate_grad_halved(b_a * maps[0] + maps[1], ACT, FAST)
        b_g = b_g if WHOLE else tl.where(m, b_g, 0.0)
        s_g += b_g
        s_gx += b_g * b_x
    elif HAS_NORM:
        b_a = activate_halved(b_a * maps[0] + maps[1], ACT, FAST)
    if HAS_NORM and not WHOLE:
        b_a = tl.where(m, b_a, 0.0)
    if HAS_DY:
        b_a = b_a * tl.load(dy_ptr + o, mask=m, other=0.0).to(ACC)
    return s_a + b_a, s_g, s_gx


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
    sums_ptr,
    N,
    HW,
    PIXELS,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_DY: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = 3 if HAS_GRAD else 1
    n, first = tl.program_id(0) % N, tl.program_id(0) // N * PIXELS
    end = tl.minimum(first + PIXELS, HW)
    whole = end - (end - first) % BM
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    maps = ()  # of u to what the activation takes, and to xhat
    if HAS_NORM:
        b_scale, b_shift = load_map(norm_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_c, m_c, C, EPS, ACC)
        maps = maps + (halved(b_scale, ACT, FAST)[None, :], halved(b_shift, ACT, FAST)[None, :])
    if HAS_GRAD:
        b_rstd, b_nmr = load_xhat(norm_ptr, o_c, m_c, C)
        maps = maps + (b_rstd[None, :], b_nmr[None, :])
    b_a = tl.zeros((BM, BC), ACC)
    b_g = tl.zeros((BM, BC), ACC)
    b_gx = tl.zeros((BM, BC), ACC)
    o = tl.arange(0, BM)[:, None] * C + o_c[None, :]  # [BM, BC]
    m = m_c[None, :]
    for m0 in tl.range(first, whole, BM, num_stages=STAGES):
        p = o + (n * HW + m0).to(tl.int64) * C
        b_a, b_g, b_gx = add_pixels(
            b_a, b_g, b_gx, u_ptr, dy_ptr, p, m, maps, ACT, HAS_NORM, HAS_GRAD, HAS_DY, True, ACC, FAST
        )  # fmt: skip
    if whole < end:
        p = o + (n * HW + whole).to(tl.int64) * C
        m_end = (whole + tl.arange(0, BM) < end)[:, None] & m
        b_a, b_g, b_gx = add_pixels(
            b_a, b_g, b_gx, u_ptr, dy_ptr, p, m_end, maps, ACT, HAS_NORM, HAS_GRAD, HAS_DY, False, ACC, FAST
        )  # fmt: skip
    p_out = sums_ptr + tl.program_id(0).to(tl.int64) * ROWS * C + o_c
    tl.store(p_out, sum_rows(b_a), mask=m_c)
    if HAS_GRAD:
        tl.store(p_out + C, sum_rows(b_g), mask=m_c)
        tl.store(p_out + 2 * C, sum_rows(b_gx), mask=m_c)


@triton.jit
def load_sum(
    sums_ptr, n, row, o_c, m_c, N, P, C, ROWS: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """[BC]: one of an image's sums, its P parts added."""
    b_s = tl.zeros((BC,), ACC)
    for p0 in range(0, P, BP):
        o_p = p0 + tl.arange(0, BP)
        m = (o_p < P)[:, None] & m_c[None, :]
        p_sum = sums_ptr + ((o_p * N + n) * ROWS + row).to(tl.int64)[:, None] * C + o_c[None, :]  # [BP, BC]
        b_s += sum_rows(tl.load(p_sum, mask=m, other=0.0))
    return b_s


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
    sums_ptr,
    wr_ptr,
    br_ptr,
    wx_ptr,
    bx_ptr,
    p_ptr,
    act_sums_ptr,
    r_ptr,
    gate_ptr,
    N,
    HW,
    P,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_z = tl.zeros((BR, BC), ACC)
    for c0 in range(0, C, BC):
        o_c = c0 + tl.arange(0, BC)
        m_c = o_c < C
        b_p = load_sum(sums_ptr, n, 0, o_c, m_c, N, P, C, ROWS, ACC, BP, BC) / HW
        if p_ptr is not None:  # the mean in the activations' dtype, as eager's; the backward reads it
            b_p = stored(b_p, p_ptr.dtype.element_ty)
            tl.store(p_ptr + n * C + o_c, b_p, mask=m_c)
        if act_sums_ptr is not None:
            for row in tl.static_range(1, 3):
                b_s = load_sum(sums_ptr, n, row, o_c, m_c, N, P, C, ROWS, ACC, BP, BC)
                tl.store(act_sums_ptr + (2 * n + row - 1) * C + o_c, b_s, mask=m_c)
        m = m_r[:, None] & m_c[None, :]
        b_w = tl.load(wr_ptr + o_r[:, None] * C + o_c[None, :], mask=m, other=0.0).to(ACC)  # [BR, BC]
        b_z += b_w * b_p.to(ACC)[None, :]
    b_r = tl.load(br_ptr + o_r, mask=m_r, other=0.0).to(ACC) + tl.sum(b_z, 1)
    if r_ptr is not None:
        tl.store(r_ptr + n * R + o_r, b_r, mask=m_r)
    store_gate(gate_ptr, wx_ptr, bx_ptr, b_r, n, C, R, ACT, ACC, BR, BC)


@kernel
@triton.jit
def _excite_bwd_kernel(
    sums_ptr,
    gate_ptr,
    r_ptr,
    wx_ptr,
    dq_ptr,
    dr_ptr,
    gated_ptr,
    N,
    P,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    GATE_ROW: tl.constexpr = 2 if ROWS == 3 else 0
    b_dz = tl.zeros((BR, BC), ACC)
    for c0 in range(0, C, BC):
        o_c = c0 + tl.arange(0, BC)
        m_c = o_c < C
        b_gate = tl.load(gate_ptr + n * C + o_c, mask=m_c, other=0.0)
        b_dq = load_sum(sums_ptr, n, GATE_ROW, o_c, m_c, N, P, C, ROWS, ACC, BP, BC) * b_gate * (1.0 - b_gate)
        tl.store(dq_ptr + n * C + o_c, b_dq, mask=m_c)
        if ROWS == 3:
            for row in tl.static_range(2):
                b_s = b_gate * load_sum(sums_ptr, n, row, o_c, m_c, N, P, C, 3, ACC, BP, BC)
                tl.store(gated_ptr + (2 * n + row) * C + o_c, b_s, mask=m_c)
        m = m_r[:, None] & m_c[None, :]
        b_w = tl.load(wx_ptr + o_c[None, :] * R + o_r[:, None], mask=m, other=0.0).to(ACC)  # [BR, BC]
        b_dz += b_w * b_dq[None, :]
    _, b_g = activate_grad(tl.load(r_ptr + n * R + o_r, mask=m_r, other=0.0), ACT, False)
    tl.store(dr_ptr + n * R + o_r, tl.sum(b_dz, 1) * b_g, mask=m_r)


@kernel
@triton.jit
def _excite_finish_kernel(
    gated_ptr,
    act_sums_ptr,
    p_ptr,
    r_ptr,
    dq_ptr,
    dr_ptr,
    wr_ptr,
    norm_ptr,
    offset_ptr,
    grads_ptr,
    coef_ptr,
    dwr_ptr,
    dbr_ptr,
    dwx_ptr,
    dbx_ptr,
    N,
    HW,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    BATCH: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_r = tl.arange(0, BR)
    m_c, m_r = o_c < C, o_r < R
    m_rc = m_r[:, None] & m_c[None, :]
    b_w = tl.load(wr_ptr + o_r[:, None] * C + o_c[None, :], mask=m_rc, other=0.0).to(ACC)  # [BR, BC]
    b_dwr = tl.zeros((BR, BC), ACC)
    b_dwx = tl.zeros((BC, BR), ACC)
    b_dbr = tl.zeros((BN, BR), ACC)
    b_dbx = tl.zeros((BN, BC), ACC)
    b_db = tl.zeros((BN, BC), ACC)
    b_dg = tl.zeros((BN, BC), ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_nc = (o_n < N)[:, None] & m_c[None, :]
        m_nr = (o_n < N)[:, None] & m_r[None, :]
        o_nc = o_n[:, None] * C + o_c[None, :]  # [BN, BC]
        o_nr = o_n[:, None] * R + o_r[None, :]  # [BN, BR]
        b_p = tl.load(p_ptr + o_nc, mask=m_nc, other=0.0).to(ACC)
        b_dq = tl.load(dq_ptr + o_nc, mask=m_nc, other=0.0)
        b_r = tl.load(r_ptr + o_nr, mask=m_nr, other=0.0)
        b_dr = tl.load(dr_ptr + o_nr, mask=m_nr, other=0.0)
        b_dp = dot(b_dr, b_w, tl.zeros((BN, BC), ACC), ACC, "ieee") / HW
        tl.store(offset_ptr + o_nc, b_dp, mask=m_nc)
        if norm_ptr is not None:
            o_two = o_nc + o_n[:, None] * C  # of [N, 2, C]
            b_db += tl.load(gated_ptr + o_two, mask=m_nc, other=0.0)
            b_db += b_dp * tl.load(act_sums_ptr + o_two, mask=m_nc, other=0.0)
            b_dg += tl.load(gated_ptr + o_two + C, mask=m_nc, other=0.0)
            b_dg += b_dp * tl.load(act_sums_ptr + o_two + C, mask=m_nc, other=0.0)
        b_dwr = dot(tl.trans(b_dr), b_p, b_dwr, ACC, "ieee")
        b_dwx = dot(tl.trans(b_dq), activate(b_r, ACT, False), b_dwx, ACC, "ieee")
        b_dbr += b_dr
        b_dbx += b_dq
    tl.store(dwr_ptr + o_r[:, None] * C + o_c[None, :], b_dwr, mask=m_rc)
    tl.store(dwx_ptr + o_c[:, None] * R + o_r[None, :], b_dwx, mask=m_c[:, None] & m_r[None, :])
    tl.store(dbx_ptr + o_c, sum_rows(b_dbx), mask=m_c)
    if tl.program_id(0) == 0:
        tl.store(dbr_ptr + o_r, sum_rows(b_dbr), mask=m_r)
    if norm_ptr is not None:
        b_dweight, b_dbias = sum_rows(b_dg), sum_rows(b_db)
        tl.store(grads_ptr + o_c, b_dweight, mask=m_c)
        tl.store(grads_ptr + C + o_c, b_dbias, mask=m_c)
        store_coef(norm_ptr, coef_ptr, o_c, m_c, C, b_dweight, b_dbias, N * HW, BATCH)


def pool_tiles(rows: int, channels: int) -> dict[str, int]:
    """[BM pixels, BC channels] a step of a single warp: it adds its rows up without shared memory or a barrier."""
    if INTERPRETED:
        return row_tiles(rows, channels) | dict(STAGES=1)
    block = channel_block(channels)
    return dict(BM=512 // block, BC=block, num_warps=1, STAGES=4)


def split_image(pixels: int, columns: int, tile: int, device: torch.device) -> tuple[int, int]:
    """(parts of an image, pixels of a part, whole tiles) for `columns` programs each, so that it takes least time.

    A program costs its tiles and as much as ONCE more, and a multiprocessor takes RESIDENT programs at a time.
    """
    if INTERPRETED:
        parts = 2 if pixels > tile else 1
    else:
        slots = RESIDENT * processors(device)
        most = max(1, min(pixels // (2 * tile), MOST_PARTS))
        parts = min(range(1, most + 1), key=lambda p: cdiv(p * columns, slots) * (cdiv(cdiv(pixels, p), tile) + ONCE))
    part = tile * cdiv(cdiv(pixels, parts), tile)
    return cdiv(pixels, part), part


def pool(u: Tensor, norm: Tensor | Running | None, dy: Tensor | None, activation: str) -> Tensor:
    """[P, N, 3, C]: per image and channel, over P parts of the image, the sums of a, act' and act' * xhat.

    The latter two with `norm` as [4, C]; else [P, N, 1, C], the sums of a, with `dy` of a * dy.
    """
    n, h, w, c = u.shape
    gradient = isinstance(norm, Tensor)
    traits = dict(images=n, activation=activation, norm=norm is not None, gradient=gradient, dy=dy is not None)
    tiles = chosen("pool", u, pool_tiles, (h * w, c), **traits)
    columns = cdiv(c, tiles["BC"])
    parts, pixels = split_image(h * w, n * columns, tiles["BM"], u.device)
    sums = torch.empty(parts, n, 3 if gradient else 1, c, dtype=accumulator(u.dtype), device=u.device)
    _pool_kernel[(parts * n, columns)](
        u_ptr=u,
        norm_ptr=None if isinstance(norm, Running) else norm,
        **given(norm),
        dy_ptr=dy,
        sums_ptr=sums,
        N=n,
        HW=h * w,
        PIXELS=pixels,
        C=c,
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_GRAD=gradient,
        HAS_DY=dy is not None,
        **numeric(u.dtype),
        **tiles,
    )
    state("pool", (u, *(norm.tensors if isinstance(norm, Running) else (norm,)), dy), (sums,))
    return sums


def excite_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """[BR, BC]: all reduced channels and a step's others; training and inference."""
    rows = pow2(reduced, MIN_DOT, 1024)
    if INTERPRETED:
        return dict(BR=rows, BC=pow2(channels, MIN_DOT, 1024))
    few = images < PROGRAMS  # one wave or less: what counts is how long an image takes, and so its number of steps
    block = max(MIN_DOT, min((32768 if few else 4096) // rows, 256))
    return dict(BR=rows, BC=pow2(channels, MIN_DOT, block), num_warps=8 if few else 4)


def _finish_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """[BN images a step, BC channels]: few channels, so that there are programs for more multiprocessors."""
    rows = pow2(reduced, MIN_DOT, 1024)
    if INTERPRETED:
        return dict(BN=pow2(images, MIN_DOT, 256), BR=rows, BC=pow2(channels, MIN_DOT, 1024))
    return dict(BN=MIN_DOT, BR=rows, BC=MIN_DOT, num_warps=4 if rows <= 32 else 8)  # with more of them it spills


def added_parts(parts: int) -> int:
    """Parts of a sum that are read at a time."""
    return pow2(parts, 1, 64 if INTERPRETED else 16)


def excite_fwd(
    sums: Tensor,
    pixels: int,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: str,
    kept: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Tensor]:
    """(what the backward needs, gate [N, C]) of images with the pool's `sums` [P, N, ROWS, C], activations in row 0.

    With activations of dtype `kept` the backward needs (mean [N, C] in that dtype; the sums of rows 1 and 2, [N, 2, C],
    empty without them; pre-activation of the reduced vector [N, R]). Without `kept` None.
    """
    parts, n, rows, c = sums.shape
    reduced = reduce_weight.shape[0]
    gate = sums.new_empty(n, c)
    saved = pooled = act_sums = r = None
    if kept is not None:
        pooled = torch.empty(n, c, dtype=kept, device=sums.device)
        act_sums = sums.new_empty((n, 2, c) if rows == 3 else 0)
        r = sums.new_empty(n, reduced)
        saved = pooled, act_sums, r
    _excite_fwd_kernel[(n,)](
        sums_ptr=sums,
        wr_ptr=reduce_weight,
        br_ptr=reduce_bias,
        wx_ptr=expand_weight,
        bx_ptr=expand_bias,
        p_ptr=pooled,
        act_sums_ptr=act_sums if rows == 3 else None,
        r_ptr=r,
        gate_ptr=gate,
        N=n,
        HW=pixels,
        P=parts,
        C=c,
        R=reduced,
        ACT=activation,
        ROWS=rows,
        ACC=numeric(sums.dtype)["ACC"],
        BP=added_parts(parts),
        **excite_tiles(n, c, reduced),
    )
    state("excite_fwd", (sums, reduce_weight, reduce_bias, expand_weight, expand_bias), (pooled, act_sums, r, gate))
    return saved, gate


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
    norm: Tensor | None = None,
    batch_statistics: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor, Tensor, Tensor, Tensor]:
    """Backward of pool and excite from `sums` [P, N, 3, C] and `act_sums` [N, 2, C], or [P, N, 1, C] of da * a.

    Returns (offset [N, C], the pool's gradient per pixel; grads [2, C] and coef [4, C] of the BatchNorm before the
    pool, whose vectors are `norm`, None without it; gradients of reduce weight [R, C], reduce bias [R], expand weight
    [C, R], expand bias [C]). One launch for what an image's gate tells, one for what is left of a block of channels.
    """
    n, c = gate.shape
    parts, _, rows, _ = sums.shape
    reduced = r.shape[1]
    dq, offset = torch.empty_like(gate), torch.empty_like(gate)
    dr = torch.empty_like(r)
    gated = None if norm is None else gate.new_empty(n, 2, c)
    acc = numeric(gate.dtype)["ACC"]
    _excite_bwd_kernel[(n,)](
        sums_ptr=sums,
        gate_ptr=gate,
        r_ptr=r,
        wx_ptr=expand_weight,
        dq_ptr=dq,
        dr_ptr=dr,
        gated_ptr=gated,
        N=n,
        P=parts,
        C=c,
        R=reduced,
        ACT=activation,
        ROWS=rows,
        ACC=acc,
        BP=added_parts(parts),
        **excite_tiles(n, c, reduced),
    )
    state("excite_bwd", (sums, gate, r, expand_weight), (dq, dr, gated))
    bn = None if norm is None else (gate.new_empty(2, c), gate.new_empty(4, c))
    grads, coef = (None, None) if bn is None else bn
    d_reduce, d_reduce_bias = gate.new_empty(reduced, c), gate.new_empty(reduced)
    d_expand, d_expand_bias = gate.new_empty(c, reduced), gate.new_empty(c)
    tiles = _finish_tiles(n, c, reduced)
    _excite_finish_kernel[(cdiv(c, tiles["BC"]),)](
        gated_ptr=gated,
        act_sums_ptr=None if norm is None else act_sums,
        p_ptr=pooled,
        r_ptr=r,
        dq_ptr=dq,
        dr_ptr=dr,
        wr_ptr=reduce_weight,
        norm_ptr=norm,
        offset_ptr=offset,
        grads_ptr=grads,
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
        ACC=acc,
        **tiles,
    )
    state(
        "excite_finish",
        (gated, None if norm is None else act_sums, pooled, r, dq, dr, reduce_weight, norm),
        (offset, grads, coef, d_reduce, d_reduce_bias, d_expand, d_expand_bias),
    )
    return offset, bn, d_reduce, d_reduce_bias, d_expand, d_expand_bias
