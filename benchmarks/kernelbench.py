"""KernelBench's six MBConv models, level 3, problems 19 to 24, written anew with the structure that they have there.

Source: ScalingIntelligence/KernelBench, commit 423217d, KernelBench/level3/. Layers, their nesting, attribute names,
constructor arguments, initialisation, batch and image sizes are the originals'; so is what is odd in them:
* MobileNetV2's blocks have no residual: the original computes whether there is one, and drops it.
* EfficientNetB0's residual is an in-place `x += identity`, and only blocks that expand have an `expand_conv`.
* EfficientNetB1 expands by 1 with a convolution, and has no residual and no gate.
* EfficientNetB2 pools the depthwise output and computes a gate from it, which is projected itself and multiplies
  nothing: every image is a single pixel from the first block on, and none of its blocks is an MBConv.
KernelBench times the forward alone: fp32 inputs, training mode (nothing there calls `eval`), under `no_grad`, in NCHW,
with PyTorch's defaults, so convolutions may take TF32. `Problem.published` are the means that it publishes for eager
and for torch.compile (results/timing/H100_Modal: an H100 of 80 GB with HBM3, PyTorch 2.5.0): another GPU, another
host and another PyTorch than a reader's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmbconv

if TYPE_CHECKING:
    from fastmbconv.swap import Explanation

Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """`make()` is the model, in training mode, and `shape` its input.

    `small` makes the same structure smaller, for an image of `small_shape`; None where the model itself will do.
    `depthwise` counts its depthwise convolutions, `blocks` those of them that stand in a block that computes what an
    MBConv block computes. `published`: milliseconds on an H100, eager and torch.compile. `expanded` is 0 for a whole
    model, for a single block the elements of the tensor at its depthwise convolution.
    """

    number: int
    name: str
    make: Callable[[], nn.Module]
    shape: Size
    depthwise: int
    blocks: int
    published: tuple[float, float]
    small_shape: Size
    small: Callable[[], nn.Module] | None = None
    expanded: int = 0

    def explained(self, training: bool = True) -> Explanation:
        """What `fuse` makes of its blocks, and what that saves; without any tensor's memory."""
        with torch.device("meta"):
            model = fastmbconv.fuse(self.make()).train(training)
        return fastmbconv.explain(model, self.shape)

    def tiny(self) -> Problem:
        """The same structure at a size that an interpreter can run."""
        expanded = self.small_shape[0] * 2 * self.small_shape[1] * self.small_shape[2] ** 2 if self.expanded else 0
        return replace(self, make=self.small or self.make, shape=self.small_shape, expanded=expanded)


def convolve(inputs: int, outputs: int, size: int = 1, stride: int = 1, depthwise: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=inputs if depthwise else 1, bias=False)


