"""Backward of the expand convolution and its BatchNorm: dx and dWe from dv1 and x.

    du1 = p dv1 + q (u1 - mean) + r,    dx = du1 We (+ residual),    dWe = du1^T x

Two forms, chosen by the number of input channels (`form_tiles`). Few: one launch over dv1 makes u1 = x We^T again in
registers, so that u1 is not read and du1 never written; We stays in shared memory, and dWe adds up in registers. Where
those do not hold all expanded channels, a program goes over its pixels once a slice of them, there and back, and adds
to the dx of the slice before. More: du1 is written by an elementwise pass, and two products by the library follow.
du1 is made before it meets x, in both: x's mean and what lies far from it never have to cancel in a long sum.

    a program:   TILES tiles of BM pixels, one after the other, for each slice       grid: (programs,)
    a slice:     SLICE channels, in blocks of BE and, for the rest, fewer: 144 = 64 + 64 + 16
    a tile:      x [BM, BI] We^T [BI, BE] -> u1 [BM, BE]                             STAGES - 1 tiles are on their way
                 u1 and dv1 [BM, BE] -> du1 [BM, BE]
                 du1 We [BE, BI] -> dx [BM, BI], over the slice's blocks;   du1^T x -> dWe [BE, BI]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import bn_act_bwd, load_coef
from .launching import kernel
from .library import cast, multiply, multiply_pixels
from .math import INTERPRETED, dot, stored
from .tables import processors
from .tables import tiles as chosen
from .traffic import state, summed
from .tuning import MIN_DOT, cdiv, multiplies_fast, numeric, pow2

FEW_CHANNELS = 64  # inputs: with more, We and dWe do not fit beside the pixels
ACCUMULATORS = 128 * 64  # of dWe, in registers of one program


@triton.constexpr_function
def cut_slice(number, expanded, size, block):
    """(first channel, width) of a slice's blocks: full ones, then powers of two, so that few lanes are idle."""
    first, end = number * size, min((number + 1) * size, expanded)
    blocks = []
    while first < end:
        width = min(block, max(MIN_DOT, 1 << ((end - first).bit_length() - 1)))
        blocks.append((first, width))
        first += width
    return blocks


@triton.constexpr_function
def count_blocks(number, expanded, size, block):
    return len(cut_slice(number, expanded, size, block))


@triton.constexpr_function
def first_channel(number, j, expanded, size, block):
    return cut_slice(number, expanded, size, block)[j][0]


@triton.constexpr_function
def block_width(number, j, expanded, size, block):
    return cut_slice(number, expanded, size, block)[j][1]


@triton.jit
def block_channels(number: tl.constexpr, j: tl.constexpr, CE: tl.constexpr, SLICE: tl.constexpr, BE: tl.constexpr):
    """The expanded channels of block j of a slice."""
    return first_channel(number, j, CE, SLICE, BE) + tl.arange(0, block_width(number, j, CE, SLICE, BE))


