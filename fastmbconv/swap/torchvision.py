"""torchvision's blocks: MBConv (EfficientNet, EfficientNetV2) and the inverted residuals of its mobile nets."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastmbconv.block import Block, DenseBlock
from fastmbconv.swap.parts import Kinds, Module, Parts, Squeeze, Stage, assemble, assemble_dense, kind, name

KINDS = Kinds(drops=frozenset({"torchvision.ops.stochastic_depth.StochasticDepth"}))
SEQUENTIALS = {"torch.nn.modules.container.Sequential", "torchvision.ops.misc.Conv2dNormActivation"}
SQUEEZE_EXCITE = "torchvision.ops.misc.SqueezeExcitation"


def mbconv(module: Module) -> Block | str:
    """`MBConv`: block = [expansion,] depthwise, [squeeze-excite,] projection; stochastic_depth if use_res_connect."""
    return _unknown_child(module, {"block", "stochastic_depth"}) or _sequence(
        module.block, module.use_res_connect, module.stochastic_depth
    )


def mobilenet_v3(module: Module) -> Block | str:
    """MobileNetV3's `InvertedResidual`: as MBConv, without stochastic depth."""
    return _unknown_child(module, {"block"}) or _sequence(module.block, module.use_res_connect, None)


def mobilenet_v2(module: Module) -> Block | str:
    """MobileNetV2's `InvertedResidual`: conv = [expansion,] depthwise, convolution, norm."""
    return _unknown_child(module, {"conv"}) or _flat(module.conv, module.use_res_connect)


def mnasnet(module: Module) -> Block | str:
    """MNASNet's `_InvertedResidual`: layers = convolution, norm, activation, twice, and convolution, norm."""
    return _unknown_child(module, {"layers"}) or _flat(module.layers, module.apply_residual)


def _unknown_child(module: Module, known: set[str]) -> str | None:
    unknown = set(module._modules) - known
    return f"an unknown submodule {min(unknown)}" if unknown else None


def _sequence(block: Module, residual: bool, drop: Module | None) -> Block | str:
    """Stages in a Sequential, with a squeeze-excite before the last."""
    if type(block) is not nn.Sequential or len(block) < 2:
        return f"its block is a {name(block)}, not a Sequential of stages"
    *layers, last = block._modules.values()
    gate = None
    if kind(layers[-1]) not in SEQUENTIALS:
        found = _gate(layers.pop())
        if isinstance(found, str):
            return found
        gate = found
    stages = []
    for layer in (*layers, last):
        stage = _stage(layer)
        if isinstance(stage, str):
            return stage
        stages.append(stage)
    return _assemble(stages, gate, residual, drop)


def _flat(layers: Module, residual: bool) -> Block | str:
    """Stages in a Sequential whose parts may be Sequentials themselves: each convolution starts one."""
    stages: list[list[Module]] = []
    for leaf in _leaves(layers):
        if isinstance(leaf, nn.Conv2d):
            stages.append([])
        elif not stages or len(stages[-1]) == 3:
            return f"a {name(leaf)} where a convolution is expected"
        stages[-1].append(leaf)
    if any(len(stage) == 1 for stage in stages):
        return "a convolution without a norm"
    return _assemble([Stage(conv, norm, *act or [None]) for conv, norm, *act in stages], None, residual, None)


def _leaves(layer: Module) -> Iterator[Module]:
    if kind(layer) not in SEQUENTIALS:
        yield layer
        return
    for child in layer._modules.values():
        yield from _leaves(child)


def _assemble(stages: list[Stage], gate: Squeeze | None, residual: bool, drop: Module | None) -> Block | str:
    if len(stages) not in (2, 3):
        return f"{len(stages)} convolutions (supported: 2, or 3 with an expansion)"
    *expand, depthwise, project = stages
    return assemble(
        Parts(
            expand=expand[0] if expand else None,
            depthwise=depthwise,
            se=gate,
            project=project,
            residual=residual,
            drop=drop,
            drop_rate=getattr(drop, "p", 0.0),
        ),
        KINDS,
    )


def _stage(layer: Module) -> Stage | str:
    if kind(layer) not in SEQUENTIALS or len(layer) not in (2, 3):
        return f"a stage is a {name(layer)}, not convolution, norm and activation"
    conv, norm, *act = layer._modules.values()
    return Stage(conv, norm, *act or [None])


def _gate(layer: Module) -> Squeeze | None | str:
    if type(layer) is nn.Identity:
        return None
    if kind(layer) != SQUEEZE_EXCITE:
        return f"the squeeze-excite is a {kind(layer)}"
    if type(layer.avgpool) is not nn.AdaptiveAvgPool2d or layer.avgpool.output_size not in (1, (1, 1)):
        return f"the squeeze-excite pools with {name(layer.avgpool)}"
    return Squeeze(layer.fc1, layer.activation, layer.fc2, layer.scale_activation)


def fused_mbconv(module: Module) -> DenseBlock | str:
    """`FusedMBConv`: block = dense convolution, [projection]; stochastic_depth if use_res_connect."""
    unknown = _unknown_child(module, {"block", "stochastic_depth"})
    if unknown is not None:
        return unknown
    if type(module.block) is not nn.Sequential or len(module.block) not in (1, 2):
        return f"its block is a {name(module.block)}, not a Sequential of 1 or 2 stages"
    stages = []
    for layer in module.block._modules.values():
        stage = _stage(layer)
        if isinstance(stage, str):
            return stage
        stages.append(stage)
    dense, *project = stages
    drop = module.stochastic_depth
    return assemble_dense(
        Parts(
            expand=None,
            depthwise=dense,
            se=None,
            project=project[0] if project else None,
            residual=module.use_res_connect,
            drop=drop,
            drop_rate=getattr(drop, "p", 0.0),
        ),
        KINDS,
    )


BLOCKS = {
    "torchvision.models.efficientnet.MBConv": mbconv,
    "torchvision.models.efficientnet.FusedMBConv": fused_mbconv,
    "torchvision.models.mobilenetv2.InvertedResidual": mobilenet_v2,
    "torchvision.models.mobilenetv3.InvertedResidual": mobilenet_v3,
    "torchvision.models.mnasnet._InvertedResidual": mnasnet,
}
