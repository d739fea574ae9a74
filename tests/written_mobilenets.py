"""MobileNets as people write them, small: each class spells the same block in another author's way. See written.py."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


def stem(width, act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), act())


def classifier(width):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class SeparableBlock(nn.Module):
    """MobileNetV1 for CIFAR: two convolutions and a functional ReLU behind each."""

    def __init__(self, in_planes, out_planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, in_planes, 3, stride, 1, groups=in_planes, bias=False)
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv2 = nn.Conv2d(in_planes, out_planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)))


class FlatInvertedResidual(nn.Module):
    """MobileNetV2: everything in one Sequential, which the residual goes around."""

    def __init__(self, inp, oup, stride, expand_ratio, act=nn.ReLU6):
        super().__init__()
        hidden = round(inp * expand_ratio)
        self.identity = stride == 1 and inp == oup
        depthwise = [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            act(inplace=True),
            nn.Conv2d(hidden, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        ]
        expand = [nn.Conv2d(inp, hidden, 1, 1, 0, bias=False), nn.BatchNorm2d(hidden), act(inplace=True)]
        self.conv = nn.Sequential(*depthwise) if expand_ratio == 1 else nn.Sequential(*expand, *depthwise)

    def forward(self, x):
        if self.identity:
            return x + self.conv(x)
        else:
            return self.conv(x)


class MV2Block(FlatInvertedResidual):
    """MobileViT's: the same with SiLU, and the sum the other way round."""

    def __init__(self, inp, oup, stride=1, expansion=4):
        super().__init__(inp, oup, stride, expansion, nn.SiLU)

    def forward(self, x):
        out = self.conv(x)
        if self.identity:
            out = out + x
        return out


class ConvBNReLU(nn.Sequential):
    def __init__(self, in_planes, out_planes, kernel_size=3, stride=1, groups=1):
        super().__init__(
            nn.Conv2d(in_planes, out_planes, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_planes),
            nn.ReLU6(inplace=True),
        )


class LayeredInvertedResidual(nn.Module):
    """The same by a Sequential of ConvBNReLU, whose last two layers lie flat beside them."""

    def __init__(self, inp, oup, stride, expand_ratio):
        super().__init__()
        hidden = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        layers = [] if expand_ratio == 1 else [ConvBNReLU(inp, hidden, kernel_size=1)]
        layers += [ConvBNReLU(hidden, hidden, stride=stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, oup, 1, 1, 0, bias=False), nn.BatchNorm2d(oup)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class ShortcutBlock(nn.Module):
    """MobileNetV2 for CIFAR: the shortcut is an empty Sequential, or a convolution where the width changes."""

    def __init__(self, in_planes, out_planes, expansion, stride):
        super().__init__()
        self.stride, planes = stride, expansion * in_planes
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, groups=planes, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_planes != out_planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, out_planes, kernel_size=1, bias=False), nn.BatchNorm2d(out_planes)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class HardSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


class HardSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = HardSigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


class LinearSE(nn.Module):
    """The gate by two Linear layers; views in between."""

    def __init__(self, channels, gate=nn.Sigmoid, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            gate(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y


class ExpandAsSE(LinearSE):
    def forward(self, x):
        b, c, _, _ = x.size()
        gate = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * gate.expand_as(x)


class GatedBeforeActivation(nn.Module):
    """MobileNetV3: where it expands the gate stands between BatchNorm and activation, else behind both."""

    def __init__(self, inp, hidden, oup, kernel_size, stride, use_se, use_hs):
        super().__init__()
        self.identity = stride == 1 and inp == oup
        act = HardSwish if use_hs else nn.ReLU
        excite = LinearSE(hidden, HardSigmoid) if use_se else nn.Identity()
        depthwise = nn.Conv2d(hidden, hidden, kernel_size, stride, (kernel_size - 1) // 2, groups=hidden, bias=False)
        project = (nn.Conv2d(hidden, oup, 1, 1, 0, bias=False), nn.BatchNorm2d(oup))
        if inp == hidden:
            self.conv = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), act(), excite, *project)
        else:
            expand = (nn.Conv2d(inp, hidden, 1, 1, 0, bias=False), nn.BatchNorm2d(hidden), act())
            self.conv = nn.Sequential(*expand, depthwise, nn.BatchNorm2d(hidden), excite, act(), *project)

    def forward(self, x):
        if self.identity:
            return x + self.conv(x)
        return self.conv(x)


class FunctionalHardSwish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3.0, inplace=True) / 6.0


