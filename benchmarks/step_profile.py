"""Each kernel of one training step with its time, its bytes and its share of the copy's speed; the host's time."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastmbconv
from benchmarks import timing
from benchmarks.comparison import Candidate, Comparison, Plan
from benchmarks.subjects import Subject
from benchmarks.traffic import moved
from fastmbconv.kernels.traffic import Launch, recorded
from fastmbconv.mbconv import MBConv

WARM_STEPS = 3


def device_kernels(step: Callable[[], object]) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels that a step runs on the GPU, in their order there."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        timing.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    return [(event.name, float(event.time_range.elapsed_us())) for event in kernels]


def profile(subject: Subject, plan: Plan) -> list[dict[str, Any]]:
    """A row per launch of ours, matched in order with what its launcher states, and one for the whole step.

    `floor_us` are the bytes at the copy's speed. What is PyTorch's (stem, head, optimiser, sums) is one row.
    """
    with fastmbconv.backend("triton"):
        compared = Comparison(subject, "fwd_bwd", plan)
        made: Candidate = compared.candidate(torch.channels_last, lambda module: module)
        compared.train(made)
        for _ in range(1 if plan.interpreted else WARM_STEPS):
            made.step()
        timing.synchronize()
        with recorded() as stated:
            if plan.interpreted:
                made.step()
                return [{"what": "step", "launches": len(stated)}]
            kernels = device_kernels(made.step)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel on the GPU")
    return match(kernels, stated, plan.bandwidth)


def match(kernels: list[tuple[str, float]], stated: list[Launch], bandwidth: float | None) -> list[dict[str, Any]]:
    """Kernels by name and order beside the statements of that name; what has no statement is PyTorch's."""
    waiting: dict[str, deque[Launch]] = defaultdict(deque)
    for launch in stated:
        waiting[f"_{launch.kernel}_kernel"].append(launch)
    rows: list[dict[str, Any]] = []
    others, unmatched = 0.0, 0
    for order, (name, us) in enumerate(kernels):
        if not waiting.get(name):
            others, unmatched = others + us, unmatched + (name in waiting)
            continue
        launch = waiting[name].popleft()
        size = moved(launch)
        row: dict[str, Any] = {"what": launch.kernel, "block": largest(launch), "order": order, "us": us, "bytes": size}
        if us > 0:
            row["gb_s"] = size / us / 1e3
        if bandwidth:
            row |= {"floor_us": 1e6 * size / bandwidth, "share": 1e6 * size / bandwidth / us if us > 0 else None}
        rows.append(row)
    missing = sum(len(queue) for name, queue in waiting.items() if name != "_sum_kernel")
    ours = sum(row["us"] for row in rows)
    total = {"what": "step", "launches": len(rows), "kernels_us": ours, "others_us": others}
    return [*rows, total | {"unmatched": unmatched + missing}]


def largest(launch: Launch) -> str:
    """The size of the largest tensor that a launch moves, which says whose it is."""
    tensor = max((*launch.reads, *launch.writes), key=lambda one: one.size)
    return "x".join(map(str, tensor.shape))


def host_microseconds(device: torch.device, rounds: int) -> dict[str, float]:
    """Median time that the host takes to enqueue a block's forward and backward, fused and eager in turn, in us."""
    real = device.type == "cuda"
    blocks = {name: MBConv(16, 16).to(device, memory_format=torch.channels_last) for name in ("fused", "eager")}
    fastmbconv.unfuse(blocks["eager"])
    x = torch.randn(16 if real else 2, 16, 8, 8, device=device).to(memory_format=torch.channels_last).requires_grad_()

    def enqueue(block: nn.Module) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=real):
            y: Tensor = block(x)
        y.backward(torch.ones_like(y))

    samples: dict[str, list[float]] = {name: [] for name in blocks}
    for number in range(3 + rounds):
        for name, block in blocks.items():
            timing.synchronize()
            began = time.perf_counter()
            enqueue(block)
            if number >= 3:
                samples[name].append(1e6 * (time.perf_counter() - began))
    timing.synchronize()
    fused, eager = (statistics.median(values) for values in samples.values())
    return {"host_us_per_block": fused, "host_us_per_eager_block": eager}
