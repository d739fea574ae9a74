"""Squeeze-and-excitation forward, behind the pool: reduce, act, expand, gate. Its backward: excite_backward.py.

p[n, c] = mean of a = act(scale * u + shift); z = act(Wr p + br); gate = sigmoid(Wx z + bx), or a
hard sigmoid. Per image and channel the backward needs five sums over pixels. Two need no gradient, so pool.py takes
them: its `sums` [P, N, 3, C], over P parts of each image, are those of 0 a, 1 act', 2 act' * xhat, of which `act_sums`
[N, 2, C] is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .math import INTERPRETED, activate, dot, gate_of, stored, sum_rows
from .traffic import state
from .tuning import MIN_DOT, PROGRAMS, cdiv, numeric, pow2

AT_ONCE = 16  # parts of a product that are read together
WHOLE_WEIGHT = 32768  # elements: more of them take longer to read for each image than a second launch
FEW_IMAGES = 32  # without gradients; fewer are taken to wait for the host, not for the GPU (not measured)


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
    gate_ptr, wx_ptr, bx_ptr, b_r, n, C, R: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
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
        tl.store(gate_ptr + n * C + o_c, gate_of(b_q, GATE), mask=o_c < C)


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
    GATE: tl.constexpr,
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
    store_gate(gate_ptr, wx_ptr, bx_ptr, b_r, n, C, R, ACT, GATE, ACC, BR, BC)


@triton.jit
def load_sums(
    sums_ptr, o_n, row, o_c, m, N, P, C, ROWS: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """[BN, BC]: one of the sums of a block of images, their P parts added one by one."""
    b_s = tl.zeros((BN, BC), ACC)
    for p in range(P):
        p_sum = sums_ptr + ((p * N + o_n) * ROWS + row).to(tl.int64)[:, None] * C + o_c[None, :]
        b_s += tl.load(p_sum, mask=m, other=0.0)
    return b_s


@triton.jit
def store_products(
    parts_ptr, part, weight_ptr, b_v, o_n, o_c, N, R: tl.constexpr, C, stride_c, stride_r, ACC: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A part [N, R] of v [BN, BC] times a weight of C by R, which has these strides: its BC channels alone."""
    for r0 in range(0, R, BR):
        o_r = r0 + tl.arange(0, BR)
        m_w = (o_c < C)[:, None] & (o_r < R)[None, :]
        p_w = weight_ptr + o_c[:, None] * stride_c + o_r[None, :] * stride_r
        b_w = tl.load(p_w, mask=m_w, other=0.0).to(ACC)  # [BC, BR]
        b_y = dot(b_v, b_w, tl.zeros((BN, BR), ACC), ACC, "ieee")
        p_out = parts_ptr + (part * N + o_n).to(tl.int64)[:, None] * R + o_r[None, :]
        tl.store(p_out, b_y, mask=(o_n < N)[:, None] & (o_r < R)[None, :])


