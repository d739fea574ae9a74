"""BatchNorm over the batches of several processes: what each one sends, and the coefficients from everybody's sums.

Forward: moments [3, C] (count, mean, squares about it), gathered and merged by `batch_norm.bn_finalize`. Backward: sums
[2, C] and the count, added up; weight and bias keep the gradients of their own process, as in torch's SyncBatchNorm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import merge_moments, store_coef, store_moments
from .launching import kernel
from .traffic import state
from .tuning import cdiv, finalize_tiles, numeric, pow2


@kernel
@triton.jit
def _bn_merge_kernel(
    partials_ptr, moments_ptr, P, C, ACC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    C = tl.multiple_of(C, ALIGN)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_count, b_mean, b_m2 = merge_moments(partials_ptr, o_c, m_c, P, C, ACC, BP, BC, STAGES)
    store_moments(moments_ptr, tl.program_id(1), b_count, b_mean, b_m2, o_c, m_c, C)


@kernel
@triton.jit
def _bn_coef_kernel(total_ptr, norm_ptr, coef_ptr, C, BC: tl.constexpr):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_dweight = tl.load(total_ptr + o_c, mask=m_c, other=0.0)
    b_dbias = tl.load(total_ptr + C + o_c, mask=m_c, other=0.0)
    store_coef(norm_ptr, coef_ptr, o_c, m_c, C, b_dweight, b_dbias, tl.load(total_ptr + 2 * C), True)


def bn_merge(partials: Tensor) -> Tensor:
    """Moments [1, 3, C] of what the partial moments [P, 3, C] are moments of."""
    count, _, channels = partials.shape
    if count == 1:
        return partials
    moments = torch.empty(1, 3, channels, dtype=partials.dtype, device=partials.device)
    tiles = finalize_tiles(count, channels)
    _bn_merge_kernel[(cdiv(channels, tiles["BC"]), 1)](
        partials_ptr=partials,
        moments_ptr=moments,
        P=count,
        C=channels,
        ACC=numeric(partials.dtype)["ACC"],
        **tiles,
    )
    state("bn_merge", (partials,), (moments,))
    return moments


def bn_coef(total: Tensor, norm: Tensor) -> Tensor:
    """coef [4, C] from total [2 C + 1]: the sums of dv * xhat and of dv, and the count, over all processes."""
    channels = norm.shape[1]
    coef = torch.empty(4, channels, dtype=norm.dtype, device=norm.device)
    block = pow2(channels, 1, 256)
    _bn_coef_kernel[(cdiv(channels, block),)](total_ptr=total, norm_ptr=norm, coef_ptr=coef, C=channels, BC=block)
    state("bn_coef", (total, norm), (coef,))
    return coef
