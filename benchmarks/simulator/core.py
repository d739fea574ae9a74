"""core.c, compiled on demand into the store, and its structures."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.simulator.kernels import store

SOURCE = Path(__file__).with_name("core.c")
REASONS = ("issue", "memory", "short", "barrier", "async", "pipe", "select")
RATES = (
    "dram_rate", "l2_rate", "lsu_rate", "dram_latency", "dram_loaded", "l2_latency", "credit", "barrier", "start",
)  # fmt: skip
PIPES = 8


class NoCompiler(Exception):
    """Nothing here compiles C."""


class Stuck(RuntimeError):
    """All warps wait: the code was not understood."""


class Rates(ctypes.Structure):
    """Of one multiprocessor: bytes a cycle, and cycles."""

    _fields_ = [(name, ctypes.c_double) for name in RATES]


class Outcome(ctypes.Structure):
    """Sums over the multiprocessor's programs; `waits` by `REASONS`, of `warp_cycles`."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("cycles", "issued", "dram_bytes", "l2_bytes", "in_flight")),
        ("pipe", ctypes.c_double * PIPES),
        ("lsu", ctypes.c_double),
        ("waits", ctypes.c_double * len(REASONS)),
        ("warp_cycles", ctypes.c_double),
    ]


def run(
    rows: np.ndarray, traces: list[np.ndarray], roles: list[int], resident: int, warps: int, rates: Rates
) -> Outcome:
    """Programs that start in this order, `resident` at a time; each runs the instructions of its role's trace."""
    number = ctypes.POINTER(ctypes.c_int32)
    pointers = (number * len(traces))(*[t.ctypes.data_as(number) for t in traces])
    lengths = (ctypes.c_int64 * len(traces))(*[len(t) for t in traces])
    order, out = (ctypes.c_int32 * len(roles))(*roles), Outcome()
    code = rows.ctypes.data_as(ctypes.c_void_p)
    programs = (order, len(roles), resident, warps)
    if load_core().simulate(code, pointers, lengths, *programs, ctypes.byref(rates), ctypes.byref(out)):
        raise Stuck("all warps wait")
    return out


@cache
def load_core() -> ctypes.CDLL:
    """The compiled core, kept under its source's hash."""
    target = store() / f"core-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not target.exists():
        candidates = (os.environ.get("CC", "cc"), "gcc", "clang")
        compiler = next((c for c in candidates if shutil.which(c)), None)
        if compiler is None:
            raise NoCompiler("no C compiler (cc, gcc or clang): install one, or name it in $CC")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "core.so"
            command = [compiler, "-O2", "-shared", "-fPIC", "-o", made, SOURCE, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
                raise NoCompiler(f"{compiler} does not compile the simulator's core: {lines[-1]}")
            made.replace(target)
    return ctypes.CDLL(str(target))
