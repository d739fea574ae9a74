"""What synchronised BatchNorms tell each other: one small collective forward and one backward, by the group's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def group_of(module: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The processes whose batches this module's statistics are taken over now; None: this process's batch alone."""
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group: Any = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def gathered(moments: Tensor, group: str) -> Tensor:
    """[1, 3, C] of every process as [processes, 3, C]."""
    name: Any = group
    size = dist.distributed_c10d._get_group_size_by_name(name)
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_gather_into_tensor(moments, size, group))


def total(tensor: Tensor, group: str) -> Tensor:
    """The sum over all processes, the same on each."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(tensor, "sum", group))


def total_of_sums(sums: tuple[Tensor, Tensor], count: int, group: str) -> Tensor:
    """[2 C + 1]: two sums [C] and the count, over all processes."""
    return total(torch.cat((*sums, sums[0].new_full((1,), count))), group)


class Total(torch.autograd.Function):
    """`total` for plain PyTorch: each process's loss depends on every process's tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return total(tensor, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return total(dy.contiguous(), ctx.group), None
