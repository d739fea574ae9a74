"""A backward that somebody transforms (vmap, forward-mode AD), by eager: kernels read plain tensors only.

`torch.autograd.grad(..., is_grads_batched=True)` and `torch.autograd.functional.jacobian(..., vectorize=True)` vmap the
backward alone, when the kernels' forward is long done. It is computed again here, from what was saved: batch statistics
from the input, frozen ones and stochastic depth as the forward took them. Nothing of the model moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmbconv import dispatch, reference
from fastmbconv.block import Activation, BatchNorm, Block, DenseBlock, SqueezeExcite
from fastmbconv.call import NormSettings, Settings


def is_transformed(dy: Tensor) -> bool:
    """True where dy is many gradients at once, or a transform is active: no kernel may be launched."""
    return is_batched(dy) or dispatch.transforms()


def is_batched(dy: Tensor) -> bool:
    """True for many gradients at once in torch.autograd's own vmap, which shows in its tensors only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy)


def gradients(
    settings: Settings, dy: Tensor, x: Tensor, keep: Tensor | None, saved: Any, weights: Any, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of x and of each weight, for those that need one; dy may be batched."""
    run, inputs = _RUNS[settings.part](settings, x, keep, saved), (x, *weights)
    wanted = [i for i, t in enumerate(inputs) if t is not None and needs[i]]
    leaves = [None if t is None else t.detach() for t in inputs]

    def of_wanted(*tensors: Tensor) -> Tensor:
        arguments = list(leaves)
        for i, tensor in zip(wanted, tensors, strict=True):
            arguments[i] = tensor
        x, *weights_now = arguments
        assert x is not None
        narrow = [  # convolutions in x's dtype, as autocast casts them
            t if t is None or name.startswith("bn") else t.to(x.dtype)
            for name, t in zip(weights._fields, weights_now, strict=True)
        ]
        return run(x, weights._make(narrow))

    found: list[Tensor | None] = [None] * len(inputs)
    with torch.autocast(dy.device.type, enabled=False):
        for i, gradient in zip(wanted, _vjp(of_wanted, [leaves[i] for i in wanted], dy), strict=True):  # type: ignore
            found[i] = gradient
    return found


Run = Callable[[Tensor, Any], Tensor]


def _depthwise_bn_act(settings: Settings, x: Tensor, keep: Tensor | None, saved: Any) -> Run:
    def run(x: Tensor, w: Any) -> Tensor:
        bn = _batch_norm(saved.norm, settings.norms[0], w.bn_weight, w.bn_bias)
        return reference.depthwise_bn_act(x, w.weight, bn, settings.stride, settings.padding, _activations(settings)[0])

    return run


def _squeeze_excite(settings: Settings, x: Tensor, keep: Tensor | None, saved: Any) -> Run:
    return lambda x, w: reference.squeeze_excite(x, SqueezeExcite(*w, settings.se_activation, settings.se_gate))  # type: ignore


def _mbconv(settings: Settings, x: Tensor, keep: Tensor | None, saved: Any) -> Run:
    def run(x: Tensor, w: Any) -> Tensor:
        bn1, bn2, bn3 = settings.norms
        after_expand, after_depthwise, after_project = _activations(settings)
        block = Block(
            expand_weight=w.expand,
            bn1=None if bn1 is None else _batch_norm(saved.norm1, bn1, w.bn1_weight, w.bn1_bias),
            depthwise_weight=w.depthwise,
            bn2=_batch_norm(saved.norm2, bn2, w.bn2_weight, w.bn2_bias),
            se=_excite(w, settings),
            project_weight=w.project,
            bn3=_batch_norm(saved.norm3, bn3, w.bn3_weight, w.bn3_bias),
            stride=settings.stride,
            padding=settings.padding,
            activation=after_expand,
            residual=False,
            depthwise_activation=after_depthwise,
            project_activation=after_project,
        )
        return _joined(reference.mbconv(x, block), keep, x if settings.residual else None)

    return run


def _dense(settings: Settings, u: Tensor, keep: Tensor | None, saved: Any) -> Run:
    def run(u: Tensor, w: Any) -> Tensor:
        bn1, bn2 = settings.norms
        after_conv, after_project = _activations(settings)
        block = DenseBlock(
            conv=nn.Identity(),  # u is what the block's own convolution gave
            weight=u,
            stride=1,
            padding=0,
            bn1=_batch_norm(saved.norm1, bn1, w.bn1_weight, w.bn1_bias),
            se=_excite(w, settings),
            project_weight=w.project,
            bn2=None if bn2 is None else _batch_norm(saved.norm2, bn2, w.bn2_weight, w.bn2_bias),
            activation=after_conv,
            residual=False,
            project_activation=after_project,
        )
        return _joined(reference.dense_mbconv(u, block), keep, None)

    return run


_RUNS = {"depthwise_bn_act": _depthwise_bn_act, "squeeze_excite": _squeeze_excite, "mbconv": _mbconv, "dense": _dense}


def _vjp(function: Callable[..., Tensor], at: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    if dispatch.functorch_transforms():  # which don't let a tensor require a gradient
        return torch.func.vjp(function, *at)[1](dy)
    with torch.enable_grad():
        at = [t.requires_grad_() for t in at]
        return torch.autograd.grad(function(*at), at, dy)


def _batch_norm(norm: Tensor, setting: NormSettings | None, weight: Tensor | None, bias: Tensor | None) -> BatchNorm:
    """The BatchNorm of one call, with nothing to move; `norm` is [4, C] (mean, rstd, scale, shift)."""
    assert setting is not None
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


def _excite(w: Any, settings: Settings) -> SqueezeExcite | None:
    if w.reduce is None:
        return None
    tensors = (w.reduce, w.reduce_bias, w.se_expand, w.se_expand_bias)
    return SqueezeExcite(*tensors, settings.se_activation, settings.se_gate)  # type: ignore[arg-type]


def _activations(settings: Settings) -> tuple[Activation, ...]:
    return settings.activations  # type: ignore[return-value]


def _joined(h: Tensor, keep: Tensor | None, x: Tensor | None) -> Tensor:
    """h * keep[n] + x, in h's dtype."""
    if keep is not None:
        h = (h * keep.reshape(-1, 1, 1, 1)).to(h.dtype)
    return h if x is None else h + x
