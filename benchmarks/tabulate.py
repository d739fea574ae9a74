"""Comparisons as pytest-benchmark tests: one group per shape and mode, one test per candidate.

All candidates of a group are timed together, interleaved (`comparison`); each test then plays its own samples back
through pytest-benchmark's clock, which prints, saves and compares them like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.comparison import OURS, PEERS, Plan, compare
from benchmarks.kernelbench import Problem
from benchmarks.registry import Shape, by_weight
from benchmarks.subjects import MODES, Subject

CANDIDATES = (OURS, *PEERS)


class Replay:
    """A clock that only `step` advances, each time by a sample taken before."""

    def __init__(self) -> None:
        self._now, self._samples = 0.0, iter(())

    def load(self, milliseconds: list[float]) -> int:
        self._samples = iter(milliseconds)
        return len(milliseconds)

    def step(self) -> None:
        self._now += next(self._samples) / 1e3

    def clock(self) -> float:
        return self._now


REPLAY = Replay()
replayed = pytest.mark.benchmark(timer=REPLAY.clock)
every_candidate = pytest.mark.parametrize("candidate", CANDIDATES)
every_mode = pytest.mark.parametrize("mode", MODES)
every_shape = pytest.mark.parametrize("shape", by_weight(), ids=lambda s: s.name.replace(" ", "-"))


@cache
def _row(
    make: Callable[[Any], Subject], shape: Shape | Problem, mode: str, dry: bool, tf32: bool = False
) -> dict[str, Any]:
    if dry:
        plan = Plan("cpu", torch.float32, tuple(p for p in PEERS if p.startswith("eager")), 1, interpreted=True)
        return compare(make(shape.tiny()), mode, plan)
    return compare(make(shape), mode, Plan("cuda", torch.float32 if tf32 else torch.bfloat16, tf32=tf32))


def tabulate(
    benchmark: Any,
    make: Callable[[Any], Subject],
    shape: Shape | Problem,
    mode: str,
    candidate: str,
    dry: bool,
    tf32: bool = False,
) -> None:
    """Play one candidate's samples back; a group whose parity gate is red has no figures at all.

    In bf16, or with `tf32` in float32 whose products may take TF32.
    """
    row = _row(make, shape, mode, dry, tf32)
    if "error" in row:
        pytest.fail(f"{row['what']} {mode}: no figure, {row['error']}")
    if candidate not in row["results"]:
        pytest.skip(f"{candidate}: {row['problems'].get(candidate, 'not compared in a dry run')}")
    benchmark.group = f"{row['what']} {mode}" + (f" ({row['note']})" if "note" in row else "")
    benchmark.extra_info.update({k: row[k] for k in ("dtype", "best_peer", "speedup", "errors", "kernels")})
    benchmark.extra_info.update(row["results"][candidate])
    benchmark.pedantic(REPLAY.step, rounds=REPLAY.load(row["samples"][candidate]))