class GatedAfterActivation(nn.Module):
    """MobileNetV3 by another author: activation, then the gate; layers chosen as classes, Identity for what is not."""

    def __init__(self, inp, oup, kernel, stride, exp, se=False, nl="RE"):
        super().__init__()
        self.use_res_connect = stride == 1 and inp == oup
        nonlinear = nn.ReLU if nl == "RE" else FunctionalHardSwish
        self.conv = nn.Sequential(
            nn.Conv2d(inp, exp, 1, 1, 0, bias=False),
            nn.BatchNorm2d(exp),
            nonlinear(),
            nn.Conv2d(exp, exp, kernel, stride, (kernel - 1) // 2, groups=exp, bias=False),
            nn.BatchNorm2d(exp),
            nonlinear(),
            ExpandAsSE(exp) if se else nn.Identity(),
            nn.Conv2d(exp, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class NormalisedSE(nn.Module):
    """A gate with a BatchNorm inside, hard at its end."""

    def __init__(self, channels):
        super().__init__()
        reduced = max(channels // 4, 8)
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, reduced, kernel_size=1, bias=False),
            nn.BatchNorm2d(reduced),
            nn.ReLU(inplace=True),
            nn.Conv2d(reduced, channels, kernel_size=1, bias=False),
            nn.Hardsigmoid(),
        )

    def forward(self, x):
        return x * self.se(x)


class ActivatedSumBlock(nn.Module):
    """MobileNetV3 by a third: a skip of its own where the shape changes, and an activation behind the sum."""

    def __init__(self, kernel, inputs, hidden, outputs, stride, activation, gated):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.act1 = activation(inplace=True)
        pad = kernel // 2
        self.conv2 = nn.Conv2d(hidden, hidden, kernel, stride=stride, padding=pad, groups=hidden, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(hidden), activation(inplace=True)
        self.se = NormalisedSE(hidden) if gated else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.act3 = activation(inplace=True)
        self.skip = None
        if stride == 1 and inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        if stride == 2:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, groups=inputs, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, outputs, 1, bias=True),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        skip = x
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.se(out)
        out = self.bn3(self.conv3(out))
        if self.skip is not None:
            skip = self.skip(skip)
        return self.act3(out + skip)


def named_conv(inp, oup, kernel_size=3, stride=1, groups=1, bias=False, act=True):
    layers = nn.Sequential()
    padding = (kernel_size - 1) // 2
    layers.add_module("conv", nn.Conv2d(inp, oup, kernel_size, stride, padding, bias=bias, groups=groups))
    layers.add_module("BatchNorm2d", nn.BatchNorm2d(oup))
    if act:
        layers.add_module("Activation", nn.ReLU())
    return layers


class UniversalBottleneck(nn.Module):
    """MobileNetV4's: a depthwise convolution before the expansion, after it, both, or neither."""

    def __init__(self, inp, oup, start_kernel, middle_kernel, stride, expand_ratio, bias=False):
        super().__init__()
        self.use_res_connect = inp == oup and stride == 1
        self.start_kernel, self.middle_kernel = start_kernel, middle_kernel
        hidden = inp * expand_ratio
        if start_kernel:
            first_stride = 1 if middle_kernel else stride
            self._start_dw_ = named_conv(inp, inp, start_kernel, first_stride, groups=inp, bias=bias, act=False)
        self._expand_conv = named_conv(inp, hidden, 1, bias=bias)
        if middle_kernel:
            self._middle_dw = named_conv(hidden, hidden, middle_kernel, stride, groups=hidden, bias=bias)
        self._proj_conv = named_conv(hidden, oup, 1, bias=bias, act=False)

    def forward(self, x):
        shortcut = x
        if self.start_kernel:
            x = self._start_dw_(x)
        x = self._expand_conv(x)
        if self.middle_kernel:
            x = self._middle_dw(x)
        x = self._proj_conv(x)
        if self.use_res_connect:
            x = x + shortcut
        return x


class FeaturePyramid(nn.Module):
    """A backbone that loops over a ModuleList itself, and hands out what some blocks give."""

    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.blocks = nn.ModuleList([FlatInvertedResidual(8, 8, 1, 2), FlatInvertedResidual(8, 16, 2, 2)])
        self.blocks.append(FlatInvertedResidual(16, 16, 1, 2))
        self.taken = (0, 2)

    def forward(self, x):
        x, features = self.stem(x), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taken:
                features.append(x)
        return torch.cat([feature.mean((2, 3)) for feature in features], 1)


def nested_block(inp, oup, stride):
    """Sequentials in a Sequential, all named, and no forward of anybody's."""
    hidden = 2 * inp
    return nn.Sequential(
        OrderedDict(
            expand=nn.Sequential(
                OrderedDict(conv=nn.Conv2d(inp, hidden, 1, bias=False), norm=nn.BatchNorm2d(hidden), act=nn.ReLU6())
            ),
            spatial=nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
                    norm=nn.BatchNorm2d(hidden),
                    act=nn.ReLU6(),
                )
            ),
            project=nn.Sequential(nn.Conv2d(hidden, oup, 1, bias=False), nn.BatchNorm2d(oup)),
        )
    )


def flat_model():
    """Stem, two blocks and head in one Sequential, layer after layer."""
    first = FlatInvertedResidual(8, 8, 1, 1).conv
    second = FlatInvertedResidual(8, 16, 2, 3).conv
    return nn.Sequential(*stem(8), *first, *second, *classifier(16))


def flat_separable_model():
    """MobileNetV1 flat: a projection with its ReLU looks as if it were the next block's expansion."""

    def layers(inp, oup, stride):
        depthwise = nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False)
        return (
            depthwise, nn.BatchNorm2d(inp), nn.ReLU(inplace=True),
            nn.Conv2d(inp, oup, 1, bias=False), nn.BatchNorm2d(oup), nn.ReLU(inplace=True),
        )  # fmt: skip

    return nn.Sequential(*stem(8), *layers(8, 16, 1), *layers(16, 16, 2), *layers(16, 24, 1), *classifier(24))
