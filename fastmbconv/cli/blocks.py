"""A model's MBConv blocks, one by one: run them fused within a time budget, catch their inputs, count their traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastmbconv
from fastmbconv import dispatch
from fastmbconv.block import Block, DenseBlock
from fastmbconv.cli.extras import require
from fastmbconv.swap.fused import fusible
from fastmbconv.traffic import Sizes, Traffic, count, count_dense


@dataclass(frozen=True)
class BlockRun:
    """What a fused run did: its output, seconds of each block that ran through kernels, why the others ran eager."""

    output: Tensor
    seconds: dict[str, float]
    total: int
    reason: str | None

    @property
    def through_kernels(self) -> int:
        return len(self.seconds)


class Pacer:
    """Chooses each block's path as the model reaches it: kernels while the next block fits the budget, then eager.

    A block's time is foretold from its traffic and the slowest rate so far, so that the last one does not overrun.
    """

    def __init__(self, budget: float | None, costs: dict[str, int], progress: Any) -> None:
        self.budget, self.costs, self.progress = budget, costs, progress
        self.task = progress.add_task("", total=len(costs))
        self.seconds: dict[str, float] = {}
        self.reason: str | None = None
        self.rate = 0.0
        self.started = 0.0

    def fits(self, name: str) -> bool:
        if self.budget is None:
            return True
        return self.budget > 0 and sum(self.seconds.values()) + self.rate * self.costs[name] <= self.budget

    def enter(self, name: str, module: nn.Module, x: Tensor) -> None:
        dispatch.set_backend("triton")
        reason = reason_of(module, x) or (None if self.fits(name) else "the time budget was used up")
        if reason is not None:
            dispatch.set_backend("eager")
            self.reason = self.reason or reason
        self.progress.update(self.task, description=f"{name}: {'kernels' if reason is None else 'eager'}")
        self.started = time.monotonic()

    def leave(self, name: str) -> None:
        if dispatch.get_backend() == "triton":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] = time.monotonic() - self.started
            self.rate = max(self.rate, self.seconds[name] / self.costs[name])
        dispatch.set_backend("eager")
        self.progress.advance(self.task)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that can be fused by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(fusible(module), (Block, DenseBlock))}


def reason_of(module: nn.Module, x: Tensor) -> str | None:
    """Why this block's call would run eager, or None."""
    block = fusible(module)
    return dispatch.supports(block, x) if isinstance(block, (Block, DenseBlock)) else block or "no known block"


def run_fused(model: nn.Module, x: Tensor, budget: float | None) -> BlockRun:
    """One forward with the blocks fused, under a progress bar; `budget` in seconds, None for no limit."""
    names = blocks_of(model)
    costs = {name: traffic.fused_inference for name, traffic in traffic_of(model, x)}
    before = dispatch.get_backend()
    fastmbconv.fuse(model)
    try:
        with require("rich.progress", "cli").Progress(transient=True) as progress:
            pacer = Pacer(budget, costs, progress)

            def enter(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
                pacer.enter(name, module, arguments[0])

            def leave(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
                pacer.leave(name)

            with hooked(names, before=enter, after=leave), torch.inference_mode():
                output = model(x).float()
    finally:
        dispatch.set_backend(before)
        fastmbconv.unfuse(model)
    return BlockRun(output, pacer.seconds, len(names), pacer.reason)


def traffic_of(model: nn.Module, x: Tensor) -> list[tuple[str, Traffic]]:
    """Each block's traffic for a batch like `x`, in elements; runs the model once, eager."""
    rows = []

    def note(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        block, shape = fusible(module), tuple(arguments[0].shape)
        assert isinstance(block, (Block, DenseBlock))
        traffic = count_dense(block, shape)[1] if isinstance(block, DenseBlock) else count(Sizes.of(block, shape))
        rows.append((name, traffic))

    with hooked(blocks_of(model), before=note), fastmbconv.backend("eager"), torch.inference_mode():
        model(x)
    return rows


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The input that each block gets when the model sees `x`, eager, in the model's present mode."""
    inputs = {}

    def note(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[name] = arguments[0].detach().clone()

    with hooked(blocks_of(model), before=note), fastmbconv.backend("eager"), torch.no_grad():
        model(x)
    return inputs


Visit = Callable[[str, nn.Module, tuple[Any, ...]], None]


@contextmanager
def hooked(modules: dict[str, nn.Module], before: Visit, after: Visit | None = None) -> Iterator[None]:
    """Call `before` and `after` around each module's forward; the hooks go when the `with` block ends."""
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: before(name, m, a)))
        if after is not None:
            handles.append(module.register_forward_hook(lambda m, a, _, name=name: after(name, m, a)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
