"""A recorded function as a Python function of straight lines, written once per plan: `Plan.source` is there to be read.

    def replay(t0, t1, t2):                             tensors in the recorded ones' places
        p0 = t0.data_ptr()                              a pointer for whatever kernels read or write
        if (p0 | p1) & 15 or profiled(): return None    kernels are compiled for pointers that 16 divides
        room = empty(8192, ...).data_ptr()              one buffer for all small ones; none overlaps another in use
        t3 = empty_strided(...)                         one each for what is large or returned
        t4 = mm(t3, t1)                                 PyTorch's own: a product, a sum, a message to other processes
        _bn_finalize_5(1, 1, 1, stream, ..., p0, 96)    a kernel: the compiled one's own `run`, all arguments by place
        t3 = None                                       let go after its last use
        return [t4, None]

Interpreted kernels are started by `kernel[grid](...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from fastmbconv.kernels import launching
from fastmbconv.kernels.math import INTERPRETED
from fastmbconv.recording import Allocate, Launch, Operate, Recorder, Slot, Step

ALIGNMENT = 16  # bytes; Triton compiles a kernel for pointers that this divides, or for any
SMALL, LINE = 1 << 20, 512  # bytes: of a buffer that lies among others, and what divides where it begins

# Python's own way to some of PyTorch's operations, which costs half of the operators' table.
aten = torch.ops.aten
SHORTER: dict[Any, Callable[..., Any]] = {
    aten.view.default: Tensor.view,
    aten.t.default: Tensor.t,
    aten.permute.default: Tensor.permute,
    aten.mm.out: torch.mm,
    aten.mm.dtype_out: torch.mm,
    aten.addmm.out: torch.addmm,
    aten.copy_.default: Tensor.copy_,
    aten.sum.dim_IntList: torch.sum,
}

Flat = Sequence[Tensor | None]


class Plan:
    """A recorded function, to be called with tensors in the recorded ones' places; None if their pointers don't fit.

    Attributes:
        source: what it does, as Python.
    """

    def __init__(self, recorder: Recorder, tensors: Flat, outputs: Sequence[int | None]) -> None:
        writer = _Writer(recorder, tensors, outputs)
        self.source = writer.source()
        # Held, for from 3.9 on Triton unloads a kernel that nobody holds.
        self._kernels = [step.compiled for step in recorder.steps if isinstance(step, Launch)]
        exec(compile(self.source, "<a launch plan of fastmbconv>", "exec"), writer.names)
        self._replay: Callable[..., Flat | None] = writer.names["replay"]

    def __call__(self, tensors: Flat) -> Flat | None:
        return self._replay(*tensors)


class _Writer:
    """Writes a plan. `names` has everything that its source speaks of: functions, kernels, dtypes."""

    def __init__(self, recorder: Recorder, tensors: Flat, outputs: Sequence[int | None]) -> None:
        self.names: dict[str, Any] = {
            "empty": torch.empty, "empty_strided": torch.empty_strided, "profiled": launching.profiled,
        }  # fmt: skip
        self._devices: dict[torch.device, torch.device] = {}
        self._device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
        self._origins, self._inputs, self._outputs = recorder.origins, range(len(tensors)), outputs
        self._returned = {slot for slot in outputs if slot is not None}
        steps = self._folded(self._needed(recorder.steps))
        self._last = {slot: i for i, step in enumerate(steps) for slot in self._used(step)}
        self._room, self._offsets = self._laid_out(steps)
        self._pointed = set[int]()
        if not INTERPRETED:
            self._pointed = {slot for step in steps if isinstance(step, Launch) for slot in self._used(step)}
        self._steps = steps

    def source(self) -> str:
        lines, kept = [*self._beginning()], {*self._inputs, *self._returned, *self._offsets}
        known = {*self._inputs, *self._offsets}  # whose pointers were read
        for i, step in enumerate(self._steps):
            if isinstance(step, Allocate) and step.slot in self._offsets:
                continue
            lines.append(self._written(step))
            made = () if isinstance(step, Launch) else step.slots
            lines += [f"p{slot} = t{slot}.data_ptr()" for slot in made if slot in self._pointed - known]
            known.update(made)
            lines += [f"t{slot} = None" for slot, at in self._last.items() if at == i and slot not in kept]
        found = ", ".join("None" if slot is None else f"t{slot}" for slot in self._outputs)
        head = f"def replay({', '.join(f't{slot}' for slot in self._inputs)}):"
        return "\n    ".join((head, *lines, f"return [{found}]")) + "\n"

    def _beginning(self) -> Iterable[str]:
        pointed = [slot for slot in self._inputs if slot in self._pointed]
        yield from (f"p{slot} = t{slot}.data_ptr()" for slot in pointed)
        unfit = f"({' | '.join(f'p{slot}' for slot in pointed)}) & {ALIGNMENT - 1} or " if pointed else ""
        yield f"if {unfit}profiled(): return None"
        if self._room:
            yield f"room = empty({self._room}, {self._kind(torch.uint8, self._device)})"
            yield "begin = room.data_ptr()"
            yield from (f"p{slot} = begin + {offset}" for slot, offset in self._offsets.items())
        if self._device.type == "cuda" and self._pointed:
            self.names["current_stream"] = driver.active.get_current_stream
            yield f"stream = current_stream({self._device.index or 0})"

    def _written(self, step: Step) -> str:
        if isinstance(step, Allocate):
            return f"t{step.slot} = empty_strided({step.size}, {step.stride}, {self._kind(step.dtype, step.device)})"
        if isinstance(step, Operate):
            return self._operate(step)
        return self._interpret(step) if INTERPRETED else self._launch(step)

    def _operate(self, step: Operate) -> str:
        schema, kwargs = step.function._schema, step.kwargs
        targets = ", ".join(f"t{slot}" for slot in step.slots)
        if isinstance(schema.returns[0].type, torch.ListType):  # maybe of one
            targets += ","
        function = SHORTER.get(step.function, step.function)
        if step.function is aten._to_copy.default and kwargs.keys() == {"dtype"}:
            function, kwargs = Tensor.to, {**kwargs, "copy": True}
        arguments = [self._text(one) for one in step.args]
        arguments += [f"{name}={self._text(one)}" for name, one in kwargs.items()]
        name = self._named(function, schema.name.rpartition("::")[2])
        return f"{targets} = {name}({', '.join(arguments)})"

    def _interpret(self, step: Launch) -> str:
        start = self._named(launching.kernel(step.function), step.function.__name__)
        given = ", ".join(f"{name}={self._text(one)}" for name, one in step.given.items())
        return f"{start}[{step.grid}]({given})"

    def _launch(self, step: Launch) -> str:
        compiled, name = step.compiled, step.function.__name__
        parameters = step.function.signature.parameters.values()
        given = [step.given.get(parameter.name, parameter.default) for parameter in parameters]
        before = (
            *map(str, (*step.grid, 1, 1)[:3]), "stream", self._named(compiled.function, "function"),
            self._named(compiled.packed_metadata, "metadata"), "None", "None", "None",
        )  # fmt: skip
        arguments = (self._pointer(one) if isinstance(one, Slot) else self._text(one) for one in given)
        return f"{self._named(compiled.run, name)}({', '.join((*before, *arguments))})"

    def _pointer(self, slot: Slot) -> str:
        origin, offset = self._origins[slot.number]
        return f"p{origin} + {offset}" if offset else f"p{origin}"

    def _text(self, argument: Any) -> str:
        """An argument as source."""
        if isinstance(argument, Slot):
            return f"t{argument.number}"
        if isinstance(argument, list):
            return f"[{', '.join(map(self._text, argument))}]"
        if argument is None or type(argument) in (bool, int, str) or _is_finite(argument):
            return repr(argument)
        return self._named(argument, type(argument).__name__)

    def _kind(self, dtype: torch.dtype, device: torch.device) -> str:
        device = self._devices.setdefault(device, device)
        return f"dtype={self._named(dtype, str(dtype).rpartition('.')[2])}, device={self._named(device, 'device')}"

    def _named(self, value: Any, name: str) -> str:
        """A name for a value in the source, the same one for the same value."""
        name = "".join(each if each.isalnum() else "_" for each in name)
        number = 0
        while (found := f"{name}_{number}" if number else name) in self.names and self.names[found] is not value:
            number += 1
        self.names[found] = value
        return found

    def _used(self, step: Step) -> list[int]:
        """The slots that a step looks at; of a compiled kernel's the ones whose memory they are."""
        if isinstance(step, Launch) and not INTERPRETED:
            return [self._origins[slot][0] for slot in step.reads()]
        return step.reads()

    def _needed(self, steps: Sequence[Step]) -> list[Step]:
        """Without views that only a pointer was read off, and whatever else nobody looks at."""
        needed = {*self._returned}
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
        found, folded = list[Step](), set[int]()
        for one in steps:
            step = one
            if isinstance(step, Allocate) and step.slot not in self._returned and not INTERPRETED:
                lookers = views.get(step.slot, [])
                view = lookers[0].view_of(step) if len(lookers) == 1 else None
                if view is not None:
                    folded.add(id(lookers[0]))
                    self._origins = [(view.slot if at == step.slot else at, off) for at, off in self._origins]
                    step = view
            if id(one) not in folded:
                found.append(step)
        return found

    def _laid_out(self, steps: list[Step]) -> tuple[int, dict[int, int]]:
        """(bytes, where each begins) of the small buffers that only kernels look at, in one."""
        seen = {slot for step in steps if isinstance(step, Operate) for slot in (*step.reads(), *step.slots)}
        seen |= self._returned
        small = [
            (i, step)
            for i, step in enumerate(steps)
            if isinstance(step, Allocate) and step.slot not in seen and step.bytes <= SMALL and not INTERPRETED
        ]
        room, begins = lay_out([(step.bytes, i, self._last.get(step.slot, i)) for i, step in small])
        return room, {step.slot: begin for (_, step), begin in zip(small, begins, strict=True)}


def _is_finite(argument: Any) -> bool:
    return type(argument) is float and math.isfinite(argument)


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
