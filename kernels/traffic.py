"""What the launches read and write: every launcher states its tensors, and a recorder, where one is active, counts.

A tensor counts once per launch. What several programs of a launch read (tiles of a matrix product, rows between two
strips) is read by programs that run side by side and comes from L2; a launcher that must fetch a tensor from memory
twice states it twice.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .launching import watching


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor that a launch reads or writes: all of it, or `size` bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel, named without its underscores, or a sum of torch's."""

    kernel: str
    reads: tuple[Moved, ...]
    writes: tuple[Moved, ...]


Stated = Tensor | tuple[Tensor, int] | None  # a tensor, or a tensor and how many bytes of it

_recorder: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches inside the `with` block, in order."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        with watching():
            yield _recorder
    finally:
        _recorder = before


def state(kernel: str, reads: tuple[Stated, ...], writes: tuple[Stated, ...]) -> None:
    """What a launch of `kernel` reads and writes; None is an argument that this launch does not have."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, _moved(reads), _moved(writes)))


def summed(partials: Tensor) -> Tensor:
    """The sum of partial results over the programs that wrote them."""
    total = partials.sum(0)
    state("sum", (partials,), (total,))
    return total


def _moved(stated: Iterable[Stated]) -> tuple[Moved, ...]:
    pairs = [one if isinstance(one, tuple) else (one, one.nbytes) for one in stated if one is not None]
    return tuple(Moved(tuple(tensor.shape), tensor.dtype, size) for tensor, size in pairs)
