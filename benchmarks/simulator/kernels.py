"""What a block launches, and the machine code of it: compiled once and kept, keyed by the kernel's source."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastmbconv
from benchmarks.launches import caught
from benchmarks.registry import Shape
from benchmarks.sass import dump
from benchmarks.simulator.assumed import Kind, count_repeats
from benchmarks.simulator.decode import Listing
from benchmarks.static import Specialised
from benchmarks.traffic import DTYPE, make_input, moved
from fastmbconv.block import Memory
from fastmbconv.kernels.traffic import Launch, recorded

ARCH = 90
PHASES = {"training": ("forward", "backward"), "inference": ("inference",)}
# Of one multiprocessor of sm_90.
REGISTERS, WARPS, PROGRAMS, SHARED, SHARED_RESERVED = 65536, 64, 32, 233472, 1024


@dataclass
class Work:
    """One launch of a block, `count` of which the model has.

    `special`: what to compile, None for a launch of torch's. `tensors`: bytes by argument, as often as the launcher
    says that they come from memory. `stated`: what it says that it moves.
    """

    shape: str
    count: int
    phase: str
    name: str
    stated: int
    launch: Launch | None = None
    special: Specialised | None = None
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)


@dataclass
class Compiled:
    """A kernel's machine code and what it asks of a multiprocessor; `stack` is in bytes of a thread."""

    name: str
    listing: str
    registers: int
    stack: int
    shared: int
    warps: int
    signature: dict[str, str]

    @cached_property
    def code(self) -> Listing:
        return Listing(self.listing)

    @property
    def resident(self) -> int:
        """Programs that one multiprocessor holds."""
        registers = ceil(self.registers * 32 / 256) * 256 * self.warps
        fitting = (PROGRAMS, WARPS // self.warps, REGISTERS // registers, SHARED // (self.shared + SHARED_RESERVED))
        return max(1, min(fitting))

    @property
    def shared_in_use(self) -> int:
        return self.resident * (self.shared + SHARED_RESERVED)

    @property
    def spilled(self) -> int:
        """Bytes of spilled registers of all programs that a multiprocessor holds."""
        return self.resident * self.warps * 32 * self.stack


def collect(shape: Shape, phases: tuple[str, ...], memory: Memory = "fast") -> list[Work]:
    """All launches of a block in these phases of `PHASES`, in order; nothing is computed."""
    with torch.device("meta"):
        module = shape.block()
    module.to_empty(device="cpu")
    fastmbconv.fuse(module, memory=memory)
    x = make_input(shape, "cpu")
    found: list[Work] = []

    def run(phase: str, step: Callable[[], Any]) -> Any:
        """What `step` launches, each launch with what its launcher states of it right after."""
        mine: list[tuple[int, Work]] = []
        kinds: dict[int, dict[str, Kind]] = {}

        def keep(kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
            special = Specialised.of(shape.name, kernel, grid, given, ARCH)
            tensors = {k: v.nbytes for k, v in given.items() if isinstance(v, torch.Tensor)}
            rest = (grid, special.arguments, tensors)
            one = Work(shape.name, shape.count, phase, kernel.__name__, 0, None, special, *rest)
            kinds[len(stated)] = {k: (tuple(given[k].shape), given[k].dtype) for k in tensors}
            mine.append((len(stated), one))

        with caught(keep), recorded() as stated:
            result = step()
        of_ours = dict(mine)
        for index, launch in enumerate(stated):
            work = of_ours.pop(index, None) or Work(shape.name, shape.count, phase, f"torch_{launch.kernel}", 0)
            work.launch, work.stated = launch, moved(launch)
            count_repeats(work.tensors, launch, kinds.get(index, {}))
            if phase in phases:
                found.append(work)
        # A launcher may start two kernels and state once: the first of them has no bytes of its own.
        found.extend(w for i, w in mine if w.launch is None and phase in phases)
        return result

    def forward() -> Any:
        with torch.autocast("cpu", DTYPE):
            return module(x)

    if "forward" in phases:
        y = run("forward", forward)
        if "backward" in phases:
            run("backward", lambda: y.backward(torch.empty_like(y)))
    if "inference" in phases:
        module.eval()
        with torch.no_grad():
            run("inference", forward)
    return found


def compile_special(special: Specialised) -> Compiled:
    """The kernel of a launch, from the store or from the compiler."""
    return compile_source(special.kernel, special.signature, special.constexprs, special.attrs, special.options)


def compile_source(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[tuple[int, ...], Any],
    attrs: dict[tuple[int, ...], Any],
    options: Any,
) -> Compiled:
    """Any Triton kernel; `options` is a backend's, or a dictionary."""
    options = options if isinstance(options, dict) else options.__dict__
    # `cache_key` is of the source, of what it calls as well: a kernel that has changed is another one.
    told = (kernel.__name__, kernel.cache_key, ARCH, signature, constexprs, attrs, options, triton.__version__)
    place = store() / "kernels" / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:32]}.json.gz"
    if not place.exists():
        source = ASTSource(kernel, signature, constexprs, attrs)
        made = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
        used, listing = dump(made.asm["cubin"])
        sizes = (used["REG"], used["STACK"], made.metadata.shared, made.metadata.num_warps)
        one = Compiled(kernel.__name__, listing, *sizes, signature)
        place.parent.mkdir(parents=True, exist_ok=True)
        whole = gzip.compress(json.dumps(asdict(one)).encode(), 1)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(whole)
        Path(file.name).replace(place)
    return _load(place)


@cache
def _load(place: Path) -> Compiled:
    return Compiled(**json.loads(gzip.decompress(place.read_bytes())))


def store() -> Path:
    """Where machine code and the compiled core are kept: $FASTMBCONV_SIMULATOR_CACHE, or the user's cache directory."""
    if chosen := os.environ.get("FASTMBCONV_SIMULATOR_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fastmbconv" / "simulator"
