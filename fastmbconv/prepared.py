"""What the calls of one block with images of one kind have in common, found once: checked, described and signed.

A block remembers it (`Block.calls`), by the image's shape, dtype and device and by the settings that are not the
block's. It holds as long as its tensors are what they were: data that was put into one (`module.half()`, `.data`) may
have another shape, dtype, layout or device. `watch` asks the guards that PyTorch has for torch.compile, which take a
fifth of the time of a look from Python; they are private, so where they don't pass a test of what they are needed for,
that look is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastmbconv import biases, dispatch
from fastmbconv.block import Block, DenseBlock, Memory
from fastmbconv.call import Settings, Tensors, list_moved

MOST = 64  # kinds of images that a block remembers


class Prepared:
    """A block for images of one kind.

    Attributes:
        weights, statistics, settings: the call as data; `call` has them, and `ops.sign`'s number for it.
        biased: BatchNorms behind a convolution's bias, by their name among the weights.
        others: what gradients are of beside the weights: those biases, and what stands in front of the block.
        compute: the dtype that the kernels compute in.
        wide: the shortcut is wider than that, and added apart.
        fixed: every BatchNorm is a fixed affine map, and nothing is drawn.
        counts: of the BatchNorms that move.
        moving: the running statistics that a call changes.
        submitted: the steps whose kernels `ahead` has seen.
    """

    def __init__(
        self,
        x: Tensor,
        block: Block | DenseBlock,
        described: tuple[Any, Tensors, Settings],
        compute: torch.dtype,
    ) -> None:
        from fastmbconv.kernels.launching import epoch
        from fastmbconv.ops import sign

        self.weights, self.statistics, self.settings = described
        plain = dispatch.plain(x)  # else its calls are remembered by nobody
        self.compute, self.wide = compute, block.residual and compute != x.dtype
        bns = dispatch.norms(block)
        own = bns[: len(self.settings.norms)]  # a start does its own
        self.biased = {f"bn{i}": bn for i, bn in enumerate(own, 1) if bn is not None and bn.conv_bias is not None}
        conv_biases = [bn.conv_bias for bn in self.biased.values()]
        self.others = (*conv_biases, *_start_tensors(block))
        called = biases.shifted(self.weights, self.biased)
        self.call = (*described, sign(self.settings, called, self.statistics) if plain else 0)
        drops = block.residual and block.drop is not None
        self.fixed = not drops and not any(bn is not None and bn.batch_statistics for bn in bns)
        counts = (bn.num_batches_tracked for bn in own if bn is not None and bn.updates)
        self.counts = [count for count in counts if count is not None]
        self.moving = list_moved(self.settings, self.statistics)
        tensors = [t for t in (*self.weights, *self.statistics, *conv_biases) if t is not None]
        self._unchanged = watch(tensors) if plain else lambda: False
        self._now, self._epoch = epoch, epoch()
        self.submitted: set[str] = set()

    def holds(self) -> bool:
        """Whether the block's tensors, and what launchers go by beside them, are what they were."""
        return self._now() == self._epoch and self._unchanged()


def _start_tensors(block: Block | DenseBlock) -> Tensors:
    start = None if isinstance(block, DenseBlock) else block.start
    return () if start is None else (start.weight, start.bn.weight, start.bn.bias, start.bn.conv_bias)


def watch(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """A function that says whether contiguous tensors have the shapes, dtypes, layouts and devices that they have now.

    It may say no without a reason: in another mode than now, say.
    """
    if _has_guards():
        return partial(_guard(tensors).check, *tensors)
    shapes, dtypes, devices = ([getattr(t, name) for t in tensors] for name in ("shape", "dtype", "device"))

    def unchanged() -> bool:
        return (
            [t.shape for t in tensors] == shapes
            and [t.dtype for t in tensors] == dtypes
            and [t.device for t in tensors] == devices
            and all(map(Tensor.is_contiguous, tensors))
        )

    return unchanged


def _guard(tensors: Sequence[Tensor]) -> Any:
    guards: Any = torch._C._dynamo.guards
    return guards.TensorGuards(
        *tensors,
        dynamic_dims_sizes=[[*tensor.shape] for tensor in tensors],
        dynamic_dims_strides=[[*tensor.stride()] for tensor in tensors],
    )


@cache
def _has_guards() -> bool:
    """Whether this PyTorch's guards notice data of another shape, dtype or layout, and no other change."""
    try:
        with torch.inference_mode(False):
            probe, other = (torch.zeros(2, 3, dtype=torch.float32, device="cpu") for _ in range(2))
            unchanged, answers = partial(_guard([probe]).check, probe), []
            for data in (other, other.half(), other.view(3, 2).t(), other.view(3, 2), other[:1], other + 1):
                probe.data = data
                answers.append(unchanged())
    except Exception:  # whatever a private function does in a version that nobody has seen
        return False
    return answers == [True, False, False, False, False, True]


def find_prepared(
    x: Tensor,
    block: Block | DenseBlock,
    memory: Memory,
    compute: torch.dtype,
    prepare: Callable[[], Prepared | None],
) -> Prepared | None:
    """What the block remembers of images like x, else what `prepare` makes: None where eager takes the call."""
    if not dispatch.plain(x):  # sizes may be symbols
        return prepare()
    key = (x.shape, x.dtype, x.device, compute, memory)
    found = block.calls.get(key)
    if found is not None and found.holds() and dispatch.call_reason(x) is None:
        return found
    found = prepare()
    if found is not None:
        if len(block.calls) >= MOST:
            block.calls.clear()
        block.calls[key] = found
    return found
