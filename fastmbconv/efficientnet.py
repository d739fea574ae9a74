"""EfficientNet B0..B8, L2 and Lite0..Lite4, and any size between them, from the stage table in `fastmbconv.scaling`.

model = efficientnet_b0(num_classes=10)
model = EfficientNet.scaled(phi=2.5)

Tan & Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastmbconv.block import Activation
from fastmbconv.ends import ConvBNAct
from fastmbconv.mbconv import MBConv
from fastmbconv.scaling import ALPHA, BETA, COEFFICIENTS, GAMMA, SE_RATIO, Coefficients, compound, plan

Family = Literal["torch", "tf"]


@dataclass(frozen=True, slots=True)
class Numerics:
    """What tells a numeric family apart; weights trained in one lose accuracy in the other."""

    padding: Literal["same"] | None
    eps: float
    momentum: float


# torch: timm's efficientnet_*, torchvision. tf: TensorFlow's own, timm's tf_*, lukemelas, Hugging Face; its momentum is
# the paper's 0.99 in PyTorch's convention.
FAMILIES: dict[str, Numerics] = {
    "torch": Numerics(padding=None, eps=1e-5, momentum=0.1),
    "tf": Numerics(padding="same", eps=1e-3, momentum=0.01),
}


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature map that a model can return: the last one at its stride."""

    name: str
    stage: int
    channels: int
    reduction: int


class Options(TypedDict, total=False):
    """The keyword arguments of `EfficientNet`."""

    num_classes: int
    in_chans: int
    family: Family | None
    eps: float | None
    momentum: float | None
    dropout: float | None
    drop_path: float
    features_only: bool
    out_indices: Sequence[int] | None