@triton.jit
def load_parts(
    parts_ptr, o_n, o_r, m, N, PARTS, R: tl.constexpr, AT_ONCE: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """[BN, BR]: what `store_products` left, its parts added one by one; AT_ONCE of them are on their way."""
    b_s = tl.zeros((BN, BR), ACC)
    for s0 in range(0, PARTS, AT_ONCE):
        for s in tl.static_range(AT_ONCE):
            o_s = (s0 + s) * N + o_n
            p_part = parts_ptr + o_s.to(tl.int64)[:, None] * R + o_r[None, :]
            b_s += tl.load(p_part, mask=(o_s < PARTS * N)[:, None] & m, other=0.0)
    return b_s


@kernel
@triton.jit
def _excite_reduce_kernel(
    sums_ptr,
    wr_ptr,
    p_ptr,
    act_sums_ptr,
    parts_ptr,
    N,
    HW,
    P,
    C: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m = (o_n < N)[:, None] & (o_c < C)[None, :]
    o_nc = o_n[:, None] * C + o_c[None, :]  # [BN, BC]
    b_p = load_sums(sums_ptr, o_n, 0, o_c, m, N, P, C, ROWS, ACC, BN, BC) / HW
    if p_ptr is not None:  # as in _excite_fwd_kernel
        b_p = stored(b_p, p_ptr.dtype.element_ty)
        tl.store(p_ptr + o_nc, b_p, mask=m)
    store_products(parts_ptr, tl.program_id(1), wr_ptr, b_p.to(ACC), o_n, o_c, N, R, C, 1, C, ACC, BN, BR)
    if act_sums_ptr is not None:
        for row in tl.static_range(1, 3):
            b_s = load_sums(sums_ptr, o_n, row, o_c, m, N, P, C, ROWS, ACC, BN, BC)
            tl.store(act_sums_ptr + o_nc + (o_n[:, None] + row - 1) * C, b_s, mask=m)


@kernel
@triton.jit
def _excite_expand_kernel(
    parts_ptr,
    br_ptr,
    wx_ptr,
    bx_ptr,
    r_ptr,
    gate_ptr,
    N,
    PARTS,
    C: tl.constexpr,
    R: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    b_q = tl.zeros((BN, BC), ACC)
    for r0 in range(0, R, BR):
        o_r = r0 + tl.arange(0, BR)
        m_w = (o_r < R)[:, None] & (o_c < C)[None, :]
        b_w = tl.load(wx_ptr + o_c[None, :] * R + o_r[:, None], mask=m_w, other=0.0).to(ACC)  # [BR, BC]
        b_bias = tl.load(br_ptr + o_r, mask=o_r < R, other=0.0).to(ACC)
        m = (o_n < N)[:, None] & (o_r < R)[None, :]
        b_r = load_parts(parts_ptr, o_n, o_r, m, N, PARTS, R, AT_ONCE, ACC, BN, BR) + b_bias[None, :]
        if r_ptr is not None and tl.program_id(1) == 0:
            tl.store(r_ptr + o_n[:, None] * R + o_r[None, :], b_r, mask=m)
        b_q = dot(activate(b_r, ACT, False), b_w, b_q, ACC, "ieee")
    b_q += tl.load(bx_ptr + o_c, mask=o_c < C, other=0.0).to(ACC)[None, :]
    m = (o_n < N)[:, None] & (o_c < C)[None, :]
    tl.store(gate_ptr + o_n[:, None] * C + o_c[None, :], gate_of(b_q, GATE), mask=m)


def excite_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """[BR, BC]: all reduced channels and a step's others; training and inference."""
    rows = pow2(reduced, MIN_DOT, 1024)
    if INTERPRETED:
        return dict(BR=rows, BC=pow2(channels, MIN_DOT, 1024))
    few = images < PROGRAMS  # one wave or less: what counts is how long an image takes, and so its number of steps
    block = max(MIN_DOT, min((32768 if few else 4096) // rows, 256))
    return dict(BR=rows, BC=pow2(channels, MIN_DOT, block), num_warps=8 if few else 4)


def parts_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """[BN images, BR reduced channels a step, BC channels] of a program that leaves a part of a product.

    Of many channels it takes more where registers allow: what adds up the parts waits for AT_ONCE of them together.
    """
    if INTERPRETED:
        return dict(BN=pow2(images, MIN_DOT, 64), BR=pow2(reduced, MIN_DOT, 1024), BC=pow2(channels, MIN_DOT, 1024))
    few = channels <= (64 if reduced <= 64 else 128) * AT_ONCE
    rows, block = pow2(reduced, MIN_DOT, 64), pow2(channels, MIN_DOT, 64 if few else 128)
    return dict(BN=MIN_DOT, BR=rows, BC=block, num_warps=max(2, rows * block // 1024), num_stages=1)


def expand_tiles(images: int, channels: int, reduced: int) -> dict[str, int]:
    """[BN images, BR reduced channels a step, BC channels], 4 to 8 values a thread of the parts that it adds up."""
    if INTERPRETED:
        return dict(BN=pow2(images, MIN_DOT, 64), BR=pow2(reduced, MIN_DOT, 1024), BC=pow2(channels, MIN_DOT, 1024))
    rows = pow2(reduced, MIN_DOT, 128)
    return dict(BN=MIN_DOT, BR=rows, BC=pow2(channels, MIN_DOT, 64), num_warps=max(1, rows // 16), num_stages=1)


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
    gate_function: str,
    kept: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Tensor]:
    """(what the backward needs, gate [N, C]) of images with the pool's `sums` [P, N, ROWS, C], activations in row 0.

    With activations of dtype `kept` the backward needs (mean [N, C] in that dtype; the sums of rows 1 and 2, [N, 2, C],
    empty without them; pre-activation of the reduced vector [N, R]). Without `kept` None. `gate_function` is "sigmoid"
    or "hardsigmoid".
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
    # Without gradients and with few images a block keeps to four launches.
    if c * reduced > WHOLE_WEIGHT and (saved is not None or n >= FEW_IMAGES):
        _reduce_and_expand(
            sums, pixels, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate_function, pooled,
            act_sums, r, gate,
        )  # fmt: skip
        return saved, gate
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
        GATE=gate_function,
        ROWS=rows,
        ACC=numeric(sums.dtype)["ACC"],
        BP=added_parts(parts),
        **excite_tiles(n, c, reduced),
    )
    state("excite_fwd", (sums, reduce_weight, reduce_bias, expand_weight, expand_bias), (pooled, act_sums, r, gate))
    return saved, gate


def _reduce_and_expand(
    sums: Tensor,
    pixels: int,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: str,
    gate_function: str,
    pooled: Tensor | None,
    act_sums: Tensor | None,
    r: Tensor | None,
    gate: Tensor,
) -> None:
    """The same in two launches: a program takes some of a weight's channels for many images, not all for one."""
    part_count, n, rows, c = sums.shape
    reduced = reduce_weight.shape[0]
    acc = numeric(sums.dtype)["ACC"]
    tiles = parts_tiles(n, c, reduced)
    grid = cdiv(n, tiles["BN"]), cdiv(c, tiles["BC"])
    parts = sums.new_empty(grid[1], n, reduced)
    _excite_reduce_kernel[grid](
        sums_ptr=sums,
        wr_ptr=reduce_weight,
        p_ptr=pooled,
        act_sums_ptr=act_sums if rows == 3 else None,
        parts_ptr=parts,
        N=n,
        HW=pixels,
        P=part_count,
        C=c,
        R=reduced,
        ROWS=rows,
        ACC=acc,
        **tiles,
    )
    state("excite_reduce", (sums, reduce_weight), (pooled, act_sums if rows == 3 else None, parts))
    tiles = expand_tiles(n, c, reduced)
    _excite_expand_kernel[(cdiv(n, tiles["BN"]), cdiv(c, tiles["BC"]))](
        parts_ptr=parts,
        br_ptr=reduce_bias,
        wx_ptr=expand_weight,
        bx_ptr=expand_bias,
        r_ptr=r,
        gate_ptr=gate,
        N=n,
        C=c,
        R=reduced,
        ACT=activation,
        GATE=gate_function,
        PARTS=len(parts),
        AT_ONCE=AT_ONCE,
        ACC=acc,
        **tiles,
    )
    state("excite_expand", (parts, reduce_bias, expand_weight, expand_bias), (r, gate))
