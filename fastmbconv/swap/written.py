"""Blocks of classes that no adapter knows: found by structure, proved once, and read at each call.

What a forward makes of its layers is told by a trace, which holds as long as what it may have gone by is what it was:
the modules' classes and attributes, and their modes where those make a difference. Layers are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from fastmbconv import dispatch
from fastmbconv.block import Block, DenseBlock, Padding
from fastmbconv.swap.matching import Match, Recipe, StageRecipe, match, match_whole
from fastmbconv.swap.nodes import ConvRecipe, NoMatch
from fastmbconv.swap.parts import Convolution, Kinds, Module, NotNow, Parts, Squeeze, Stage, assemble, kind
from fastmbconv.swap.proving import why_not
from fastmbconv.swap.registry import adapter_of, forward_owner
from fastmbconv.swap.tracing import Trace, first_line, is_sequence, is_torchs, shadow, trace

State = tuple[Any, ...]
LIVE = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.SyncBatchNorm)  # whose attributes are read at each call
CHANGED = "an attribute or a submodule of it has changed since fuse: fuse it again"
MODES = (True, False)
PLAIN = (type(None), bool, int, float, str, tuple, list, set, dict)
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True, slots=True)
class Way:
    """What a module in some state computes: a block's recipe, or why it is none. `modal`: the state has the mode."""

    state: State
    recipe: Recipe | str
    modal: bool


Ways = tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A block, or what looks like one: then `ways` is the reason why it is none.

    `module` is a Sequential of its own for a run of another Sequential's children; that one is `holder`, and the run
    begins at its child `begin`.
    """

    name: str
    module: nn.Module
    ways: Ways | str
    holder: nn.Module | None = None
    begin: int = 0

    @property
    def fits(self) -> bool:
        """Whether it is a block in some mode."""
        return not isinstance(self.ways, str)


def read_written(ways: Ways, module: Module, *args: Any, **kwargs: Any) -> Block | DenseBlock | NotNow | str:
    """The adapter of a class that was found by structure."""
    found = next((way for way in ways if way.state == state_of(module, way.recipe, modal=way.modal)), None)
    if found is None:
        return CHANGED
    if isinstance(found.recipe, str):
        return found.recipe
    block = block_of_recipe(module, found.recipe)
    if isinstance(block, str) or not (args or kwargs):
        return block
    reason = _given_reason(module, args, kwargs)
    return block if reason is None else NotNow(block, reason)


def block_of_recipe(module: Module, recipe: Recipe) -> Block | str:
    """The block as data, from the module's own layers as they are now; or why it is none."""
    drop = None if recipe.drop is None else module.get_submodule(recipe.drop)
    stages = [stage for stage in (recipe.start, recipe.expand, recipe.depthwise, recipe.project) if stage is not None]
    kinds = Kinds(
        convs=frozenset(kind(_convolution(module, stage.conv)) for stage in stages),
        norms=frozenset(kind(module.get_submodule(stage.norm)) for stage in stages),
        drops=frozenset() if drop is None else frozenset({kind(drop)}),
    )
    se = recipe.se
    start, expand = (None if stage is None else _stage(module, stage) for stage in (recipe.start, recipe.expand))
    parts = Parts(
        start=start,
        expand=expand,
        depthwise=_stage(module, recipe.depthwise),
        se=None if se is None else _squeeze(module, se),
        project=_stage(module, recipe.project),
        residual=recipe.residual,
        drop=drop,
        drop_rate=1.0,  # the module knows; it is asked at each call
    )
    return assemble(parts, kinds)


def _squeeze(module: Module, se: Any) -> Squeeze:
    return Squeeze(module.get_submodule(se.reduce), se.act, module.get_submodule(se.expand), se.gate)


def _stage(module: Module, stage: StageRecipe) -> Stage:
    conv = _convolution(module, stage.conv)
    return Stage(conv, module.get_submodule(stage.norm), stage.act, _padding(conv, stage.padded))


def _convolution(module: Module, recipe: ConvRecipe) -> Any:
    conv: Any = module.get_submodule(recipe.path)
    if recipe.fixed is None:
        return conv
    stride, padding, dilation, groups, biased = recipe.fixed
    stride, dilation = ((each, each) if isinstance(each, int) else each for each in (stride, dilation))
    padding = (padding, padding) if isinstance(padding, int) else padding
    return Convolution(conv.weight, conv.bias if biased else None, stride, padding, dilation, groups)


