"""Each operator's FLOPs for PyTorch's counter, and for every other that reads its registry.

A fused model is counted as the model that it was: its convolutions once in the forward, their data and weight gradients
once in the backward, with the formulas that PyTorch has for aten's convolutions. What the kernels compute again (the
expanded tensor for `memory="lean"`) is not counted, nor is what PyTorch has no formula for (BatchNorm, activations).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fastmbconv.block import Padding
from fastmbconv.call import geometry, unpack
from fastmbconv.fused import dense, mbconv

Weights = Sequence[Tensor | None]
Formula = Callable[..., int]
FORMULAS: dict[str, Formula] = {}


def register(name: str) -> None:
    """Make the formula of `fastmbconv::name` known to PyTorch; KeyError for an operator that has none."""
    formula = FORMULAS[name]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    register_flop_formula(getattr(torch.ops.fastmbconv, name), get_raw=True)(count)


def _formula(function: Formula) -> Formula:
    FORMULAS[function.__name__] = function
    return function


def _image(x: Tensor, channels: int, *size: int) -> list[int]:
    """[N, channels, H, W] of an image [N, H, W, C], or of one of another size."""
    return [x.shape[0], channels, *(size or x.shape[1:3])]


def _forward(x: Sequence[int], weight: Tensor, out: Sequence[int], groups: int = 1) -> int:
    count = flop_registry[torch.ops.aten.convolution]
    return count(x, list(weight.shape), None, [1], [0], [1], False, [0], groups, out_val=out)


def _backward(out: Sequence[int], x: Sequence[int], weight: Tensor, groups: int = 1) -> int:
    shape = list(weight.shape)
    count = flop_registry[torch.ops.aten.convolution_backward]
    return count(out, x, shape, None, [1], [0], [1], False, [0], groups, [True, True, False], out_val=(x, shape, None))


def _pointwise(x: Tensor, weight: Tensor | None, *size: int) -> int:
    if weight is None:
        return 0
    return _forward(_image(x, weight.shape[1], *size), weight, _image(x, weight.shape[0], *size))


def _pointwise_backward(x: Tensor, weight: Tensor | None, *size: int) -> int:
    if weight is None:
        return 0
    return _backward(_image(x, weight.shape[0], *size), _image(x, weight.shape[1], *size), weight)


def _depthwise(x: Tensor, weight: Tensor, height: int, width: int) -> int:
    c = weight.shape[0]
    return _forward(_image(x, c), weight, _image(x, c, height, width), c)


def _excite(x: Tensor, reduce_weight: Tensor | None, expand_weight: Tensor | None) -> int:
    return _pointwise(x, reduce_weight, 1, 1) + _pointwise(x, expand_weight, 1, 1)


def _excite_backward(x: Tensor, reduce_weight: Tensor | None, expand_weight: Tensor | None) -> int:
    return _pointwise_backward(x, reduce_weight, 1, 1) + _pointwise_backward(x, expand_weight, 1, 1)


@_formula
def mbconv_forward(x: Tensor, shortcut: Any, keep: Any, weights: Weights, *args: Any) -> int:
    return _mbconv(x, weights, *_stride_and_padding(args[2:]))


@_formula
def mbconv_infer(x: Tensor, shortcut: Any, weights: Weights, *args: Any) -> int:
    return _mbconv(x, weights, *_stride_and_padding(args[1:]))


@_formula
def mbconv_backward(dy: Tensor, x: Tensor, keep: Any, saved: Any, weights: Weights, needs: Any, *args: Any) -> int:
    """A part that is frozen is counted as the others: it is computed on the way."""
    w = mbconv.Weights(*weights)  # type: ignore[arg-type]
    hidden, inner = w.depthwise.shape[0], _image(x, w.depthwise.shape[0])
    frozen = not any(needs[:5])
    count = _pointwise_backward(dy, w.project) + _excite_backward(dy, w.reduce, w.se_expand)
    if not frozen:
        count += _backward(_image(dy, hidden), inner, w.depthwise, hidden)
        count += _pointwise_backward(x, w.expand) if needs[0] or needs[1] else 0
    return count


@_formula
def dense_forward(u: Tensor, shortcut: Any, keep: Any, weights: Weights, *args: Any) -> int:
    w = dense.Weights(*weights)
    return _excite(u, w.reduce, w.se_expand) + _pointwise(u, w.project)


@_formula
def dense_infer(u: Tensor, shortcut: Any, weights: Weights, *args: Any) -> int:
    return dense_forward(u, shortcut, None, weights)


@_formula
def dense_backward(dy: Tensor, u: Tensor, keep: Any, saved: Any, weights: Weights, *args: Any) -> int:
    w = dense.Weights(*weights)
    return _excite_backward(u, w.reduce, w.se_expand) + _pointwise_backward(u, w.project)


@_formula
def depthwise_bn_act_forward(x: Tensor, shortcut: Any, keep: Any, weights: Weights, *args: Any) -> int:
    return _depthwise_alone(x, weights, args[2:])


@_formula
def depthwise_bn_act_infer(x: Tensor, shortcut: Any, weights: Weights, *args: Any) -> int:
    return _depthwise_alone(x, weights, args[1:])


@_formula
def depthwise_bn_act_backward(dy: Tensor, x: Tensor, keep: Any, saved: Any, weights: Weights, *args: Any) -> int:
    taps = weights[0]
    assert taps is not None
    return _backward(_image(dy, dy.shape[3]), _image(x, x.shape[3]), taps, x.shape[3])


@_formula
def squeeze_excite_forward(x: Tensor, shortcut: Any, keep: Any, weights: Weights, *args: Any) -> int:
    return _excite(x, weights[0], weights[2])


@_formula
def squeeze_excite_backward(dy: Tensor, x: Tensor, keep: Any, saved: Any, weights: Weights, *args: Any) -> int:
    return _excite_backward(x, weights[0], weights[2])


@_formula
def bn_act_infer(u: Tensor, *args: Any) -> int:
    return 0


@_formula
def pointwise_bn_act_pool_infer(x: Tensor, shortcut: Any, weights: Weights, *args: Any) -> int:
    return _pointwise(x, weights[0])


def _stride_and_padding(settings: Sequence[Any]) -> tuple[int, Padding]:
    own = unpack("", *settings)
    return own.stride, own.padding


def _mbconv(x: Tensor, weights: Weights, stride: int, padding: Padding) -> int:
    w = mbconv.Weights(*weights)  # type: ignore[arg-type]
    size = geometry(x.shape[1], x.shape[2], w.depthwise.shape[-1], stride, padding)[3:]
    return (
        _pointwise(x, w.expand)
        + _depthwise(x, w.depthwise, *size)
        + _excite(x, w.reduce, w.se_expand)
        + _pointwise(x, w.project, *size)
    )


def _depthwise_alone(x: Tensor, weights: Weights, settings: Sequence[Any]) -> int:
    taps = weights[0]
    assert taps is not None
    stride, padding = _stride_and_padding(settings)
    return _depthwise(x, taps, *geometry(x.shape[1], x.shape[2], taps.shape[-1], stride, padding)[3:])
