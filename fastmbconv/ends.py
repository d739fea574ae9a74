"""What stands around the blocks: the stem, and the head with its pool. Kernels run where no gradient is needed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmbconv import dispatch, functional
from fastmbconv.block import Activation, BatchNorm
from fastmbconv.mbconv import ACTIVATIONS, NORMS, Conv2d, computes


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
        if not self.fused or dispatch.call_reason(x) is not None or self.replaced_reason() is not None:
            return False
        if x.shape[1] != self.conv.in_channels or dispatch.module_reason(self) is not None:
            return False
        return infers(x, BatchNorm.of(self.bn), self.conv.weight)

    def replaced_reason(self) -> str | None:
        """Why the kernels don't know what this module computes, or None: somebody replaced one of its layers."""
        for name, expected in (("conv", (Conv2d,)), ("bn", NORMS)):
            layer = self._modules[name]
            if type(layer) not in expected:
                return f"{name} is a {type(layer).__name__}"
        if not computes(self.act, self.activation):
            return f"act is a {type(self.act).__name__}"
        return None if self.conv.bias is None else "conv has a bias"


def infers(x: Tensor, bn: BatchNorm, weight: Tensor | None = None) -> bool:
    """True where kernels run an end's BatchNorm on x: it is a fixed affine map, and nothing needs a gradient.

    Args:
        x: [N, C, H, W], the convolution's output; with its `weight` (for `functional.pointwise_bn_act_pool`) its input.
    """
    if dispatch.call_reason(x) is not None or bn.batch_statistics:
        return False
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    tensors = [tensor for tensor in (weight, *vectors) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
        return False
    if any(tensor.device != x.device or is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return False
    if dispatch.layout_reason(*tensors) is not None or dispatch.size_reason(x, 1) is not None:
        return False
    assert bn.running_mean is not None
    if x.dim() != 4 or x.shape[1] != (bn.running_mean.shape[0] if weight is None else weight.shape[1]):
        return False
    return weight is None or weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
