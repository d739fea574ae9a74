"""The search behind `fastmbconv tune`: the launches of a model's training step and inference, and their fastest tiles.

`launches` catches them without a GPU: each block runs once on CPU tensors whose kernels are left out. A launch can then
be repeated with other tiles, partial sums and all. `search` walks from the formula's tiles to better neighbours; what
does not compile, or spills registers, is never timed. The compiler and the clock are arguments.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastmbconv
from fastmbconv import call, dispatch, fused  # noqa: F401 (it brings every launcher in)
from fastmbconv.block import Block, Memory
from fastmbconv.device_timer import DeviceTimer
from fastmbconv.kernels import launching, library, tables, traffic
from fastmbconv.kernels.running import Running
from fastmbconv.kernels.tuning import SPACE
from fastmbconv.swap.fused import fusible

GAIN = 0.99  # of the best time so far: what is not faster than noise changes nothing
SAMPLES, SAMPLES_MS = 15, 60.0

Step = Callable[[], object]
Tiles = dict[str, int]


@dataclass(frozen=True)
class Spec:
    """A tensor to be made again: size, strides, dtype."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device).normal_()


def described(argument: Any) -> Any:
    """A launcher's argument with a Spec in place of each tensor, those of a BatchNorm included."""
    if isinstance(argument, Tensor):
        return Spec(tuple(argument.shape), argument.stride(), argument.dtype)
    return Running(*map(described, argument)) if isinstance(argument, Running) else argument


def made(argument: Any, device: torch.device) -> Any:
    """What `described` described, on a device."""
    if isinstance(argument, Spec):
        return argument.make(device)
    if isinstance(argument, Running):
        bn = Running(*(made(part, device) for part in argument))
        return bn._replace(var=bn.var.abs_())
    return argument


@dataclass
class Launch:
    """One bucket: its question, a call that asks it, how often a step does, bytes of all those calls.

    The call is a launcher's, or, for a choice between several of them, a block's training step on a device.
    """

    question: tables.Question
    launcher: Callable[..., Any]
    arguments: tuple[Any, ...]
    count: int = 0
    moved: int = 0

    def step(self, device: torch.device) -> Step:
        """The call on fresh tensors."""
        if self.launcher is _train_case:
            case, memory, dtype = self.arguments
            return _train_case(case, memory, dtype, device)
        arguments = [made(a, device) for a in self.arguments]
        return lambda: self.launcher(*arguments)


@dataclass(frozen=True)
class BlockCase:
    """A block with its input's shape, and how often the model has it."""

    block: nn.Module
    size: tuple[int, ...]
    count: int

    def module(self, device: torch.device, memory: Memory) -> nn.Module:
        """The block alone, fused, on a device."""
        module = copy.deepcopy(self.block).to_empty(device=device)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.uniform_(tensor, 0.5, 1.0)
        return fastmbconv.fuse(nn.Sequential(module), memory=memory).train()


@dataclass
class Found:
    """What the search for one bucket came to; `tiles` is None where nothing could be timed."""

    tiles: Tiles | None
    ms: float = float("inf")
    default_ms: float = float("inf")
    timed: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # by reason


def cases(model: nn.Module, size: tuple[int, int, int, int]) -> list[BlockCase]:
    """The distinct blocks of a model for images of `size`; nothing is computed, the model's tensors are dropped."""
    model = model.to("meta").train()
    found: dict[Any, BlockCase] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        block, shape = fusible(module), tuple(arguments[0].shape)
        if isinstance(block, Block):
            case = found.get(_kind(block, shape), BlockCase(copy.deepcopy(module), shape, 0))
            found[_kind(block, shape)] = BlockCase(case.block, shape, case.count + 1)

    handles = [
        module.register_forward_pre_hook(note) for module in model.modules() if isinstance(fusible(module), Block)
    ]
    with fastmbconv.backend("eager"), torch.no_grad():
        model(torch.empty(size, device="meta"))
    for handle in handles:
        handle.remove()
    return list(found.values())


