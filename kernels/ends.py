"""The model's head without gradients: pooled[n, o] = mean over the image of act(scale * (x @ w) + shift), NHWC.

The map with its many channels is not written; scale and shift as in running.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inference import product, product_tiles
from .launching import kernel
from .math import activate, stored
from .running import Running, given, load_affine
from .tables import tiles as chosen
from .traffic import state
from .tuning import cdiv, numeric, precision


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
        acc = product(
            x_ptr + n * HW * CI, None, None, None, None, w_ptr, None, o_m, m_m, o_o, m_o, HW, CI, 0.0, "none",
            PRECISION, ACC, FAST, BM, BK, BO,
        )  # fmt: skip
        b_y = activate(acc * b_scale[None, :] + b_shift[None, :], ACT, FAST)
        b_sum += tl.where(m_m[:, None], b_y, 0.0)
    tl.store(y_ptr + n * CO + o_o, stored(tl.sum(b_sum, 0) / HW, y_ptr.dtype.element_ty), mask=m_o)


def pointwise_pool(x: Tensor, weight: Tensor, bn: Running, activation: str) -> Tensor:
    """[N, O]: the mean over the image of act(BN(x @ weight)); x [N, H, W, I], weight [O, I, 1, 1]."""
    n, h, w, channels = x.shape
    out = weight.shape[0]
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    tiles = chosen("pointwise_pool", x, product_tiles, (h * w, channels, out, n), activation=activation)
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
