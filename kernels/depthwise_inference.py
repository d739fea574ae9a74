"""The depthwise walk of depthwise.py without gradients: act(BN(depthwise(x))), and its sums per image, NHWC.

BN's scale multiplies the taps and its shift starts the sums, in registers. With EXPAND x is the block's input, and
in_act(BN1(x @ we)) is computed where it is used. A program walks SPAN output columns of R rows: all of them where
images and channels fill the GPU, fewer where they don't.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .math import INTERPRETED, activate_halved, halved, stored
from .running import Running, load_affine
from .tables import tiles as chosen
from .traffic import state
from .tuning import MIN_DOT, PROGRAMS, accumulator, cdiv, numeric, precision, walk_tiles
from .walk import (
    accumulated,
    expanded,
    first_step,
    image_row,
    load_column,
    load_expand,
    load_taps,
    rows_to_load,
    shifted,
    tile_mask,
    walks_inward,
)

FEWEST_COLUMNS = 4
MOST_INPUTS = 64  # of an expansion that the walk computes itself: with more, a launch of its own is faster


@triton.jit
def store_activated(p_y, b_h, b_sum, m, POOLED: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr):
    """Store a finished column of one row, and add it to the image's sum."""
    b_y = activate_halved(b_h, ACT, FAST)
    tl.store(p_y, stored(b_y, p_y.dtype.element_ty), mask=m)
    if POOLED:
        b_sum += b_y
    return b_sum


