"""The shapes that are benchmarked: every distinct MBConv block of B0 at 224 px and B4 at 380 px."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from fastmbconv.mbconv import MBConv


@dataclass(frozen=True)
class Shape:
    """One block at its place in a model; `count` is how often the model has it."""

    model: str
    stage: int
    batch: int
    size: int
    in_channels: int
    out_channels: int
    expand_ratio: int
    kernel_size: int
    stride: int
    count: int = 1

    @property
    def hidden(self) -> int:
        return self.in_channels * self.expand_ratio

    @property
    def out_size(self) -> int:
        return -(-self.size // self.stride)

    @property
    def elements(self) -> int:
        """E of benchmarks/NOTES.md: elements of the expanded tensor, at the depthwise convolution's input."""
        return self.batch * self.size**2 * self.hidden

    @property
    def name(self) -> str:
        channels = f"{self.in_channels}-{self.hidden}-{self.out_channels}"
        return f"{self.model}.{self.stage} n{self.batch} {self.size}px {channels} k{self.kernel_size}s{self.stride}"

    def tiny(self) -> Shape:
        """The same kind of block at a size that an interpreter can run."""
        small = replace(self, batch=2, size=6, in_channels=8, out_channels=8 if self._residual else 16)
        return replace(small, expand_ratio=min(self.expand_ratio, 2))

    @property
    def _residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    def block(self) -> nn.Module:
        return MBConv(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.expand_ratio)


@dataclass(frozen=True)
class Model:
    name: str
    width: float
    depth: float
    size: int
    batch: int


MODELS = {
    "b0": Model("efficientnet_b0", 1.0, 1.0, 224, 128),
    "b4": Model("efficientnet_b4", 1.4, 1.8, 380, 64),
}
STAGES = (  # expansion, kernel, stride, channels, repeats: Tan & Le, 2019, table 1
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def round_channels(channels: float) -> int:
    """To a multiple of 8, never below nine tenths."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def shapes(model: str) -> list[Shape]:
    """The distinct blocks of "b0" or "b4", in the model's order."""
    spec = MODELS[model]
    size, channels = -(-spec.size // 2), round_channels(32 * spec.width)
    found: list[Shape] = []
    for stage, (expand, kernel, stride, out, repeats) in enumerate(STAGES, 1):
        out, repeats = round_channels(out * spec.width), math.ceil(repeats * spec.depth)
        first = Shape(model, stage, spec.batch, size, channels, out, expand, kernel, stride)
        size, channels = first.out_size, out
        rest = replace(first, size=size, in_channels=out, stride=1, count=repeats - 1)
        same = replace(first, count=rest.count) == rest
        found += [replace(first, count=repeats)] if same else [first, rest] if rest.count else [first]
    return found


def by_weight() -> list[Shape]:
    """All shapes, the ones that cost their model most first."""
    total = {name: sum(s.elements * s.count for s in shapes(name)) for name in MODELS}
    return sorted((s for name in MODELS for s in shapes(name)), key=lambda s: -s.elements * s.count / total[s.model])
