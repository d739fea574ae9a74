"""Bad input, named before anything runs or changes: each error says the argument, its value and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmbconv.block import BatchNorm, Block, DenseBlock, Padding, SqueezeExcite, pads


def output_size(size: int, padding: int, kernel_size: int, stride: int) -> int:
    """Output pixels along one axis; `padding` is both sides together."""
    return (size + padding - kernel_size) // stride + 1


def check_memory(memory: str) -> None:
    """ValueError unless `memory` is one of the two plans."""
    if memory not in ("fast", "lean"):
        raise ValueError(f"memory is {memory!r}: allowed are 'fast' and 'lean'")


def check_model(model: object) -> None:
    """TypeError unless `model` is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: allowed is a torch.nn.Module")


def check_block(x: Tensor, block: Block) -> None:
    """Everything `functional.mbconv` needs of its arguments; ValueError otherwise."""
    hidden = block.depthwise_weight.shape[0]
    _check_image(x, block.in_channels)
    size = (x.shape[2], x.shape[3])
    if (start := block.start) is not None:
        own = "block.start."
        size = _check_geometry(f"{own}weight", x, size, start.weight, x.shape[1], start.stride, start.padding, own)
        _check_batch_norm(f"{own}bn", start.bn, x.shape[1], x, x.shape[0] * size[0] * size[1])
    if (block.expand_weight is None) != (block.bn1 is None):
        raise ValueError("block.expand_weight and block.bn1 go together: give both or neither")
    if block.expand_weight is not None and block.bn1 is not None:
        _check_weight("block.expand_weight", block.expand_weight, (hidden, x.shape[1], 1, 1), x)
        _check_batch_norm("block.bn1", block.bn1, hidden, x, x.shape[0] * size[0] * size[1])
    weight = block.depthwise_weight
    size = _check_geometry("block.depthwise_weight", x, size, weight, hidden, block.stride, block.padding)
    pixels = size[0] * size[1]
    _check_batch_norm("block.bn2", block.bn2, hidden, x, x.shape[0] * pixels)
    if block.se is not None:
        _check_excite(block.se, hidden, x)
    out = block.project_weight.shape[0]
    _check_weight("block.project_weight", block.project_weight, (out, hidden, 1, 1), x)
    if block.bn3 is not None:
        _check_batch_norm("block.bn3", block.bn3, out, x, x.shape[0] * pixels)
    if block.project_bias is not None:
        if block.bn3 is not None:
            raise ValueError("block.project_bias and block.bn3 are both given: expected bn3.conv_bias for such a bias")
        _check_weight("block.project_bias", block.project_bias, (out,), x)
    if block.residual and (pixels != x.shape[2] * x.shape[3] or out != x.shape[1]):
        strides = f"stride {block.stride}" if start is None else f"strides {start.stride} and {block.stride}"
        raise ValueError(
            f"block.residual is True with {strides} and channels {x.shape[1]} -> {out}: "
            "it needs the input's own size and channels"
        )


def check_dense_input(x: Tensor, block: DenseBlock) -> None:
    """What a DenseBlock's convolution needs of x; ValueError otherwise."""
    _check_image(x, block.in_channels)
    _check_weight("block.weight", block.weight, tuple(block.weight.shape), x)


def check_dense(x: Tensor, u: Tensor, block: DenseBlock) -> None:
    """Everything else that `dense.dense_mbconv` needs, once its convolution's output is there; ValueError otherwise."""
    channels, values = block.weight.shape[0], u.numel() // block.weight.shape[0]
    if (block.project_weight is None) != (block.bn2 is None):
        raise ValueError("block.project_weight and block.bn2 go together: give both or neither")
    if block.project_weight is None and block.se is not None:
        raise ValueError("block.se needs a projection behind it: block.project_weight is None")
    _check_batch_norm("block.bn1", block.bn1, channels, u, values)
    if block.se is not None:
        _check_excite(block.se, channels, u)
    if block.project_weight is not None and block.bn2 is not None:
        _check_weight("block.project_weight", block.project_weight, (block.out_channels, channels, 1, 1), x)
        _check_batch_norm("block.bn2", block.bn2, block.out_channels, u, values)
    if block.residual and (u.shape[2:] != x.shape[2:] or block.out_channels != x.shape[1]):
        raise ValueError(
            f"block.residual is True with channels {x.shape[1]} -> {block.out_channels} and pixels "
            f"{tuple(x.shape[2:])} -> {tuple(u.shape[2:])}: it needs the input's own size and channels"
        )


