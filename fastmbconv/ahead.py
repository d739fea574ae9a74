"""Cold kernels compile side by side: a block's first call submits what it will launch to threads.

In training that is its forward's and its backward's kernels, without gradients the inference kernels.

A block is followed by others (`fuse` says by which), and their shapes follow from its own, so the first call of a
model's first block submits the whole model's. A launch waits for its own kernel only. What can't be said ahead, or
fails to compile in a thread, compiles at its launch, as Triton does without this.
"""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastmbconv import dispatch
from fastmbconv.block import Block, Memory

if TYPE_CHECKING:
    from fastmbconv.kernels.launching import Written
    from fastmbconv.prepared import Prepared

Step = Literal["train", "infer"]  # what a block's call launches
Next = Callable[[], tuple[Block, Memory] | None]

_log = logging.getLogger(__name__)
_following: Any = WeakIdKeyDictionary()  # a block's depthwise weight -> what describes the block after it
_seen: set[tuple[Any, ...]] = set()
MOST_THREADS = 32
THREADS = "fastmbconv"  # what their names begin with


def follows(weight: Tensor, describe: Next) -> None:
    """The block with this depthwise weight is followed by the one that `describe` describes, if it still exists."""
    _following[weight] = describe


def wanted(x: Tensor) -> bool:
    """Whether this call's kernels compile for a GPU, now, and nobody traces or captures it."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and not dispatch.interpreted()
        and not torch.cuda.is_current_stream_capturing()
    )


def key(x: Tensor, block: Block, memory: Memory, step: Step) -> tuple[Any, ...]:
    """Blocks of one key need the same kernels, as far as it matters here."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    expanded, bn1, bn2 = block.expand_weight is not None, block.bn1, block.bn2
    gate = None if block.se is None else block.se.gate
    traits: tuple[Any, ...] = (expanded, gate, block.stride, block.residual, block.drop is None, memory)
    traits = (*traits, *block.activations)
    frozen = tuple(bn is None or bn.batch_statistics for bn in (bn1, bn2, block.bn3))
    sizes = block.depthwise_weight.shape, len(block.project_weight)
    if (start := block.start) is not None:
        traits = (*traits, start.kernel_size, start.stride, start.bn.batch_statistics)
    return step, x.device, x.shape, x.dtype, autocast, sizes, traits, frozen


def block_called(x: Tensor, block: Block, memory: Memory, step: Step, ready: Prepared) -> None:
    """Submit what this call and the blocks after it will launch, unless that was done; never an error."""
    if step in ready.submitted or not wanted(x):
        return
    ready.submitted.add(step)
    if (own := key(x, block, memory, step)) in _seen:
        return
    _seen.add(own)
    try:
        with torch.cuda.device_of(x), torch.no_grad():
            submit(model_launches(x, block, memory, step))
    except Exception as error:
        _log.debug("kernels compile at their launches: %s", error)


def model_launches(x: Tensor, block: Block, memory: Memory, step: Step) -> list[Written]:
    """The launches of `step` for this block and for those that follow it; no kernel runs and nothing changes."""
    from fastmbconv.kernels.launching import written

    passed: set[int] = set()
    with written() as launches:
        following: tuple[Block, Memory] | None = (block, memory)
        while following is not None and following[0].in_channels == x.shape[1]:
            block, memory = following
            if id(block.depthwise_weight) in passed:
                break
            passed.add(id(block.depthwise_weight))
            _seen.add(key(x, block, memory, step))
            x = STEPS[step](x, block, memory)
            describe = _following.get(block.depthwise_weight)
            following = None if describe is None else describe()
    return launches


