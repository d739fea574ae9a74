"""A block without gradients: BatchNorm is an epilogue computed from its running statistics, NHWC.

y = act(scale * (a @ w) + shift) (+ residual), scale and shift as in running.py; a is x, or x * gate, or behind a dense
convolution act(BN(x)) (* gate). The depthwise convolution (depthwise_inference.py) stores activated values and sums
them per image in `parts` [P, N, C]; the gate is made of those, and multiplies the projection's input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import kernel
from .math import INTERPRETED, activate, dot, stored
from .running import Running, given, load_affine
from .tables import tiles as chosen
from .traffic import state
from .tuning import MIN_DOT, PROGRAMS, cdiv, matmul_tiles, numeric, pow2, precision


@triton.jit
def product(
    x_ptr, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, w_ptr, gate_ptr, o_m, m_m, o_o, m_o, HW,
    CI: tl.constexpr, IN_EPS: tl.constexpr, IN_ACT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    FAST: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """(a * gate[n, i]) @ w for a tile of pixels and output channels; a is x, or act(BN(x)) where there is a BN."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    p_x = x_ptr + o_m[:, None].to(tl.int64) * CI
    acc = tl.zeros((BM, BO), ACC)
    for k in range(0, CI, BK):
        o_k = k + tl.arange(0, BK)
        m = m_m[:, None] & (o_k < CI)[None, :]
        b_x = tl.load(p_x + o_k[None, :], mask=m, other=0.0)  # [BM, BK]
        if in_mean_ptr is not None:
            b_scale, b_shift = load_affine(
                in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, o_k, o_k < CI, IN_EPS, ACC
            )
            b_x = activate(b_x.to(ACC) * b_scale[None, :] + b_shift[None, :], IN_ACT, FAST)
        if gate_ptr is not None:
            b_x = b_x.to(ACC) * tl.load(gate_ptr + (o_m // HW)[:, None] * CI + o_k[None, :], mask=m, other=0.0)
        m_w = (o_k < CI)[:, None] & m_o[None, :]
        b_w = tl.load(w_ptr + o_o[None, :] * CI + o_k[:, None], mask=m_w, other=0.0)  # [BK, BO]
        acc = dot(b_x, b_w, acc, DTYPE, PRECISION)
    return acc


@kernel
@triton.jit
def _pointwise_inference_kernel(
    x_ptr,
    in_bn_weight_ptr,
    in_bn_bias_ptr,
    in_mean_ptr,
    in_var_ptr,
    w_ptr,
    gate_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    y_ptr,
    M,
    HW,
    CI: tl.constexpr,
    CO: tl.constexpr,
    IN_EPS: tl.constexpr,
    EPS: tl.constexpr,
    IN_ACT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
):
    columns = (CO + BO - 1) // BO
    o_m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    o_o = tl.program_id(0) % columns * BO + tl.arange(0, BO)
    m_m, m_o = o_m < M, o_o < CO
    b_scale, b_shift = load_affine(bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_o, m_o, EPS, ACC)
    acc = product(
        x_ptr, in_bn_weight_ptr, in_bn_bias_ptr, in_mean_ptr, in_var_ptr, w_ptr, gate_ptr, o_m, m_m, o_o, m_o, HW, CI,
        IN_EPS, IN_ACT, PRECISION, ACC, FAST, BM, BK, BO,
    )  # fmt: skip
    b_y = activate(acc * b_scale[None, :] + b_shift[None, :], ACT, FAST)
    m = m_m[:, None] & m_o[None, :]
    o = o_m[:, None].to(tl.int64) * CO + o_o[None, :]
    if residual_ptr is not None:
        b_y += tl.load(residual_ptr + o, mask=m, other=0.0).to(ACC)
    tl.store(y_ptr + o, stored(b_y, y_ptr.dtype.element_ty), mask=m)


def product_tiles(rows: int, reduce: int, out: int, images: int = 1) -> dict[str, int]:
    """`matmul_tiles`, smaller where few programs would be left; `rows` are those of each of `images` products."""
    tiles = matmul_tiles(rows, reduce, out)
    if INTERPRETED:
        return tiles

    def programs() -> int:
        return images * cdiv(rows, tiles["BM"] if images == 1 else rows) * cdiv(out, tiles["BO"])

    while programs() < PROGRAMS and tiles["BO"] > MIN_DOT:
        shrunk = "BM" if images == 1 and tiles["BM"] > tiles["BO"] else "BO"
        tiles[shrunk] //= 2
    if programs() < PROGRAMS:
        tiles["BK"] = pow2(reduce, MIN_DOT, 128)
    return tiles | dict(num_warps=4 if tiles["BM"] * tiles["BO"] > 1024 else 2)


def prologue_tiles(rows: int, reduce: int, out: int, dtype: torch.dtype) -> dict[str, int]:
    """`product_tiles` with longer steps, so that more rows share the scales and shifts that each step computes."""
    tiles = product_tiles(rows, reduce, out)
    if INTERPRETED or dtype == torch.float32:  # fp32 has no registers for more rows
        return tiles
    return tiles | dict(BK=max(tiles["BK"], pow2(reduce, MIN_DOT, 64)), num_stages=2)


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
    n, h, w, channels = x.shape
    out, rows = weight.shape[0], n * h * w
    y = torch.empty(n, h, w, out, dtype=x.dtype, device=x.device)
    traits = dict(activation=activation, gate=gate is not None, residual=residual is not None)
    shape = (rows, channels, out)
    if in_bn is None:
        tiles = chosen("pointwise_inference", x, product_tiles, shape, **traits)
    else:
        shape, traits = (*shape, x.dtype), traits | dict(before=in_activation)
        tiles = chosen("pointwise_inference", x, prologue_tiles, shape, **traits)
    _pointwise_inference_kernel[(cdiv(out, tiles["BO"]) * cdiv(rows, tiles["BM"]),)](
        x_ptr=x,
        **given(in_bn, "in_"),
        w_ptr=weight,
        gate_ptr=gate,
        **given(bn),
        residual_ptr=residual,
        y_ptr=y,
        M=rows,
        HW=h * w,
        CI=channels,
        CO=out,
        IN_ACT=in_activation,
        ACT=activation,
        PRECISION=precision(x.dtype),
        **numeric(x.dtype),
        **tiles,
    )
    first = () if in_bn is None else in_bn.tensors
    state("pointwise_inference", (x, *first, weight, gate, *bn.tensors, residual), (y,))
    return y
