"""Compound scaling: the stage table, the coefficients of the family, and what a scaled network costs.

Tan & Le, EfficientNet, 2019, section 3. Depth, width and resolution grow together with one number phi:

    depth = alpha ** phi,   width = beta ** phi,   resolution = gamma ** phi,   alpha * beta ** 2 * gamma ** 2 = 2

The constraint has squares: alpha * beta * gamma = 2, as it is sometimes written down, is wrong. A network that is d
times as deep runs d times as many layers. One that is w times as wide has, in each ordinary convolution, w times as
many input channels and w times as many output channels: w ** 2 times the products (the depthwise ones, 9 % of B0's,
grow with w only). One that is r times as large on each side has r ** 2 times as many pixels. So FLOPs grow with
d * w ** 2 * r ** 2 = (alpha * beta ** 2 * gamma ** 2) ** phi, and the constraint makes that 2 ** phi: phi counts
doublings of the budget. With the product of the first powers fixed instead, one unit of phi could cost anything from
2 times (all of it into depth) to 4 times as much (none of it). The paper's alpha 1.2, beta 1.1, gamma 1.15 give 1.92
(and 1.52 without the squares). B0 with depth 2, width 2 or resolution 448 alone costs 2.03, 3.76 and 3.99 times B0.

The published B1..B7 follow no integer phi (B4's depth, width and resolution are phi 3.2, 3.5 and 3.8), so named
variants have a table, `COEFFICIENTS`, and the formula, `compound`, serves every other real phi.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastmbconv import dispatch
from fastmbconv.search import Ranking as Ranking
from fastmbconv.search import search as search

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
SE_RATIO = 0.25


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What a variant multiplies B0 by, and what it is trained with.

    Args:
        width, depth: factors on every stage's channels and repeats.
        resolution: the side of the square images that the variant is meant for; any other runs too.
        dropout: before the classifier.
        lite: no squeeze-and-excitation, ReLU6, stem and head of a fixed width, first and last stage of a fixed depth.

    Raises:
        ValueError: if width or depth is not finite and positive, resolution is below 1, or dropout is not in [0, 1).
    """

    width: float
    depth: float
    resolution: int
    dropout: float
    lite: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}: allowed are finite numbers > 0")
        if self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}: allowed are whole numbers >= 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: allowed are 0 <= dropout < 1")


