"""The backward sweep where the project convolution has many outputs: the same sums, with da3 formed.

project_sweep.py takes u2 and its activation again for each part of the outputs. Here one tile of u2, [BC channels, BM
pixels], meets all outputs: da3^T = W^T du3^T in registers, and then each sum over an image's pixels is a product with a
matrix of ones that has a column per image, so that tiles cross the ends of images. Every product has its activations on
the left, where they stay in registers.
"""

import torch
import triton
import triton.language as tl

from .batch_norm import load_coef, load_xhat
from .launching import kernel
from .math import INTERPRETED, activate_grad, dot
from .running import load_norm
from .tables import processors
from .tuning import MIN_DOT, cdiv, group_of, pow2

COLUMNS = 16  # of the matrix of ones: so many images a program at most


@kernel
@triton.jit
def _project_wide_kernel(
    dy_ptr,
    u3_ptr,
    coef_ptr,
    keep_ptr,
    w_ptr,
    u2_ptr,
    norm_ptr,
    gate_ptr,
    sums_ptr,
    dw_ptr,
    N,
    HW,
    IMAGES,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ACT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    TILES: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_0 = tl.program_id(1) * (TILES * BO)
    n0 = tl.program_id(2) * IMAGES
    m_c = o_c < CI
    DTYPE: tl.constexpr = u2_ptr.dtype.element_ty
    ROWS: tl.constexpr = 5 if HAS_GATE else 2
    b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, CI)
    b_rstd, b_nmr = load_xhat(norm_ptr, o_c, m_c, CI)
    pixels = tl.minimum(IMAGES, N - n0) * HW
    o_n = tl.arange(0, COLUMNS)
    dw = ()
    for _ in tl.static_range(TILES):
        dw = dw + (tl.zeros((BC, BO), ACC),)
    s_db = tl.zeros((BC, COLUMNS), ACC)
    s_dg = tl.zeros((BC, COLUMNS), ACC)
    s_gate = tl.zeros((BC, COLUMNS), ACC)
    s_der = tl.zeros((BC, COLUMNS), ACC)
    s_hat = tl.zeros((BC, COLUMNS), ACC)
    for m0 in range(0, pixels, BM):
        image = m0 // HW
        n = n0 + image
        o_p = m0 + tl.arange(0, BM)
        m_p = o_p < pixels
        m_next = o_p >= (image + 1) * HW  # a tile is no longer than an image: it meets two at most
        next = tl.minimum(n + 1, N - 1)
        o_m = n0 * HW + o_p
        b_da = tl.zeros((BC, BM), ACC)
        m = m_p[:, None] & m_c[None, :]
        b_u = tl.load(u2_ptr + o_m[:, None].to(tl.int64) * CI + o_c[None, :], mask=m, other=0.0)
        b_u = tl.trans(b_u).to(ACC)  # [BC, BM]
        b_a, b_g = activate_grad(b_u * b_scale[:, None] + b_shift[:, None], ACT, FAST)
        b_h = b_g * (b_u * b_rstd[:, None] + b_nmr[:, None])
        b_ag = b_a
        if HAS_GATE:
            b_now = tl.load(gate_ptr + n * CI + o_c, mask=m_c, other=0.0)
            b_next = tl.load(gate_ptr + next * CI + o_c, mask=m_c, other=0.0)
            b_ag = b_a * tl.where(m_next[None, :], b_next[:, None], b_now[:, None])
        if HAS_KEEP:
            b_keep = tl.where(m_next, tl.load(keep_ptr + next), tl.load(keep_ptr + n))
        added = ()
        for j in tl.static_range(TILES):
            o_o = o_0 + j * BO + tl.arange(0, BO)
            m_o = o_o < CO
            m_d = m_p[:, None] & m_o[None, :]
            o = o_m[:, None].to(tl.int64) * CO + o_o[None, :]
            b_p, b_q, b_r = load_coef(coef_ptr, o_o, m_o, CO)
            b_d = tl.load(dy_ptr + o, mask=m_d, other=0.0).to(ACC)
            if HAS_KEEP:
                b_d = b_d * b_keep[:, None]
            b_du = b_p[None, :] * b_d + b_q[None, :] * tl.load(u3_ptr + o, mask=m_d, other=0.0).to(ACC) + b_r[None, :]
            b_du = tl.where(m_p[:, None], b_du, 0.0)  # [BM, BO]
            m_w = m_o[:, None] & m_c[None, :]
            b_w = tl.load(w_ptr + o_o[:, None] * CI + o_c[None, :], mask=m_w, other=0.0)  # [BO, BC]
            b_da = dot(tl.trans(b_w), tl.trans(b_du), b_da, DTYPE, PRECISION)
            added = added + (dot(b_ag, b_du, dw[j], DTYPE, PRECISION),)
        dw = added
        first = (o_n * HW)[None, :]
        m_n = (o_p[:, None] >= first) & (o_p[:, None] < first + HW) & m_p[:, None]
        b_one = tl.where(m_n, 1.0, 0.0).to(ACC)  # [BM, COLUMNS]
        s_db = dot(b_da * b_g, b_one, s_db, DTYPE, PRECISION)
        s_dg = dot(b_da * b_h, b_one, s_dg, DTYPE, PRECISION)
        if HAS_GATE:
            s_gate = dot(b_da * b_a, b_one, s_gate, DTYPE, PRECISION)
            s_der = dot(b_g, b_one, s_der, DTYPE, PRECISION)
            s_hat = dot(b_h, b_one, s_hat, DTYPE, PRECISION)
    p_sums = sums_ptr + (tl.program_id(1) * N + n0 + o_n[None, :]).to(tl.int64) * ROWS * CI + o_c[:, None]
    m_s = (o_n < tl.minimum(IMAGES, N - n0))[None, :] & m_c[:, None]
    tl.store(p_sums, s_db, mask=m_s)
    tl.store(p_sums + CI, s_dg, mask=m_s)
    if HAS_GATE:
        tl.store(p_sums + 2 * CI, s_gate, mask=m_s)
        tl.store(p_sums + 3 * CI, s_der, mask=m_s)
        tl.store(p_sums + 4 * CI, s_hat, mask=m_s)
    for j in tl.static_range(TILES):
        o_o = o_0 + j * BO + tl.arange(0, BO)
        o = (tl.program_id(2) * CO + o_o[None, :]) * CI + o_c[:, None]
        tl.store(dw_ptr + o, dw[j], mask=(o_o < CO)[None, :] & m_c[:, None])


