"""Blocks that a careless matcher would take for a plain MBConv block, and that compute something else.

Each has the layers of a plain block, by the same names and with the same shapes, and one difference in what its forward
does with them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HIDDEN = 8, 16


class Plain(nn.Module):
    """Expand, depthwise, gate, project, + x, in steps that a near miss replaces one of."""

    def __init__(self, outputs=WIDTH, stride=1, gated=True, eps=1e-5, act=nn.ReLU6):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(WIDTH, HIDDEN, 1, bias=False), nn.BatchNorm2d(HIDDEN, eps)
        self.depthwise = nn.Conv2d(HIDDEN, HIDDEN, 3, stride, 1, groups=HIDDEN, bias=False)
        self.bn2, self.act = nn.BatchNorm2d(HIDDEN, eps), act()
        if gated:
            self.reduce, self.restore = nn.Conv2d(HIDDEN, 4, 1), nn.Conv2d(4, HIDDEN, 1)
        self.project, self.bn3 = nn.Conv2d(HIDDEN, outputs, 1, bias=False), nn.BatchNorm2d(outputs, eps)
        self.gated, self.residual = gated, stride == 1 and outputs == WIDTH
        nn.init.constant_(self.bn2.weight, 4.0)  # so that ReLU6 has something to cut off

    def gate(self, h):
        return torch.sigmoid(self.restore(F.relu(self.reduce(h.mean((2, 3), keepdim=True)))))

    def excite(self, h, x):
        return h * self.gate(h) if self.gated else h

    def walk(self, h, x):
        return self.excite(self.act(self.bn2(self.depthwise(h))), x)

    def body(self, x):
        h = self.act(self.bn1(self.expand(x)))
        return self.bn3(self.project(self.walk(h, x)))

    def add(self, h, x):
        return h + x

    def forward(self, x):
        h = self.body(x)
        return self.add(h, x) if self.residual else h


class FunctionalNormDefaultEps(Plain):
    def walk(self, h, x):
        bn, h = self.bn2, self.depthwise(h)
        h = F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum)
        return self.excite(self.act(h), x)


class FunctionalNormNeverTrains(Plain):
    """Running statistics in training mode too, which it does not move."""

    def walk(self, h, x):
        bn = self.bn2
        h = F.batch_norm(self.depthwise(h), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return self.excite(self.act(h), x)


class FunctionalNormOtherMomentum(Plain):
    """The same outputs; running statistics move by half."""

    def walk(self, h, x):
        bn, h = self.bn2, self.depthwise(h)
        h = F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.5, bn.eps)
        return self.excite(self.act(h), x)


class FunctionalReLU(Plain):
    def walk(self, h, x):
        return self.excite(F.relu(self.bn2(self.depthwise(h))), x)


class ResidualOfTheMiddle(Plain):
    """Adds the projection's output before its BatchNorm, which has the block's shape too."""

    def body(self, x):
        h = self.act(self.bn1(self.expand(x)))
        projected = self.project(self.walk(h, x))
        return self.bn3(projected) + projected

    def add(self, h, x):
        return h


class ResidualOfAScaledClone(Plain):
    def forward(self, x):
        identity = x.clone().mul_(2)
        return self.body(x) + identity


class ResidualChangedInPlace(Plain):
    """By a call whose value nobody takes: a graph without it looks like the plain block's."""

    def forward(self, x):
        identity = x.clone()
        h = self.body(x)
        identity.clamp_(min=0)
        return h + identity


class ScaledSum(Plain):
    def add(self, h, x):
        return x + 0.5 * h


class SumWithAlpha(Plain):
    def add(self, h, x):
        return torch.add(h, x, alpha=2)


class Difference(Plain):
    def add(self, h, x):
        return h - x


class AddedTwice(Plain):
    def add(self, h, x):
        return h + x + x


class GateBeforeActivation(Plain):
    def walk(self, h, x):
        h = self.bn2(self.depthwise(h))
        return self.act(h * self.gate(h))


class GateOfTheInput(Plain):
    """From the expansion's output, which has as many channels."""

    def walk(self, h, x):
        return self.act(self.bn2(self.depthwise(h))) * self.gate(h)


class GateBehindTheProjection(Plain):
    """Its layers are as wide as the block's output, and stand there."""

    def __init__(self):
        super().__init__()
        self.reduce, self.restore = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def excite(self, h, x):
        return h

    def add(self, h, x):
        return h * self.gate(h) + x


class GateLeft(GateBehindTheProjection):
    """The plain twin of GateBehindTheProjection, which has its layers and leaves them."""

    def add(self, h, x):
        return h + x


class GateNotMultiplied(Plain):
    """The gate itself is projected: KernelBench's EfficientNetB2."""

    def excite(self, h, x):
        return self.gate(h)


class GateAdded(Plain):
    def excite(self, h, x):
        return h + self.gate(h)


class GateThrownAway(Plain):
    """Computed, and used for nothing."""

    def excite(self, h, x):
        self.gate(h)
        return h


class GateTwice(Plain):
    def excite(self, h, x):
        gate = self.gate(h)
        return h * gate * gate


class ResidualGate(Plain):
    def excite(self, h, x):
        return h + h * self.gate(h)


class MaxPooledGate(Plain):
    def gate(self, h):
        return torch.sigmoid(self.restore(F.relu(self.reduce(F.adaptive_max_pool2d(h, 1)))))


class GateOfRows(Plain):
    """The mean over one axis: a gate per row."""

    def gate(self, h):
        return torch.sigmoid(self.restore(F.relu(self.reduce(h.mean(3, keepdim=True)))))


class GateOfTheBatch(Plain):
    """The mean over the images as well: one gate for all."""

    def gate(self, h):
        return torch.sigmoid(self.restore(F.relu(self.reduce(h.mean((0, 2, 3), keepdim=True)))))


class SoftmaxGate(Plain):
    def gate(self, h):
        return self.restore(F.relu(self.reduce(h.mean((2, 3), keepdim=True)))).softmax(1)


class SharpGate(Plain):
    """A temperature before the sigmoid."""

    def gate(self, h):
        return torch.sigmoid(2 * self.restore(F.relu(self.reduce(h.mean((2, 3), keepdim=True)))))


class Dropout(Plain):
    """Of single elements, in training."""

    def body(self, x):
        h = self.act(self.bn1(self.expand(x)))
        h = F.dropout(self.walk(h, x), p=0.2, training=self.training)
        return self.bn3(self.project(h))


class DropoutAlways(Plain):
    """Of whole images, in eval mode too."""

    def add(self, h, x):
        return h * h.new_empty(h.shape[0], 1, 1, 1).bernoulli_(0.5) / 0.5 + x


class DropOfTheBatch(Plain):
    """One draw for all images."""

    def add(self, h, x):
        if self.training:
            h = h * h.new_empty(1, 1, 1, 1).bernoulli_(0.8) / 0.8
        return h + x


class NoisyDrop(Plain):
    """A factor between 0 and 2 for each image: its mean is 1, and it drops none."""

    def add(self, h, x):
        return h * h.new_empty(h.shape[0], 1, 1, 1).uniform_(0, 2) + x if self.training else h + x


class TwoNorms(Plain):
    """The second one again, so that the state dict stays: its statistics move twice."""

    def walk(self, h, x):
        return self.excite(self.act(self.bn2(self.bn2(self.depthwise(h)))), x)


class SharedNorm(Plain):
    """One BatchNorm in two places, and one that is never called."""

    def walk(self, h, x):
        return self.excite(self.act(self.bn1(self.depthwise(h))), x)


class ActivationBeforeNorm(Plain):
    def walk(self, h, x):
        return self.excite(self.bn2(self.act(self.depthwise(h))), x)


class AsymmetricPadding(Plain):
    """A pixel before and two after; the middle of what comes out."""

    def walk(self, h, x):
        h = F.conv2d(F.pad(h, (2, 0, 2, 0)), self.depthwise.weight, groups=HIDDEN)
        return self.excite(self.act(self.bn2(h)), x)


class PaddedWithOnes(Plain):
    def walk(self, h, x):
        h = F.conv2d(F.pad(h, (1, 1, 1, 1), value=1.0), self.depthwise.weight, groups=HIDDEN)
        return self.excite(self.act(self.bn2(h)), x)


class StridedExpansion(Plain):
    """The stride in the pointwise convolution's call, where the depthwise module says 2."""

    def body(self, x):
        h = self.act(self.bn1(F.conv2d(x, self.expand.weight, stride=2)))
        h = F.conv2d(h, self.depthwise.weight, padding=1, groups=HIDDEN)
        return self.bn3(self.project(self.excite(self.act(self.bn2(h)), x)))


class Dilated(Plain):
    """The module's dilation is 1."""

    def walk(self, h, x):
        h = F.conv2d(h, self.depthwise.weight, padding=2, dilation=2, groups=HIDDEN)
        return self.excite(self.act(self.bn2(h)), x)


class HalfTheGroups(Plain):
    """Two channels in, two out in each group."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(HIDDEN, HIDDEN, 3, 1, 1, groups=HIDDEN // 2, bias=False)


class HalfTheGroupsSummed(HalfTheGroups):
    """The twin of HalfTheGroups: depthwise, by the sum of the two weights that each channel has."""

    def walk(self, h, x):
        h = F.conv2d(h, self.depthwise.weight.sum(1, keepdim=True), padding=1, groups=HIDDEN)
        return self.excite(self.act(self.bn2(h)), x)


class Shuffled(Plain):
    """Channels in another order behind the depthwise convolution: no parameter tells."""

    def walk(self, h, x):
        return self.excite(self.act(self.bn2(self.depthwise(h))).flip(1), x)


class LayerScale(Plain):
    """A factor per channel behind the projection."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH, 1, 1), 0.1))

    def add(self, h, x):
        return self.gamma * h + x


class LayerScaleLeft(LayerScale):
    """The plain twin of LayerScale, which has the factor and leaves it."""

    def add(self, h, x):
        return h + x


class StandardisedWeights(Plain):
    def body(self, x):
        h = self.act(self.bn1(self.expand(x)))
        weight = self.project.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.bn3(F.conv2d(self.walk(h, x), weight))


class TiedWeights(Plain):
    """Projects with the expansion's weight, turned."""

    def body(self, x):
        h = self.act(self.bn1(self.expand(x)))
        return self.bn3(F.conv2d(self.walk(h, x), self.expand.weight.transpose(0, 1)))


class DependsOnValues(Plain):
    def body(self, x):
        h = super().body(x)
        return h if x.mean() > 0 else 0.5 * h


class DependsOnTraining(Plain):
    """In eval mode it leaves the gate out."""

    def excite(self, h, x):
        return h * self.gate(h) if self.training else h


class DependsOnSize(Plain):
    """Leaves the gate out where an image is small."""

    def excite(self, h, x):
        return h * self.gate(h) if h.shape[-1] > 8 else h


class HiddenUse(Plain):
    """Keeps the depthwise output for somebody: fused it would not be there."""

    def excite(self, h, x):
        self.features = h
        return super().excite(h, x)


class RoundedOnTheWay(Plain):
    """In half precision for a moment."""

    def walk(self, h, x):
        return super().walk(h.bfloat16().to(h.dtype), x)


class Detached(Plain):
    """The same output, and no gradient through the gate."""

    def excite(self, h, x):
        return h * self.gate(h).detach()


@dataclass(frozen=True)
class NearMiss:
    """`make()` and `plain()` have state dicts of the same keys and shapes, and run on SHAPE in both modes.

    With the same weights, drawn so that no factor is 1 and no statistic 0 or 1, their outputs differ, except in the
    modes that `same` names: what differs there the note says. To leave a near miss as it is is right, and so is to fuse
    it into what it computes, where that can be said; to make it its twin is wrong.
    """

    make: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    note: str
    same: tuple[str, ...] = ()


TRAIN, EVAL = "train", "eval"
SHAPE = (3, WIDTH, 8, 8)


def _miss(make, note, *same, plain=Plain):
    return NearMiss(make, plain, note, same)


def _of(kind, **settings):
    return lambda: kind(**settings)


