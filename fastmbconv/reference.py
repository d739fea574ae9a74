"""The block and each op in plain PyTorch, one line per op: the truth that tests, fallback and benchmarks share.

All images are [N, C, H, W]. Nothing here calls a kernel of ours; dtype in is dtype out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmbconv import ranks
from fastmbconv.block import Activation, BatchNorm, Block, DenseBlock, Gate, Padding, SqueezeExcite, pads

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def hard_sigmoid(x: Tensor) -> Tensor:
    """clamp(x + 3, 0, 6) / 6; torch's own has an fp32 sixth for a derivative, in float64 too."""
    return F.relu6(x + 3) / 6 if x.dtype == torch.float64 else F.hardsigmoid(x)


GATES: dict[Gate, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": hard_sigmoid}


def batch_norm(x: Tensor, bn: BatchNorm) -> Tensor:
    """`nn.BatchNorm2d.forward` on a description of it, running statistics included, behind its convolution's bias."""
    if bn.conv_bias is not None:
        x = x + bn.conv_bias.to(x.dtype)[:, None, None]
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.updates and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    if bn.group is not None:
        return _synchronised(x, bn, momentum, bn.group)
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.batch_statistics, momentum, bn.eps)


def _synchronised(x: Tensor, bn: BatchNorm, momentum: float, group: str) -> Tensor:
    """BatchNorm with the statistics of every process's batch; weight and bias get this process's gradients."""
    wide = x if x.dtype == torch.float64 else x.float()
    count = ranks.total(wide.new_tensor([x.numel() / x.shape[1]]), group)
    mean = ranks.Total.apply(wide.sum((0, 2, 3)), group) / count
    centred = wide - mean[:, None, None]
    var = ranks.Total.apply((centred * centred).sum((0, 2, 3)), group) / count
    if bn.updates and bn.running_mean is not None and bn.running_var is not None:
        with torch.no_grad():
            bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), momentum)
            bn.running_var.lerp_((var * count / (count - 1)).to(bn.running_var.dtype), momentum)
    y = centred * torch.rsqrt(var + bn.eps)[:, None, None]
    y = y if bn.weight is None else y * bn.weight[:, None, None]
    return (y if bn.bias is None else y + bn.bias[:, None, None]).to(x.dtype)


def depthwise(x: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """Depthwise K x K convolution; weight is [C, 1, K, K]."""
    (top, bottom), (left, right) = (pads(size, weight.shape[-1], stride, padding) for size in x.shape[2:])
    if top == bottom and left == right:
        return F.conv2d(x, weight, None, stride, (top, left), 1, x.shape[1])
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, 1, x.shape[1])


def depthwise_bn_act(
    x: Tensor, weight: Tensor, bn: BatchNorm, stride: int, padding: Padding, activation: Activation
) -> Tensor:
    """act(BN(depthwise(x)))."""
    return ACTIVATIONS[activation](batch_norm(depthwise(x, weight, stride, padding), bn))


def squeeze_excite(x: Tensor, se: SqueezeExcite) -> Tensor:
    """x * gate(expand(act(reduce(mean of x over the image)))), gate = sigmoid: Hu et al., 2018."""
    pooled = x.mean((2, 3), keepdim=True)
    reduced = ACTIVATIONS[se.activation](F.conv2d(pooled, _as_conv(se.reduce_weight), se.reduce_bias))
    return x * GATES[se.gate](F.conv2d(reduced, _as_conv(se.expand_weight), se.expand_bias))


def _as_conv(weight: Tensor) -> Tensor:
    """A linear layer's weight as a 1x1 convolution's."""
    return weight[:, :, None, None] if weight.dim() == 2 else weight


def mbconv(x: Tensor, block: Block) -> Tensor:
    """The whole block, in the order of `Block`."""
    h, start = x, block.start
    after_expand, after_depthwise, after_project = block.activations
    if start is not None:
        h = depthwise_bn_act(h, start.weight, start.bn, start.stride, start.padding, "none")
    if block.expand_weight is not None:
        assert block.bn1 is not None
        h = ACTIVATIONS[after_expand](batch_norm(F.conv2d(h, block.expand_weight), block.bn1))
    h = depthwise_bn_act(h, block.depthwise_weight, block.bn2, block.stride, block.padding, after_depthwise)
    if block.se is not None:
        h = squeeze_excite(h, block.se)
    h = F.conv2d(h, block.project_weight, block.project_bias)
    h = ACTIVATIONS[after_project](h if block.bn3 is None else batch_norm(h, block.bn3))
    if block.residual and block.drop is not None:
        h = (h * block.drop(h.new_ones(h.shape[0], 1, 1, 1))).to(h.dtype)
    return h + x if block.residual else h


def dense_mbconv(x: Tensor, block: DenseBlock) -> Tensor:
    """The whole Fused-MBConv block: dense conv, BN, act, [SE], [project, BN, act], [stochastic depth, + x]."""
    h = ACTIVATIONS[block.activation](batch_norm(block.conv(x), block.bn1))
    if block.se is not None:
        h = squeeze_excite(h, block.se)
    if block.project_weight is not None:
        assert block.bn2 is not None
        h = ACTIVATIONS[block.project_activation](batch_norm(F.conv2d(h, block.project_weight), block.bn2))
    if block.residual and block.drop is not None:
        h = (h * block.drop(h.new_ones(h.shape[0], 1, 1, 1))).to(h.dtype)
    return h + x if block.residual else h
