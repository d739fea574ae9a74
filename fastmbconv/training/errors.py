"""What stops a run."""

from __future__ import annotations


class TrainingError(Exception):
    """A run can't start or go on; the message says why and what to do."""


class Interrupted(Exception):
    """A signal asked the run to stop, on all processes at the same step."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
