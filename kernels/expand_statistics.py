"""BatchNorm statistics of the expand convolution's output u1 = x We^T without u1, which is linear in x.

mean = We mean(x), var = diag(We cov(x) We^T): x's sums and its Gram matrix about a sampled pivot hold all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .math import at_least, dot
from .traffic import state, summed
from .tuning import INTERPRETED, MIN_DOT, accumulator, cdiv, groups, numeric, pow2, precision

SAMPLES = 256


@triton.jit
def sampled_mean(
    x_ptr, o_c, M, STEP, C: tl.constexpr, ACC: tl.constexpr, SAMPLES: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    """Mean of a block of channels over SAMPLES pixels, STEP apart: a pivot near the mean."""
    b_sum = tl.zeros((BS, BC), ACC)
    for s in range(0, SAMPLES, BS):
        o_m = (s + tl.arange(0, BS)) * STEP
        m = (o_m < M)[:, None] & (o_c < C)[None, :]
        b_sum += tl.load(x_ptr + o_m[:, None].to(tl.int64) * C + o_c[None, :], mask=m, other=0.0).to(ACC)
    return tl.sum(b_sum, 0) / tl.minimum((M + STEP - 1) // STEP, SAMPLES)


@kernel
@triton.jit
def _gram_kernel(
    x_ptr,
    pivot_ptr,
    parts_ptr,
    M,
    STEP,
    TILES,
    C: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    o_i = tl.program_id(0) * BC + tl.arange(0, BC)
    o_j = tl.program_id(1) * BC + tl.arange(0, BC)
    m_i, m_j = o_i < C, o_j < C
    b_pi = sampled_mean(x_ptr, o_i, M, STEP, C, ACC, SAMPLES, BS, BC)
    b_pj = sampled_mean(x_ptr, o_j, M, STEP, C, ACC, SAMPLES, BS, BC)
    acc = tl.zeros((BC, BC), ACC)
    b_sum = tl.zeros((BM, BC), ACC)
    for tile in range(0, TILES):
        o_m = (tl.program_id(2) * TILES + tile) * BM + tl.arange(0, BM)
        m_m = (o_m < M)[:, None]
        o_m = o_m[:, None].to(tl.int64) * C
        b_i = tl.load(x_ptr + o_m + o_i[None, :], mask=m_m & m_i[None, :], other=0.0).to(ACC)  # [BM, BC]
        b_j = tl.load(x_ptr + o_m + o_j[None, :], mask=m_m & m_j[None, :], other=0.0).to(ACC)
        b_i = tl.where(m_m, b_i - b_pi[None, :], 0.0)
        b_j = tl.where(m_m, b_j - b_pj[None, :], 0.0)
        acc = dot(tl.trans(b_i), b_j, acc, DTYPE, PRECISION)
        b_sum += b_j
    p_part = parts_ptr + tl.program_id(2).to(tl.int64) * (C + 1) * C + o_j[None, :]
    tl.store(p_part + o_i[:, None] * C, acc, mask=m_i[:, None] & m_j[None, :])
    if tl.program_id(0) == 0:
        tl.store(p_part + C * C, tl.sum(b_sum, 0)[None, :], mask=m_j[None, :])
        if tl.program_id(2) == 0:
            tl.store(pivot_ptr + o_j, b_pj, mask=m_j)


@kernel
@triton.jit
def _gram_moments_kernel(
    w_ptr,
    pivot_ptr,
    gram_ptr,
    moments_ptr,
    M,
    CE: tl.constexpr,
    CI: tl.constexpr,
    ACC: tl.constexpr,
    BE: tl.constexpr,
    BC: tl.constexpr,
):
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    m_e = o_e < CE
    b_mean = tl.zeros((BE,), ACC)
    b_m2 = tl.zeros((BE,), ACC)
    for j in range(0, CI, BC):
        o_j = j + tl.arange(0, BC)
        m_j = o_j < CI
        b_sj = tl.load(gram_ptr + CI * CI + o_j, mask=m_j, other=0.0)
        acc = tl.zeros((BE, BC), ACC)
        for k in range(0, CI, BC):
            o_k = k + tl.arange(0, BC)
            m_k = o_k < CI
            b_sk = tl.load(gram_ptr + CI * CI + o_k, mask=m_k, other=0.0)
            m_g = m_k[:, None] & m_j[None, :]
            b_gram = tl.load(gram_ptr + o_k[:, None] * CI + o_j[None, :], mask=m_g, other=0.0)
            m_w = m_e[:, None] & m_k[None, :]
            b_w = tl.load(w_ptr + o_e[:, None] * CI + o_k[None, :], mask=m_w, other=0.0).to(ACC)
            acc = dot(b_w, b_gram - b_sk[:, None] * (b_sj / M)[None, :], acc, ACC, "ieee")
        b_w = tl.load(w_ptr + o_e[:, None] * CI + o_j[None, :], mask=m_e[:, None] & m_j[None, :], other=0.0).to(ACC)
        b_mean += tl.sum(b_w * (tl.load(pivot_ptr + o_j, mask=m_j, other=0.0) + b_sj / M)[None, :], 1)
        b_m2 += tl.sum(acc * b_w, 1)
    tl.store(moments_ptr + o_e, tl.zeros((BE,), ACC) + M, mask=m_e)
    tl.store(moments_ptr + CE + o_e, b_mean, mask=m_e)
    tl.store(moments_ptr + 2 * CE + o_e, at_least(b_m2, 0.0), mask=m_e)


def expand_statistics(x: Tensor, weight: Tensor) -> Tensor:
    """Moments [1, 3, E] (count, mean, squares about it) of the 1x1 convolution of x [N, H, W, I] by [E, I, 1, 1]."""
    n, h, w, channels = x.shape
    expanded, rows = weight.shape[0], n * h * w
    like = dict(dtype=accumulator(x.dtype), device=x.device)
    block = pow2(channels, MIN_DOT, 256 if INTERPRETED else 64)
    tile = pow2(rows, MIN_DOT, 1024) if INTERPRETED else 64
    side = cdiv(channels, block)
    per_program = groups(cdiv(rows, tile), side * side, programs=max(512, side * side))
    programs = cdiv(rows, tile * per_program)
    pivot = torch.empty(channels, **like)
    parts = torch.empty(programs, channels + 1, channels, **like)
    _gram_kernel[(side, side, programs)](
        x_ptr=x,
        pivot_ptr=pivot,
        parts_ptr=parts,
        M=rows,
        STEP=cdiv(rows, SAMPLES),
        TILES=per_program,
        C=channels,
        SAMPLES=SAMPLES,
        PRECISION=precision(x.dtype),
        ACC=numeric(x.dtype)["ACC"],
        BS=SAMPLES if INTERPRETED else 32,
        BM=tile,
        BC=block,
    )
    state("gram", (x,), (parts, pivot))
    gram = summed(parts)
    moments = torch.empty(1, 3, expanded, **like)
    side = pow2(channels, MIN_DOT, 256 if INTERPRETED else 32)
    _gram_moments_kernel[(cdiv(expanded, side),)](
        w_ptr=weight,
        pivot_ptr=pivot,
        gram_ptr=gram,
        moments_ptr=moments,
        M=rows,
        CE=expanded,
        CI=channels,
        ACC=numeric(x.dtype)["ACC"],
        BE=side,
        BC=side,
    )
    state("gram_moments", (weight, pivot, gram), (moments,))
    return moments
