"""The fused ops as `torch.autograd.Function`s: which operators run, in which order, and what is saved between them.

The block saves x, u1, u2, u3 (the outputs of its three convolutions, before their BatchNorms) and vectors; every
activation and every normalised tensor is computed again where it is used. Derivation of the backward: CONTRIBUTING.md.
Images go in as [N, C, H, W] and come out as [N, H, W, C]: a Function's output that is a view can't be changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmbconv import dispatch, eager_backward, ops
from fastmbconv.kernels.pointwise import rounds_weight
from fastmbconv.kernels.tuning import walks_expansion

_TWICE = f"double backward: fastmbconv's kernels have first derivatives only; {dispatch.WAY_OUT}"


class BatchNormSetting(NamedTuple):
    """What a BatchNorm does in this call, apart from its tensors; `group` names the processes that it is taken over."""

    eps: float
    momentum: float | None
    batch_statistics: bool
    update: bool
    group: str | None


class DepthwiseSetting(NamedTuple):
    """Geometry of the depthwise convolution."""

    stride: int
    pad_top: int
    pad_left: int
    out_height: int
    out_width: int


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are, and an error where somebody differentiates them by one of the first `anchors` tensors."""

    @staticmethod
    def forward(ctx: Any, anchors: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[anchors:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(_TWICE)


def _marked(saved: Any, dy: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients, with the error of who differentiates them.

    Autograd visits what lies between them and what they are differentiated by: it must find all that they follow from.
    """
    anchors = [t for t in (dy, *saved) if t is not None and t.requires_grad]
    return _FirstDerivative.apply(len(anchors) + 1, *anchors, dy.new_empty(0).requires_grad_(), *gradients)


class _SavedOnce:
    """A Function's context whose saved tensors are unpacked once: a checkpoint gives them no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _backward(eager: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A Function's backward: `eager` instead inside a transform, and the error of a double backward, for any gradient.

    torch's own `once_differentiable` has no error where dy is a constant.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(ctx: Any, dy: Tensor) -> Any:
            twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            if twice:
                # A vmap hides what dy follows from, and torch.func takes no function like the one that marks gradients.
                if eager_backward.is_batched(dy) or dispatch.functorch_transforms():
                    raise RuntimeError(_TWICE)
                ctx = _SavedOnce(ctx)
            with torch.no_grad():
                gradients = (eager if eager_backward.is_transformed(dy) else backward)(ctx, dy)
            return _marked(ctx.saved_tensors, dy, gradients) if twice else gradients

        return checked

    return decorate


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] in any layout as contiguous [N, H, W, C]; no copy for channels_last.

    x itself is saved, not this view of it: a view made in a Function would not tell autograd who changed x in place.
    """
    return x.permute(0, 2, 3, 1).contiguous()


def _runner(x: Tensor) -> Any:
    """Where the operators of this call are looked up: their launchers themselves, or the dispatcher's operators."""
    return ops.direct if ops.plain(x) else ops


def _rounded(run: Any, weight: Tensor, x: Tensor, gate: Tensor | None) -> Tensor:
    """A projection's weight for both directions: in x's dtype where they fetch it again and again."""
    often = rounds_weight(weight.shape[1], weight.shape[0], 2 if gate is None else 3, x.dtype)
    return run.round_weight(weight, x) if often and weight.dtype != x.dtype else weight


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """With the weight's strides, where only axes of one entry differ: DistributedDataParallel asks for them."""
    if gradient is None or like is None or gradient.numel() != like.numel():  # an empty one stands for none
        return None
    gradient = gradient.reshape(like.shape).to(like.dtype)
    if gradient.stride() == like.stride() or not (gradient.is_contiguous() and like.is_contiguous()):
        return gradient
    return gradient.as_strided(like.shape, like.stride())


def _bn_grads(grads: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return _cast(grads[0], weight), _cast(grads[1], bias)


class DepthwiseBNActFunction(torch.autograd.Function):
    """act(BN(depthwise(x)))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        activation: str,
        depthwise: DepthwiseSetting,
        bn: BatchNormSetting,
        *running: Tensor | None,
    ) -> Tensor:
        saved, x = x, channels_last(x)
        run = _runner(x)
        u, norm = run.depthwise_bn(x, None, weight, None, "none", *depthwise, bn_weight, bn_bias, *running, *bn)
        ctx.save_for_backward(saved, weight, bn_weight, bn_bias, u, norm)
        ctx.setting = (activation, depthwise, bn)
        return run.bn_act(u, norm, None, None, None, activation)

    @staticmethod
    @_backward(eager_backward.depthwise_bn_act)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bn_weight, bn_bias, u, norm = ctx.saved_tensors
        activation, depthwise, bn = ctx.setting
        x, dy = channels_last(x), dy.contiguous()
        run = _runner(dy)
        grads, coef = run.bn_bwd(dy, u, norm, None, activation, bn.batch_statistics, bn.group)
        du = run.bn_act_bwd(dy, u, norm, coef, None, activation)
        dx, d_weight, _, _ = run.depthwise_bwd(du, x, None, weight, None, None, "none", *depthwise[:3], False)
        return (
            dx.permute(0, 3, 1, 2), _cast(d_weight, weight), *_bn_grads(grads, bn_weight, bn_bias),
            *(None,) * 6,
        )  # fmt: skip


class SqueezeExciteFunction(torch.autograd.Function):
    """x * gate(x)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        reduce_weight: Tensor,
        reduce_bias: Tensor,
        expand_weight: Tensor,
        expand_bias: Tensor,
        activation: str,
    ) -> Tensor:
        saved, x = x, channels_last(x)
        weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
        run = _runner(x)
        pooled, _, r, gate = run.pool_excite(x, None, *weights, "none", activation)
        ctx.save_for_backward(saved, pooled, r, gate, *weights)
        ctx.activation = activation
        return run.bn_act(x, None, gate, None, None, "none")

    @staticmethod
    @_backward(eager_backward.squeeze_excite)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, pooled, r, gate, *weights = ctx.saved_tensors
        x, run = channels_last(x), _runner(dy)
        dx, *grads = run.squeeze_excite_bwd(dy.contiguous(), x, pooled, r, gate, weights[0], weights[2], ctx.activation)
        return dx.permute(0, 3, 1, 2), *(_cast(g, w) for g, w in zip(grads, weights, strict=True)), None


class MBConvFunction(torch.autograd.Function):
    """The whole block; the optional parts (expansion, SE, stochastic depth) are None where the block has none.

    `running` is (running_mean, running_var, num_batches_tracked) of the three BatchNorms, moved in place. `lean`
    keeps no u1: where registers allow, the depthwise kernels compute it as they go, forward and backward; elsewhere the
    backward computes it once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expand_weight: Tensor | None,
        bn1_weight: Tensor | None,
        bn1_bias: Tensor | None,
        depthwise_weight: Tensor,
        bn2_weight: Tensor | None,
        bn2_bias: Tensor | None,
        reduce_weight: Tensor | None,
        reduce_bias: Tensor | None,
        se_expand_weight: Tensor | None,
        se_expand_bias: Tensor | None,
        project_weight: Tensor,
        bn3_weight: Tensor | None,
        bn3_bias: Tensor | None,
        keep: Tensor | None,
        activation: str,
        se_activation: str,
        residual: bool,
        lean: bool,
        depthwise: DepthwiseSetting,
        bn1: BatchNormSetting | None,
        bn2: BatchNormSetting,
        bn3: BatchNormSetting,
        *running: Tensor | None,
    ) -> Tensor:
        saved, x = x, channels_last(x)
        run = _runner(x)
        u1, norm1 = x, None
        walked = lean and walks_expansion(depthwise_weight.shape[-1], x.shape[3], x.dtype)
        if bn1 is not None and walked:
            norm1 = run.expand_norm(x, expand_weight, bn1_weight, bn1_bias, *running[:3], *bn1)
        elif bn1 is not None:
            u1, norm1 = run.pointwise_bn(x, expand_weight, None, None, "none", bn1_weight, bn1_bias, *running[:3], *bn1)
        u2, norm2 = run.depthwise_bn(
            u1, expand_weight if walked else None, depthwise_weight, norm1, "none" if bn1 is None else activation,
            *depthwise, bn2_weight, bn2_bias, *running[3:6], *bn2,
        )  # fmt: skip
        pooled = act_sums = r = gate = None
        if reduce_weight is not None:
            weights = (reduce_weight, reduce_bias, se_expand_weight, se_expand_bias)
            pooled, act_sums, r, gate = run.pool_excite(u2, norm2, *weights, activation, se_activation)
        rounded = _rounded(run, project_weight, x, gate)
        u3, norm3 = run.pointwise_bn(u2, rounded, norm2, gate, activation, bn3_weight, bn3_bias, *running[6:], *bn3)
        y = run.bn_act(u3, norm3, None, keep, x if residual else None, "none")
        ctx.save_for_backward(
            saved, None if bn1 is None or lean else u1, u2, u3, norm1, norm2, norm3, pooled, act_sums, r, gate, keep,
            expand_weight, bn1_weight, bn1_bias, depthwise_weight, bn2_weight, bn2_bias,
            reduce_weight, reduce_bias, se_expand_weight, se_expand_bias, project_weight, bn3_weight, bn3_bias,
            rounded,
        )  # fmt: skip
        ctx.setting = (activation, se_activation, residual, walked, depthwise, bn1, bn2, bn3)
        return y

    @staticmethod
    @_backward(eager_backward.mbconv)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, u1, u2, u3, norm1, norm2, norm3, pooled, act_sums, r, gate, keep,
            expand_weight, bn1_weight, bn1_bias, depthwise_weight, bn2_weight, bn2_bias,
            reduce_weight, reduce_bias, se_expand_weight, se_expand_bias, project_weight, bn3_weight, bn3_bias,
            rounded,
        ) = ctx.saved_tensors  # fmt: skip
        activation, se_activation, residual, walked, depthwise, bn1, bn2, bn3 = ctx.setting
        x, dy = channels_last(x), dy.contiguous()
        shortcut = dy if residual else None
        run = _runner(dy)
        grads3, coef3 = run.bn_bwd(dy, u3, norm3, keep, "none", bn3.batch_statistics, bn3.group)
        du2, d_project, grads2, *d_excite = run.project_bwd(
            dy, u3, coef3, keep, rounded, u2, norm2, gate, act_sums, pooled, r, reduce_weight, se_expand_weight,
            activation, se_activation, bn2.batch_statistics, ctx.needs_input_grad[11], bn2.group,
        )  # fmt: skip
        if not any(ctx.needs_input_grad[:5]):  # x, expand, bn1, depthwise: all frozen
            dx, d_expand, d_depthwise, d_bn1 = None, None, None, _bn_grads(coef3, None, None)
        elif bn1 is None:
            dx, d_depthwise, _, _ = run.depthwise_bwd(
                du2, x, None, depthwise_weight, None, shortcut, "none", *depthwise[:3], False
            )
            d_expand, d_bn1 = None, _bn_grads(coef3, None, None)
        else:
            if u1 is None and not walked:
                u1 = run.pointwise(x, expand_weight)
            dv1, d_depthwise, grads1, coef1 = run.depthwise_bwd(
                du2, x if u1 is None else u1, expand_weight if walked else None, depthwise_weight, norm1, None,
                activation, *depthwise[:3], bn1.batch_statistics, bn1.group,
            )  # fmt: skip
            d_bn1 = _bn_grads(grads1, bn1_weight, bn1_bias)
            dx = d_expand = None
            if any(ctx.needs_input_grad[:2]):
                del du2  # the widest of what is no longer needed: the expand convolution's backward may need as much
                dx, d_expand = run.expand_bwd(dv1, u1, x, expand_weight, coef1, shortcut, bn1.batch_statistics)
        excite_weights = (reduce_weight, reduce_bias, se_expand_weight, se_expand_bias)
        return (
            None if dx is None else dx.permute(0, 3, 1, 2), _cast(d_expand, expand_weight), *d_bn1,
            _cast(d_depthwise, depthwise_weight), *_bn_grads(grads2, bn2_weight, bn2_bias),
            *(_cast(g, w) for g, w in zip(d_excite, excite_weights, strict=True)),
            _cast(d_project, project_weight), *_bn_grads(grads3, bn3_weight, bn3_bias),
            *(None,) * 18,
        )  # fmt: skip


class DenseFunction(torch.autograd.Function):
    """What follows a dense convolution u: BN, act, [SE, project, BN,] stochastic depth, + shortcut.

    `running` is (running_mean, running_var, num_batches_tracked) of both BatchNorms, moved in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        shortcut: Tensor | None,
        bn1_weight: Tensor | None,
        bn1_bias: Tensor | None,
        reduce_weight: Tensor | None,
        reduce_bias: Tensor | None,
        se_expand_weight: Tensor | None,
        se_expand_bias: Tensor | None,
        project_weight: Tensor | None,
        bn2_weight: Tensor | None,
        bn2_bias: Tensor | None,
        keep: Tensor | None,
        activation: str,
        se_activation: str,
        bn1: BatchNormSetting,
        bn2: BatchNormSetting | None,
        *running: Tensor | None,
    ) -> Tensor:
        saved, u, x = u, channels_last(u), None if shortcut is None else channels_last(shortcut)
        run = _runner(u)
        norm1 = run.image_norm(u, bn1_weight, bn1_bias, *running[:3], *bn1)
        pooled = act_sums = r = gate = v = norm2 = rounded = None
        if reduce_weight is not None:
            weights = (reduce_weight, reduce_bias, se_expand_weight, se_expand_bias)
            pooled, act_sums, r, gate = run.pool_excite(u, norm1, *weights, activation, se_activation)
        if bn2 is None:
            y = run.bn_act(u, norm1, None, keep, x, activation)
        else:
            assert project_weight is not None
            rounded = _rounded(run, project_weight, u, gate)
            v, norm2 = run.pointwise_bn(u, rounded, norm1, gate, activation, bn2_weight, bn2_bias, *running[3:], *bn2)
            y = run.bn_act(v, norm2, None, keep, x, "none")
        ctx.save_for_backward(
            saved, v, norm1, norm2, pooled, act_sums, r, gate, keep, bn1_weight, bn1_bias, reduce_weight, reduce_bias,
            se_expand_weight, se_expand_bias, project_weight, bn2_weight, bn2_bias, rounded,
        )  # fmt: skip
        ctx.setting = (activation, se_activation, shortcut is not None, bn1, bn2)
        return y

    @staticmethod
    @_backward(eager_backward.dense)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (
            u, v, norm1, norm2, pooled, act_sums, r, gate, keep, bn1_weight, bn1_bias, reduce_weight, reduce_bias,
            se_expand_weight, se_expand_bias, project_weight, bn2_weight, bn2_bias, rounded,
        ) = ctx.saved_tensors  # fmt: skip
        activation, se_activation, residual, bn1, bn2 = ctx.setting
        u, dy = channels_last(u), dy.contiguous()
        d_project, d_excite = None, (None,) * 4
        d_bn2: tuple[Tensor | None, ...] = (None, None)
        run = _runner(dy)
        if bn2 is None:
            grads1, coef1 = run.bn_bwd(dy, u, norm1, keep, activation, bn1.batch_statistics, bn1.group)
            du = run.bn_act_bwd(dy, u, norm1, coef1, keep, activation)
        else:
            grads2, coef2 = run.bn_bwd(dy, v, norm2, keep, "none", bn2.batch_statistics, bn2.group)
            du, d_project, grads1, *d_excite = run.project_bwd(
                dy, v, coef2, keep, rounded, u, norm1, gate, act_sums, pooled, r, reduce_weight,
                se_expand_weight, activation, se_activation, bn1.batch_statistics, ctx.needs_input_grad[8], bn1.group,
            )  # fmt: skip
            d_bn2 = _bn_grads(grads2, bn2_weight, bn2_bias)
        weights = (reduce_weight, reduce_bias, se_expand_weight, se_expand_bias)
        return (
            du.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2) if residual else None,
            *_bn_grads(grads1, bn1_weight, bn1_bias), *(_cast(g, w) for g, w in zip(d_excite, weights, strict=True)),
            _cast(d_project, project_weight), *d_bn2,
            *(None,) * 11,
        )  # fmt: skip
