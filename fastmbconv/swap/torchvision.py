"""torchvision's MBConv (EfficientNet, EfficientNetV2)."""

from __future__ import annotations

from torch import nn

from fastmbconv.block import Block
from fastmbconv.swap.parts import Gate, Kinds, Module, Parts, Stage, assemble, kind, name

KINDS = Kinds(drops=frozenset({"torchvision.ops.stochastic_depth.StochasticDepth"}))
SEQUENTIALS = {"torch.nn.modules.container.Sequential", "torchvision.ops.misc.Conv2dNormActivation"}
SQUEEZE_EXCITE = "torchvision.ops.misc.SqueezeExcitation"


def mbconv(module: Module) -> Block | str:
    """`MBConv`: block = [expansion,] depthwise, [squeeze-excite,] projection; stochastic_depth if use_res_connect."""
    unknown = set(module._modules) - {"block", "stochastic_depth"}
    if unknown:
        return f"an unknown submodule {min(unknown)}"
    if type(module.block) is not nn.Sequential or len(module.block) < 2:
        return f"its block is a {name(module.block)}, not a Sequential of stages"
    *layers, last = module.block._modules.values()
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
    if len(stages) not in (2, 3):
        return f"{len(stages)} convolutions (supported: 2, or 3 with an expansion)"
    *expand, depthwise, project = stages
    return assemble(
        Parts(
            expand=expand[0] if expand else None,
            depthwise=depthwise,
            se=gate,
            project=project,
            residual=module.use_res_connect,
            drop=module.stochastic_depth,
            drop_rate=getattr(module.stochastic_depth, "p", 0.0),
        ),
        KINDS,
    )


def _stage(layer: Module) -> Stage | str:
    if kind(layer) not in SEQUENTIALS or len(layer) not in (2, 3):
        return f"a stage is a {name(layer)}, not convolution, norm and activation"
    conv, norm, *act = layer._modules.values()
    return Stage(conv, norm, act[0] if act else None)


def _gate(layer: Module) -> Gate | None | str:
    if type(layer) is nn.Identity:
        return None
    if kind(layer) != SQUEEZE_EXCITE:
        return f"the squeeze-excite is a {kind(layer)}"
    if type(layer.avgpool) is not nn.AdaptiveAvgPool2d or layer.avgpool.output_size not in (1, (1, 1)):
        return f"the squeeze-excite pools with {name(layer.avgpool)}"
    return Gate(layer.fc1, layer.activation, layer.fc2, layer.scale_activation)


def fused_mbconv(module: Module) -> str:
    return "a Fused-MBConv: its expansion is a full convolution, there is no depthwise one"


BLOCKS = {
    "torchvision.models.efficientnet.MBConv": mbconv,
    "torchvision.models.efficientnet.FusedMBConv": fused_mbconv,
}
