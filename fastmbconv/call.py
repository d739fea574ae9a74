"""A call as data: which tensors an operation takes, and all else that it does, in the form that crosses an operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmbconv.block import BatchNorm, Padding, SqueezeExcite, pads

Tensors = tuple[Tensor | None, ...]
ABSENT = -1.0  # the eps of a BatchNorm that isn't there, and a momentum of None, where a call crosses an operator


class NormSettings(NamedTuple):
    """A BatchNorm apart from its tensors; `group` names the processes that its statistics are taken over."""

    eps: float
    momentum: float | None
    training: bool
    tracked: bool
    group: str | None

    @property
    def batch_statistics(self) -> bool:
        return self.training or not self.tracked

    @property
    def updates(self) -> bool:
        return self.training and self.tracked


class Settings(NamedTuple):
    """A call apart from its tensors: `part` names the operation, `norms` has None for a BatchNorm that isn't there.

    `activations` stand behind the BatchNorms, one behind each. With `residual` the block's input is added
    to its output: x itself in MBConv.
    """

    part: str
    activations: tuple[str, ...] = ()
    norms: tuple[NormSettings | None, ...] = ()
    se_activation: str = "none"
    se_gate: str = "sigmoid"
    residual: bool = False
    lean: bool = False
    stride: int = 1
    padding: Padding = 0


class Norm(NamedTuple):
    """One BatchNorm of a call: its tensors, [C] each, and its settings."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    settings: NormSettings

    @property
    def batch_statistics(self) -> bool:
        return self.settings.batch_statistics


class Geometry(NamedTuple):
    """Where a depthwise convolution stands on its image."""

    stride: int
    pad_top: int
    pad_left: int
    out_height: int
    out_width: int


@dataclass(frozen=True)
class Part:
    """An operation's plain functions.

    `forward(x, shortcut, keep, weights, statistics, settings)` returns the output, which is [N, C, H, W] in
    channels_last as all others are [N, H, W, C], and what is saved beside x;
    `backward(dy, x, keep, saved, weights, settings, needs)` the gradients of x and the weights, those at least that
    `needs` has True for; `infer(x, shortcut, weights, statistics, settings)` the output, with running statistics. The
    `fake_` ones give tensors of the same shapes and dtypes, `present(x, weights, settings)` says which of `saved` are
    there. `weights` and `saved` are of the types named here.
    """

    name: str
    weights: Any
    saved: Any = None
    forward: Any = None
    fake_forward: Any = None
    present: Any = None
    backward: Any = None
    infer: Any = None
    fake_infer: Any = None


def norm_settings(bn: BatchNorm | None) -> NormSettings | None:
    return None if bn is None else NormSettings(bn.eps, bn.momentum, bn.training, bn.running_mean is not None, bn.group)


def excite_settings(se: SqueezeExcite | None) -> dict[str, Any]:
    """What of `Settings` is squeeze-and-excitation's."""
    return {} if se is None else dict(se_activation=se.activation, se_gate=se.gate)


