"""1x1 convolutions forward, as matrix products over pixels, with BatchNorm folded into both ends.

    u[m, o] = sum_i w[o, i] a[m, i],    a = act(scale x + shift) gate[n, i], or what there is of it

Behind the product: moments of u, for the BatchNorm that follows; without gradients that BatchNorm itself, from its
running statistics, its activation and a residual. The backward is in project_backward.py and expand_backward.py.

Two forms, chosen by shape (`product_tiles`). Resident, where a block of outputs has its weight and its vectors fit: a
program loads and rounds them once and goes over pixels of one image, so that scale, shift and gate are vectors in
registers. Else a loop over the inputs fetches weight and vectors anew for each tile of pixels.

    a program:   BO outputs, PIXELS pixels of one image       grid: (blocks of outputs x images x parts of an image,)
    a tile:      a [BM, CI] x w [CI, BO] -> u [BM, BO], in blocks of BK inputs;   without a gate all images are one
    on the way:  STAGES - 1 tiles where the weight is resident, else blocks
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import bn_act_fwd, store_moments
from .expand_backward import block_channels, count_blocks
from .launching import kernel
from .library import cast, multiply
from .math import INTERPRETED, activate_halved, at_least, dot, halved, stored, sum_rows
from .moments import moments as moments_of
from .project_backward import FEW_OUTPUTS
from .running import Running, given, load_affine, load_map
from .tables import processors
from .tables import tiles as chosen
from .traffic import state
from .tuning import MIN_DOT, PROGRAMS, accumulator, cdiv, groups, multiplies_fast, numeric, pow2, precision

MOST_INPUTS = 384  # of a resident weight: more leave shared memory no room for pixels
MOST_VECTORS = 432  # channels times vectors of its prologue: more do not fit the registers
MOST_OUTPUTS = 128  # that one streamed tile holds: more make it activate its pixels again
MANY_MULTIPLICATIONS = 1 << 31  # from which three launches more cost less than the weight's way to each tile
MOST_PARTIALS = 4096  # of a weight that is not resident: sums over several tiles would take registers from the product
MOST_IMAGES = tl.constexpr(4)  # whose gates a tile takes as vectors


@triton.jit
def packed(v, DTYPE: tl.constexpr):
    """`stored` for a tile; in bf16 by pairs, one instruction for two values and not one for each."""
    if INTERPRETED or tl.bfloat16 != DTYPE or v.dtype != tl.float32:
        return stored(v, DTYPE)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [v], tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def load_weight(w_ptr, o_k, o_o, CI: tl.constexpr, CO: tl.constexpr, DTYPE: tl.constexpr):
    """[BK, BO] of the weight [CO, CI], rounded."""
    m = (o_k < CI)[:, None] & (o_o < CO)[None, :]
    return packed(tl.load(w_ptr + o_o[None, :] * CI + o_k[:, None], mask=m, other=0.0), DTYPE)


@triton.jit
def load_prologue(
    norm_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_k, CI: tl.constexpr, EPS: tl.constexpr,
    ACT: tl.constexpr, HAS_NORM: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """scale and shift of a block of inputs, halved for the activation; zeros that nobody reads without a BatchNorm."""
    b_scale = tl.zeros(o_k.shape, ACC)
    b_shift = b_scale
    if HAS_NORM:
        b_scale, b_shift = load_map(
            norm_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_k, o_k < CI, CI, EPS, ACC
        )
        b_scale, b_shift = halved(b_scale, ACT, FAST), halved(b_shift, ACT, FAST)
    return b_scale, b_shift


@triton.jit
def load_gate(gate_ptr, image, o_k, CI: tl.constexpr, ACC: tl.constexpr):
    """An image's gate for a block of inputs, [1, BK]; zeros that nobody reads without one."""
    b_gate = tl.zeros(o_k.shape, ACC)
    if gate_ptr is not None:
        b_gate = tl.load(gate_ptr + image.to(tl.int64) * CI + o_k, mask=o_k < CI, other=0.0)
    return b_gate[None, :]


