"""The calls that benchmarks.host times, and their clock; imported once the device that is not there is in its place."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastmbconv
from benchmarks.rehearsal import cuda
from fastmbconv import ahead, functional, ops
from fastmbconv.mbconv import MBConv

CHANNELS, SIDE, BATCH = 16, 8, 16  # images so small that a GPU would wait for the host
WARM_UP, RUN = 5, 4
OPERATORS_A_SAMPLE = 5
LAUNCHES = 4  # of a block without gradients
AUTOCAST, WIDE = "bf16 autocast", "fp32"

Sample = tuple[int, int]  # nanoseconds: of the forward, of the backward
Call = Callable[[], Sample]
clock = time.thread_time_ns


class Calls:
    """One block's calls on its own input; entering autocast and a mode is the model's, and is not timed."""

    def __init__(
        self,
        module: nn.Module,
        batch: int,
        dtype: str,
        mode: Callable[[], Any] = torch.enable_grad,
        device: str = "cuda",
        side: int = SIDE,
    ) -> None:
        self.module, self.narrow, self.mode, self.device = module, dtype == AUTOCAST, mode, device
        with mode():
            self.x = image(batch, CHANNELS, torch.float32, device, side)
            self.dy = torch.ones_like(self._forward()[0])

    def train(self) -> Sample:
        for tensor in (self.x.requires_grad_(), *self.module.parameters()):
            tensor.grad = None
        y, forward = self._forward()
        with torch.autograd.set_multithreading_enabled(False):  # a device's backward has a thread of its own
            began = clock()
            y.backward(self.dy)
            del y
            return forward, clock() - began

    def infer(self) -> Sample:
        with self.mode():
            return self._forward()[1], 0

    def _forward(self) -> tuple[Tensor, int]:
        """The block's output, and the nanoseconds that it took."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.narrow):
            began = clock()
            y = self.module(self.x)
            return y, clock() - began


def image(batch: int, channels: int, dtype: torch.dtype, device: str = "cuda", side: int = SIDE) -> Tensor:
    x = torch.empty(batch, channels, side, side, dtype=dtype, device=device, memory_format=torch.channels_last)
    return x.fill_(1.0) if device == "cpu" else x


def blocks(training: bool, drop_path: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The same block fused and eager."""
    both = [MBConv(CHANNELS, CHANNELS, drop_path=drop_path).to("cuda").train(training) for _ in range(2)]
    return both[0], fastmbconv.unfuse(both[1])


def make_cpu_call() -> Call:
    """Eager's training on CPU tensors of two images of one pixel: all of its operators' work, and hardly a sum."""
    module = fastmbconv.unfuse(MBConv(CHANNELS, CHANNELS)).train()
    return Calls(module, 2, WIDE, device="cpu", side=1).train


def cases() -> Iterator[tuple[str, Call, Call]]:
    """Each row's name, fused call and eager call."""
    for dtype, drop_path in ((AUTOCAST, 0.0), (AUTOCAST, 0.2), (WIDE, 0.0)):
        fused, eager = (Calls(module, BATCH, dtype) for module in blocks(True, drop_path))
        yield f"training, {dtype}" + (f", drop_path {drop_path:g}" if drop_path else ""), fused.train, eager.train
    for dtype in (AUTOCAST, WIDE):
        for mode in (torch.no_grad, torch.inference_mode):
            fused, eager = (Calls(module, 1, dtype, mode) for module in blocks(False))
            yield f"inference, {dtype}, {mode.__name__}", fused.infer, eager.infer


def fastest(calls: list[Call], count: int) -> list[Sample]:
    """Each call's sample that took least, of `count`.

    The calls take turns, so that a busy second is everyone's, of RUN calls each: a model's block follows its like, and
    what another call leaves in the processor's caches makes the first one slower.
    """
    for call in calls * WARM_UP:
        call()
    while any(thread.name.startswith(ahead.THREADS) for thread in threading.enumerate()):
        time.sleep(0.1)
    with no_collections():
        turns = [[min((call() for _ in range(RUN)), key=sum) for call in calls] for _ in range(-(-count // RUN))]
    return [min(taken, key=sum) for taken in zip(*turns, strict=True)]


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Without Python's collector of cycles, whose time no single call owes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def row(what: str, fused: Sample, eager: Sample, launches: int) -> dict[str, Any]:
    return {
        "what": what, "us": sum(fused) / 1e3, "forward_us": fused[0] / 1e3, "eager_us": sum(eager) / 1e3,
        "eager_forward_us": eager[0] / 1e3, "ratio": sum(fused) / sum(eager), "launches": launches,
    }  # fmt: skip


def launches_of(device: cuda.Device, call: Call) -> int:
    before = device.launches()
    call()
    return device.launches() - before


def make_launches() -> Call:
    """An inference block's operator by its plan, allocations included, some times over."""
    x, (module, _) = image(1, CHANNELS, torch.bfloat16), blocks(False)
    block = module.bfloat16().describe()
    weights, statistics, settings, signature = functional.prepare_mbconv(x, block, "fast", x.dtype).call

    def infer() -> Sample:
        with torch.no_grad():
            began = clock()
            for _ in range(OPERATORS_A_SAMPLE):
                ops.infer(settings, x, None, weights, statistics, signature)
            return clock() - began, 0

    return infer


def measure(library: ctypes.CDLL, count: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the table, and the figures that are watched."""
    device = cuda.Device(library)
    cuda.install(device)
    cuda.pass_through()
    torch.set_num_threads(1)
    names, fused, eager = zip(*cases(), strict=True)
    pairs = [call for pair in zip(fused, eager, strict=True) for call in pair]
    *samples, on_cpu, launched = fastest([*pairs, make_cpu_call(), make_launches()], count)
    launches = [launches_of(device, call) for call in fused]
    rows = [row(*of) for of in zip(names, samples[::2], samples[1::2], launches, strict=True)]
    training, inference = rows[0], next(one for one in rows if one["what"].startswith("inference"))
    wide = next(one for one in rows if one["what"] == f"training, {WIDE}")
    return rows, {
        "training_ratio": training["ratio"],
        "training_ratio_cpu": wide["us"] / (sum(on_cpu) / 1e3),
        "training_us": training["us"],
        "inference_us": inference["us"],
        "launch_us": sum(launched) / OPERATORS_A_SAMPLE / LAUNCHES / 1e3,
    }
