"""Times in milliseconds, taken in interleaved rounds: every candidate once per round, in rotating order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from fastmbconv.device_timer import DeviceTimer

Step = Callable[[], object]
LEAST_ROUNDS = 3  # however late it is: a median wants that many


def quantiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80, each a sample that was measured."""
    ordered = sorted(samples)
    return {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (20, 50, 80)}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_ms(step: Step) -> float:
    """Milliseconds until `step` returns to the host and the device is done."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def queue_ms(step: Step) -> float:
    """Milliseconds until the host has queued a step, whether or not the device is done."""
    synchronize()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    steps: Mapping[str, Step], rounds: int, *, isolate: bool = True, inner: int = 1, deadline: float = float("inf")
) -> dict[str, list[float]]:
    """Samples per candidate; the steps are warm already.

    `isolate` takes device time as `DeviceTimer` does; without it a sample is wall time per step over `inner` steps in
    a row, launch overhead included. Without a GPU both are wall time.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    timer = DeviceTimer() if isolate and torch.cuda.is_available() else None
    head_start = {name: 1.5 * queue_ms(step) + 0.2 for name, step in steps.items()} if timer else {}
    for round_ in range(rounds):
        if round_ >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            step = steps[name]
            if timer:
                samples[name].append(timer(step, head_start[name]))
            else:
                samples[name].append(host_ms(lambda step=step: [step() for _ in range(inner)]) / inner)
    return samples


def peak_bytes(step: Step) -> int | None:
    """Bytes of device memory that a step holds at most, beyond what was allocated before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