@kernel
@triton.jit
def _expand_pass_kernel(
    dv_ptr,
    x_ptr,
    w_ptr,
    coef_ptr,
    residual_ptr,
    dx_ptr,
    parts_ptr,
    M,
    TILES,
    CI: tl.constexpr,
    CE: tl.constexpr,
    SLICE: tl.constexpr,
    BATCH: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BI: tl.constexpr,
    STAGES: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    program = tl.program_id(0)
    o_m = tl.arange(0, BM)
    o_i = tl.arange(0, BI)
    m_i = o_i < CI
    o_x = o_m[:, None] * CI + o_i[None, :]  # [BM, BI]
    p_part = parts_ptr + program.to(tl.int64) * (CE * CI)
    for number in tl.static_range((CE + SLICE - 1) // SLICE):
        w, dw = (), ()
        for j in tl.static_range(count_blocks(number, CE, SLICE, BE)):
            o_e = block_channels(number, j, CE, SLICE, BE)
            m_w = (o_e < CE)[:, None] & m_i[None, :]
            w = w + (stored(tl.load(w_ptr + o_e[:, None] * CI + o_i[None, :], mask=m_w, other=0.0), DTYPE),)  # [BE, BI]
            dw = dw + (tl.zeros(w[j].shape, ACC),)
        if number > 0:
            tl.debug_barrier()  # other threads wrote the dx that is read next
        # Coefficients come from L1 for each tile (disable_licm): kept through the loop, they would make it spill.
        for tile in tl.range(0, TILES, num_stages=STAGES, disable_licm=True):
            first = (program * TILES + (TILES - 1 - tile if number % 2 else tile)) * BM
            m_m = o_m < M - first
            m_x = m_m[:, None] & m_i[None, :]
            at_x = first.to(tl.int64) * CI
            b_x = tl.load(x_ptr + at_x + o_x, mask=m_x, other=0.0)  # [BM, BI]
            p_dv = dv_ptr + first.to(tl.int64) * CE
            b_dx = tl.zeros((BM, BI), ACC)
            added = ()
            for j in tl.static_range(count_blocks(number, CE, SLICE, BE)):
                o_e = block_channels(number, j, CE, SLICE, BE)
                m_e = o_e < CE
                m_dv = m_m[:, None] & m_e[None, :]
                b_dv = tl.load(p_dv + (o_m[:, None] * CE + o_e[None, :]), mask=m_dv, other=0.0)  # [BM, BE]
                b_p, b_q, b_r, b_mean = load_coef(coef_ptr, o_e, m_e, CE)
                b_du = b_dv.to(ACC) * b_p[None, :]
                if BATCH:
                    b_u = dot(b_x, tl.trans(w[j]), tl.zeros(b_dv.shape, ACC), DTYPE, "ieee")
                    b_u = stored(b_u, DTYPE).to(ACC) - b_mean[None, :]  # rounded as in the forward, as its mean is
                    b_du += b_u * b_q[None, :] + b_r[None, :]
                    # Behind the last pixel du1 is not 0. x is; but fp16 may have made du1 infinite.
                    if tl.float16 == DTYPE:
                        b_du = tl.where(m_m[:, None], b_du, 0.0)
                b_du = stored(b_du, DTYPE)
                b_dx = dot(b_du, w[j], b_dx, DTYPE, "ieee")
                added = added + (dot(tl.trans(b_du), b_x, dw[j], DTYPE, "ieee"),)
            dw = added
            added_ptr = dx_ptr if number > 0 else residual_ptr
            if added_ptr is not None:
                b_dx += tl.load(added_ptr + at_x + o_x, mask=m_x, other=0.0).to(ACC)
            tl.store(dx_ptr + at_x + o_x, stored(b_dx, DTYPE), mask=m_x)
        for j in tl.static_range(count_blocks(number, CE, SLICE, BE)):
            o_e = block_channels(number, j, CE, SLICE, BE)
            m_w = (o_e < CE)[:, None] & m_i[None, :]
            tl.store(p_part + o_e[:, None] * CI + o_i[None, :], dw[j], mask=m_w)


def form_tiles(rows: int, channels: int, expanded: int, dtype: torch.dtype) -> dict[str, int]:
    """RESIDENT 1: We in shared memory; 0: products by the library, as for float32, which has no fast one of ours."""
    return dict(RESIDENT=int(multiplies_fast(dtype) and channels <= FEW_CHANNELS))


def pass_tiles(rows: int, channels: int, expanded: int) -> dict[str, int]:
    """Tiles of BM pixels, blocks of BE expanded channels, slices of as many as the registers hold of dWe."""
    if INTERPRETED:
        return dict(BM=pow2(rows, MIN_DOT, 256), BE=pow2(expanded, MIN_DOT, 256), SLICE=1024, STAGES=1)
    side = pow2(channels, MIN_DOT, FEW_CHANNELS)
    block = pow2(expanded, MIN_DOT, 64 if side > MIN_DOT else 32)
    return dict(BM=64, BE=block, SLICE=ACCUMULATORS // side, STAGES=3, num_warps=4)


def expand_pass(
    dv: Tensor, x: Tensor, weight: Tensor, coef: Tensor, residual: Tensor | None, batch_statistics: bool
) -> tuple[Tensor, Tensor]:
    """(dx (+ residual), dWe [CE, CI]) in one launch over dv [N, H, W, CE] and x [N, H, W, CI]."""
    n, h, w, channels = x.shape
    expanded, rows = dv.shape[3], n * h * w
    traits = dict(batch=batch_statistics, residual=residual is not None)
    tiles = chosen("expand_pass", x, pass_tiles, (rows, channels, expanded), **traits)
    slots = 4 if INTERPRETED else 2 * processors(x.device)  # so many programs run at a time
    per_program = cdiv(cdiv(rows, tiles["BM"]), slots)
    programs = cdiv(rows, tiles["BM"] * per_program)
    dx = torch.empty_like(x)
    parts = coef.new_empty(programs, expanded, channels)
    _expand_pass_kernel[(programs,)](
        dv_ptr=dv,
        x_ptr=x,
        w_ptr=weight,
        coef_ptr=coef,
        residual_ptr=residual,
        dx_ptr=dx,
        parts_ptr=parts,
        M=rows,
        TILES=per_program,
        CI=channels,
        CE=expanded,
        BATCH=batch_statistics,
        ACC=numeric(x.dtype)["ACC"],
        BI=pow2(channels, MIN_DOT, 4096),
        **tiles,
    )
    slices = cdiv(expanded, tiles["SLICE"])
    # L2 keeps a part of what a slice leaves behind, the less the larger the images: none is counted.
    again = (slices - 1) * [x, dx]
    state("expand_pass", (dv, x, weight, coef, residual, *again), (*slices * [dx], parts))
    return dx, summed(parts)


def expand_bwd(
    dv: Tensor,
    u: Tensor | None,
    x: Tensor,
    weight: Tensor,
    coef: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """(dx (+ residual) [N, H, W, CI], dWe [CE, CI, 1, 1]) from dv1 and u1 [N, H, W, CE], x, and coef [4, CE].

    Without u1 it is made again where a form reads it.
    """
    n, h, w, channels = x.shape
    shape = (n * h * w, channels, dv.shape[3], x.dtype)
    if chosen("expand_bwd", x, form_tiles, shape, batch=batch_statistics)["RESIDENT"]:
        dx, dw = expand_pass(dv, x, weight, coef, residual, batch_statistics)
    else:
        matrix = cast(weight, x.dtype)
        if u is None and batch_statistics:
            u = multiply(x, matrix.t())
        du = bn_act_bwd(dv, u if batch_statistics else None, None, coef, None, "none")
        dx, dw = multiply(du, matrix, add=residual), multiply_pixels(du, x)
    return dx, dw.view(weight.shape)
