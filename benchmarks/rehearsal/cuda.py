"""torch.cuda for a GPU that is not there: its device, events, streams and graphs stand for the driver's (libcuda.c).

For a process of its own, nothing takes it back. What its tensors are, gpu.py says (fake ones) or operators.cpp (real
ones, whose operators compute nothing).
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

NAME = "rehearsal, no GPU"
FAULTS = {"lost": 1, "hang": 2, "kill": 3}
LOST = "CUDA error: an illegal memory access was encountered"
OWN = {name: getattr(torch.cuda, name) for name in ("current_device", "device", "device_of")}


class Device:
    """The driver's side: its clock, what was launched, and the fault that it is told."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, kind in (("now", ctypes.c_double), ("idle_at", ctypes.c_double), ("launch_us", ctypes.c_double)):
            getattr(self.library, f"fake_{name}").restype = kind
        self.library.fake_launches.restype = ctypes.c_long
        self.library.fake_name.restype = ctypes.c_char_p

    def set_launch_us(self, us: float) -> None:
        self.library.fake_set_launch_us(ctypes.c_double(us))

    def set_fault(self, kernel: str, kind: str) -> None:
        """At its next launch this kernel loses the device, makes it hang, or kills the process."""
        self.library.fake_set_fault(kernel.encode(), FAULTS[kind])

    def queue(self, us: float) -> None:
        self.library.fake_queue(ctypes.c_double(us))

    def idle_at(self) -> float:
        """When it will have done what is queued, in seconds."""
        return float(self.library.fake_idle_at())

    def launches(self) -> int:
        return int(self.library.fake_launches())

    def name(self, index: int) -> str:
        return self.library.fake_name(ctypes.c_long(index)).decode()

    def check(self) -> None:
        if self.library.fake_is_lost():
            raise torch.AcceleratorError(LOST) if hasattr(torch, "AcceleratorError") else RuntimeError(LOST)

    def synchronize(self, *_: Any) -> None:
        """Wait until it is idle."""
        while self.library.fake_is_hung():
            time.sleep(1.0)
        time.sleep(max(0.0, self.idle_at() - float(self.library.fake_now())))
        self.check()


class Event:
    """A place in the device's queue."""

    device: Device

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.device.check()
        self.at = self.device.idle_at()

    def synchronize(self) -> None:
        self.device.synchronize()

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class Stream:
    """The device's one queue."""

    device: Device
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        self.device.synchronize()


class Entered:
    """What chooses a device or a stream inside a `with` block, where there is one of each."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class Generator(torch.Generator):
    """Numbers that nobody sees: one for the device is none at all."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type == "cpu":
            return torch._C.Generator(device)
        return SimpleNamespace(manual_seed=lambda seed: None)


class Graph:
    """A capture notes how long its kernels take; a replay takes that long."""

    device: Device

    def __init__(self, *_: Any, **__: Any) -> None:
        self.us = 0.0

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        self.device.synchronize()
        began = self.device.idle_at()
        yield
        self.us = 1e6 * max(0.0, self.device.idle_at() - began)

    def replay(self) -> None:
        self.device.check()
        self.device.queue(self.us)

    def reset(self) -> None:
        pass


def install(device: Device) -> None:
    """torch.cuda's functions answer for the device, and ask nothing below them."""
    properties = SimpleNamespace(
        name=NAME, total_memory=80 << 30, L2_cache_size=50 << 20, multi_processor_count=132, major=9, minor=0
    )
    for kind in (Event, Stream, Graph):
        kind.device = device
    always: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "is_current_stream_capturing": False,
        "device_count": 1, "current_device": 0, "get_device_capability": (9, 0), "get_device_properties": properties,
        "get_device_name": NAME, "current_stream": Stream(), "default_stream": Stream(),
        "memory_allocated": 1 << 20, "max_memory_allocated": 2 << 20, "memory_reserved": 2 << 20,
        "mem_get_info": (80 << 30, 80 << 30), "reset_peak_memory_stats": None, "empty_cache": None, "_lazy_init": None,
        "_lazy_call": None, "set_device": None, "graph_pool_handle": (0, 0), "manual_seed_all": None,
    }  # fmt: skip
    for name, value in always.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.synchronize = device.synchronize
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.CUDAGraph = Event, Stream, Graph
    torch.cuda._sleep = lambda cycles: device.queue(cycles / 2e3)
    torch.cuda.graph = lambda graph, *args, **kwargs: graph.capture()
    for name in ("device", "device_of", "stream"):
        setattr(torch.cuda, name, Entered)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.version.cuda = "13.0"  # libraries read a number off it
    torch.backends.cudnn.version = lambda: None
    torch.Generator = Generator
    torch.compile = lambda run=None, **kwargs: run  # inductor would ask the device for more than it knows


def pass_through() -> None:
    """What each launch asks of torch.cuda is torch's own again, Python and all; only what lies below it is ours."""
    torch.cuda._initialized = True
    torch._C._cuda_getDevice = lambda: 0
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda index: 0
    for name, function in OWN.items():
        setattr(torch.cuda, name, function)