def _kind(block: Block, shape: tuple[int, ...]) -> tuple[Any, ...]:
    reduce = None if block.se is None else block.se.reduce_weight
    weights = (block.expand_weight, block.depthwise_weight, block.project_weight, reduce)
    sizes = tuple(None if w is None else tuple(w.shape) for w in weights)
    start = None if block.start is None else (block.start.kernel_size, block.start.stride, block.start.padding)
    functions = block.activations, call.excite_settings(block.se)
    return shape, sizes, block.stride, block.padding, str(functions), block.residual, block.drop is not None, start


def launches(blocks: list[BlockCase], dtype: torch.dtype, plans: tuple[Memory, ...]) -> list[Launch]:
    """The tunable launches of these blocks, training in each plan and inference, by bytes; nothing is computed."""
    found: dict[str, Launch] = {}
    with _kernels_left_out(), fastmbconv.backend("triton"):
        for case in blocks:
            for memory in plans:
                with _caught(found, case.count, (case, memory, dtype)):
                    _train(case.module(torch.device("cpu"), memory), case, torch.device("cpu"), dtype)()
            module = case.module(torch.device("cpu"), "fast").eval()
            with _caught(found, case.count, (case, "fast", dtype)), torch.no_grad():
                _forward(module, case, torch.device("cpu"), dtype)()
    return sorted(found.values(), key=lambda launch: -launch.moved)