@kernel
@triton.jit
def _depthwise_inference_kernel(
    x_ptr,
    we_ptr,
    bn1_weight_ptr,
    bn1_bias_ptr,
    mean1_ptr,
    var1_ptr,
    w_ptr,
    bn2_weight_ptr,
    bn2_bias_ptr,
    mean2_ptr,
    var2_ptr,
    y_ptr,
    parts_ptr,
    N,
    H,
    HO,
    STRIPS,
    SPANS,
    W: tl.constexpr,
    WO: tl.constexpr,
    CX: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PT: tl.constexpr,
    PL: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    INWARD: tl.constexpr,
    EPS1: tl.constexpr,
    EPS2: tl.constexpr,
    IN_ACT: tl.constexpr,
    ACT: tl.constexpr,
    EXPAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    NB: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    R: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    J: tl.constexpr = (K + S - 1) // S  # output columns in flight
    WHOLE: tl.constexpr = SPAN >= WO  # else a span begins and ends inside the image
    FIRST: tl.constexpr = first_step(PL, S, J) if WHOLE else 0
    LAST: tl.constexpr = (WO if WHOLE else SPAN) + J - 1
    POOLED: tl.constexpr = parts_ptr is not None
    columns = (C + BC - 1) // BC
    part = tl.program_id(0) // columns % (STRIPS * SPANS)
    o_n = tl.program_id(0) // columns // (STRIPS * SPANS) * NB + tl.arange(0, NB)
    o_c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    strip = part // SPANS
    h0 = 0 if INWARD else strip * (R * S)  # what is not of the image lies above this row of it, or below H
    w0 = 0 if WHOLE else part % SPANS * SPAN
    m_c = o_c < C
    m = tile_mask(o_n, o_c, N, C, EVEN, NB, BC)
    o_x = tl.arange(0, BX) if EXPAND else o_c
    m_x = (o_n < N)[:, None] & (o_x < CX)[None, :] if EXPAND else m
    p_x = x_ptr + o_n[:, None].to(tl.int64) * H * (W * CX) + o_x[None, :]  # [NB, BX]
    p_y = y_ptr + o_n[:, None].to(tl.int64) * HO * (WO * C) + o_c[None, :]
    if EXPAND:
        b_we = load_expand(we_ptr, o_c, m_c, CX, BX)
        b_scale, b_shift = load_affine(bn1_weight_ptr, bn1_bias_ptr, mean1_ptr, var1_ptr, o_c, m_c, EPS1, ACC)
        b_scale, b_shift = halved(b_scale, IN_ACT, FAST)[None, :], halved(b_shift, IN_ACT, FAST)[None, :]
    else:
        b_we = 0
    b_scale2, b_shift2 = load_affine(bn2_weight_ptr, bn2_bias_ptr, mean2_ptr, var2_ptr, o_c, m_c, EPS2, ACC)
    b_scale2, b_shift2 = halved(b_scale2, ACT, FAST), halved(b_shift2, ACT, FAST)
    b_taps = load_taps(w_ptr, o_c, m_c, strip, K, ACC, NB, BC, INWARD)
    b_w = ()
    for i in tl.static_range(K * K):
        b_w = b_w + (b_taps[i] * b_scale2[None, :],)
    acc = ()
    for _ in tl.static_range(R * J):
        acc = acc + (tl.zeros((NB, BC), ACC) + b_shift2[None, :],)
    b_sum = tl.zeros((NB, BC), ACC)
    for step in tl.range(FIRST, LAST, num_stages=STAGES):
        t = w0 + step
        b_x = ()
        for s in tl.static_range(S):
            b_x = b_x + load_column(p_x, t * S + s - PL, strip, TOP, m_x, H, W, CX, ROWS, R * S, INWARD)
        for s in tl.static_range(S):
            wi = t * S + s - PL
            for i in tl.static_range(ROWS):
                hi = h0 + TOP + i
                b_v = expanded(b_x[s * ROWS + i], b_we, NB, BC, EXPAND, PRECISION, ACC)
                if EXPAND:
                    b_v = activate_halved(b_v * b_scale + b_shift, IN_ACT, FAST)
                b_v = tl.where((INWARD | ((hi >= 0) & (hi < H))) & ((wi >= 0) & (wi < W)), b_v, 0.0)
                acc = accumulated(acc, b_v, b_w, TOP + PT + i, s, K, S, J, R)
        wo = t - (J - 1)
        if (wo >= w0) & (WHOLE | (wo < WO)):
            for r in tl.static_range(R):
                if EVEN_ROWS | (strip * R + r < HO):
                    p_out = p_y + (image_row(strip, r, HO, R, INWARD) * WO + wo) * C
                    b_sum = store_activated(p_out, acc[r * J], b_sum, m, POOLED, ACT, FAST)
        acc = shifted(acc, tl.zeros((NB, BC), ACC) + b_shift2[None, :], J, R)
    if POOLED:
        tl.store(parts_ptr + (part.to(tl.int64) * N + o_n[:, None]) * C + o_c[None, :], b_sum, mask=m)


def walk_inference_tiles(
    images: int, height: int, width: int, channels: int, kernel_size: int, stride: int, dtype: torch.dtype, expand: int
) -> dict[str, int]:
    """`walk_tiles` and SPAN, the output columns of a program; smaller where few programs would be left."""
    tiles = walk_tiles(images, height, channels, kernel_size, stride, dtype, backward=False, expand=expand)
    tiles["SPAN"] = width
    if INTERPRETED:
        return tiles
    fixed = cdiv(images, tiles["NB"]) * cdiv(height, tiles["R"]) * cdiv(channels, tiles["BC"])
    while fixed * cdiv(width, tiles["SPAN"]) < PROGRAMS and tiles["SPAN"] >= 2 * FEWEST_COLUMNS:
        tiles["SPAN"] = cdiv(tiles["SPAN"], 2)
    return tiles


def depthwise_inference(
    x: Tensor,
    expand_weight: Tensor | None,
    bn1: Running | None,
    weight: Tensor,
    bn2: Running,
    expand_activation: str,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
    out_height: int,
    out_width: int,
    pooled: bool,
) -> tuple[Tensor, Tensor | None]:
    """(act(BN2(depthwise(x))) [N, HO, WO, C], if `pooled` its sums [P, N, C] over parts of the image).

    x is [N, H, W, C], weight [C, 1, K, K]. With `expand_weight` [C, I, 1, 1] and `bn1` x is [N, H, W, I], and
    expand_activation(BN1(x @ expand_weight)) stands in its place.
    """
    n, h, w, channels = x.shape
    c, k = weight.shape[0], weight.shape[-1]
    expand = 0 if expand_weight is None else channels
    shape = (n, out_height, out_width, c, k, stride, x.dtype, expand)
    tiles = chosen("depthwise_inference", x, walk_inference_tiles, shape, activation=activation, pooled=pooled)
    tiles = tiles | dict(R=min(tiles["R"], out_height))
    strips, spans = cdiv(out_height, tiles["R"]), cdiv(out_width, tiles["SPAN"])
    inward = walks_inward(strips, k, stride, pad_top, h, out_height)
    top, rows = rows_to_load(-pad_top, (tiles["R"] - 1) * stride + k, h, inward)
    y = torch.empty(n, out_height, out_width, c, dtype=x.dtype, device=x.device)
    parts = torch.empty(strips * spans, n, c, dtype=accumulator(x.dtype), device=x.device) if pooled else None
    first = (None,) * 4 if bn1 is None else bn1.tensors
    programs = cdiv(c, tiles["BC"]) * strips * spans * cdiv(n, tiles["NB"])
    _depthwise_inference_kernel[(programs,)](
        x_ptr=x,
        we_ptr=expand_weight,
        bn1_weight_ptr=first[0],
        bn1_bias_ptr=first[1],
        mean1_ptr=first[2],
        var1_ptr=first[3],
        w_ptr=weight,
        bn2_weight_ptr=bn2.weight,
        bn2_bias_ptr=bn2.bias,
        mean2_ptr=bn2.mean,
        var2_ptr=bn2.var,
        y_ptr=y,
        parts_ptr=parts,
        N=n,
        H=h,
        HO=out_height,
        STRIPS=strips,
        SPANS=spans,
        W=w,
        WO=out_width,
        CX=channels,
        C=c,
        K=k,
        S=stride,
        PT=pad_top,
        PL=pad_left,
        TOP=top,
        ROWS=rows,
        INWARD=inward,
        EPS1=0.0 if bn1 is None else bn1.eps,
        EPS2=bn2.eps,
        IN_ACT=expand_activation,
        ACT=activation,
        EXPAND=expand_weight is not None,
        PRECISION=precision(x.dtype),
        EVEN=n % tiles["NB"] == 0 and c % tiles["BC"] == 0,
        EVEN_ROWS=out_height % tiles["R"] == 0,
        **numeric(x.dtype),
        **tiles,
    )
    state("depthwise_inference", (x, expand_weight, *first, weight, *bn2.tensors), (y, parts))
    return y, parts


def expands_inside(images: int, kernel_size: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether the walk computes the expansion itself: it has registers for it, and images for a matrix product."""
    if INTERPRETED or images < MIN_DOT:
        return bool(INTERPRETED) and kernel_size == 3
    return kernel_size == 3 and channels <= MOST_INPUTS and dtype in (torch.bfloat16, torch.float16)
