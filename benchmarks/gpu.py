"""Everything that needs a GPU, in one go: tests, memcheck, ceilings, and comparisons of blocks, models and ops.

    python -m benchmarks.gpu [--minutes 9] [--out benchmarks/results] [--sections blocks models] [--dtype bfloat16]
    python -m benchmarks.gpu --dry          # the same steps at tiny sizes on a CPU: nothing it prints is a measurement

It needs torch and triton, uses timm and pytest where they are, and installs nothing. Rows are on disk as they come.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = (
    "tests", "memcheck", "ceilings", "start", "kernels",
    "blocks", "models", "ops", "inference", "training", "compiled",
)  # fmt: skip
GRACE = 10.0  # seconds kept for the summary; whatever still compiles then is given up


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="run everything that needs a GPU and leave a result file")
    parser.add_argument("--minutes", type=float, default=9.0, help="all of it ends within this time (default: 9)")
    parser.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these steps")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, kernels interpreted: no measurement")
    return parser.parse_args()


def refuse(why: str) -> None:
    raise SystemExit(f"benchmarks.gpu: {why}")


def prepare(args: argparse.Namespace) -> Path:
    """Check the surroundings before Triton is imported; the folder for results."""
    if not (ROOT / "fastmbconv" / "kernels" / "math.py").exists():
        refuse("fastmbconv/kernels is missing; a copy dropped the link: ln -s ../kernels fastmbconv/kernels")
    results = ROOT / "benchmarks" / "results"
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        out = args.out or Path(tempfile.mkdtemp(prefix="fastmbconv-dry-"))
        if out.resolve().is_relative_to(results):
            refuse(f"--dry measures nothing, so it does not write to {results}: choose another --out")
        return out
    import torch

    if not torch.cuda.is_available():
        refuse("no CUDA GPU here, and timings on a CPU would say nothing; --dry runs the steps at tiny sizes")
    os.environ.pop("TRITON_INTERPRET", None)
    torch.backends.cudnn.benchmark = True
    return args.out or results


def main() -> int:
    args = arguments()
    out = prepare(args)
    import torch

    from benchmarks import steps
    from benchmarks.session import Session, summary

    session = Session(out, args.minutes * 60 - 2 * GRACE, args.dry)

    def give_up() -> None:
        session.head["cut_short"] = True
        session.write()
        print(summary(session), flush=True)
        os._exit(3)

    watchdog = threading.Timer(session.left() + GRACE, give_up)  # a compiler can't be interrupted from Python
    watchdog.daemon = True
    watchdog.start()
    steps.run(session, [s for s in SECTIONS if s in args.sections], getattr(torch, args.dtype))
    watchdog.cancel()
    print(summary(session))
    return 1 if any("error" in row for row in session.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
