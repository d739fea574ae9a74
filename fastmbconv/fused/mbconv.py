"""MBConv's launches. Names: x -We-> u1 -BN1, act-> depthwise-> u2 -BN2, act, gate-> -Wp-> u3 -BN3, act, keep, + x.

Saved are x, u1, u2, u3 (the outputs of the three convolutions, before their BatchNorms) and vectors; every activation
and every normalised tensor is computed again where it is used. `lean` keeps no u1: where registers allow, the depthwise
kernels compute it as they go, in both directions; elsewhere the backward computes it once more. The derivation of the
backward is in CONTRIBUTING.md, by the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmbconv import call
from fastmbconv.block import Block
from fastmbconv.call import (
    Geometry,
    Part,
    Settings,
    Tensors,
    affine,
    geometry,
    norm,
    norm_settings,
    statistics,
)
from fastmbconv.fused import stages
from fastmbconv.fused.stages import empty_vectors
from fastmbconv.kernels import depthwise_inference, expand_backward, pointwise
from fastmbconv.kernels.squeeze_excite import excite_fwd
from fastmbconv.kernels.tuning import walks_expansion


class Weights(NamedTuple):
    """What a block's gradients are of, in the modules' own shapes; None where the block has no such part."""

    expand: Tensor | None
    bn1_weight: Tensor | None
    bn1_bias: Tensor | None
    depthwise: Tensor
    bn2_weight: Tensor | None
    bn2_bias: Tensor | None
    reduce: Tensor | None
    reduce_bias: Tensor | None
    se_expand: Tensor | None
    se_expand_bias: Tensor | None
    project: Tensor
    bn3_weight: Tensor | None
    bn3_bias: Tensor | None


class Saved(NamedTuple):
    """What the forward keeps for the backward; `project` is the projection's weight rounded, where it was."""

    u1: Tensor | None
    u2: Tensor
    u3: Tensor
    norm1: Tensor | None
    norm2: Tensor
    norm3: Tensor
    pooled: Tensor | None
    act_sums: Tensor | None
    r: Tensor | None
    gate: Tensor | None
    project: Tensor | None


def describe(block: Block, residual: bool, lean: bool) -> tuple[Weights, Tensors, Settings]:
    """A block's weights, running statistics and settings in a call; `residual` where the kernels add the shortcut."""
    last = block.bn3 or call.no_norm(block.project_weight, block.project_bias)
    bns = (block.bn1, block.bn2, last)
    tensors = (
        block.expand_weight, *affine(block.bn1), block.depthwise_weight, *affine(block.bn2), *call.excite(block.se),
        block.project_weight, *affine(last),
    )  # fmt: skip
    settings = Settings(
        part=PART.name,
        activations=block.activations,
        norms=tuple(norm_settings(bn) for bn in bns),
        residual=residual,
        lean=lean,
        stride=block.stride,
        padding=block.padding,
        **call.excite_settings(block.se),
    )
    return Weights._make(tensors), statistics(*bns), settings


def forward(
    x: Tensor, shortcut: Tensor | None, keep: Tensor | None, weights: Weights, statistics: Tensors, settings: Settings
) -> tuple[Tensor, Saved]:
    """(y, what the backward needs beside x)."""
    (activation1, activation2, activation3), place = settings.activations, _geometry(x, weights, settings)
    walked = _is_walked(x, weights, settings)
    # Expand: u1, or its statistics alone where the depthwise convolution computes u1 itself.
    u1, norm1 = None, None
    if weights.expand is not None:
        bn1 = norm(settings, 0, weights.bn1_weight, weights.bn1_bias, statistics)
        if walked:
            norm1 = stages.expand_norm(x=x, weight=weights.expand, bn=bn1)
        else:
            u1, norm1 = stages.pointwise_bn(
                x=x, weight=weights.expand, in_norm=None, gate=None, activation="none", bn=bn1
            )
    # Depthwise.
    u2, norm2 = stages.depthwise_bn(
        x=x if u1 is None else u1,
        expand_weight=weights.expand if walked else None,
        weight=weights.depthwise,
        in_norm=norm1,
        activation="none" if norm1 is None else activation1,
        geometry=place,
        bn=norm(settings, 1, weights.bn2_weight, weights.bn2_bias, statistics),
    )
    # Squeeze and excite, project.
    project = stages.squeeze_excite_project(
        u=u2,
        norm=norm2,
        weights=weights,
        project=weights.project,
        activation=activation2,
        se_activation=settings.se_activation,
        se_gate=settings.se_gate,
        bn=norm(settings, 2, weights.bn3_weight, weights.bn3_bias, statistics),
    )
    # BN3, stochastic depth, shortcut.
    y = stages.end_block(
        u=project.u,
        norm=project.norm,
        keep=keep,
        residual=_residual(x, shortcut, settings),
        activation=activation3,
    )
    kept = None if settings.lean else u1
    excite = project.excite or (None,) * 4
    return y, Saved._make((kept, u2, project.u, norm1, norm2, project.norm, *excite, project.weight))


