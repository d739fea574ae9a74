"""A BatchNorm that is a fixed affine map: y = scale * u + shift, from statistics that are there before the call.

scale = weight / sqrt(var + eps), shift = bias - mean * scale. A kernel gets it as `norm` [4, C] of batch_norm.py, or as
the BatchNorm's own tensors: then scale and shift are computed where they are used, and nothing is kept.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Running(NamedTuple):
    """A BatchNorm's tensors, [C] each, and its eps: all that it does without batch statistics."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]


def given(norm: "Tensor | Running | None", prefix: str = "") -> dict[str, Any]:
    """What a kernel takes for `load_map`, by its arguments' names; all None for no norm."""
    names = [prefix + name for name in ("bn_weight_ptr", "bn_bias_ptr", "mean_ptr", "var_ptr")]
    bn = norm if isinstance(norm, Running) else None
    tensors = (None,) * 4 if bn is None else bn.tensors
    return dict(zip(names, tensors, strict=True)) | {prefix.upper() + "EPS": 0.0 if bn is None else bn.eps}


@triton.jit
def affine(b_mean, b_rstd, weight_ptr, bias_ptr, o_c, m_c, ACC: tl.constexpr):
    """scale and shift of a block of channels with this mean and 1 / standard deviation."""
    b_scale = b_rstd
    if weight_ptr is not None:
        b_scale = b_scale * tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(ACC)
    b_shift = -b_mean * b_scale
    if bias_ptr is not None:
        b_shift += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(ACC)
    return b_scale, b_shift


@triton.jit
def load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, o_c, m_c, EPS: tl.constexpr, ACC: tl.constexpr):
    """scale and shift of a block of channels, from running statistics."""
    b_rstd = tl.rsqrt(tl.load(var_ptr + o_c, mask=m_c, other=1.0).to(ACC) + tl.full((), EPS, ACC))
    b_mean = tl.load(mean_ptr + o_c, mask=m_c, other=0.0).to(ACC)
    return affine(b_mean, b_rstd, weight_ptr, bias_ptr, o_c, m_c, ACC)


@triton.jit
def load_norm(norm_ptr, o_c, m_c, C):
    """scale and shift of a block of channels, from a norm [4, C]."""
    b_scale = tl.load(norm_ptr + 2 * C + o_c, mask=m_c, other=0.0)
    b_shift = tl.load(norm_ptr + 3 * C + o_c, mask=m_c, other=0.0)
    return b_scale, b_shift


@triton.jit
def load_map(
    norm_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, o_c, m_c, C, EPS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """scale and shift of a block of channels, from whichever of the two there is."""
    if norm_ptr is not None:
        return load_norm(norm_ptr, o_c, m_c, C)
    else:
        return load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, o_c, m_c, EPS, ACC)
