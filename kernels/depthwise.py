"""Depthwise K x K convolution as a column walk, NHWC, with BatchNorm folded into both ends.

Triton tensors can't be shifted, so the tile is [NB images, BC channels] and (row, column) are scalars of a loop: a tap
is another register tile and the sums of the next BatchNorm stay in their lanes to the end. A step takes STRIDE input
columns and finishes one output column; R rows share their loads, which come STAGES - 1 steps ahead through shared
memory. What lies outside is left out (walk.py), or comes from a clamped place and becomes zero once activated.

    forward, k3, stride 1: three columns of sums in flight     backward: dy's last columns in a window
      step t takes x's column t            t                     step t takes dy's column t + 1   t-1  t  t+1
      sums of outputs          t-1    t   t+1                    and x's column t                       t
      gain taps                 2     1    0                     dx's column t is finished: dw gains it times each
      t-1 is finished, and the others move up one place          the window moves up one place

The loop is not unrolled: moving up costs nothing where a fused multiply-add may write to the next place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_xhat, store_moments
from .launching import kernel
from .math import activate_grad_halved, activate_halved, at_least, first_row, halved, stored
from .running import load_norm
from .tables import tiles as chosen
from .traffic import state
from .tuning import accumulator, cdiv, numeric, precision, walk_tiles
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
    tap_place,
    tile_mask,
    walks_inward,
)


@triton.jit
def store_tap_sums(p_dw, b_dw, m_c, strip, K: tl.constexpr, INWARD: tl.constexpr):
    """Store each tap's sum over images, four at a time: joining tiles moves nothing, and one sum serves all four."""
    FOURS: tl.constexpr = K * K // 4 * 4
    for i in tl.static_range(0, FOURS, 4):
        b_even, b_odd = tl.join(b_dw[i], b_dw[i + 2]), tl.join(b_dw[i + 1], b_dw[i + 3])
        b_sums = tl.sum(tl.join(b_even, b_odd), 0)  # [BC, 2, 2]: of taps i, i + 1; i + 2, i + 3
        o = (i + 2 * tl.arange(0, 2))[None, :, None] + tl.arange(0, 2)[None, None, :]
        p_four = p_dw[:, None, None] + tap_place(o, strip, K, INWARD)
        tl.store(p_four, b_sums, mask=m_c[:, None, None] & (o >= 0))
    for i in tl.static_range(FOURS, K * K):
        tl.store(p_dw + tap_place(i, strip, K, INWARD), tl.sum(b_dw[i], 0), mask=m_c)