def backward(
    dy: Tensor,
    x: Tensor,
    keep: Tensor | None,
    saved: Saved,
    weights: Weights,
    settings: Settings,
    needs: Sequence[bool],
) -> Tensors:
    """Gradients of x and of the weights."""
    activation1, activation2, activation3 = settings.activations
    bn1, bn2, bn3 = settings.norms
    assert bn2 is not None and bn3 is not None
    needs_x, needs_expand = needs[:2]
    shortcut = dy if settings.residual else None
    # 2. BN3's sums.
    grads3, coef3 = stages.bn_backward(dy, saved.u3, saved.norm3, keep, activation3, bn3)
    # 3. and 4. Project and squeeze-and-excitation: BN2's sums, and du2.
    project = stages.project_backward_from(
        dy=dy,
        u3=saved.u3,
        norm3=saved.norm3,
        activation3=activation3,
        coef3=coef3,
        keep=keep,
        weight=weights.project if saved.project is None else saved.project,
        u2=saved.u2,
        norm2=saved.norm2,
        excite=stages.excited(saved),
        excite_weights=stages.excite_weights(weights),
        activation=activation2,
        se_activation=settings.se_activation,
        se_gate=settings.se_gate,
        bn2=bn2,
        weight_gradient=needs[1 + Weights._fields.index("project")],
    )
    dx = d_expand = grads1 = d_depthwise = None
    if any(needs[:5]):  # else x, expansion, BN1 and depthwise are all frozen
        # 5. Depthwise: dv1, or dx where nothing expands.
        walked = _is_walked(x, weights, settings)
        u1 = saved.u1
        if weights.expand is not None and u1 is None and not walked:
            u1 = pointwise.pointwise_fwd(x, weights.expand, None, None, "none", False)[0]
        dv1, d_depthwise, grads1, coef1 = stages.depthwise_backward(
            dy=project.du2,
            x=x if u1 is None else u1,
            expand_weight=weights.expand if walked else None,
            weight=weights.depthwise,
            in_norm=saved.norm1,
            residual=shortcut if weights.expand is None else None,
            activation="none" if weights.expand is None else activation1,
            geometry=_geometry(x, weights, settings),
            bn=bn1,
        )
        project = project._replace(du2=x)  # frees the widest tensor: the expand convolution may need as much
        # 6. Expand.
        if weights.expand is None:
            dx = dv1
        elif needs_x or needs_expand:
            assert coef1 is not None and bn1 is not None
            dx, d_expand = expand_backward.expand_bwd(
                dv=dv1,
                u=u1,
                x=x,
                weight=weights.expand,
                coef=coef1,
                residual=shortcut,
                batch_statistics=bn1.batch_statistics,
            )
    return (
        dx, d_expand, *(grads1 or (None, None)), d_depthwise, *project.bn2, *project.excite, project.weight, *grads3
    )  # fmt: skip


