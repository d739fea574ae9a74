"""The stages that blocks are made of: a convolution or a reduction, and the BatchNorm that it ends with.

`norm` is [4, C] (mean, rstd, scale, shift), `coef` is [4, C] (p, q, r, mean of du = p * dv + q * (u - mean) + r), and
`grads` are a BatchNorm's two, [C] each (of weight, of bias). Statistics of several processes are one small collective
in each direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmbconv import ranks
from fastmbconv.call import Geometry, Norm, NormSettings
from fastmbconv.kernels import batch_norm, depthwise, excite_backward, moments, pool, project_backward, synchronised
from fastmbconv.kernels import pointwise as pointwise_kernels
from fastmbconv.kernels.launching import writing
from fastmbconv.kernels.library import cast
from fastmbconv.kernels.running import Running
from fastmbconv.kernels.squeeze_excite import excite_fwd
from fastmbconv.kernels.traffic import summed
from fastmbconv.kernels.tuning import accumulator

Pair = tuple[Tensor, Tensor]


class Excite(NamedTuple):
    """What squeeze-and-excitation keeps: `act_sums` [N, 2, C] are those of act' and act' * xhat, for the backward."""

    pooled: Tensor
    act_sums: Tensor
    r: Tensor
    gate: Tensor


class ExciteWeights(NamedTuple):
    """reduce [R, C, 1, 1] and its bias [R], expand [C, R, 1, 1] and its bias [C]."""

    reduce: Tensor
    reduce_bias: Tensor
    expand: Tensor
    expand_bias: Tensor


def excite_weights(weights: Any) -> ExciteWeights | None:
    """Those among a block's weights, if it has any."""
    if weights.reduce is None:
        return None
    return ExciteWeights(weights.reduce, weights.reduce_bias, weights.se_expand, weights.se_expand_bias)


def excited(saved: Any) -> Excite | None:
    """What squeeze-and-excitation kept among what a block saved."""
    return None if saved.gate is None else Excite(saved.pooled, saved.act_sums, saved.r, saved.gate)


def keep_present(tensors: Iterable[Tensor | None], there: Iterable[bool]) -> Iterator[Tensor | None]:
    """Each tensor that is there, None in the others' places."""
    return (tensor if each else None for tensor, each in zip(tensors, there, strict=True))


def empty_vectors(like: Tensor, *shape: int) -> Tensor:
    """As wide as sums and statistics of `like` are."""
    return like.new_empty(shape, dtype=accumulator(like.dtype))


def running(bn: Norm) -> Running:
    """A BatchNorm as the fixed affine map of its running statistics."""
    assert bn.running_mean is not None and bn.running_var is not None
    return Running(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.settings.eps)


def end_norm(partials: Tensor | None, bn: Norm, dtype: torch.dtype, channels: int) -> Tensor:
    """norm, from the moments' partials or the running statistics, which move where the call says so."""
    group = bn.settings.group
    if partials is not None and group is not None:
        partials = synchronised.bn_merge(partials)
        partials = partials if writing() else ranks.gathered(partials, group)
    return batch_norm.bn_finalize(
        partials=partials,
        weight=bn.weight,
        bias=bn.bias,
        running_mean=bn.running_mean,
        running_var=bn.running_var,
        num_batches_tracked=bn.num_batches_tracked,
        eps=bn.settings.eps,
        momentum=bn.settings.momentum,
        update=bn.settings.updates,
        dtype=dtype,
        channels=channels,
    )


def end_norm_backward(
    sums: Tensor, norm: Tensor, count: int, bn: NormSettings, dw: Tensor | None = None
) -> tuple[Pair, Tensor, Tensor | None]:
    """(grads, coef, sum of `dw`) from partial sums [P, 2, C] of dv and dv * xhat."""
    grads, coef, d_weight = batch_norm.bn_bwd_finalize(sums, norm, count, bn.batch_statistics, dw)
    return grads, share_coef(grads, coef, norm, count, bn), d_weight


def share_coef(grads: Pair, coef: Tensor, norm: Tensor, count: int, bn: NormSettings) -> Tensor:
    """`coef` of this process's sums, or, where statistics are those of a group of processes, of everybody's."""
    if not bn.batch_statistics or bn.group is None:
        return coef
    total = norm.new_empty(2 * norm.shape[1] + 1) if writing() else ranks.total_of_sums(grads, count, bn.group)
    return synchronised.bn_coef(total, norm)


