"""The model's head without gradients: pooled[n, o] = mean over the image of act(scale * (x @ w) + shift), NHWC.

The map with its many channels is not written; scale and shift as in running.py.
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
from .tuning import MIN_DOT, PROGRAMS, cdiv, numeric, pow2, precision


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
        acc = tl.zeros((BM, BO), ACC)
        for k in range(0, CI, BK):
            o_k = k + tl.arange(0, BK)
            m_k = o_k < CI
            o_x = (n * HW + o_m[:, None]) * CI + o_k[None, :]
            b_x = tl.load(x_ptr + o_x, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
            m_w = m_k[:, None] & m_o[None, :]
            b_w = tl.load(w_ptr + o_o[None, :] * CI + o_k[:, None], mask=m_w, other=0.0)  # [BK, BO]
            acc = dot(b_x, b_w, acc, x_ptr.dtype.element_ty, PRECISION)
        b_y = activate(acc * b_scale[None, :] + b_shift[None, :], ACT, FAST)
        b_sum += tl.where(m_m[:, None], b_y, 0.0)
    tl.store(y_ptr + n * CO + o_o, stored(tl.sum(b_sum, 0) / HW, y_ptr.dtype.element_ty), mask=m_o)


def pool_tiles(pixels: int, reduce: int, out: int, images: int) -> dict[str, int]:
    """[BM pixels of one image, BK inputs] x [BK, BO outputs]; fewer outputs where few programs would be left."""
    if INTERPRETED:
        return dict(BM=pow2(pixels, MIN_DOT, 2048), BK=pow2(reduce, MIN_DOT, 256), BO=pow2(out, MIN_DOT, 256))
    block = pow2(out, MIN_DOT, 64)
    while images * cdiv(out, block) < PROGRAMS and block > MIN_DOT:
        block //= 2
    step = 32 if images * cdiv(out, block) >= PROGRAMS else 128
    return dict(BM=64, BK=pow2(reduce, MIN_DOT, step), BO=block, num_warps=4 if block > MIN_DOT else 2, num_stages=3)


def pointwise_pool(x: Tensor, weight: Tensor, bn: Running, activation: str) -> Tensor:
    """[N, O]: the mean over the image of act(BN(x @ weight)); x [N, H, W, I], weight [O, I, 1, 1]."""
    n, h, w, channels = x.shape
    out = weight.shape[0]
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    tiles = chosen("pointwise_pool", x, pool_tiles, (h * w, channels, out, n), activation=activation)
    _pointwise_pool_kernel[(n * cdiv(out, tiles["BO"]),)](
        x_ptr=x,
        w_ptr=weight,
        **given(bn),
        y_ptr=y,
        HW=h * w,
        CI=channels,
        CO=out,
        ACT=activation,
        PRECISION=precision(x.dtype),
        **numeric(x.dtype),
        **tiles,
    )
    state("pointwise_pool", (x, weight, *bn.tensors), (y,))
    return y