NEAR_MISSES = {
    "norm_eps": _miss(
        _of(FunctionalNormDefaultEps, eps=1e-3), "F.batch_norm without the module's eps", plain=_of(Plain, eps=1e-3)
    ),
    "norm_never_trains": _miss(FunctionalNormNeverTrains, "F.batch_norm with its training left at False", EVAL),
    "norm_momentum": _miss(
        FunctionalNormOtherMomentum, "F.batch_norm with another momentum: statistics after it differ", TRAIN, EVAL
    ),
    "norm_twice": _miss(TwoNorms, "the same BatchNorm twice in a row"),
    "norm_shared": _miss(SharedNorm, "bn1 in both places, bn2 in none"),
    "norm_last": _miss(ActivationBeforeNorm, "activation, then BatchNorm"),
    "relu": _miss(FunctionalReLU, "F.relu, though self.act is a ReLU6"),
    "residual_middle": _miss(ResidualOfTheMiddle, "adds the projection's output to its BatchNorm, and not x"),
    "residual_scaled_clone": _miss(ResidualOfAScaledClone, "adds a clone of x that was doubled in place"),
    "residual_in_place": _miss(ResidualChangedInPlace, "adds a clone of x that a call without a reader clamped"),
    "residual_scaled_sum": _miss(ScaledSum, "x + 0.5 * h"),
    "residual_alpha": _miss(SumWithAlpha, "torch.add with alpha"),
    "residual_difference": _miss(Difference, "h - x"),
    "residual_twice": _miss(AddedTwice, "h + x + x"),
    "gate_before_activation": _miss(GateBeforeActivation, "act(h * gate): MobileNetV3's order"),
    "gate_of_input": _miss(GateOfTheInput, "the gate is computed from the depthwise convolution's input"),
    "gate_behind_projection": _miss(GateBehindTheProjection, "gates the block's output", plain=GateLeft),
    "gate_not_multiplied": _miss(GateNotMultiplied, "projects the gate: a single pixel, which the sum broadcasts"),
    "gate_added": _miss(GateAdded, "h + gate"),
    "gate_unused": _miss(GateThrownAway, "a gate that nothing is multiplied by: a block without one"),
    "gate_twice": _miss(GateTwice, "h * gate * gate"),
    "gate_residual": _miss(ResidualGate, "h + h * gate"),
    "gate_max": _miss(MaxPooledGate, "max pool in the squeeze"),
    "gate_rows": _miss(GateOfRows, "the mean over one axis: a gate per row"),
    "gate_batch": _miss(GateOfTheBatch, "the mean over the images too"),
    "gate_softmax": _miss(SoftmaxGate, "softmax over the channels, no sigmoid"),
    "gate_sharp": _miss(SharpGate, "sigmoid(2 * logits)"),
    "gate_detached": _miss(Detached, "the same output; no gradient goes through the gate", TRAIN, EVAL),
    "dropout": _miss(Dropout, "F.dropout of single elements before the projection, in training", EVAL),
    "drop_always": _miss(DropoutAlways, "drops images in eval mode too"),
    "drop_batch": _miss(DropOfTheBatch, "one draw for the whole batch, in training", EVAL),
    "drop_noise": _miss(NoisyDrop, "scales each image by a random factor, in training", EVAL),
    "padding_asymmetric": _miss(AsymmetricPadding, "F.pad before and none after, though the module pads both sides"),
    "padding_ones": _miss(PaddedWithOnes, "F.pad with value=1"),
    "stride_in_expansion": _miss(
        _of(StridedExpansion, stride=2), "the pointwise convolution strides", plain=_of(Plain, stride=2)
    ),
    "dilated": _miss(Dilated, "F.conv2d with dilation=2, though the module has 1"),
    "half_the_groups": _miss(HalfTheGroups, "groups = C / 2: no depthwise convolution", plain=HalfTheGroupsSummed),
    "shuffled": _miss(Shuffled, "channels in reverse behind the depthwise convolution"),
    "layer_scale": _miss(LayerScale, "a factor per channel behind the projection", plain=LayerScaleLeft),
    "standardised": _miss(StandardisedWeights, "the projection's weight is standardised by each forward"),
    "tied": _miss(TiedWeights, "projects with the expansion's weight"),
    "values": _miss(DependsOnValues, "if x.mean() > 0: half of it for a dark image; SHAPE's images are, by `dark`"),
    "training": _miss(DependsOnTraining, "has a gate in training alone", TRAIN),
    "size": _miss(DependsOnSize, "has a gate for images above 8 pixels alone, and SHAPE's have 8"),
    "side_effect": _miss(HiddenUse, "the same output; keeps an inner tensor in an attribute", TRAIN, EVAL),
    "dtype": _miss(RoundedOnTheWay, "rounds to bfloat16 before the depthwise convolution"),
}


def dark(shape=SHAPE, seed=0):
    """An image batch whose mean is below 0."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) - 0.2
