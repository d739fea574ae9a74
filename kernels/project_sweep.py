"""The backward sweep: one pass over (dy, u3, u2) gives all sums of the block's backward and dW of the project conv.

Per image, T = du3^T [a | act' | act' * xhat2] has the image's pixels as its reduced dimension, so the tensor cores do
the reductions: the sum over o of W[o, c] * T[o, c] is the sum over pixels of da3 * (...), da3 = du3 W, and gate * T_a
adds up to dW. No da3 is formed. A product with ones gives the plain sums of act' and act' * xhat2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_xhat
from .launching import kernel
from .math import INTERPRETED, activate_grad, dot, first_row
from .pointwise import load_grad
from .project_wide import COLUMNS, _project_wide_kernel, images_of_a_program, takes, wide_tiles
from .running import load_norm
from .tables import tiles as chosen
from .traffic import state, summed
from .tuning import MIN_DOT, cdiv, groups, numeric, pow2, precision


@kernel
@triton.jit
def _project_sweep_kernel(
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
    BM: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_o = tl.program_id(1) * BO + tl.arange(0, BO)
    m_c, m_o = o_c < CI, o_o < CO
    DTYPE: tl.constexpr = u2_ptr.dtype.element_ty
    ROWS: tl.constexpr = 5 if HAS_GATE else 2
    b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, CI)
    b_rstd, b_nmr = load_xhat(norm_ptr, o_c, m_c, CI)
    m_w = m_o[:, None] & m_c[None, :]
    b_w = tl.load(w_ptr + o_o[:, None] * CI + o_c[None, :], mask=m_w, other=0.0).to(ACC)  # [BO, BC]
    b_dw = tl.zeros((BO, BC), ACC)
    o_one = tl.zeros((16, 1), tl.int32)
    for i in range(0, IMAGES):
        n = tl.program_id(2) * IMAGES + i
        if n < N:
            t_act = tl.zeros((BO, BC), ACC)
            t_der = tl.zeros((BO, BC), ACC)
            t_hat = tl.zeros((BO, BC), ACC)
            s_der = tl.zeros((16, BC), ACC)
            s_hat = tl.zeros((16, BC), ACC)
            for m0 in range(0, HW, BM):
                o_p = m0 + tl.arange(0, BM)
                m_p = o_p < HW
                o_m = n * HW + o_p
                b_du = load_grad(dy_ptr, u3_ptr, coef_ptr, keep_ptr, o_m, m_p, o_o, HW, CO, HAS_KEEP, ACC)
                b_du = tl.trans(tl.where(m_p[:, None], b_du, 0.0))  # [BO, BM]
                m = m_p[:, None] & m_c[None, :]
                b_u = tl.load(u2_ptr + o_m[:, None].to(tl.int64) * CI + o_c[None, :], mask=m, other=0.0).to(ACC)
                b_a, b_g = activate_grad(b_u * b_scale[None, :] + b_shift[None, :], ACT, FAST)
                b_h = b_g * (b_u * b_rstd[None, :] + b_nmr[None, :])
                t_act = dot(b_du, b_a, t_act, DTYPE, PRECISION)
                t_der = dot(b_du, b_g, t_der, DTYPE, PRECISION)
                t_hat = dot(b_du, b_h, t_hat, DTYPE, PRECISION)
                if HAS_GATE and tl.program_id(1) == 0:
                    b_one = tl.where(o_p[None, :] + o_one < HW, 1.0, 0.0).to(ACC)  # [16, BM], equal rows
                    s_der = dot(b_one, b_g, s_der, DTYPE, PRECISION)
                    s_hat = dot(b_one, b_h, s_hat, DTYPE, PRECISION)
            p_out = sums_ptr + (tl.program_id(1) * N + n).to(tl.int64) * ROWS * CI + o_c
            tl.store(p_out, tl.sum(t_der * b_w, 0), mask=m_c)
            tl.store(p_out + CI, tl.sum(t_hat * b_w, 0), mask=m_c)
            if HAS_GATE:
                tl.store(p_out + 2 * CI, tl.sum(t_act * b_w, 0), mask=m_c)
                tl.store(p_out + 3 * CI, first_row(s_der, 16), mask=m_c)
                tl.store(p_out + 4 * CI, first_row(s_hat, 16), mask=m_c)
                t_act = t_act * tl.load(gate_ptr + n * CI + o_c, mask=m_c, other=0.0)[None, :]
            b_dw += t_act
    o = (tl.program_id(2) * CO + o_o[:, None]) * CI + o_c[None, :]
    tl.store(dw_ptr + o, b_dw, mask=m_w)


def sweep_tiles(pixels: int, out: int, channels: int) -> dict[str, int]:
    """[BO outputs x BC channels] accumulators over tiles of BM pixels.

    32 outputs a program, 64 where images are so small that the sums of each part weigh more than instructions.
    """
    if INTERPRETED:
        return dict(BM=pow2(pixels, MIN_DOT, 1024), BO=pow2(out, MIN_DOT, 256), BC=pow2(channels, MIN_DOT, 256))
    rows = pow2(out, MIN_DOT, 32 if pixels >= 100 else 64)
    wide = cdiv(channels, 128) * 128 <= cdiv(channels, 64) * 70
    block = pow2(channels, MIN_DOT, 128 if wide and rows <= 32 else 64)
    return dict(BM=32, BO=rows, BC=block, num_warps=8 if rows * block > 2048 else 4, num_stages=2)


def project_sweep(
    dy: Tensor,
    u3: Tensor,
    coef: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    u2: Tensor,
    norm: Tensor,
    gate: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(sums [OB, N, 5, CI] with a gate, [OB, N, 2, CI] without; project weight gradient [CO, CI, 1, 1]).

    dy and u3 are [N, H, W, CO], u2 is [N, H, W, CI]; du3 = p * (dy * keep[n]) + q * u3 + r by `coef` [3, CO].
    """
    n, h, w, out = dy.shape
    channels = u2.shape[3]
    given = (dy, u3, coef, keep, weight, u2, norm, gate)
    traits = dict(images=n, activation=activation, keep=keep is not None, gate=gate is not None)
    wide = takes(h * w, out, dy.dtype)
    if wide:
        tiles = chosen("project_wide", dy, wide_tiles, (h * w, out, channels, dy.dtype), **traits)
        tiles = tiles | dict(COLUMNS=COLUMNS)
    else:
        tiles = chosen("project_sweep", dy, sweep_tiles, (h * w, out, channels), **traits)
    columns, parts = cdiv(channels, tiles["BC"]), cdiv(out, tiles["BO"] * tiles.get("TILES", 1))
    images = images_of_a_program(n, columns * parts, dy.device) if wide else groups(n, columns * parts, programs=256)
    programs = cdiv(n, images)
    sums = torch.empty(parts, n, 2 if gate is None else 5, channels, dtype=norm.dtype, device=dy.device)
    dw = torch.empty(programs, out, channels, dtype=norm.dtype, device=dy.device)
    (_project_wide_kernel if wide else _project_sweep_kernel)[(columns, parts, programs)](
        dy_ptr=dy,
        u3_ptr=u3,
        coef_ptr=coef,
        keep_ptr=keep,
        w_ptr=weight,
        u2_ptr=u2,
        norm_ptr=norm,
        gate_ptr=gate,
        sums_ptr=sums,
        dw_ptr=dw,
        N=n,
        HW=h * w,
        IMAGES=images,
        CI=channels,
        CO=out,
        ACT=activation,
        HAS_KEEP=keep is not None,
        HAS_GATE=gate is not None,
        PRECISION=precision(dy.dtype),
        **numeric(dy.dtype),
        **tiles,
    )
    state("project_wide" if wide else "project_sweep", given, (sums, dw))
    return sums, summed(dw).reshape(out, channels, 1, 1)
