"""One section in a child process, watched: what hangs, crashes or loses its GPU costs itself, and the next child goes
around it.

The child says over a pipe, in lines of JSON, what it begins, what it found, what it compiled, and that it is done
(benchmarks/section.py). Silence past a limit is a hang. This side never touches a GPU.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks.timetable import Section

LEAST_SECONDS = 4.0  # a child needs about as long to begin
FAREWELL_SECONDS = 2.0  # for a child's own ending after SIGTERM
MOST_CHILDREN = 6  # of one section
BETWEEN = " : "  # what an item is of, and its mode: a shape that ends a process does so for all its modes

# Of a section, what to go around, what is done and the seconds that are left: a child's command line.
Command = Callable[[str, list[str], list[str], float], list[str]]


@dataclass
class Child:
    """What became of one child: the items that it had begun and not finished, and those that it had finished."""

    status: str = "done"
    under_way: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    gone: bool = False  # it found no GPU to begin with
    hits: int = 0
    compiled: int = 0


@dataclass
class Watch:
    """Runs sections in order; `add(section, row)` gets each row as it comes."""

    command: Command
    add: Callable[[str, dict[str, Any]], None]
    log: IO[bytes]
    environment: dict[str, str]
    avoided: list[str] = field(default_factory=list)  # items that ended a child: no later child begins them
    lost: int = 0  # sections in a row whose children found no GPU

    def run(self, sections: Sequence[Section]) -> None:
        """Each section ends by its planned end, counted from now: time that one leaves is the next one's."""
        end = time.monotonic()
        for section in sections:
            end += section.seconds
            began = time.monotonic()
            if self.lost >= 2:
                self.add(section.name, {"what": section.name, "skipped": "two sections found no GPU: it is gone"})
                continue
            row = self._section(section, end)
            row |= {"what": section.name, "seconds": round(time.monotonic() - began, 1), "limit_s": section.seconds}
            self.add("sections", row)

    def _section(self, section: Section, end: float) -> dict[str, Any]:
        statuses: list[str] = []
        finished: list[str] = []
        hits, compiled, last = 0, 0, Child()
        for _ in range(MOST_CHILDREN):
            if end - time.monotonic() < LEAST_SECONDS:
                statuses.append("out of time")
                break
            last = self._child(section, finished, end)
            finished += last.finished
            hits, compiled = hits + last.hits, compiled + last.compiled
            statuses.append(last.status)
            if last.status in ("done", "out of time") or not last.under_way:
                break
            for item in last.under_way:
                what = item.partition(BETWEEN)[0]
                self.avoided.append(what)
                self.add(section.name, {"what": what, "error": last.status})
        self.lost = self.lost + 1 if last.gone else 0
        if statuses[-1] not in ("done", "out of time") and not last.under_way:
            self.add(section.name, {"what": section.name, "error": statuses[-1]})
        return {"status": "; then ".join(statuses), "cache_hits": hits, "compiled": compiled}

    def _child(self, section: Section, finished: list[str], end: float) -> Child:
        reading, writing = os.pipe()
        command = self.command(section.name, self.avoided, finished, end - time.monotonic())
        process = subprocess.Popen(
            [*command, "--pipe", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=os.environ | self.environment,
            pass_fds=[writing],
            start_new_session=True,  # its own group: what it started ends with it
        )
        os.close(writing)
        try:
            return self._listen(section, process, reading, end)
        finally:
            os.close(reading)
            _end(process)

    def _listen(self, section: Section, process: subprocess.Popen[bytes], pipe: int, end: float) -> Child:
        child, rest, heard, over = Child(), b"", time.monotonic(), False
        while True:
            now = time.monotonic()
            silent_until = heard + section.item_seconds
            if now >= end:
                child.status, child.under_way = "out of time", []
                return child
            if now >= silent_until:
                child.status = f"hung: no word for {section.item_seconds:.0f} s"
                return child
            ready, _, _ = select.select([pipe], [], [], min(0.5, end - now, silent_until - now))
            received = os.read(pipe, 1 << 16) if ready else b""
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                heard = time.monotonic()
                with suppress(ValueError):  # a line that a dying process cut off
                    over = self._take(section, child, json.loads(line)) or over
            if over or (not received and process.poll() is not None):
                break
        if not over:
            code = process.wait()
            child.status = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return child

    def _take(self, section: Section, child: Child, message: dict[str, Any]) -> bool:
        """Act on one message; True for the last one of a child."""
        if "begin" in message:
            child.under_way.append(message["begin"])
        elif "end" in message:
            child.finished.append(message["end"])
            with suppress(ValueError):
                child.under_way.remove(message["end"])
        elif "row" in message:
            self.add(message.get("section", section.name), message["row"])
        elif "compiled" in message:
            child.compiled += message["compiled"]
            child.hits += message["hits"]
        elif "lost" in message:
            child.status, child.gone = message["lost"], message["gone"]
            return True
        return "done" in message


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child and all that it started; one that even SIGKILL leaves (stuck in its driver) is left behind."""
    for number, seconds in ((signal.SIGTERM, FAREWELL_SECONDS), (signal.SIGKILL, FAREWELL_SECONDS)):
        with suppress(subprocess.TimeoutExpired):
            if process.poll() is None and number == signal.SIGTERM:
                process.wait(0.2)  # one that is done ends by itself
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
