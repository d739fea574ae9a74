"""The child's side of `python -m benchmarks.gpu`: one section, said to the parent as it happens.

    python -m benchmarks.section NAME --seconds 60 [--avoid WHAT ...] [--dtype bfloat16] [--pipe FD]

Without a pipe its rows are printed. benchmarks/watch.py is the parent's side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.timetable import DTYPES
from benchmarks.watch import BETWEEN
from fastmbconv.ahead import THREADS

COMPILING_SECONDS = 3.0  # between two signs of life


class DeviceLost(Exception):
    """This process can't use its GPU any more: an access outside memory ends it for all later launches."""


class Context:
    """What a section's work gets: its time, what earlier sections learnt, and a way to say what it does."""

    def __init__(
        self,
        name: str,
        seconds: float,
        dtype: str = "bfloat16",
        avoid: Sequence[str] = (),
        finished: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        say: Callable[[dict[str, Any]], None] | None = None,
        dry: bool = False,
    ) -> None:
        self.name, self.dry, self.label = name, dry, dtype
        self.dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        self.device = torch.device("cpu" if dry else "cuda")
        self.deadline = time.monotonic() + seconds
        self.avoid, self.finished, self.facts = list(avoid), set(finished), dict(facts or {})
        self._say = say or say_over(os.dup(1))  # not stdout itself, which pytest takes away

    def left(self) -> float:
        """Seconds until this section's time is up."""
        return self.deadline - time.monotonic()

    def rounds(self, wanted: int) -> int:
        """How often to measure: once where nothing that runs is a measurement."""
        return 1 if self.dry or self.facts.get("once") else wanted

    def add(self, row: dict[str, Any], section: str | None = None) -> None:
        """A row for the results."""
        row = {key: value for key, value in row.items() if key != "samples"}
        self._say({"row": row} | ({} if section is None else {"section": section}))

    def begin(self, item: str) -> None:
        self._say({"begin": item})

    def end(self, item: str) -> None:
        self._say({"end": item})

    @contextmanager
    def item(self, what: str, row: Mapping[str, Any] | None = None) -> Iterator[bool]:
        """Around one piece of work, which an error ends, and no other one: False where it is not to be begun.

        Raises DeviceLost where the GPU is gone for this process.
        """
        names = {"what": what, **(row or {})}
        item = BETWEEN.join(map(str, names.values()))
        if item in self.finished:  # by a child before this one
            yield False
            return
        if what in self.avoid:
            self.add(names | {"skipped": "it ended a process before"})
            yield False
            return
        if self.left() <= 0:
            self.add(names | {"skipped": "its time is up"})
            yield False
            return
        self.begin(item)
        try:
            yield True
        except Exception as error:  # one item that fails must not lose the others
            self.check_device(what)
            self.add(names | {"error": f"{type(error).__name__}: {error}"[:400]})
        else:
            self.check_device(what)
        self.end(item)

    def check_device(self, what: str) -> None:
        """Raise DeviceLost where this process can't use its GPU any more."""
        if self.dry:
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"lost its GPU at {what}: {error}"[:300]) from error

    def finish(self) -> None:
        self._say({"done": True})

    def lose(self, status: str, gone: bool = False) -> None:
        """Say that the GPU is lost to this process (`gone`: it never had one), and end."""
        self._say({"lost": status[:300], "gone": gone})
        os._exit(1)

    def alive(self) -> None:
        """A sign of life."""
        self._say({"alive": True})

    def compiled(self, hit: bool) -> None:
        """Triton found a kernel in its cache, or compiled it."""
        self._say({"compiled": int(not hit), "hits": int(hit)})


def listen_to_compiler(context: Context) -> None:
    """Each kernel that Triton compiles is counted; while threads are at it, for half a minute maybe, this lives."""
    import triton

    def heard(*args: Any, cache_hit: bool = False, **details: Any) -> None:
        context.compiled(cache_hit)

    def watch_threads() -> None:
        while True:
            time.sleep(COMPILING_SECONDS)
            if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
                context.alive()

    triton.knobs.compilation.listener = heard
    threading.Thread(target=watch_threads, daemon=True).start()


def work(context: Context) -> None:
    """Run the section that the context names."""
    from benchmarks import sections, suites

    (vars(sections) | vars(suites))[f"run_{context.name}"](context)


def say_over(pipe: int) -> Callable[[dict[str, Any]], None]:
    """Lines of JSON to a pipe, which nothing that this process starts inherits."""
    os.set_inheritable(pipe, False)
    file, lock = os.fdopen(pipe, "w"), threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            file.write(json.dumps(message) + "\n")
            file.flush()

    return say


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one section of benchmarks.gpu")
    parser.add_argument("name")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--avoid", nargs="*", default=[], metavar="WHAT")
    parser.add_argument("--finished", nargs="*", default=[], metavar="ITEM", help="by a child before this one")
    parser.add_argument("--facts", type=json.loads, default={}, metavar="JSON", help="what earlier sections learnt")
    parser.add_argument("--pipe", type=int, help="file descriptor to the parent")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    say = None if args.pipe is None else say_over(args.pipe)
    run(Context(args.name, args.seconds, args.dtype, args.avoid, args.finished, args.facts, say))
    return 0


def run(context: Context) -> None:
    """The section to its end, or to that of its GPU."""
    torch.backends.cudnn.benchmark = True
    try:
        torch.zeros(1, device="cuda")
        context.check_device("its start")
    except (RuntimeError, AssertionError, DeviceLost) as error:
        context.lose(f"found no GPU: {error}", gone=True)
    listen_to_compiler(context)
    try:
        work(context)
    except DeviceLost as error:
        context.lose(str(error))
    except Exception as error:  # what no item caught: the section has no more to say
        traceback.print_exc()
        context.add({"what": context.name, "error": f"{type(error).__name__}: {error}"[:400]})
    context.finish()


if __name__ == "__main__":
    sys.exit(main())
