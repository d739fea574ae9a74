"""Runs of a Sequential's children that are blocks together: the Sequential calls each as one.

A run is a Sequential of its own, a `shell`, which shares the children and is fused as any block; the holder finds it
again from its own children at each call, so nothing is stored in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from fastmbconv.block import Memory
from fastmbconv.swap.fused import own_forward, swap_in
from fastmbconv.swap.swapped import Swapped
from fastmbconv.swap.written import Ways


@dataclass(frozen=True, slots=True)
class Run:
    """A Sequential's children from `begin` up to `end`, and what they compute together."""

    begin: int
    end: int
    ways: Ways
    memory: Memory


_shells: weakref.WeakKeyDictionary[nn.Module, dict[Run, Any]] = weakref.WeakKeyDictionary()


class FusedRuns(Swapped):
    """Mixed in before a Sequential's class."""

    is_swap: ClassVar[bool] = True
    runs: ClassVar[tuple[Run, ...]]

    def forward(self, input: Any) -> Any:
        holder: Any = self
        runs = getattr(type(holder), "runs", ())
        if not runs or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return own_forward(holder)(input)
        for layer in _layers(holder, runs):
            input = layer(input)
        return input

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (type(self).original, type(self).runs), self.__getstate__()  # type: ignore[attr-defined]


def _layers(holder: nn.Module, runs: tuple[Run, ...]) -> Iterator[nn.Module]:
    """The holder's children, with a shell in the place of each run."""
    children, place = list(holder.children()), 0
    for run in runs:
        if run.end > len(children):
            break
        yield from children[place : run.begin]
        yield shell_of(holder, run, children)
        place = run.end
    yield from children[place:]


def shell_of(holder: nn.Module, run: Run, children: list[nn.Module] | None = None) -> nn.Module:
    """A run as one fused module."""
    inside = (list(holder.children()) if children is None else children)[run.begin : run.end]
    shells = _shells.setdefault(holder, {})
    shell = shells.get(run)
    if shell is None or list(shell.children()) != inside:
        shell = shells[run] = nn.Sequential(*inside)
        swap_in(shell, run.memory, run.ways)
    if shell.training is not holder.training:
        shell.training = holder.training
    return shell


def runs_of(module: nn.Module) -> tuple[Run, ...]:
    """The runs that a Sequential calls fused."""
    return type(module).runs if isinstance(module, FusedRuns) else ()


def swap_in_runs(holder: nn.Module, runs: tuple[Run, ...]) -> None:
    """Make a Sequential call these runs fused, and no others."""
    cls: Any = type(holder)
    holder.__class__ = fused_runs_class(cls.original if isinstance(holder, FusedRuns) else cls, runs)


@cache
def fused_runs_class(original: Any, runs: tuple[Run, ...]) -> Any:
    """The subclass of a Sequential's class that calls these runs fused."""
    body = {"original": original, "is_swap": True, "runs": runs, "__module__": __name__, "__doc__": original.__doc__}
    return type(f"Fused{original.__name__}", (FusedRuns, original), body)


def _rebuild(original: Any, runs: tuple[Run, ...]) -> nn.Module:
    """An empty one, for copy and pickle to fill: stored models name this function."""
    cls = fused_runs_class(original, runs)
    return cls.__new__(cls)