class MobileNetV1(nn.Module):
    """Problem 19: flat runs of depthwise and pointwise convolution in one outer Sequential."""

    STAGES = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self, num_classes: int = 1000, input_channels: int = 3, alpha: float = 1.0) -> None:
        super().__init__()
        width = int(32 * alpha)
        parts: list[nn.Module] = [
            nn.Sequential(convolve(input_channels, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        ]
        for channels, stride in self.STAGES:
            before, width = width, int(channels * alpha)
            depthwise = (convolve(before, before, 3, stride, True), nn.BatchNorm2d(before), nn.ReLU(inplace=True))
            parts.append(
                nn.Sequential(*depthwise, convolve(before, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            )
        self.model = nn.Sequential(*parts, nn.AvgPool2d(7))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        return self.fc(x.view(x.size(0), -1))


class MobileNetV2(nn.Module):
    """Problem 20: stem and head lie flat in `features`, and between them each block as a Sequential of its own."""

    STAGES = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        width, last = 32, 1280
        features: list[nn.Module] = [convolve(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU6(inplace=True)]
        for ratio, channels, repeats, first_stride in self.STAGES:
            for repeat in range(repeats):
                features.append(self.block(width, channels, first_stride if repeat == 0 else 1, ratio))
                width = channels
        features += [convolve(width, last), nn.BatchNorm2d(last), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d((1, 1))]
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(last, num_classes))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out")
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0, 0.01)
                nn.init.zeros_(part.bias)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int, ratio: int) -> nn.Sequential:
        hidden = inputs * ratio
        layers: list[nn.Module] = []
        if ratio != 1:
            layers = [convolve(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [convolve(hidden, hidden, 3, stride, True), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        return nn.Sequential(*layers, convolve(hidden, outputs), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class MBConv(nn.Module):
    """Problem 21, and the block of problem 22: three Sequentials, the first only where there is an expansion."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        self.use_residual = stride == 1 and in_channels == out_channels
        hidden = in_channels * expand_ratio
        if expand_ratio != 1:
            self.expand_conv = nn.Sequential(
                convolve(in_channels, hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
            )
        self.depthwise_conv = nn.Sequential(
            convolve(hidden, hidden, kernel_size, stride, True), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
        )
        self.project_conv = nn.Sequential(convolve(hidden, out_channels), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if hasattr(self, "expand_conv"):
            x = self.expand_conv(x)
        x = self.project_conv(self.depthwise_conv(x))
        if self.use_residual:
            x += identity
        return x


class EfficientNetB0(nn.Module):
    """Problem 22: blocks with a forward of their own, in one Sequential; ReLU around them."""

    BLOCKS = (
        (16, 3, 1, 1), (24, 3, 2, 6), (24, 3, 1, 6), (40, 5, 2, 6), (40, 5, 1, 6), (80, 3, 2, 6), (80, 3, 1, 6),
        (112, 5, 1, 6), (112, 5, 1, 6), (192, 5, 2, 6), (192, 5, 1, 6), (192, 5, 1, 6), (320, 3, 1, 6),
    )  # fmt: skip

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolve(3, 32, 3, 2), nn.BatchNorm2d(32)
        widths = (32, *(block[0] for block in self.BLOCKS))
        self.blocks = nn.Sequential(
            *(MBConv(before, *block) for before, block in zip(widths, self.BLOCKS, strict=False))
        )
        self.conv2, self.bn2 = convolve(320, 1280), nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.fc(x.view(x.size(0), -1))


class EfficientNetB1(nn.Module):
    """Problem 23: seven flat Sequentials, each an attribute of the model."""

    BLOCKS = ((16, 1, 1), (24, 2, 6), (40, 2, 6), (80, 2, 6), (112, 1, 6), (192, 2, 6), (320, 1, 6))

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        width = 32
        self.conv1, self.bn1 = convolve(3, width, 3, 2), nn.BatchNorm2d(width)
        for number, (channels, stride, ratio) in enumerate(self.BLOCKS, 1):
            setattr(self, f"mbconv{number}", self.block(width, channels, stride, ratio))
            width = channels
        self.conv2, self.bn2 = convolve(width, 1280), nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, num_classes)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int, ratio: int) -> nn.Sequential:
        hidden = inputs * ratio
        return nn.Sequential(
            convolve(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            convolve(hidden, hidden, 3, stride, True), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            convolve(hidden, outputs), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.mbconv3(self.mbconv2(self.mbconv1(x)))
        x = self.mbconv7(self.mbconv6(self.mbconv5(self.mbconv4(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class EfficientNetB2(nn.Module):
    """Problem 24: flat Sequentials in which the pool and the gate's layers stand where a gated tensor would be."""

    BLOCKS = ((96, 1, 3), (144, 2, 6), (192, 2, 6), (288, 2, 6), (384, 1, 6))

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        width = 32
        self.conv1, self.bn1, self.relu = convolve(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        for number, (channels, stride, ratio) in enumerate(self.BLOCKS, 1):
            setattr(self, f"mbconv{number}", self.block(width, channels, stride, ratio))
            width = channels
        self.conv_final, self.bn_final = convolve(width, 1408), nn.BatchNorm2d(1408)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(1408, num_classes)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int, ratio: int) -> nn.Sequential:
        hidden = inputs * ratio
        return nn.Sequential(
            convolve(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True),
            convolve(hidden, hidden, 3, stride, True), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d((1, 1)),
            convolve(hidden, hidden // 4), nn.ReLU(inplace=True), convolve(hidden // 4, hidden), nn.Sigmoid(),
            convolve(hidden, outputs), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.mbconv5(self.mbconv4(self.mbconv3(self.mbconv2(self.mbconv1(x)))))
        x = self.avgpool(self.relu(self.bn_final(self.conv_final(x))))
        return self.fc(torch.flatten(x, 1))


# Of 32 pixels the last stages have 1: a batch statistic of two images would make any rounding large.
_PHOTOS, _TINY = (10, 3, 224, 224), (8, 3, 32, 32)
_ALL = (
    # Its AvgPool2d(7) leaves no pixel of a smaller image.
    Problem(
        19, "MobileNetV1", MobileNetV1, _PHOTOS, 13, 13, (1.73, 1.81),
        (1, 3, 224, 224), partial(MobileNetV1, 10, 3, 0.25),
    ),
    Problem(20, "MobileNetV2", MobileNetV2, _PHOTOS, 17, 17, (3.56, 3.20), _TINY),
    Problem(
        21, "EfficientNetMBConv", partial(MBConv, 112, 192, 5, 2, 6), (10, 112, 224, 224), 1, 1, (5.43, 3.62),
        (2, 8, 8, 8), partial(MBConv, 8, 16, 5, 2, 2), 10 * 6 * 112 * 224**2,
    ),
    Problem(22, "EfficientNetB0", EfficientNetB0, _PHOTOS, 13, 13, (3.03, 3.21), _TINY),
    Problem(23, "EfficientNetB1", EfficientNetB1, (10, 3, 240, 240), 7, 7, (1.62, 2.19), _TINY),
    Problem(24, "EfficientNetB2", EfficientNetB2, (2, 3, 224, 224), 5, 0, (1.64, 1.66), _TINY),
)  # fmt: skip
NOTHING_FUSED = "fuse finds no MBConv block in it"
PROBLEMS = {problem.name: problem for problem in _ALL}