# Source: efficientnet_builder.py and lite/efficientnet_lite_builder.py of TensorFlow's TPU models.
COEFFICIENTS: Mapping[str, Coefficients] = MappingProxyType(
    {
        "b0": Coefficients(1.0, 1.0, 224, 0.2),
        "b1": Coefficients(1.0, 1.1, 240, 0.2),
        "b2": Coefficients(1.1, 1.2, 260, 0.3),
        "b3": Coefficients(1.2, 1.4, 300, 0.3),
        "b4": Coefficients(1.4, 1.8, 380, 0.4),
        "b5": Coefficients(1.6, 2.2, 456, 0.4),
        "b6": Coefficients(1.8, 2.6, 528, 0.5),
        "b7": Coefficients(2.0, 3.1, 600, 0.5),
        "b8": Coefficients(2.2, 3.6, 672, 0.5),
        "l2": Coefficients(4.3, 5.3, 800, 0.5),
        "lite0": Coefficients(1.0, 1.0, 224, 0.2, lite=True),
        "lite1": Coefficients(1.0, 1.1, 240, 0.2, lite=True),
        "lite2": Coefficients(1.1, 1.2, 260, 0.3, lite=True),
        "lite3": Coefficients(1.2, 1.4, 280, 0.3, lite=True),
        "lite4": Coefficients(1.4, 1.8, 300, 0.3, lite=True),
    }
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A row of the stage table: `repeats` MBConv blocks, of which the first has the stride and changes the channels."""

    kernel_size: int
    stride: int
    expand_ratio: int
    channels: int
    repeats: int


# EfficientNet-B0, table 1. The paper's first version has the strides of two rows swapped; these are its code's.
STAGES = (
    Stage(kernel_size=3, stride=1, expand_ratio=1, channels=16, repeats=1),
    Stage(kernel_size=3, stride=2, expand_ratio=6, channels=24, repeats=2),
    Stage(kernel_size=5, stride=2, expand_ratio=6, channels=40, repeats=2),
    Stage(kernel_size=3, stride=2, expand_ratio=6, channels=80, repeats=3),
    Stage(kernel_size=5, stride=1, expand_ratio=6, channels=112, repeats=3),
    Stage(kernel_size=5, stride=2, expand_ratio=6, channels=192, repeats=4),
    Stage(kernel_size=3, stride=1, expand_ratio=6, channels=320, repeats=1),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The stage table after scaling: channels of stem and head, and the stages between them."""

    stem: int
    stages: tuple[Stage, ...]
    head: int


def round_filters(filters: int, width: float) -> int:
    """`filters * width` to the nearest multiple of 8, at least 8 and never more than 10 % below."""
    scaled = filters * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """`repeats * depth`, rounded up."""
    return math.ceil(repeats * depth)


def plan(coefficients: Coefficients) -> Plan:
    """Scale the stage table."""
    width, depth, lite = coefficients.width, coefficients.depth, coefficients.lite
    last = len(STAGES) - 1
    stages = tuple(
        Stage(
            s.kernel_size,
            s.stride,
            s.expand_ratio,
            round_filters(s.channels, width),
            s.repeats if lite and i in (0, last) else round_repeats(s.repeats, depth),
        )
        for i, s in enumerate(STAGES)
    )
    outer = 1.0 if lite else width
    return Plan(round_filters(STEM_CHANNELS, outer), stages, round_filters(HEAD_CHANNELS, outer))


def compound(phi: float, alpha: float = ALPHA, beta: float = BETA, gamma: float = GAMMA) -> Coefficients:
    """Coefficients for any real phi; 0 is B0, and a negative phi makes it smaller.

    Resolution is 224 * gamma ** phi to the nearest pixel. Dropout grows linearly from 0.2 at phi 0 to 0.5 at phi 7, as
    it does from B0 to B7 (section 5.2), and stays at these ends outside.
    Repeats are rounded up and channels to multiples of 8, so small steps are dear: phi 1 costs 2.57 times B0. Ask
    `count_macs` where a budget is meant.

    Raises:
        ValueError: if phi is not finite, if alpha, beta or gamma is not finite and >= 1, or if the result overflows.
    """
    if not math.isfinite(phi):
        raise ValueError(f"phi is {phi}: allowed are finite numbers")
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not (math.isfinite(value) and value >= 1):
            raise ValueError(f"{name} is {value}: allowed are finite numbers >= 1")
    base = COEFFICIENTS["b0"]
    dropout = base.dropout + (COEFFICIENTS["b7"].dropout - base.dropout) * min(max(phi / 7, 0.0), 1.0)
    try:
        width, depth, resolution = beta**phi, alpha**phi, max(1, round(base.resolution * gamma**phi))
    except OverflowError:
        raise ValueError(f"phi is {phi}: too large for alpha {alpha}, beta {beta}, gamma {gamma}") from None
    if width == 0 or depth == 0:
        raise ValueError(f"phi is {phi}: too small for alpha {alpha}, beta {beta}, gamma {gamma}")
    return Coefficients(width, depth, resolution, dropout)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a scaled network's table: the stem, a stage, the head or the classifier.

    Args:
        operator: what runs, as "MBConv6 5x5"; repeats: how often, one after the other; channels: of the output.
        size: (height, width) of the output.
        parameters: weights, biases, and BN's weights and biases.
        macs: multiply-accumulates of convolutions and linear layers, for one image.
        activations: elements that convolutions and linear layers write, for one image.
    """

    name: str
    operator: str
    repeats: int
    channels: int
    size: tuple[int, int]
    parameters: int
    macs: int
    activations: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs, row by row and in all; see `Row` for the units."""

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def activations(self) -> int:
        return sum(row.activations for row in self.rows)


def cost(
    coefficients: Coefficients,
    resolution: int | tuple[int, int] | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Cost:
    """Exact parameters, multiply-accumulates and activations of a network that is not built: plain arithmetic.

    Args:
        resolution: side of the image, or (height, width); default: the coefficients' own.
        num_classes: 0 for a network without a classifier.
        in_chans: channels of the image.

    Raises:
        ValueError: if resolution or in_chans is below 1, or num_classes is negative.
    """
    for name, value, low in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if value < low:
            raise ValueError(f"{name} is {value}: allowed are whole numbers >= {low}")
    height, width = _sides(coefficients.resolution if resolution is None else resolution)
    return Cost(tuple(_rows(coefficients, height, width, num_classes, in_chans)))


def count_macs(model: nn.Module | Coefficients, resolution: int | tuple[int, int] | None = None) -> int:
    """Multiply-accumulates of one image's forward pass: convolutions and linear layers, as papers count them.

    Args:
        model: coefficients (3 channels in, 1000 classes; see `cost` for others), or any module that takes [N, C, H, W]:
            it runs on the meta device, in inference, without data, and is left as it was.
        resolution: side of the image, or (height, width); default: the model's own `resolution`.

    Raises:
        ValueError: if resolution is below 1, or is left out and the model has none.
    """
    if isinstance(model, Coefficients):
        return cost(model, resolution).macs
    if resolution is None:
        resolution = getattr(model, "resolution", None)
        if not isinstance(resolution, int):
            raise ValueError(f"resolution is None and {type(model).__name__} has none of its own: give it in pixels")
    return _count_on_meta(model, *_sides(resolution))


def count_parameters(model: nn.Module | Coefficients) -> int:
    """Parameters of a module, or of the network with these coefficients (3 channels in, 1000 classes)."""
    if isinstance(model, Coefficients):
        return cost(model).parameters
    return sum(p.numel() for p in model.parameters())


def _sides(resolution: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if min(height, width) < 1:
        raise ValueError(f"resolution is {resolution}: allowed are whole numbers >= 1")
    return height, width


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution with an output of `pixels`, and the BN (weight and bias per channel) or the bias behind it."""

    in_channels: int
    out_channels: int
    pixels: int
    window: int = 1
    vectors: int = 2

    @property
    def macs(self) -> int:
        return self.in_channels * self.window * self.out_channels * self.pixels

    @property
    def parameters(self) -> int:
        return self.in_channels * self.window * self.out_channels + self.vectors * self.out_channels

    @property
    def activations(self) -> int:
        return self.out_channels * self.pixels


def _rows(coefficients: Coefficients, height: int, width: int, num_classes: int, in_chans: int) -> Iterator[Row]:
    scaled, se = plan(coefficients), not coefficients.lite
    height, width = -(-height // 2), -(-width // 2)
    yield _row("stem", "conv 3x3", (height, width), [_Layer(in_chans, scaled.stem, height * width, window=9)])
    channels = scaled.stem
    for number, stage in enumerate(scaled.stages, 1):
        entered = height * width
        height, width = -(-height // stage.stride), -(-width // stage.stride)
        first = list(_block(stage, channels, entered, height * width, se))
        channels = stage.channels
        others = list(_block(stage, channels, height * width, height * width, se))
        operator = f"MBConv{stage.expand_ratio} {stage.kernel_size}x{stage.kernel_size}"
        yield _row(f"stage {number}", operator, (height, width), first, others, stage.repeats)
    yield _row("head", "conv 1x1", (height, width), [_Layer(channels, scaled.head, height * width)])
    if num_classes:
        yield _row("classifier", "linear", (1, 1), [_Layer(scaled.head, num_classes, 1, vectors=1)])


def _block(stage: Stage, channels: int, entered: int, left: int, se: bool) -> Iterator[_Layer]:
    """The layers of an MBConv block, from `entered` pixels to `left`."""
    hidden = channels * stage.expand_ratio
    if stage.expand_ratio != 1:
        yield _Layer(channels, hidden, entered)
    yield _Layer(1, hidden, left, window=stage.kernel_size**2)
    if se:
        reduced = max(1, int(channels * SE_RATIO))
        yield _Layer(hidden, reduced, 1, vectors=1)
        yield _Layer(reduced, hidden, 1, vectors=1)
    yield _Layer(hidden, stage.channels, left)


def _row(
    name: str,
    operator: str,
    size: tuple[int, int],
    first: list[_Layer],
    others: Sequence[_Layer] = (),
    repeats: int = 1,
) -> Row:
    def total(of: Callable[[_Layer], int]) -> int:
        return sum(map(of, first)) + (repeats - 1) * sum(map(of, others))

    parameters = total(lambda layer: layer.parameters)
    macs, activations = total(lambda layer: layer.macs), total(lambda layer: layer.activations)
    return Row(name, operator, repeats, first[-1].out_channels, size, parameters, macs, activations)


def _count_on_meta(model: nn.Module, height: int, width: int) -> int:
    state = {
        name: torch.empty_like(tensor, device="meta")
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named()
    }
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"model is a {type(model).__name__}: it has no Conv2d to count")
    image = torch.empty(1, first.in_channels, height, width, device="meta", dtype=first.weight.dtype)
    modes = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        with torch.no_grad(), dispatch.backend("eager"), counter:
            torch.func.functional_call(model, state, (image,))
    finally:
        for module, training in modes.items():
            module.training = training
    return counter.get_total_flops() // 2
