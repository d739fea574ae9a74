"""Kernels whose launches can be written down instead of run: what a launcher is about to need compiled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Written(NamedTuple):
    """A launch that was not run: Triton's function and the arguments that it is specialised by."""

    function: Any
    arguments: dict[str, Any]


class _Thread(threading.local):
    written: list[Written] | None = None


_thread = _Thread()


class kernel:
    """A Triton function that launchers start by `function[grid](...)`."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        written = _thread.written
        if written is None:
            return self.function[grid]
        return lambda **arguments: written.append(Written(self.function, arguments))


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