def _forward(module: nn.Module, case: BlockCase, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    x = torch.empty(case.size, dtype=dtype, device=device, memory_format=torch.channels_last)
    x = x.normal_() if device.type != "cpu" else x
    x.requires_grad_(torch.is_grad_enabled())

    def forward() -> Tensor:
        half = dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
            return module(x)

    return forward


def _train(module: nn.Module, case: BlockCase, device: torch.device, dtype: torch.dtype) -> Step:
    forward = _forward(module, case, device, dtype)

    def step() -> None:
        y = forward()
        y.backward(torch.empty_like(y))

    return step


def _train_case(case: BlockCase, memory: Memory, dtype: torch.dtype, device: torch.device) -> Step:
    with fastmbconv.backend("triton"):
        step = _train(case.module(device, memory), case, device, dtype)

    def through_kernels() -> None:
        with fastmbconv.backend("triton"):
            step()

    return through_kernels


@contextmanager
def _kernels_left_out() -> Iterator[None]:
    with (
        mock.patch.object(dispatch, "device_reason", lambda x: None),
        mock.patch.object(library, "compute", lambda *_: None),
        launching.hooked(lambda function, grid, given: None),
    ):
        yield


def launchers() -> dict[str, Any]:
    """The module of each tunable launcher, by the launcher's name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastmbconv.kernels.")]
    return {
        name: module
        for module in modules
        for name in SPACE
        if getattr(getattr(module, name, None), "__module__", None) == module.__name__
    }


@contextmanager
def _caught(found: dict[str, Launch], count: int, whole: tuple[Any, ...]) -> Iterator[None]:
    """Inside the `with` block each tunable launch of a block's step is noted in `found`, `count` times.

    `whole` are the arguments of `_train_case` for what is asked outside of every launcher.
    """
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(_train_case, whole)]
    asked: list[list[Launch]] = [[]]  # by each of the calls
    moved = [0]  # bytes, in each of the calls

    def noted(launcher: Callable[..., Any]) -> Callable[..., Any]:
        bind = signature(launcher).bind

        def call(*positional: Any, **named: Any) -> Any:
            arguments = bind(*positional, **named).args
            specs = tuple(map(described, arguments))
            calls.append((launcher, specs))
            asked.append([])
            moved.append(0)
            with traffic.recorded() as stated:
                result = launcher(*arguments)
            calls.pop()
            account(stated)
            return result

        return call

    def account(stated: list[traffic.Launch]) -> None:
        own = moved.pop() + sum(one.size for launch in stated for one in (*launch.reads, *launch.writes))
        for launch in asked.pop():
            launch.count += count
            launch.moved += count * own
        if moved:
            moved[-1] += own

    def listen(question: tables.Question) -> Tiles:
        asked[-1].append(found.setdefault(question.key, Launch(question, *calls[-1])))
        return question.default

    with ExitStack() as stack:
        for name, module in launchers().items():
            stack.enter_context(mock.patch.object(module, name, noted(getattr(module, name))))
        stack.enter_context(tables.answered_by(listen))
        with traffic.recorded() as stated:
            yield
    account(stated)


def neighbours(question: tables.Question, tiles: Tiles, name: str) -> tuple[list[int], list[int]]:
    """Values for one tile size beside its present one: larger, smaller, each from near to far."""
    choice = SPACE[question.kernel][name]
    most = None if choice.bound is None else 2 * question.sizes[choice.bound] - 1
    values = [v for v in choice.values if (most is None or v <= most) and tables.fits(question, {name: v})]
    return [v for v in values if v > tiles[name]], [v for v in reversed(values) if v < tiles[name]]


def search(
    launch: Launch,
    step: Step,
    *,
    spills: Callable[[Step], int | None] | None = None,
    measure: Callable[[Step], float] | None = None,
    left: Callable[[], float] = lambda: 1.0,
) -> Found:
    """The fastest tiles on the way from the formula's over better neighbours, one tile size at a time.

    `spills(step)` compiles and returns the registers that spill, None where it does not compile; `measure(step)` is in
    milliseconds. Once `left()` is no longer positive the best so far counts.
    """
    spills, measure = spills or compiled_spills, measure or device_ms
    question = launch.question
    names = [name for name in SPACE[question.kernel] if name in question.default]
    found = Found(None)

    def ms_of(tiles: Tiles) -> float:
        with tables.answered_by(lambda asked: tiles if asked.key == question.key else asked.default):
            spilled = spills(step)
            if spilled != 0:
                reason = "does not compile" if spilled is None else "spills"
                found.rejected[reason] = found.rejected.get(reason, 0) + 1
                return float("inf")
            found.timed += 1
            return measure(step)

    best = question.default
    ms = found.default_ms = ms_of(best)
    better = True
    while better and left() > 0:
        better = False
        for name in names:
            for way in neighbours(question, best, name):
                before = best
                for value in way:
                    if left() <= 0 or not (faster := ms_of(candidate := best | {name: value})) < ms * GAIN:
                        break
                    best, ms, better = candidate, faster, True
                if best is not before:
                    break
    if ms < float("inf"):
        found.tiles, found.ms = {name: best[name] for name in names}, ms
    return found


def plan_key(case: BlockCase, dtype: torch.dtype) -> str | None:
    """The bucket of a block's plan; None where it has no expansion, and so but one plan."""
    block = fusible(case.block)
    assert isinstance(block, Block)
    if block.expand_weight is None:
        return None
    hidden = block.depthwise_weight.shape[0]
    return tables.memory_key(
        dtype, block.behind_start(case.size), hidden, block.kernel_size, block.stride, block.activation
    )


def plan_ms(
    case: BlockCase,
    device: torch.device,
    dtype: torch.dtype,
    table: tables.Table,
    measure: Callable[[Step], float] | None = None,
) -> dict[Memory, float]:
    """Milliseconds of a block's forward and backward by plan, with this table's tiles."""
    plans: tuple[Memory, ...] = ("fast", "lean")
    times: dict[Memory, float] = {}

    def tiles(asked: tables.Question) -> Tiles:
        return asked.default | table.tiles.get(asked.key, {})

    with fastmbconv.backend("triton"), tables.answered_by(tiles):
        for memory in plans:
            times[memory] = (measure or device_ms)(_train(case.module(device, memory), case, device, dtype))
    return times


def compiled_spills(step: Step) -> int | None:
    """Most registers that a kernel of this step spills on this GPU, None where one does not compile; runs nothing."""
    spilled = [0]

    def compile_only(function: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        compiled = function.run(grid=grid, warmup=True, **given)
        compiled._init_handles()
        spilled.append(compiled.n_spills)

    try:
        with launching.hooked(compile_only):
            step()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the compiler's ways to say no: CompilationError, OutOfResources, a failed ptxas, ...
        return None
    return max(spilled)


def device_ms(step: Step) -> float:
    """Median device time of a warm step in milliseconds, as `DeviceTimer` takes it."""
    timer = DeviceTimer()
    samples: list[float] = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        queued = time.perf_counter() - began
    head_start_ms = 1.5e3 * queued + 0.2
    while len(samples) < SAMPLES and (len(samples) < 3 or sum(samples) < SAMPLES_MS):
        samples.append(timer(step, head_start_ms))
    return statistics.median(samples)
