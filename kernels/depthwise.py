"""Depthwise K x K convolution as a column walk, NHWC, with BatchNorm folded into both ends.

Triton tensors can't be shifted, so the tile is [NB images, BC channels] and (row, column) are scalars of a loop: a tap
is another register tile, the halo is a scalar `if`, and the sums of the next BatchNorm stay in their lanes to the end.
A step takes STRIDE input columns and finishes one output column; R rows share their loads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_norm, load_xhat, store_moments
from .math import activate, activate_grad, stored
from .tuning import accumulator, numeric, walk_tiles


@triton.jit
def _depthwise_fwd_kernel(
    x_ptr,
    w_ptr,
    norm_ptr,
    y_ptr,
    partials_ptr,
    N,
    H,
    W,
    HO,
    WO,
    STRIPS,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PT: tl.constexpr,
    PL: tl.constexpr,
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    NB: tl.constexpr,
    BC: tl.constexpr,
    R: tl.constexpr,
):
    J: tl.constexpr = (K + S - 1) // S  # output columns in flight
    h0 = (tl.program_id(1) % STRIPS) * R
    n0 = (tl.program_id(1) // STRIPS) * NB
    o_n = n0 + tl.arange(0, NB)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    m = (o_n < N)[:, None] & m_c[None, :]
    p_x = x_ptr + o_n[:, None].to(tl.int64) * H * W * C + o_c[None, :]  # [NB, BC]
    p_y = y_ptr + o_n[:, None].to(tl.int64) * HO * WO * C + o_c[None, :]
    if HAS_NORM:
        b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, C)
    b_w = ()
    for i in tl.static_range(K * K):
        b_w = b_w + (tl.load(w_ptr + o_c * (K * K) + i, mask=m_c, other=0.0).to(ACC)[None, :],)
    acc = ()  # slot r * J + j: output row h0 + r, output column t - j
    for _ in tl.static_range(R * J):
        acc = acc + (tl.zeros((NB, BC), ACC),)
    pivot = tl.zeros((1, BC), ACC)
    s1 = tl.zeros((NB, BC), ACC)
    s2 = tl.zeros((NB, BC), ACC)
    for t in range(0, WO + J - 1):
        for s in tl.static_range(S):
            wi = t * S + s - PL
            for i in tl.static_range((R - 1) * S + K):
                hi = h0 * S + i - PT
                if (hi >= 0) & (hi < H) & (wi >= 0) & (wi < W):
                    b_v = tl.load(p_x + (hi * W + wi) * C, mask=m, other=0.0).to(ACC)
                    if HAS_NORM:
                        b_v = activate(b_v * b_scale[None, :] + b_shift[None, :], ACT, FAST)
                else:
                    b_v = tl.zeros((NB, BC), ACC)  # the padding comes after BN and activation
                updated = ()
                for r in tl.static_range(R):
                    for j in tl.static_range(J):
                        if (i - r * S >= 0) and (i - r * S < K) and (j * S + s < K):
                            updated = updated + (acc[r * J + j] + b_v * b_w[(i - r * S) * K + j * S + s],)
                        else:
                            updated = updated + (acc[r * J + j],)
                acc = updated
        wo = t - (J - 1)
        slid = ()
        for r in tl.static_range(R):
            if (wo >= 0) & (h0 + r < HO):
                b_y = acc[r * J + J - 1]
                tl.store(p_y + ((h0 + r) * WO + wo) * C, stored(b_y, y_ptr.dtype.element_ty), mask=m)
                if HAS_MOMENTS:
                    # Sums about the program's first output, so that no large mean cancels.
                    if (wo == 0) & (r == 0):
                        pivot = (tl.sum(tl.where(m, b_y, 0.0), 0) / tl.minimum(N - n0, NB))[None, :]
                    b_y = tl.where(m, b_y - pivot, 0.0)
                    s1 += b_y
                    s2 += b_y * b_y
            slid = slid + (tl.zeros((NB, BC), ACC),)
            for j in tl.static_range(J - 1):
                slid = slid + (acc[r * J + j],)
        acc = slid
    if HAS_MOMENTS:
        count = tl.zeros((BC,), ACC) + (tl.minimum(N - n0, NB) * tl.minimum(HO - h0, R) * WO)
        delta = tl.sum(s1, 0) / count
        m2 = tl.maximum(tl.sum(s2, 0) - delta * delta * count, 0.0)
        store_moments(partials_ptr, tl.program_id(1), count, tl.sum(pivot, 0) + delta, m2, o_c, m_c, C)


@triton.jit
def _depthwise_bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    norm_ptr,
    residual_ptr,
    dx_ptr,
    dw_ptr,
    sums_ptr,
    N,
    H,
    W,
    HO,
    WO,
    STRIPS,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PT: tl.constexpr,
    PL: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    NB: tl.constexpr,
    BC: tl.constexpr,
    R: tl.constexpr,
):
    h0 = (tl.program_id(1) % STRIPS) * R
    o_n = (tl.program_id(1) // STRIPS) * NB + tl.arange(0, NB)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    m = (o_n < N)[:, None] & m_c[None, :]
    p_x = o_n[:, None].to(tl.int64) * H * W * C + o_c[None, :]  # [NB, BC]
    p_y = dy_ptr + o_n[:, None].to(tl.int64) * HO * WO * C + o_c[None, :]
    if HAS_NORM:
        b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, C)
        b_rstd, b_nmr = load_xhat(norm_ptr, o_c, m_c, C)
    b_w = ()
    for i in tl.static_range(K * K):
        b_w = b_w + (tl.load(w_ptr + o_c * (K * K) + i, mask=m_c, other=0.0).to(ACC)[None, :],)
    b_dw = ()
    for _ in tl.static_range(K * K):
        b_dw = b_dw + (tl.zeros((NB, BC), ACC),)
    b_db = tl.zeros((NB, BC), ACC)
    b_dg = tl.zeros((NB, BC), ACC)
    # Window of dy: slot i * COLUMNS + j is row h0 / S + TOP + i, column t + LEFT + j.
    window = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        window = window + (tl.zeros((NB, BC), ACC),)
    for t in range(1 - COLUMNS, (W + S - 1) // S):
        slid = ()
        wo = t + LEFT + COLUMNS - 1
        for i in tl.static_range(ROWS):
            for j in tl.static_range(COLUMNS - 1):
                slid = slid + (window[i * COLUMNS + j + 1],)
            ho = h0 // S + TOP + i
            if (ho >= 0) & (ho < HO) & (wo >= 0) & (wo < WO):
                b_d = tl.load(p_y + (ho * WO + wo) * C, mask=m, other=0.0).to(ACC)
            else:
                b_d = tl.zeros((NB, BC), ACC)
            slid = slid + (b_d,)
        window = slid
        for s in tl.static_range(S):
            wi = t * S + s
            for r in tl.static_range(R):
                if (t >= 0) & (wi < W) & (h0 + r < H):
                    o = p_x + ((h0 + r) * W + wi) * C
                    b_u = tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
                    if HAS_NORM:
                        b_a, b_g = activate_grad(b_u * b_scale[None, :] + b_shift[None, :], ACT, FAST)
                    else:
                        b_a = b_u
                    b_da = tl.zeros((NB, BC), ACC)
                    taps = ()
                    for i in tl.static_range(K):
                        for j in tl.static_range(K):
                            # Tap (i, j) links input (r, s) to output ((r + PT - i) / S, (s + PL - j) / S).
                            if ((r + PT - i) % S == 0) and ((s + PL - j) % S == 0):
                                b_d = window[((r + PT - i) // S - TOP) * COLUMNS + (s + PL - j) // S - LEFT]
                                b_da += b_d * b_w[i * K + j]
                                taps = taps + (b_dw[i * K + j] + b_d * b_a,)
                            else:
                                taps = taps + (b_dw[i * K + j],)
                    b_dw = taps
                    if HAS_NORM:
                        b_da = b_da * b_g
                        b_db += b_da
                        b_dg += b_da * (b_u * b_rstd[None, :] + b_nmr[None, :])
                    if HAS_RESIDUAL:
                        b_da += tl.load(residual_ptr + o, mask=m, other=0.0).to(ACC)
                    tl.store(dx_ptr + o, stored(b_da, dx_ptr.dtype.element_ty), mask=m)
    p_dw = dw_ptr + tl.program_id(1).to(tl.int64) * C * (K * K) + o_c * (K * K)
    for i in tl.static_range(K * K):
        tl.store(p_dw + i, tl.sum(tl.where(m, b_dw[i], 0.0), 0), mask=m_c)
    if HAS_NORM:
        p_sums = sums_ptr + tl.program_id(1).to(tl.int64) * 2 * C + o_c
        tl.store(p_sums, tl.sum(b_db, 0), mask=m_c)
        tl.store(p_sums + C, tl.sum(b_dg, 0), mask=m_c)


def depthwise_fwd(
    x: Tensor,
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

    x is [N, H, W, C], weight [C, 1, K, K]; zeros around the activated image.
    """
    n, h, w, c = x.shape
    u = torch.empty(n, out_height, out_width, c, dtype=x.dtype, device=x.device)
    tiles = walk_tiles(n, out_height, c, weight.shape[-1], stride, backward=False)
    strips = triton.cdiv(out_height, tiles["R"])
    programs = strips * triton.cdiv(n, tiles["NB"])
    partials = torch.empty(programs, 3, c, dtype=accumulator(x.dtype), device=x.device) if moments else None
    _depthwise_fwd_kernel[(triton.cdiv(c, tiles["BC"]), programs)](
        x_ptr=x,
        w_ptr=weight,
        norm_ptr=norm,
        y_ptr=u,
        partials_ptr=partials,
        N=n,
        H=h,
        W=w,
        HO=out_height,
        WO=out_width,
        STRIPS=strips,
        C=c,
        K=weight.shape[-1],
        S=stride,
        PT=pad_top,
        PL=pad_left,
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_MOMENTS=moments,
        **numeric(x.dtype),
        **tiles,
    )
    return u, partials


