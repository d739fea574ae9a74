"""`fastmbconv tune`: search this GPU for the fastest tile sizes of a model's kernels, and keep them for later runs.

Every distinct launch of a training step and of inference is repeated with other tiles, those that move most bytes
first; then each block is timed with memory="fast" and "lean". Each result is stored as it is found, so a search that
was interrupted, or ran out of its budget, goes on where it ended. fastmbconv itself never tunes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmbconv._version import __version__
from fastmbconv.cli import models
from fastmbconv.cli.check import DTYPES
from fastmbconv.cli.extras import CommandError, require

if TYPE_CHECKING:
    import torch

    from fastmbconv.block import Memory
    from fastmbconv.tuner import BlockCase, Found, Launch

LIMITS = {"batch": 1, "resolution": 32, "budget": 1}
PLANS_SHARE = 0.15  # of the budget, for timing the plans
PLAN_GAIN = 0.98  # the plan that saves more memory must not win by noise alone


def add_to(commands: Any) -> None:
    parser = commands.add_parser("tune", help="search this GPU for faster tile sizes", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
    parser.add_argument("--batch", type=int, metavar="N", default=128, help="images (default: %(default)s)")
    parser.add_argument("--resolution", type=int, metavar="R", help="pixels (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=900.0, metavar="SECONDS", help="default: %(default).0f")
    parser.add_argument(
        "--memory", choices=("fast", "lean", "both"), default="both", help="both: also find each block's faster plan"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the launches and what would be tried; no GPU")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: fastmbconv in the user's cache folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name, low in LIMITS.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise CommandError(f"--{name} is {value:g}: allowed are {low} and more")
    import torch

    from fastmbconv import dispatch

    if not dispatch.HAS_TRITON:
        raise CommandError("tuning needs Triton, which is not installed here")
    if not options.dry_run and (dispatch.interpreted() or not torch.cuda.is_available()):
        why = "TRITON_INTERPRET=1 is set" if dispatch.interpreted() else "torch sees none"
        raise CommandError(f"tuning needs a CUDA GPU, and {why}; --dry-run lists what would be tried")
    from fastmbconv import tuner
    from fastmbconv.kernels import tables

    with torch.device("meta"):
        model, side = models.load(options.model)
    side, dtype = options.resolution or side, getattr(torch, options.dtype)
    blocks = tuner.cases(model, (options.batch, 3, side, side))
    if not blocks:
        raise CommandError(f"MODEL is {options.model!r}: it has no MBConv block")
    plans: tuple[Memory, ...] = ("fast", "lean") if options.memory == "both" else (options.memory,)
    gpu = None if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    with nullcontext() if gpu is None else tables.compiled_for(tables.capability(gpu)):
        launches = tuner.launches(blocks, dtype, plans)  # on CPU tensors, with this GPU's formulas
    what = f"{options.model}, {options.batch} images of {side} px, {options.dtype}"
    print(f"{what}: {len(launches)} distinct launches of {len(blocks)} distinct blocks")
    if gpu is None:
        return list_candidates(launches)
    search = Search(gpu, dtype, options.cache, options.budget)
    return search.run(launches, blocks if options.memory == "both" else [])


def list_candidates(launches: list[Launch]) -> int:
    """Print each launch with the formula's tiles and the values that a search may try beside them."""
    from fastmbconv import tuner

    for launch in launches:
        question = launch.question
        print(f"\n{question.key}\n  {launch.count} a step, {launch.moved / 1e6:.1f} MB")
        for name in tuner.SPACE[question.kernel]:
            if name in question.default:
                larger, smaller = tuner.neighbours(question, question.default, name)
                tried = [*reversed(smaller), f"[{question.default[name]}]", *larger]
                print(f"  {name:<10} {' '.join(map(str, tried))}")
    return 0


