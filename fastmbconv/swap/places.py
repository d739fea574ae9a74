"""Where models keep their stem and head: a convolution, the BatchNorm and activation behind it, and perhaps a pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fastmbconv import dispatch, functional
from fastmbconv.block import Activation, BatchNorm, Padding
from fastmbconv.ends import infers
from fastmbconv.swap.parts import (
    Kinds,
    Module,
    Stage,
    activation_of,
    conv_reason,
    norm_reason,
    pointwise_reason,
    unknown_activation,
)

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Pool:
    """The module that takes the mean over the image of what the head gives; `flat`: [N, C] instead of [N, C, 1, 1].

    `reason` says why it can't be joined with the head.
    """

    module: Module
    flat: bool = False
    reason: str | None = None

    @classmethod
    def of(cls, module: Module) -> Pool:
        """torch's own pool."""
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
            return cls(module)
        return cls(module, reason=f"the head is pooled by {module!r}")


@dataclass(frozen=True, slots=True)
class Site:
    """One end, module by module. `layers` are those that its model calls by these names, in order, without the pool.

    `around` holds the end among others, and must be called as one where the pool is not joined.
    `padding` is what the convolution pads besides what torch's does, as in `parts.Stage`, or why that isn't known.
    """

    role: Literal["stem", "head"]
    conv: Module
    norm: Module
    act: Module | None
    layers: dict[str, Module]
    kinds: Kinds
    pool: Pool | None = None
    padding: Padding | str | None = None
    around: Module | None = None

    def described(self) -> tuple[BatchNorm, Activation] | str:
        """What follows the convolution, with its live parameters; or why the kernels don't know it."""
        reason = norm_reason(self.role, self.norm, self.kinds)
        if reason is not None:
            return reason
        activation = activation_of(self.act, self.kinds)
        if activation is None or dispatch.activation_reason(activation) is not None:
            return unknown_activation(self.role, self.act)
        return BatchNorm.of(self.norm), activation

    def pool_reason(self) -> str | None:
        """Why the pool can't be joined with the head whatever the call, or None."""
        if self.pool is None:
            return "no pool follows it"
        if self.pool.reason is not None:
            return self.pool.reason
        if isinstance(self.padding, str) and self.padding != "same":
            return f"the {self.role} {self.padding}"
        if self.conv.bias is not None:
            return f"the {self.role} has a bias"
        stage = Stage(self.conv, self.norm, self.act, self.padding)  # type: ignore[arg-type]
        return conv_reason(self.role, self.conv, self.kinds) or pointwise_reason(self.role, stage)

    def hooked(self, *, pooled: bool) -> str | None:
        """Why a call must run the modules themselves, or None; without `pooled`, those behind the convolution."""
        children = dict(self.layers)
        if pooled and self.pool is not None:
            children["the pool"] = self.pool.module
        if pooled and self.around is not None and (reason := dispatch.own_reason(self.around, "what holds the head")):
            return reason
        if not pooled and len(children) > 1:
            del children[next(iter(children))]
        return dispatch.children_reason(children)

    def run(self, x: Tensor) -> Tensor:
        """The end by its own modules."""
        return chained(tuple(self.layers.values()), x)

    def behind(self, u: Tensor) -> Tensor:
        """What follows the convolution, by its own modules."""
        u = self.norm(u)
        return u if self.act is None else self.act(u)


def norm_act(site: Site, eager: Layer, u: Tensor) -> Tensor:
    """act(BN(u)) in one pass where a kernel takes it, else `eager(u)`."""
    found = site.described()
    if isinstance(found, str) or not infers(u, found[0]):
        return eager(u)
    return functional.bn_act(u, *found)


def pooled(site: Site, x: Tensor) -> Tensor:
    """The head and its pool, which write no map, where a kernel takes them, else both one after the other."""
    pool, found = site.pool, site.described()
    assert pool is not None
    if isinstance(found, str) or not infers(x, found[0], site.conv.weight):
        return pool.module(site.run(x))
    y = functional.pointwise_bn_act_pool(x, site.conv.weight, *found)
    return y if pool.flat else y[:, :, None, None]


def chained(layers: tuple[Layer, ...], x: Tensor) -> Tensor:
    """x through one layer after the other."""
    for layer in layers:
        x = layer(x)
    return x


def same(x: Tensor) -> Tensor:
    """x: for a layer whose work another one has done."""
    return x


class Place(Protocol):
    """Where the modules of one class have an end. `apart`: its methods call norm and activation one by one."""

    @property
    def apart(self) -> bool: ...

    def site(self, module: Module) -> Site | None:
        """The end of this module, or None where it has none."""

    def replaced(self, module: Module) -> dict[str, Layer]:
        """What a method of this module finds under some names instead of its children, at this call."""


@dataclass(frozen=True, slots=True)
class Names:
    """A `Place` by the names of its modules. `act` None: the norm holds it."""

    role: Literal["stem", "head"]
    conv: str
    norm: str
    act: str | None
    kinds: Kinds
    pool: str | None = None
    pool_of: Callable[[Module], Pool] = Pool.of
    padding_of: Callable[[Module], Any] | None = None

    @property
    def apart(self) -> bool:
        return self.act is not None

    def site(self, module: Module) -> Site | None:
        children = module._modules
        conv, norm = children.get(self.conv), children.get(self.norm)
        if conv is None or norm is None:
            return None
        # The activation of ends that are `apart` may be shared: then it is taken over for all of them.
        if not self.apart and nn.Identity in (type(conv), type(norm)):
            return None
        act = norm._modules.get("act") if self.act is None else children.get(self.act)
        layers = {self.conv: conv, self.norm: norm} | ({} if self.act is None else {self.act: act})
        pool = None if self.pool is None else children.get(self.pool)
        padding = None if self.padding_of is None else self.padding_of(conv)
        found = None if pool is None else self.pool_of(pool)
        return Site(self.role, conv, norm, act, layers, self.kinds, found, padding)

    def replaced(self, module: Module) -> dict[str, Layer]:
        site = self.site(module)
        if site is None:
            return {}
        if site.pool_reason() is None and site.hooked(pooled=True) is None:
            assert self.pool is not None
            return {**dict.fromkeys(site.layers, same), self.pool: partial(pooled, site)}
        if self.act is None:
            return {}
        hooked = site.hooked(pooled=False) is not None
        return {self.norm: site.behind if hooked else partial(norm_act, site, site.behind), self.act: same}


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a model's class that runs these ends, itself or through `calls`, methods of the same class.

    `reads` are children that it must name itself, where other versions of the library don't.
    """

    places: tuple[Place, ...]
    calls: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
