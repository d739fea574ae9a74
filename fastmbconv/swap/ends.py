"""The stem and the head of a library's model, swapped: BatchNorm and activation in one pass, the head with its pool.

Only in eval mode, where no gradient is wanted. Three kinds of module get a subclass of their own class, as blocks do:
* a norm that holds its activation (timm's BatchNormAct2d);
* a Sequential of convolution, norm and activation (torchvision's Conv2dNormActivation);
* a model whose methods call them, or the head and its pool, one by one: such a method gets a `View` of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from types import FunctionType
from typing import Any, ClassVar

from torch import Tensor, nn

from fastmbconv import dispatch
from fastmbconv.block import BatchNorm
from fastmbconv.ends import ConvBNAct
from fastmbconv.swap import lukemelas, ours, timm, torchvision, transformers
from fastmbconv.swap.fused import own_forward
from fastmbconv.swap.parts import Module
from fastmbconv.swap.places import Layer, Method, Site, norm_act
from fastmbconv.swap.registry import adapter_of, is_own
from fastmbconv.swap.swapped import Swapped

METHODS: dict[str, dict[str, Method]] = {
    **timm.METHODS,
    **torchvision.METHODS,
    **lukemelas.METHODS,
    **transformers.METHODS,
}
UNFUSED = "not fused: fastmbconv.fuse without a filter does it"
NAMES = {name for methods in METHODS.values() for name in methods}


@dataclass(frozen=True, slots=True)
class End:
    """A stem or a head as a model has it: `holder` runs it fused if it can, `joiner` together with the pool.

    `holder` is None only while a search has found no more than the joiner.
    """

    site: Site
    holder: Module | None
    joiner: Module | None = None

    def merged(self, other: End | None) -> End:
        """Both findings of one convolution in one."""
        if other is None:
            return self
        site = self.site if other.site.pool is None else other.site
        holder = self.holder if other.holder is None else other.holder
        return End(site, holder, self.joiner if other.joiner is None else other.joiner)

    def reason(self) -> str | None:
        """Why it can't be fused whatever the call, or None."""
        if isinstance(self.holder, ConvBNAct):
            return self.holder.replaced_reason()
        if (name := _replaced(self.holder)) is not None:
            return f"its {name} was replaced on the instance"
        found = self.site.described()
        return found if isinstance(found, str) else None

    def pool_reason(self) -> str | None:
        """Why its pool can't be joined whatever the call, or None."""
        if self.joiner is not None and (name := _replaced(self.joiner)) is not None:
            return f"the model's {name} was replaced on the instance"
        return self.site.pool_reason()

    def call_reason(self) -> str | None:
        """Why calls run it eager at present, or None."""
        if self.holder is None or not _is_swapped(self.holder):
            return UNFUSED
        if self.holder.training or BatchNorm.of(self.site.norm).batch_statistics:
            return "training: the stem and the head are fused in eval mode, without gradients"
        if self.holder in self.site.layers.values():
            return dispatch.module_reason(self.holder)
        return self.site.hooked(pooled=False)

    def call_pool_reason(self) -> str | None:
        """Why calls of the model's forward run the pool by itself at present, or None."""
        reason = self.pool_reason()
        if self.joiner is None or reason is not None:
            return reason
        if not _is_swapped(self.joiner):
            return UNFUSED
        return "the model is training" if self.joiner.training else self.site.hooked(pooled=True)

    def swap_in(self) -> None:
        """Change the classes of those who run it; nothing where it can't be fused."""
        if self.reason() is not None:
            return
        if isinstance(self.holder, ConvBNAct):
            self.holder.fused = True
            return
        for module in (self.holder, None if self.pool_reason() is not None else self.joiner):
            if module is not None and not _is_swapped(module):
                cls: Any = type(module)
                module.__class__ = fused_class(cls)


def _is_swapped(module: Module | None) -> bool:
    return module.fused if isinstance(module, ConvBNAct) else isinstance(module, Swapped)


def _replaced(module: Module) -> str | None:
    """The method that an instance has of its own, among its forward and those that this one calls; None for none."""
    forward = methods_of(type(module)).get("forward")
    names = ("forward", *(() if forward is None else forward.calls))
    return next((name for name in names if name in vars(module)), None)


class FusedEnd(Swapped):
    """What the three kinds have in common: how they are copied and stored."""

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (type(self).original,), self.__getstate__()  # type: ignore[attr-defined]


class FusedNormAct(FusedEnd):
    """Mixed in before the class of a norm that holds its activation."""

    is_swap: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        own = own_forward(self)
        norm: Any = self
        if not _may_fuse(norm, x) or dispatch.module_reason(norm) is not None:
            return own(x)
        return norm_act(Site("head", None, norm, norm._modules.get("act"), {}, timm.KINDS), own, x)


