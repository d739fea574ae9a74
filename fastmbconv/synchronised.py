"""BatchNorm over the pictures of all processes, for models of ours on any device."""

from __future__ import annotations

from torch import Tensor, nn

from fastmbconv import reference
from fastmbconv.block import BatchNorm


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's module, which also takes CPU tensors in training: there it is plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_cuda else reference.batch_norm(x, BatchNorm.of(self))


def synchronise(model: nn.Module) -> None:
    """Give a model synchronised BatchNorms, in place: weights, statistics and state-dict keys stay.

    On CPUs call it behind DistributedDataParallel, which refuses such modules there. A model that is itself one
    BatchNorm stays as it is.
    """
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm
