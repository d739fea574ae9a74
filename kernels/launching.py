"""Kernels whose launches can be written down instead of run: what a launcher is about to need compiled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_PROGRAMS = 65535  # along a grid's second and third axis


class Written(NamedTuple):
    """A launch that was not run: Triton's function and the arguments that it is specialised by.

    A tensor is there as an empty one: its dtype and alignment count, and its memory is free for the next launch.
    """

    function: Any
    arguments: dict[str, Any]


class _Thread(threading.local):
    written: list[Written] | None = None


_thread = _Thread()


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
        return self.function[grid]


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