class FusedUnit(FusedEnd):
    """Mixed in before the class of a Sequential of convolution, norm and activation."""

    is_swap: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        own = own_forward(self)
        unit: Any = self
        if not _may_fuse(unit, x) or dispatch.module_reason(unit) is not None:
            return own(x)
        site = torchvision.unit("head", unit)
        return own(x) if site is None else norm_act(site, site.behind, site.conv(x))


class FusedModel(FusedEnd):
    """Mixed in before a model's class: `fused_class` gives it the methods that find some of its children replaced."""


def _may_fuse(module: nn.Module, x: Any) -> bool:
    """False where a call runs eager whatever is inside the module, or the module is a fused one no more."""
    if not _is_swapped(module) or module.training or not isinstance(x, Tensor):
        return False
    return not dispatch.eager_at_once(module, x)


class View:
    """A model as its own methods see it in one call, with other callables in the place of some children."""

    def __init__(self, model: nn.Module, replaced: dict[str, Layer]) -> None:
        self.__dict__.update(replaced, _model=model)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__["_model"]
        method = getattr(type(model).original, name, None)
        if isinstance(method, FunctionType) and name not in model.__dict__:
            return partial(method, self)
        return getattr(model, name)


def _method(original: Any, name: str, method: Method) -> Callable[..., Any]:
    own = getattr(original, name)

    @wraps(own)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = next(iter((*args, *kwargs.values())), None)
        if not _may_fuse(self, x) or any(called in self.__dict__ for called in method.calls):
            return own(self, *args, **kwargs)
        replaced: dict[str, Layer] = {}
        for place in method.places:
            replaced |= place.replaced(self)
        return own(View(self, replaced) if replaced else self, *args, **kwargs)

    return run


def methods_of(cls: type) -> dict[str, Method]:
    """The methods of a class, its own or inherited, that run ends in a way that is known."""
    found = {}
    for name in sorted(NAMES):
        owner = _owner(cls, name)
        method = METHODS.get(f"{owner.__module__}.{owner.__qualname__}", {}).get(name) if owner is not None else None
        if owner is None or method is None or any(_owner(cls, called) is not owner for called in method.calls):
            continue
        own = all(is_own(owner, each) for each in (name, *method.calls))
        if own and (not method.reads or set(method.reads) <= set(vars(owner)[name].__code__.co_names)):
            found[name] = method
    return found


def _owner(cls: type, name: str) -> type | None:
    return next((base for base in cls.__mro__ if name in vars(base) and not vars(base).get("is_swap")), None)


def fused_class(original: Any) -> Any:
    """The fused subclass of a class; another one where its methods were replaced since."""
    return _fused_class(original, tuple(methods_of(original)))


@cache
def _fused_class(original: Any, methods: tuple[str, ...]) -> Any:
    body = {"original": original, "is_swap": True, "__module__": __name__, "__doc__": original.__doc__}
    found = methods_of(original)
    body |= {name: _method(original, name, found[name]) for name in methods}
    base = FusedModel if methods else FusedUnit if issubclass(original, nn.Sequential) else FusedNormAct
    return type(f"Fused{original.__name__}", (base, original), body)


def _rebuild(original: Any) -> nn.Module:
    """An empty fused module, for copy and pickle to fill: stored models name this function."""
    cls = fused_class(original)
    return cls.__new__(cls)


def ends_of(model: nn.Module) -> list[End]:
    """The ends in a model, those inside its blocks left out."""
    found: dict[nn.Module, End] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():  # a model comes before its children
        if module in inside:
            continue
        if adapter_of(type(module)) is not None:
            inside.update(module.modules())
        for end in _ends_at(module):
            found[end.site.conv] = end.merged(found.get(end.site.conv))
    return [end for end in found.values() if end.holder is not None]


def _ends_at(module: Module) -> Iterator[End]:
    if isinstance(module, ConvBNAct):
        site = ours.end(module)
        yield End(site, module, module if site.role == "head" else None)
        return
    methods = methods_of(type(module))
    for place in (place for method in methods.values() for place in method.places):
        if (end := place.site(module)) is not None:
            yield End(end, module if place.apart else None, None if end.pool is None else module)
    stem = timm.STEM.site(module)
    if stem is not None and _holds_blocks(module):
        yield End(stem, stem.norm)
        if (head := timm.HEAD.site(module)) is not None:
            yield End(replace(head, pool=None), head.norm)
    if type(module) is nn.Sequential and len(module) > 1 and _holds_blocks(module):
        for unit in (torchvision.unit("stem", module[0]), torchvision.unit("head", module[-1])):
            if unit is not None:
                (holder,) = unit.layers.values()
                yield End(unit, holder)


def _holds_blocks(module: nn.Module) -> bool:
    return any(adapter_of(type(child)) is not None for child in module.modules())
