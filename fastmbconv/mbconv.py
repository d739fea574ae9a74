"""MBConv, the module: a mobile inverted bottleneck with squeeze-and-excitation.

Sandler et al., MobileNetV2, 2018, section 3.3; with squeeze-and-excitation: Tan & Le, EfficientNet, 2019, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn

from fastmbconv import dispatch, functional
from fastmbconv.block import Activation, BatchNorm, Block, Memory, SqueezeExcite, pads
from fastmbconv.readings import block_of
from fastmbconv.synchronised import SyncBatchNorm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)


def computes(module: nn.Module | None, activation: str) -> bool:
    """Whether a module is the one that `ACTIVATIONS` makes for this activation, and no other."""
    return _traits(module) == _expected(activation)


def _traits(module: nn.Module | None) -> tuple[object, ...]:
    return type(module), getattr(module, "approximate", None)


@cache
def _expected(activation: str) -> tuple[object, ...]:
    return _traits(ACTIVATIONS[activation]())


class StochasticDepth(nn.Module):
    """While training, drop a residual branch per sample with probability `rate`; survivors are divided by 1 - rate.

    Source: Huang et al., Deep Networks with Stochastic Depth, 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate is {rate}: allowed are 0 <= rate < 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that also takes padding="same" with a stride: TensorFlow's padding, from the input's own size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | Literal["same"] = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        fixed = 0 if padding == "same" else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, fixed, groups=groups, bias=bias)
        self.same = padding == "same"

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            (top, bottom), (left, right) = (pads(s, self.kernel_size[0], self.stride[0], "same") for s in x.shape[2:])
            x = nn.functional.pad(x, (left, right, top, bottom))
        return super().forward(x)


class SqueezeExcitation(nn.Module):
    """Channel gate: sigmoid(expand(act(reduce(mean over the image)))) * x (Hu et al., 2018; 1x1 convs with bias)."""

    _TYPES = {"reduce": nn.Conv2d, "expand": nn.Conv2d}

    def __init__(self, channels: int, reduced_channels: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced_channels, 1)
        self.act = ACTIVATIONS[activation]()
        self.expand = nn.Conv2d(reduced_channels, channels, 1)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(self.act(self.reduce(pooled))))

    def describe(self) -> SqueezeExcite:
        return SqueezeExcite(
            self.reduce.weight, _bias(self.reduce), self.expand.weight, _bias(self.expand), activation=self.activation
        )


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _replaced(module: nn.Module, types: Mapping[str, object], activation: str) -> str | None:
    """Which submodule is not of the type that it was made with, or None; `act` computes the activation."""
    for name, expected in types.items():
        child = module._modules.get(name)
        if child is not None and type(child) not in (expected if isinstance(expected, tuple) else (expected,)):
            return f"{name} is a {type(child).__name__}"
    act = module._modules.get("act")
    return None if computes(act, activation) else f"act is a {type(act).__name__}"


class MBConv(nn.Module):
    """Mobile inverted bottleneck with squeeze-and-excitation.

    Args:
        in_channels, out_channels: of the block; the hidden width is in_channels * expand_ratio.
        kernel_size, stride: of the depthwise conv.
        expand_ratio: 1 leaves the expansion out.
        se_ratio: squeeze width over *in_channels*; 0 for none (EfficientNet-Lite).
        padding: None for symmetric (kernel_size // 2), or "same" for TensorFlow's.
        drop_path: stochastic-depth rate, used where the block has a residual.

    Shape: [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]; fp32, fp16,
    bf16 (fp64 runs eager).
    The fused kernels run where `fastmbconv.explain` says so; set `fused = False` (or call `fastmbconv.unfuse`)
    for eager.
    """

    fused: bool = True
    memory: Memory = "fast"

    _TYPES = {
        "expand_conv": Conv2d,
        "expand_bn": NORMS,
        "depthwise_conv": Conv2d,
        "depthwise_bn": NORMS,
        "se": SqueezeExcitation,
        "project_conv": Conv2d,
        "project_bn": NORMS,
        "drop_path": StochasticDepth,
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 6,
        se_ratio: float = 0.25,
        activation: Activation = "silu",
        padding: Literal["same"] | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = round(in_channels * expand_ratio)
        pad: int | Literal["same"] = kernel_size // 2 if padding is None else padding
        self.stride, self.padding, self.activation = stride, pad, activation
        self.residual = stride == 1 and in_channels == out_channels
        self.expand_conv: Conv2d | None = None
        self.expand_bn: nn.BatchNorm2d | None = None
        if expand_ratio != 1:
            self.expand_conv = Conv2d(in_channels, hidden, 1)
            self.expand_bn = nn.BatchNorm2d(hidden, eps, momentum)
        self.depthwise_conv = Conv2d(hidden, hidden, kernel_size, stride, pad, groups=hidden)
        self.depthwise_bn = nn.BatchNorm2d(hidden, eps, momentum)
        reduced = max(1, int(in_channels * se_ratio)) if se_ratio else 0
        self.se = SqueezeExcitation(hidden, reduced, activation) if reduced else None
        self.project_conv = Conv2d(hidden, out_channels, 1)
        self.project_bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.act = ACTIVATIONS[activation]()
        self.drop_path = StochasticDepth(drop_path)

    def describe(self) -> Block:
        """This block as data, with its live parameters."""
        return Block(
            expand_weight=None if self.expand_conv is None else self.expand_conv.weight,
            bn1=None if self.expand_bn is None else BatchNorm.of(self.expand_bn),
            depthwise_weight=self.depthwise_conv.weight,
            bn2=BatchNorm.of(self.depthwise_bn),
            se=None if self.se is None else self.se.describe(),
            project_weight=self.project_conv.weight,
            bn3=BatchNorm.of(self.project_bn),
            stride=self.stride,
            padding=self.padding,
            activation=self.activation,
            residual=self.residual,
            drop=self.drop_path if self.drop_path.training and self.drop_path.rate > 0 else None,
        )

    def forward_eager(self, x: Tensor) -> Tensor:
        """The block through its own submodules: what runs where no kernel does."""
        h = x
        if self.expand_conv is not None:
            assert self.expand_bn is not None
            h = self.act(self.expand_bn(self.expand_conv(h)))
        h = self.act(self.depthwise_bn(self.depthwise_conv(h)))
        if self.se is not None:
            h = self.se(h)
        h = self.project_bn(self.project_conv(h))
        return self.drop_path(h) + x if self.residual else h

    def replaced_reason(self) -> str | None:
        """Which submodule is of another type than the one that this block was made with, or None."""
        reason = _replaced(self, self._TYPES, self.activation)
        if reason is None and self.se is not None:
            reason = _replaced(self.se, self.se._TYPES, self.se.activation)
        return reason

    def eager_reason(self) -> str | None:
        """Why this block must run its own submodules (a hook, another type in a submodule's place), or None."""
        return self.replaced_reason() or dispatch.module_reason(self)

    def extra_repr(self) -> str:
        return "fused" if self.fused else ""

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused or dispatch.eager_at_once(self, x):
            return self.forward_eager(x)
        block = block_of(self, _read)
        if isinstance(block, str):
            return self.forward_eager(x)
        assert isinstance(block, Block)
        return functional.mbconv(x, block, eager=self.forward_eager, memory=self.memory)


def _read(module: nn.Module) -> Block | str:
    """The block as data, or why it must run its own submodules."""
    assert isinstance(module, MBConv)
    return module.eager_reason() or module.describe()
