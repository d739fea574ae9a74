"""A foreign block's pieces, checked and put together as a Block: the rules that every library's adapter shares.

Leaves are recognised by their exact type: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmbconv.block import Activation, BatchNorm, Block, DenseBlock, Gate, Padding, SqueezeExcite, Start
from fastmbconv.mbconv import NORMS

SHARDED = "torch.distributed.tensor.DTensor"  # FSDP makes it a plain tensor in the block's forward
Module = Any  # an nn.Module of a foreign class: `nn.Module` alone says nothing about its attributes

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Identity: "none",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
}
GATES: dict[type[nn.Module], Gate] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}


SUPPORTED = "SiLU, ReLU, ReLU6, Hardswish, GELU"


@dataclass(frozen=True, slots=True)
class Kinds:
    """Exact leaf types, as `kind` spells them, that mean in one library's blocks what torch's own leaves mean."""

    convs: frozenset[str] = frozenset()
    same_convs: frozenset[str] = frozenset()
    norms: frozenset[str] = frozenset()
    gates: Mapping[str, Gate] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    activations: Mapping[str, Activation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Convolution:
    """`F.conv2d` with a module's parameters, as the module that it might be."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str = "zeros"

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class Stage:
    """A convolution, the norm behind it, and the activation behind that, by its name too (None: no activation).

    `padding` counts what is padded outside the convolution too; None: only the convolution pads. A projection may have
    no norm.
    """

    conv: Module
    norm: Module
    act: Module | Activation | None
    padding: Padding | None = None


@dataclass(frozen=True, slots=True)
class Squeeze:
    """The leaves of a squeeze-and-excitation path, its functions by their names too; `gate` None: sigmoid."""

    reduce: Module
    act: Module | Activation
    expand: Module
    gate: Module | Gate | None


@dataclass(frozen=True, slots=True)
class Parts:
    """The pieces of one block.

    `depthwise` is the dense convolution, and `project` None where none follows it, for `assemble_dense`.
    `drop_rate` is the rate of `drop`, which counts only in a block with a residual; `drop_function` is what
    `Block.drop` says, for this call, in a block without such a module. `start` is a depthwise stage without activation
    in front of the expansion.
    """

    expand: Stage | None
    depthwise: Stage
    se: Squeeze | None
    project: Stage | None
    residual: bool
    drop: Module | None
    drop_rate: float
    drop_function: Callable[[Tensor], Tensor] | None = None
    start: Stage | None = None


@dataclass(frozen=True, slots=True)
class NotNow:
    """A block that can be fused, but not at this call, and why: a later one may differ."""

    block: Block
    reason: str


def kind(module: Module) -> str:
    """A module's exact type, spelled out: no library needs importing to compare it. A swapped one has its own still."""
    cls = _own_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _own_class(module: Module) -> Any:
    cls: Any = type(module)
    return cls.original if vars(cls).get("is_swap") else cls


def name(module: Module) -> str:
    """The class's name for a reader: in full where torch.nn has another class of that name."""
    cls = _own_class(module)
    return kind(module) if getattr(nn, cls.__name__, cls) is not cls else cls.__name__


def children_reason(module: Module, required: set[str], optional: frozenset[str] = frozenset()) -> str | None:
    """Why a module with these children is not the block that its adapter knows, or None."""
    children = set(module._modules)
    for missing in sorted(required - children):
        return f"no submodule {missing}"
    for unknown in sorted(children - required - optional):
        return f"an unknown submodule {unknown}"
    return None


def assemble(parts: Parts, kinds: Kinds) -> Block | str:
    """The block as data, with its live parameters; or the reason why it is none."""
    assert parts.project is not None
    stages = [("depthwise convolution", parts.depthwise), ("projection", parts.project)]
    if parts.expand is not None:
        stages.insert(0, ("expansion", parts.expand))
    if parts.start is not None:
        stages.insert(0, ("start", parts.start))
    activations = []
    for role, stage in stages:
        reason = conv_reason(role, stage.conv, kinds)
        if reason is None and not (stage is parts.project and stage.norm is None):
            reason = norm_reason(role, stage.norm, kinds)
        if reason is None and (stage is parts.depthwise or stage is parts.start):
            reason = _depthwise_reason(role, stage.conv)
        elif reason is None:
            reason = pointwise_reason(role, stage)
        if reason is not None:
            return reason
        activations.append(activation_of(stage.act, kinds))
        if activations[-1] is None:
            return unknown_activation(role, stage.act)
    if parts.start is not None and activations.pop(0) != "none":
        return unknown_activation("start", parts.start.act, "allowed is none")
    reason = _gate_reason(parts.se, kinds) or _drop_reason(parts, kinds)
    return reason or _block(parts, kinds, activations)


