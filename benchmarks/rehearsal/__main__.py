"""`python -m benchmarks.rehearsal`: both commands of benchmarks.gpu to their end, on a machine without a GPU.

    python -m benchmarks.rehearsal [--quick] [--out DIR] [--cache DIR] [--only healthy "a full disk" ...]

First as they are, then with a fault each: a section that raises, a kernel that hangs, a process that is killed, a GPU
that is lost in the middle or gone for good, a full disk, a cache that does not match. Kernels compile for sm_90, the
host takes every path that it takes on a GPU, and nothing is computed: no figure here is a measurement. `--quick` takes
the first two blocks of each section. Exit status: 0 where every run kept what it should and said what was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.rehearsal.run import FAULTS, Fault, Rehearsal, complaints
from benchmarks.timetable import FIRST, SECOND, Section

SLOWER = 40.0  # a machine that compiles on 2 cores, and has no GPU to wait for
QUICK = {"once": True, "shapes": 2, "models": 1}
HANG_SECONDS = 60.0  # without a word from a child: a walk compiles for half a minute
FAULTY = ("ceilings", "correctness", "blocks")  # the sections of the runs with a fault


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self, behind: io.TextIOBase) -> None:
        super().__init__()
        self.behind = behind

    def write(self, text: str) -> int:
        self.behind.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.behind.flush()


def rehearse(rehearsal: Rehearsal, command: str, sections: list[Section], fault: Fault | None) -> list[str]:
    """Run it and hold it against what it should say; what is missing."""
    printed = Tee(sys.stdout)
    with contextlib.redirect_stdout(printed):
        status, rows = rehearsal.run(command, sections, fault)
    return complaints(fault, status, rows, printed.getvalue(), sections)


def main() -> int:
    parser = argparse.ArgumentParser(description="run both commands of benchmarks.gpu without a GPU, and with faults")
    parser.add_argument("--quick", action="store_true", help="the first two blocks of each section")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: a temporary one)")
    parser.add_argument("--cache", type=Path, help="folder of the kernels (default: a temporary one)")
    names = ["healthy", *(fault.name for fault in FAULTS)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="RUN", help=", ".join(names))
    args = parser.parse_args()
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        rehearsal = Rehearsal(args.out or Path(scratch), args.cache or Path(scratch, "kernels"))
        if args.quick:
            rehearsal.facts = QUICK
        began = time.monotonic()
        if "healthy" in args.only:
            for command, sections in (("first", FIRST), ("second", SECOND)):
                slow = [replace(one, seconds=SLOWER * one.seconds, item_seconds=600.0) for one in sections]
                found[f"{command} command"] = rehearse(rehearsal, command, slow, None)
        rehearsal.facts = QUICK
        for fault in (fault for fault in FAULTS if fault.name in args.only):
            slow = [replace(one, seconds=600.0, item_seconds=HANG_SECONDS) for one in FIRST if one.name in FAULTY]
            found[fault.name] = rehearse(rehearsal, "first", slow, fault)
    print(f"\n== {time.monotonic() - began:.0f} s")
    for name, missing in found.items():
        print(f"{name:28} {'; '.join(missing) or 'as it should'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