def affine(bn: BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if bn is None else (bn.weight, bn.bias)


def excite(se: SqueezeExcite | None) -> Tensors:
    """Its weights and biases; zeros for a bias that isn't there."""
    if se is None:
        return (None,) * 4
    pairs = ((se.reduce_weight, se.reduce_bias), (se.expand_weight, se.expand_bias))
    return tuple(t for weight, bias in pairs for t in (weight, weight.new_zeros(len(weight)) if bias is None else bias))


def no_norm(weight: Tensor, bias: Tensor | None) -> BatchNorm:
    """What stands for a BatchNorm that isn't there: u + bias, by statistics that change nothing."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean, var = (fill(len(weight), dtype=wide, device=weight.device) for fill in (torch.zeros, torch.ones))
    return BatchNorm(None, bias, mean, var, None, eps=0.0, momentum=0.0, training=False)


def statistics(*bns: BatchNorm | None) -> Tensors:
    """Running mean, running variance and count of each BatchNorm, one behind the other."""
    found: list[Tensor | None] = []
    for bn in bns:
        found += (None, None, None) if bn is None else (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    return tuple(found)


def describe_single(part: str, bn: BatchNorm, activation: str) -> Settings:
    """Of a part with one BatchNorm."""
    return Settings(part, (activation,), (norm_settings(bn),))


def norm(settings: Settings, index: int, weight: Tensor | None, bias: Tensor | None, statistics: Tensors) -> Norm:
    """The BatchNorm `index` of a call."""
    own = settings.norms[index]
    assert own is not None
    mean, var, count = statistics[3 * index : 3 * index + 3]
    return Norm(weight, bias, mean, var, count, own)


def list_moved(settings: Settings, statistics: Tensors) -> list[Tensor]:
    """The running statistics that a call in training changes."""
    pairs = zip(settings.norms, _in_threes(statistics), strict=True)
    return [t for own, three in pairs if own is not None and own.updates for t in three[:2] if t is not None]


def list_read(settings: Settings, statistics: Tensors) -> list[Tensor]:
    """Those that it only reads: fixed ones, and the count where the average is cumulative."""
    found: list[Tensor | None] = []
    for own, three in zip(settings.norms, _in_threes(statistics), strict=True):
        if own is not None and own.tracked:
            found += three[:2] if not own.training else three[2:] if own.momentum is None else ()
    return [t for t in found if t is not None]


def join_statistics(settings: Settings, moved: Sequence[Tensor], read: Sequence[Tensor]) -> Tensors:
    """The statistics again, from what `list_moved` and `list_read` said; None for what the call does not look at."""
    moving, fixed = iter(moved), iter(read)
    found: list[Tensor | None] = []
    for own in settings.norms:
        if own is None or not own.tracked:
            found += (None, None, None)
        elif own.training:
            found += (next(moving), next(moving), next(fixed) if own.momentum is None else None)
        else:
            found += (next(fixed), next(fixed), None)
    return tuple(found)


def pack(settings: Settings) -> tuple[Any, ...]:
    """Settings as an operator's arguments."""
    norms = [NormSettings(ABSENT, 0.0, False, False, None) if own is None else own for own in settings.norms]
    padding = settings.padding
    return (
        list(settings.activations),
        settings.se_activation,
        settings.se_gate,
        settings.residual,
        settings.lean,
        settings.stride,
        [] if padding == "same" else list(padding) if isinstance(padding, tuple) else [padding],
        [own.eps for own in norms],
        [ABSENT if own.momentum is None else own.momentum for own in norms],
        [own.training for own in norms],
        [own.tracked for own in norms],
        ["" if own.group is None else own.group for own in norms],
    )


def unpack(
    part: str,
    activations: Sequence[str],
    se_activation: str,
    se_gate: str,
    residual: bool,
    lean: bool,
    stride: int,
    padding: Sequence[int],
    eps: Sequence[float],
    momentum: Sequence[float],
    training: Sequence[bool],
    tracked: Sequence[bool],
    groups: Sequence[str],
) -> Settings:
    """The settings that `pack` took apart."""
    norms = tuple(
        None if e == ABSENT else NormSettings(e, None if m == ABSENT else m, own_training, own_tracked, group or None)
        for e, m, own_training, own_tracked, group in zip(eps, momentum, training, tracked, groups, strict=True)
    )
    sides: Padding = "same" if not padding else padding[0] if len(padding) == 1 else (padding[0], padding[1])
    return Settings(part, tuple(activations), norms, se_activation, se_gate, residual, lean, stride, sides)


def _in_threes(statistics: Tensors) -> Iterator[Tensors]:
    return (statistics[i : i + 3] for i in range(0, len(statistics), 3))


def geometry(height: int, width: int, kernel_size: int, stride: int, padding: Padding) -> Geometry:
    """Of an image of so many pixels."""
    (top, bottom), (left, right) = (pads(size, kernel_size, stride, padding) for size in (height, width))
    sizes = (
        (size + both - kernel_size) // stride + 1 for size, both in ((height, top + bottom), (width, left + right))
    )
    return Geometry(stride, top, left, *sizes)
