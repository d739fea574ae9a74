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

Formula = Callable[..., int]
FORMULAS: dict[str, Formula] = {}
NOTHING = (  # no convolution, or one that another operator counts
    "expand_norm", "pointwise", "image_norm", "bn_act", "bn_bwd", "bn_act_bwd", "bn_act_inference", "round_weight",
)  # fmt: skip


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


def _nothing(*args: Any) -> int:
    return 0


FORMULAS |= dict.fromkeys(NOTHING, _nothing)


@_formula
def pointwise_bn(x: Tensor, weight: Tensor, *args: Any) -> int:
    return _pointwise(x, weight)


@_formula
def depthwise_bn(
    x: Tensor, expand_weight: Tensor | None, weight: Tensor, in_norm: Any, activation: str,
    stride: int, pad_top: int, pad_left: int, out_height: int, out_width: int, *args: Any,
) -> int:  # fmt: skip
    """With `expand_weight` the block's expansion is in here; `expand_norm` before it took its statistics."""
    return _pointwise(x, expand_weight) + _depthwise(x, weight, out_height, out_width)


@_formula
def pool_excite(
    u: Tensor, norm: Any, reduce_weight: Tensor, reduce_bias: Any, expand_weight: Tensor, *args: Any
) -> int:
    return _excite(u, reduce_weight, expand_weight)


@_formula
def project_bwd(
    dy: Tensor, u3: Any, coef: Any, keep: Any, weight: Tensor, u2: Tensor, norm: Any, gate: Any, act_sums: Any,
    pooled: Any, r: Any, reduce_weight: Tensor | None, expand_weight: Tensor | None, *args: Any,
) -> int:  # fmt: skip
    excite = 0 if gate is None else _excite_backward(u2, reduce_weight, expand_weight)
    return _pointwise_backward(u2, weight) + excite


@_formula
def depthwise_bwd(dy: Tensor, x: Tensor, expand_weight: Any, weight: Tensor, *args: Any) -> int:
    c = weight.shape[0]
    return _backward(_image(dy, c), _image(x, c), weight, c)


@_formula
def expand_bwd(dv: Tensor, u: Any, x: Tensor, weight: Tensor, *args: Any) -> int:
    return _pointwise_backward(x, weight)


@_formula
def squeeze_excite_bwd(
    dy: Tensor, x: Tensor, pooled: Any, r: Any, gate: Any, reduce_weight: Tensor, expand_weight: Tensor, *args: Any
) -> int:
    return _excite_backward(x, reduce_weight, expand_weight)


@_formula
def mbconv_inference(x: Tensor, *args: Any) -> int:
    expand_weight, weight, project_weight, size = args[0], args[6], args[16], args[-2:]
    return (
        _pointwise(x, expand_weight)
        + _depthwise(x, weight, *size)
        + _excite(x, args[12], args[14])
        + _pointwise(x, project_weight, *size)
    )


@_formula
def dense_inference(u: Tensor, *args: Any) -> int:
    return _excite(u, args[6], args[8]) + _pointwise(u, args[10])


@_formula
def depthwise_bn_act_inference(x: Tensor, weight: Tensor, *args: Any) -> int:
    return _depthwise(x, weight, *args[-2:])


@_formula
def pointwise_pool(x: Tensor, weight: Tensor, *args: Any) -> int:
    return _pointwise(x, weight)