def assemble_dense(parts: Parts, kinds: Kinds) -> DenseBlock | str:
    """A Fused-MBConv block as data, with its live parameters; or the reason why it is none."""
    dense, project = parts.depthwise, parts.project
    stages = [("dense convolution", dense)] + ([] if project is None else [("projection", project)])
    for role, stage in stages:
        reason = conv_reason(role, stage.conv, kinds) or norm_reason(role, stage.norm, kinds)
        if reason is None and stage is project:
            reason = pointwise_reason(role, stage)
        if reason is not None:
            return reason
    reason = _gate_reason(parts.se, kinds) or _drop_reason(parts, kinds)
    if reason is not None:
        return reason
    if dense.conv.dilation != (1, 1):
        return f"the dense convolution has dilation {dense.conv.dilation[0]}"
    if dense.conv.kernel_size[0] != dense.conv.kernel_size[1] or dense.conv.stride[0] != dense.conv.stride[1]:
        return "the dense convolution's kernel or stride is not square"
    activation = activation_of(dense.act, kinds)
    if activation is None:
        return unknown_activation("dense convolution", dense.act)
    project_activation = "none" if project is None else activation_of(project.act, kinds)
    if project_activation is None:
        return unknown_activation("projection", None if project is None else project.act)
    if project is None and parts.se is not None:
        return "a squeeze-excite without a projection behind it"
    return DenseBlock(
        conv=dense.conv,
        weight=dense.conv.weight,
        stride=dense.conv.stride[0],
        padding=_padding(dense, kinds),
        bn1=BatchNorm.of(dense.norm),
        se=None if parts.se is None else _squeeze_excite(parts.se, kinds),
        project_weight=None if project is None else project.conv.weight,
        bn2=None if project is None else BatchNorm.of(project.norm, project.conv.bias),
        activation=activation,
        residual=parts.residual,
        drop=_drop(parts),
        project_activation=project_activation,
    )


def _block(parts: Parts, kinds: Kinds, activations: list[Any]) -> Block | str:
    """`activations`: behind the expansion, if there is one, the depthwise convolution and the projection."""
    conv = parts.depthwise.conv
    stride = conv.stride[0]
    expand, start, project = parts.expand, parts.start, parts.project
    assert project is not None
    block = Block(
        expand_weight=None if expand is None else expand.conv.weight,
        bn1=None if expand is None else BatchNorm.of(expand.norm, expand.conv.bias),
        depthwise_weight=conv.weight,
        bn2=BatchNorm.of(parts.depthwise.norm, conv.bias),
        se=None if parts.se is None else _squeeze_excite(parts.se, kinds),
        project_weight=project.conv.weight,
        bn3=None if project.norm is None else BatchNorm.of(project.norm, project.conv.bias),
        project_bias=project.conv.bias if project.norm is None else None,
        stride=stride,
        padding=_padding(parts.depthwise, kinds),
        activation=activations[0],
        residual=parts.residual,
        drop=_drop(parts),
        depthwise_activation=activations[-2],
        project_activation=activations[-1],
        start=None if start is None else _start(start, kinds),
    )
    if parts.residual and (stride != 1 or block.in_channels != block.project_weight.shape[0]):
        return "a residual around a block that changes its input's shape"
    return block


def _start(start: Stage, kinds: Kinds) -> Start:
    conv = start.conv
    return Start(conv.weight, BatchNorm.of(start.norm, conv.bias), conv.stride[0], _padding(start, kinds))


def _drop(parts: Parts) -> Callable[[Tensor], Tensor] | None:
    drop = parts.drop
    if parts.residual and parts.drop_function is not None:
        return parts.drop_function
    return drop if parts.residual and drop is not None and drop.training and parts.drop_rate > 0 else None


def _squeeze_excite(squeeze: Squeeze, kinds: Kinds) -> SqueezeExcite:
    return SqueezeExcite(
        squeeze.reduce.weight,
        squeeze.reduce.bias,
        squeeze.expand.weight,
        squeeze.expand.bias,
        activation=activation_of(squeeze.act, kinds) or "none",
        gate=gate_of(squeeze.gate, kinds) or "sigmoid",
    )


def activation_of(act: Module | Activation | None, kinds: Kinds) -> Activation | None:
    """An activation's name; "none" for none, None for one that isn't known."""
    if act is None or isinstance(act, str):
        return act or "none"  # type: ignore[return-value]
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return ACTIVATIONS.get(type(act)) or kinds.activations.get(kind(act))


