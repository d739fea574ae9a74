"""What a block's calls cost the host, ours beside eager's, on a machine without a GPU.

    python -m benchmarks.host [--json host.jsonl] [--calls 200]

Microseconds of one thread's CPU time, the least of `--calls` calls after a warm-up; fused and eager calls take turns.
The device is not there (benchmarks/rehearsal/): PyTorch's operators only make their results (operators.cpp), kernels
compile for sm_90, and Triton's own launcher calls a driver whose launches do nothing. So eager costs its Python, the
dispatcher, autograd and its allocations, and nothing of what a GPU's operators add to them on the host (their
iterators, cuDNN's plans, the driver): no baseline is more favourable to it. Ours costs the same kinds, and Triton's
launcher. The backward runs in the calling thread, and entering autocast is not counted.

`--json` writes one object a line: a row each, and on the last line the figures that are watched, of a block under
bfloat16 autocast: training_ratio (ours over eager's), training_us, inference_us, launch_us; and training_ratio_cpu, in
fp32: ours over eager's on CPU tensors, two images of one pixel, whose operators do all their work on the host but for
the sums. A GPU's eager should lie between these two. Exit status: 2 where the device can't be built, which is without
gcc or g++, or under a PyTorch with CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.cache import ROOT
from benchmarks.rehearsal import preload

LIBRARIES = ROOT / ".deps" / "rehearsal"
COLUMNS = {
    "us": ".0f",
    "forward_us": ".0f",
    "eager_us": ".0f",
    "eager_forward_us": ".0f",
    "ratio": ".2f",
    "launches": "d",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows under each other; `us` is ours, and a ratio is ours over eager's."""
    wide = max(len(row["what"]) for row in rows)
    lines = [" " * wide + "".join(f"  {name:>{max(5, len(name))}}" for name in COLUMNS)]
    for row in rows:
        cells = (f"  {row[name]:>{max(5, len(name))}{form}}" for name, form in COLUMNS.items())
        lines.append(f"{row['what']:{wide}}" + "".join(cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="what a block costs the host, fused and eager, without a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write each row as a line of JSON")
    parser.add_argument("--calls", type=int, default=200, help="calls of which the fastest counts (default: 200)")
    parser.add_argument("--libraries", type=Path, default=LIBRARIES, metavar="DIR", help="where the device is built")
    args = parser.parse_args()
    try:
        library = preload.load(args.libraries, operators=True)
    except RuntimeError as error:
        print(f"benchmarks.host: {error}", file=sys.stderr)
        return 2
    from benchmarks import host_calls

    rows, watched = host_calls.measure(library, args.calls)
    print(table(rows))
    print("  ".join(f"{name} {value:.2f}" for name, value in watched.items()))
    if args.json is not None:
        args.json.write_text("".join(f"{json.dumps(line)}\n" for line in (*rows, watched)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
