"""One process or many, as torchrun started them. The first one writes and talks."""

from __future__ import annotations

import gc
import os
import time
import uuid
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
PAUSE = 0.02  # seconds
PATIENCE = 1800.0  # seconds, as torch's own


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
    """Join the processes that torchrun started (gloo on CPUs, NCCL on GPUs), or be alone.

    Raises:
        TrainingError: for a device that can't be used, or where something else than torchrun set half of what it sets.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = device_named(device)
    if size == 1:
        yield World(where)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} not set: start with torchrun, which sets them all, or "
            "unset WORLD_SIZE for one process"
        )
    rank = int(os.environ["RANK"])
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        torch.cuda.set_device(where)
    store = unused(next(dist.rendezvous("env://"))[0], rank, size)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    _groups.append(dist.group.WORLD)
    try:
        yield World(where, rank, size)
    finally:
        dist.destroy_process_group()


def leave() -> None:
    """Let the groups go, once DistributedDataParallel is gone: their threads would abort at Python's end."""
    gc.collect()
    _groups.clear()


def unused(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the store that is all processes' own: after a restart torchrun's still has the addresses of the dead.

    Each process leaves a new name. The first one lists the names that it finds until all have seen theirs listed; its
    own is the part's.

    Raises:
        TrainingError: if they don't come within `PATIENCE`.
    """
    mine = uuid.uuid4().hex
    store.set(f"name/{rank}", mine)
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        if rank:
            names = store.get("names").decode().split()
            if mine in names:
                store.set(f"{names[0]}/{mine}", "")
                return dist.PrefixStore(names[0], store)
        else:
            names = [store.get(f"name/{other}").decode() for other in range(size)]
            store.set("names", " ".join(names))
            if store.check([f"{mine}/{name}" for name in names[1:]]):
                return dist.PrefixStore(mine, store)
        time.sleep(PAUSE)
    raise TrainingError(f"not all {size} processes came within {PATIENCE:g} s: look at the others' messages")


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