@triton.jit
def load_gates(
    gate_ptr, image, o_n, last, o_k, CI: tl.constexpr, IMAGES: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The gates, [1 or BM, BK], of pixels that lie in images image + o_n, IMAGES at most, none behind image + last."""
    b_gate = load_gate(gate_ptr, image, o_k, CI, ACC)
    if gate_ptr is not None and IMAGES > 1:
        if IMAGES > MOST_IMAGES:
            o = (image + tl.minimum(o_n, last)).to(tl.int64)[:, None] * CI + o_k[None, :]
            m = (o_n >= 0)[:, None] & (o_k < CI)[None, :]
            b_gate = tl.load(gate_ptr + o, mask=m, other=0.0)
        else:
            for i in tl.static_range(1, IMAGES):
                b_next = load_gate(gate_ptr, image + tl.minimum(last, i), o_k, CI, ACC)
                b_gate = tl.where((o_n >= i)[:, None], b_next, b_gate)
    return b_gate


@triton.jit
def load_input(
    x_ptr, m0, m_m, o_k, b_scale, b_shift, b_gate, CI: tl.constexpr, ACT: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_GATE: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """act(scale x + shift) gate of a block of inputs, [BM, BK], for the pixels from m0 on."""
    o = tl.arange(0, BM)[:, None] * CI + o_k[None, :]
    m = m_m[:, None] & (o_k < CI)[None, :]
    b_a = tl.load(x_ptr + m0.to(tl.int64) * CI + o, mask=m, other=0.0)
    if HAS_NORM:
        b_a = activate_halved(b_a.to(ACC) * b_scale[None, :] + b_shift[None, :], ACT, FAST)
    if HAS_GATE:
        b_a = b_a.to(ACC) * b_gate
    return packed(b_a, x_ptr.dtype.element_ty)


@triton.jit
def add_up(
    b_u, first, pivot, s1, s2, m_m, m, ACC: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """A tile's part of the moments: sums, in LANES rows, of u and of its square, about the mean of the first tile."""
    if first:
        b_rows = tl.sum(tl.where(m_m, 1.0, 0.0).to(ACC), 0)
        pivot = (tl.sum(tl.where(m, b_u, 0.0), 0) / b_rows)[None, :]
    b_u = tl.where(m, b_u - pivot, 0.0)
    if LANES == 1:
        return pivot, s1 + sum_rows(b_u)[None, :], s2 + sum_rows(b_u * b_u)[None, :]
    else:
        return pivot, s1 + b_u, s2 + b_u * b_u


@triton.jit
def store_output(
    b_u, u_ptr, residual_ptr, m0, m, o_o, b_scale, b_shift, CO: tl.constexpr, ACT: tl.constexpr, HAS_BN: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """u of a tile as it is stored, if it is: what is normalised later."""
    o = tl.arange(0, BM)[:, None] * CO + o_o[None, :]  # [BM, BO]
    at = m0.to(tl.int64) * CO
    if HAS_BN:
        b_u = activate_halved(b_u * b_scale[None, :] + b_shift[None, :], ACT, FAST)
    if residual_ptr is not None:
        b_u += tl.load(residual_ptr + at + o, mask=m, other=0.0).to(ACC)
    if u_ptr is not None:
        b_stored = packed(b_u, DTYPE)
        tl.store(u_ptr + at + o, b_stored, mask=m)
        b_u = b_stored.to(ACC)
    return b_u


@kernel
@triton.jit
def _pointwise_kernel(
    x_ptr,
    norm_ptr,
    in_bn_weight_ptr,
    in_bn_bias_ptr,
    in_mean_ptr,
    in_var_ptr,
    gate_ptr,
    w_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    u_ptr,
    partials_ptr,
    N,
    HW,
    PIXELS,
    IMAGE,
    CI: tl.constexpr,
    CO: tl.constexpr,
    IN_EPS: tl.constexpr,
    EPS: tl.constexpr,
    IN_ACT: tl.constexpr,
    ACT: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    TILES: tl.constexpr,
    IMAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    RESIDENT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    STAGES: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HAS_NORM: tl.constexpr = norm_ptr is not None or in_mean_ptr is not None
    HAS_GATE: tl.constexpr = gate_ptr is not None
    HAS_BN: tl.constexpr = mean_ptr is not None
    LANES: tl.constexpr = BM if RESIDENT else 1
    columns: tl.constexpr = (CO + BO - 1) // BO
    # One axis, columns first: the second would end at 65535 rows of tiles, and neighbours share their pixels in L2.
    o_o = tl.program_id(0) % columns * BO + tl.arange(0, BO)
    m_o = o_o < CO
    part = tl.program_id(0) // columns
    n = part % N
    first = part // N * PIXELS
    end = tl.minimum(first + PIXELS, HW)
    b_out_scale, b_out_shift = tl.zeros((BO,), ACC), tl.zeros((BO,), ACC)
    if HAS_BN:
        b_out_scale, b_out_shift = load_affine(bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_o, m_o, EPS, ACC)
        b_out_scale, b_out_shift = halved(b_out_scale, ACT, FAST), halved(b_out_shift, ACT, FAST)
    pivot = tl.zeros((1, BO), ACC)
    s1 = tl.zeros((LANES, BO), ACC)
    s2 = tl.zeros((LANES, BO), ACC)
    if RESIDENT:
        w, scale, shift, gate = (), (), (), ()
        for j in tl.static_range(count_blocks(0, CI, CI, BK)):
            o_k = block_channels(0, j, CI, CI, BK)
            w = w + (load_weight(w_ptr, o_k, o_o, CI, CO, DTYPE),)
            b_scale, b_shift = load_prologue(
                norm_ptr, in_bn_weight_ptr, in_bn_bias_ptr, in_mean_ptr, in_var_ptr, o_k, CI, IN_EPS, IN_ACT, HAS_NORM,
                ACC, FAST,
            )  # fmt: skip
            scale, shift, gate = scale + (b_scale,), shift + (b_shift,), gate + (load_gate(gate_ptr, n, o_k, CI, ACC),)
        for pixel in tl.range(first, end, BM, num_stages=STAGES):
            m_m = pixel + tl.arange(0, BM) < end
            m = m_m[:, None] & m_o[None, :]
            m0 = n * HW + pixel
            b_u = tl.zeros((BM, BO), ACC)
            for j in tl.static_range(count_blocks(0, CI, CI, BK)):
                o_k = block_channels(0, j, CI, CI, BK)
                b_a = load_input(
                    x_ptr, m0, m_m, o_k, scale[j], shift[j], gate[j], CI, IN_ACT, HAS_NORM, HAS_GATE, ACC, FAST, BM
                )
                b_u = dot(b_a, w[j], b_u, DTYPE, PRECISION)
            b_u = store_output(
                b_u, u_ptr, residual_ptr, m0, m, o_o, b_out_scale, b_out_shift, CO, ACT, HAS_BN, ACC, FAST, BM, DTYPE
            )
            if HAS_MOMENTS:
                pivot, s1, s2 = add_up(b_u, pixel == first, pivot, s1, s2, m_m, m, ACC, LANES)
    else:
        for tile in tl.static_range(TILES):
            m0 = first + tile * BM
            m_m = m0 + tl.arange(0, BM) < end
            m = m_m[:, None] & m_o[None, :]
            image = m0 // IMAGE
            o_n = (m0 + tl.arange(0, BM)) // IMAGE - image
            last = (end - 1) // IMAGE - image
            b_u = tl.zeros((BM, BO), ACC)
            for k in tl.range(0, CI, BK, num_stages=STAGES):
                o_k = k + tl.arange(0, BK)
                b_scale, b_shift = load_prologue(
                    norm_ptr, in_bn_weight_ptr, in_bn_bias_ptr, in_mean_ptr, in_var_ptr, o_k, CI, IN_EPS, IN_ACT,
                    HAS_NORM, ACC, FAST,
                )  # fmt: skip
                b_gate = load_gates(gate_ptr, image, o_n, last, o_k, CI, IMAGES, ACC)
                b_a = load_input(
                    x_ptr, m0, m_m, o_k, b_scale, b_shift, b_gate, CI, IN_ACT, HAS_NORM, HAS_GATE, ACC, FAST, BM
                )
                b_u = dot(b_a, load_weight(w_ptr, o_k, o_o, CI, CO, DTYPE), b_u, DTYPE, PRECISION)
            b_u = store_output(
                b_u, u_ptr, residual_ptr, m0, m, o_o, b_out_scale, b_out_shift, CO, ACT, HAS_BN, ACC, FAST, BM, DTYPE
            )
            if HAS_MOMENTS:
                pivot, s1, s2 = add_up(b_u, tile == 0, pivot, s1, s2, m_m, m, ACC, LANES)
    if HAS_MOMENTS:
        count = tl.zeros((BO,), ACC) + (end - first)
        delta = sum_rows(s1) / count
        m2 = at_least(sum_rows(s2) - delta * delta * count, 0.0)
        store_moments(partials_ptr, part, count, tl.sum(pivot, 0) + delta, m2, o_o, m_o, CO)


def fetches_weight_often(reduce: int, vectors: int, dtype: torch.dtype) -> bool:
    """Whether each tile of pixels fetches a weight of so many inputs anew; `vectors` as of `product_tiles`."""
    return multiplies_fast(dtype) and (reduce > MOST_INPUTS or reduce * vectors > MOST_VECTORS)


def rounds_weight(reduce: int, out: int, vectors: int, dtype: torch.dtype) -> bool:
    """Whether a weight is rounded once for both directions: with few outputs the backward fetches it once a program."""
    return out > FEW_OUTPUTS and fetches_weight_often(reduce, vectors, dtype)


def form_tiles(rows: int, reduce: int, out: int, vectors: int, dtype: torch.dtype) -> dict[str, int]:
    """LIBRARY 1: act(BN(x)) gate by a pass, the product by the library, moments by a pass; for many long products."""
    many = out > MOST_OUTPUTS and rows * reduce * out >= MANY_MULTIPLICATIONS
    return dict(LIBRARY=int(fetches_weight_often(reduce, vectors, dtype) and many))


def product_tiles(
    rows: int, reduce: int, out: int, vectors: int, dtype: torch.dtype, narrow: bool = False
) -> dict[str, int]:
    """[BM pixels, BK inputs] x [BK, BO outputs]; `vectors` of the prologue: 2 of a BatchNorm, 1 of a gate.

    `narrow`: the weight comes in 16 bits.
    """
    resident = multiplies_fast(dtype) and not fetches_weight_often(reduce, vectors, dtype)
    if INTERPRETED:
        sides = dict(BM=pow2(rows, MIN_DOT, 2048), BK=pow2(reduce, MIN_DOT, 256), BO=pow2(out, MIN_DOT, 256))
        return dict(RESIDENT=int(resident), **sides, STAGES=1)
    if resident:
        block = 32 if vectors > 2 and out > FEW_OUTPUTS else 64  # 64 would spill where both are many
        sides = dict(BM=64, BK=pow2(reduce, MIN_DOT, 64), BO=pow2(out, MIN_DOT, block))
        return dict(RESIDENT=1, **sides, STAGES=3, num_warps=4)
    if not multiplies_fast(dtype):
        tiles = dict(BM=64, BK=pow2(reduce, MIN_DOT, 32), BO=pow2(out, MIN_DOT, 64), STAGES=3)
    elif out <= FEW_OUTPUTS and not (narrow and vectors < 2):
        tiles = dict(BM=128, BK=pow2(reduce, MIN_DOT, 32), BO=pow2(out, MIN_DOT, 64), STAGES=3)
    elif narrow:
        tiles = dict(BM=64, BK=pow2(reduce, MIN_DOT, 64), BO=pow2(out, MIN_DOT, 128), STAGES=3)
    elif out <= 128:  # fp32 weights of so many outputs go through shared memory once, not twice
        tiles = dict(BM=64, BK=pow2(reduce, MIN_DOT, 64), BO=128, STAGES=1)
    else:
        tiles = dict(BM=64, BK=pow2(reduce, MIN_DOT, 64), BO=64, STAGES=3)
    while cdiv(rows, tiles["BM"]) * cdiv(out, tiles["BO"]) < PROGRAMS // 2 and tiles["BO"] > MIN_DOT:
        tiles["BM" if tiles["BM"] > tiles["BO"] else "BO"] //= 2
    return dict(RESIDENT=0, **tiles, num_warps=4 if tiles["BM"] * tiles["BO"] > 1024 else 2)


def divide(
    x: Tensor, out: int, by_image: bool, moments: bool, reduce: int, vectors: int, tiles: dict[str, int]
) -> tuple[int, int, int]:
    """(images, pixels of one, pixels of a part of one): all images are one where a program may take pixels of several.

    Parts are such that all programs of a resident weight run at a time.
    """
    n, h, w, _ = x.shape
    columns = cdiv(out, tiles["BO"])
    if not tiles["RESIDENT"]:
        together = min(4, groups(cdiv(n * h * w, tiles["BM"]), 1, MOST_PARTIALS)) if moments else 1
        return 1, n * h * w, tiles["BM"] * together
    images, pixels = (n, h * w) if by_image else (1, n * h * w)
    if INTERPRETED:
        parts = 2 if by_image else max(1, cdiv(pixels, tiles["BM"] * groups(cdiv(pixels, tiles["BM"]), columns)))
    else:
        side_by_side = 2 if reduce * max(1, vectors) > 128 or (vectors == 0 and reduce > 64) else 3 if out > 32 else 4
        parts = max(1, side_by_side * processors(x.device) // (columns * images))
    return images, pixels, tiles["BM"] * cdiv(cdiv(pixels, parts), tiles["BM"])


def _launch(
    launcher: str,
    x: Tensor,
    norm: Tensor | Running | None,
    in_activation: str,
    gate: Tensor | None,
    weight: Tensor,
    bn: Running | None,
    activation: str,
    residual: Tensor | None,
    u: Tensor | None,
    moments: bool,
) -> Tensor | None:
    n, h, w, channels = x.shape
    out = weight.shape[0]
    vectors = (0 if norm is None else 2) + (gate is not None)
    shape = (n * h * w, channels, out, vectors, x.dtype, weight.dtype == x.dtype)
    traits = dict(before=in_activation, activation=activation, residual=residual is not None, moments=moments)
    tiles = chosen(launcher, x, product_tiles, shape, **traits)
    images, pixels, part = divide(x, out, gate is not None, moments, channels, vectors, tiles)
    programs = images * cdiv(pixels, part)
    partials = torch.empty(programs, 3, out, dtype=accumulator(x.dtype), device=x.device) if moments else None
    in_bn = norm if isinstance(norm, Running) else None
    _pointwise_kernel[(cdiv(out, tiles["BO"]) * programs,)](
        x_ptr=x,
        norm_ptr=None if in_bn is not None else norm,
        **given(in_bn, "in_"),
        gate_ptr=gate,
        w_ptr=weight,
        **given(bn),
        residual_ptr=residual,
        u_ptr=u,
        partials_ptr=partials,
        N=images,
        HW=pixels,
        PIXELS=part,
        IMAGE=h * w,
        CI=channels,
        CO=out,
        IN_ACT=in_activation,
        ACT=activation,
        HAS_MOMENTS=moments,
        TILES=1 if tiles["RESIDENT"] else part // tiles["BM"],
        IMAGES=1
        if images == n or h * w % tiles["BM"] == 0
        else min((tiles["BM"] - 2) // (h * w) + 2, MOST_IMAGES.value + 1),
        PRECISION=precision(x.dtype),
        **numeric(x.dtype),
        **tiles,
    )
    before = norm.tensors if isinstance(norm, Running) else (norm,)
    behind = () if bn is None else bn.tensors
    state("pointwise", (x, weight, *before, gate, *behind, residual), (u, partials))
    return partials


def pointwise_fwd(
    x: Tensor, weight: Tensor, norm: Tensor | None, gate: Tensor | None, activation: str, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """(u [N, H, W, O], partial moments [P, 3, O] if asked) of x [N, H, W, I] and weight [O, I, 1, 1] or [O, I]."""
    n, h, w, channels = x.shape
    out, vectors = weight.shape[0], (0 if norm is None else 2) + (gate is not None)
    if chosen("pointwise", x, form_tiles, (n * h * w, channels, out, vectors, x.dtype))["LIBRARY"]:
        a = x if norm is None else bn_act_fwd(x, norm, gate, None, None, None, activation)
        u = multiply(a, cast(weight, x.dtype).t())
        return u, moments_of(u) if moments else None
    u = torch.empty(n, h, w, out, dtype=x.dtype, device=x.device)
    return u, _launch("pointwise_fwd", x, norm, activation, gate, weight, None, "none", None, u, moments)


def pointwise_moments(x: Tensor, weight: Tensor) -> Tensor:
    """Partial moments [P, 3, O] of an output that is not kept: before rounding, as a walk computes it again."""
    partials = _launch("pointwise_moments", x, None, "none", None, weight, None, "none", None, None, True)
    assert partials is not None
    return partials


def pointwise_inference(
    x: Tensor,
    in_bn: Running | None,
    in_activation: str,
    weight: Tensor,
    gate: Tensor | None,
    bn: Running,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """act(BN(a * gate @ weight)) + residual: x [N, H, W, I], weight [O, I, 1, 1], gate [N, I] -> [N, H, W, O].

    a is x, or with `in_bn` in_activation(in_bn(x)).
    """
    y = torch.empty(*x.shape[:3], weight.shape[0], dtype=x.dtype, device=x.device)
    rows, channels = x.numel() // x.shape[3], x.shape[3]
    if (
        multiplies_fast(x.dtype)
        and channels > MOST_INPUTS
        and rows * channels * y.shape[3] >= MANY_MULTIPLICATIONS // 4
    ):
        weight = cast(weight, x.dtype)  # many tiles fetch it: in half the bytes, and converted once
    _launch("pointwise_inference", x, in_bn, in_activation, gate, weight, bn, activation, residual, y, False)
    return y
