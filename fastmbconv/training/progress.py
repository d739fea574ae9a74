"""What a run says while it runs: a bar on a terminal, plain lines elsewhere, and TensorBoard's scalars."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmbconv.training.names import printable

PLAIN_SECONDS = 30.0


class Log:
    """Lines and a bar on the first process; silent on the others."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True, emoji=False)
        self._bar: Progress | None = None
        self._last = 0.0

    def say(self, line: str) -> None:
        lines = (printable(part, self.console.encoding) for part in line.split("\n"))
        self.console.print("\n".join(lines), markup=False)

    def epoch(self, title: str, steps: int, position: int, batch_size: int) -> None:
        """A new bar, or none without a terminal."""
        self.end()
        self._title, self._steps, self._batch_size = title, steps, batch_size
        self._first, self._start = position, time.perf_counter()
        self._last = self._start
        if self.speaks and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=steps, completed=position, told="")
            self._bar.start()

    def step(self, position: int, told: str) -> None:
        """Move the bar; without a terminal, write a line now and then."""
        if not self.speaks:
            return
        now = time.perf_counter()
        speed = self.images_per_second(position)
        told = f"{told}, {speed:.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=position, told=told)
        elif now - self._last >= PLAIN_SECONDS:
            self._last = now
            left = (self._steps - position) * self._batch_size / max(speed, 1e-9)
            self.say(f"{self._title} {position}/{self._steps} {told}, {duration(left)} left")

    def images_per_second(self, position: int) -> float:
        return (position - self._first) * self._batch_size / max(time.perf_counter() - self._start, 1e-9)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Scalars:
    """TensorBoard's event file, or nothing."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step or None)

    def add(self, step: int, **values: float) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name.replace("__", "/"), value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
