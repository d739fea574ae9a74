"""Models that hold MBConv blocks as people write them, for whoever finds blocks by what they compute.

Nothing here comes from a library that `fuse` knows by name. An MBConv block is [pointwise conv, BN, act], depthwise
conv, BN, act, [squeeze-and-excitation], pointwise conv, BN, [act], [+ x, with or without stochastic depth].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import written_efficientnets as e
import written_mobilenets as m
from torch import nn


@dataclass(frozen=True)
class Written:
    """`make()` runs on `shape` in training and in eval mode.

    `blocks` counts its MBConv blocks. `note`: what is special.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    blocks: int
    note: str


def _model(*layers: nn.Module, width: int) -> nn.Module:
    """A model for pictures: these blocks between a stem and a classifier."""
    return nn.Sequential(m.stem(_inputs(layers)), *layers, m.classifier(width))


def _inputs(layers: tuple[nn.Module, ...]) -> int:
    """The channels that the first of these layers takes."""
    return next(part.in_channels for part in layers[0].modules() if isinstance(part, nn.Conv2d))


def _maker(block: Callable[..., nn.Module], *settings: tuple, width: int = 0) -> Callable[[], nn.Module]:
    """Blocks by their arguments: alone, or with `width` channels at their end in a model for pictures."""

    def make() -> nn.Module:
        blocks = [block(*arguments) for arguments in settings]
        return _model(*blocks, width=width) if width else nn.Sequential(*blocks)

    return make


PICTURE, IMAGE, SMALL = (2, 3, 16, 16), (2, 8, 16, 16), (2, 8, 8, 8)
_maxvit = e.maxvit_block
_static = partial(e.StaticSameConv2d, image_size=8)

