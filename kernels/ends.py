"""What stands around the blocks, without gradients: BN and activation in one pass, and the head up to its pool, NHWC.

Stem: y = act(scale * u + shift). Head: pooled[n, o] = mean over the image of act(scale * (x @ w) + shift); the map
with its many channels is not written. scale and shift come from the running statistics, as in inference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inference import Running, load_affine, product, product_tiles
from .launching import kernel
from .math import activate, stored
from .tables import tiles as chosen
from .traffic import state
from .tuning import numeric, precision, row_tiles


@kernel
@triton.jit
def _pointwise_pool_kernel(
    x_ptr,
    w_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    var_ptr,
    y_ptr,
    HW,
    CI: tl.constexpr,
    CO: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
):
    columns = (CO + BO - 1) // BO
    n = (tl.program_id(0) // columns).to(tl.int64)
    o_o = tl.program_id(0) % columns * BO + tl.arange(0, BO)
    m_o = o_o < CO
    b_scale, b_shift = load_affine(bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_o, m_o, EPS, ACC)
    b_sum = tl.zeros((BM, BO), ACC)
    for m0 in range(0, HW, BM):
        o_m = m0 + tl.arange(0, BM)
        m_m = o_m < HW
        acc = product(x_ptr + n * HW * CI, w_ptr, None, o_m, m_m, o_o, m_o, HW, CI, PRECISION, ACC, BM, BK, BO)
        b_y = activate(acc * b_scale[None, :] + b_shift[None, :], ACT, FAST)
        b_sum += tl.where(m_m[:, None], b_y, 0.0)
    tl.store(y_ptr + n * CO + o_o, stored(tl.sum(b_sum, 0) / HW, y_ptr.dtype.element_ty), mask=m_o)


@kernel
@triton.jit
def _bn_act_inference_kernel(
    u_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    var_ptr,
    y_ptr,
    M,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    columns = (C + BC - 1) // BC
    o_m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    o_c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    m_c = o_c < C
    m = (o_m < M)[:, None] & m_c[None, :]
    o = o_m[:, None].to(tl.int64) * C + o_c[None, :]  # [BM, BC]
    b_scale, b_shift = load_affine(bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, o_c, m_c, EPS, ACC)
    b_y = tl.load(u_ptr + o, mask=m, other=0.0).to(ACC) * b_scale[None, :] + b_shift[None, :]
    tl.store(y_ptr + o, stored(activate(b_y, ACT, FAST), y_ptr.dtype.element_ty), mask=m)


def pointwise_pool(x: Tensor, weight: Tensor, bn: Running, activation: str) -> Tensor:
    """[N, O]: the mean over the image of act(BN(x @ weight)); x [N, H, W, I], weight [O, I, 1, 1]."""
    n, h, w, channels = x.shape
    out = weight.shape[0]
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    tiles = chosen("pointwise_pool", x, product_tiles, (h * w, channels, out, n), activation=activation)
    _pointwise_pool_kernel[(n * triton.cdiv(out, tiles["BO"]),)](
        x_ptr=x,
        w_ptr=weight,
        bn_weight_ptr=bn.weight,
        bn_bias_ptr=bn.bias,
        mean_ptr=bn.mean,
        var_ptr=bn.var,
        y_ptr=y,
        HW=h * w,
        CI=channels,
        CO=out,
        EPS=bn.eps,
        ACT=activation,
        PRECISION=precision(x.dtype),
        **numeric(x.dtype),
        **tiles,
    )
    state("pointwise_pool", (x, weight, *bn.tensors), (y,))
    return y


def bn_act_inference(u: Tensor, bn: Running, activation: str) -> Tensor:
    """act(BN(u)) of u [N, H, W, C]."""
    c = u.shape[3]
    rows = u.numel() // c
    y = torch.empty_like(u)
    tiles = chosen("bn_act_inference", u, row_tiles, (rows, c), activation=activation)
    _bn_act_inference_kernel[(triton.cdiv(c, tiles["BC"]) * triton.cdiv(rows, tiles["BM"]),)](
        u_ptr=u,
        bn_weight_ptr=bn.weight,
        bn_bias_ptr=bn.bias,
        mean_ptr=bn.mean,
        var_ptr=bn.var,
        y_ptr=y,
        M=rows,
        C=c,
        EPS=bn.eps,
        ACT=activation,
        **numeric(u.dtype),
        **tiles,
    )
    state("bn_act_inference", (u, *bn.tensors), (y,))
    return y
