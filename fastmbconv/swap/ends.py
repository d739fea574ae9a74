"""A model's stem and head, swapped: BatchNorm and activation in one pass, in eval mode where no gradient is wanted.

Two kinds of module outside of all blocks get a subclass of their own class, as blocks do, in a model that holds blocks:
* a norm that holds its activation (timm's BatchNormAct2d);
* a unit: whatever computes a convolution, its BatchNorm and activation and nothing else, told by a trace (tracing.py).
Our own ConvBNAct knows both ways itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmbconv import dispatch, functional
from fastmbconv.block import Activation, BatchNorm
from fastmbconv.ends import ConvBNAct, infers
from fastmbconv.readings import block_of
from fastmbconv.swap import timm
from fastmbconv.swap.fused import own_forward, swap_out
from fastmbconv.swap.matching import StageRecipe, match_stage
from fastmbconv.swap.parts import Module, activation_of, kind, norm_reason, unknown_activation
from fastmbconv.swap.registry import adapter_of
from fastmbconv.swap.runs import runs_of
from fastmbconv.swap.swapped import Swapped
from fastmbconv.swap.tracing import is_torchs, shadow, trace
from fastmbconv.swap.written import CHANGED, Found, State, state_of

Role = Literal["stem", "head", "between"]
TRAINING = "training: the stem and the head are fused in eval mode, without gradients"
UNFUSED = "not fused: fastmbconv.fuse without a filter does it"


@dataclass(frozen=True, slots=True)
class Unit:
    """What a module in this state computes in eval mode: a convolution, BatchNorm and activation."""

    state: State
    recipe: StageRecipe


@dataclass(frozen=True, slots=True)
class Steps:
    """What a call runs: the module's convolution, unless that stands outside of it, and the rest in one pass."""

    conv: Module | None
    sides: list[int]
    bn: BatchNorm
    activation: Activation
    parameters: tuple[Tensor, ...]

    def wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(each.requires_grad for each in (x, *self.parameters))

    def convolved(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return x
        u: Tensor = self.conv(F.pad(x, self.sides) if any(self.sides) else x)
        return u


def _steps(unit: Unit | None, module: Module) -> Steps | str:
    """Read off a norm that holds its activation, or a unit; or why its own forward must run whatever the call."""
    parameters = tuple(module.parameters())
    if unit is None:
        if (reason := norm_reason("convolution", module, timm.KINDS)) is not None:
            return reason
        act = module._modules.get("act")
        activation = activation_of(act, timm.KINDS)
        if activation is None:
            return unknown_activation("convolution", act)
        steps = Steps(None, [], BatchNorm.of(module), activation, parameters)
    elif state_of(module, "", modal=False) != unit.state:
        return CHANGED
    else:
        conv, norm = (module.get_submodule(path) for path in (unit.recipe.conv.path, unit.recipe.norm))
        sides = [] if unit.recipe.padded == "same" else [*unit.recipe.padded, *unit.recipe.padded]
        steps = Steps(conv, sides, BatchNorm.of(norm), unit.recipe.act, parameters)
    return dispatch.activation_reason(steps.activation) or steps


def _read(unit: Unit | None, module: Module) -> Steps | str:
    return dispatch.module_reason(module) or (TRAINING if _trains(module) else _steps(unit, module))


def _trains(module: nn.Module) -> bool:
    return any(each.training for each in module.modules())


class FusedEnd(Swapped):
    """Mixed in before the class of a unit, or of a norm that holds its activation: then `unit` is None."""

    is_swap: ClassVar[bool] = True
    unit: ClassVar[Unit | None]
    read: ClassVar[Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        own = own_forward(module)
        if not isinstance(module, FusedEnd) or len(args) != 1 or kwargs or module.training:  # type: ignore[attr-defined]
            return own(*args, **kwargs)
        (x,) = args
        if not isinstance(x, Tensor) or dispatch.call_reason(x) is not None:
            return own(x)
        steps: Steps | str = block_of(module, type(module).read)  # type: ignore[arg-type]
        if isinstance(steps, str) or steps.bn.batch_statistics or steps.wants_gradient(x):
            return own(x)
        u = steps.convolved(x)
        return functional.bn_act(u, steps.bn, steps.activation) if infers(u, steps.bn) else own(x)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (type(self).original, type(self).unit), self.__getstate__()  # type: ignore[attr-defined]


@cache
def fused_class(original: Any, unit: Unit | None) -> Any:
    """The fused subclass of a class, made once for all that compute the same."""
    body = {
        "is_swap": True,
        "original": original,
        "unit": unit,
        "read": staticmethod(partial(_read, unit)),
        "__module__": __name__,
        "__doc__": original.__doc__,
    }
    return type(f"Fused{original.__name__}", (FusedEnd, original), body)


def _rebuild(original: Any, unit: Unit | None) -> nn.Module:
    """An empty fused module, for copy and pickle to fill: stored models name this function."""
    cls = fused_class(original, unit)
    return cls.__new__(cls)


@dataclass(frozen=True, slots=True)
class End:
    """A stem or a head as a model has it: the module to swap, its convolution and its norm (None: not there).

    Of the smallest module around it that holds blocks, a stem stands before the first block, and the last of those
    behind all blocks is the head, in the order in which its children were given to it; the others are neither.
    """

    role: Role | None  # None only while the search is below that module
    module: Module
    conv: Module | None
    norm: Module | None
    unit: Unit | None = None

    @property
    def pooled(self) -> bool:
        """Whether the head's pool is joined with it: our own model asks for that."""
        ours = self.role == "head" and isinstance(self.module, ConvBNAct)
        return ours and dispatch.own_reason(self.module, "the head") is None

    def reason(self) -> str | None:
        """Why it can't be fused whatever the call, or None."""
        if isinstance(self.module, ConvBNAct):
            return self.module.replaced_reason()
        if "forward" in vars(self.module):
            return "its forward was replaced on the instance"
        steps = _steps(self.unit, self.module)
        return steps if isinstance(steps, str) else None

    def call_reason(self) -> str | None:
        """Why calls run it eager at present, or None."""
        ours = isinstance(self.module, ConvBNAct)
        if not (self.module.fused if ours else isinstance(self.module, FusedEnd)):
            return UNFUSED
        norm: Any = self.norm
        if _trains(self.module) or BatchNorm.of(norm).batch_statistics:
            return TRAINING
        return dispatch.module_reason(self.module)


def fuse_ends(model: nn.Module, found: Iterable[Found]) -> None:
    """Swap in the ends that can be fused; what was one before and is one no more is swapped out. `found` as below."""
    for module in model.modules():
        if isinstance(module, FusedEnd) and "original" in vars(type(module)):
            swap_out(module)
    for end in ends_of(model, found):
        if isinstance(end.module, ConvBNAct):
            end.module.fused = True
        elif end.reason() is None and not isinstance(end.module, FusedEnd):
            cls: Any = type(end.module)
            end.module.__class__ = fused_class(cls, end.unit)


def ends_of(model: nn.Module, found: Iterable[Found] = ()) -> list[End]:
    """The ends in a model, in its order; `found`: what `written.find` has found, blocks and what looks like one."""
    blocks = set(_swapped_or_known(model))
    for each in found:
        if each.fits or each.module is not model:  # as a model does whose forward has the block inline
            blocks.update([each.module] if each.holder is None else each.module.children())
    with torch.device("cpu"):  # whichever the caller's is: values are looked at
        return _Finder(blocks).visit(model, None)[0]


def _swapped_or_known(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks in a module, or itself; of a run of a Sequential's children each child."""
    if adapter_of(type(module)) is not None:
        yield module
        return
    for run in runs_of(module):
        yield from list(module.children())[run.begin : run.end]
    for child in module.children():
        yield from _swapped_or_known(child)


@dataclass
class _Finder:
    blocks: set[nn.Module]

    def __post_init__(self) -> None:
        self.seen: set[nn.Module] = set()

    def visit(self, module: Module, before: Module | None) -> tuple[list[End], bool]:
        """The ends in a module, which stands behind the module `before`, and whether it holds a block."""
        if module in self.seen or module in self.blocks:
            return [], module in self.blocks
        self.seen.add(module)
        if (end := self._leaf(module, before)) is not None:
            return [end], False
        children = [child for child in module._modules.values() if child is not None]
        parts = [self.visit(child, last) for last, child in zip((None, *children), children, strict=False)]
        holding = [place for place, (_, holds) in enumerate(parts) if holds]
        ends = _placed([(end, place) for place, (inside, _) in enumerate(parts) for end in inside], holding)
        if self.blocks and not ends and not holding and _may_be_unit(module):
            ends = _unit_at(module)
        return ends, bool(holding)

    def _leaf(self, module: Module, before: Module | None) -> End | None:
        if isinstance(module, ConvBNAct):
            return End("head" if module.conv.kernel_size == (1, 1) else "stem", module, module.conv, module.bn)
        if isinstance(module, FusedEnd) and module.unit is not None:
            return _end_of(module, module.unit)
        if not self.blocks or kind(module) not in timm.KINDS.norms:
            return None
        if activation_of(module._modules.get("act"), timm.KINDS) == "none":
            return None
        return End(None, module, before if isinstance(before, nn.Conv2d) else None, module)


def _placed(ends: list[tuple[End, int]], holding: list[int]) -> list[End]:
    """Ends of a module's children, by their places, with the roles that follow from which children hold blocks."""
    if not holding:
        return [end for end, _ in ends]
    placed = []
    last = max((i for i, (end, place) in enumerate(ends) if end.role is None and place > holding[-1]), default=None)
    for i, (end, place) in enumerate(ends):
        role: Role = "stem" if place < holding[0] else "head" if i == last else "between"
        placed.append(replace(end, role=role) if end.role is None else end)
    return placed


def _may_be_unit(module: nn.Module) -> bool:
    """Whether a trace is worth its time: nothing in a module but one convolution and one BatchNorm holds tensors."""
    if not module._modules or isinstance(module, (nn.ModuleList, nn.ModuleDict)) or "forward" in vars(module):
        return False
    layers = [each for each in module.modules() if each._parameters or each._buffers]
    norms = [each for each in layers if isinstance(each, (nn.BatchNorm2d, nn.SyncBatchNorm)) and is_torchs(each)]
    return len(layers) == 2 and len(norms) == 1 and any(isinstance(each, nn.Conv2d) for each in layers)


def _unit_at(module: nn.Module) -> list[End]:
    """A module as a unit, if it is one whose convolution is a module's call."""
    try:
        twin = shadow(module, training=False)
        traced = trace(twin)
        recipe = None if isinstance(traced, str) else match_stage(traced)
    except Exception:  # NoMatch, or whatever somebody's module is
        return []
    if recipe is None:
        return []
    if recipe.conv.fixed is not None or recipe.act == "none":
        return []
    return [_end_of(module, Unit(state_of(twin, "", modal=False), recipe))]


def _end_of(module: Module, unit: Unit) -> End:
    inside = dict(module.named_modules())
    return End(None, module, inside.get(unit.recipe.conv.path), inside.get(unit.recipe.norm), unit)
