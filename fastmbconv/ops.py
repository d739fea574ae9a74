"""The fused operations as `torch.library` operators, one per direction: opaque to torch.compile, one graph, no breaks.

`fastmbconv::mbconv_forward`, `_backward`, `_infer`, and so on for each part of `fused.PARTS`. A call crosses as lists
of tensors and plain values (`pack`), and is put together again on the other side. Where nobody watches operators their
functions are called themselves: an operator's way through the dispatcher costs the host as much as several launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastmbconv import flops, plans
from fastmbconv.call import Part, Settings, Tensors, join_statistics, list_moved, list_read, pack, unpack
from fastmbconv.dispatch import plain
from fastmbconv.fused import PARTS
from fastmbconv.fused.stages import keep_present, nhwc
from fastmbconv.kernels.tuning import accumulator, precision

SETTINGS = (
    "str[] activations, str se_activation, str se_gate, bool residual, bool lean, int stride, int[] padding, "
    "float[] eps, float[] momentum, bool[] training, bool[] tracked, str[] groups"
)
FORWARD = (
    f"(Tensor x, Tensor? shortcut, Tensor? keep, Tensor?[] weights, Tensor(a!)[] moved, Tensor[] read, {SETTINGS}) -> "
)
BACKWARD = (
    f"(Tensor dy, Tensor x, Tensor? keep, Tensor[] saved, Tensor?[] weights, bool[] needs, {SETTINGS}) -> Tensor[]"
)
INFER = f"(Tensor x, Tensor? shortcut, Tensor?[] weights, Tensor[] read, {SETTINGS}) -> Tensor"
OPERATORS: dict[str, Any] = {}
_signatures: dict[Any, int] = {}
_HERE: AbstractContextManager[Any] = nullcontext()


def forward(
    settings: Settings,
    x: Tensor,
    shortcut: Tensor | None,
    keep: Tensor | None,
    weights: Any,
    statistics: Tensors,
    signature: int = 0,
) -> tuple[Tensor, Any]:
    """(y, saved) of a part's forward; running statistics move in place, unmarked. `signature` is what `sign` said.

    x, the shortcut and y are [N, C, H, W] in channels_last, as every image of the three functions here.
    """
    part = PARTS[settings.part]
    if not plain(x):
        operator, lists = (
            OPERATORS[f"{part.name}_forward"],
            (list_moved(settings, statistics), list_read(settings, statistics)),
        )
        image, added = nhwc(x), None if shortcut is None else nhwc(shortcut)
        y, *kept = operator(image, added, keep, list(weights), *lists, *pack(settings))
        there = part.present(image, weights, settings)
        return y, part.saved(*keep_present(kept, there))

    def run() -> plans.Flat:
        added = None if shortcut is None else nhwc(shortcut)
        y, saved = part.forward(nhwc(x), added, keep, weights, statistics, settings)
        return y, *saved

    key = ("forward", signature or sign(settings, weights, statistics), *_of_image(x), shortcut is None, keep is None)
    with _device_of(x):
        y, *saved = plans.run(key, run, (x, shortcut, keep, *weights, *statistics))
    assert y is not None
    return y, part.saved(*saved)


def backward(
    settings: Settings,
    dy: Tensor,
    x: Tensor,
    keep: Tensor | None,
    saved: Any,
    weights: Any,
    needs: Sequence[bool],
    signature: int = 0,
) -> plans.Flat:
    """Gradients of x and of the weights, in their shapes and dtypes; None where `needs` has False."""
    part = PARTS[settings.part]
    if not plain(dy):
        operator, own = OPERATORS[f"{part.name}_backward"], [tensor for tensor in saved if tensor is not None]
        found = iter(operator(nhwc(dy), nhwc(x), keep, own, list(weights), list(needs), *pack(settings)))
        return _as_weights([next(found) if each else None for each in needs], weights, needs)

    def run() -> plans.Flat:
        return _as_weights(part.backward(nhwc(dy), nhwc(x), keep, saved, weights, settings, needs), weights, needs)

    flat = x.is_contiguous(memory_format=torch.channels_last)  # hooks on saved tensors may bring it back otherwise
    key = ("backward", signature or sign(settings, weights, ()), *_of_image(x), flat, keep is None, *needs)
    with _device_of(dy):
        return plans.run(key, run, (dy, x, keep, *saved, *weights))


def infer(
    settings: Settings, x: Tensor, shortcut: Tensor | None, weights: Any, statistics: Tensors, signature: int = 0
) -> Tensor:
    """A part's output with running statistics, without gradients; [N, C] where it ends with a pool."""
    part = PARTS[settings.part]
    if not plain(x):
        image, added = nhwc(x), None if shortcut is None else nhwc(shortcut)
        operator = OPERATORS[f"{part.name}_infer"]
        return _nchw(operator(image, added, list(weights), list_read(settings, statistics), *pack(settings)))

    def run() -> tuple[Tensor]:
        added = None if shortcut is None else nhwc(shortcut)
        return (_nchw(part.infer(nhwc(x), added, weights, statistics, settings)),)

    key = ("infer", signature or sign(settings, weights, statistics), *_of_image(x), shortcut is None)
    with _device_of(x):
        (y,) = plans.run(key, run, (x, shortcut, *weights, *statistics))
    assert y is not None
    return y