class Search:
    """One run on a GPU: what the user's table holds already is left alone, each new result is written at once."""

    def __init__(self, device: torch.device, dtype: torch.dtype, folder: Path | None, budget: float) -> None:
        import torch

        from fastmbconv.kernels import tables

        self.device, self.dtype = device, dtype
        self.deadline = time.monotonic() + budget
        self.reserve = budget * PLANS_SHARE
        self.gpu = torch.cuda.get_device_name(device)
        self.path = tables.user_file(self.gpu, folder)
        check_writable(self.path.parent)
        self.table = tables.usable(self.path, (self.gpu,), own=True) or tables.Table(head(self.gpu))
        self.gained = self.spilling = 0

    def left(self) -> float:
        """Seconds until the plans' share of the budget begins."""
        return self.deadline - self.reserve - time.monotonic()

    def run(self, launches: list[Launch], blocks: list[BlockCase]) -> int:
        """Search, store, print; the exit code."""
        new = [launch for launch in launches if launch.question.key not in self.table.tiles]
        if len(new) < len(launches):
            print(f"{len(launches) - len(new)} are in {self.path} already")
        done = 0
        self.reserve = self.reserve if blocks else 0.0
        try:
            with progress(len(new)) as show:
                for launch in new:
                    if self.left() <= 0:
                        break
                    show(self.tune(launch))
                    done += 1
            with progress(len(blocks)) as show:
                for case in blocks:
                    if time.monotonic() < self.deadline:
                        show(self.choose_plan(case))
        except KeyboardInterrupt:
            print(f"interrupted: {self.summary(done, len(new))}", file=sys.stderr)
            return 130
        print(self.summary(done, len(new)))
        return 0

    def summary(self, done: int, of: int) -> str:
        rest = "" if done == of else f", {of - done} are left for another run"
        return (
            f"{done} launches searched{rest}; faster than the default: {self.gained}; "
            f"defaults that spill: {self.spilling}. {self.path}"
        )

    def tune(self, launch: Launch) -> str:
        """Search one bucket and store what was found; a line about it."""
        import torch

        from fastmbconv import tuner

        key = launch.question.key
        try:
            found = tuner.search(launch, launch.step(self.device), left=self.left)
        except torch.OutOfMemoryError:
            return f"{key}: left out, its tensors do not fit this GPU's free memory"
        if found.tiles is None:
            return f"{key}: nothing compiles without spills ({describe(found)})"
        self.gained += found.ms < found.default_ms
        self.spilling += found.default_ms == float("inf")
        self.table.tiles[key] = found.tiles
        self.store()
        was = "the default spills" if found.default_ms == float("inf") else f"default {found.default_ms:.3f} ms"
        return f"{key}: {found.ms:.3f} ms, {was} ({describe(found)})"

    def choose_plan(self, case: BlockCase) -> str:
        """Time a block in both plans and store the faster one; a line about it."""
        import torch

        from fastmbconv import tuner

        key = tuner.plan_key(case, self.dtype)
        if key is None or key in self.table.memory:
            return "a block whose plan is known"
        try:
            times = tuner.plan_ms(case, self.device, self.dtype, self.table)
        except torch.OutOfMemoryError:
            return f"{key}: left out, its tensors do not fit this GPU's free memory"
        self.table.memory[key] = "lean" if times["lean"] < PLAN_GAIN * times["fast"] else "fast"
        self.store()
        return f"{key}: fast {times['fast']:.3f} ms, lean {times['lean']:.3f} ms"

    def store(self) -> None:
        from fastmbconv.kernels import tables

        try:
            tables.write(self.path, self.table)
        except OSError as error:
            raise CommandError(f"the result can't be stored: {error}") from error
        tables.forget()


def describe(found: Found) -> str:
    """How many candidates were timed and rejected."""
    return ", ".join([f"{found.timed} timed", *(f"{count} {why}" for why, count in found.rejected.items())])


def head(gpu: str) -> dict[str, Any]:
    """What a table says of itself."""
    import torch
    import triton

    from fastmbconv.kernels import tables

    return {
        "format": tables.FORMAT,
        "source": "measured",
        "gpu": gpu,
        "triton": [".".join(triton.__version__.split(".")[:2])],
        "torch": torch.__version__,
        "fastmbconv": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def commit() -> str | None:
    """Of the checkout that this is, by FASTMBCONV_COMMIT or git; None for an installed package."""
    root = Path(__file__).parents[2]
    if "FASTMBCONV_COMMIT" in os.environ or not (root / ".git").exists():
        return os.environ.get("FASTMBCONV_COMMIT")
    try:
        done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def check_writable(folder: Path) -> None:
    """CommandError where no file can be put into this folder, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"--cache is {folder}: it can't be written ({error.strerror})") from error


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A function that takes a line about each finished item: a bar with the time left, or plain lines in a pipe."""
    if not sys.stdout.isatty():
        yield lambda line: print(line, flush=True)
        return
    bars = require("rich.progress", "cli")
    columns = (
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns) as bar:
        task = bar.add_task("", total=total)

        def show(line: str) -> None:
            bar.update(task, advance=1, description=line.partition(":")[0][:60])

        yield show
