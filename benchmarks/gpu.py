"""Everything that a GPU can answer, in two short commands; each section in a process of its own.

    python -m benchmarks.gpu [--cache DIR]            # the first: correctness, kernels, blocks, models (330 s)
    python -m benchmarks.gpu --second [--cache DIR]   # the second: tuning, peers, inference, memcheck (360 s)
    python -m benchmarks.gpu --plan [--second]        # the timetable, without running anything

It needs torch and triton, uses timm, pytest and pytest-xdist where they are, and installs nothing. Rows are on disk as
they come, in one file of JSON lines beside one log; nothing is written anywhere else. `python -m benchmarks.precompile`
fills DIR on a machine without a GPU. The summary is printed last. Exit status: 0 where nothing is wrong, 1 where the
summary's first lines say what, 2 where nothing was run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import cache
from benchmarks.recorder import RESULTS, ROOT, Recorder, gpu_name, head
from benchmarks.summary import summarise, wrong
from benchmarks.timetable import APART, DTYPES, FIRST, SECOND, SECTIONS, Section, plan, timetable, total_seconds
from benchmarks.watch import Watch


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="run what needs a GPU and leave a result file",
        epilog="exit status: 0 nothing is wrong, 1 the summary's first lines say what is wrong, 2 nothing was run",
    )
    made.add_argument("--plan", action="store_true", help="print the timetable: the last number is the run's seconds")
    made.add_argument("--second", action="store_true", help="the second command")
    only = f"only these, in this order; in neither command: {', '.join(section.name for section in APART)}"
    made.add_argument("--sections", nargs="+", choices=sorted(SECTIONS), metavar="NAME", help=only)
    made.add_argument("--minutes", type=float, help="stretch or shorten all of it (default: 5.5 and 6)")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file (default: %(default)s)")
    made.add_argument("--cache", type=Path, metavar="DIR", help="compiled kernels, brought along or to be kept")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="tf32: float32 whose products take TF32")
    made.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, kernels interpreted: no measurement")
    return made


def chosen_sections(args: argparse.Namespace) -> list[Section]:
    names = args.sections
    sections = [SECTIONS[name] for name in names] if names else SECOND if args.second else FIRST
    return timetable(sections, args.minutes)


def refuse(why: str) -> NoReturn:
    print(f"benchmarks.gpu: {why}", file=sys.stderr)
    raise SystemExit(2)


def check(args: argparse.Namespace) -> None:
    """Refuse what can't work, before anything is written."""
    if args.minutes is not None and args.minutes <= 0:
        refuse(f"expected --minutes above 0, got {args.minutes:g}")
    if args.cache is not None and args.cache.exists() and not args.cache.is_dir():
        refuse(f"expected a folder for --cache, got the file {args.cache}")
    if not (ROOT / "fastmbconv" / "kernels" / "math.py").exists():
        refuse("fastmbconv/kernels is missing; a copy dropped the link: ln -s ../kernels fastmbconv/kernels")
    if args.dry and args.out.resolve().is_relative_to(RESULTS):
        refuse(f"--dry measures nothing, so it does not write to {RESULTS}: choose another --out")


def gpu_is_there() -> bool:
    """Asked in another process: this one stays off the GPU, and so outlives it."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class Commands:
    """The children's command lines: what the rows so far have taught goes along."""

    def __init__(self, dtype: str, rows: list[dict[str, Any]], facts: dict[str, Any] | None = None) -> None:
        self.dtype, self.rows, self.facts = dtype, rows, dict(facts or {})
        self.program = [sys.executable, "-m", "benchmarks.section"]

    def __call__(self, name: str, avoid: list[str], finished: list[str], seconds: float) -> list[str]:
        learnt = {row["section"]: row for row in self.rows}
        if "copy_gb_s" in learnt.get("ceilings", {}):
            self.facts["copy_gb_s"] = learnt["ceilings"]["copy_gb_s"]
        options = ["--seconds", f"{seconds:.1f}", "--dtype", self.dtype, "--facts", json.dumps(self.facts)]
        return [*self.program, name, *options, "--avoid", *avoid, "--finished", *finished]


def environment(scratch: Path, place: Path | None) -> dict[str, str]:
    """Caches and temporary files in a folder that goes with the run; the kernels' in their own, if one was named."""
    given = place or cache.folder() or scratch / "triton"
    folders = {
        "TRITON_CACHE_DIR": given, "TORCHINDUCTOR_CACHE_DIR": scratch / "inductor", "TMPDIR": scratch,
        "HYPOTHESIS_STORAGE_DIRECTORY": scratch / "hypothesis",
    }  # fmt: skip
    switches = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "0"}
    return {name: str(Path(folder).absolute()) for name, folder in folders.items()} | switches


def run(sections: Sequence[Section], recorder: Recorder, commands: Commands, place: Path | None, **more: str) -> int:
    """All sections, then the summary; the exit status."""
    with contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="fastmbconv-gpu-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        log = stack.enter_context(open(recorder.path.with_suffix(".log"), "wb", buffering=0))
        if place is not None and place.exists():
            cache.settle(place)
        try:
            Watch(commands, recorder.add, log, environment(scratch, place) | more).run(sections)
        except KeyboardInterrupt:
            recorder.add("record", {"what": "run", "error": "interrupted before its end"})
    recorder.close()
    print(summarise(recorder.head, recorder.rows, str(recorder.path), recorder.problem), flush=True)
    return 1 if wrong(recorder.rows, recorder.problem) else 0


def main() -> int:
    args = parser().parse_args()
    sections = chosen_sections(args)
    if args.plan:
        print(plan(sections))
        return 0
    check(args)
    if args.dry:
        from benchmarks.dry import run_dry

        return run_dry(sections, args.out)
    gpu = gpu_name()
    if gpu is None and not gpu_is_there():
        refuse("no CUDA GPU here, and timings on a CPU would say nothing; make gpu-rehearsal runs it without one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this early gets the summary too
    name = "some" if args.sections else "second" if args.second else "first"
    try:
        recorder = Recorder(args.out, head(name, total_seconds(sections), measured=True), gpu or "unknown gpu")
    except OSError as error:
        refuse(f"no result file can be made in --out {args.out}: {error.strerror}")
    return run(
        sections, recorder, Commands(args.dtype, recorder.rows, {"results": str(args.out.absolute())}), args.cache
    )


if __name__ == "__main__":
    sys.exit(main())