def takes(pixels: int, out: int, dtype: torch.dtype) -> bool:
    """Whether this form is the faster: more than two parts there; products in fp32 would not fit the registers here."""
    narrow = INTERPRETED or dtype in (torch.float16, torch.bfloat16)
    return pixels >= 2 * MIN_DOT and out > 64 and bool(narrow)


def wide_tiles(pixels: int, out: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """BM pixels, at most an image, x BC channels, and TILES of BO outputs a program: 192 are what registers hold."""
    pixels = 1 << (pixels.bit_length() - 1)
    if INTERPRETED:
        tiles = dict(BM=min(pixels, 1024), BO=pow2(out, MIN_DOT, 256), BC=pow2(channels, MIN_DOT, 256))
        return tiles | dict(TILES=cdiv(out, tiles["BO"]))
    width = 64 if out > 128 else 32
    parts = cdiv(out, 192)
    rows = 32 if out <= 96 and dtype == torch.bfloat16 else 16
    tiles = cdiv(cdiv(out, parts), width)
    return dict(BM=rows, BO=width, BC=128, TILES=tiles, num_warps=8, num_stages=1)


def images_of_a_program(images: int, columns: int, device: torch.device) -> int:
    """So many that the programs fill the GPU once: one takes all registers of a multiprocessor."""
    return group_of(images, columns, processors(device), COLUMNS)
