"""A backward that somebody transforms (vmap, forward-mode AD), by eager: kernels read plain tensors only.

`torch.autograd.grad(..., is_grads_batched=True)` and `torch.autograd.functional.jacobian(..., vectorize=True)` vmap the
backward alone, when the kernels' forward is long done. It is computed again here, from what was saved: batch statistics
from the input, frozen ones and stochastic depth as the forward took them. Nothing of the model moves.

Each function takes what the backward of the `autograd.Function` of its name takes, and returns what that returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmbconv import dispatch, reference
from fastmbconv.block import BatchNorm, Block, DenseBlock, Padding, SqueezeExcite, pads

if TYPE_CHECKING:
    from fastmbconv.autograd import BatchNormSetting, DepthwiseSetting

Gradients = tuple[Tensor | None, ...]


def is_transformed(dy: Tensor) -> bool:
    """True where dy is many gradients at once, or a transform is active: no kernel may be launched."""
    return is_batched(dy) or dispatch.transforms()


def is_batched(dy: Tensor) -> bool:
    """True for many gradients at once in torch.autograd's own vmap, which shows in its tensors only."""
    return not torch.compiler.is_compiling() and torch._C._dispatch_keys(dy).has("Batched")


def depthwise_bn_act(ctx: Any, dy: Tensor) -> Gradients:
    x, weight, bn_weight, bn_bias, _, norm = ctx.saved_tensors
    activation, depthwise, bn = ctx.setting
    padding = _padding(depthwise, x, weight)

    def run(x: Tensor, weight: Tensor, *affine: Tensor | None) -> Tensor:
        norms = _batch_norm(norm, bn, *affine)
        return reference.depthwise_bn_act(x, weight.to(x.dtype), norms, depthwise.stride, padding, activation)

    return (*_gradients(ctx, run, (x, weight, bn_weight, bn_bias), dy), *(None,) * 6)


def squeeze_excite(ctx: Any, dy: Tensor) -> Gradients:
    x, _, _, _, *weights = ctx.saved_tensors

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        gate = _squeeze_excite([w.to(x.dtype) for w in weights], ctx.activation)
        assert gate is not None
        return reference.squeeze_excite(x, gate)

    return (*_gradients(ctx, run, (x, *weights), dy), None)


def mbconv(ctx: Any, dy: Tensor) -> Gradients:
    saved = ctx.saved_tensors
    x, norms, keep, weights = saved[0], saved[4:7], saved[11], saved[12:-1]
    activation, se_activation, residual, _, depthwise, *bns = ctx.setting
    padding = _padding(depthwise, x, weights[3])

    def run(x: Tensor, *weights: Tensor | None) -> Tensor:
        expand, w1, b1, taps, w2, b2, *excite, project, w3, b3 = _as_convolved(x, weights, (0, 3, 6, 7, 8, 9, 10))
        assert taps is not None and project is not None
        block = Block(
            expand_weight=expand,
            bn1=None if bns[0] is None else _batch_norm(norms[0], bns[0], w1, b1),
            depthwise_weight=taps,
            bn2=_batch_norm(norms[1], bns[1], w2, b2),
            se=_squeeze_excite(excite, se_activation),
            project_weight=project,
            bn3=_batch_norm(norms[2], bns[2], w3, b3),
            stride=depthwise.stride,
            padding=padding,
            activation=activation,
            residual=False,
        )
        return _joined(reference.mbconv(x, block), keep, x if residual else None)

    return (*_gradients(ctx, run, (x, *weights), dy), *(None,) * 18)


def dense(ctx: Any, dy: Tensor) -> Gradients:
    saved = ctx.saved_tensors
    u, norms, keep, weights = saved[0], saved[2:4], saved[8], saved[9:-1]
    activation, se_activation, residual, *bns = ctx.setting

    def run(u: Tensor, *weights: Tensor | None) -> Tensor:
        w1, b1, *excite, project, w2, b2 = _as_convolved(u, weights, (2, 3, 4, 5, 6))
        block = DenseBlock(
            conv=nn.Identity(),  # u is what the block's own convolution gave
            weight=u,
            stride=1,
            padding=0,
            bn1=_batch_norm(norms[0], bns[0], w1, b1),
            se=_squeeze_excite(excite, se_activation),
            project_weight=project,
            bn2=None if bns[1] is None else _batch_norm(norms[1], bns[1], w2, b2),
            activation=activation,
            residual=False,
        )
        return _joined(reference.dense_mbconv(u, block), keep, None)

    du, *others = _gradients(ctx, run, (u, *weights), dy, needs=(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]))
    return du, dy.permute(0, 3, 1, 2) if residual else None, *others, *(None,) * 11


