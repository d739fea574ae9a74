"""The block's parts as operations of their own: depthwise + BN + act, squeeze-and-excitation, BN + act, the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmbconv.biases import affine
from fastmbconv.block import BatchNorm, Padding
from fastmbconv.call import Part, Settings, Tensors, describe_single, geometry, norm, statistics
from fastmbconv.fused import stages
from fastmbconv.fused.stages import ExciteWeights, empty_vectors
from fastmbconv.kernels import batch_norm, depthwise_inference, ends, excite_backward, pool


class DepthwiseWeights(NamedTuple):
    weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None


class DepthwiseSaved(NamedTuple):
    u: Tensor
    norm: Tensor


def describe_depthwise(
    weight: Tensor, bn: BatchNorm, stride: int, padding: Padding, activation: str
) -> tuple[DepthwiseWeights, Tensors, Settings]:
    """Weights, running statistics and settings of a call of the first part."""
    settings = describe_single(DEPTHWISE.name, bn, activation)._replace(stride=stride, padding=padding)
    return DepthwiseWeights(weight, *affine(bn)), statistics(bn), settings


def depthwise_forward(
    x: Tensor, _: None, keep: None, weights: DepthwiseWeights, statistics: Tensors, settings: Settings
) -> tuple[Tensor, DepthwiseSaved]:
    """act(BN(depthwise(x)))."""
    u, norm1 = stages.depthwise_bn(
        x=x,
        expand_weight=None,
        weight=weights.weight,
        in_norm=None,
        activation="none",
        geometry=_geometry(x, weights, settings),
        bn=norm(settings, 0, weights.bn_weight, weights.bn_bias, statistics),
    )
    y = stages.end_block(u=u, norm=norm1, activation=settings.activations[0])
    return y, DepthwiseSaved(u, norm1)


def depthwise_backward(
    dy: Tensor,
    x: Tensor,
    keep: None,
    saved: DepthwiseSaved,
    weights: DepthwiseWeights,
    settings: Settings,
    needs: Sequence[bool],
) -> Tensors:
    (bn,) = settings.norms
    assert bn is not None
    grads, coef = stages.bn_backward(dy, saved.u, saved.norm, None, settings.activations[0], bn)
    du = batch_norm.bn_act_bwd(dy, saved.u, saved.norm, coef, None, settings.activations[0])
    dx, d_weight, _, _ = stages.depthwise_backward(
        dy=du,
        x=x,
        expand_weight=None,
        weight=weights.weight,
        in_norm=None,
        residual=None,
        activation="none",
        geometry=_geometry(x, weights, settings),
        bn=None,
    )
    return dx, d_weight, *grads


def depthwise_infer(x: Tensor, _: None, weights: DepthwiseWeights, statistics: Tensors, settings: Settings) -> Tensor:
    bn = stages.running(norm(settings, 0, weights.bn_weight, weights.bn_bias, statistics))
    place = _geometry(x, weights, settings)
    return depthwise_inference.depthwise_inference(
        x, None, None, weights.weight, bn, "none", settings.activations[0], *place, False
    )[0]


def depthwise_fake(
    x: Tensor, _: None, keep: None, weights: DepthwiseWeights, settings: Settings
) -> tuple[Tensor, DepthwiseSaved]:
    y = depthwise_fake_infer(x, None, weights, settings)
    return y.permute(0, 3, 1, 2), DepthwiseSaved(torch.empty_like(y), empty_vectors(x, 4, x.shape[3]))


def depthwise_fake_infer(x: Tensor, _: None, weights: DepthwiseWeights, settings: Settings) -> Tensor:
    place = _geometry(x, weights, settings)
    return x.new_empty(x.shape[0], place.out_height, place.out_width, x.shape[3])


def _geometry(x: Tensor, weights: DepthwiseWeights, settings: Settings) -> stages.Geometry:
    return geometry(x.shape[1], x.shape[2], weights.weight.shape[-1], settings.stride, settings.padding)


class ExciteSaved(NamedTuple):
    pooled: Tensor
    r: Tensor
    gate: Tensor


def excite_forward(
    x: Tensor, _: None, keep: None, weights: ExciteWeights, statistics: Tensors, settings: Settings
) -> tuple[Tensor, ExciteSaved]:
    """x * gate(x)."""
    excited = stages.squeeze_excite(
        u=x,
        norm=None,
        weights=weights,
        activation="none",
        se_activation=settings.se_activation,
        se_gate=settings.se_gate,
    )
    y = stages.end_block(u=x, norm=None, gate=excited.gate)
    return y, ExciteSaved(excited.pooled, excited.r, excited.gate)


def excite_backward_of(
    dy: Tensor,
    x: Tensor,
    keep: None,
    saved: ExciteSaved,
    weights: ExciteWeights,
    settings: Settings,
    needs: Sequence[bool],
) -> Tensors:
    sums = pool.pool(x, None, dy, "none")
    offset, _, *grads = excite_backward.excite_bwd(
        sums=sums,
        act_sums=None,
        pooled=saved.pooled,
        r=saved.r,
        gate=saved.gate,
        reduce_weight=weights.reduce,
        expand_weight=weights.expand,
        pixels=x.shape[1] * x.shape[2],
        activation=settings.se_activation,
        gate_function=settings.se_gate,
    )
    return batch_norm.bn_act_fwd(dy, None, saved.gate, offset, None, None, "none"), *grads


def excite_fake(
    x: Tensor, _: None, keep: None, weights: ExciteWeights, settings: Settings
) -> tuple[Tensor, ExciteSaved]:
    n, c = x.shape[0], x.shape[3]
    saved = ExciteSaved(x.new_empty(n, c), empty_vectors(x, n, weights.reduce.shape[0]), empty_vectors(x, n, c))
    return torch.empty_like(x).permute(0, 3, 1, 2), saved


class NormWeights(NamedTuple):
    bn_weight: Tensor | None
    bn_bias: Tensor | None


def norm_infer(u: Tensor, _: None, weights: NormWeights, statistics: Tensors, settings: Settings) -> Tensor:
    """act(BN(u))."""
    bn = stages.running(norm(settings, 0, weights.bn_weight, weights.bn_bias, statistics))
    return batch_norm.bn_act_fwd(u, bn, None, None, None, None, settings.activations[0])


def norm_fake(u: Tensor, _: None, weights: NormWeights, settings: Settings) -> Tensor:
    return torch.empty_like(u)


def pool_infer(x: Tensor, _: None, weights: DepthwiseWeights, statistics: Tensors, settings: Settings) -> Tensor:
    """[N, O]: the mean over the image of act(BN(pointwise(x)))."""
    bn = stages.running(norm(settings, 0, weights.bn_weight, weights.bn_bias, statistics))
    return ends.pointwise_pool(x, weights.weight, bn, settings.activations[0])


def pool_fake(x: Tensor, _: None, weights: DepthwiseWeights, settings: Settings) -> Tensor:
    return x.new_empty(x.shape[0], weights.weight.shape[0])


DEPTHWISE = Part(
    "depthwise_bn_act",
    DepthwiseWeights,
    DepthwiseSaved,
    depthwise_forward,
    depthwise_fake,
    lambda *_: (True, True),
    depthwise_backward,
    depthwise_infer,
    depthwise_fake_infer,
)
EXCITE = Part(
    "squeeze_excite",
    ExciteWeights,
    ExciteSaved,
    excite_forward,
    excite_fake,
    lambda *_: (True,) * 3,
    excite_backward_of,
)
NORM = Part("bn_act", NormWeights, infer=norm_infer, fake_infer=norm_fake)
POOL = Part("pointwise_bn_act_pool", DepthwiseWeights, infer=pool_infer, fake_infer=pool_fake)
