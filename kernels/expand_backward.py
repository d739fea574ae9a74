"""Backward of the expand convolution and its BatchNorm from dv1 and x: u1 is not read, du1 is not written.

du1 = p * dv1 + q * u1 + r per channel and u1 = x We^T. With any pivot (a sampled mean of x, so that nothing large
cancels) and X = x - pivot:
dx = dv1 (p * We) + X A + b,  A = We^T (q * We),  b = We^T (q * (We pivot) + r)
dWe = p * (dv1^T X) + q * (We X^T X) + (q * (We pivot) + r) (sum X)^T,  since batch statistics make du1 sum to 0.
A frozen BatchNorm has q = r = 0; its pivot is 0. Where the statistics are those of several processes du1 sums to 0 over
all of them only: dWe gets (sum du1) pivot^T too, with sum du1 = p * sum dv1 + q * We (sum x) + r M.
Programs of one chunk of pixels run side by side, some for dx, some for dWe and X^T X, so that dv1 comes from memory
once and from L2 after that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_coef
from .expand_statistics import SAMPLES, sampled_mean
from .launching import kernel
from .math import dot, stored
from .tables import tiles as chosen
from .traffic import state, summed
from .tuning import INTERPRETED, MIN_DOT, cdiv, numeric, pow2, precision


@kernel
@triton.jit
def _expand_prepare_kernel(
    x_ptr,
    w_ptr,
    coef_ptr,
    pivot_ptr,
    mixed_ptr,
    bias_ptr,
    M,
    STEP,
    CI: tl.constexpr,
    CE: tl.constexpr,
    BATCH: tl.constexpr,
    ACC: tl.constexpr,
    SAMPLES: tl.constexpr,
    BS: tl.constexpr,
    BE: tl.constexpr,
    BI: tl.constexpr,
    BW: tl.constexpr,
):
    o_i = tl.program_id(0) * BI + tl.arange(0, BI)
    o_j = tl.program_id(1) * BI + tl.arange(0, BI)
    o_w = tl.arange(0, BW)  # all of the input channels
    m_i, m_j, m_w = o_i < CI, o_j < CI, o_w < CI
    b_pivot = tl.zeros((BW,), ACC)
    if BATCH:
        b_pivot = sampled_mean(x_ptr, o_w, M, STEP, CI, ACC, SAMPLES, BS, BW)
    acc = tl.zeros((BI, BI), ACC)
    b_bias = tl.zeros((BI,), ACC)
    if BATCH:
        for e in range(0, CE, BE):
            o_e = e + tl.arange(0, BE)
            m_e = o_e < CE
            _, b_q, b_r = load_coef(coef_ptr, o_e, m_e, CE)
            m = m_e[:, None] & m_w[None, :]
            b_all = tl.load(w_ptr + o_e[:, None] * CI + o_w[None, :], mask=m, other=0.0).to(ACC)  # [BE, BW]
            b_shift = b_q * tl.sum(b_all * b_pivot[None, :], 1) + b_r
            p_w = w_ptr + o_e[:, None] * CI
            b_wi = tl.load(p_w + o_i[None, :], mask=m_e[:, None] & m_i[None, :], other=0.0).to(ACC)  # [BE, BI]
            b_wj = tl.load(p_w + o_j[None, :], mask=m_e[:, None] & m_j[None, :], other=0.0).to(ACC)
            acc = dot(tl.trans(b_wi * b_q[:, None]), b_wj, acc, ACC, "ieee")
            b_bias += tl.sum(b_wj * b_shift[:, None], 0)
    tl.store(mixed_ptr + o_i[:, None] * CI + o_j[None, :], acc, mask=m_i[:, None] & m_j[None, :])
    if tl.program_id(0) == 0:
        tl.store(bias_ptr + o_j, b_bias, mask=m_j)
        if tl.program_id(1) == 0:
            tl.store(pivot_ptr + o_w, b_pivot, mask=m_w)


@triton.jit
def load_centred(x_ptr, pivot_ptr, o_m, m_m, o_i, CI, ACC: tl.constexpr):
    """x - pivot for a tile of pixels and input channels; 0 outside."""
    m = m_m[:, None] & (o_i < CI)[None, :]
    b_x = tl.load(x_ptr + o_m[:, None].to(tl.int64) * CI + o_i[None, :], mask=m, other=0.0).to(ACC)
    return tl.where(m, b_x - tl.load(pivot_ptr + o_i, mask=o_i < CI, other=0.0)[None, :], 0.0)


@kernel
@triton.jit
def _expand_bwd_kernel(
    dv_ptr,
    x_ptr,
    w_ptr,
    coef_ptr,
    pivot_ptr,
    mixed_ptr,
    bias_ptr,
    residual_ptr,
    dx_ptr,
    parts_ptr,
    M,
    ROWS,
    TILES,
    CI: tl.constexpr,
    CE: tl.constexpr,
    BATCH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BI: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = (CI + BI - 1) // BI
    EXPANDED: tl.constexpr = (CE + BE - 1) // BE
    chunk = tl.program_id(1)
    slot = tl.program_id(0)
    o_i = (slot % COLUMNS) * BI + tl.arange(0, BI)
    m_i = o_i < CI
    slot = slot // COLUMNS
    if slot < TILES:
        o_m = chunk * ROWS + slot * BM + tl.arange(0, BM)
        m_m = o_m < M
        b_dx = tl.zeros((BM, BI), ACC)
        for e in range(0, CE, BE):
            o_e = e + tl.arange(0, BE)
            m_e = o_e < CE
            b_p = tl.load(coef_ptr + o_e, mask=m_e, other=0.0)
            m_w = m_e[:, None] & m_i[None, :]
            b_w = tl.load(w_ptr + o_e[:, None] * CI + o_i[None, :], mask=m_w, other=0.0).to(ACC) * b_p[:, None]
            m = m_m[:, None] & m_e[None, :]
            b_dv = tl.load(dv_ptr + o_m[:, None].to(tl.int64) * CE + o_e[None, :], mask=m, other=0.0)  # [BM, BE]
            b_dx = dot(b_dv, b_w, b_dx, DTYPE, PRECISION)
        if BATCH:
            for k in range(0, CI, BI):
                o_k = k + tl.arange(0, BI)
                b_x = load_centred(x_ptr, pivot_ptr, o_m, m_m, o_k, CI, ACC)
                m_a = (o_k < CI)[:, None] & m_i[None, :]
                b_a = tl.load(mixed_ptr + o_k[:, None] * CI + o_i[None, :], mask=m_a, other=0.0)
                b_dx = dot(b_x, b_a, b_dx, DTYPE, PRECISION)
            b_dx += tl.load(bias_ptr + o_i, mask=m_i, other=0.0)[None, :]
        m = m_m[:, None] & m_i[None, :]
        o = o_m[:, None].to(tl.int64) * CI + o_i[None, :]
        if HAS_RESIDUAL:
            b_dx += tl.load(residual_ptr + o, mask=m, other=0.0).to(ACC)
        tl.store(dx_ptr + o, stored(b_dx, DTYPE), mask=m)
    else:
        # This chunk's part of [dv1 | X | 1]^T X, rows CE, CI and 1.
        p_part = parts_ptr + chunk.to(tl.int64) * (CE + (CI + 1 if BATCH else 0)) * CI + o_i[None, :]
        block = slot - TILES
        acc = tl.zeros((BE, BI), ACC)
        if block < EXPANDED:
            o_e = block * BE + tl.arange(0, BE)
            for r in range(0, ROWS, BM):
                o_m = chunk * ROWS + r + tl.arange(0, BM)
                m_m = o_m < M
                b_x = load_centred(x_ptr, pivot_ptr, o_m, m_m, o_i, CI, ACC)
                m = m_m[:, None] & (o_e < CE)[None, :]
                b_dv = tl.load(dv_ptr + o_m[:, None].to(tl.int64) * CE + o_e[None, :], mask=m, other=0.0)
                acc = dot(tl.trans(b_dv), b_x, acc, DTYPE, PRECISION)
            tl.store(p_part + o_e[:, None] * CI, acc, mask=(o_e < CE)[:, None] & m_i[None, :])
        else:
            o_e = (block - EXPANDED) * BE + tl.arange(0, BE)
            b_sum = tl.zeros((BI,), ACC)
            for r in range(0, ROWS, BM):
                o_m = chunk * ROWS + r + tl.arange(0, BM)
                m_m = o_m < M
                b_x = load_centred(x_ptr, pivot_ptr, o_m, m_m, o_i, CI, ACC)
                b_y = load_centred(x_ptr, pivot_ptr, o_m, m_m, o_e, CI, ACC)
                acc = dot(tl.trans(b_y), b_x, acc, DTYPE, PRECISION)
                b_sum += tl.sum(b_x, 0)
            tl.store(p_part + (CE + o_e[:, None]) * CI, acc, mask=(o_e < CI)[:, None] & m_i[None, :])
            if block == EXPANDED:
                tl.store(p_part + (CE + CI) * CI, b_sum[None, :], mask=m_i[None, :])


@kernel
@triton.jit
def _expand_finish_kernel(
    w_ptr,
    coef_ptr,
    pivot_ptr,
    sums_ptr,
    dv_sum_ptr,
    dw_ptr,
    M,
    CI: tl.constexpr,
    CE: tl.constexpr,
    BATCH: tl.constexpr,
    HAS_DV_SUM: tl.constexpr,
    ACC: tl.constexpr,
    BE: tl.constexpr,
    BI: tl.constexpr,
):
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    o_i = tl.program_id(1) * BI + tl.arange(0, BI)
    m_e, m_i = o_e < CE, o_i < CI
    m = m_e[:, None] & m_i[None, :]
    b_p, b_q, b_r = load_coef(coef_ptr, o_e, m_e, CE)
    b_dw = tl.load(sums_ptr + o_e[:, None] * CI + o_i[None, :], mask=m, other=0.0) * b_p[:, None]
    if BATCH:
        acc = tl.zeros((BE, BI), ACC)
        b_shift = tl.zeros((BE,), ACC)
        b_u = tl.zeros((BE,), ACC)
        for k in range(0, CI, BI):
            o_k = k + tl.arange(0, BI)
            m_k = o_k < CI
            m_g = m_k[:, None] & m_i[None, :]
            b_gram = tl.load(sums_ptr + (CE + o_k[:, None]) * CI + o_i[None, :], mask=m_g, other=0.0)
            m_w = m_e[:, None] & m_k[None, :]
            b_w = tl.load(w_ptr + o_e[:, None] * CI + o_k[None, :], mask=m_w, other=0.0).to(ACC)
            acc = dot(b_w, b_gram, acc, ACC, "ieee")
            b_shift += tl.sum(b_w * tl.load(pivot_ptr + o_k, mask=m_k, other=0.0)[None, :], 1)
            if HAS_DV_SUM:
                b_u += tl.sum(b_w * tl.load(sums_ptr + (CE + CI) * CI + o_k, mask=m_k, other=0.0)[None, :], 1)
        b_sum = tl.load(sums_ptr + (CE + CI) * CI + o_i, mask=m_i, other=0.0)
        b_dw += b_q[:, None] * acc + (b_q * b_shift + b_r)[:, None] * b_sum[None, :]
        if HAS_DV_SUM:
            b_du = b_p * tl.load(dv_sum_ptr + o_e, mask=m_e, other=0.0) + b_q * b_u + (b_q * b_shift + b_r) * M
            b_dw += b_du[:, None] * tl.load(pivot_ptr + o_i, mask=m_i, other=0.0)[None, :]
    tl.store(dw_ptr + o_e[:, None] * CI + o_i[None, :], b_dw, mask=m)


def expand_tiles(rows: int, channels: int, expanded: int) -> dict[str, int]:
    """Tiles of BM pixels; [BE expanded channels, BI input channels] of the weight's gradient."""
    if INTERPRETED:
        sides = dict(BE=pow2(expanded, MIN_DOT, 256), BI=pow2(channels, MIN_DOT, 256))
        return dict(BM=pow2(rows, MIN_DOT, 256), **sides)
    return dict(BM=64, BE=pow2(expanded, MIN_DOT, 64), BI=pow2(channels, MIN_DOT, 64), num_warps=4, num_stages=2)


