"""EfficientNets, and transformers that begin with their blocks, as people write them, small. See written.py."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def swish(x):
    return x * x.sigmoid()


class SwishFunction(torch.autograd.Function):
    """Keeps only its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


class FrugalSwish(nn.Module):
    def forward(self, x):
        return SwishFunction.apply(x)


class PooledSE(nn.Module):
    """Pool and two convolutions in a Sequential; the sigmoid is a function outside of it."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), Swish(), nn.Conv2d(squeezed, channels, 1)
        )

    def forward(self, x):
        return x * torch.sigmoid(self.se(x))


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME from the image's size: an odd row and column in front of a convolution that pads evenly."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, groups=1):
        super().__init__(inputs, outputs, kernel_size, stride, 0, groups=groups, bias=False)

    def missing(self, size, axis):
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        return max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)

    def forward(self, x):
        rows, columns = self.missing(x.shape[2], 0), self.missing(x.shape[3], 1)
        if rows % 2 or columns % 2:
            x = F.pad(x, [0, columns % 2, 0, rows % 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (rows // 2, columns // 2), self.dilation, self.groups)


class StaticSameConv2d(nn.Conv2d):
    """The same for an image size that is known before, by a ZeroPad2d of its own."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, groups=1, image_size=8):
        super().__init__(inputs, outputs, kernel_size, stride, groups=groups, bias=False)
        total = max((math.ceil(image_size / stride) - 1) * stride + kernel_size - image_size, 0)
        before, after = total // 2, total - total // 2
        self.static_padding = nn.ZeroPad2d((before, after, before, after)) if total else nn.Identity()

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PaddedBlock(nn.Module):
    """EfficientNet with a convolution class of its own; Identity for what a block has not."""

    def __init__(self, inputs, outputs, expand, kernel_size, stride, conv, act=Swish):
        super().__init__()
        hidden = inputs * expand

        def layers(before, after, size, step=1, groups=1):
            return nn.Sequential(conv(before, after, size, step, groups), nn.BatchNorm2d(after, 1e-3, 0.01), act())

        self.expand_conv = layers(inputs, hidden, 1) if expand != 1 else nn.Identity()
        self.depth_wise_conv = layers(hidden, hidden, kernel_size, stride, hidden)
        self.se = PooledSE(hidden, max(1, inputs // 4))
        self.project_conv = nn.Sequential(conv(hidden, outputs, 1), nn.BatchNorm2d(outputs, 1e-3, 0.01))
        self.skip = stride == 1 and inputs == outputs
        self.dropconnect = nn.Identity()

    def forward(self, inputs):
        x = self.depth_wise_conv(self.expand_conv(inputs))
        x = self.project_conv(self.se(x))
        if self.skip:
            x = self.dropconnect(x) + inputs
        return x


def plain_conv(inputs, outputs, kernel_size, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


class LayerBlock(nn.Module):
    """Every layer an attribute; how the gate, the activation and the sum are spelled is a subclass's."""

    def __init__(self, inputs, outputs, stride=1, expand=2, kernel_size=3, use_se=True, drop_rate=0.0):
        super().__init__()
        hidden, squeezed = inputs * expand, max(1, inputs // 4)
        self.use_se, self.expand = use_se, expand != 1
        self.has_residual, self.drop_rate = stride == 1 and inputs == outputs, drop_rate
        if self.expand:
            self.conv_pw, self.bn1 = plain_conv(inputs, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv_dw, self.bn2 = plain_conv(hidden, hidden, kernel_size, stride, hidden), nn.BatchNorm2d(hidden)
        if use_se:
            self.reduce, self.restore = nn.Conv2d(hidden, squeezed, 1), nn.Conv2d(squeezed, hidden, 1)
        self.conv_pwl, self.bn3 = plain_conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)


class MeanBlock(LayerBlock):
    """The gate from `mean`, swish as a function, the sum in place; what a block has not is skipped by its flags."""

    def forward(self, x):
        identity = x
        if self.expand:
            x = swish(self.bn1(self.conv_pw(x)))
        x = swish(self.bn2(self.conv_dw(x)))
        if self.use_se:
            gate = x.mean((2, 3), keepdim=True)
            x = x * self.restore(swish(self.reduce(gate))).sigmoid()
        x = self.bn3(self.conv_pwl(x))
        if self.has_residual:
            x += identity
        return x


def drop_connect(x, rate, training):
    if not training:
        return x
    keep = 1 - rate
    mask = torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device) + keep
    return x / keep * torch.floor(mask)


class ArgumentBlock(LayerBlock):
    """The rate comes with each call; functional pool and activation, `torch.add`, `torch.mul`."""

    def forward(self, x, drop_connect_rate=None):
        h = F.silu(self.bn1(self.conv_pw(x))) if self.expand else x
        h = F.silu(self.bn2(self.conv_dw(h)))
        if self.use_se:
            pooled = F.adaptive_avg_pool2d(h, 1)
            h = torch.mul(h, torch.sigmoid(self.restore(F.silu(self.reduce(pooled)))))
        h = self.bn3(self.conv_pwl(h))
        if self.has_residual:
            if drop_connect_rate:
                h = drop_connect(h, drop_connect_rate, self.training)
            h = torch.add(h, x)
        return h


class ArgumentModel(nn.Module):
    """Scales the rate with the block's number and passes it on."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self._blocks = nn.ModuleList([ArgumentBlock(8, 8, expand=1), ArgumentBlock(8, 8), ArgumentBlock(8, 12, 2)])

    def forward(self, x):
        for index, block in enumerate(self._blocks):
            rate = self.rate * float(index) / len(self._blocks) if self.rate else None
            x = block(x, drop_connect_rate=rate)
        return x


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(keep) / keep


class DropPathBlock(LayerBlock):
    """Stochastic depth by a module of the author's, which has no parameters; the gate by views."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.act = nn.SiLU(inplace=True)
        self.drop_path = DropPath(self.drop_rate)

    def forward(self, x):
        shortcut = x
        x = self.act(self.bn1(self.conv_pw(x)))
        x = self.act(self.bn2(self.conv_dw(x)))
        if self.use_se:
            gate = x.view(x.size(0), x.size(1), -1).mean(-1).view(x.size(0), x.size(1), 1, 1)
            x = x * self.restore(self.act(self.reduce(gate))).sigmoid()
        x = self.bn3(self.conv_pwl(x))
        return shortcut + self.drop_path(x) if self.has_residual else x


class CheckpointedBlock(MeanBlock):
    """Computed again in the backward, to keep less."""

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


class AssertingBlock(MeanBlock):
    """Checks what it gets."""

    def forward(self, x):
        assert x.dim() == 4 and x.size(1) == self.conv_pw.in_channels, f"expected {self.conv_pw.in_channels} channels"
        return super().forward(x)


class CNNBlock(nn.Module):
    """Convolution, BatchNorm and an activation, or Identity where none is wanted."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, groups=1, act=True):
        super().__init__()
        self.cnn = plain_conv(inputs, outputs, kernel_size, stride, groups)
        self.bn, self.silu = nn.BatchNorm2d(outputs), nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        return self.silu(self.bn(self.cnn(x)))


class TutorialSE(nn.Module):
    def __init__(self, channels, reduced):
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, reduced, 1), nn.SiLU(),
            nn.Conv2d(reduced, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        return x * self.se(x)


class SurvivalBlock(nn.Module):
    """A tutorial's: stochastic depth is a method, its mask a comparison."""

    def __init__(self, inputs, outputs, kernel_size, stride, expand, survival_prob=0.8):
        super().__init__()
        hidden = inputs * expand
        self.survival_prob, self.use_residual = survival_prob, inputs == outputs and stride == 1
        self.expand = inputs != hidden
        if self.expand:
            self.expand_conv = CNNBlock(inputs, hidden, 1)
        self.conv = nn.Sequential(
            CNNBlock(hidden, hidden, kernel_size, stride, groups=hidden),
            TutorialSE(hidden, inputs // 4),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def stochastic_depth(self, x):
        if not self.training:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < self.survival_prob
        return torch.div(x, self.survival_prob) * kept

    def forward(self, inputs):
        x = self.expand_conv(inputs) if self.expand else inputs
        if self.use_residual:
            return self.stochastic_depth(self.conv(x)) + inputs
        return self.conv(x)


class RatioSE(nn.Module):
    """Two Linear layers; its reduction is of the block's input."""

    def __init__(self, inputs, channels, act, bias=True):
        super().__init__()
        self.avg_pool, reduced = nn.AdaptiveAvgPool2d(1), max(1, inputs // 4)
        self.fc = nn.Sequential(
            nn.Linear(channels, reduced, bias=bias), act(), nn.Linear(reduced, channels, bias=bias), nn.Sigmoid()
        )

    def forward(self, x):
        y = self.avg_pool(x).flatten(1)
        return x * self.fc(y)[:, :, None, None]


class V2Block(nn.Module):
    """EfficientNetV2: with the gate an MBConv, without it a Fused-MBConv."""

    def __init__(self, inp, oup, stride, expand_ratio, use_se):
        super().__init__()
        hidden = inp * expand_ratio
        self.identity = stride == 1 and inp == oup
        project = (plain_conv(hidden, oup, 1), nn.BatchNorm2d(oup))
        if use_se:
            expand = (plain_conv(inp, hidden, 1), nn.BatchNorm2d(hidden), nn.SiLU())
            depthwise = (plain_conv(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden), nn.SiLU())
            self.conv = nn.Sequential(*expand, *depthwise, RatioSE(inp, hidden, nn.SiLU), *project)
        else:
            self.conv = nn.Sequential(plain_conv(inp, hidden, 3, stride), nn.BatchNorm2d(hidden), nn.SiLU(), *project)

    def forward(self, x):
        return x + self.conv(x) if self.identity else self.conv(x)


class PreNorm(nn.Module):
    def __init__(self, channels, fn):
        super().__init__()
        self.norm, self.fn = nn.BatchNorm2d(channels), fn

    def forward(self, x, **kwargs):
        return self.fn(self.norm(x), **kwargs)


class CoAtNetBlock(nn.Module):
    """GELU; where it downsamples the stride is the expansion's, and the shortcut pools and projects."""

    def __init__(self, inp, oup, downsample=False, expansion=2, prenorm=False):
        super().__init__()
        self.downsample, hidden = downsample, inp * expansion
        if downsample:
            self.pool, self.proj = nn.MaxPool2d(3, 2, 1), plain_conv(inp, oup, 1)
        conv = nn.Sequential(
            plain_conv(inp, hidden, 1, 2 if downsample else 1), nn.BatchNorm2d(hidden), nn.GELU(),
            plain_conv(hidden, hidden, 3, 1, hidden), nn.BatchNorm2d(hidden), nn.GELU(),
            RatioSE(inp, hidden, nn.GELU, bias=False), plain_conv(hidden, oup, 1), nn.BatchNorm2d(oup),
        )  # fmt: skip
        self.conv = PreNorm(inp, conv) if prenorm else conv

    def forward(self, x):
        if self.downsample:
            return self.proj(self.pool(x)) + self.conv(x)
        return x + self.conv(x)


class Reduce(nn.Module):
    """[N, C, H, W] to [N, C], as einops' layer does it."""

    def forward(self, x):
        return x.flatten(2).mean(dim=-1)


class UnflattenSE(nn.Module):
    """Reduce to [N, C], then back to [N, C, 1, 1]."""

    reduced = (Reduce,)

    def __init__(self, channels, act):
        super().__init__()
        self.gate = nn.Sequential(
            *(make() for make in self.reduced), nn.Linear(channels, channels // 4, bias=False), act(),
            nn.Linear(channels // 4, channels, bias=False), nn.Sigmoid(), nn.Unflatten(1, (channels, 1, 1)),
        )  # fmt: skip

    def forward(self, x):
        return x * self.gate(x)


class WindowSE(UnflattenSE):
    """Its window has to be the image."""

    reduced = (partial(nn.AvgPool2d, 8), nn.Flatten)


class SlicedSE(UnflattenSE):
    """Calls a part of its Sequential, which is a new one each time."""

    def forward(self, x):
        return x * self.gate[1:](x.mean((2, 3)))


class ResidualWrapper(nn.Module):
    """Anything, dropped per sample in training, plus its input."""

    def __init__(self, fn, dropout=0.0):
        super().__init__()
        self.fn, self.dropsample = fn, DropPath(dropout)

    def forward(self, x):
        out = self.dropsample(self.fn(x))
        return out + x


def maxvit_block(inputs, outputs, downsample=False, act=nn.SiLU, bias=False, gate=UnflattenSE, dropout=0.0):
    """A Sequential from a function, in a wrapper where there is a residual."""
    hidden = 2 * outputs
    net = nn.Sequential(
        nn.Conv2d(inputs, hidden, 1, bias=bias), nn.BatchNorm2d(hidden), act(),
        nn.Conv2d(hidden, hidden, 3, 2 if downsample else 1, 1, groups=hidden, bias=bias),
        nn.BatchNorm2d(hidden), act(), gate(hidden, nn.SiLU),
        nn.Conv2d(hidden, outputs, 1, bias=bias), nn.BatchNorm2d(outputs),
    )  # fmt: skip
    return ResidualWrapper(net, dropout) if inputs == outputs and not downsample else net


class Conv2d_BN(nn.Sequential):
    """Two children, `c` and `bn`, and the wish to fold them later."""

    def __init__(self, inputs, outputs, size=1, stride=1, padding=0, groups=1, weight=1.0):
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))
        nn.init.constant_(self.bn.weight, weight)


class TinyViTBlock(nn.Module):
    """GELU, and once more behind the sum; the last BatchNorm begins at zero."""

    def __init__(self, channels, expand_ratio, activation=nn.GELU, drop_path=0.0):
        super().__init__()
        hidden = channels * expand_ratio
        self.conv1, self.act1 = Conv2d_BN(channels, hidden), activation()
        self.conv2, self.act2 = Conv2d_BN(hidden, hidden, 3, 1, 1, groups=hidden), activation()
        self.conv3, self.act3 = Conv2d_BN(hidden, channels, weight=0.0), activation()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        shortcut = x
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        x = self.drop_path(self.conv3(x))
        x += shortcut
        return self.act3(x)
