"""Sums over pixels, per image and channel: what squeeze-and-excitation pools, and what its backward needs.

Of a = act(scale * u + shift): 0 a (times dy), 1 act', 2 act' * xhat; [P, N, 3 or 1, C], over P parts of each image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_xhat
from .launching import kernel
from .math import INTERPRETED, activate_grad_halved, activate_halved, halved, sum_rows
from .running import Running, given, load_map
from .tables import processors
from .tables import tiles as chosen
from .traffic import state
from .tuning import accumulator, cdiv, channel_block, numeric, row_tiles

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


def pool_tiles(rows: int, channels: int) -> dict[str, int]:
    """[BM pixels, BC channels] a step of a single warp: it adds its rows up without shared memory or a barrier."""
    if INTERPRETED:
        return row_tiles(rows, channels) | dict(STAGES=1)
    block = channel_block(channels)
    return dict(BM=512 // block, BC=block, num_warps=1, STAGES=4)


def split_image(pixels: int, columns: int, tile: int, device: torch.device) -> tuple[int, int]:
    """(parts of an image, pixels of a part, of whole tiles) for `columns` programs each, so that it takes least time.

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
