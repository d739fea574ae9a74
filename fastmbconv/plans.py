"""Launch plans: what a part's forward or backward did before, done again without asking its launchers.

The first call of a kind runs the launchers, the second is recorded (recording.py). What doesn't change from call to
call (tiles, grids, constants, sizes, the compiled kernel) is in the plan then; what does is filled in:

    tensors ----> slots ------+--> allocate   a slot for each buffer, let go after its last use
                  pointers ---+--> operate    PyTorch's own: a product, a sum, a copy, a message to other processes
                  constants --+--> launch     pointers and constants, gathered by their places

Compiled kernels start by `compiled[grid](*arguments, stream=stream)`, as in Triton's tutorials. Where a kernel has
another form (`known_form`), launchers run at each call, as they do while somebody watches launches. Interpreted kernels
are replayed by `kernel[grid](...)`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastmbconv.kernels import launching
from fastmbconv.kernels.math import INTERPRETED
from fastmbconv.recording import Allocate, Launch, Operate, Recorder, Slot, Step

MOST = 1024  # plans; beyond, all are made anew
ALIGNMENT = 16  # bytes; Triton compiles a kernel for pointers that this divides, or for any

Flat = Sequence[Tensor | None]
Action = Callable[[list[Any], list[Any], Any], None]  # of slots, pointers and constants, and the stream

_plans: dict[Any, Plan | None] = {}
_lock = threading.Lock()


def run(key: Any, function: Callable[[], Flat], tensors: Flat) -> Flat:
    """What `function()` returns: by the plan of this key, if there is one, or by the function.

    Args:
        key: all that the function's launches depend on beside what is in `tensors`.
        function: returns tensors and Nones; it reads and moves `tensors`, and no other ones.
    """
    if launching.watched():
        return function()
    key = (key, launching.epoch())
    plan = _plans.get(key, _NEW)
    if plan is _NEW:
        with _lock:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[key] = None
        return function()
    if plan is None:
        found, _plans[key] = record(function, tensors)
        return found
    done = plan(tensors)
    return function() if done is None else done


def record(function: Callable[[], Flat], tensors: Flat) -> tuple[Flat, Plan | None]:
    """What `function()` returns, and its plan, None where it can't be replayed."""
    recorder = Recorder(tensors)
    with recorder.following():
        found = function()
    outputs = [recorder.number(tensor) for tensor in found]
    follows = recorder.complete and all(n is not None or t is None for n, t in zip(outputs, found, strict=True))
    kinds: set[Any] = {type(step.compiled) for step in recorder.steps if isinstance(step, Launch)}
    replayed = INTERPRETED or all(known_form(kind) for kind in kinds)
    aligned = all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
    if not (follows and replayed and aligned):
        return found, None
    return found, Plan(recorder, len(tensors), outputs)


@cache
def known_form(kind: Any) -> bool:
    """Whether objects of this class are Triton's compiled kernels in the form that a plan starts, as in 3.6 to 3.9."""
    from triton.compiler import CompiledKernel

    index = getattr(kind, "__getitem__", None)
    return kind is CompiledKernel and index is not None and "grid" in inspect.signature(index).parameters


class _New:
    pass


_NEW: Any = _New()


