"""efficientnet_pytorch's MBConvBlock (lukemelas), and segmentation_models_pytorch's copy of it.

Both call `forward(inputs, drop_connect_rate=None)`: the rate comes with each call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmbconv.block import Block
from fastmbconv.swap.parts import Kinds, Module, Parts, Squeeze, Stage, assemble, children_reason, kind, name

HOMES = ("efficientnet_pytorch.utils", "segmentation_models_pytorch.encoders._efficientnet")
KINDS = Kinds(
    convs=frozenset(f"{home}.Conv2dStaticSamePadding" for home in HOMES),
    same_convs=frozenset(f"{home}.Conv2dDynamicSamePadding" for home in HOMES),
    activations={"efficientnet_pytorch.utils.MemoryEfficientSwish": "silu"},
)
COMMON = {"_depthwise_conv", "_bn1", "_project_conv", "_bn2", "_swish"}
EXPAND = frozenset({"_expand_conv", "_bn0"})
EXCITE = frozenset({"_se_reduce", "_se_expand"})
STAGES = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))


def lukemelas(module: Module, drop_connect_rate: Any = None) -> Block | str:
    """`MBConvBlock`: what its forward runs follows from its `_block_args`, `has_se` and `id_skip`."""
    arguments = getattr(module, "_block_args", None)
    if arguments is None or not hasattr(module, "has_se"):
        return "no _block_args or has_se: another version of this class"
    residual = module.id_skip and arguments.stride == 1 and arguments.input_filters == arguments.output_filters
    return _assemble(module, arguments.expand_ratio != 1, module.has_se, residual, drop_connect_rate)


def smp(module: Module, drop_connect_rate: Any = None) -> Block | str:
    """The copy: what its forward runs is decided at construction; without an expansion, Identities stand for it."""
    flags = ("_has_expansion", "_has_se", "_has_drop_connect")
    if not all(hasattr(module, flag) for flag in flags):
        return f"no {', '.join(flags)}: another version of this class"
    return _assemble(module, module._has_expansion, module._has_se, module._has_drop_connect, drop_connect_rate)


def _assemble(module: Module, expands: bool, excites: bool, residual: bool, rate: Any) -> Block | str:
    required = COMMON | (EXPAND if expands else set()) | (EXCITE if excites else set())
    reason = children_reason(module, required, EXPAND) or (_rate_reason(rate) if residual else None)
    if reason is not None:
        return reason
    children: dict[str, Module] = module._modules
    swish = children["_swish"]
    stages = []
    for conv, norm in STAGES if expands else STAGES[1:]:
        padding = _padding(children[conv])
        if isinstance(padding, str):
            return f"{conv} {padding}"
        stages.append(Stage(children[conv], children[norm], None if norm == "_bn2" else swish, padding))
    gate = None
    if excites:
        for conv in sorted(EXCITE):
            if _padding(children[conv]) not in (0, None):
                return f"{conv} pads"
        gate = Squeeze(children["_se_reduce"], swish, children["_se_expand"], None)
    *expand, depthwise, project = stages
    drops = residual and rate and module.training
    return assemble(
        Parts(
            expand=expand[0] if expand else None,
            depthwise=depthwise,
            se=gate,
            project=project,
            residual=bool(residual),
            drop=None,
            drop_rate=0.0,
            drop_function=partial(drop_connect, rate=rate) if drops else None,
        ),
        KINDS,
    )


def drop_connect(ones: Tensor, rate: float) -> Tensor:
    """Each sample's factor [N, 1, 1, 1], drawn as the library draws it; 1 / keep stays in fp32 or wider."""
    keep = 1 - rate
    mask = torch.floor(keep + torch.rand([ones.shape[0], 1, 1, 1], dtype=ones.dtype, device=ones.device))
    return mask.to(torch.promote_types(ones.dtype, torch.float32)) / keep


def _rate_reason(rate: Any) -> str | None:
    if rate is None or (isinstance(rate, (int, float)) and 0 <= rate <= 1):
        return None
    return f"drop_connect_rate is {rate!r} (supported: a number from 0 to 1)"


def _padding(conv: Module) -> int | tuple[int, int] | str | None:
    """What a convolution and the module inside it pad; None where `assemble` sees that itself; or a reason."""
    static = kind(conv) in KINDS.convs
    if not static and kind(conv) not in KINDS.same_convs:
        return None
    if isinstance(conv.padding, str) or (not static and conv.padding != (0, 0)):
        return f"pads twice (padding {conv.padding})"
    if not static:
        return None
    pad = conv._modules.get("static_padding")
    if type(pad) is nn.Identity:
        horizontal = vertical = (0, 0)
    elif type(pad) is nn.ZeroPad2d:
        horizontal, vertical = pad.padding[:2], pad.padding[2:]
    else:
        return f"pads with {name(pad)}"
    height, width = conv.padding
    horizontal, vertical = (horizontal[0] + width, horizontal[1] + width), (vertical[0] + height, vertical[1] + height)
    if horizontal != vertical:
        return f"pads {vertical} pixels vertically and {horizontal} horizontally (supported: the same)"
    return horizontal[0] if horizontal[0] == horizontal[1] else horizontal


BLOCKS = {
    "efficientnet_pytorch.model.MBConvBlock": lukemelas,
    "segmentation_models_pytorch.encoders._efficientnet.MBConvBlock": smp,
}