def pointwise_bn(
    x: Tensor, weight: Tensor, in_norm: Tensor | None, gate: Tensor | None, activation: str, bn: Norm
) -> tuple[Tensor, Tensor]:
    """(u, norm): the 1x1 convolution of act(in_norm(x)) * gate, and the BatchNorm of its output."""
    u, partials = pointwise_kernels.pointwise_fwd(x, weight, in_norm, gate, activation, bn.batch_statistics)
    return u, end_norm(partials, bn, dtype=x.dtype, channels=weight.shape[0])


def expand_norm(x: Tensor, weight: Tensor, bn: Norm) -> Tensor:
    """norm: the BatchNorm of the 1x1 convolution of x, whose output is not kept."""
    partials = pointwise_kernels.pointwise_moments(x, weight) if bn.batch_statistics else None
    return end_norm(partials, bn, dtype=x.dtype, channels=weight.shape[0])


def image_norm(u: Tensor, bn: Norm) -> Tensor:
    """norm: the BatchNorm of an image that no kernel of ours wrote."""
    partials = moments.moments(u) if bn.batch_statistics else None
    return end_norm(partials, bn, dtype=u.dtype, channels=u.shape[3])


def depthwise_bn(
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    in_norm: Tensor | None,
    activation: str,
    geometry: Geometry,
    bn: Norm,
) -> tuple[Tensor, Tensor]:
    """(u, norm): the depthwise convolution of act(in_norm(x)), and the BatchNorm of its output.

    With `expand_weight` x is the block's input and its expansion stands in x's place.
    """
    u, partials = depthwise.depthwise_fwd(
        x=x,
        expand_weight=expand_weight,
        weight=weight,
        norm=in_norm,
        activation=activation,
        **geometry._asdict(),
        moments=bn.batch_statistics,
    )
    return u, end_norm(partials, bn, dtype=x.dtype, channels=weight.shape[0])


def squeeze_excite(
    u: Tensor, norm: Tensor | None, weights: ExciteWeights, activation: str, se_activation: str, se_gate: str
) -> Excite:
    """Of act(norm(u)); `act_sums` is empty without a norm."""
    sums = pool.pool(u, norm, None, activation)
    kept, gate = excite_fwd(sums, u.shape[1] * u.shape[2], *weights, se_activation, se_gate, u.dtype)
    assert kept is not None
    return Excite._make((*kept, gate))


def round_weight(weight: Tensor, x: Tensor, gate: Tensor | None) -> Tensor | None:
    """A projection's weight [O, I] in x's dtype, where both directions fetch it again and again; else None."""
    if rounds_weight(weight, x, gate is not None):
        return cast(weight, x.dtype)
    return None


def rounds_weight(weight: Tensor, x: Tensor, gated: bool) -> bool:
    """Whether `round_weight` makes one."""
    often = pointwise_kernels.rounds_weight(weight.shape[1], weight.shape[0], 3 if gated else 2, x.dtype)
    return often and weight.dtype != x.dtype


class Projected(NamedTuple):
    """The projection's output and its BatchNorm, what squeeze-and-excitation kept, and the weight if it was rounded."""

    u: Tensor
    norm: Tensor
    excite: Excite | None
    weight: Tensor | None


def squeeze_excite_project(
    u: Tensor, norm: Tensor, weights: Any, project: Tensor, activation: str, se_activation: str, se_gate: str, bn: Norm
) -> Projected:
    """The projection of act(norm(u)), gated where the block's `weights` have squeeze-and-excitation."""
    excite, se = None, excite_weights(weights)
    if se is not None:
        excite = squeeze_excite(u, norm, se, activation, se_activation, se_gate)
    gate = None if excite is None else excite.gate
    rounded = round_weight(project, u, gate)
    v, norm_v = pointwise_bn(
        x=u, weight=project if rounded is None else rounded, in_norm=norm, gate=gate, activation=activation, bn=bn
    )
    return Projected(v, norm_v, excite, rounded)


