"""Which adapter reads which class.

An adapter is a function `(module, *args, **kwargs) -> Block | NotNow | str`: the block as data with its live
parameters, or the reason why this call can't have it, or why there is none. It gets what a call passes besides the
image. It is registered under the qualified name of the class whose `forward` it knows, so no library is imported, a
subclass with a forward of its own is another block, and a further library is one file with a `BLOCKS` dictionary and
one entry here.
"""

from __future__ import annotations

from collections.abc import Callable

from fastmbconv.block import Block, DenseBlock
from fastmbconv.swap import lukemelas, ours, timm, torchvision, transformers
from fastmbconv.swap.parts import NotNow
from fastmbconv.swap.swapped import Swapped

Adapter = Callable[..., Block | DenseBlock | NotNow | str]

ADAPTERS: dict[str, Adapter] = {
    **ours.BLOCKS,
    **timm.BLOCKS,
    **torchvision.BLOCKS,
    **lukemelas.BLOCKS,
    **transformers.BLOCKS,
}


def forward_owner(cls: type) -> type:
    """The class in a module class's ancestry whose `forward` its instances run."""
    return next(base for base in cls.__mro__ if "forward" in vars(base) and not vars(base).get("is_swap"))


def adapter_of(cls: type) -> Adapter | None:
    """The adapter for instances of a module class, or None for a class that none knows.

    A fused class whose module was found by structure has an adapter of its own.
    """
    if issubclass(cls, Swapped):
        for base in cls.__mro__:  # somebody may have made a subclass of it, as FSDP does
            if vars(base).get("is_swap") and "adapter" in vars(base):
                found: Adapter = vars(base)["adapter"].__func__
                return found
    owner = forward_owner(cls)
    return ADAPTERS.get(f"{owner.__module__}.{owner.__qualname__}") if is_own(owner, "forward") else None


def is_own(owner: type, method: str) -> bool:
    """Whether a class's method is its library's: False where somebody put another one there."""
    return getattr(vars(owner)[method], "__module__", None) == owner.__module__
