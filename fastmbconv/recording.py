"""What a function allocates, computes by PyTorch and launches, as a list of steps between slots.

PyTorch's operations are seen by a dispatch mode, kernels at their launch (`launching.kernel`). A slot is a tensor that
came by; one that looks into another's memory knows whose, and where.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fastmbconv.kernels import launching

MAKERS = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"}


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor among a step's arguments: its number."""

    number: int


@dataclass(frozen=True, slots=True)
class Allocate:
    """An uninitialised tensor."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,)

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def reads(self) -> list[int]:
        return []


@dataclass(frozen=True, slots=True)
class Operate:
    """An operation of PyTorch's: `pure` if its result is all that it does, `view` its shape and stride if it is one."""

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    slots: tuple[int, ...]
    pure: bool
    view: tuple[tuple[int, ...], tuple[int, ...]] | None

    def reads(self) -> list[int]:
        return [one.number for one in _leaves((*self.args, *self.kwargs.values())) if isinstance(one, Slot)]

    def view_of(self, buffer: Allocate) -> Allocate | None:
        """The buffer in this view's shape, if it is a view of all of it."""
        if self.view is None or math.prod(self.view[0]) != math.prod(buffer.size):
            return None
        return Allocate(self.slots[0], *self.view, buffer.dtype, buffer.device)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel's launch; `compiled` is what Triton returned for it."""

    function: Any
    grid: tuple[int, ...]
    given: dict[str, Any]
    compiled: Any

    def reads(self) -> list[int]:
        return [one.number for one in self.given.values() if isinstance(one, Slot)]


Step = Allocate | Operate | Launch


class Recorder(TorchDispatchMode):
    """Notes steps while it is entered. `complete` turns False at what it can't follow: then they are of no use.

    Attributes:
        origins: of each slot, whose memory it is (a slot: its own, if it is no view) and how many bytes into that.
    """

    sees_fastmbconv = True

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.origins: list[tuple[int, int]] = []
        self.complete = True
        self._paused = False
        self._views: dict[Any, int] = {}
        self._numbers: Any = WeakIdKeyDictionary()  # by tensor: what is let go meanwhile must not live on for us
        for tensor in inputs:
            if tensor is None:
                self.origins.append((len(self.origins), 0))
            else:
                self.complete = self.complete and tensor not in self._numbers  # the next call may pass two
                self._add(tensor)

    def number(self, tensor: Tensor | None) -> int | None:
        """A tensor's slot; None for one that did not come by, or none."""
        return None if tensor is None else self._numbers.get(tensor)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Note what runs inside the `with` block, in this thread."""
        with self, launching.told(self):
            yield

    def launch(self, function: Any, grid: tuple[int, ...], given: dict[str, Any]) -> Any:
        """Run a launch and note it; an interpreted kernel works by PyTorch's operations, which are none of ours."""
        self._paused = True
        try:
            compiled = function[grid](**given)
        finally:
            self._paused = False
        placed = {name: self._place(argument) for name, argument in given.items()}
        self.steps.append(Launch(function, grid, placed, compiled))
        return compiled

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if self._paused:
            return out
        results = out if isinstance(out, (list, tuple)) else (out,)
        if not all(isinstance(one, Tensor) for one in results):
            self.complete = False
            return out
        placed = [self._place(one) for one in args], {name: self._place(one) for name, one in (kwargs or {}).items()}
        sources = [one for one in _leaves(args) if isinstance(one, Tensor)]
        viewed = function.is_view and out is results[0]
        if viewed:
            look = (placed[0][0].number, tuple(out.shape), out.stride(), out.storage_offset())
            if look in self._views:  # the same one again
                self._numbers[out] = self._views[look]
                return out
        numbers = tuple(self._number_of(one, sources) for one in results)
        if viewed:
            self._views[look] = numbers[0]
        if function._schema.name in MAKERS:
            self.steps.append(Allocate(numbers[0], tuple(out.shape), out.stride(), out.dtype, out.device))
        else:
            pure = function.namespace == "aten" and not function._schema.is_mutable
            view = (tuple(out.shape), out.stride()) if viewed and out.dtype == sources[0].dtype else None
            self.steps.append(Operate(function, *placed, numbers, pure, view))
        return out

    def _number_of(self, result: Tensor, sources: Sequence[Tensor]) -> int:
        """An operation's result's slot; it has one already where the operation changed it in place."""
        number = self.number(result)
        return self._add(result, sources) if number is None else number

    def _add(self, tensor: Tensor, arguments: Sequence[Tensor] = ()) -> int:
        number = self._numbers[tensor] = len(self.origins)
        memory = tensor.untyped_storage().data_ptr()
        for source in arguments:
            if source in self._numbers and source.numel() and source.untyped_storage().data_ptr() == memory:
                origin, offset = self.origins[self._numbers[source]]
                self.origins.append((origin, offset + tensor.data_ptr() - source.data_ptr()))
                return number
        self.origins.append((number, 0))
        return number

    def _place(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            number = self.number(argument)
            self.complete = self.complete and number is not None
            return Slot(-1 if number is None else number)
        return [self._place(one) for one in argument] if isinstance(argument, (list, tuple)) else argument


def _leaves(arguments: Any) -> Iterator[Any]:
    for one in arguments:
        if isinstance(one, (list, tuple)):
            yield from _leaves(one)
        else:
            yield one
