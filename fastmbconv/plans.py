"""Launch plans: what a part's forward or backward did before, done again without asking its launchers.

The first call of a kind runs the launchers, the second is recorded (recording.py). What doesn't change from call to
call (tiles, grids, constants, sizes, the compiled kernel) is written into the plan then, which is a Python function
(replay.py); tensors and their pointers are filled in.

A plan starts a compiled kernel by its `run`, which is Triton's, and has the form that `known_form` looks for in 3.6 to
3.9. With another form, with FASTMBCONV_PLANS=0, or while somebody watches launches (a profiler's hook, a recorder of
ours), launchers run each time.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from triton.runtime import driver

from fastmbconv.kernels import launching
from fastmbconv.kernels.math import INTERPRETED
from fastmbconv.kernels.tuning import TRITON
from fastmbconv.recording import Launch, Recorder
from fastmbconv.replay import ALIGNMENT, Flat, Plan

MOST = 1024  # plans; beyond, all are made anew
OLDEST, NEWEST = (3, 6), (3, 9)  # Triton's versions whose kernels were started by a plan
FORM = ("gridX", "gridY", "gridZ", "stream", "function")  # what their `run` takes before metadata, hooks and arguments

ENABLED = os.environ.get("FASTMBCONV_PLANS", "1") != "0"

_plans: dict[Any, Plan | None] = {}  # None: called once
_lock = threading.Lock()


def run(key: Any, function: Callable[[], Flat], tensors: Flat) -> Flat:
    """What `function()` returns: by the plan of this key, if there is one, or by the function.

    Args:
        key: all that the function's launches depend on beside what is in `tensors`.
        function: returns tensors and Nones; it reads and moves `tensors`, and no other ones.
    """
    if launching.watched() or not ENABLED:
        return function()
    key = (key, launching.epoch())
    plan = _plans.get(key, _NEW)
    if plan is _NEW:
        with _lock:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[key] = None
        return function()
    if plan is None and all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors):
        found, _plans[key] = record(function, tensors)
        return found
    done = plan(tensors) if isinstance(plan, Plan) else None
    return function() if done is None else done


def made() -> list[Plan]:
    """The plans that there are, the oldest first; each one's `source` can be read."""
    return [plan for plan in _plans.values() if isinstance(plan, Plan)]


def forget() -> None:
    """Make every plan anew."""
    _plans.clear()


def record(function: Callable[[], Flat], tensors: Flat) -> tuple[Flat, Plan]:
    """What `function()` returns, and its plan, or `_NEVER` where it can't be replayed."""
    recorder = Recorder(tensors)
    with recorder.following():
        found = function()
    outputs = [recorder.number(tensor) for tensor in found]
    follows = recorder.complete and all(n is not None or t is None for n, t in zip(outputs, found, strict=True))
    kinds: set[Any] = {type(step.compiled) for step in recorder.steps if isinstance(step, Launch)}
    replayed = INTERPRETED or all(known_form(kind) for kind in kinds)
    return found, Plan(recorder, tensors, outputs) if follows and replayed else _NEVER


@cache
def known_form(kind: Any) -> bool:
    """Whether compiled kernels of this class are started as in the versions of Triton that are known here."""
    from triton.compiler import CompiledKernel

    if kind is not CompiledKernel or not OLDEST <= TRITON <= NEWEST:
        return False
    taken = inspect.signature(driver.active.launcher_cls.__call__).parameters
    return tuple(taken)[1 : 1 + len(FORM)] == FORM and tuple(taken)[-1] == "args"


def state() -> str:
    """Whether launches are planned here, for a person."""
    here, *known = (".".join(map(str, version)) for version in (TRITON, OLDEST, NEWEST))
    if not ENABLED:
        return "each anew: FASTMBCONV_PLANS is 0"
    if INTERPRETED:
        return f"planned (interpreted, Triton {here})"
    if not OLDEST <= TRITON <= NEWEST:
        return f"each anew: Triton {here} is not known here ({' to '.join(known)} are)"
    if torch.cuda.is_available() and not _started_as_known():
        return f"each anew: this Triton {here} starts kernels in a form of its own"
    return f"planned (Triton {here})"


def _started_as_known() -> bool:
    from triton.compiler import CompiledKernel

    return known_form(CompiledKernel)


# A key's state before its first call, and one that has no plan.
_NEW, _NEVER = (cast("Plan", object()) for _ in range(2))
