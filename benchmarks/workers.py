"""A list worked off by forked processes, so that an item that hangs or kills its process costs only itself."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T, R = TypeVar("T"), TypeVar("R")
STEP = 0.5  # seconds between looks at the clock


@dataclass(frozen=True)
class Failed:
    """Why an item has no result."""

    reason: str


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    item: int | None = None
    since: float = 0.0


def spread(work: Callable[[T], R], items: list[T], jobs: int, timeout: float) -> list[R | Failed]:
    """`work` of each item, in order; `Failed` for one that raised, ended its process or took over `timeout` seconds."""
    results: dict[int, R | Failed] = {}
    todo, started = list(range(len(items)))[::-1], time.monotonic()
    workers: list[_Worker] = []
    while len(results) < len(items):
        while todo and len(workers) < jobs:
            workers.append(_start(work, items, [worker.pipe for worker in workers]))
        for worker in workers:
            if worker.item is None and todo:
                worker.item, worker.since = todo.pop(), time.monotonic()
                worker.pipe.send(worker.item)
        for pipe in wait([w.pipe for w in workers], STEP):
            worker = next(w for w in workers if w.pipe is pipe)
            index, worker.item = worker.item, None
            try:
                results[index] = worker.pipe.recv()
            except EOFError:
                worker.process.join()
                results[index] = Failed(f"ended its process with {worker.process.exitcode}")
                workers.remove(worker)
        for worker in [w for w in workers if w.item is not None and time.monotonic() - w.since > timeout]:
            results[worker.item] = Failed(f"took over {timeout:g} s")
            worker.process.kill()
            worker.process.join()
            workers.remove(worker)
        _progress(len(results), len(items), started)
    for worker in workers:
        worker.pipe.send(None)
        worker.process.join()
    return [results[i] for i in range(len(items))]


def _start(work: Callable[[Any], Any], items: list[Any], others: list[Connection]) -> _Worker:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, items, there, [here, *others]), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _serve(work: Callable[[Any], Any], items: list[Any], pipe: Connection, inherited: list[Connection]) -> None:
    for end in inherited:  # with a copy open here, nobody would see that the parent ended
        end.close()
    with suppress(EOFError):
        while (index := pipe.recv()) is not None:
            try:
                result = work(items[index])
            except Exception as error:  # one item must not hide the others
                lines = str(error).strip().splitlines()
                result = Failed(f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300])
            pipe.send(result)


def _progress(done: int, total: int, started: float) -> None:
    if sys.stderr.isatty():
        left = (time.monotonic() - started) / max(done, 1) * (total - done)
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} kernels, about {left / 60:.1f} min left  ", end=end, file=sys.stderr, flush=True)