class EfficientNet(nn.Module):
    """EfficientNet with any coefficients.

    Args:
        coefficients: from `fastmbconv.scaling`: `COEFFICIENTS["b0"]`, or `compound(phi)`.
        num_classes: 0 leaves the classifier out, and the model returns pooled features.
        in_chans: channels of the image.
        family: "torch" pads symmetrically, with BN eps 1e-5 and momentum 0.1; "tf" pads as TensorFlow's "SAME" does, at
            every resolution, with BN eps 1e-3 and momentum 0.01. Default: "tf" for Lite, "torch" for the others.
        eps, momentum: of every BN; default: the family's.
        dropout: before the classifier; default: the coefficients' own, 0.2 (B0) to 0.5 (B7).
        drop_path: stochastic depth, per sample. Block i of N has the rate `drop_path * i / N`.
        features_only: return feature maps, and have no head and no stage behind the last map; see `feature_info`.
        out_indices: which maps, counted over the strides 2, 4, 8, 16, 32; default: all. Only with features_only.

    Shape: [N, in_chans, H, W] -> [N, num_classes] ([N, num_features] if that is 0), at any H and W; with features_only,
    a list of [N, feature.channels, ceil(H / feature.reduction), ceil(W / feature.reduction)].

    Its state dict says family and eps, in what PyTorch keeps beside the entries (`_metadata`): torch.save stores it.

    Attributes:
        family_told: whether `family` was given, or is the default.
        feature_info: a `Feature` for each map of `forward_stages`.
        num_features: channels of the pooled features.
        resolution: the side of the images that these coefficients are meant for.

    Raises:
        ValueError: for an argument out of its range.

    Source: the paper, table 1 (stages) and section 5.2 (stochastic depth with survival probability 0.8, dropout).
    """

    def __init__(
        self,
        coefficients: Coefficients = COEFFICIENTS["b0"],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        family: Family | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        dropout: float | None = None,
        drop_path: float = 0.2,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        told = family is not None
        family = family or ("tf" if coefficients.lite else "torch")
        if family not in FAMILIES:
            raise ValueError(f"family is {family!r}: allowed are {', '.join(FAMILIES)}")
        dropout = coefficients.dropout if dropout is None else dropout
        _at_least("num_classes", num_classes, 0)
        _at_least("in_chans", in_chans, 1)
        _rate("dropout", dropout)
        _rate("drop_path", drop_path)
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices is {out_indices!r}: it needs features_only=True")

        numerics = FAMILIES[family]
        self.coefficients = coefficients
        self.family: Family = family
        self.family_told = told
        self.eps = numerics.eps if eps is None else eps
        self.momentum = numerics.momentum if momentum is None else momentum
        self.resolution = coefficients.resolution
        self.in_chans, self.num_classes, self.features_only = in_chans, num_classes, features_only
        self.grad_checkpointing = False

        scaled = plan(coefficients)
        activation: Activation = "relu6" if coefficients.lite else "silu"
        self.stem = ConvBNAct(
            in_chans, scaled.stem, 3, 2, numerics.padding or 1, activation, eps=self.eps, momentum=self.momentum
        )
        blocks, n = sum(stage.repeats for stage in scaled.stages), 0
        stages: list[nn.Module] = []
        channels = scaled.stem
        for stage in scaled.stages:
            row: list[nn.Module] = []
            for i in range(stage.repeats):
                row.append(
                    MBConv(
                        channels,
                        stage.channels,
                        stage.kernel_size,
                        stage.stride if i == 0 else 1,
                        stage.expand_ratio,
                        0.0 if coefficients.lite else SE_RATIO,
                        activation,
                        numerics.padding,
                        self.eps,
                        self.momentum,
                        drop_path * n / blocks,
                    )
                )
                channels = stage.channels
                n += 1
            stages.append(nn.Sequential(*row))
        reductions = [2 * math.prod(s.stride for s in scaled.stages[: k + 1]) for k in range(len(stages))]
        last_at_stride = [k for k, r in enumerate(reductions) if r not in reductions[k + 1 :]]
        features = [Feature(f"stages.{k}", k, scaled.stages[k].channels, reductions[k]) for k in last_at_stride]
        self.feature_info: tuple[Feature, ...] = tuple(_chosen(features, out_indices))
        self.stages = nn.Sequential(*stages[: self.feature_info[-1].stage + 1])

        self.num_features = self.feature_info[-1].channels if features_only else scaled.head
        if features_only:
            self.num_classes = 0
        else:
            self.head = ConvBNAct(channels, scaled.head, 1, 1, 0, activation, eps=self.eps, momentum=self.momentum)
            self.dropout = nn.Dropout(dropout)
            self.classifier: nn.Module = _classifier(scaled.head, num_classes)
        self.apply(init_weights)

    @classmethod
    def scaled(
        cls, phi: float, alpha: float = ALPHA, beta: float = BETA, gamma: float = GAMMA, **options: Unpack[Options]
    ) -> EfficientNet:
        """B0 scaled by any real phi: depth alpha ** phi, width beta ** phi, resolution 224 * gamma ** phi.

        Raises:
            ValueError: as `fastmbconv.scaling.compound`.
        """
        return cls(compound(phi, alpha, beta, gamma), **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {}).update(family=self.family, eps=self.eps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only each block's input and run the block again in the backward pass.

        Gradients, outputs and dropout masks are the same. So are the running statistics: the second run doesn't count
        (torch's and timm's checkpointing of the same blocks moves them twice).
        """
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier in the old one's place, on the same device and in the same dtype; 0 for none.

        Raises:
            ValueError: if num_classes is negative, or the model has features_only.
        """
        _at_least("num_classes", num_classes, 0)
        if self.features_only:
            raise ValueError(f"num_classes is {num_classes}: a model with features_only has no classifier")
        like = self.head.conv.weight
        self.num_classes = num_classes
        self.classifier = _classifier(self.num_features, num_classes).to(like.device, like.dtype).train(self.training)
        self.classifier.apply(init_weights)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The feature maps of `feature_info`."""
        wanted = {feature.stage for feature in self.feature_info}
        maps = []
        x = self.stem(self._checked(x))
        for k in range(len(self.stages)):
            x = self._stage(k, x)
            if k in wanted:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, num_features, ceil(H / 32), ceil(W / 32)], the head's convolution included."""
        x = self._trunk(x)
        return x if self.features_only else self.head(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, dropout, classifier; with pre_logits, without the classifier."""
        return self._classified(x.mean((2, 3)), pre_logits)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self.forward_stages(x)
        return self._classified(self.head.pooled(self._trunk(x)))

    def _trunk(self, x: Tensor) -> Tensor:
        x = self.stem(self._checked(x))
        for k in range(len(self.stages)):
            x = self._stage(k, x)
        return x

    def _classified(self, pooled: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.dropout(pooled)
        return pooled if pre_logits else self.classifier(pooled)

    def _stage(self, index: int, x: Tensor) -> Tensor:
        for block in self.stages[index].children():
            x = _checkpointed(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x has the shape {tuple(x.shape)}: allowed is [N, {self.in_chans}, H, W]")
        return x


def init_weights(module: nn.Module) -> None:
    """EfficientNet's initialisation of one layer, for `nn.Module.apply`.

    Convolutions: normal, with variance 2 / (kernel area * output channels / groups). Linear: uniform, within
    1 / sqrt(output features). Biases 0, BN weights 1. Source: efficientnet_model.py of TensorFlow's TPU models.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.Linear):
        bound = 1.0 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@contextmanager
def _statistics_stay(module: nn.Module) -> Iterator[None]:
    """Let BNs move copies of their running statistics (not none: autograd saves as many tensors as the first time)."""
    moving = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [dict(bn.named_buffers(recurse=False)) for bn in moving]
    for bn, buffers in zip(moving, before, strict=True):
        for name, buffer in buffers.items():
            setattr(bn, name, buffer.clone())
    try:
        yield
    finally:
        for bn, buffers in zip(moving, before, strict=True):
            for name, buffer in buffers.items():
                setattr(bn, name, buffer)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_stay(block)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    # A compiled graph writes the statistics once, at its end, and Dynamo knows no context_fn but its own.
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))


def _classifier(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def _chosen(features: list[Feature], indices: Sequence[int] | None) -> list[Feature]:
    if indices is None:
        return features
    count = len(features)
    if not indices or any(not -count <= i < count for i in indices):
        raise ValueError(f"out_indices is {indices!r}: allowed are numbers from {-count} to {count - 1}, at least one")
    return [features[i] for i in sorted({i % count for i in indices})]


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: allowed are whole numbers >= {least}")


def _rate(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value}: allowed are 0 <= {name} < 1")


def efficientnet(name: str, **options: Unpack[Options]) -> EfficientNet:
    """A published variant by name: b0 ... b8, l2, lite0 ... lite4 (with or without "efficientnet_" before it).

    Raises:
        ValueError: for an unknown name.
    """
    short = name.removeprefix("efficientnet_")
    if short not in COEFFICIENTS:
        raise ValueError(f"name is {name!r}: allowed are {', '.join(COEFFICIENTS)}")
    return EfficientNet(COEFFICIENTS[short], **options)


def efficientnet_b0(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B0: 5.3 M parameters, 0.39 G multiply-accumulates at 224 pixels."""
    return EfficientNet(COEFFICIENTS["b0"], **options)


def efficientnet_b1(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B1: 7.8 M parameters, 0.69 G multiply-accumulates at 240 pixels."""
    return EfficientNet(COEFFICIENTS["b1"], **options)


def efficientnet_b2(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B2: 9.1 M parameters, 0.99 G multiply-accumulates at 260 pixels."""
    return EfficientNet(COEFFICIENTS["b2"], **options)


def efficientnet_b3(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B3: 12.2 M parameters, 1.83 G multiply-accumulates at 300 pixels."""
    return EfficientNet(COEFFICIENTS["b3"], **options)


def efficientnet_b4(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B4: 19.3 M parameters, 4.39 G multiply-accumulates at 380 pixels."""
    return EfficientNet(COEFFICIENTS["b4"], **options)


def efficientnet_b5(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B5: 30.4 M parameters, 10.3 G multiply-accumulates at 456 pixels."""
    return EfficientNet(COEFFICIENTS["b5"], **options)


def efficientnet_b6(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B6: 43.0 M parameters, 19.1 G multiply-accumulates at 528 pixels."""
    return EfficientNet(COEFFICIENTS["b6"], **options)


def efficientnet_b7(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B7: 66.3 M parameters, 37.7 G multiply-accumulates at 600 pixels."""
    return EfficientNet(COEFFICIENTS["b7"], **options)


def efficientnet_b8(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-B8: 87.4 M parameters, 62.6 G multiply-accumulates at 672 pixels."""
    return EfficientNet(COEFFICIENTS["b8"], **options)


def efficientnet_l2(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-L2: 480 M parameters, 476 G multiply-accumulates at 800 pixels."""
    return EfficientNet(COEFFICIENTS["l2"], **options)


def efficientnet_lite0(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-Lite0: 4.7 M parameters, for 224 pixels."""
    return EfficientNet(COEFFICIENTS["lite0"], **options)


def efficientnet_lite1(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-Lite1: 5.4 M parameters, for 240 pixels."""
    return EfficientNet(COEFFICIENTS["lite1"], **options)


def efficientnet_lite2(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-Lite2: 6.1 M parameters, for 260 pixels."""
    return EfficientNet(COEFFICIENTS["lite2"], **options)


def efficientnet_lite3(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-Lite3: 8.2 M parameters, for 280 pixels."""
    return EfficientNet(COEFFICIENTS["lite3"], **options)


def efficientnet_lite4(**options: Unpack[Options]) -> EfficientNet:
    """EfficientNet-Lite4: 13.0 M parameters, for 300 pixels."""
    return EfficientNet(COEFFICIENTS["lite4"], **options)
