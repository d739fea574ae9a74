"""Launch plans: what a part's forward or backward did before, done again without asking its launchers.

The first call of a kind runs the launchers, the second is recorded (recording.py). What doesn't change from call to
call (tiles, grids, constants, sizes, the compiled kernel) is in the plan then; what does is filled in:

    tensors ----> slots ------+--> allocate   a buffer each for what is large or returned, let go after its last use;
                              |               one for all small ones, laid out so that none overlaps another in use
                              +--> operate    PyTorch's own: a product, a sum, a copy, a message to other processes
    pointers, constants ------+--> launch     gathered by their places, and given to the compiled kernel's own `run`

That `run` is Triton's, and has the form that `known_form` looks for in 3.6 to 3.9. With another form, with
FASTMBCONV_PLANS=0, or while somebody watches launches (a profiler's hook, a recorder of ours), launchers run each time.
Interpreted kernels are replayed by `kernel[grid](...)`.
"""

from __future__ import annotations

import inspect
import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor
from triton.runtime import driver

from fastmbconv.kernels import launching
from fastmbconv.kernels.math import INTERPRETED
from fastmbconv.kernels.tuning import TRITON
from fastmbconv.recording import Allocate, Launch, Operate, Recorder, Slot, Step

MOST = 1024  # plans; beyond, all are made anew
ALIGNMENT = 16  # bytes; Triton compiles a kernel for pointers that this divides, or for any
SMALL, LINE = 1 << 20, 512  # bytes: of a buffer that lies among others, and what divides where it begins
OLDEST, NEWEST = (3, 6), (3, 9)  # Triton's versions whose kernels were started by a plan
FORM = ("gridX", "gridY", "gridZ", "stream", "function")  # what their `run` takes before metadata, hooks and arguments

# Python's own way to some of PyTorch's operations, which costs half of the operators' table.
aten = torch.ops.aten
SHORTER: dict[Any, Callable[..., Any]] = {
    aten.view.default: Tensor.view,
    aten.t.default: Tensor.t,
    aten.permute.default: Tensor.permute,
    aten.unbind.int: Tensor.unbind,
    aten.mm.out: torch.mm,
    aten.addmm.out: torch.addmm,
    aten.copy_.default: Tensor.copy_,
    aten.sum.dim_IntList: torch.sum,
}

Flat = Sequence[Tensor | None]
Action = Callable[[list[Any], list[Any]], Any]  # of slots, and of pointers and constants

ENABLED = os.environ.get("FASTMBCONV_PLANS", "1") != "0"

_plans: dict[Any, Plan | None] = {}  # None: called once
_lock = threading.Lock()


def run(key: Any, function: Callable[[], Flat], tensors: Flat) -> Flat:
    """What `function()` returns: by the plan of this key, if there is one, or by the function.

    Args:
        key: all that the function's launches depend on beside what is in `tensors`.
        function: returns tensors and Nones; it reads and moves `tensors`, and no other ones.
    """
    if launching.watched() or not ENABLED:
        return function()
    key = (key, launching.epoch())
    plan = _plans.get(key, _NEW)
    if plan is _NEW:
        with _lock:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[key] = None
        return function()
    if plan is None and all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors):
        found, _plans[key] = record(function, tensors)
        return found
    done = plan(tensors) if isinstance(plan, Plan) else None
    return function() if done is None else done


def forget() -> None:
    """Make every plan anew."""
    _plans.clear()


def record(function: Callable[[], Flat], tensors: Flat) -> tuple[Flat, Plan]:
    """What `function()` returns, and its plan, or `_NEVER` where it can't be replayed."""
    recorder = Recorder(tensors)
    with recorder.following():
        found = function()
    outputs = [recorder.number(tensor) for tensor in found]
    follows = recorder.complete and all(n is not None or t is None for n, t in zip(outputs, found, strict=True))
    kinds: set[Any] = {type(step.compiled) for step in recorder.steps if isinstance(step, Launch)}
    replayed = INTERPRETED or all(known_form(kind) for kind in kinds)
    return found, Plan(recorder, len(tensors), outputs) if follows and replayed else _NEVER


@cache
def known_form(kind: Any) -> bool:
    """Whether compiled kernels of this class are started as in the versions of Triton that are known here."""
    from triton.compiler import CompiledKernel

    if kind is not CompiledKernel or not OLDEST <= TRITON <= NEWEST:
        return False
    taken = inspect.signature(driver.active.launcher_cls.__call__).parameters
    return tuple(taken)[1 : 1 + len(FORM)] == FORM and tuple(taken)[-1] == "args"