def _nchw(y: Tensor) -> Tensor:
    return y.permute(0, 3, 1, 2) if y.dim() == 4 else y


def _as_weights(gradients: Sequence[Tensor | None], weights: Any, needs: Sequence[bool]) -> list[Tensor | None]:
    """x's gradient as [N, C, H, W] and the weights' as they are."""
    dx, *found = (gradient if each else None for gradient, each in zip(gradients, needs, strict=True))
    shaped = (None if each is None else _cast(each, weight) for each, weight in zip(found, weights, strict=True))
    return [None if dx is None else dx.permute(0, 3, 1, 2), *shaped]


def _cast(gradient: Tensor, like: Tensor) -> Tensor:
    """With the weight's strides, where only axes of one entry differ: DistributedDataParallel asks for them."""
    if gradient.shape != like.shape:
        gradient = gradient.reshape(like.shape)
    gradient = gradient.to(like.dtype)
    if gradient.stride() == like.stride() or not (gradient.is_contiguous() and like.is_contiguous()):
        return gradient
    return gradient.as_strided(like.shape, like.stride())


def sign(settings: Settings, weights: Any, statistics: Tensors) -> int:
    """A number for calls of these settings with tensors of these shapes and dtypes; plans go by it."""
    described = (settings, *(None if t is None else (t.shape, t.dtype) for t in (*weights, *statistics)))
    return _signatures.setdefault(described, len(_signatures) + 1)


def _of_image(x: Tensor) -> tuple[Any, ...]:
    """What launches go by of an image, beside the switch for products of fp32."""
    return x.shape, x.dtype, x.device, precision(x.dtype) if x.dtype == torch.float32 else None


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    elsewhere = x.is_cuda and _has_others() and torch.cuda.current_device() != x.get_device()
    return torch.cuda.device_of(x) if elsewhere else _HERE


@cache
def _has_others() -> bool:
    return torch.cuda.device_count() > 1


def _as_saved(part: Part, saved: Sequence[Tensor], x: Tensor, weights: Any, settings: Settings) -> Any:
    """What a forward saved, by name, from the tensors that are there."""
    there, found = part.present(x, weights, settings), iter(saved)
    return part.saved(*(next(found) if each else None for each in there))


def _register(part: Part) -> None:
    """A part's operators, each with its fake implementation and its FLOPs."""

    def forward(x: Tensor, shortcut: Any, keep: Any, weights: Any, moved: Any, read: Any, *packed: Any) -> Any:
        settings = unpack(part.name, *packed)
        with torch.cuda.device_of(x):
            statistics = join_statistics(settings, moved, read)
            y, saved = part.forward(x, shortcut, keep, part.weights(*weights), statistics, settings)
        return y, *(x.new_empty(0) if tensor is None else tensor for tensor in saved)

    def fake_forward(x: Tensor, shortcut: Any, keep: Any, weights: Any, moved: Any, read: Any, *packed: Any) -> Any:
        y, saved = part.fake_forward(x, shortcut, keep, part.weights(*weights), unpack(part.name, *packed))
        return y, *(x.new_empty(0) if tensor is None else tensor for tensor in saved)

    def backward(dy: Tensor, x: Tensor, keep: Any, saved: Any, weights: Any, needs: Any, *packed: Any) -> list[Tensor]:
        settings, own = unpack(part.name, *packed), part.weights(*weights)
        kept = _as_saved(part, saved, x, own, settings)
        with torch.cuda.device_of(dy):
            gradients = part.backward(dy, x, keep, kept, own, settings, needs)
        pairs = zip(gradients, (x, *own), needs, strict=True)
        return [gradient.reshape(like.shape) for gradient, like, each in pairs if each]

    def fake_backward(
        dy: Tensor, x: Tensor, keep: Any, saved: Any, weights: Any, needs: Any, *packed: Any
    ) -> list[Tensor]:
        acc = accumulator(x.dtype)
        found = (x.new_empty(weight.shape, dtype=acc) for weight, each in zip(weights, needs[1:], strict=True) if each)
        return [*([torch.empty_like(x)] if needs[0] else []), *found]

    def infer(x: Tensor, shortcut: Any, weights: Any, read: Any, *packed: Any) -> Tensor:
        settings = unpack(part.name, *packed)
        with torch.cuda.device_of(x):
            return part.infer(x, shortcut, part.weights(*weights), join_statistics(settings, (), read), settings)

    def fake_infer(x: Tensor, shortcut: Any, weights: Any, read: Any, *packed: Any) -> Tensor:
        return part.fake_infer(x, shortcut, part.weights(*weights), unpack(part.name, *packed))

    # PyTorch functionalizes no operator that moves statistics and returns a list, or None: empty tensors stand for it.
    returns = f"(Tensor{', Tensor' * len(part.saved._fields)})" if part.saved else ""
    for direction, run, fake, schema, mutated in (
        ("forward", forward, fake_forward, FORWARD + returns, ("moved",)),
        ("backward", backward, fake_backward, BACKWARD, ()),
        ("infer", infer, fake_infer, INFER, ()),
    ):
        if getattr(part, direction) is not None:
            name = f"{part.name}_{direction}"
            operator = torch.library.custom_op(f"fastmbconv::{name}", run, mutates_args=mutated, schema=schema)
            operator.register_fake(fake)
            OPERATORS[name] = operator
            flops.register(name)


for _part in PARTS.values():
    _register(_part)
