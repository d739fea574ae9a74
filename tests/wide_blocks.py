"""A block with everything that MBConv, the module, leaves out: other activations and gates, biases, a start."""

from typing import Any, NamedTuple

import torch
from blocks import Drop, assert_outcomes, batch_norms, normal, outcomes, randomise
from torch import nn

from fastmbconv import reference
from fastmbconv.block import BatchNorm, Block, SqueezeExcite, Start
from fastmbconv.mbconv import ACTIVATIONS


class HardSigmoid(nn.Hardsigmoid):
    """Exact in float64."""

    def forward(self, x):
        return reference.hard_sigmoid(x)


GATES = {"sigmoid": nn.Sigmoid, "hardsigmoid": HardSigmoid}


class WideBlock(nn.Module):
    """Its own layers in `forward_eager`, a `Block` in `describe`.

    Args:
        activations: behind the three BatchNorms.
        se: (activation, gate), None for none; `linear` makes its layers linear ones.
        biases: of which convolutions, by their first letters: start, expand, depthwise, project.
        start: kernel size and stride of a depthwise convolution in front.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        stride=1,
        expand_ratio=4,
        activations=("silu", "silu", "none"),
        se=("silu", "sigmoid"),
        linear=False,
        biases="",
        start=None,
    ):
        super().__init__()
        hidden = in_channels * expand_ratio
        self.start_conv = self.start_bn = self.expand_conv = self.expand_bn = self.squeeze = self.excite = None
        if start is not None:
            self.start_conv = depthwise(in_channels, *start, bias="s" in biases)
            self.start_bn = nn.BatchNorm2d(in_channels)
        if expand_ratio != 1:
            self.expand_conv = nn.Conv2d(in_channels, hidden, 1, bias="e" in biases)
            self.expand_bn = nn.BatchNorm2d(hidden)
        self.depthwise_conv = depthwise(hidden, kernel_size, stride, bias="d" in biases)
        self.depthwise_bn = nn.BatchNorm2d(hidden)
        self.activations, self.se, self.linear = activations, se, linear
        self.acts = nn.ModuleList(ACTIVATIONS[activation]() for activation in activations)
        if se is not None:
            layer = nn.Linear if linear else lambda *sizes: nn.Conv2d(*sizes, 1)
            self.squeeze, self.excite = layer(hidden, 3), layer(3, hidden)
            self.se_act, self.gate = ACTIVATIONS[se[0]](), GATES[se[1]]()
        self.project_conv = nn.Conv2d(hidden, out_channels, 1, bias="p" in biases)
        self.project_bn = nn.BatchNorm2d(out_channels)
        self.residual = in_channels == out_channels and stride == 1 and (start is None or start[1] == 1)
        self.drop_path = None

    def forward_eager(self, x):
        h = x if self.start_conv is None else self.start_bn(self.start_conv(x))
        if self.expand_conv is not None:
            h = self.acts[0](self.expand_bn(self.expand_conv(h)))
        h = self.acts[1](self.depthwise_bn(self.depthwise_conv(h)))
        if self.se is not None:
            pooled = h.mean((2, 3)) if self.linear else h.mean((2, 3), keepdim=True)
            gate = self.gate(self.excite(self.se_act(self.squeeze(pooled))))
            h = h * (gate[:, :, None, None] if self.linear else gate)
        h = self.acts[2](self.project_bn(self.project_conv(h)))
        h = h if self.drop_path is None or not self.training else self.drop_path(h)
        return h + x if self.residual else h

    def describe(self):
        se = start = None
        if self.se is not None:
            tensors = (self.squeeze.weight, self.squeeze.bias, self.excite.weight, self.excite.bias)
            se = SqueezeExcite(*tensors, *self.se)
        if (conv := self.start_conv) is not None:
            start = Start(conv.weight, BatchNorm.of(self.start_bn, conv.bias), conv.stride[0], conv.padding[0])
        expand, conv, project = self.expand_conv, self.depthwise_conv, self.project_conv
        return Block(
            expand_weight=None if expand is None else expand.weight,
            bn1=None if expand is None else BatchNorm.of(self.expand_bn, expand.bias),
            depthwise_weight=conv.weight,
            bn2=BatchNorm.of(self.depthwise_bn, conv.bias),
            se=se,
            project_weight=project.weight,
            bn3=BatchNorm.of(self.project_bn, project.bias),
            stride=conv.stride[0],
            padding=conv.padding[0],
            activation=self.activations[0],
            residual=self.residual,
            drop=self.drop_path if self.training else None,
            depthwise_activation=self.activations[1],
            project_activation=self.activations[2],
            start=start,
        )


def depthwise(channels, kernel_size, stride, bias):
    return nn.Conv2d(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, bias=bias)


class WideRow(NamedTuple):
    block: dict[str, Any]
    image: tuple[int, int, int, int]  # N, C, H, W
    drop: bool = False


def wide(out, *args, **kwargs):
    return dict(out_channels=out, activations=args or ("silu", "silu", "none"), **kwargs)


ALL_BIASES = "sedp"
WIDE_ROWS = {
    "mobilenet-v3": WideRow(
        wide(6, "hardswish", "hardswish", "none", se=("relu", "hardsigmoid"), kernel_size=5), (2, 6, 5, 4)
    ),
    "gelu": WideRow(wide(6, "gelu", "gelu", "none", se=("gelu", "sigmoid")), (2, 6, 4, 4), drop=True),
    "gelu-tanh": WideRow(wide(5, "gelu_tanh", "gelu_tanh", "none", se=None, stride=2), (2, 6, 4, 4)),
    "two-activations": WideRow(wide(5, "relu", "hardswish", "gelu"), (2, 6, 4, 4)),
    "no-activation-but-the-first": WideRow(wide(6, "relu6", "none", "none", se=None), (2, 6, 4, 4), drop=True),
    "activation-at-the-end": WideRow(wide(6, "none", "none", "silu", expand_ratio=1, se=None), (2, 6, 4, 4), drop=True),
    "no-expansion": WideRow(wide(5, "silu", "none", "none", expand_ratio=1), (3, 6, 4, 4)),
    "linear-squeeze": WideRow(wide(5, *("hardswish",) * 3, se=("relu", "hardsigmoid"), linear=True), (3, 6, 4, 4)),
    "biases": WideRow(wide(6, biases=ALL_BIASES), (2, 6, 4, 4), drop=True),
    "biases-no-expansion": WideRow(wide(5, biases=ALL_BIASES, expand_ratio=1, se=None, stride=2), (2, 6, 5, 4)),
    "start": WideRow(wide(6, "relu", "relu", "none", se=None, start=(5, 1)), (2, 6, 4, 4), drop=True),
    "start-strided": WideRow(wide(5, "relu", "relu", "none", se=None, start=(3, 2)), (2, 6, 6, 5)),
    "start-everything": WideRow(
        wide(6, "gelu", "none", "hardswish", se=("silu", "sigmoid"), biases=ALL_BIASES, start=(3, 1)), (3, 6, 4, 4)
    ),
}  # fmt: skip


def build_wide(row, dtype=torch.float32, device="cpu", training=True):
    """(module, x, dy); parameters and statistics of BatchNorms in fp32 beside halves."""
    module = randomise(WideBlock(row.image[1], **row.block).double()).to(dtype).to(device)
    for bn in batch_norms(module):
        bn.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if row.drop:
        module.drop_path = Drop()
    module.train(training)
    x = normal(*row.image, dtype=dtype, device=device)
    out, stride = row.block["out_channels"], row.block.get("stride", 1) * (row.block.get("start") or (0, 1))[1]
    height, width = (-(-size // stride) for size in row.image[2:])
    return module, x, normal(x.shape[0], out, height, width, dtype=dtype, device=device)


def assert_wide_parity(module, x, dy):
    """`blocks.assert_module_parity`, with each bias's gradient compared beside its weight's.

    Behind a bias that a BatchNorm takes off again the gradient is 0, and rounding is all that there is of it.
    """
    ours, theirs, exact = (beside_weights(found) for found in outcomes(module, x, dy))
    assert_outcomes(ours, theirs, exact)
    return ours


def beside_weights(found):
    joined = dict(found)
    for name, value in found.items():
        if name.startswith("d ") and name.endswith(".bias"):
            weight = found.get(name.removesuffix("bias") + "weight")
            joined[name] = value if weight is None or value is None else torch.cat((weight.flatten(), value))
    return joined
