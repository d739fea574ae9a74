"""transformers' EfficientNetBlock, and ALIGN's copy of it."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastmbconv.block import Block
from fastmbconv.swap.parts import Kinds, Module, NotNow, Parts, Squeeze, Stage, assemble, children_reason, kind, name

PREFIXES = (
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNet",
    "transformers.models.align.modeling_align.AlignVision",
)
KINDS = Kinds(
    convs=frozenset(f"{prefix}DepthwiseConv2d" for prefix in PREFIXES),
    activations={"transformers.activations.SiLUActivation": "silu"},
)
LAYERS = {
    "expansion": ("ExpansionLayer", {"expand_conv", "expand_bn", "expand_act"}),
    "depthwise_conv": ("DepthwiseLayer", {"depthwise_conv_pad", "depthwise_conv", "depthwise_norm", "depthwise_act"}),
    "squeeze_excite": ("SqueezeExciteLayer", {"squeeze", "reduce", "expand", "act_reduce", "act_expand"}),
    "projection": ("FinalBlockLayer", {"project_conv", "project_bn", "dropout"}),
}


def block(prefix: str, module: Module) -> Block | NotNow | str:
    """[expansion,] depthwise_conv, squeeze_excite, projection; the last has the residual and an elementwise dropout."""
    expands = module.expand_ratio != 1
    reason = _layers_reason(prefix, module, set(LAYERS) if expands else set(LAYERS) - {"expansion"})
    if reason is not None:
        return reason
    depthwise, excite, projection = module.depthwise_conv, module.squeeze_excite, module.projection
    padding = _padding(depthwise)
    if isinstance(padding, str):
        return padding
    if type(excite.squeeze) is not nn.AdaptiveAvgPool2d or excite.squeeze.output_size not in (1, (1, 1)):
        return f"the squeeze-excite pools with {name(excite.squeeze)}"
    residual, dropout = projection.apply_dropout, projection.dropout
    if residual and type(dropout) not in (nn.Dropout, nn.Identity):
        return f"the residual branch is dropped by a {name(dropout)}"
    expand = module.expansion if expands else None
    result = assemble(
        Parts(
            expand=None if expand is None else Stage(expand.expand_conv, expand.expand_bn, expand.expand_act),
            depthwise=Stage(depthwise.depthwise_conv, depthwise.depthwise_norm, depthwise.depthwise_act, padding),
            se=Squeeze(excite.reduce, excite.act_reduce, excite.expand, excite.act_expand),
            project=Stage(projection.project_conv, projection.project_bn, None),
            residual=residual,
            drop=None,
            drop_rate=0.0,
        ),
        KINDS,
    )
    if isinstance(result, Block) and residual and dropout.training and getattr(dropout, "p", 0) > 0:
        return NotNow(result, f"elementwise dropout while training (p {dropout.p:g}), not stochastic depth")
    return result


def _layers_reason(prefix: str, module: Module, required: set[str]) -> str | None:
    reason = children_reason(module, required)
    if reason is not None:
        return reason
    for child in sorted(required):
        layer, (suffix, leaves) = module._modules[child], LAYERS[child]
        if kind(layer) != f"{prefix}{suffix}":
            return f"{child} is a {kind(layer)}"
        reason = children_reason(layer, leaves)
        if reason is not None:
            return f"{child}: {reason}"
    return None


def _padding(layer: Module) -> int | tuple[int, int] | str | None:
    """What the layer pads before its convolution, which it does only where its stride is 2; None: nothing."""
    if layer.stride != 2:
        return None
    pad, conv = layer.depthwise_conv_pad, layer.depthwise_conv
    if type(pad) is not nn.ZeroPad2d:
        return f"the depthwise convolution pads with {name(pad)}"
    if conv.padding not in ("valid", (0, 0)):
        return f"the depthwise convolution pads twice (padding {conv.padding})"
    (left, right), (top, bottom) = pad.padding[:2], pad.padding[2:]
    if (left, right) != (top, bottom):
        return "the depthwise convolution pads height and width differently"
    return left if left == right else (left, right)


BLOCKS = {f"{prefix}Block": partial(block, prefix) for prefix in PREFIXES}
