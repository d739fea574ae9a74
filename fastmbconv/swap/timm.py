"""timm's blocks: InvertedResidual, DepthwiseSeparableConv (the same without an expansion), EdgeResidual, ConvBnAct."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from fastmbconv.block import Block, DenseBlock, Surrounding
from fastmbconv.swap.parts import (
    Kinds,
    Module,
    Parts,
    Squeeze,
    Stage,
    assemble,
    assemble_dense,
    children_reason,
    kind,
    name,
)

KINDS = Kinds(
    same_convs=frozenset({"timm.layers.conv2d_same.Conv2dSame"}),
    norms=frozenset({"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}),
    gates={
        "timm.layers.activations.Sigmoid": "sigmoid",
        "timm.layers.activations.HardSigmoid": "hardsigmoid",
        "timm.layers.activations_me.HardSigmoidMe": "hardsigmoid",
    },
    drops=frozenset({"timm.layers.drop.DropPath"}),
    activations={
        "timm.layers.activations.Swish": "silu",
        "timm.layers.activations_me.SwishMe": "silu",
        "timm.layers.activations.HardSwish": "hardswish",
        "timm.layers.activations_me.HardSwishMe": "hardswish",
        "timm.layers.activations.GELU": "gelu",
        "timm.layers.activations.GELUTanh": "gelu_tanh",
    },
)
UNITS = {f"timm.layers.conv_bn_act.{unit}" for unit in ("ConvNormAct", "ConvBnAct")}
SQUEEZE_EXCITE = "timm.models._efficientnet_blocks.SqueezeExcite"
INVERTED = {"conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"}
SEPARABLE = {"conv_dw", "bn1", "conv_pw", "bn2"}
EDGE = {"conv_exp", "bn1", "conv_pwl", "bn2"}
SINGLE = {"conv", "bn1"}
UNIVERSAL = {"dw_start", "pw_exp", "dw_mid", "se", "pw_proj", "dw_end", "layer_scale", "drop_path"}
OPTIONAL = frozenset({"aa", "se", "drop_path", "conv_s2d", "bn_s2d"})
MAXVIT = {
    "shortcut", "pre_norm", "down", "conv1_1x1", "norm1", "conv2_kxk", "norm2", "conv3_1x1", "drop_path",
}  # fmt: skip


def inverted_residual(module: Module) -> Block | str:
    """`InvertedResidual`: conv_pw, bn1, conv_dw, bn2, [se], conv_pwl, bn3, [drop_path]; acts are inside the norms."""
    return children_reason(module, INVERTED, OPTIONAL) or _assemble(
        module,
        expand=_stage(module.conv_pw, module.bn1),
        depthwise=_stage(module.conv_dw, module.bn2),
        project=_stage(module.conv_pwl, module.bn3),
    )


def depthwise_separable(module: Module) -> Block | str:
    """`DepthwiseSeparableConv`: conv_dw, bn1, [se], conv_pw, bn2, [drop_path]."""
    return children_reason(module, SEPARABLE, OPTIONAL) or _assemble(
        module,
        expand=None,
        depthwise=_stage(module.conv_dw, module.bn1),
        project=_stage(module.conv_pw, module.bn2),
    )


def _stage(conv: Module, norm: Module) -> Stage:
    return Stage(conv, norm, norm._modules.get("act"))


def _assemble(module: Module, expand: Stage | None, depthwise: Stage, project: Stage) -> Block | str:
    parts = _parts(module, expand, depthwise, project)
    return parts if isinstance(parts, str) else assemble(parts, KINDS)


def _parts(module: Module, expand: Stage | None, depthwise: Stage, project: Stage | None) -> Parts | str:
    children = module._modules
    if children.get("conv_s2d") is not None:
        return "space-to-depth before the block (conv_s2d)"
    aa, se, drop = children.get("aa"), children.get("se"), children.get("drop_path")
    if aa is not None and type(aa) is not nn.Identity:
        return f"anti-aliasing ({name(aa)})"
    gate = None
    if se is not None and type(se) is not nn.Identity:
        if kind(se) != SQUEEZE_EXCITE:
            return f"the squeeze-excite is a {kind(se)}"
        gate = Squeeze(se.conv_reduce, se.act1, se.conv_expand, se.gate)
    return Parts(
        expand=expand,
        depthwise=depthwise,
        se=gate,
        project=project,
        residual=module.has_skip,
        drop=drop,
        drop_rate=getattr(drop, "drop_prob", 0.0),
    )


def edge_residual(module: Module) -> DenseBlock | str:
    """`EdgeResidual`: conv_exp, bn1, [se], conv_pwl, bn2, [drop_path]."""
    return children_reason(module, EDGE, OPTIONAL) or _dense(
        module, _stage(module.conv_exp, module.bn1), _stage(module.conv_pwl, module.bn2)
    )


def conv_bn_act(module: Module) -> DenseBlock | str:
    """`ConvBnAct`: conv, bn1, [drop_path]."""
    return children_reason(module, SINGLE, OPTIONAL) or _dense(module, _stage(module.conv, module.bn1), None)


def _dense(module: Module, dense: Stage, project: Stage | None) -> DenseBlock | str:
    parts = _parts(module, None, dense, project)
    return parts if isinstance(parts, str) else assemble_dense(parts, KINDS)


def cond_conv_residual(module: Module) -> str:
    return "its weights depend on the input (CondConv)"


def universal_inverted_residual(module: Module) -> Block | str:
    """`UniversalInvertedResidual`: [dw_start,] pw_exp, dw_mid, [se], pw_proj, [drop_path]; conv, bn in each."""
    if (reason := children_reason(module, UNIVERSAL)) is not None:
        return reason
    for layer, told in (("dw_end", "a depthwise convolution behind the projection"), ("layer_scale", "layer scale")):
        if type(module._modules[layer]) is not nn.Identity:
            return f"{told} ({layer})"
    if type(module.dw_mid) is nn.Identity:
        return "no depthwise convolution behind the expansion (dw_mid)"
    stages = {}
    for layer in ("dw_start", "pw_exp", "dw_mid", "pw_proj"):
        unit = module._modules[layer]
        if layer == "dw_start" and type(unit) is nn.Identity:
            continue
        if kind(unit) not in UNITS:
            return f"{layer} is a {name(unit)}"
        reason = children_reason(unit, {"conv", "bn"}, frozenset({"aa"}))
        if reason is None and type(unit._modules.get("aa") or nn.Identity()) is not nn.Identity:
            reason = f"anti-aliasing ({name(unit.aa)})"
        if reason is not None:
            return f"{layer}: {reason}"
        stages[layer] = _stage(unit.conv, unit.bn)
    parts = _parts(module, stages["pw_exp"], stages["dw_mid"], stages["pw_proj"])
    return parts if isinstance(parts, str) else assemble(replace(parts, start=stages.get("dw_start")), KINDS)


def mobile_attention(module: Module) -> str:
    return "an attention block"


def chained(layers: tuple[Module, ...], x: Tensor) -> Tensor:
    """x through one layer after the other."""
    for layer in layers:
        x = layer(x)
    return x


def maxvit_mbconv(module: Module) -> Block | str:
    """MaxViT's and CoAtNet's `MbConvBlock`: its convolutions are a block without residual and without a last BatchNorm.

    pre_norm and down before it, drop_path and the shortcut behind it are the module's own.
    """
    reason = children_reason(module, MAXVIT, frozenset({"se", "se_early"}))
    if reason is None and module._modules.get("se_early") is not None:
        reason = "squeeze-excite in front of the BatchNorm (se_early)"
    if reason is not None:
        return reason
    se, squeeze = module._modules.get("se"), None
    if se is not None and type(se) is not nn.Identity:
        if kind(se) != "timm.layers.squeeze_excite.SEModule":
            return f"the squeeze-excite is a {kind(se)}"
        if se.add_maxpool or type(se.bn) is not nn.Identity:
            return "a squeeze-excite with a maximum or a norm"
        squeeze = Squeeze(se.fc1, se.act, se.fc2, se.gate)
    layers = (module.conv1_1x1, module.norm1, module.conv2_kxk, module.norm2, se, module.conv3_1x1)
    core = tuple(layer for layer in layers if layer is not None)
    block = assemble(
        Parts(
            expand=_stage(module.conv1_1x1, module.norm1),
            depthwise=_stage(module.conv2_kxk, module.norm2),
            se=squeeze,
            project=Stage(module.conv3_1x1, None, None),
            residual=False,
            drop=None,
            drop_rate=0.0,
        ),
        KINDS,
    )
    if isinstance(block, str):
        return block

    def after(y: Tensor, x: Tensor) -> Tensor:
        dropped: Tensor = module.drop_path(y)
        return dropped + module.shortcut(x)

    around = Surrounding(partial(chained, (module.pre_norm, module.down)), partial(chained, core), after)
    return replace(block, surrounding=around)


BLOCKS = {
    f"timm.models._efficientnet_blocks.{block}": adapter
    for block, adapter in (
        ("InvertedResidual", inverted_residual),
        ("DepthwiseSeparableConv", depthwise_separable),
        ("EdgeResidual", edge_residual),
        ("ConvBnAct", conv_bn_act),
        ("CondConvResidual", cond_conv_residual),
        ("UniversalInvertedResidual", universal_inverted_residual),
        ("MobileAttention", mobile_attention),
    )
} | {"timm.models.maxxvit.MbConvBlock": maxvit_mbconv}