def infer(x: Tensor, shortcut: Tensor | None, weights: Weights, statistics: Tensors, settings: Settings) -> Tensor:
    """The block with BatchNorms that use their running statistics: four launches, in large batches up to two more."""
    (activation1, activation2, activation3), place = settings.activations, _geometry(x, weights, settings)
    bn1, inside, h = None, False, x
    if weights.expand is not None:
        bn1 = stages.running(norm(settings, 0, weights.bn1_weight, weights.bn1_bias, statistics))
        inside = depthwise_inference.expands_inside(x.shape[0], weights.depthwise.shape[-1], x.shape[3], x.dtype)
        if not inside:
            h = pointwise.pointwise_inference(
                x=x, in_bn=None, in_activation="none", weight=weights.expand, gate=None, bn=bn1, residual=None,
                activation=activation1,
            )  # fmt: skip
    h, parts = depthwise_inference.depthwise_inference(
        h,
        weights.expand if inside else None,
        bn1 if inside else None,
        weights.depthwise,
        stages.running(norm(settings, 1, weights.bn2_weight, weights.bn2_bias, statistics)),
        activation1 if inside else "none",
        activation2,
        *place,
        weights.reduce is not None,
    )
    gate = None
    if parts is not None and (excite_weights := stages.excite_weights(weights)) is not None:
        pixels = place.out_height * place.out_width
        _, gate = excite_fwd(parts.unsqueeze(2), pixels, *excite_weights, settings.se_activation, settings.se_gate)
    return pointwise.pointwise_inference(
        x=h,
        in_bn=None,
        in_activation="none",
        weight=weights.project,
        gate=gate,
        bn=stages.running(norm(settings, 2, weights.bn3_weight, weights.bn3_bias, statistics)),
        residual=_residual(x, shortcut, settings),
        activation=activation3,
    )


def fake_forward(
    x: Tensor, shortcut: Tensor | None, keep: Tensor | None, weights: Weights, settings: Settings
) -> tuple[Tensor, Saved]:
    """`forward`'s results, empty."""
    n, h, w, _channels = x.shape
    hidden, out = weights.depthwise.shape[0], weights.project.shape[0]
    reduced = 0 if weights.reduce is None else weights.reduce.shape[0]
    y = fake_infer(x, None, weights, settings)
    everything = Saved(
        u1=x.new_empty(n, h, w, hidden),
        u2=y.new_empty(*y.shape[:3], hidden),
        u3=torch.empty_like(y),
        norm1=empty_vectors(x, 4, hidden),
        norm2=empty_vectors(x, 4, hidden),
        norm3=empty_vectors(x, 4, out),
        pooled=x.new_empty(n, hidden),
        act_sums=empty_vectors(x, n, 2, hidden),
        r=empty_vectors(x, n, reduced),
        gate=empty_vectors(x, n, hidden),
        project=x.new_empty(out, hidden),
    )
    kept = stages.keep_present(everything, present(x, weights, settings))
    return y.permute(0, 3, 1, 2), Saved._make(kept)


def present(x: Tensor, weights: Weights, settings: Settings) -> tuple[bool, ...]:
    """Which of `Saved` a forward keeps."""
    expands, excites = weights.expand is not None, weights.reduce is not None
    rounds = stages.rounds_weight(weights.project, x, excites)
    return (expands and not settings.lean, True, True, expands, True, True, *(excites,) * 4, rounds)


def fake_infer(x: Tensor, shortcut: Tensor | None, weights: Weights, settings: Settings) -> Tensor:
    place = _geometry(x, weights, settings)
    return x.new_empty(x.shape[0], place.out_height, place.out_width, weights.project.shape[0])


def _residual(x: Tensor, shortcut: Tensor | None, settings: Settings) -> Tensor | None:
    """What is added at the end: x, or what came before x where something stands in front of the block."""
    return x if settings.residual else shortcut


def _geometry(x: Tensor, weights: Weights, settings: Settings) -> Geometry:
    return geometry(x.shape[1], x.shape[2], weights.depthwise.shape[-1], settings.stride, settings.padding)


def _is_walked(x: Tensor, weights: Weights, settings: Settings) -> bool:
    """Whether the depthwise kernels compute u1 as they go."""
    expands = settings.lean and weights.expand is not None
    return expands and walks_expansion(weights.depthwise.shape[-1], x.shape[3], x.dtype)


PART = Part("mbconv", Weights, Saved, forward, fake_forward, present, backward, infer, fake_infer)