def check_depthwise(x: Tensor, weight: Tensor, bn: BatchNorm, stride: int, padding: Padding) -> None:
    """Everything `functional.depthwise_bn_act` needs of its arguments; ValueError otherwise."""
    _check_image(x, weight.shape[0])
    height, width = _check_geometry("weight", x, (x.shape[2], x.shape[3]), weight, x.shape[1], stride, padding)
    _check_batch_norm("bn", bn, x.shape[1], x, x.shape[0] * height * width)


def check_squeeze_excite(x: Tensor, se: SqueezeExcite, channels: int) -> None:
    """Everything `functional.squeeze_excite` needs of its arguments; ValueError otherwise."""
    _check_image(x, se.reduce_weight.shape[1] if se.reduce_weight.dim() in (2, 4) else channels)
    _check_excite(se, x.shape[1], x)


def _check_image(x: Tensor, channels: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}: expected a tensor [N, C, H, W]")
    if x.dim() != 4:
        raise ValueError(f"x has {x.dim()} dimensions, shape {tuple(x.shape)}: expected 4, [N, C, H, W]")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: expected a floating-point dtype")
    if x.shape[1] != channels:
        raise ValueError(f"x has {x.shape[1]} channels, shape {tuple(x.shape)}: the weights expect {channels}")


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}: expected {shape}")
    _check_device(name, weight, x)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} has dtype {weight.dtype} and x has {x.dtype}: expected the same, or autocast")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: expected one device")


def _check_geometry(
    name: str,
    x: Tensor,
    size: tuple[int, int],
    weight: Tensor,
    channels: int,
    stride: int,
    padding: Padding,
    owner: str = "",
) -> tuple[int, int]:
    """Pixels of a depthwise convolution's output, from those of its input; `owner` precedes the settings' names."""
    k = weight.shape[-1]
    _check_weight(name, weight, (channels, 1, k, k), x)
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"{owner}stride is {stride!r}: expected an integer >= 1")
    if padding != "same" and not all(isinstance(side, int) and side >= 0 for side in _sides(padding)):
        raise ValueError(f"{owner}padding is {padding!r}: expected an integer >= 0, a pair of them or 'same'")
    height, width = (output_size(s, sum(pads(s, k, stride, padding)), k, stride) for s in size)
    if height < 1 or width < 1:
        raise ValueError(f"x is {x.shape[2]} x {x.shape[3]} pixels: too small for kernel size {k}, padding {padding!r}")
    return height, width


def _sides(padding: Padding) -> tuple[object, ...]:
    return padding if isinstance(padding, tuple) and len(padding) == 2 else (padding,)


def _check_batch_norm(name: str, bn: BatchNorm, channels: int, x: Tensor, values: int) -> None:
    for part in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(bn, part)
        if tensor is None:
            continue
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name}.{part} has shape {tuple(tensor.shape)}: expected ({channels},)")
        _check_device(f"{name}.{part}", tensor, x)
    if bn.conv_bias is not None:
        _check_weight(f"{name}.conv_bias", bn.conv_bias, (channels,), x)
    if bn.eps < 0:
        raise ValueError(f"{name}.eps is {bn.eps}: expected >= 0")
    if bn.batch_statistics and bn.group is None and values == 1:
        raise ValueError(f"{name}: expected more than 1 value per channel when training, x has shape {tuple(x.shape)}")


def _check_excite(se: SqueezeExcite, channels: int, x: Tensor) -> None:
    reduced = se.reduce_weight.shape[0]
    _check_mixing("se.reduce_weight", se.reduce_weight, (reduced, channels), x)
    if se.reduce_bias is not None:
        _check_weight("se.reduce_bias", se.reduce_bias, (reduced,), x)
    _check_mixing("se.expand_weight", se.expand_weight, (channels, reduced), x)
    if se.expand_bias is not None:
        _check_weight("se.expand_bias", se.expand_bias, (channels,), x)


def _check_mixing(name: str, weight: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    """A 1x1 convolution's weight, or a linear layer's."""
    _check_weight(name, weight, shape if weight.dim() == 2 else (*shape, 1, 1), x)