def _padding(conv: Any, padded: Any) -> Padding | None:
    """What is padded outside the convolution and by it; None where only the convolution pads."""
    if padded in ((0, 0), "same"):
        return padded if padded == "same" else None
    own = {"valid": 0, "same": conv.kernel_size[0] // 2}.get(conv.padding, conv.padding)
    own = own if isinstance(own, int) else own[0]
    return (own + padded[0], own + padded[1]) if padded[0] != padded[1] else own + padded[0]


def state_of(module: Module, recipe: Recipe | str, *, modal: bool) -> State:
    """All that a forward may go by, but for what is read at each call."""
    drop = None if isinstance(recipe, str) else recipe.drop
    return tuple(_one_state(path, each, path == drop, modal) for path, each in _every(module))


def _every(module: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """A module and all inside it by their names, once for each name."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _every(child, f"{path}.{name}" if path else name)


def _one_state(path: str, module: Module, drops: bool, modal: bool) -> State:
    if drops or (isinstance(module, LIVE) and is_torchs(module)):
        return path, kind(module)
    attributes = tuple((name, _plain(value)) for name, value in vars(module).items() if not _is_torchs_own(name, value))
    own = kind(module) if path else ""  # the block's own class is known: others make subclasses of it, as FSDP does
    return path, own, module.training if modal else None, attributes


def _is_torchs_own(name: str, value: Any) -> bool:
    """What every module has, and what is put there when it is compiled, sharded and so on."""
    return name in OF_EVERY_MODULE or (name.startswith("_") and not isinstance(value, PLAIN))


def _plain(value: Any) -> Any:
    """An attribute's value as far as it can be compared, kept and stored."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PLAIN):
        return repr(value)
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(type(value)))
    return type(value).__module__, type(value).__qualname__


def _given_reason(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Which argument besides the image is not the forward's own default, or None."""
    parameters = list(signature(vars(forward_owner(type(module)))["forward"]).parameters.values())[2:]
    defaults = {each.name: each.default for each in parameters}
    given = dict(zip(defaults, args, strict=False)) | kwargs
    if len(args) > len(defaults):
        return f"called with {1 + len(args)} arguments"
    for name, value in given.items():
        default = defaults.get(name, Parameter.empty)
        if value is not default and (isinstance(value, Tensor) or value != default):
            return f"called with {name} = {value!r}" if _is_short(value) else f"called with another {name}"
    return None


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def find(model: nn.Module, *, verify: bool = True, again: bool = False) -> list[Found]:
    """Every block of a class that no adapter knows, and what looks like one with the reason why it is none.

    Args:
        verify: prove each by its values (proving.py).
        again: look at those too that are fused already.
    """
    with torch.device("cpu"), torch.inference_mode(False):  # whichever the caller's are: values are looked at
        return _Finder(verify, again).visit("", model)[0]


@dataclass
class _Finder:
    verify: bool
    again: bool

    def __post_init__(self) -> None:
        self.seen: set[nn.Module] = set()

    def visit(self, name: str, module: nn.Module) -> tuple[list[Found], int]:
        """What is found in a module, and how many depthwise convolutions it has outside of known blocks."""
        if _is_depthwise(module):
            return [], 1
        if module in self.seen or self._is_known(module) or isinstance(module, torch.jit.ScriptModule):
            return [], 0
        self.seen.add(module)
        found: list[Found] = []
        count = 0
        for key, child in module.named_children():
            more, depthwise = self.visit(f"{name}.{key}" if name else key, child)
            found, count = found + more, count + depthwise
        return self._merged(name, module, found, count), count

    def _is_known(self, module: nn.Module) -> bool:
        adapter = adapter_of(type(module))
        return adapter is not None and not (self.again and getattr(type(module), "ways", None) is not None)

    def _merged(self, name: str, module: nn.Module, found: list[Found], count: int) -> list[Found]:
        if count == 0 or isinstance(module, (nn.ModuleList, nn.ModuleDict)) or "forward" in vars(module):
            return found
        whole = None
        if count <= 2 and _has_pointwise(module):
            whole = Found(name, module, self.ways_of(module))
            if whole.fits:
                return [whole]
        if is_sequence(module):
            found = self._with_runs(name, module, found)
        return found if found or whole is None else [whole]

    def ways_of(self, module: nn.Module) -> Ways | str:
        """What a module computes in each mode; or why it is a block in neither."""
        try:
            return self._ways_of(module)
        except Exception as error:  # whatever somebody's module is: fuse leaves it
            return f"it can't be looked at: {first_line(error)}"

    def _ways_of(self, module: nn.Module) -> Ways | str:
        recipes = [self._recipe_of(shadow(module, training=training)) for training in MODES]
        if all(isinstance(recipe, str) for recipe in recipes):
            return str(recipes[0])
        if recipes[0] == recipes[1]:
            return (Way(state_of(module, recipes[0], modal=False), recipes[0], False),)
        ways = []
        for training, recipe in zip(MODES, recipes, strict=True):
            ways.append(Way(state_of(shadow(module, training=training), recipe, modal=True), recipe, True))
        return tuple(ways)

    def _recipe_of(self, twin: nn.Module) -> Recipe | str:
        traced = trace(twin)
        if isinstance(traced, str):
            return traced
        try:
            recipe = match_whole(traced)
        except NoMatch as reason:
            return str(reason)
        return self._proved(twin, recipe)

    def _proved(self, twin: nn.Module, recipe: Recipe) -> Recipe | str:
        block = block_of_recipe(twin, recipe)
        reason = block if isinstance(block, str) else dispatch.block_reason(block)
        if reason is None and self.verify:
            reason = why_not(twin, lambda module: block_of_recipe(module, recipe))
        return recipe if reason is None else reason

    def _with_runs(self, name: str, module: nn.Module, found: list[Found]) -> list[Found]:
        """What was found, and the runs of children that are blocks; a reason only where nothing else was found."""
        children = list(module.children())
        inside = {each.holder or each.module for each in found if each.fits}
        opaque = frozenset(child for child in children if _is_opaque(child, inside))
        twin = shadow(module, training=True)
        pairs = dict(zip(children, twin.children(), strict=True))
        traced = trace(twin, frozenset(pairs[child] for child in opaque))
        if isinstance(traced, str):
            return found
        runs = _runs(traced)
        made: list[Found] = []
        for begin, end in runs:
            if end - begin in (1, len(children)):  # which was looked at before
                continue
            shell = nn.Sequential(*children[begin:end])
            shell.training = module.training
            ways = self.ways_of(shell)
            made.append(Found(f"{name}[{begin}:{end}]", shell, ways, module, begin))
        return [*(each for each in found if each.fits or not made), *made]


def _runs(traced: Trace) -> list[tuple[int, int]]:
    """(begin, end) of the children that are blocks together."""
    boundaries = {node: place for place, node in reversed(list(enumerate((traced.image, *traced.outputs))))}
    runs: list[tuple[int, int]] = []
    taken: set[Any] = set()  # by the runs before the last
    last: frozenset[Any] = frozenset()
    for end, out in enumerate(traced.outputs, 1):
        longer = _match_at(traced, out, boundaries, taken)
        if longer is not None and runs and boundaries[longer.first] == runs[-1][0]:
            runs[-1], last = (runs[-1][0], end), longer.nodes  # with its last activation, or what does nothing
            continue
        found = _match_at(traced, out, boundaries, taken | last)
        if found is not None and (not runs or boundaries[found.first] >= runs[-1][1]):
            taken |= last
            runs.append((boundaries[found.first], end))
            last = found.nodes
    return runs


def _match_at(traced: Trace, out: Any, boundaries: dict[Any, int], taken: set[Any]) -> Match | None:
    try:
        return match(traced, out, boundaries.keys(), taken)
    except NoMatch:
        return None


def _is_opaque(child: nn.Module, inside: set[Any]) -> bool:
    """Whether a child of a Sequential must not be looked into: a block is inside, or it can't be traced."""
    if any(each in inside or adapter_of(type(each)) is not None for each in child.modules()):
        return True
    return not is_torchs(child) and isinstance(trace(shadow(child, training=True)), str)


def _is_depthwise(module: Any) -> bool:
    """Or nearly: two channels a group."""
    return isinstance(module, nn.Conv2d) and 2 * module.groups >= module.in_channels > 1 < module.groups


def _has_pointwise(module: nn.Module) -> bool:
    return any(
        isinstance(each, nn.Conv2d) and each.kernel_size == (1, 1) and each.groups == 1 for each in module.modules()
    )
