"""`python -m benchmarks.gpu --dry`: the sections at tiny sizes on a CPU, kernels interpreted, in this one process.

What it adds to a rehearsal are values: parity is judged, bits are compared. No figure is a measurement.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recorder import Recorder, head
from benchmarks.summary import summarise, wrong
from benchmarks.timetable import Section

ELSEWHERE = ("tests", "capture", "memcheck", "start", "variants")  # pytest's own work, or nothing without a GPU


def run_dry(sections: Sequence[Section], out: Path) -> int:
    """All sections that mean something on a CPU; the exit status of `benchmarks.gpu`."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from benchmarks.section import Context, work

    recorder = Recorder(out, head("dry", 0.0, measured=False), "dry")
    for section in (one for one in sections if one.name not in ELSEWHERE):

        def say(message: dict, name: str = section.name) -> None:
            if "row" in message:
                recorder.add(message.get("section", name), message["row"])

        work(Context(section.name, float("inf"), "float32", facts={"shapes": 1}, say=say, dry=True))
    recorder.close()
    print(summarise(recorder.head, recorder.rows, str(recorder.path), recorder.problem))
    return 1 if wrong(recorder.rows, recorder.problem) else 0