WRITTEN = {
    # MobileNets
    "v1_module": Written(
        _maker(m.SeparableBlock, (8, 16), (16, 16, 2), width=16), PICTURE, 2,
        "functional ReLU; ReLU behind the projection too",
    ),
    "v1_flat": Written(
        m.flat_separable_model, PICTURE, 3,
        "a whole model in one Sequential; ReLU behind the projection, which could be the next block's expansion: "
        "3 blocks, or fewer with more in them, both right if the output is",
    ),
    "v2_one_sequential": Written(
        _maker(m.FlatInvertedResidual, (8, 8, 1, 1), (8, 16, 2, 3), (16, 16, 1, 2), width=16), PICTURE, 3,
        "x + self.conv(x); the first block has no expansion",
    ),
    "v2_conv_bn_relu": Written(
        _maker(m.LayeredInvertedResidual, (8, 8, 1, 1), (8, 16, 2, 3), (16, 16, 1, 2), width=16), PICTURE, 3,
        "a subclass of Sequential holds conv, BN and ReLU6, and lies in a Sequential",
    ),
    "v2_shortcut": Written(
        _maker(m.ShortcutBlock, (8, 8, 2, 1), (8, 12, 2, 1), (12, 12, 2, 2), width=12), PICTURE, 3,
        "the residual is an empty Sequential; the second block, which has none, adds a convolution of x",
    ),
    "v2_flat": Written(
        m.flat_model, PICTURE, 2, "stem, two blocks and head in one Sequential, layer after layer, no residual"
    ),
    "v2_nested": Written(
        _maker(m.nested_block, (8, 8, 1), (8, 12, 2)), IMAGE, 2,
        "named Sequentials in a Sequential, without a forward; none has a residual, though the first could",
    ),
    "v2_module_list": Written(
        m.FeaturePyramid, PICTURE, 3, "a ModuleList that the model loops over itself; it keeps some of the maps"
    ),
    "v3_gate_before_activation": Written(
        _maker(
            m.GatedBeforeActivation, (8, 8, 8, 3, 1, False, False), (8, 24, 12, 5, 2, False, False),
            (12, 24, 12, 3, 1, True, True), (12, 12, 12, 3, 1, True, False), width=12,
        ), PICTURE, 4,
        "gate by Linear and view; the third block's stands before its hard-swish of two inner modules; gates are hard",
    ),
    "v3_gate_after_activation": Written(
        _maker(
            m.GatedAfterActivation, (8, 8, 3, 1, 16, True, "RE"), (8, 12, 5, 2, 24, True, "HS"),
            (12, 12, 5, 1, 24, False, "RE"), width=12,
        ), PICTURE, 3,
        "gate by Linear and expand_as, Identity where there is none; the second block has hard-swish, by F.relu6",
    ),
    "v3_activated_sum": Written(
        _maker(m.ActivatedSumBlock, (3, 8, 16, 8, 1, nn.ReLU, False), (5, 8, 24, 12, 2, nn.Hardswish, True)),
        IMAGE, 2, 
        "activation behind the sum; a BatchNorm in a hard gate; the second block's skip has a depthwise conv too",
    ),
    "v4_universal": Written(
        _maker(
            m.UniversalBottleneck, (8, 8, 0, 3, 1, 2), (8, 12, 3, 5, 2, 2), (12, 12, 3, 3, 1, 2), (12, 12, 3, 0, 1, 2),
        ), IMAGE, 3,
        "a depthwise conv and BN before the expansion: an MBConv without residual stands behind it in the second and "
        "third block, the fourth has none in its middle and is no MBConv",
    ),
    "v4_bias": Written(
        _maker(m.UniversalBottleneck, (8, 8, 0, 3, 1, 2, True), (8, 12, 0, 3, 2, 2, True)), IMAGE, 2,
        "every convolution has a bias before its BatchNorm, which running means hold",
    ),
    "mobilevit": Written(
        _maker(m.MV2Block, (8, 8, 1, 2), (8, 16, 2, 2), width=16), PICTURE, 2, "SiLU, out = out + x"
    ),
    # EfficientNets
    "swish_module": Written(
        _maker(partial(e.PaddedBlock, conv=e.plain_conv), (8, 8, 1, 3, 1), (8, 12, 2, 5, 2), (12, 12, 2, 3, 1)),
        IMAGE, 3, "x * sigmoid(x) as a module; gate by pool and convolutions, its sigmoid a function; eps 1e-3",
    ),
    "swish_autograd": Written(
        _maker(e.PaddedBlock, (8, 8, 2, 3, 1, e.plain_conv, e.FrugalSwish)), SMALL, 1,
        "SiLU as an autograd.Function, opaque to a trace: it is named nowhere",
    ),
    "same_padding": Written(
        _maker(partial(e.PaddedBlock, conv=e.SameConv2d), (8, 8, 2, 3, 1), (8, 12, 2, 3, 2), (12, 12, 2, 5, 1)),
        SMALL, 3, "a Conv2d of the author's pads as TensorFlow does, by arithmetic on the image's shape",
    ),
    "static_padding": Written(
        _maker(e.PaddedBlock, (8, 8, 2, 3, 1, _static), (8, 12, 2, 5, 2, _static)), SMALL, 2,
        "a Conv2d of the author's with a ZeroPad2d inside and F.conv2d; (1, 2) pixels before and after at stride 2",
    ),
    "mean": Written(
        _maker(e.MeanBlock, (8, 8), (8, 12, 2), (12, 12, 1, 1, 5), (12, 12, 1, 2, 3, False)), IMAGE, 4,
        "gate by mean and multiplication in the block's own forward, swish a function, x += identity, flags decide",
    ),
    "argument": Written(
        lambda: e.ArgumentModel(0.2), IMAGE, 3,
        "drop_connect's rate is an optional argument; functional pool and activation, torch.mul, torch.add",
    ),
    "argument_left_out": Written(
        _maker(e.ArgumentBlock, (8, 8), (8, 12, 2)), IMAGE, 2, "the same blocks, called without their argument"
    ),
    "drop_path_module": Written(
        _maker(partial(e.DropPathBlock, drop_rate=0.3), (8, 8), (8, 12, 2), (12, 12)), IMAGE, 3,
        "DropPath as a module without parameters; gate by view and mean; one SiLU module for all places",
    ),
    "checkpointed": Written(
        _maker(e.CheckpointedBlock, (8, 8)), IMAGE, 1, "forward through torch.utils.checkpoint while it trains"
    ),
    "asserting": Written(
        _maker(e.AssertingBlock, (8, 8), (8, 12, 2)), IMAGE, 2, "an assert on the image's shape before the block"
    ),
    "tutorial": Written(
        _maker(e.SurvivalBlock, (8, 8, 3, 1, 1), (8, 12, 5, 2, 2), (12, 12, 3, 1, 2)), IMAGE, 3,
        "stochastic depth as a method, its mask a comparison; the gate is a child of the Sequential that projects",
    ),
    "v2_efficientnet": Written(
        _maker(e.V2Block, (8, 8, 1, 2, False), (8, 12, 2, 2, True), (12, 12, 1, 2, True)), IMAGE, 2,
        "the first block is a Fused-MBConv; gate by Linear, flatten and an index with None",
    ),
    "coatnet": Written(
        _maker(e.CoAtNetBlock, (8, 8), (8, 12, True), (12, 12)), IMAGE, 2,
        "GELU; the second block is none: it strides in its expansion, and adds a pooled projection",
    ),
    "coatnet_prenorm": Written(
        _maker(partial(e.CoAtNetBlock, prenorm=True), (8, 8), (8, 8)), IMAGE, 2,
        "GELU; a BatchNorm before the block, and the residual from before that: none of the block's own",
    ),
    "maxvit": Written(
        lambda: nn.Sequential(_maxvit(8, 8, dropout=0.2), _maxvit(8, 12, True), _maxvit(12, 12)), IMAGE, 3,
        "Sequentials in a wrapper that drops and adds; gate by flatten(2).mean(-1), Linear without bias, Unflatten",
    ),
    "maxvit_window": Written(
        lambda: nn.Sequential(_maxvit(8, 8, gate=e.WindowSE)), SMALL, 1,
        "the gate pools by a window that happens to be the image",
    ),
    "maxvit_sliced": Written(
        lambda: nn.Sequential(_maxvit(8, 8, gate=e.SlicedSE)), IMAGE, 1,
        "the gate's forward slices its Sequential: a module without a name, for a trace",
    ),
    "maxvit_gelu": Written(
        lambda: nn.Sequential(_maxvit(8, 8, act=nn.GELU, bias=True), _maxvit(8, 12, True, nn.GELU, True)), IMAGE, 2,
        "GELU, and biases before each BatchNorm",
    ),
    "tinyvit": Written(
        _maker(e.TinyViTBlock, (8, 2), (8, 2, nn.GELU, 0.2)), IMAGE, 2,
        "GELU; conv and BN are children `c` and `bn` of a Sequential; activation behind the sum, which is in place",
    ),
    "tinyvit_relu": Written(
        _maker(e.TinyViTBlock, (8, 2, nn.ReLU)), IMAGE, 1, "the same with ReLU: only the last one is too much"
    ),
}  # fmt: skip
