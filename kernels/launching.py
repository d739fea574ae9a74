"""Launches of kernels: run, written down instead (to be compiled), hooked, or recorded; and who watches them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

MOST_PROGRAMS = 65535  # along a grid's second and third axis


class Written(NamedTuple):
    """A launch that was not run: Triton's function and the arguments that it is specialised by.

    A tensor is there as an empty one: its dtype and alignment count, and its memory is free for the next launch.
    """

    function: Any
    arguments: dict[str, Any]


class _Thread(threading.local):
    written: list[Written] | None = None
    recorder: Any = None


_thread = _Thread()
_hook: Callable[..., Any] | None = None
_watchers = 0
_epoch = 0


def _without_memory(argument: Any) -> Any:
    aligned = isinstance(argument, Tensor) and argument.data_ptr() % 16 == 0
    return _nothing(argument.dtype, argument.device) if aligned else argument


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


class kernel:
    """A Triton function that launchers start by `function[grid](...)`."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        written = _thread.written
        if written is not None:
            return lambda **given: written.append(
                Written(self.function, {name: _without_memory(argument) for name, argument in given.items()})
            )
        if len(grid) > 1 and max(grid[1:]) > MOST_PROGRAMS:
            raise ValueError(
                f"x is too large for {self.function.__name__}: its grid would be {grid}, and an axis behind the first "
                f"holds {MOST_PROGRAMS} programs; split the batch, or run it inside `with fastmbconv.backend('eager')`"
            )
        start = _hook or _thread.recorder and _thread.recorder.launch
        return partial(_started, start, self.function, grid) if start else self.function[grid]


def _started(start: Callable[..., Any], function: Any, grid: tuple[int, ...], **given: Any) -> Any:
    return start(function, grid, given)


@contextmanager
def hooked(hook: Callable[[Any, tuple[int, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Inside the `with` block each launch of any thread is `hook(function, grid, arguments)` instead."""
    global _hook
    before, _hook = _hook, hook
    try:
        with watching():
            yield
    finally:
        _hook = before


@contextmanager
def told(recorder: Any) -> Iterator[None]:
    """Inside the `with` block each launch of this thread is `recorder.launch(function, grid, arguments)` instead."""
    before, _thread.recorder = _thread.recorder, recorder
    try:
        yield
    finally:
        _thread.recorder = before


@contextmanager
def watching() -> Iterator[None]:
    """Inside the `with` block launchers run at every call: somebody listens to them."""
    global _watchers
    _watchers += 1
    try:
        yield
    finally:
        _watchers -= 1


def watched() -> bool:
    """True where somebody listens to launchers, or this thread's launches are written down."""
    return _watchers > 0 or _thread.written is not None


def epoch() -> int:
    """A number that changes with what launchers go by beside their arguments: tuned tables, the GPU asked for."""
    return _epoch


def renew() -> None:
    """Say that launchers may answer otherwise from now on."""
    global _epoch
    _epoch += 1


def profiled() -> bool:
    """True where Triton calls somebody's hook at each launch."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def writing() -> bool:
    """True where this thread's launches are written down."""
    return _thread.written is not None


@contextmanager
def written() -> Iterator[list[Written]]:
    """Inside the `with` block this thread's launches are collected, and nothing is computed."""
    before, _thread.written = _thread.written, []
    try:
        yield _thread.written
    finally:
        _thread.written = before