def train(x: Tensor, block: Block, memory: Memory) -> Tensor:
    """A training step's launches, forward and backward; no seed is drawn, no batch counted. The output."""
    from fastmbconv import biases, functional
    from fastmbconv.fused import mbconv, single
    from fastmbconv.fused.stages import nhwc

    ready = functional.prepare_mbconv(x, block, memory, compute := functional.compute_dtype(x))
    weights, statistics, settings = biases.shifted(ready.weights, ready.biased), ready.statistics, ready.settings
    drops = block.residual and block.drop is not None
    keep = x.new_empty(x.shape[0], dtype=torch.float32) if drops else None
    first = image = nhwc(x.to(compute))
    shortcut = None
    if (start := block.start) is not None:
        shortcut = first if block.residual and not ready.wide else None
        own = single.describe_depthwise(start.weight, start.bn, start.stride, start.padding, "none")
        h, before = single.depthwise_forward(first, None, None, *own)
        image = nhwc(h)
    y, saved = mbconv.forward(image, shortcut, keep, weights, statistics, settings)
    mbconv.backward(nhwc(y), image, keep, saved, weights, settings, (True,) * (1 + len(weights)))
    if start is not None:
        single.depthwise_backward(image, first, None, before, own[0], own[2], (True,) * (1 + len(own[0])))
    return y


def infer(x: Tensor, block: Block, memory: Memory) -> Tensor:
    """An inference's."""
    from fastmbconv import functional

    ready = functional.prepare_mbconv(x, block, memory, functional.compute_dtype(x))
    return functional.run_mbconv(x, block, ready, "infer")


STEPS: dict[str, Callable[[Tensor, Block, Memory], Tensor]] = {"train": train, "infer": infer}


def submit(launches: Iterable[Written], threads: int | None = None) -> list[Compiled]:
    """Start compiling each kernel that isn't there, the longest first, and leave; launches find what is under way."""
    from triton import AsyncCompileMode

    from fastmbconv.kernels.tuning import TRITON

    class Mode(AsyncCompileMode):
        def submit(self, key: Any, compile_fn: Any, finalize_fn: Any) -> Any:
            under_way = super().submit(key, compile_fn, finalize_fn)
            if TRITON < (3, 7):  # there a launch finds a kernel only once somebody has waited for it: it compiles again
                finalize_fn(under_way)
            return under_way

    threads = min(MOST_THREADS, len(os.sched_getaffinity(0))) if threads is None else threads
    pool = ThreadPoolExecutor(threads, thread_name_prefix=THREADS)
    executor: Any = SimpleNamespace(submit=lambda compile_kernel: Compiled(pool, compile_kernel))
    mode = Mode(executor, ignore_errors=True)

    def start() -> None:
        mode.__enter__()  # for this context only, and for ever: its end would wait for every kernel
        for function, arguments in sorted(launches, key=_weight, reverse=True):
            function.warmup(grid=(1,), **arguments)

    try:
        contextvars.copy_context().run(start)
    finally:
        pool.shutdown(wait=False)
    return mode.raw_futures


def _weight(launch: Written) -> int:
    """Grows with the time that a kernel takes to compile: the walks are unrolled over taps, rows and columns."""
    sizes = launch.arguments
    return sizes.get("K", 0) ** 2 * sizes.get("R", 0) * (2 if "ROWS" in sizes else 1)


class Compiled:
    """A kernel under way. If a thread fails at it, who needs it compiles it: an error is the launch's own."""

    def __init__(self, pool: ThreadPoolExecutor, compile_kernel: Callable[[], Any]) -> None:
        self.compile_kernel = compile_kernel
        self.future: Future[Any] = pool.submit(_with_launcher, compile_kernel)

    def result(self) -> Any:
        try:
            return self.future.result()
        except Exception as error:
            _log.debug("compiling again: %s", error)
            return self.compile_kernel()


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    """A kernel, and in Triton's cache what starts it: up to 3.6 gcc builds that, at the first launch of a signature."""
    from triton.runtime import driver

    kernel = compile_kernel()
    try:
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    except Exception as error:
        _log.debug("the launch builds its own start: %s", error)
    return kernel
