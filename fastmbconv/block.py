"""An MBConv block as data: its tensors and settings at one call, whichever library's module they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fastmbconv import ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Activation = Literal["none", "silu", "relu", "relu6", "hardswish", "gelu", "gelu_tanh"]
Gate = Literal["sigmoid", "hardsigmoid"]
Padding = int | tuple[int, int] | Literal["same"]
Memory = Literal["fast", "lean"]


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """One BatchNorm2d's tensors and settings, as they are at this call.

    `weight`, `bias`, `running_mean`, `running_var` are [C] or None; `momentum` None means the cumulative average.
    `training` is the module's own flag: a frozen BN inside a training model has False. With a `process_group` the
    batch's statistics, in training, are those of all its processes' batches; each must make the same calls.
    `conv_bias` [C] is the bias of the convolution in front of it, where that has one: part of the shift, and of the
    running mean.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    eps: float
    momentum: float | None
    training: bool
    process_group: ProcessGroup | None = None
    conv_bias: Tensor | None = None

    @classmethod
    def of(cls, module: nn.BatchNorm2d | nn.SyncBatchNorm, conv_bias: Tensor | None = None) -> BatchNorm:
        """Describe a module; nothing is copied. Statistics that it holds but does not track stay out of training."""
        tracked = module.track_running_stats or not module.training
        return cls(
            weight=module.weight,
            bias=module.bias,
            running_mean=module.running_mean if tracked else None,
            running_var=module.running_var if tracked else None,
            num_batches_tracked=module.num_batches_tracked,
            eps=module.eps,
            momentum=module.momentum,
            training=module.training,
            process_group=ranks.group_of(module) if isinstance(module, nn.SyncBatchNorm) else None,
            conv_bias=conv_bias,
        )

    @property
    def batch_statistics(self) -> bool:
        """True where this call normalises with the batch's own mean and variance."""
        return self.training or self.running_mean is None

    @property
    def group(self) -> str | None:
        """Names the processes that this call's statistics are taken over; None: this one alone."""
        return self.process_group.group_name if self.training and self.process_group is not None else None

    @property
    def updates(self) -> bool:
        """True where this call moves the running statistics."""
        return self.training and self.running_mean is not None


@dataclass(frozen=True, slots=True)
class SqueezeExcite:
    """Weights of a squeeze-and-excitation path.

    reduce [R, C, 1, 1], expand [C, R, 1, 1]; [R, C] and [C, R] where they are linear layers'. Biases are [R] and [C],
    or None.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    activation: Activation = "silu"
    gate: Gate = "sigmoid"


@dataclass(frozen=True, slots=True)
class Start:
    """A depthwise convolution and its BatchNorm in front of a block: MobileNetV4's universal inverted bottleneck.

    `weight` is [C_in, 1, K, K]; there is no activation.
    """

    weight: Tensor
    bn: BatchNorm
    stride: int
    padding: Padding

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]


@dataclass(frozen=True, slots=True)
class Surrounding:
    """What a module computes that holds a block among other layers: after(block(before(x)), x), for its image x.

    `own` is the block by the module's layers, for calls that run eager.
    """

    before: Callable[[Tensor], Tensor]
    own: Callable[[Tensor], Tensor]
    after: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Block:
    """One MBConv block as data.

    [depthwise, BN,] [expand 1x1, BN, act], depthwise KxK, BN, act, [SE], project 1x1, [BN,] [act,] [drop, + x]

    Args:
        expand_weight: [C, C_in, 1, 1], or None for a block without expansion (then `bn1` is None too).
        depthwise_weight: [C, 1, K, K].
        project_weight: [C_out, C, 1, 1].
        padding: pixels on every side, or a pair (top and left, bottom and right), or "same" for TensorFlow's SAME (at
            any resolution).
        activation: behind the expansion's BatchNorm.
        residual: add the block's input to its output (stride 1, C_in == C_out).
        drop: stochastic depth: each sample's factor, in its dtype or a wider one, from a tensor [N, 1, 1, 1] of ones;
            None if inactive.
        depthwise_activation: behind the depthwise convolution's; None: as `activation`.
        project_activation: behind the projection's, before stochastic depth and the shortcut.
        start: what stands in front of all this; the shortcut is what comes before it.
        project_bias: [C_out], where no BatchNorm is behind the projection: `bn3` is None then.
        surrounding: the block's place in a module that computes more; nothing that is asked of the block knows of it.

    `calls` is what functional.py remembers of the block's calls.
    """

    expand_weight: Tensor | None
    bn1: BatchNorm | None
    depthwise_weight: Tensor
    bn2: BatchNorm
    se: SqueezeExcite | None
    project_weight: Tensor
    bn3: BatchNorm | None
    stride: int
    padding: Padding
    activation: Activation
    residual: bool
    drop: Callable[[Tensor], Tensor] | None = None
    depthwise_activation: Activation | None = None
    project_activation: Activation = "none"
    start: Start | None = None
    project_bias: Tensor | None = None
    surrounding: Surrounding | None = None
    calls: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def activations(self) -> tuple[Activation, Activation, Activation]:
        """Behind the expansion's, the depthwise convolution's and the projection's BatchNorm."""
        return self.activation, self.depthwise_activation or self.activation, self.project_activation

    @property
    def kernel_size(self) -> int:
        return self.depthwise_weight.shape[-1]

    def behind_start(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[N, C_in, H, W] of what reaches the block proper, for an input of this shape."""
        n, c, *sizes = shape
        if self.start is not None:
            k, stride, padding = self.start.kernel_size, self.start.stride, self.start.padding
            sizes = [(size + sum(pads(size, k, stride, padding)) - k) // stride + 1 for size in sizes]
        return n, c, *sizes

    @property
    def in_channels(self) -> int:
        return self.depthwise_weight.shape[0] if self.expand_weight is None else self.expand_weight.shape[1]


@dataclass(frozen=True, slots=True)
class DenseBlock:
    """A Fused-MBConv block as data: dense KxK conv, BN, act, [SE], [project 1x1, BN, [act]], [drop, + x].

    Args:
        conv: the convolution's module, [N, C_in, H, W] -> [N, C, H', W']; `weight`, `stride` and `padding` are its own,
            and a bias that it adds itself is none of `bn1`.
        project_weight: [C_out, C, 1, 1], or None for a block that ends after its activation (then `bn2` and `se` are
            None too).
        drop, project_activation: as in `Block`.
    """

    conv: nn.Module
    weight: Tensor
    stride: int
    padding: Padding
    bn1: BatchNorm
    se: SqueezeExcite | None
    project_weight: Tensor | None
    bn2: BatchNorm | None
    activation: Activation
    residual: bool
    drop: Callable[[Tensor], Tensor] | None = None
    project_activation: Activation = "none"
    calls: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def activations(self) -> tuple[Activation, Activation]:
        """Behind the convolution's and the projection's BatchNorm."""
        return self.activation, self.project_activation

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * getattr(self.conv, "groups", 1)

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0] if self.project_weight is None else self.project_weight.shape[0]


def pads(size: int, kernel_size: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Padding (before, after) of one spatial axis; "same" follows TensorFlow: the odd pixel goes after."""
    if isinstance(padding, tuple):
        return padding
    if padding != "same":
        return padding, padding
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
