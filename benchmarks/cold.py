"""The cold start of a model's training step: its distinct kernels, and the seconds that their compilation takes.

    python -m benchmarks.cold [--model b0] [--batch 128] [--arch 90] [--threads 2] [--json cold.json]
    python -m benchmarks.cold --count       # how many, without compiling

Launches are written down instead of run and kernels compile for a GPU that need not be there, as a first call of a
fused block does it (fastmbconv/ahead.py), with an empty cache. CPU seconds are this machine's, and include waiting for
other processes where several share a core.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    raise SystemExit("benchmarks.cold compiles kernels: start it without TRITON_INTERPRET")

import torch
import triton
from triton.backends.compiler import GPUTarget

import fastmbconv
from benchmarks import registry
from benchmarks.launches import caught
from benchmarks.static import Specialised
from fastmbconv import ahead
from fastmbconv.kernels.launching import Written

STAGES = ("code", "ttir", "ttgir", "llir", "ptx", "cubin")


class NoGPU:
    """What Triton asks a driver before it compiles, for a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def distinct(model: str, batch: int, dtype: torch.dtype, arch: int) -> dict[str, Written]:
    """The launches of one training step that differ for the compiler, by their specialisation."""
    found: dict[str, Written] = {}
    with caught(lambda *launch: None), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        for shape in registry.shapes(model, batch):
            block = shape.block().describe()
            x = torch.empty(batch, shape.in_channels, shape.size, shape.size, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            for one in ahead.model_launches(x, block, "fast", "train"):
                found.setdefault(Specialised.of(shape.name, one.function, (1,), one.arguments, arch).key, one)
    return found


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def compiled(launches: list[Written], threads: int, arch: int) -> dict[str, Any]:
    """Compile them through fastmbconv.ahead with an empty cache: seconds in all, and by kernel and stage."""
    rows: list[dict[str, Any]] = []

    def note(src: Any, times: Any, **_: Any) -> None:
        stages = {"code": times.ir_initialization, **dict(times.lowering_stages)}
        rows.append({"kernel": src.name, **{stage: stages.get(stage, 0) / 1e6 for stage in STAGES}})

    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir, triton.knobs.compilation.listener = cache, note
        with mock.patch.object(triton.runtime.driver, "_active", NoGPU(arch)):
            began, before = time.perf_counter(), cpu_seconds()
            for one in ahead.submit(launches, threads):
                one.result()
            wall, used = time.perf_counter() - began, cpu_seconds() - before
    longest = max(rows, key=lambda row: sum(row[stage] for stage in STAGES))
    return {"wall": wall, "cpu": used, "rows": rows, "longest": longest}


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds by kernel and stage, the costliest last."""
    total: dict[str, Counter[str]] = {}
    for row in rows:
        for name in (row["kernel"], "all"):
            total.setdefault(name, Counter()).update({"n": 1} | {stage: row[stage] for stage in STAGES})
    lines = [f"{'kernel':28} {'n':>4} " + " ".join(f"{stage:>7}" for stage in STAGES)]
    for name, sums in sorted(total.items(), key=lambda item: sum(item[1][stage] for stage in STAGES)):
        lines.append(f"{name:28} {sums['n']:4} " + " ".join(f"{sums[stage]:7.2f}" for stage in STAGES))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="count and compile the kernels of one training step")
    parser.add_argument("--model", default="b0", help="b0 to b8, lite0 to lite4")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for Hopper")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--count", action="store_true", help="don't compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    args = parser.parse_args()
    launches = distinct(args.model, args.batch, getattr(torch, args.dtype), args.arch)
    names = Counter(one.function.__name__ for one in launches.values())
    result: dict[str, Any] = {"model": args.model, "batch": args.batch, "kernels": len(launches), "by_kernel": names}
    print(f"{args.model}, batch {args.batch}: {len(launches)} distinct kernels in a training step")
    if not args.count:
        result |= compiled(list(launches.values()), args.threads, args.arch)
        print(table(result["rows"]))
        longest = sum(result["longest"][stage] for stage in STAGES)
        print(
            f"{result['wall']:.1f} s with {args.threads} threads, {result['cpu']:.1f} s of CPU; "
            f"the longest, {result['longest']['kernel']}, took {longest:.1f} s (Triton {triton.__version__})"
        )
    if args.json:
        head = {"triton": triton.__version__, "torch": torch.__version__, "fastmbconv": fastmbconv.__version__}
        args.json.write_text(json.dumps(head | result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
