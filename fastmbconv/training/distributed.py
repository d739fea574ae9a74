"""One process or many, as torchrun started them. The first one writes and talks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmbconv.training.errors import TrainingError

# Python's reference to a group must be the last one. DistributedDataParallel's Reducer drops its own with the GIL
# held, and gloo's destructor then waits for threads that may want the GIL to drop their last message: a deadlock.
_groups: list[dist.ProcessGroup | None] = []


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """In place, over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def send_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def gather(self, value: dict[str, str]) -> dict[str, str]:
        """All processes' entries, on all of them."""
        if self.size == 1:
            return value
        parts: list[dict[str, str]] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, value)
        return {name: text for part in parts for name, text in part.items()}


def device_named(name: str | None) -> torch.device:
    """A device that is there.

    Raises:
        TrainingError: for a name that torch doesn't know, or a GPU that isn't there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device is {name}: it can't be used here ({reason}); allowed are cpu, cuda") from error
    return device


@contextmanager
def world(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun started (gloo on CPUs, NCCL on GPUs), or be alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = device_named(device)
    if size == 1:
        yield World(where)
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    _groups.append(dist.group.WORLD)
    try:
        yield World(where, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