def end_block(
    u: Tensor,
    norm: Tensor | None,
    gate: Tensor | None = None,
    keep: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """act(norm(u)) * gate * keep + residual as [N, C, H, W] in channels_last, and no view of another tensor."""
    n, h, w, c = u.shape
    y = torch.empty(n, c, h, w, dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    batch_norm.bn_act_fwd(
        u=u, norm=norm, gate=gate, offset=None, keep=keep, residual=residual, activation=activation, y=nhwc(y)
    )
    return y


def nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] in any layout as contiguous [N, H, W, C]; no copy for channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def bn_backward(
    dy: Tensor, u: Tensor, norm: Tensor, keep: Tensor | None, activation: str, bn: NormSettings
) -> tuple[Pair, Tensor]:
    """(grads, coef) of act(norm(u)) * keep: the two reductions of BatchNorm's backward."""
    sums = batch_norm.bn_act_bwd_reduce(dy, u, norm, keep, activation)
    grads, coef, _ = end_norm_backward(sums, norm, u.numel() // u.shape[3], bn)
    return grads, coef


class ProjectGradients(NamedTuple):
    """`excite` are those of the reduce weight and bias and of the expand weight and bias."""

    du2: Tensor
    weight: Tensor | None
    bn2: Pair
    excite: tuple[Tensor | None, ...]


def project_backward_from(
    dy: Tensor,
    u3: Tensor,
    norm3: Tensor,
    activation3: str,
    coef3: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    u2: Tensor,
    norm2: Tensor,
    excite: Excite | None,
    excite_weights: ExciteWeights | None,
    activation: str,
    se_activation: str,
    se_gate: str,
    bn2: NormSettings,
    weight_gradient: bool,
) -> ProjectGradients:
    """From the block's output gradient to the depthwise convolution's output: steps 2 to 4 of CONTRIBUTING.md."""
    n, h, w, _ = u2.shape
    du3 = batch_norm.bn_act_bwd(dy, u3, None if activation3 == "none" else norm3, coef3, keep, activation3)
    da3 = None if project_backward.is_resident(u2, weight) else project_backward.multiply_weight(du3, weight)
    gate = None if excite is None else excite.gate
    sums = project_backward.project_bwd_sums(da3, du3, weight, u2, norm2, gate, activation)
    offset, d_excite = None, (None,) * 4
    if excite is None or excite_weights is None:
        grads2, coef2, _ = end_norm_backward(sums.flatten(0, 1), norm2, n * h * w, bn2)
    else:
        offset, bn, *d_excite = excite_backward.excite_bwd(
            sums=sums,
            act_sums=excite.act_sums,
            pooled=excite.pooled,
            r=excite.r,
            gate=excite.gate,
            reduce_weight=excite_weights.reduce,
            expand_weight=excite_weights.expand,
            pixels=h * w,
            activation=se_activation,
            gate_function=se_gate,
            norm=norm2,
            batch_statistics=bn2.batch_statistics,
        )
        assert bn is not None
        grads2, coef2 = bn[0], share_coef(bn[0], bn[1], norm2, n * h * w, bn2)
    du2, d_weight = project_backward.project_bwd_data(
        da3, du3, weight, u2, norm2, coef2, gate, offset, activation, weight_gradient
    )
    return ProjectGradients(du2, d_weight, grads2, tuple(d_excite))


def depthwise_backward(
    dy: Tensor,
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    in_norm: Tensor | None,
    residual: Tensor | None,
    activation: str,
    geometry: Geometry,
    bn: NormSettings | None,
) -> tuple[Tensor, Tensor, Pair | None, Tensor | None]:
    """(dv, weight gradient, grads, coef) for the BatchNorm of x; without `in_norm` dv is dx (+ residual)."""
    dv, dw, sums = depthwise.depthwise_bwd(
        dy=dy,
        x=x,
        expand_weight=expand_weight,
        weight=weight,
        norm=in_norm,
        residual=residual,
        activation=activation,
        stride=geometry.stride,
        pad_top=geometry.pad_top,
        pad_left=geometry.pad_left,
    )
    if in_norm is None or sums is None or bn is None:
        return dv, summed(dw), None, None
    grads, coef, d_weight = end_norm_backward(sums, in_norm, x.numel() // x.shape[3], bn, dw)
    assert d_weight is not None
    return dv, d_weight, grads, coef
