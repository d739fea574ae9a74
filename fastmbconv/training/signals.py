"""Ctrl-C and SIGTERM as a wish that the loop grants between two steps; the second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """The signal that came, or 0."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def heard() -> Iterator[Wish]:
    """Catch both signals inside a `with` block; only the main thread can."""
    wish = Wish()

    def hear(number: int, frame: FrameType | None) -> None:
        if wish.signal:
            raise KeyboardInterrupt
        wish.signal = number
        print("\nstopping after this step, and saving; once more stops at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
