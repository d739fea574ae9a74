"""The kernels as `torch.library` operators with fake implementations: opaque to torch.compile, one graph, no breaks.

Images are [N, H, W, C] contiguous. A BatchNorm that follows a convolution is finished in the convolution's operator:
`norm` is [4, C] (mean, rstd, scale, shift), `coef` is [4, C] (p, q, r, mean of du = p * dv + q * (u - mean) + r),
`grads` is [2, C] (of weight, of bias). Where something does not exist (no gate, no norm) its result is an empty tensor.
`group` names the processes that share the BatchNorm's statistics: the operator then holds one small collective.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastmbconv import flops, ranks
from fastmbconv.kernels import (
    batch_norm,
    depthwise,
    excite_backward,
    expand_backward,
    moments,
    project_backward,
    squeeze_excite,
    synchronised,
)
from fastmbconv.kernels import pointwise as pointwise_kernels
from fastmbconv.kernels import pool as pool_kernels
from fastmbconv.kernels.launching import writing
from fastmbconv.kernels.library import cast
from fastmbconv.kernels.traffic import summed
from fastmbconv.kernels.tuning import accumulator

RUNNING = ("running_mean", "running_var")


def _vectors(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=accumulator(like.dtype))


direct = SimpleNamespace()  # the operators' launchers by name, for calls that nothing traces


def plain(x: Tensor) -> bool:
    """True where nobody watches operators (a compiler, a dispatch mode, a tensor subclass): their launchers will do.

    An operator's way through the dispatcher costs the host as much as several launches.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    )


def _bn_norm(
    partials: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
    momentum: float | None,
    update: bool,
    group: str | None,
    dtype: torch.dtype,
    channels: int,
) -> Tensor:
    if partials is not None and group is not None:
        partials = synchronised.bn_merge(partials)
        partials = partials if writing() else ranks.gathered(partials, group)
    return batch_norm.bn_finalize(
        partials, weight, bias, running_mean, running_var, num_batches_tracked, eps, momentum, update, dtype, channels
    )


