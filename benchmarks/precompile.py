"""Compile what `python -m benchmarks.gpu` launches, on a machine without a GPU, for one that can't wait.

    python -m benchmarks.precompile --cache DIR [--jobs 2] [--sections NAME ...] [--dtype bfloat16]

Both commands run on a device that is not there (benchmarks/rehearsal/), under the Triton that is installed, and what
they launch is compiled for compute capability 9.0 into DIR; then the compiler's other files are dropped. Bring DIR
along and name it to `benchmarks.gpu --cache`; where it lies there does not matter. It is of use only where the hashes
that are printed are the same: Python's version (3.12, say) and Triton's files are part of them. What is in DIR stays,
so a second run compiles what is new. Needs gcc and g++.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cache
from benchmarks.rehearsal.child import SETTING
from benchmarks.rehearsal.run import LIBRARIES
from benchmarks.timetable import DTYPES, FIRST, SECOND

ARCH = 90  # of the device that is not there
# The longest first, and those that share kernels apart: two that run side by side would both compile them.
ORDER = ("blocks", "tests", "inference", "memcheck", "models", "capture", "correctness", "profile", "compile", "peers",
         "ceilings", "variants")  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compile what benchmarks.gpu launches, without a GPU")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where the kernels go, and stay")
    names = sorted(section.name for section in (*FIRST, *SECOND))
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help="only for these")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="whose other tiles `variants` will try")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))), help="sections side by side")
    parser.add_argument("--shapes", type=int, metavar="N", help="only the first N blocks of each section (12: B0's)")
    parser.add_argument("--models", type=int, metavar="N", help="only the first N models (1: B0)")
    return parser.parse_args()


def compile_section(name: str, args: argparse.Namespace, log: Path) -> str:
    """Run one section on the device that is not there; a line that says what came of it."""
    facts: dict[str, Any] = {"once": True, "shapes": args.shapes, "models": args.models, "kernels": args.kernels}
    setting = {"folder": str(LIBRARIES), "launch_us": 0.0}
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(args.cache.absolute()), SETTING: json.dumps(setting),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(log.parent), "TORCHINDUCTOR_CACHE_DIR": str(log.parent),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.rehearsal.child", name, "--dtype", args.dtype]
    began = time.monotonic()
    with open(log, "w") as file:
        done = subprocess.run(
            [*command, "--facts", json.dumps(facts)], cwd=cache.ROOT, env=environment, stdout=file, stderr=file
        )
    messages = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    compiled, hits = (sum(m.get(key, 0) for m in messages) for key in ("compiled", "hits"))
    broken = [m["row"]["error"] for m in messages if "error" in m.get("row", {}) and name not in ("tests", "capture")]
    problem = f"; {len(broken)} errors, the first: {broken[0][:150]}" if broken else ""
    problem += "" if done.returncode == 0 else f"; exit status {done.returncode}: {log.read_text()[-500:]}"
    return f"{name:12} {compiled:4} compiled, {hits:4} were there, {time.monotonic() - began:5.0f} s{problem}"


def main() -> int:
    args = arguments()
    if args.cache.exists() and not args.cache.is_dir():
        print(f"benchmarks.precompile: expected a folder for --cache, got the file {args.cache}", file=sys.stderr)
        return 2
    args.cache.mkdir(parents=True, exist_ok=True)
    cache.settle(args.cache)
    print(f"Triton {version('triton')}, Python {sys.version.split()[0]}, compute capability {ARCH / 10}", flush=True)
    chosen = [name for name in ORDER if name in args.sections]
    failed = False
    with tempfile.TemporaryDirectory() as logs, ThreadPoolExecutor(max(1, args.jobs)) as pool:
        under_way = [pool.submit(compile_section, name, args, Path(logs) / name) for name in chosen]
        for one in under_way:
            text = one.result()
            failed = failed or "; " in text
            print(text, flush=True)
    manifest = cache.seal(args.cache, ARCH)
    print(f"{manifest['kernels']} kernels, {manifest['bytes'] / 1e6:.1f} MB in {args.cache}")
    print("must match there: " + ", ".join(f"{name} {value}" for name, value in manifest["hash"].items()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