def prepare_tiles(wide: int) -> dict[str, int]:
    """[BS samples, or BE expanded channels, x `wide` input channels]: in few steps, each a wait for memory."""
    if INTERPRETED:
        return dict(BS=SAMPLES, BE=256)
    rows = 16384 // wide  # 64 registers of a thread
    return dict(BS=min(rows, SAMPLES), BE=min(max(rows, MIN_DOT), 64), num_warps=8)


def chunk_pixels(rows: int, channels: int, tile: int) -> int:
    """Pixels of a chunk, whole tiles: few enough for L2, enough that the parts of dWe are small beside dv1."""
    pixels = 2 * tile if INTERPRETED else max(40 * channels, cdiv(rows, 128))
    return tile * cdiv(pixels, tile)


def expand_bwd(
    dv: Tensor,
    x: Tensor,
    weight: Tensor,
    coef: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
    dv_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx (+ residual) [N, H, W, I], weight gradient [E, I, 1, 1]) from dv [N, H, W, E], x, and coef [3, E].

    `dv_sum` [E] is the sum of dv where `coef` is made of the sums of several processes, else None.
    """
    n, h, w, channels = x.shape
    expanded, rows = dv.shape[3], n * h * w
    acc = numeric(x.dtype)["ACC"]
    pivot, mixed, bias = coef.new_empty(channels), coef.new_empty(channels, channels), coef.new_empty(channels)
    wide = pow2(channels, MIN_DOT, 4096)
    side = pow2(channels, MIN_DOT, 256 if INTERPRETED else 32)
    _expand_prepare_kernel[(cdiv(channels, side), cdiv(channels, side))](
        x_ptr=x,
        w_ptr=weight,
        coef_ptr=coef,
        pivot_ptr=pivot,
        mixed_ptr=mixed,
        bias_ptr=bias,
        M=rows,
        STEP=cdiv(rows, SAMPLES),
        CI=channels,
        CE=expanded,
        BATCH=batch_statistics,
        ACC=acc,
        SAMPLES=SAMPLES,
        **prepare_tiles(wide),
        BI=side,
        BW=wide,
    )
    sampled = min(rows, SAMPLES) * channels * x.element_size() if batch_statistics else 0
    state("expand_prepare", ((x, sampled), weight, coef), (pivot, mixed, bias))
    traits = dict(batch=batch_statistics, residual=residual is not None)
    tiles = chosen("expand_bwd", x, expand_tiles, (rows, channels, expanded), **traits)
    chunk = chunk_pixels(rows, channels, tiles["BM"])
    chunks, per_chunk = cdiv(rows, chunk), chunk // tiles["BM"]
    gram_blocks = cdiv(channels, tiles["BE"]) if batch_statistics else 0
    slots = per_chunk + cdiv(expanded, tiles["BE"]) + gram_blocks
    dx = torch.empty_like(x)
    parts = coef.new_empty(chunks, expanded + (channels + 1 if batch_statistics else 0), channels)
    _expand_bwd_kernel[(slots * cdiv(channels, tiles["BI"]), chunks)](
        dv_ptr=dv,
        x_ptr=x,
        w_ptr=weight,
        coef_ptr=coef,
        pivot_ptr=pivot,
        mixed_ptr=mixed,
        bias_ptr=bias,
        residual_ptr=residual,
        dx_ptr=dx,
        parts_ptr=parts,
        M=rows,
        ROWS=chunk,
        TILES=per_chunk,
        CI=channels,
        CE=expanded,
        BATCH=batch_statistics,
        HAS_RESIDUAL=residual is not None,
        PRECISION=precision(x.dtype),
        ACC=acc,
        **tiles,
    )
    # dv and x once: a chunk's programs read them again while they are in L2.
    state("expand_bwd", (dv, x, weight, coef, pivot, mixed, bias, residual), (dx, parts))
    dw, sums = coef.new_empty(expanded, channels, 1, 1), summed(parts)
    _expand_finish_kernel[(cdiv(expanded, side), cdiv(channels, side))](
        w_ptr=weight,
        coef_ptr=coef,
        pivot_ptr=pivot,
        sums_ptr=sums,
        dv_sum_ptr=dv_sum,
        dw_ptr=dw,
        M=rows,
        CI=channels,
        CE=expanded,
        BATCH=batch_statistics,
        HAS_DV_SUM=dv_sum is not None,
        ACC=acc,
        BE=side,
        BI=side,
    )
    state("expand_finish", (weight, coef, pivot, sums, dv_sum), (dw,))
    return dx, dw