def _gradients(
    ctx: Any,
    run: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dy: Tensor,
    needs: Sequence[bool] | None = None,
) -> Gradients:
    """Of run(*inputs), for those of the inputs that need one; dy is [N, H, W, C] and may be batched."""
    needs = ctx.needs_input_grad if needs is None else needs
    wanted = [i for i, t in enumerate(inputs) if t is not None and needs[i]]
    leaves = [None if t is None else t.detach() for t in inputs]

    def of_wanted(*tensors: Tensor) -> Tensor:
        arguments = list(leaves)
        for i, tensor in zip(wanted, tensors, strict=True):
            arguments[i] = tensor
        return run(*arguments).permute(0, 2, 3, 1)

    found: list[Tensor | None] = [None] * len(inputs)
    with torch.autocast(dy.device.type, enabled=False):
        for i, gradient in zip(wanted, _vjp(of_wanted, [leaves[i] for i in wanted], dy), strict=True):  # type: ignore
            found[i] = gradient
    return tuple(found)


def _vjp(function: Callable[..., Tensor], at: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    if dispatch.functorch_transforms():  # which don't let a tensor require a gradient
        return torch.func.vjp(function, *at)[1](dy)
    with torch.enable_grad():
        at = [t.requires_grad_() for t in at]
        return torch.autograd.grad(function(*at), at, dy)


def _batch_norm(norm: Tensor, setting: BatchNormSetting, weight: Tensor | None, bias: Tensor | None) -> BatchNorm:
    """The BatchNorm of one call, with nothing to move; `norm` is [4, C] (mean, rstd, scale, shift)."""
    if setting.group is not None:
        raise RuntimeError(
            "fastmbconv's backward of BatchNorms that several processes share takes no transform "
            f"(is_grads_batched, vectorize, torch.func, forward-mode AD); {dispatch.WAY_OUT}"
        )
    mean = var = None
    if not setting.batch_statistics:
        mean, var = norm[0], norm[1] ** -2 - setting.eps
        if weight is not None:
            mean, var = mean.to(weight.dtype), var.to(weight.dtype)
    return BatchNorm(weight, bias, mean, var, None, setting.eps, 0.0, setting.batch_statistics)


def _squeeze_excite(weights: Sequence[Tensor | None], activation: Any) -> SqueezeExcite | None:
    reduce_weight, reduce_bias, expand_weight, expand_bias = weights
    if reduce_weight is None:
        return None
    assert reduce_bias is not None and expand_weight is not None and expand_bias is not None
    return SqueezeExcite(reduce_weight, reduce_bias, expand_weight, expand_bias, activation)


def _as_convolved(x: Tensor, weights: Sequence[Tensor | None], places: Sequence[int]) -> list[Tensor | None]:
    """The weights, those of convolutions in x's dtype, as autocast casts them."""
    return [t.to(x.dtype) if i in places and t is not None else t for i, t in enumerate(weights)]


def _joined(h: Tensor, keep: Tensor | None, x: Tensor | None) -> Tensor:
    """h * keep[n] + x, in h's dtype."""
    if keep is not None:
        h = (h * keep.reshape(-1, 1, 1, 1)).to(h.dtype)
    return h if x is None else h + x


def _padding(depthwise: DepthwiseSetting, x: Tensor, weight: Tensor) -> Padding:
    """A padding that puts the convolution where the kernels had it."""
    stride, top, left, *out = depthwise
    kernel_size = weight.shape[-1]
    candidates: list[Padding] = ["same", *((top, after) for after in range(kernel_size))]
    for padding in candidates:
        sides = [pads(size, kernel_size, stride, padding) for size in x.shape[2:]]
        sizes = [(n + sum(side) - kernel_size) // stride + 1 for n, side in zip(x.shape[2:], sides, strict=True)]
        if [before for before, _ in sides] == [top, left] and sizes == out:
            return padding
    raise AssertionError(f"no padding gives {depthwise} for images of {tuple(x.shape)} and {kernel_size} taps")
