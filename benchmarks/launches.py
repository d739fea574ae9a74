"""Which Triton kernels a call launches: seen on the way to the GPU, or instead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import fastmbconv
from fastmbconv import dispatch
from fastmbconv.kernels import launching, library

Seen = Callable[[Any, tuple[int, ...], dict[str, Any]], Any]  # kernel, grid, arguments


@contextmanager
def caught(seen: Seen) -> Iterator[None]:
    """The kernels' path for CPU tensors inside the block: `seen` gets each launch, and nothing is computed."""
    with (
        mock.patch.object(dispatch, "device_reason", lambda x: None),
        mock.patch.object(library, "compute", lambda *_: None),
        fastmbconv.backend("triton"),
        launching.hooked(seen),
    ):
        yield


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Kernel names and how often each was launched inside the block."""
    counts: dict[str, int] = {}

    def count(kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> Any:
        counts[kernel.__name__] = counts.get(kernel.__name__, 0) + 1
        return kernel[grid](**given)

    with launching.hooked(count):
        yield counts
