"""What is compared: a module with two ways to run it, `forward` (fused) and `forward_eager` (plain PyTorch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastmbconv
from benchmarks.kernelbench import Problem
from benchmarks.registry import BATCHES, Shape
from fastmbconv import functional, reference
from fastmbconv.block import Activation, BatchNorm, Block, DenseBlock, Memory
from fastmbconv.dense import dense_mbconv
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.ends import ConvBNAct
from fastmbconv.mbconv import ACTIVATIONS, MBConv, SqueezeExcitation, StochasticDepth
from fastmbconv.scaling import COEFFICIENTS, Coefficients

MODES = ("fwd_no_grad", "fwd_bwd")  # evaluation without gradients; training, forward and backward
TRAINING_FORWARD = "fwd_training"  # BatchNorms train, and no gradient is wanted: what KernelBench times


@dataclass(frozen=True)
class Subject:
    """`make()` gives a fresh module; inputs are [N, C, H, W] of `size`; `elements` is E, 0 for a whole model."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, int, int, int]
    elements: int
    model: str
    count: int = 1


class DepthwiseBnAct(nn.Module):
    """act(BN(depthwise(x)))."""

    def __init__(self, channels: int, kernel_size: int, stride: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.activation, self.act = activation, ACTIVATIONS[activation]()
        self.stride, self.padding = stride, kernel_size // 2
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, self.padding, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.depthwise_bn_act(
            x, self.conv.weight, BatchNorm.of(self.bn), self.stride, self.padding, self.activation
        )

    def forward_eager(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class SqueezeExcite(SqueezeExcitation):
    """x * gate(mean of x)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.squeeze_excite(x, self.describe())

    def forward_eager(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FusedMBConv(nn.Module):
    """EfficientNetV2's early block: dense 3x3, BN, act, [SE, project, BN,] [+ x].

    With a residual half of the images are dropped in training.
    """

    def __init__(
        self,
        channels: int,
        expand_ratio: int,
        out: int | None = None,
        stride: int = 1,
        squeeze: int = 0,
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        self.activation = activation
        hidden, out = channels * expand_ratio, out or channels
        self.stride, self.residual = stride, stride == 1 and out == channels
        self.conv, self.bn1 = nn.Conv2d(channels, hidden, 3, stride, 1, bias=False), nn.BatchNorm2d(hidden)
        self.se = SqueezeExcitation(hidden, squeeze, activation) if squeeze else None
        self.project = self.bn2 = None
        if expand_ratio > 1:
            self.project, self.bn2 = nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)
        self.drop = StochasticDepth(0.5)

    def describe(self) -> DenseBlock:
        return DenseBlock(
            conv=self.conv,
            weight=self.conv.weight,
            stride=self.stride,
            padding=1,
            bn1=BatchNorm.of(self.bn1),
            se=None if self.se is None else self.se.describe(),
            project_weight=None if self.project is None else self.project.weight,
            bn2=None if self.bn2 is None else BatchNorm.of(self.bn2),
            activation=self.activation,
            residual=self.residual,
            drop=self.drop if self.training and self.residual else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        return dense_mbconv(x, self.describe())

    def forward_eager(self, x: Tensor) -> Tensor:
        return reference.dense_mbconv(x, self.describe())


class Fused(nn.Module):
    """A whole model: `forward_eager` is the model as its library made it, `forward` the same model after `fuse`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._swapped = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._swapped:
            self.model, self._swapped = fastmbconv.fuse(self.model), True
        return self.model(x)

    def forward_eager(self, x: Tensor) -> Tensor:
        return self.model(x)


def mbconv(shape: Shape) -> Subject:
    size = (shape.batch, shape.in_channels, shape.size, shape.size)
    return Subject(f"mbconv {shape.name}", shape.block, size, shape.elements, shape.model, shape.count)


def depthwise(shape: Shape) -> Subject:
    size = (shape.batch, shape.hidden, shape.size, shape.size)
    name = f"depthwise_bn_act n{shape.batch} {shape.size}px {shape.hidden} k{shape.kernel_size}s{shape.stride}"

    def make() -> nn.Module:
        return DepthwiseBnAct(shape.hidden, shape.kernel_size, shape.stride, shape.activation)

    return Subject(name, make, size, shape.elements, shape.model, shape.count)


def fused_mbconv(shape: Shape) -> Subject:
    size = (2, shape.in_channels, shape.size, shape.size)

    def make() -> nn.Module:
        return FusedMBConv(shape.in_channels, 4, activation=shape.activation)

    return Subject(f"fused_mbconv {shape.name}", make, size, shape.elements, "v2")


def fused_mbconv_excited(shape: Shape) -> Subject:
    size, channels = (2, shape.in_channels, shape.size, shape.size), shape.in_channels
    name = f"fused_mbconv with se {shape.name}"

    def make() -> nn.Module:
        return FusedMBConv(channels, 4, squeeze=channels // 4, activation=shape.activation)

    return Subject(name, make, size, shape.elements, "v2")


def fused_mbconv_single(shape: Shape) -> Subject:
    size = (2, shape.in_channels, shape.size, shape.size)

    def make() -> nn.Module:
        return FusedMBConv(shape.in_channels, 1, activation=shape.activation)

    return Subject(f"conv_bn_act {shape.name}", make, size, shape.elements, "v2")


def squeeze_excite(shape: Shape) -> Subject:
    size = (shape.batch, shape.hidden, shape.out_size, shape.out_size)
    name = f"squeeze_excite n{shape.batch} {shape.out_size}px {shape.hidden}"

    def make() -> nn.Module:
        return SqueezeExcite(shape.hidden, max(1, shape.in_channels // 4), shape.activation)

    elements = shape.elements * shape.out_size**2 // shape.size**2
    return Subject(name, make, size, elements, shape.model, shape.count)


class Ends(nn.Module):
    """A stem's BN and activation, and a head with its pool, on one image: what stands around the blocks."""

    def __init__(self, in_channels: int, out_channels: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.stem = ConvBNAct(in_channels, in_channels, 3, 2, 1, activation, 1e-5, 0.1)
        self.head = ConvBNAct(in_channels, out_channels, 1, 1, 0, activation, 1e-5, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.pooled(self.stem(x))

    def forward_eager(self, x: Tensor) -> Tensor:
        stem, head = self.stem, self.head
        return head.act(head.bn(head.conv(stem.act(stem.bn(stem.conv(x)))))).mean((2, 3))


def ends(shape: Shape) -> Subject:
    size = (shape.batch, shape.in_channels, shape.size, shape.size)
    name = f"ends n{shape.batch} {shape.size}px {shape.in_channels}-{shape.hidden}"

    def make() -> nn.Module:
        return Ends(shape.in_channels, shape.hidden, shape.activation)

    return Subject(name, make, size, shape.elements, shape.model, shape.count)


def whole(model: str, batch: int | None = None) -> Subject:
    """timm's model where timm is installed, since that is what people swap into; else the package's own."""
    name = f"efficientnet_{model}"
    resolution = COEFFICIENTS[model].resolution
    size = (batch or BATCHES[model], 3, resolution, resolution)
    title = f"{name} n{size[0]} {resolution}px"
    try:
        import timm
    except (ImportError, RuntimeError):  # a torchvision that does not fit torch raises the latter
        return Subject(f"{title} (fastmbconv's)", lambda: _own(COEFFICIENTS[model]), size, 0, model)
    return Subject(f"{title} (timm's)", lambda: Fused(timm.create_model(name)), size, 0, model)


def tiny_model() -> Subject:
    """One block between a stem and a classifier, at a size that an interpreter can run."""

    def make() -> nn.Module:
        stem, block = nn.Conv2d(3, 8, 3, 2, 1), MBConv(8, 8, 3, 1, 2)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        return Fused(fastmbconv.unfuse(nn.Sequential(stem, block, *head)))

    return Subject("tiny model n2 12px", make, (2, 3, 12, 12), 0, "tiny")


def kernelbench(problem: Problem) -> Subject:
    """A model of KernelBench's, as it is written there and after `fuse`."""
    name = f"kernelbench {problem.number} {problem.name} n{problem.shape[0]} {problem.shape[2]}px"
    return Subject(name, lambda: Fused(problem.make()), problem.shape, problem.expanded, f"kernelbench{problem.number}")


def _own(coefficients: Coefficients) -> nn.Module:
    return Fused(fastmbconv.unfuse(EfficientNet(coefficients, dropout=0.0, drop_path=0.0)))


@contextmanager
def left_eager(avoided: Iterable[str]) -> Iterator[set[str]]:
    """Inside the `with` block the blocks of these subjects run eager wherever a model has them; yields who did."""
    ends = {what.split(" ", 2)[-1] for what in avoided if what.startswith("mbconv ")}
    left: set[str] = set()
    fused = functional.mbconv

    def mbconv(x: Tensor, block: Block, *, eager: Any = None, memory: Memory = "fast") -> Tensor:
        channels = f"{x.shape[1]}-{block.depthwise_weight.shape[0]}-{len(block.project_weight)}"
        name = f"n{len(x)} {x.shape[2]}px {channels} k{block.kernel_size}s{block.stride}"
        if name not in ends:
            return fused(x, block, eager=eager, memory=memory)
        left.add(name)
        return reference.mbconv(x, block) if eager is None else eager(x)

    with mock.patch.object(functional, "mbconv", mbconv):
        yield left


def settle(module: nn.Module) -> nn.Module:
    """Random but sane BN parameters and statistics, so that no term is one or zero by accident."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor, low in ((part.weight, 0.5), (part.bias, -0.5), (part.running_mean, -0.1)):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
                part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return module
