"""BatchNorm around the convolutions: its statistics' second stage, its backward's coefficients, and elementwise passes.

y = act(scale * u + shift), scale = weight * rstd, shift = bias - mean * scale; its backward in u is affine per channel:
du = p * dv + q * (u - mean) + r. `norm` is [4, C]: mean, rstd, scale, shift; `coef` is [4, C]: p, q, r, mean. About the
mean, since q * u and what it adds to r would cancel, and leave the same error in every pixel of a channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .math import activate, activate_grad, at_least, stored, sum_rows
from .running import Running, affine, given, load_map, load_norm
from .tables import tiles as chosen
from .traffic import state
from .tuning import accumulator, cdiv, finalize_tiles, groups, numeric, row_tiles, weight_tiles


@triton.jit
def load_xhat(norm_ptr, o_c, m_c, C):
    """(rstd, -mean * rstd) of a block of channels: xhat = first * u + second."""
    b_rstd = tl.load(norm_ptr + C + o_c, mask=m_c, other=0.0)
    return b_rstd, -tl.load(norm_ptr + o_c, mask=m_c, other=0.0) * b_rstd


@triton.jit
def load_coef(coef_ptr, o_c, m_c, C):
    """p, q, r, mean of a block of channels."""
    b_p = tl.load(coef_ptr + o_c, mask=m_c, other=0.0)
    b_q = tl.load(coef_ptr + C + o_c, mask=m_c, other=0.0)
    b_r = tl.load(coef_ptr + 2 * C + o_c, mask=m_c, other=0.0)
    return b_p, b_q, b_r, tl.load(coef_ptr + 3 * C + o_c, mask=m_c, other=0.0)


@triton.jit
def store_moments(partials_ptr, row, count, mean, m2, o_c, m_c, C):
    p_out = partials_ptr + row.to(tl.int64) * 3 * C + o_c
    tl.store(p_out, count, mask=m_c)
    tl.store(p_out + C, mean, mask=m_c)
    tl.store(p_out + 2 * C, m2, mask=m_c)


@triton.jit
def merge_moments(
    partials_ptr, o_c, m_c, P, C, ACC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """(count, mean, M2) of a block of channels from P partial ones.

    Each lane merges its parts one by one: with d = mean' - mean and n' / (n + n') as a share, mean += d share and
    M2 += M2' + d^2 n share; at the end the lanes. Means are about a pivot: what all have in common takes no digits.
    """
    b_pivot = tl.load(partials_ptr + C + o_c, mask=m_c, other=0.0)
    b_n = tl.zeros((BP, BC), ACC)
    b_mean = tl.zeros((BP, BC), ACC)
    b_m2 = tl.zeros((BP, BC), ACC)
    for p0 in tl.range(0, P, BP, num_stages=STAGES):
        o_p = p0 + tl.arange(0, BP)
        m = (o_p < P)[:, None] & m_c[None, :]
        p_part = partials_ptr + o_p[:, None].to(tl.int64) * 3 * C + o_c[None, :]  # [BP, BC]
        b_more = tl.load(p_part, mask=m, other=0.0)
        b_d = tl.load(p_part + C, mask=m, other=0.0) - b_pivot[None, :] - b_mean
        b_share = b_more / at_least(b_n + b_more, 1.0)
        b_m2 += tl.load(p_part + 2 * C, mask=m, other=0.0) + b_d * b_d * b_n * b_share
        b_mean += b_d * b_share
        b_n += b_more
    b_count = sum_rows(b_n)
    b_center = sum_rows(b_n * b_mean) / at_least(b_count, 1.0)
    b_mean -= b_center[None, :]
    return b_count, b_pivot + b_center, sum_rows(b_m2 + b_n * b_mean * b_mean)


@triton.jit
def store_coef(norm_ptr, coef_ptr, o_c, m_c, C, b_dweight, b_dbias, count, BATCH: tl.constexpr):
    """Coefficients of a block of channels from the sums of dv * xhat and dv over `count` values."""
    b_p = tl.load(norm_ptr + 2 * C + o_c, mask=m_c, other=0.0)
    b_q = tl.zeros_like(b_p)
    b_r = tl.zeros_like(b_p)
    if BATCH:
        b_q = -b_p * tl.load(norm_ptr + C + o_c, mask=m_c, other=0.0) * b_dweight / count
        b_r = -b_p * b_dbias / count
    tl.store(coef_ptr + o_c, b_p, mask=m_c)
    tl.store(coef_ptr + C + o_c, b_q, mask=m_c)
    tl.store(coef_ptr + 2 * C + o_c, b_r, mask=m_c)
    tl.store(coef_ptr + 3 * C + o_c, tl.load(norm_ptr + o_c, mask=m_c, other=0.0), mask=m_c)


@kernel
@triton.jit
def _bn_finalize_kernel(
    partials_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    norm_ptr,
    P,
    C,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BATCH: tl.constexpr,
    UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    ACC: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    C = tl.multiple_of(C, ALIGN)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    if BATCH:
        b_count, b_mean, b_m2 = merge_moments(partials_ptr, o_c, m_c, P, C, ACC, BP, BC, STAGES)
        b_var = b_m2 / at_least(b_count, 1.0)
    else:
        b_mean = tl.load(running_mean_ptr + o_c, mask=m_c, other=0.0).to(ACC)
        b_var = tl.load(running_var_ptr + o_c, mask=m_c, other=1.0).to(ACC)
    if UPDATE:
        momentum = 1.0 / tl.load(tracked_ptr).to(ACC) if CUMULATIVE else tl.full((), MOMENTUM, ACC)
        b_unbiased = b_m2 / (b_count - 1.0)
        b_old = tl.load(running_mean_ptr + o_c, mask=m_c, other=0.0).to(ACC)
        b_new = b_old * (1.0 - momentum) + b_mean * momentum
        tl.store(running_mean_ptr + o_c, stored(b_new, running_mean_ptr.dtype.element_ty), mask=m_c)
        b_old = tl.load(running_var_ptr + o_c, mask=m_c, other=0.0).to(ACC)
        b_new = b_old * (1.0 - momentum) + b_unbiased * momentum
        tl.store(running_var_ptr + o_c, stored(b_new, running_var_ptr.dtype.element_ty), mask=m_c)
    b_rstd = 1.0 / tl.sqrt(b_var + tl.full((), EPS, ACC))
    b_scale, b_shift = affine(b_mean, b_rstd, weight_ptr, bias_ptr, o_c, m_c, ACC)
    tl.store(norm_ptr + o_c, b_mean, mask=m_c)
    tl.store(norm_ptr + C + o_c, b_rstd, mask=m_c)
    tl.store(norm_ptr + 2 * C + o_c, b_scale, mask=m_c)
    tl.store(norm_ptr + 3 * C + o_c, b_shift, mask=m_c)


@kernel
@triton.jit
def _bn_bwd_finalize_kernel(
    sums_ptr, norm_ptr, dw_ptr,
    dweight_ptr, dbias_ptr, coef_ptr, dw_sum_ptr,
    P, C, WIDTH, count,
    BATCH: tl.constexpr, ACC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr, BW: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = tl.multiple_of(C, ALIGN)
    blocks = (C + BC - 1) // BC
    if tl.program_id(0) < blocks:
        o_c = tl.program_id(0) * BC + tl.arange(0, BC)
        m_c = o_c < C
        b_dbias = tl.zeros((BP, BC), ACC)
        b_dweight = tl.zeros((BP, BC), ACC)
        for p0 in tl.range(0, P, BP, num_stages=STAGES):
            o_p = p0 + tl.arange(0, BP)
            m = (o_p < P)[:, None] & m_c[None, :]
            p_sums = sums_ptr + o_p[:, None].to(tl.int64) * 2 * C + o_c[None, :]  # [BP, BC]
            b_dbias += tl.load(p_sums, mask=m, other=0.0)
            b_dweight += tl.load(p_sums + C, mask=m, other=0.0)
        b_dbias, b_dweight = sum_rows(b_dbias), sum_rows(b_dweight)
        tl.store(dweight_ptr + o_c, b_dweight, mask=m_c)
        tl.store(dbias_ptr + o_c, b_dbias, mask=m_c)
        store_coef(norm_ptr, coef_ptr, o_c, m_c, C, b_dweight, b_dbias, count, BATCH)
    elif dw_ptr is not None:
        o_w = (tl.program_id(0) - blocks) * BW + tl.arange(0, BW)
        m_w = o_w < WIDTH
        b_dw = tl.zeros((BQ, BW), ACC)
        for p0 in tl.range(0, P, BQ, num_stages=STAGES):
            o_p = p0 + tl.arange(0, BQ)
            m = (o_p < P)[:, None] & m_w[None, :]
            b_dw += tl.load(dw_ptr + o_p[:, None].to(tl.int64) * WIDTH + o_w[None, :], mask=m, other=0.0)
        tl.store(dw_sum_ptr + o_w, sum_rows(b_dw), mask=m_w)


@kernel
@triton.jit
def _bn_act_fwd_kernel(
    u_ptr,
    norm_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    offset_ptr,
    keep_ptr,
    residual_ptr,
    y_ptr,
    M,
    HW,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    m = (o_m < M)[:, None] & m_c[None, :]
    o = o_m[:, None].to(tl.int64) * C + o_c[None, :]  # [BM, BC]
    o_nc = (o_m // HW)[:, None] * C + o_c[None, :]
    b_v = tl.load(u_ptr + o, mask=m, other=0.0).to(ACC)
    if HAS_NORM:
        b_scale, b_shift = load_map(norm_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_c, m_c, C, EPS, ACC)
        b_v = b_v * b_scale[None, :] + b_shift[None, :]
    b_v = activate(b_v, ACT, FAST)
    if HAS_GATE:
        b_v = b_v * tl.load(gate_ptr + o_nc, mask=m, other=0.0)
    if HAS_OFFSET:
        b_v += tl.load(offset_ptr + o_nc, mask=m, other=0.0)
    if HAS_KEEP:
        b_v = b_v * tl.load(keep_ptr + o_m // HW, mask=o_m < M, other=0.0)[:, None]
    if HAS_RESIDUAL:
        b_v += tl.load(residual_ptr + o, mask=m, other=0.0).to(ACC)
    tl.store(y_ptr + o, stored(b_v, y_ptr.dtype.element_ty), mask=m)


@kernel
@triton.jit
def _bn_act_bwd_reduce_kernel(
    dy_ptr,
    u_ptr,
    norm_ptr,
    keep_ptr,
    sums_ptr,
    M,
    HW,
    TILES,
    C: tl.constexpr,
    ACT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, C)
    b_rstd, b_nmr = load_xhat(norm_ptr, o_c, m_c, C)
    b_db = tl.zeros((BM, BC), ACC)
    b_dw = tl.zeros((BM, BC), ACC)
    for tile in range(0, TILES):
        o_m = (tl.program_id(0) * TILES + tile) * BM + tl.arange(0, BM)
        m = (o_m < M)[:, None] & m_c[None, :]
        o = o_m[:, None].to(tl.int64) * C + o_c[None, :]  # [BM, BC]
        b_d = tl.load(dy_ptr + o, mask=m, other=0.0).to(ACC)
        b_u = tl.load(u_ptr + o, mask=m, other=0.0).to(ACC)
        if HAS_KEEP:
            b_d = b_d * tl.load(keep_ptr + o_m // HW, mask=o_m < M, other=0.0)[:, None]
        if ACT != "none":
            _, b_g = activate_grad(b_u * b_scale[None, :] + b_shift[None, :], ACT, FAST)
            b_d = b_d * b_g
        b_db += b_d
        b_dw += b_d * (b_u * b_rstd[None, :] + b_nmr[None, :])
    p_out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + o_c
    tl.store(p_out, sum_rows(b_db), mask=m_c)
    tl.store(p_out + C, sum_rows(b_dw), mask=m_c)


@kernel
@triton.jit
def _bn_act_bwd_kernel(
    dy_ptr,
    u_ptr,
    norm_ptr,
    coef_ptr,
    keep_ptr,
    du_ptr,
    M,
    HW,
    C: tl.constexpr,
    ACT: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    m = (o_m < M)[:, None] & m_c[None, :]
    o = o_m[:, None].to(tl.int64) * C + o_c[None, :]  # [BM, BC]
    b_p, b_q, b_r, b_mean = load_coef(coef_ptr, o_c, m_c, C)
    b_d = tl.load(dy_ptr + o, mask=m, other=0.0).to(ACC)
    if HAS_KEEP:
        b_d = b_d * tl.load(keep_ptr + o_m // HW, mask=o_m < M, other=0.0)[:, None]
    if HAS_U:
        b_u = tl.load(u_ptr + o, mask=m, other=0.0).to(ACC)
        if ACT != "none":
            b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, C)
            b_d = b_d * activate_grad(b_u * b_scale[None, :] + b_shift[None, :], ACT, FAST)[1]
        b_du = b_p[None, :] * b_d + (b_q[None, :] * (b_u - b_mean[None, :]) + b_r[None, :])
    else:
        b_du = b_p[None, :] * b_d
    tl.store(du_ptr + o, stored(b_du, du_ptr.dtype.element_ty), mask=m)


def bn_finalize(
    partials: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
    momentum: float | None,
    update: bool,
    dtype: torch.dtype,
    channels: int,
) -> Tensor:
    """norm [4, C] from the moments' partials [P, 3, C], or from the running statistics where `partials` is None.

    With `update` the running statistics move, by `momentum` or, where that is None, to the cumulative average.
    """
    acc = accumulator(dtype)
    owner = running_mean if partials is None else partials
    assert owner is not None
    norm = torch.empty(4, channels, dtype=acc, device=owner.device)
    tiles = finalize_tiles(0 if partials is None else partials.shape[0], channels)
    _bn_finalize_kernel[(cdiv(channels, tiles["BC"]),)](
        partials_ptr=partials,
        weight_ptr=weight,
        bias_ptr=bias,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        tracked_ptr=num_batches_tracked,
        norm_ptr=norm,
        P=0 if partials is None else partials.shape[0],
        C=channels,
        EPS=eps,
        MOMENTUM=0.0 if momentum is None else momentum,
        BATCH=partials is not None,
        UPDATE=update,
        CUMULATIVE=update and momentum is None,
        ACC=numeric(dtype)["ACC"],
        **tiles,
    )
    moved = (running_mean, running_var) if update else ()
    read = (running_mean, running_var) if partials is None else moved
    tracked = num_batches_tracked if update and momentum is None else None
    state("bn_finalize", (partials, weight, bias, *read, tracked), (norm, *moved))
    return norm


def bn_bwd_finalize(
    sums: Tensor, norm: Tensor, count: int, batch_statistics: bool, dw: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor | None]:
    """(gradients of weight and bias [C], coef [4, C]) from partial sums [P, 2, C] of dv and dv * xhat.

    The third is the sum of `dw` [P, ...], a convolution's partial gradients from the same P programs: more programs of
    the same launch.
    """
    parts, _, channels = sums.shape
    d_weight, d_bias = norm.new_empty(channels), norm.new_empty(channels)
    coef = norm.new_empty(4, channels)
    dw_sum = None if dw is None else dw.new_empty(dw.shape[1:])
    width = 0 if dw_sum is None else dw_sum.numel()
    tiles = finalize_tiles(parts, channels)
    columns = weight_tiles(parts, width)
    _bn_bwd_finalize_kernel[(cdiv(channels, tiles["BC"]) + cdiv(width, columns["BW"]),)](
        sums_ptr=sums,
        norm_ptr=norm,
        dw_ptr=dw,
        dweight_ptr=d_weight,
        dbias_ptr=d_bias,
        coef_ptr=coef,
        dw_sum_ptr=dw_sum,
        P=parts,
        C=channels,
        WIDTH=width,
        count=count,
        BATCH=batch_statistics,
        ACC=numeric(norm.dtype)["ACC"],
        **columns,
        **tiles,
    )
    state("bn_bwd_finalize", (sums, norm, dw), (d_weight, d_bias, coef, dw_sum))
    return (d_weight, d_bias), coef, dw_sum


def bn_act_fwd(
    u: Tensor,
    norm: Tensor | Running | None,
    gate: Tensor | None,
    offset: Tensor | None,
    keep: Tensor | None,
    residual: Tensor | None,
    activation: str,
    y: Tensor | None = None,
) -> Tensor:
    """(act(scale * u + shift) * gate[n, c] + offset[n, c]) * keep[n] + residual, each part optional; [N, H, W, C]."""
    n, h, w, c = u.shape
    vectors, bn = (None, norm.tensors) if isinstance(norm, Running) else (norm, ())
    y = torch.empty_like(u) if y is None else y
    parts = dict(norm=norm, gate=gate, offset=offset, keep=keep, residual=residual)
    traits = {name: part is not None for name, part in parts.items()}
    tiles = chosen("bn_act_fwd", u, row_tiles, (n * h * w, c), activation=activation, **traits)
    _bn_act_fwd_kernel[(cdiv(n * h * w, tiles["BM"]), cdiv(c, tiles["BC"]))](
        u_ptr=u,
        norm_ptr=vectors,
        **given(norm),
        gate_ptr=gate,
        offset_ptr=offset,
        keep_ptr=keep,
        residual_ptr=residual,
        y_ptr=y,
        M=n * h * w,
        HW=h * w,
        C=c,
        ACT=activation,
        HAS_NORM=norm is not None,
        HAS_GATE=gate is not None,
        HAS_OFFSET=offset is not None,
        HAS_KEEP=keep is not None,
        HAS_RESIDUAL=residual is not None,
        **numeric(u.dtype),
        **tiles,
    )
    state("bn_act_fwd", (u, vectors, *bn, gate, offset, keep, residual), (y,))
    return y


def bn_act_bwd_reduce(dy: Tensor, u: Tensor, norm: Tensor, keep: Tensor | None, activation: str) -> Tensor:
    """Partial sums [P, 2, C] of dv and dv * xhat, dv = dy * keep[n] * act'(scale * u + shift)."""
    n, h, w, c = u.shape
    tiles = chosen("bn_act_bwd_reduce", u, row_tiles, (n * h * w, c), activation=activation, keep=keep is not None)
    rows, columns = cdiv(n * h * w, tiles["BM"]), cdiv(c, tiles["BC"])
    per_program = groups(rows, columns)
    programs = cdiv(rows, per_program)
    sums = torch.empty(programs, 2, c, dtype=norm.dtype, device=u.device)
    _bn_act_bwd_reduce_kernel[(programs, columns)](
        dy_ptr=dy,
        u_ptr=u,
        norm_ptr=norm,
        keep_ptr=keep,
        sums_ptr=sums,
        M=n * h * w,
        HW=h * w,
        TILES=per_program,
        C=c,
        ACT=activation,
        HAS_KEEP=keep is not None,
        **numeric(u.dtype),
        **tiles,
    )
    state("bn_act_bwd_reduce", (dy, u, norm, keep), (sums,))
    return sums


def bn_act_bwd(
    dy: Tensor, u: Tensor | None, norm: Tensor | None, coef: Tensor, keep: Tensor | None, activation: str
) -> Tensor:
    """du = p * dy * keep[n] * act'(scale * u + shift) + q * (u - mean) + r; without u, p * dy * keep[n].

    `norm` is for the activation alone.
    """
    n, h, w, c = dy.shape
    du = torch.empty_like(dy)
    traits = dict(activation=activation, keep=keep is not None, u=u is not None)
    tiles = chosen("bn_act_bwd", dy, row_tiles, (n * h * w, c), **traits)
    _bn_act_bwd_kernel[(cdiv(n * h * w, tiles["BM"]), cdiv(c, tiles["BC"]))](
        dy_ptr=dy,
        u_ptr=u,
        norm_ptr=norm,
        coef_ptr=coef,
        keep_ptr=keep,
        du_ptr=du,
        M=n * h * w,
        HW=h * w,
        C=c,
        ACT=activation,
        HAS_U=u is not None,
        HAS_KEEP=keep is not None,
        **numeric(dy.dtype),
        **tiles,
    )
    state("bn_act_bwd", (dy, u, norm, coef, keep), (du,))
    return du
