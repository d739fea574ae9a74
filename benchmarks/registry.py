"""The shapes that are benchmarked: every distinct MBConv block of B0 at 224 px and B4 at 380 px; others to count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

from fastmbconv import scaling
from fastmbconv.block import Activation
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
    se: bool = True
    activation: Activation = "silu"

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
        small = replace(self, batch=2, size=6, in_channels=8, out_channels=8 if self.residual else 16)
        return replace(small, expand_ratio=min(self.expand_ratio, 2))

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    def block(self) -> nn.Module:
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.expand_ratio)
        return MBConv(*sizes, se_ratio=0.25 if self.se else 0, activation=self.activation)


# EfficientNetV2-S's Fused-MBConv blocks in training, at 300 px.
DENSE = (
    Shape("v2s", 1, 32, 150, 24, 24, 1, 3, 1, 2, se=False),
    Shape("v2s", 2, 32, 150, 24, 48, 4, 3, 2, 1, se=False),
    Shape("v2s", 2, 32, 75, 48, 48, 4, 3, 1, 3, se=False),
    Shape("v2s", 3, 32, 75, 48, 64, 4, 3, 2, 1, se=False),
    Shape("v2s", 3, 32, 38, 64, 64, 4, 3, 1, 3, se=False),
)
BATCHES = {"b0": 128, "b4": 64}


def shapes(model: str, batch: int | None = None) -> list[Shape]:
    """The distinct blocks of a model of `scaling.COEFFICIENTS`, in its order; `batch` is its own in `BATCHES`."""
    lite, batch = scaling.COEFFICIENTS[model].lite, BATCHES[model] if batch is None else batch
    plan, size = scaling.plan(scaling.COEFFICIENTS[model]), -(-scaling.COEFFICIENTS[model].resolution // 2)
    channels, found = plan.stem, Counter[Shape]()
    for number, stage in enumerate(plan.stages, 1):
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            place = (model, number, batch, size, channels, stage.channels)
            shape = Shape(*place, stage.expand_ratio, stage.kernel_size, stride, se=not lite)
            found[shape] += 1
            size, channels = shape.out_size, stage.channels
    return [replace(shape, count=count) for shape, count in found.items()]


def by_weight() -> list[Shape]:
    """All shapes, the ones that cost their model most first."""
    total = {name: sum(s.elements * s.count for s in shapes(name)) for name in BATCHES}
    return sorted((s for name in BATCHES for s in shapes(name)), key=lambda s: -s.elements * s.count / total[s.model])