def _bn_bwd(
    sums: Tensor, norm: Tensor, count: int, batch_statistics: bool, group: str | None, dw: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    grads, coef, d_weight = batch_norm.bn_bwd_finalize(sums, norm, count, batch_statistics, dw)
    return grads, _shared_coef(grads, coef, norm, count, batch_statistics, group), d_weight


def _shared_coef(
    grads: Tensor, coef: Tensor, norm: Tensor, count: int, batch_statistics: bool, group: str | None
) -> Tensor:
    """`coef` of this process's sums, or, where statistics are those of a group of processes, of everybody's."""
    if not batch_statistics or group is None:
        return coef
    total = grads.new_empty(grads.numel() + 1) if writing() else ranks.total_of_sums(grads, count, group)
    return synchronised.bn_coef(total, norm)


def _operator(mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    def register(function: Callable[..., Any]) -> Any:
        names = list(inspect.signature(function).parameters)
        mutated = [names.index(name) for name in mutates_args]

        @functools.wraps(function)
        def on_its_device(*args: Any) -> Any:
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device
                return function(*args)

        def launched(*args: Any) -> Any:
            for place in mutated:
                if args[place] is not None:
                    torch.autograd.graph.increment_version(args[place])
            return on_its_device(*args)

        setattr(direct, function.__name__, launched if mutated else on_its_device)
        operator = torch.library.custom_op(f"fastmbconv::{function.__name__}", on_its_device, mutates_args=mutates_args)
        flops.register(function.__name__)
        return operator

    return register


@_operator(mutates_args=RUNNING)
def pointwise_bn(
    x: Tensor,
    weight: Tensor,
    in_norm: Tensor | None,
    gate: Tensor | None,
    activation: str,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
    momentum: float | None,
    batch_statistics: bool,
    update: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(u, norm): the 1x1 convolution of act(in_norm(x)) * gate, and the BatchNorm of its output."""
    u, partials = pointwise_kernels.pointwise_fwd(x, weight, in_norm, gate, activation, batch_statistics)
    norm = _bn_norm(
        partials, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, eps, momentum, update, group,
        x.dtype, weight.shape[0],
    )  # fmt: skip
    return u, norm


@pointwise_bn.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    n, h, w, _ = x.shape
    return x.new_empty(n, h, w, weight.shape[0]), _vectors(x, 4, weight.shape[0])


@_operator()
def round_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution's weight [O, I, 1, 1] as a matrix [O, I] of its own in x's dtype."""
    return cast(weight, x.dtype) if weight.dtype != x.dtype else weight.flatten(1).clone()


@round_weight.register_fake
def _(weight: Tensor, x: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[:2], dtype=x.dtype)


@_operator()
def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution of x alone: the expanded tensor once more, for a backward that did not keep it."""
    return pointwise_kernels.pointwise_fwd(x, weight, None, None, "none", False)[0]


@pointwise.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    n, h, w, _ = x.shape
    return x.new_empty(n, h, w, weight.shape[0])


@_operator(mutates_args=RUNNING)
def expand_norm(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
    momentum: float | None,
    batch_statistics: bool,
    update: bool,
    group: str | None = None,
) -> Tensor:
    """norm: the BatchNorm of the 1x1 convolution of x, whose output is not kept."""
    partials = pointwise_kernels.pointwise_moments(x, weight) if batch_statistics else None
    return _bn_norm(
        partials, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, eps, momentum, update, group,
        x.dtype, weight.shape[0],
    )  # fmt: skip


@expand_norm.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return _vectors(x, 4, weight.shape[0])


@_operator(mutates_args=RUNNING)
def image_norm(
    u: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
    momentum: float | None,
    batch_statistics: bool,
    update: bool,
    group: str | None = None,
) -> Tensor:
    """norm: the BatchNorm of an image that no kernel of ours wrote."""
    partials = moments.moments(u) if batch_statistics else None
    return _bn_norm(
        partials, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, eps, momentum, update, group,
        u.dtype, u.shape[3],
    )  # fmt: skip


@image_norm.register_fake
def _(u: Tensor, *args: Any) -> Tensor:
    return _vectors(u, 4, u.shape[3])


@_operator(mutates_args=RUNNING)
def depthwise_bn(
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    in_norm: Tensor | None,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
    out_height: int,
    out_width: int,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
    momentum: float | None,
    batch_statistics: bool,
    update: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(u, norm): the depthwise convolution of act(in_norm(x)), and the BatchNorm of its output.

    With `expand_weight` x is the block's input and its expansion stands in x's place.
    """
    u, partials = depthwise.depthwise_fwd(
        x,
        expand_weight,
        weight,
        in_norm,
        activation,
        stride,
        pad_top,
        pad_left,
        out_height,
        out_width,
        batch_statistics,
    )
    norm = _bn_norm(
        partials, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, eps, momentum, update, group,
        x.dtype, weight.shape[0],
    )  # fmt: skip
    return u, norm


@depthwise_bn.register_fake
def _(
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    in_norm: Tensor | None,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
    out_height: int,
    out_width: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    n, c = x.shape[0], weight.shape[0]
    return x.new_empty(n, out_height, out_width, c), _vectors(x, 4, c)


@_operator()
def pool_excite(
    u: Tensor,
    norm: Tensor | None,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: str,
    se_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pooled [N, C], act_sums [N, 2, C], pre-activation of the reduced vector [N, R], gate [N, C]) of act(norm(u)).

    `act_sums` are those of act' and act' * xhat, for the backward; empty without norm.
    """
    n, h, w, c = u.shape
    sums = pool_kernels.pool(u, norm, None, activation)
    kept, gate = squeeze_excite.excite_fwd(
        sums, h * w, reduce_weight, reduce_bias, expand_weight, expand_bias, se_activation, u.dtype
    )
    assert kept is not None
    return *kept, gate


@pool_excite.register_fake
def _(u: Tensor, norm: Tensor | None, reduce_weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, _, _, c = u.shape
    sums = _vectors(u, 0) if norm is None else _vectors(u, n, 2, c)
    return u.new_empty(n, c), sums, _vectors(u, n, reduce_weight.shape[0]), _vectors(u, n, c)


@_operator()
def bn_act(
    u: Tensor,
    norm: Tensor | None,
    gate: Tensor | None,
    keep: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """act(norm(u)) * gate[n, c] * keep[n] + residual, each part optional."""
    return batch_norm.bn_act_fwd(u, norm, gate, None, keep, residual, activation)


@bn_act.register_fake
def _(u: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(u)


@_operator()
def bn_bwd(
    dy: Tensor,
    u: Tensor,
    norm: Tensor,
    keep: Tensor | None,
    activation: str,
    batch_statistics: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(grads, coef) of act(norm(u)) * keep: the two reductions of BatchNorm's backward."""
    sums = batch_norm.bn_act_bwd_reduce(dy, u, norm, keep, activation)
    grads, coef, _ = _bn_bwd(sums, norm, u.numel() // u.shape[3], batch_statistics, group)
    return grads, coef


@bn_bwd.register_fake
def _(dy: Tensor, u: Tensor, norm: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _vectors(u, 2, u.shape[3]), _vectors(u, 4, u.shape[3])


@_operator()
def bn_act_bwd(dy: Tensor, u: Tensor, norm: Tensor, coef: Tensor, keep: Tensor | None, activation: str) -> Tensor:
    """du of act(norm(u)) * keep."""
    return batch_norm.bn_act_bwd(dy, u, norm, coef, keep, activation)


@bn_act_bwd.register_fake
def _(dy: Tensor, u: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(u)


@_operator()
def project_bwd(
    dy: Tensor,
    u3: Tensor,
    coef: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    u2: Tensor,
    norm: Tensor,
    gate: Tensor | None,
    act_sums: Tensor | None,
    pooled: Tensor | None,
    r: Tensor | None,
    reduce_weight: Tensor | None,
    expand_weight: Tensor | None,
    activation: str,
    se_activation: str,
    batch_statistics: bool,
    weight_gradient: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward from the block's output gradient to the depthwise convolution's output.

    Returns (du2, project weight gradient, grads of the depthwise BN, gradients of the reduce weight and bias and of the
    expand weight and bias).
    """
    du3 = batch_norm.bn_act_bwd(dy, u3, None, coef, keep, "none")
    da3 = None if project_backward.is_resident(u2, weight) else project_backward.multiply_weight(du3, weight)
    sums = project_backward.project_bwd_sums(da3, du3, weight, u2, norm, gate, activation)
    n, h, w, c = u2.shape
    offset, excite_grads = None, tuple(norm.new_empty(0) for _ in range(4))
    if gate is not None:
        assert pooled is not None and r is not None and reduce_weight is not None and expand_weight is not None
        offset, bn, *grads = excite_backward.excite_bwd(
            sums, act_sums, pooled, r, gate, reduce_weight, expand_weight, h * w, se_activation, norm, batch_statistics
        )
        assert bn is not None
        bn_grads, bn_coef = bn
        bn_coef = _shared_coef(bn_grads, bn_coef, norm, n * h * w, batch_statistics, group)
        excite_grads = tuple(grads)
    else:
        bn_grads, bn_coef, _ = _bn_bwd(sums.flatten(0, 1), norm, n * h * w, batch_statistics, group)
    du2, d_weight = project_backward.project_bwd_data(
        da3, du3, weight, u2, norm, bn_coef, gate, offset, activation, weight_gradient
    )
    return du2, norm.new_empty(0) if d_weight is None else d_weight, bn_grads, *excite_grads


@project_bwd.register_fake
def _(
    dy: Tensor, u3: Tensor, coef: Tensor, keep: Tensor | None, weight: Tensor, u2: Tensor, norm: Tensor,
    gate: Tensor | None, act_sums: Tensor | None, pooled: Tensor | None, r: Tensor | None, reduce_weight: Tensor | None,
    expand_weight: Tensor | None, activation: str, se_activation: str, batch_statistics: bool, weight_gradient: bool,
    group: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    c = u2.shape[3]
    reduced = 0 if r is None else r.shape[1]
    excite = [(reduced, c), (reduced,), (c, reduced), (c,)] if reduced else [(0,)] * 4
    d_weight = _vectors(u2, *weight.shape) if weight_gradient else _vectors(u2, 0)
    return torch.empty_like(u2), d_weight, _vectors(u2, 2, c), *[_vectors(u2, *shape) for shape in excite]


@_operator()
def depthwise_bwd(
    dy: Tensor,
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    in_norm: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: int,
    pad_top: int,
    pad_left: int,
    batch_statistics: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dv, weight gradient, grads, coef) for the BatchNorm of x; without `in_norm` dv is dx (+ residual)."""
    dv, dw, sums = depthwise.depthwise_bwd(
        dy, x, expand_weight, weight, in_norm, residual, activation, stride, pad_top, pad_left
    )
    if in_norm is None or sums is None:
        return dv, summed(dw), dw.new_empty(0), dw.new_empty(0)
    grads, coef, d_weight = _bn_bwd(sums, in_norm, x.numel() // x.shape[3], batch_statistics, group, dw)
    assert d_weight is not None
    return dv, d_weight, grads, coef


@depthwise_bwd.register_fake
def _(
    dy: Tensor, x: Tensor, expand_weight: Tensor | None, weight: Tensor, in_norm: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    n, h, w, _ = x.shape
    c = weight.shape[0]
    grads = [_vectors(x, 0), _vectors(x, 0)] if in_norm is None else [_vectors(x, 2, c), _vectors(x, 4, c)]
    return x.new_empty(n, h, w, c), _vectors(x, *weight.shape), *grads


@_operator()
def expand_bwd(
    dv: Tensor,
    u: Tensor | None,
    x: Tensor,
    weight: Tensor,
    coef: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """(dx (+ residual), weight gradient) of the expand convolution and its BatchNorm, whose coefficients are `coef`.

    `u` is the convolution's output, None where it was not kept.
    """
    return expand_backward.expand_bwd(dv, u, x, weight, coef, residual, batch_statistics)


@expand_bwd.register_fake
def _(dv: Tensor, u: Tensor | None, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _vectors(x, *weight.shape)


@_operator()
def squeeze_excite_bwd(
    dy: Tensor,
    x: Tensor,
    pooled: Tensor,
    r: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    se_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, gradients of the reduce weight and bias and of the expand weight and bias) of x * gate."""
    n, h, w, c = x.shape
    sums = pool_kernels.pool(x, None, dy, "none")
    offset, _, *grads = excite_backward.excite_bwd(
        sums, None, pooled, r, gate, reduce_weight, expand_weight, h * w, se_activation
    )
    return batch_norm.bn_act_fwd(dy, None, gate, offset, None, None, "none"), *grads


@squeeze_excite_bwd.register_fake
def _(dy: Tensor, x: Tensor, pooled: Tensor, r: Tensor, *args: Any) -> tuple[Tensor, ...]:
    c, reduced = x.shape[3], r.shape[1]
    shapes = [(reduced, c), (reduced,), (c, reduced), (c,)]
    return torch.empty_like(x), *[_vectors(x, *shape) for shape in shapes]
