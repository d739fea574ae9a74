"""The operators that run without gradients, with fake implementations; a block is one of them, and at most 4 launches.

A fifth rounds a long weight, in autocast and large batches.
Images are [N, H, W, C] contiguous. A BatchNorm is its weight, bias, running mean, running variance and eps; its scale
and shift are computed where they are used, so nothing here is older than those tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmbconv.kernels import batch_norm, depthwise_inference, ends, squeeze_excite
from fastmbconv.kernels import pointwise as pointwise_kernels
from fastmbconv.kernels import pool as pool_kernels
from fastmbconv.kernels.running import Running
from fastmbconv.ops import _operator


@_operator()
def mbconv_inference(
    x: Tensor,
    expand_weight: Tensor | None,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    eps1: float,
    depthwise_weight: Tensor,
    bn2_weight: Tensor | None,
    bn2_bias: Tensor | None,
    running_mean2: Tensor,
    running_var2: Tensor,
    eps2: float,
    reduce_weight: Tensor | None,
    reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None,
    se_expand_bias: Tensor | None,
    project_weight: Tensor,
    bn3_weight: Tensor | None,
    bn3_bias: Tensor | None,
    running_mean3: Tensor,
    running_var3: Tensor,
    eps3: float,
    activation: str,
    se_activation: str,
    residual: bool,
    stride: int,
    pad_top: int,
    pad_left: int,
    out_height: int,
    out_width: int,
) -> Tensor:
    """The whole block with BatchNorms that use their running statistics."""
    bn1 = None
    inside, h = False, x
    if expand_weight is not None:
        assert running_mean1 is not None and running_var1 is not None
        bn1 = Running(bn1_weight, bn1_bias, running_mean1, running_var1, eps1)
        kernel_size = depthwise_weight.shape[-1]
        inside = depthwise_inference.expands_inside(x.shape[0], kernel_size, x.shape[3], x.dtype)
        if not inside:
            h = pointwise_kernels.pointwise_inference(x, None, "none", expand_weight, None, bn1, None, activation)
    h, parts = depthwise_inference.depthwise_inference(
        h, expand_weight if inside else None, bn1 if inside else None, depthwise_weight,
        Running(bn2_weight, bn2_bias, running_mean2, running_var2, eps2), activation,
        stride, pad_top, pad_left, out_height, out_width, reduce_weight is not None,
    )  # fmt: skip
    gate = None
    if parts is not None:
        assert reduce_weight is not None and reduce_bias is not None
        assert se_expand_weight is not None and se_expand_bias is not None
        _, gate = squeeze_excite.excite_fwd(
            parts.unsqueeze(2),
            out_height * out_width,
            reduce_weight,
            reduce_bias,
            se_expand_weight,
            se_expand_bias,
            se_activation,
        )
    bn3 = Running(bn3_weight, bn3_bias, running_mean3, running_var3, eps3)
    return pointwise_kernels.pointwise_inference(
        h, None, "none", project_weight, gate, bn3, x if residual else None, "none"
    )


@mbconv_inference.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    project_weight, (out_height, out_width) = args[16], args[-2:]
    return x.new_empty(x.shape[0], out_height, out_width, project_weight.shape[0])


@_operator()
def dense_inference(
    u: Tensor,
    shortcut: Tensor | None,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    running_mean1: Tensor,
    running_var1: Tensor,
    eps1: float,
    reduce_weight: Tensor | None,
    reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None,
    se_expand_bias: Tensor | None,
    project_weight: Tensor | None,
    bn2_weight: Tensor | None,
    bn2_bias: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    eps2: float,
    activation: str,
    se_activation: str,
) -> Tensor:
    """What follows a dense convolution u, with running statistics: BN, act, [SE,] [project, BN,] + shortcut."""
    bn1 = Running(bn1_weight, bn1_bias, running_mean1, running_var1, eps1)
    if project_weight is None:
        return batch_norm.bn_act_fwd(u, bn1, None, None, None, shortcut, activation)
    assert running_mean2 is not None and running_var2 is not None
    gate = None
    if reduce_weight is not None:
        assert reduce_bias is not None and se_expand_weight is not None and se_expand_bias is not None
        sums = pool_kernels.pool(u, bn1, None, activation)
        _, gate = squeeze_excite.excite_fwd(
            sums, u.shape[1] * u.shape[2], reduce_weight, reduce_bias, se_expand_weight, se_expand_bias, se_activation
        )
    bn2 = Running(bn2_weight, bn2_bias, running_mean2, running_var2, eps2)
    return pointwise_kernels.pointwise_inference(u, bn1, activation, project_weight, gate, bn2, shortcut, "none")


@dense_inference.register_fake
def _(u: Tensor, *args: Any) -> Tensor:
    project_weight = args[10]
    return torch.empty_like(u) if project_weight is None else u.new_empty(*u.shape[:3], project_weight.shape[0])


@_operator()
def depthwise_bn_act_inference(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
    out_height: int,
    out_width: int,
) -> Tensor:
    """act(BN(depthwise(x)))."""
    bn = Running(bn_weight, bn_bias, running_mean, running_var, eps)
    return depthwise_inference.depthwise_inference(
        x, None, None, weight, bn, activation, stride, pad_top, pad_left, out_height, out_width, False
    )[0]


@depthwise_bn_act_inference.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], *args[-2:], x.shape[3])


@_operator()
def bn_act_inference(
    u: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
) -> Tensor:
    """act(BN(u))."""
    bn = Running(bn_weight, bn_bias, running_mean, running_var, eps)
    return batch_norm.bn_act_fwd(u, bn, None, None, None, None, activation)


@bn_act_inference.register_fake
def _(u: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(u)


@_operator()
def pointwise_pool(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
) -> Tensor:
    """[N, O]: the mean over the image of act(BN(pointwise(x)))."""
    return ends.pointwise_pool(x, weight, Running(bn_weight, bn_bias, running_mean, running_var, eps), activation)


@pointwise_pool.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