def gate_of(gate: Module | Gate | None, kinds: Kinds) -> Gate | None:
    """A gate's name; None for one that isn't known."""
    if gate is None or isinstance(gate, str):
        return gate or "sigmoid"  # type: ignore[return-value]
    return GATES.get(type(gate)) or kinds.gates.get(kind(gate))


def unknown_activation(role: str, act: Module | Activation | None, allowed: str = f"supported: {SUPPORTED}") -> str:
    return f"the activation after the {role} is {_named(act)} ({allowed})"


def _padding(stage: Stage, kinds: Kinds) -> Padding:
    if stage.padding is not None:
        return stage.padding
    conv = stage.conv
    if kind(conv) in kinds.same_convs:
        return "same"
    if isinstance(conv.padding, str):
        return conv.kernel_size[0] // 2 if conv.padding == "same" else 0
    return conv.padding[0]


def conv_reason(role: str, conv: Module, kinds: Kinds) -> str | None:
    if type(conv) not in (nn.Conv2d, Convolution) and kind(conv) not in kinds.same_convs | kinds.convs:
        return f"the {role} is a {name(conv)}"
    if conv.padding_mode != "zeros":
        return f"the {role} pads with {conv.padding_mode!r}"
    if is_traceable_wrapper_subclass(conv.weight) and kind(conv.weight) != SHARDED:
        return f"the {role}'s weight is a {type(conv.weight).__name__}"
    return None


def pointwise_reason(role: str, stage: Stage) -> str | None:
    conv = stage.conv
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1:
        height, width = conv.kernel_size
        return f"the {role} is {height}x{width}, stride {conv.stride[0]}, groups {conv.groups}, not 1x1"
    if not isinstance(conv.padding, str) and conv.padding != (0, 0):
        return f"the {role} has padding {conv.padding[0]}"
    if stage.padding not in (None, 0, "same"):
        return f"the {role} has padding {stage.padding}"
    return None


def _depthwise_reason(role: str, conv: Module) -> str | None:
    if not conv.groups == conv.in_channels == conv.out_channels:
        return f"the {role} has {conv.groups} groups for {conv.in_channels} -> {conv.out_channels} channels"
    if conv.dilation != (1, 1):
        return f"the {role} has dilation {conv.dilation[0]}"
    padding = (conv.padding, conv.padding) if isinstance(conv.padding, str) else conv.padding
    for what, pair in (("kernel", conv.kernel_size), ("stride", conv.stride), ("padding", padding)):
        if pair[0] != pair[1]:
            return f"the {role}'s {what} is {pair[0]}x{pair[1]}, not square"
    if conv.kernel_size[0] % 2 == 0:
        return f"the {role}'s kernel is even: {conv.kernel_size[0]}"
    return None


def norm_reason(role: str, norm: Module, kinds: Kinds) -> str | None:
    if type(norm) not in NORMS and kind(norm) not in kinds.norms:
        return f"the norm after the {role} is a {name(norm)} (supported: BatchNorm2d, SyncBatchNorm)"
    if type(norm) in NORMS and norm._modules:
        return f"the norm after the {role} is a {name(norm)} with a {next(iter(norm._modules))} that it does not call"
    inner_drop = norm._modules.get("drop")
    if inner_drop is not None and type(inner_drop) is not nn.Identity:
        return f"the norm after the {role} holds a {name(inner_drop)}"
    return None


def _gate_reason(squeeze: Squeeze | None, kinds: Kinds) -> str | None:
    if squeeze is None:
        return None
    for conv in (squeeze.reduce, squeeze.expand):
        if type(conv) is nn.Linear:
            continue
        if type(conv) is not nn.Conv2d and kind(conv) not in kinds.same_convs | kinds.convs:
            return f"a squeeze-excite convolution is a {name(conv)}"
        if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in ((0, 0), "same", "valid"):
            return "a squeeze-excite convolution is not 1x1"
        if conv.groups != 1:
            return "a squeeze-excite convolution has groups"
    if gate_of(squeeze.gate, kinds) is None:
        return f"the squeeze-excite gate is {_named(squeeze.gate)} (supported: Sigmoid, Hardsigmoid)"
    if activation_of(squeeze.act, kinds) in (None, "none"):
        return f"the squeeze-excite activation is {_named(squeeze.act)} (supported: {SUPPORTED})"
    return None


def _named(function: Module | str | None) -> str:
    return "none" if function is None else function if isinstance(function, str) else name(function)


def _drop_reason(parts: Parts, kinds: Kinds) -> str | None:
    if not parts.residual or parts.drop is None or type(parts.drop) is nn.Identity or kind(parts.drop) in kinds.drops:
        return None
    return f"the residual branch is dropped by a {name(parts.drop)}"
