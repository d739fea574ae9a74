"""Runs of `benchmarks.gpu` on the device that is not there: one is healthy, each of the others has a fault."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import cache, gpu
from benchmarks import recorder as records
from benchmarks.record import read
from benchmarks.recorder import ROOT
from benchmarks.rehearsal.child import SETTING
from benchmarks.timetable import Section, total_seconds

NAME = "rehearsal, no GPU"
LIBRARIES = ROOT / ".deps" / "rehearsal"
ALIASES = {"peers": "compile"}  # its rows are that section's, with more peers


@dataclass(frozen=True)
class Fault:
    """What goes wrong, in which section, at which item; and what the summary's first lines must then say."""

    name: str
    kind: str
    section: str
    what: str = ""
    says: tuple[str, ...] = ()


FAULTS = (
    Fault(
        "a section raises",
        "raise",
        "correctness",
        says=("correctness: correctness: RuntimeError: a fault of the section's own",),
    ),
    Fault(
        "a kernel hangs", "hang", "blocks", "b0.2 n128 112px", ("blocks: mbconv b0.2 n128 112px", "hung: no word for")
    ),
    Fault("a process is killed", "kill", "correctness", "mbconv b0.1", ("mbconv b0.1", "killed by SIGKILL")),
    Fault("a GPU is lost in the middle", "lost", "correctness", "mbconv b0.1", ("lost its GPU at mbconv b0.1",)),
    Fault("a GPU is gone", "gone", "correctness,blocks", says=("found no GPU",)),
    Fault("a full disk", "disk", "correctness", says=("could not be written: No space left on device",)),
    Fault("a cache that does not match", "cache", "", says=("the cache of kernels does not match",)),
)


@dataclass
class Rehearsal:
    """How the runs go: `out` gets a folder per run, `kernels` is the cache that they share."""

    out: Path
    kernels: Path
    libraries: Path = LIBRARIES
    facts: dict[str, Any] = field(default_factory=dict)
    program: list[str] = field(default_factory=lambda: [sys.executable, "-m", "benchmarks.rehearsal.child"])
    launch_us: float = 10.0

    def run(self, command: str, sections: Sequence[Section], fault: Fault | None = None) -> tuple[int, list[Any]]:
        """Exit status of one command, and the rows that are on disk."""
        out = self.out / (command if fault is None else fault.name.replace(" ", "-"))
        recorder = records.Recorder(out, records.head(command, total_seconds(sections), measured=False), NAME)
        commands = gpu.Commands("bfloat16", recorder.rows, self.facts)
        commands.program = self.program
        faults = [] if fault is None or fault.kind in ("disk", "cache") else [vars(fault)]
        setting = {"folder": str(self.libraries), "launch_us": self.launch_us, "faults": faults}
        disk = full_disk(recorder, fault.section) if fault is not None and fault.kind == "disk" else nullcontext()
        stale = stale_cache(self.kernels) if fault is not None and fault.kind == "cache" else nullcontext()
        with disk, stale:
            status = gpu.run(sections, recorder, commands, self.kernels, **{SETTING: json.dumps(setting)})
        return status, list(read(recorder.path).rows)


@contextmanager
def full_disk(recorder: records.Recorder, section: str) -> Iterator[None]:
    """From this section's first row to its end nothing fits on the disk: half a line does, and then no byte."""
    write = os.pwrite

    def pwrite(file: int, text: bytes, place: int) -> int:
        ended = any(row["section"] == "sections" and row["what"] == section for row in recorder.rows)
        if ended or not any(row["section"] == section for row in recorder.rows):
            return write(file, text, place)
        write(file, text[: len(text) // 2], place)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(os, "pwrite", pwrite):
        yield


@contextmanager
def stale_cache(place: Path) -> Iterator[None]:
    """A manifest that was written for another compiler."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / cache.MANIFEST
    before = path.read_text() if path.exists() else None
    manifest = cache.read(place) or {"root": str(place.resolve()), "kernels": 0, "hash": cache.hashes(90)}
    path.write_text(json.dumps(manifest | {"hash": manifest["hash"] | {"compiler": "0123456789abcdef"}}))
    try:
        yield
    finally:
        path.unlink()
        if before is not None:
            path.write_text(before)


def complaints(
    fault: Fault | None, status: int, rows: list[dict[str, Any]], text: str, sections: Sequence[Section]
) -> list[str]:
    """What a run should have said or kept, and did not; `rows` are those on disk."""
    hurt = [] if fault is None else fault.section.split(",")
    says = () if fault is None else fault.says
    wrong = [line for line in text.splitlines() if line.startswith("  WRONG  ")]
    found = [] if status == int(fault is not None) else [f"exit status {status}"]
    found += [f"the first lines don't say {words!r}" for words in says if not any(words in one for one in wrong)]
    if fault is None:
        found += wrong
    figures = {row["section"] for row in rows if "error" not in row}
    others = {section.name for section in sections if section.name not in hurt}
    missing = sorted(name for name in others if not figures & {name, ALIASES.get(name)})
    return found + [f"no row of {name}" for name in missing]
