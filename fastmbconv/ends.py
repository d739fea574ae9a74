"""What stands around the blocks: the stem, and the head with its pool. Kernels run where no gradient is needed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastmbconv import dispatch, functional
from fastmbconv.block import Activation, BatchNorm
from fastmbconv.mbconv import ACTIVATIONS, NORMS, Conv2d


class ConvBNAct(nn.Module):
    """act(BN(conv(x))): the stem and the head.

    Without gradients, and with running statistics, BN and activation are one pass; `pooled` of a 1x1 convolution is one
    kernel that writes no map. `fused = False` (or `fastmbconv.unfuse`) for eager.

    Shape: [N, in_channels, H, W] -> [N, out_channels, H', W'], `pooled` -> [N, out_channels].
    """

    fused: bool = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int | Literal["same"],
        activation: Activation,
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.act = ACTIVATIONS[activation]()
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if not self._infers(x):
            return self.act(self.bn(self.conv(x)))
        return functional.bn_act(self.conv(x), BatchNorm.of(self.bn), self.activation)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean of `forward` over the image."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        if hooked or self.conv.kernel_size != (1, 1) or self.conv.stride != (1, 1) or not self._infers(x):
            return self(x).mean((2, 3))
        return functional.pointwise_bn_act_pool(x, self.conv.weight, BatchNorm.of(self.bn), self.activation)

    def _infers(self, x: Tensor) -> bool:
        if not self.fused or dispatch.call_reason(x) is not None:
            return False
        expected = (Conv2d, ACTIVATIONS[self.activation])
        if (type(self.conv), type(self.act)) != expected or type(self.bn) not in NORMS:
            return False
        if (
            self.conv.bias is not None
            or x.shape[1] != self.conv.in_channels
            or dispatch.module_reason(self) is not None
        ):
            return False
        tensors = (x, self.conv.weight, self.bn.weight, self.bn.bias)
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return not wanted and not BatchNorm.of(self.bn).batch_statistics