class Plan:
    """A recorded function, to be called with tensors in the recorded ones' places; None if their pointers don't fit."""

    def __init__(self, recorder: Recorder, inputs: int, outputs: Sequence[int | None]) -> None:
        self._origins, self._inputs, self._outputs = recorder.origins, inputs, outputs
        self._values: list[Any] = [None] * len(recorder.origins)  # a pointer for each slot, then constants
        self._constants: dict[Any, int] = {}
        steps = self._needed(recorder.steps)
        last = {slot: i for i, step in enumerate(steps) for slot in self._used(step)}
        kept = {*range(inputs), *(slot for slot in outputs if slot is not None)}
        self._actions = [
            self._action(step, [slot for slot, at in last.items() if at == i and slot not in kept])
            for i, step in enumerate(steps)
        ]
        pointed = {slot for step in steps if isinstance(step, Launch) for slot in self._used(step)}
        self._pointed = [slot for slot in range(inputs) if slot in pointed]

    def __call__(self, tensors: Flat) -> Flat | None:
        values, bits = self._values.copy(), 0
        for slot in self._pointed:
            pointer = values[slot] = tensors[slot].data_ptr()  # type: ignore[union-attr]
            bits |= pointer
        if bits % ALIGNMENT:
            return None
        slots = [*tensors, *(None,) * (len(self._origins) - self._inputs)]
        stream = launching.current_stream(tensors[0])
        for act in self._actions:
            act(slots, values, stream)
        return [None if slot is None else slots[slot] for slot in self._outputs]

    def _used(self, step: Step) -> list[int]:
        """The slots that a step looks at; of a compiled kernel's the ones whose memory they are."""
        if isinstance(step, Launch) and not INTERPRETED:
            return [self._origins[slot][0] for slot in step.reads()]
        return step.reads()

    def _needed(self, steps: Sequence[Step]) -> list[Step]:
        """Without views that only a pointer was read off, and whatever else nobody looks at."""
        needed = {slot for slot in self._outputs if slot is not None}
        found: list[Step] = []
        for step in reversed(steps):
            if isinstance(step, Launch) or step.slot in needed or (isinstance(step, Operate) and not step.pure):
                needed.update(self._used(step))
                found.append(step)
        return found[::-1]

    def _action(self, step: Step, free: list[int]) -> Action:
        act = self._allocate(step) if isinstance(step, Allocate) else self._start(step)
        if not free:
            return act

        def act_and_free(slots: list[Any], values: list[Any], stream: Any) -> None:
            act(slots, values, stream)
            for slot in free:
                slots[slot] = None

        return act_and_free

    def _start(self, step: Operate | Launch) -> Action:
        if isinstance(step, Operate):
            return self._operate(step)
        return self._interpret(step) if INTERPRETED else self._launch(step)

    def _allocate(self, step: Allocate) -> Action:
        slot, size, stride = step.slot, step.size, step.stride
        options = dict(dtype=step.dtype, device=step.device)

        def act(slots: list[Any], values: list[Any], stream: Any) -> None:
            tensor = slots[slot] = torch.empty_strided(size, stride, **options)  # type: ignore[arg-type]
            values[slot] = tensor.data_ptr()

        return act

    def _operate(self, step: Operate) -> Action:
        function, args, kwargs, target = step.function, step.args, step.kwargs, step.slot
        points = self._origins[target][0] == target

        def act(slots: list[Any], values: list[Any], stream: Any) -> None:
            named = {name: _filled(one, slots) for name, one in kwargs.items()}
            tensor = slots[target] = function(*(_filled(one, slots) for one in args), **named)
            if points:
                values[target] = tensor.data_ptr()

        return act

    def _interpret(self, step: Launch) -> Action:
        launch = launching.kernel(step.function)

        def act(slots: list[Any], values: list[Any], stream: Any) -> None:
            launch[step.grid](**{name: _filled(one, slots) for name, one in step.given.items()})

        return act

    def _launch(self, step: Launch) -> Action:
        parameters = step.function.signature.parameters.values()
        given = [step.given.get(parameter.name, parameter.default) for parameter in parameters]
        start = step.compiled[(*step.grid, 1, 1)[:3]]
        if any(isinstance(one, Slot) and self._origins[one.number][1] for one in given):
            offsets = [self._origins[one.number][1] if isinstance(one, Slot) else 0 for one in given]
            gather = itemgetter(*(self._place(one) for one in given))

            def act_inside(slots: list[Any], values: list[Any], stream: Any) -> None:
                arguments = [one + more if more else one for one, more in zip(gather(values), offsets, strict=True)]
                start(*arguments, stream=stream)

            return act_inside
        gather = itemgetter(*(self._place(one) for one in given))

        def act(slots: list[Any], values: list[Any], stream: Any) -> None:
            start(*gather(values), stream=stream)

        return act

    def _place(self, argument: Any) -> int:
        """Where a launch's argument stands among the values."""
        if isinstance(argument, Slot):
            return self._origins[argument.number][0]
        key = (type(argument), argument)
        if key not in self._constants:
            self._constants[key] = len(self._values)
            self._values.append(argument)
        return self._constants[key]


def _filled(argument: Any, slots: list[Any]) -> Any:
    if isinstance(argument, Slot):
        return slots[argument.number]
    return [_filled(one, slots) for one in argument] if isinstance(argument, list) else argument