@triton.constexpr_function
def slot_of(tap, row, column, kernel_size, stride, pad_top, pad_left, top, left, rows, columns):
    """The window's slot of the output that a tap links to input pixel (row, column) of a step; -1 if none.

    Tap (i, j) links it to output ((row + pad_top - i) / stride, (column + pad_left - j) / stride).
    """
    i, j = row + pad_top - tap // kernel_size, column + pad_left - tap % kernel_size
    slot = (i // stride - top) * columns + j // stride - left
    return slot if i % stride == 0 and j % stride == 0 and 0 <= slot < rows * columns else -1


@triton.jit
def store_output(p_y, b_y, pivot, s1, s2, m, HAS_MOMENTS: tl.constexpr):
    """Store a finished column of one row, and add it to the sums about the pivot."""
    tl.store(p_y, stored(b_y, p_y.dtype.element_ty), mask=m)
    if HAS_MOMENTS:
        b_y = b_y - pivot
        s1 += b_y
        s2 += b_y * b_y
    return s1, s2


@kernel
@triton.jit
def _depthwise_fwd_kernel(
    x_ptr,
    we_ptr,
    w_ptr,
    norm_ptr,
    y_ptr,
    partials_ptr,
    N,
    H,
    HO,
    STRIPS,
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
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
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
    STAGES: tl.constexpr,
):
    J: tl.constexpr = (K + S - 1) // S  # output columns in flight
    FIRST: tl.constexpr = first_step(PL, S, J)
    LAST: tl.constexpr = WO + J - 1
    strip = tl.program_id(1) % STRIPS
    h0 = 0 if INWARD else strip * (R * S)  # what is not of the image lies above this row of it, or below H
    n0 = (tl.program_id(1) // STRIPS) * NB
    o_n = n0 + tl.arange(0, NB)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    m = tile_mask(o_n, o_c, N, C, EVEN, NB, BC)
    o_x = tl.arange(0, BX) if EXPAND else o_c
    m_x = (o_n < N)[:, None] & (o_x < CX)[None, :] if EXPAND else m
    p_x = x_ptr + o_n[:, None].to(tl.int64) * H * (W * CX) + o_x[None, :]  # [NB, BX]
    b_we = load_expand(we_ptr, o_c, m_c, CX, BX) if EXPAND else 0
    p_y = y_ptr + o_n[:, None].to(tl.int64) * HO * (WO * C) + o_c[None, :]
    if HAS_NORM:
        b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, C)
        b_scale, b_shift = halved(b_scale, ACT, FAST)[None, :], halved(b_shift, ACT, FAST)[None, :]
    b_w = load_taps(w_ptr, o_c, m_c, strip, K, ACC, NB, BC, INWARD)
    acc = ()
    for _ in tl.static_range(R * J):
        acc = acc + (tl.zeros((NB, BC), ACC),)
    pivot = tl.zeros((1, BC), ACC)
    if HAS_MOMENTS:
        # Sums about the middle output of a constant image of one pixel's value, so that no large mean cancels.
        b_pixel = load_column(p_x, W // 2, strip, 0, m_x, H, W, CX, 1, R * S, INWARD)[0]
        b_v = expanded(b_pixel, b_we, NB, BC, EXPAND, PRECISION, ACC)
        if HAS_NORM:
            b_v = activate_halved(b_v * b_scale + b_shift, ACT, FAST)
        total = tl.zeros((NB, BC), ACC)
        for i in tl.static_range(K):
            for j in tl.static_range(K):
                hi, wi = h0 + i - PT, WO // 2 * S + j - PL
                total += tl.where(((hi >= 0) & (hi < H)) & ((wi >= 0) & (wi < W)), b_w[i * K + j], 0.0)
        pivot = (tl.sum(tl.where(m, b_v, 0.0), 0) / tl.minimum(N - n0, NB))[None, :] * total
    s1 = tl.zeros((NB, BC), ACC)
    s2 = tl.zeros((NB, BC), ACC)
    for t in tl.range(FIRST, LAST, num_stages=STAGES):
        b_x = ()
        for s in tl.static_range(S):
            b_x = b_x + load_column(p_x, t * S + s - PL, strip, TOP, m_x, H, W, CX, ROWS, R * S, INWARD)
        for s in tl.static_range(S):
            wi = t * S + s - PL
            for i in tl.static_range(ROWS):
                hi = h0 + TOP + i
                b_v = expanded(b_x[s * ROWS + i], b_we, NB, BC, EXPAND, PRECISION, ACC)
                if HAS_NORM:
                    b_v = activate_halved(b_v * b_scale + b_shift, ACT, FAST)
                # The padding comes after BN and activation.
                b_v = tl.where((INWARD | ((hi >= 0) & (hi < H))) & ((wi >= 0) & (wi < W)), b_v, 0.0)
                acc = accumulated(acc, b_v, b_w, TOP + PT + i, s, K, S, J, R)
        wo = t - (J - 1)
        if wo >= 0:
            for r in tl.static_range(R):
                if EVEN_ROWS | (strip * R + r < HO):
                    p_out = p_y + (image_row(strip, r, HO, R, INWARD) * WO + wo) * C
                    s1, s2 = store_output(p_out, acc[r * J], pivot, s1, s2, m, HAS_MOMENTS)
        acc = shifted(acc, tl.zeros((NB, BC), ACC), J, R)
    if HAS_MOMENTS:
        count = tl.zeros((BC,), ACC) + (tl.minimum(N - n0, NB) * tl.minimum(HO - strip * R, R) * WO)
        delta = tl.sum(tl.where(m, s1, 0.0), 0) / count
        m2 = at_least(tl.sum(tl.where(m, s2, 0.0), 0) - delta * delta * count, 0.0)
        store_moments(partials_ptr, tl.program_id(1), count, first_row(pivot, NB) + delta, m2, o_c, m_c, C)


@kernel
@triton.jit
def _depthwise_bwd_kernel(
    dy_ptr,
    x_ptr,
    we_ptr,
    w_ptr,
    norm_ptr,
    residual_ptr,
    dx_ptr,
    dw_ptr,
    sums_ptr,
    N,
    H,
    HO,
    STRIPS,
    W: tl.constexpr,
    WO: tl.constexpr,
    CX: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PT: tl.constexpr,
    PL: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INWARD: tl.constexpr,
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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
    STAGES: tl.constexpr,
):
    strip = tl.program_id(1) % STRIPS
    top = TOP if INWARD else strip * (R // S) + TOP
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    o_x = tl.arange(0, BX) if EXPAND else o_c
    b_we = load_expand(we_ptr, o_c, m_c, CX, BX) if EXPAND else 0
    if HAS_NORM:
        b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, C)
        b_scale, b_shift = halved(b_scale, ACT, FAST)[None, :], halved(b_shift, ACT, FAST)[None, :]
        b_rstd, b_nmr = load_xhat(norm_ptr, o_c, m_c, C)
    b_w = load_taps(w_ptr, o_c, m_c, strip, K, ACC, NB, BC, INWARD)
    b_dw = ()
    for _ in tl.static_range(K * K):
        b_dw = b_dw + (tl.zeros((NB, BC), ACC),)
    b_db = tl.zeros((NB, BC), ACC)
    b_dg = tl.zeros((NB, BC), ACC)
    o_n = (tl.program_id(1) // STRIPS) * NB + tl.arange(0, NB)
    m = tile_mask(o_n, o_c, N, C, EVEN, NB, BC)
    o_u = o_n[:, None].to(tl.int64) * H * (W * C) + o_c[None, :]  # [NB, BC]
    m_x = (o_n < N)[:, None] & (o_x < CX)[None, :] if EXPAND else m
    p_x = x_ptr + o_n[:, None].to(tl.int64) * H * (W * CX) + o_x[None, :]  # [NB, BX]
    p_y = dy_ptr + o_n[:, None].to(tl.int64) * HO * (WO * C) + o_c[None, :]
    # Window of dy: slot i * COLUMNS + j is row top + i, column t + LEFT + j at step t; `older` lacks the last column.
    older = ()
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS - 1):
            inside = (INWARD | ((top + i >= 0) & (top + i < HO))) & ((LEFT + j >= 0) & (LEFT + j < WO))
            b_d = load_column(p_y, LEFT + j, strip, TOP + i, m, HO, WO, C, 1, R // S, INWARD)[0].to(ACC)
            older = older + (tl.where(inside, b_d, 0.0),)
    for t in tl.range(0, (W + S - 1) // S, num_stages=STAGES):
        wo = t + LEFT + COLUMNS - 1
        d_new = load_column(p_y, wo, strip, TOP, m, HO, WO, C, ROWS, R // S, INWARD)
        b_x = ()
        for s in tl.static_range(S):
            b_x = b_x + load_column(p_x, t * S + s, strip, 0, m_x, H, W, CX, R, R, INWARD)
        b_residual = ()
        if HAS_RESIDUAL:
            for s in tl.static_range(S):
                b_residual = b_residual + load_column(residual_ptr + o_u, t * S + s, strip, 0, m, H, W, C, R, R, INWARD)
        window = ()
        for i in tl.static_range(ROWS):
            for j in tl.static_range(COLUMNS - 1):
                window = window + (older[i * (COLUMNS - 1) + j],)
            inside = (INWARD | ((top + i >= 0) & (top + i < HO))) & ((wo >= 0) & (wo < WO))
            window = window + (tl.where(inside, d_new[i].to(ACC), 0.0),)
        b_db_step = tl.zeros((NB, BC), ACC)  # a row's sum in one go loses digits
        b_dg_step = tl.zeros((NB, BC), ACC)
        for s in tl.static_range(S):
            wi = t * S + s
            for r in tl.static_range(R):
                b_u = expanded(b_x[s * R + r], b_we, NB, BC, EXPAND, PRECISION, ACC)
                if HAS_NORM:
                    b_a, b_g = activate_grad_halved(b_u * b_scale + b_shift, ACT, FAST)
                else:
                    b_a = b_u
                if (EVEN_ROWS | (strip * R + r < H)) & ((W % S == 0) | (wi < W)):
                    b_da = tl.zeros((NB, BC), ACC)
                    taps = ()
                    for i in tl.static_range(K * K):
                        if slot_of(i, r, s, K, S, PT, PL, TOP, LEFT, ROWS, COLUMNS) >= 0:
                            b_d = window[slot_of(i, r, s, K, S, PT, PL, TOP, LEFT, ROWS, COLUMNS)]
                            b_da = tl.fma(b_d, b_w[i], b_da)
                            taps = taps + (tl.fma(b_d, b_a, b_dw[i]),)
                        else:
                            taps = taps + (b_dw[i],)
                    b_dw = taps
                    if HAS_NORM:
                        b_da = b_da * b_g
                        b_db_step += b_da
                        b_dg_step += b_da * (b_u * b_rstd[None, :] + b_nmr[None, :])
                    o = o_u + (image_row(strip, r, H, R, INWARD) * W + wi) * C
                    if HAS_RESIDUAL:
                        b_da += b_residual[s * R + r].to(ACC)
                    tl.store(dx_ptr + o, stored(b_da, dx_ptr.dtype.element_ty), mask=m)
        b_db += b_db_step
        b_dg += b_dg_step
        older = ()
        for i in tl.static_range(ROWS):
            for j in tl.static_range(1, COLUMNS - 1):
                # A new value: Triton loads nothing ahead in a loop that hands on what it was given.
                older = older + (window[i * COLUMNS + j] + 0.0,)
            older = older + (window[i * COLUMNS + COLUMNS - 1],)
    p_dw = dw_ptr + tl.program_id(1).to(tl.int64) * C * (K * K) + o_c * (K * K)
    store_tap_sums(p_dw, b_dw, m_c, strip, K, INWARD)
    if HAS_NORM:
        p_sums = sums_ptr + tl.program_id(1).to(tl.int64) * 2 * C + o_c
        tl.store(p_sums, tl.sum(b_db, 0), mask=m_c)
        tl.store(p_sums + C, tl.sum(b_dg, 0), mask=m_c)


def _inputs(x: Tensor, expand_weight: Tensor | None) -> int:
    return 0 if expand_weight is None else x.shape[3]


def depthwise_fwd(
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    norm: Tensor | None,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
    out_height: int,
    out_width: int,
    moments: bool,
) -> tuple[Tensor, Tensor | None]:
    """(u [N, HO, WO, C], partial moments [P, 3, C] if asked) of act(scale * x + shift) convolved.

    x is [N, H, W, C], weight [C, 1, K, K]; zeros around the activated image. With `expand_weight` [C, I, 1, 1] x is
    [N, H, W, I], and its expansion is computed where it is used.
    """
    n, h, w, channels = x.shape
    c, k = weight.shape[0], weight.shape[-1]
    u = torch.empty(n, out_height, out_width, c, dtype=x.dtype, device=x.device)
    shape = (n, out_height, c, k, stride, x.dtype, False, _inputs(x, expand_weight))
    traits = dict(width=w, activation=activation, norm=norm is not None, moments=moments)
    tiles = chosen("depthwise_fwd", x, walk_tiles, shape, **traits)
    tiles = tiles | dict(R=min(tiles["R"], out_height))
    strips = cdiv(out_height, tiles["R"])
    inward = walks_inward(strips, k, stride, pad_top, h, out_height)
    top, rows = rows_to_load(-pad_top, (tiles["R"] - 1) * stride + k, h, inward)
    programs = strips * cdiv(n, tiles["NB"])
    partials = torch.empty(programs, 3, c, dtype=accumulator(x.dtype), device=x.device) if moments else None
    _depthwise_fwd_kernel[(cdiv(c, tiles["BC"]), programs)](
        x_ptr=x,
        we_ptr=expand_weight,
        w_ptr=weight,
        norm_ptr=norm,
        y_ptr=u,
        partials_ptr=partials,
        N=n,
        H=h,
        HO=out_height,
        STRIPS=strips,
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
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_MOMENTS=moments,
        EXPAND=expand_weight is not None,
        PRECISION=precision(x.dtype),
        EVEN=n % tiles["NB"] == 0 and c % tiles["BC"] == 0,
        EVEN_ROWS=out_height % tiles["R"] == 0,
        **numeric(x.dtype),
        **tiles,
    )
    state("depthwise_fwd", (x, expand_weight, weight, norm), (u, partials))
    return u, partials


def window(kernel_size: int, stride: int, pad: int, span: int) -> tuple[int, int]:
    """(first, count) of the outputs that `span` inputs from a multiple of `stride` reach, relative to that multiple."""
    first = -((kernel_size - 1 - pad) // stride)
    return first, (span - 1 + pad) // stride - first + 1


def depthwise_bwd(
    dy: Tensor,
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dv [N, H, W, C], partial weight gradients [P, C, 1, K, K], partial sums [P, 2, C] of dv and dv * xhat).

    dy is [N, HO, WO, C]; dv is the gradient at scale * x + shift, or at x itself (+ residual) where `norm` is None;
    then there are no sums. `expand_weight` as in `depthwise_fwd`; dv is [N, H, W, C] all the same.
    """
    n, h, w, channels = x.shape
    c, k = weight.shape[0], weight.shape[-1]
    dx = torch.empty(n, h, w, c, dtype=x.dtype, device=x.device)
    shape = (n, h, c, k, stride, x.dtype, True, _inputs(x, expand_weight))
    traits = dict(width=w, activation=activation, norm=norm is not None, residual=residual is not None)
    tiles = chosen("depthwise_bwd", x, walk_tiles, shape, **traits)
    tiles = tiles | dict(R=min(tiles["R"], h))
    strips = cdiv(h, tiles["R"])
    programs = strips * cdiv(n, tiles["NB"])
    acc = accumulator(x.dtype)
    dw = torch.empty(programs, c, 1, k, k, dtype=acc, device=x.device)
    sums = None if norm is None else torch.empty(programs, 2, c, dtype=acc, device=x.device)
    inward = walks_inward(strips, k, stride, pad_top, h, dy.shape[1])
    top, rows = rows_to_load(*window(k, stride, pad_top, tiles["R"]), dy.shape[1], inward)
    left, columns = window(k, stride, pad_left, stride)
    _depthwise_bwd_kernel[(cdiv(c, tiles["BC"]), programs)](
        dy_ptr=dy,
        x_ptr=x,
        we_ptr=expand_weight,
        w_ptr=weight,
        norm_ptr=norm,
        residual_ptr=residual,
        dx_ptr=dx,
        dw_ptr=dw,
        sums_ptr=sums,
        N=n,
        H=h,
        HO=dy.shape[1],
        STRIPS=strips,
        W=w,
        WO=dy.shape[2],
        CX=channels,
        C=c,
        K=k,
        S=stride,
        PT=pad_top,
        PL=pad_left,
        TOP=top,
        LEFT=left,
        ROWS=rows,
        COLUMNS=columns,
        INWARD=inward,
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        EXPAND=expand_weight is not None,
        PRECISION=precision(x.dtype),
        EVEN=n % tiles["NB"] == 0 and c % tiles["BC"] == 0,
        EVEN_ROWS=h % tiles["R"] == 0,
        **numeric(x.dtype),
        **tiles,
    )
    state("depthwise_bwd", (dy, x, expand_weight, weight, norm, residual), (dx, dw, sums))
    return dx, dw, sums
