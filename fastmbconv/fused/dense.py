"""What follows a dense convolution u, in launches: BN1, act, [SE, project, BN2, act,] stochastic depth, + shortcut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmbconv import call
from fastmbconv.block import DenseBlock
from fastmbconv.call import Part, Settings, Tensors, affine, norm, norm_settings, statistics
from fastmbconv.fused import stages
from fastmbconv.fused.stages import empty_vectors
from fastmbconv.kernels import batch_norm, pointwise, pool
from fastmbconv.kernels.squeeze_excite import excite_fwd


class Weights(NamedTuple):
    """What gradients are of, in the modules' own shapes; None where the block has no such part."""

    bn1_weight: Tensor | None
    bn1_bias: Tensor | None
    reduce: Tensor | None
    reduce_bias: Tensor | None
    se_expand: Tensor | None
    se_expand_bias: Tensor | None
    project: Tensor | None
    bn2_weight: Tensor | None
    bn2_bias: Tensor | None


class Saved(NamedTuple):
    """What the forward keeps beside u; `v` is the projection's output, `project` its weight rounded, where it was."""

    v: Tensor | None
    norm1: Tensor
    norm2: Tensor | None
    pooled: Tensor | None
    act_sums: Tensor | None
    r: Tensor | None
    gate: Tensor | None
    project: Tensor | None


def describe(block: DenseBlock, residual: bool) -> tuple[Weights, Tensors, Settings]:
    """A block's weights, running statistics and settings in a call; `residual` where the kernels add the shortcut."""
    bns = (block.bn1, block.bn2)
    tensors = (*affine(block.bn1), *call.excite(block.se), block.project_weight, *affine(block.bn2))
    settings = Settings(
        part=PART.name,
        activations=block.activations,
        norms=tuple(norm_settings(bn) for bn in bns),
        residual=residual,
        **call.excite_settings(block.se),
    )
    return Weights._make(tensors), statistics(*bns), settings


def forward(
    u: Tensor, shortcut: Tensor | None, keep: Tensor | None, weights: Weights, statistics: Tensors, settings: Settings
) -> tuple[Tensor, Saved]:
    """(y, what the backward needs beside u)."""
    activation, last = settings.activations
    norm1 = stages.image_norm(u=u, bn=norm(settings, 0, weights.bn1_weight, weights.bn1_bias, statistics))
    if weights.project is None:
        y = stages.end_block(u=u, norm=norm1, keep=keep, residual=shortcut, activation=activation)
        return y, Saved(None, norm1, *(None,) * 6)
    project = stages.squeeze_excite_project(
        u=u,
        norm=norm1,
        weights=weights,
        project=weights.project,
        activation=activation,
        se_activation=settings.se_activation,
        se_gate=settings.se_gate,
        bn=norm(settings, 1, weights.bn2_weight, weights.bn2_bias, statistics),
    )
    y = stages.end_block(u=project.u, norm=project.norm, keep=keep, residual=shortcut, activation=last)
    excite = project.excite or (None,) * 4
    return y, Saved._make((project.u, norm1, project.norm, *excite, project.weight))


def backward(
    dy: Tensor,
    u: Tensor,
    keep: Tensor | None,
    saved: Saved,
    weights: Weights,
    settings: Settings,
    needs: Sequence[bool],
) -> Tensors:
    """Gradients of u and of the weights."""
    (activation, last), (bn1, bn2) = settings.activations, settings.norms
    assert bn1 is not None
    if weights.project is None:
        grads1, coef1 = stages.bn_backward(dy, u, saved.norm1, keep, activation, bn1)
        du = batch_norm.bn_act_bwd(dy, u, saved.norm1, coef1, keep, activation)
        return du, *grads1, *(None,) * 7
    assert bn2 is not None and saved.v is not None and saved.norm2 is not None
    grads2, coef2 = stages.bn_backward(dy, saved.v, saved.norm2, keep, last, bn2)
    project = stages.project_backward_from(
        dy=dy,
        u3=saved.v,
        norm3=saved.norm2,
        activation3=last,
        coef3=coef2,
        keep=keep,
        weight=weights.project if saved.project is None else saved.project,
        u2=u,
        norm2=saved.norm1,
        excite=stages.excited(saved),
        excite_weights=stages.excite_weights(weights),
        activation=activation,
        se_activation=settings.se_activation,
        se_gate=settings.se_gate,
        bn2=bn1,
        weight_gradient=needs[1 + Weights._fields.index("project")],
    )
    return project.du2, *project.bn2, *project.excite, project.weight, *grads2


def infer(u: Tensor, shortcut: Tensor | None, weights: Weights, statistics: Tensors, settings: Settings) -> Tensor:
    """With running statistics."""
    activation, last = settings.activations
    bn1 = stages.running(norm(settings, 0, weights.bn1_weight, weights.bn1_bias, statistics))
    if weights.project is None:
        return batch_norm.bn_act_fwd(u, bn1, None, None, None, shortcut, activation)
    gate = None
    if (excite_weights := stages.excite_weights(weights)) is not None:
        sums = pool.pool(u, bn1, None, activation)
        _, gate = excite_fwd(sums, u.shape[1] * u.shape[2], *excite_weights, settings.se_activation, settings.se_gate)
    return pointwise.pointwise_inference(
        x=u,
        in_bn=bn1,
        in_activation=activation,
        weight=weights.project,
        gate=gate,
        bn=stages.running(norm(settings, 1, weights.bn2_weight, weights.bn2_bias, statistics)),
        residual=shortcut,
        activation=last,
    )


def fake_forward(
    u: Tensor, shortcut: Tensor | None, keep: Tensor | None, weights: Weights, settings: Settings
) -> tuple[Tensor, Saved]:
    """`forward`'s results, empty."""
    n, _, _, c = u.shape
    reduced = 0 if weights.reduce is None else weights.reduce.shape[0]
    y = fake_infer(u, shortcut, weights, settings)
    everything = Saved(
        v=torch.empty_like(y),
        norm1=empty_vectors(u, 4, c),
        norm2=empty_vectors(u, 4, y.shape[3]),
        pooled=u.new_empty(n, c),
        act_sums=empty_vectors(u, n, 2, c),
        r=empty_vectors(u, n, reduced),
        gate=empty_vectors(u, n, c),
        project=u.new_empty(y.shape[3], c),
    )
    kept = stages.keep_present(everything, present(u, weights, settings))
    return y.permute(0, 3, 1, 2), Saved._make(kept)


def present(u: Tensor, weights: Weights, settings: Settings) -> tuple[bool, ...]:
    """Which of `Saved` a forward keeps."""
    project, excites = weights.project is not None, weights.reduce is not None
    rounds = weights.project is not None and stages.rounds_weight(weights.project, u, excites)
    return (project, True, project, *(excites,) * 4, rounds)


def fake_infer(u: Tensor, shortcut: Tensor | None, weights: Weights, settings: Settings) -> Tensor:
    """`infer`'s result, empty."""
    return torch.empty_like(u) if weights.project is None else u.new_empty(*u.shape[:3], weights.project.shape[0])


PART = Part("dense", Weights, Saved, forward, fake_forward, present, backward, infer, fake_infer)