def window(kernel_size: int, stride: int, pad: int, span: int) -> tuple[int, int]:
    """(first, count) of the outputs that `span` inputs from a multiple of `stride` reach, relative to that multiple."""
    first = -((kernel_size - 1 - pad) // stride)
    return first, (span - 1 + pad) // stride - first + 1


def depthwise_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dv [N, H, W, C], weight gradient [C, 1, K, K], partial sums [P, 2, C] of dv and dv * xhat).

    dy is [N, HO, WO, C]; dv is the gradient at scale * x + shift, or at x itself (+ residual) where `norm` is None;
    then there are no sums.
    """
    n, h, w, c = x.shape
    k = weight.shape[-1]
    dx = torch.empty_like(x)
    tiles = walk_tiles(n, h, c, k, stride, backward=True)
    strips = triton.cdiv(h, tiles["R"])
    programs = strips * triton.cdiv(n, tiles["NB"])
    acc = accumulator(x.dtype)
    dw = torch.empty(programs, c, 1, k, k, dtype=acc, device=x.device)
    sums = None if norm is None else torch.empty(programs, 2, c, dtype=acc, device=x.device)
    top, rows = window(k, stride, pad_top, tiles["R"])
    left, columns = window(k, stride, pad_left, stride)
    _depthwise_bwd_kernel[(triton.cdiv(c, tiles["BC"]), programs)](
        dy_ptr=dy,
        x_ptr=x,
        w_ptr=weight,
        norm_ptr=norm,
        residual_ptr=residual,
        dx_ptr=dx,
        dw_ptr=dw,
        sums_ptr=sums,
        N=n,
        H=h,
        W=w,
        HO=dy.shape[1],
        WO=dy.shape[2],
        STRIPS=strips,
        C=c,
        K=k,
        S=stride,
        PT=pad_top,
        PL=pad_left,
        TOP=top,
        LEFT=left,
        ROWS=rows,
        COLUMNS=columns,
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        **numeric(x.dtype),
        **tiles,
    )
    return dx, dw.sum(0), sums
