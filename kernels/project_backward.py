"""Backward of act, gate and project convolution: from du3 to du2, with the sums that both need on the way.

With da3 = du3 Wp and v = scale u2 + shift, per image and channel the sums over pixels of
    0 da3 act'(v)    1 da3 act'(v) xhat2    2 da3 act(v), where there is a gate,
and then, with a gate's gradient and BatchNorm's coefficients made of them,
    du2 = p (da3 gate + offset) act'(v) + q (u2 - mean) + r,    a3 = act(v) gate,    dWp = du3^T a3.

Two forms, chosen by shape (`form_tiles`). Resident, for large images and few outputs: a program stays in one image and
one block of channels, so gate, offset and coefficients are vectors and Wp stays in shared memory; da3 is made in
registers, and dWp adds up there. Else da3 and dWp are products by the library, and what lies between is elementwise:
more passes, each at memory's speed.

    a program:   BC channels of one image, PIXELS of its pixels          grid: (blocks of channels x images x parts,)
    a step:      du3 [BM, CO] x Wp [CO, BC] -> da3 [BM, BC], beside u2 [BM, BC];   STAGES - 1 steps are on their way
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import load_coef, load_xhat
from .launching import kernel
from .library import cast, multiply, multiply_pixels
from .math import INTERPRETED, activate_grad_halved, dot, halved, stored, sum_rows
from .running import load_norm
from .tables import parts_of_image
from .tables import tiles as chosen
from .traffic import state, summed
from .tuning import MIN_DOT, cdiv, multiplies_fast, numeric, pow2

LARGE_IMAGE = 512  # pixels: below it the parts of dWp, one an image, weigh more than the passes that they save
FEW_OUTPUTS = 64  # more do not fit the registers beside the rest


@triton.jit
def locate(N, HW, PIXELS, C: tl.constexpr, BC: tl.constexpr):
    """(channels [BC], image, its first pixel and the end of its pixels, number of the part) of this program."""
    columns: tl.constexpr = (C + BC - 1) // BC
    o_c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    part = tl.program_id(0) // columns
    first = part // N * PIXELS
    return o_c, part % N, first, tl.minimum(first + PIXELS, HW), part


@triton.jit
def load_weight(w_ptr, o_c, m_c, CI: tl.constexpr, CO: tl.constexpr, BO: tl.constexpr, DTYPE: tl.constexpr):
    """Wp [CO, BC] of a block of channels, as [BO, BC] tiles; the compiler keeps them in shared memory."""
    w = ()
    for j in tl.static_range((CO + BO - 1) // BO):
        o_o = j * BO + tl.arange(0, BO)
        m = (o_o < CO)[:, None] & m_c[None, :]
        w = w + (stored(tl.load(w_ptr + o_o[:, None] * CI + o_c[None, :], mask=m, other=0.0), DTYPE),)
    return w


@triton.jit
def load_product(
    da_ptr, du_ptr, w, pixel, m_p, o_c, m_c, CI: tl.constexpr, CO: tl.constexpr, RESIDENT: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da3 [BM, BC] of BM pixels from `pixel` on, read or made; and the tiles of du3 [BM, BO] that it was made of."""
    o_p = tl.arange(0, BM)
    du = ()
    if RESIDENT:
        b_da = tl.zeros((BM, BC), ACC)
        p_du = du_ptr + pixel.to(tl.int64) * CO
        for j in tl.static_range((CO + BO - 1) // BO):
            o_o = j * BO + tl.arange(0, BO)
            m = m_p[:, None] & (o_o < CO)[None, :]
            b_du = tl.load(p_du + (o_p[:, None] * CO + o_o[None, :]), mask=m, other=0.0)  # [BM, BO]
            b_da = dot(b_du, w[j], b_da, du_ptr.dtype.element_ty, "ieee")
            du = du + (b_du,)
    else:
        p_da = da_ptr + pixel.to(tl.int64) * CI
        o = o_p[:, None] * CI + o_c[None, :]
        b_da = tl.load(p_da + o, mask=m_p[:, None] & m_c[None, :], other=0.0).to(ACC)
    return b_da, du


@kernel
@triton.jit
def _project_bwd_sums_kernel(
    da_ptr,
    du_ptr,
    w_ptr,
    u2_ptr,
    norm_ptr,
    sums_ptr,
    N,
    HW,
    PIXELS,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = 3 if HAS_GATE else 2
    o_c, n, first, end, part = locate(N, HW, PIXELS, CI, BC)
    m_c = o_c < CI
    w = ()
    if RESIDENT:
        w = load_weight(w_ptr, o_c, m_c, CI, CO, BO, u2_ptr.dtype.element_ty)
    b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, CI)
    b_scale, b_shift = halved(b_scale, ACT, FAST)[None, :], halved(b_shift, ACT, FAST)[None, :]
    b_rstd, b_nmr = load_xhat(norm_ptr, o_c, m_c, CI)
    # Sums stay in their lanes to the end: shorter chains of additions, and one reduction a program.
    s_db = tl.zeros((BM, BC), ACC)
    s_dg = tl.zeros((BM, BC), ACC)
    s_gate = tl.zeros((BM, BC), ACC)
    o = tl.arange(0, BM)[:, None] * CI + o_c[None, :]  # [BM, BC]
    for m0 in tl.range(first, end, BM, num_stages=STAGES):
        m_p = m0 + tl.arange(0, BM) < end
        p_u = u2_ptr + (n * HW + m0).to(tl.int64) * CI
        b_u = tl.load(p_u + o, mask=m_p[:, None] & m_c[None, :], other=0.0).to(ACC)
        b_da, _ = load_product(da_ptr, du_ptr, w, n * HW + m0, m_p, o_c, m_c, CI, CO, RESIDENT, ACC, BM, BO, BC)
        b_a, b_g = activate_grad_halved(b_u * b_scale + b_shift, ACT, FAST)
        b_dv = b_da * b_g
        s_db += b_dv
        s_dg += b_dv * (b_u * b_rstd[None, :] + b_nmr[None, :])
        if HAS_GATE:
            s_gate += b_da * b_a
    p_out = sums_ptr + part.to(tl.int64) * ROWS * CI + o_c
    tl.store(p_out, sum_rows(s_db), mask=m_c)
    tl.store(p_out + CI, sum_rows(s_dg), mask=m_c)
    if HAS_GATE:
        tl.store(p_out + 2 * CI, sum_rows(s_gate), mask=m_c)


@kernel
@triton.jit
def _project_bwd_data_kernel(
    da_ptr,
    du_ptr,
    w_ptr,
    u2_ptr,
    norm_ptr,
    coef_ptr,
    gate_ptr,
    offset_ptr,
    du2_ptr,
    a3_ptr,
    dw_ptr,
    N,
    HW,
    PIXELS,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_DW: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    DTYPE: tl.constexpr = u2_ptr.dtype.element_ty
    TILES: tl.constexpr = (CO + BO - 1) // BO
    o_c, n, first, end, part = locate(N, HW, PIXELS, CI, BC)
    m_c = o_c < CI
    w = ()
    dw = ()
    if RESIDENT:
        w = load_weight(w_ptr, o_c, m_c, CI, CO, BO, DTYPE)
        for _ in tl.static_range(TILES):
            dw = dw + (tl.zeros((BO, BC), ACC),)
    b_scale, b_shift = load_norm(norm_ptr, o_c, m_c, CI)
    b_scale, b_shift = halved(b_scale, ACT, FAST)[None, :], halved(b_shift, ACT, FAST)[None, :]
    b_p, b_q, b_r, b_mean = load_coef(coef_ptr, o_c, m_c, CI)
    b_add = tl.zeros_like(b_p)
    b_gate = tl.full(b_p.shape, 1.0, ACC)
    if HAS_GATE:
        b_gate = tl.load(gate_ptr + n * CI + o_c, mask=m_c, other=0.0)
        b_add = b_p * tl.load(offset_ptr + n * CI + o_c, mask=m_c, other=0.0)
        b_p = b_p * b_gate
    o = tl.arange(0, BM)[:, None] * CI + o_c[None, :]  # [BM, BC]
    for m0 in tl.range(first, end, BM, num_stages=STAGES):
        m_p = m0 + tl.arange(0, BM) < end
        m = m_p[:, None] & m_c[None, :]
        at = (n * HW + m0).to(tl.int64) * CI
        b_u = tl.load(u2_ptr + at + o, mask=m, other=0.0).to(ACC)
        b_da, du = load_product(da_ptr, du_ptr, w, n * HW + m0, m_p, o_c, m_c, CI, CO, RESIDENT, ACC, BM, BO, BC)
        b_a, b_g = activate_grad_halved(b_u * b_scale + b_shift, ACT, FAST)
        b_a = b_a * b_gate[None, :]
        b_dv = (b_da * b_p[None, :] + b_add[None, :]) * b_g
        b_du2 = b_dv + ((b_u - b_mean[None, :]) * b_q[None, :] + b_r[None, :])
        tl.store(du2_ptr + at + o, stored(b_du2, DTYPE), mask=m)
        if HAS_DW:
            if RESIDENT:
                added = ()
                for j in tl.static_range(TILES):
                    added = added + (dot(tl.trans(du[j]), b_a, dw[j], DTYPE, "ieee"),)  # [BO, BC]
                dw = added
            else:
                tl.store(a3_ptr + at + o, stored(b_a, DTYPE), mask=m)
    if HAS_DW and RESIDENT:
        p_dw = dw_ptr + part.to(tl.int64) * CO * CI
        for j in tl.static_range(TILES):
            o_o = j * BO + tl.arange(0, BO)
            m = (o_o < CO)[:, None] & m_c[None, :]
            tl.store(p_dw + o_o[:, None] * CI + o_c[None, :], dw[j], mask=m)


def form_tiles(pixels: int, out: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """RESIDENT 1: Wp in shared memory; 0: products by the library, as for float32, which has no fast one of ours."""
    return dict(RESIDENT=int(multiplies_fast(dtype) and pixels >= LARGE_IMAGE and out <= FEW_OUTPUTS))


def project_tiles(pixels: int, out: int, channels: int, resident: int) -> dict[str, int]:
    """[BM pixels, BC channels] a step, BO outputs a tile of the weight."""
    if INTERPRETED:
        sides = dict(BO=pow2(out, MIN_DOT, 256), BC=pow2(channels, MIN_DOT, 256))
        return dict(BM=pow2(pixels, MIN_DOT, 1024), **sides, STAGES=1)
    # 32 pixels make mma.sync of a product, with half of wgmma's registers: more programs wait side by side.
    block = pow2(channels, MIN_DOT, 64)
    return dict(BM=32, BO=pow2(out, MIN_DOT, 64), BC=block, STAGES=3, num_warps=4 if block > 32 else 2)


def sums_tiles(pixels: int, out: int, channels: int, resident: int) -> dict[str, int]:
    """As of `project_tiles`; without a product one warp, whose sums meet without a barrier."""
    tiles = project_tiles(pixels, out, channels, resident)
    return tiles if INTERPRETED or resident else tiles | dict(BM=16, num_warps=1)


def is_resident(u2: Tensor, weight: Tensor) -> bool:
    """Whether the project convolution's weight stays in shared memory on the way from du3 to u2 [N, H, W, CI]."""
    n, h, w, channels = u2.shape
    shape = (h * w, weight.shape[0], channels, u2.dtype)
    return bool(chosen("project_bwd", u2, form_tiles, shape, images=n)["RESIDENT"])


def multiply_weight(du: Tensor, weight: Tensor) -> Tensor:
    """da3 [N, H, W, CI] = du3 Wp, by the library, of du3 [N, H, W, CO] and the weight [CO, CI, 1, 1]."""
    return multiply(du, cast(weight, du.dtype))


def project_bwd_sums(
    da: Tensor | None, du: Tensor, weight: Tensor, u2: Tensor, norm: Tensor, gate: Tensor | None, activation: str
) -> Tensor:
    """[P, N, 3, CI] with a gate [N, CI], [P, N, 2, CI] without: the sums over P parts of each image.

    From da3 where there is one, else from du3 and the weight, which is then resident.
    """
    n, _, _, channels = u2.shape
    tiles, parts, pixels = _tiles("project_bwd_sums", sums_tiles, da, du, u2, gate, activation)
    rows = 2 if gate is None else 3
    sums = torch.empty(parts, n, rows, channels, dtype=norm.dtype, device=u2.device)
    given = _operands(da, du, weight, u2, norm, gate, activation)
    _project_bwd_sums_kernel[(parts * n * cdiv(channels, tiles["BC"]),)](**given, PIXELS=pixels, sums_ptr=sums, **tiles)
    state("project_bwd_sums", (da, *((du, weight) if da is None else ()), u2, norm), (sums,))
    return sums


def project_bwd_data(
    da: Tensor | None,
    du: Tensor,
    weight: Tensor,
    u2: Tensor,
    norm: Tensor,
    coef: Tensor,
    gate: Tensor | None,
    offset: Tensor | None,
    activation: str,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """(du2 [N, H, W, CI], dWp [CO, CI, 1, 1] if asked) by BatchNorm's coef [4, CI].

    `offset` [N, CI] is the pool's gradient. du2 takes da3's place where there is one: who writes an element is the only
    one to have read it.
    """
    n, _, _, channels = u2.shape
    out = weight.shape[0]
    tiles, parts, pixels = _tiles("project_bwd_data", project_tiles, da, du, u2, gate, activation)
    du2 = torch.empty_like(u2) if da is None else da
    a3 = torch.empty_like(u2) if da is not None and weight_gradient else None
    dw = norm.new_empty(parts * n, out, channels) if da is None and weight_gradient else None
    _project_bwd_data_kernel[(parts * n * cdiv(channels, tiles["BC"]),)](
        **_operands(da, du, weight, u2, norm, gate, activation),
        PIXELS=pixels,
        coef_ptr=coef,
        gate_ptr=gate,
        offset_ptr=offset,
        du2_ptr=du2,
        a3_ptr=a3,
        dw_ptr=dw,
        HAS_DW=weight_gradient,
        **tiles,
    )
    read = (da, *((du, weight) if da is None else ()), u2, norm, coef, gate, offset)
    state("project_bwd_data", read, (du2, a3, dw))
    if a3 is not None:
        return du2, multiply_pixels(du, a3).view(weight.shape)
    return du2, None if dw is None else summed(dw).view(weight.shape)


def _tiles(
    kernel: str,
    formula: Callable[..., dict[str, int]],
    da: Tensor | None,
    du: Tensor,
    u2: Tensor,
    gate: Tensor | None,
    activation: str,
) -> tuple[dict[str, int], int, int]:
    """(tiles, parts of an image, pixels of a part)."""
    n, h, w, channels = u2.shape
    shape = (h * w, du.shape[3], channels, int(da is None))
    tiles = chosen(kernel, u2, formula, shape, images=n, activation=activation, gate=gate is not None)
    return tiles, *parts_of_image(h * w, n * cdiv(channels, tiles["BC"]), tiles["BM"], u2.device)


def _operands(
    da: Tensor | None, du: Tensor, weight: Tensor, u2: Tensor, norm: Tensor, gate: Tensor | None, activation: str
) -> dict[str, object]:
    n, h, w, channels = u2.shape
    return dict(
        da_ptr=da,
        du_ptr=du if da is None else None,
        w_ptr=weight if da is None else None,
        u2_ptr=u2,
        norm_ptr=norm,
        N=n,
        HW=h * w,
        CI=channels,
        CO=du.shape[3],
        ACT=activation,
        HAS_GATE=gate is not None,
        RESIDENT=da is None,
        **numeric(u2.dtype),
    )