def state() -> str:
    """Whether launches are planned here, for a person."""
    here, *known = (".".join(map(str, version)) for version in (TRITON, OLDEST, NEWEST))
    if not ENABLED:
        return "each anew: FASTMBCONV_PLANS is 0"
    if INTERPRETED:
        return f"planned (interpreted, Triton {here})"
    if not OLDEST <= TRITON <= NEWEST:
        return f"each anew: Triton {here} is not known here ({' to '.join(known)} are)"
    if torch.cuda.is_available() and not _started_as_known():
        return f"each anew: this Triton {here} starts kernels in a form of its own"
    return f"planned (Triton {here})"


def _started_as_known() -> bool:
    from triton.compiler import CompiledKernel

    return known_form(CompiledKernel)


# A key's state before its first call, and one that has no plan.
_NEW, _NEVER = (cast("Plan", object()) for _ in range(2))


class Plan:
    """A recorded function, to be called with tensors in the recorded ones' places; None if their pointers don't fit."""

    def __init__(self, recorder: Recorder, inputs: int, outputs: Sequence[int | None]) -> None:
        self._origins, self._inputs, self._outputs = recorder.origins, inputs, outputs
        self._values: list[Any] = [None] * len(recorder.origins)  # a pointer for each slot, then constants
        self._places: dict[Any, int] = {}
        # Held, for from 3.9 on Triton unloads a kernel that nobody holds.
        self._kernels = [step.compiled for step in recorder.steps if isinstance(step, Launch)]
        self._stream = self._place(object())
        steps = self._folded(self._needed(recorder.steps))
        last = {slot: i for i, step in enumerate(steps) for slot in self._used(step)}
        self._room, self._offsets = self._laid_out(steps, last)
        kept = {*range(inputs), *(slot for slot in outputs if slot is not None)}
        self._actions = [
            self._action(step, [slot for slot, at in last.items() if at == i and slot not in kept])
            for i, step in enumerate(steps)
            if not (isinstance(step, Allocate) and step.slot in self._offsets)
        ]
        pointed = {slot for step in steps if isinstance(step, Launch) for slot in self._used(step)}
        self._pointed = [slot for slot in range(inputs) if slot in pointed]
        self._free = (None,) * (len(recorder.origins) - inputs)

    def __call__(self, tensors: Flat) -> Flat | None:
        values, bits = self._values.copy(), 0
        for slot in self._pointed:
            pointer = values[slot] = tensors[slot].data_ptr()  # type: ignore[union-attr]
            bits |= pointer
        if bits % ALIGNMENT or launching.profiled():
            return None
        slots, x = [*tensors, *self._free], tensors[0]
        assert x is not None
        if self._room:
            room = torch.empty(self._room, dtype=torch.uint8, device=x.device)
            begin = room.data_ptr()
            for slot, offset in self._offsets.items():
                values[slot] = begin + offset
        if x.is_cuda:
            values[self._stream] = driver.active.get_current_stream(x.get_device())
        for act in self._actions:
            act(slots, values)
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
            if isinstance(step, Launch) or needed & {*step.slots} or (isinstance(step, Operate) and not step.pure):
                needed.update(self._used(step))
                found.append(step)
        return found[::-1]

    def _folded(self, steps: list[Step]) -> list[Step]:
        """Buffers in the shape of their one view, where nobody else than kernels looks at them."""
        views: dict[int, list[Operate]] = {}
        for step in steps:
            if isinstance(step, Operate):
                for slot in step.reads():
                    views.setdefault(slot, []).append(step)
        outputs, found, folded = {*self._outputs}, list[Step](), set[int]()
        for one in steps:
            step = one
            if isinstance(step, Allocate) and step.slot not in outputs and not INTERPRETED:
                lookers = views.get(step.slot, [])
                view = lookers[0].view_of(step) if len(lookers) == 1 else None
                if view is not None:
                    folded.add(id(lookers[0]))
                    self._origins = [(view.slot if at == step.slot else at, off) for at, off in self._origins]
                    step = view
            if id(one) not in folded:
                found.append(step)
        return found

    def _laid_out(self, steps: list[Step], last: dict[int, int]) -> tuple[int, dict[int, int]]:
        """(bytes, where each begins) of the small buffers that only kernels look at, in one."""
        seen = {slot for step in steps if isinstance(step, Operate) for slot in (*step.reads(), *step.slots)}
        seen |= {slot for slot in self._outputs if slot is not None}
        small = [
            (i, step)
            for i, step in enumerate(steps)
            if isinstance(step, Allocate) and step.slot not in seen and step.bytes <= SMALL and not INTERPRETED
        ]
        room, begins = lay_out([(step.bytes, i, last.get(step.slot, i)) for i, step in small])
        return room, {step.slot: begin for (_, step), begin in zip(small, begins, strict=True)}

    def _action(self, step: Step, free: list[int]) -> Action:
        if isinstance(step, Allocate):
            act = self._allocate(step)
        elif isinstance(step, Operate):
            act = self._operate(step)
        else:
            act = self._interpret(step) if INTERPRETED else self._launch(step)
        free = [slot for slot in free if slot not in self._offsets]
        if not free:
            return act

        def act_and_free(slots: list[Any], values: list[Any]) -> None:
            act(slots, values)
            for slot in free:
                slots[slot] = None

        return act_and_free

    def _allocate(self, step: Allocate) -> Action:
        slot, size, stride, dtype, device = step.slot, step.size, step.stride, step.dtype, step.device

        def act(slots: list[Any], values: list[Any]) -> None:
            tensor = slots[slot] = torch.empty_strided(size, stride, dtype=dtype, device=device)
            values[slot] = tensor.data_ptr()

        return act

    def _operate(self, step: Operate) -> Action:
        function, kwargs, targets = SHORTER.get(step.function, step.function), step.kwargs, step.slots
        template = [None if isinstance(one, Slot) else one for one in step.args]
        places = [(i, one.number) for i, one in enumerate(step.args) if isinstance(one, Slot)]
        nested = [(i, one) for i, one in enumerate(step.args) if isinstance(one, list) and _holds_slot(one)]
        named = {name: one.number for name, one in kwargs.items() if isinstance(one, Slot)}
        points = [slot for slot in targets if self._origins[slot][0] == slot]

        (target, *_), many = targets, len(targets) > 1

        def act(slots: list[Any], values: list[Any]) -> None:
            args = template.copy()
            for i, slot in places:
                args[i] = slots[slot]
            for i, one in nested:
                args[i] = _filled(one, slots)
            if named:
                result = function(*args, **kwargs | {name: slots[slot] for name, slot in named.items()})
            else:
                result = function(*args, **kwargs)
            if many:
                for slot, tensor in zip(targets, result, strict=True):
                    slots[slot] = tensor
            else:
                slots[target] = result
            for slot in points:
                values[slot] = slots[slot].data_ptr()

        return act

    def _interpret(self, step: Launch) -> Action:
        launch = launching.kernel(step.function)

        def act(slots: list[Any], values: list[Any]) -> None:
            launch[step.grid](**{name: _filled(one, slots) for name, one in step.given.items()})

        return act

    def _launch(self, step: Launch) -> Action:
        compiled, parameters = step.compiled, step.function.signature.parameters.values()
        given = [step.given.get(parameter.name, parameter.default) for parameter in parameters]
        before = (*(*step.grid, 1, 1)[:3], None, compiled.function, compiled.packed_metadata, None, None, None)
        places = [self._place(one) for one in (*before, *given)]
        places[3] = self._stream
        start, gather = compiled.run, itemgetter(*places)
        moved = [
            (len(before) + i, self._origins[one.number][1])
            for i, one in enumerate(given)
            if isinstance(one, Slot) and self._origins[one.number][1]
        ]
        if not moved:
            return lambda slots, values: start(*gather(values))

        def act(slots: list[Any], values: list[Any]) -> None:
            arguments = list(gather(values))
            for i, offset in moved:
                arguments[i] += offset
            start(*arguments)

        return act

    def _place(self, argument: Any) -> int:
        """Where a launch's argument stands among the values."""
        if isinstance(argument, Slot):
            return self._origins[argument.number][0]
        key = (type(argument), argument) if isinstance(argument, (int, float, str)) else id(argument)
        if key not in self._places:
            self._places[key] = len(self._values)
            self._values.append(argument)
        return self._places[key]


def lay_out(spans: Sequence[tuple[int, int, int]]) -> tuple[int, list[int]]:
    """(bytes, where each begins) of buffers of (bytes, first step, last step), so that none overlaps another in use."""
    room, begins = 0, list[int]()
    taken: list[tuple[int, int, int]] = []  # begin, end, last step
    for count, first, last in spans:
        taken = sorted(one for one in taken if one[2] >= first)
        begin, size = 0, LINE * math.ceil(count / LINE)
        for other, end, _ in taken:
            if begin + size <= other:
                break
            begin = max(begin, end)
        begins.append(begin)
        taken.append((begin, begin + size, last))
        room = max(room, begin + size)
    return room, begins


def _holds_slot(argument: Any) -> bool:
    return isinstance(argument, Slot) or (isinstance(argument, list) and any(map(_holds_slot, argument)))


def _filled(argument: Any, slots: list[Any]) -> Any:
    if isinstance(argument, Slot):
        return slots[argument.number]
    return [_filled(one, slots) for one in argument] if isinstance(argument, list) else argument
