"""Device time of a step between two CUDA events: what the benchmarks and `fastmbconv tune` measure with."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of an H100 (50 MB) or H200 (60 MB)
CYCLES_PER_MS = 2_000_000  # at the highest clock; a slower one only waits longer
MOST_HEAD_START_MS = 30.0


class DeviceTimer:
    """Milliseconds that the device takes for a step, with a cold L2 and the host out of the way.

    Before a sample one buffer is overwritten, which throws the step's data out of the L2, and another one is read,
    which writes the first one's lines back: left dirty they would be written during the sample, up to 17 us of it. Then
    the device sleeps while the host queues the step, so launches are not counted; that favours whoever launches most.
    """

    def __init__(self) -> None:
        self._written = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self._read = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self._sum = torch.empty((), device="cuda")

    def flush(self) -> None:
        """Leave a cold L2 without a dirty line."""
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)

    def __call__(self, step: Callable[[], object], head_start_ms: float) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        torch.cuda._sleep(int(min(head_start_ms, MOST_HEAD_START_MS) * CYCLES_PER_MS))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
