"""The swap: a block's class becomes a subclass of itself whose forward goes through `functional.mbconv`, or `dense`'s.

The module object, its submodules, parameters, buffers, hooks and state-dict keys are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn

from fastmbconv import dense, dispatch, functional
from fastmbconv.block import Block, DenseBlock, Memory
from fastmbconv.mbconv import MBConv
from fastmbconv.readings import Read, block_of
from fastmbconv.swap.parts import NotNow
from fastmbconv.swap.registry import Adapter, adapter_of, forward_owner
from fastmbconv.swap.swapped import Swapped
from fastmbconv.swap.written import Ways, read_written


def own_forward(module: Any) -> Callable[..., Any]:
    """The forward of a module's own class; of an unfused one too, for somebody may have kept the swapped forward."""
    cls = type(module)
    return partial((cls.original if isinstance(module, Swapped) else cls).forward, module)


class FusedBlock(Swapped):
    """Mixed in before a block's own class. A call reads the block anew if anything of it changed (readings.py)."""

    is_swap: ClassVar[bool] = True
    read: ClassVar[Read]
    memory: ClassVar[Memory]
    image: ClassVar[str]
    ways: ClassVar[Ways | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = own_forward(self)
        if not is_fused(self):  # type: ignore[arg-type]
            return original(*args, **kwargs)
        if not args and type(self).image in kwargs:
            args = (kwargs.pop(type(self).image),)
        if not args or not isinstance(args[0], Tensor):
            return original(*args, **kwargs)
        if dispatch.eager_at_once(self, args[0]):  # type: ignore[arg-type]
            return original(*args, **kwargs)
        block = block_of(self, type(self).read, *args[1:], **kwargs)  # type: ignore[arg-type]
        if isinstance(block, str):
            return original(*args, **kwargs)

        def eager(x: Tensor) -> Tensor:
            return original(x, *args[1:], **kwargs)

        if isinstance(block, DenseBlock):
            return dense.dense_mbconv(args[0], block, eager=eager)
        memory, around = type(self).memory, block.surrounding
        if around is not None:
            return around.after(
                functional.mbconv(around.before(args[0]), block, eager=around.own, memory=memory), args[0]
            )
        return functional.mbconv(args[0], block, eager=eager, memory=memory)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        cls = type(self)
        return _rebuild, (cls.original, cls.memory, cls.ways), self.__getstate__()


def read(adapter: Adapter, module: nn.Module, *args: Any, **kwargs: Any) -> Block | DenseBlock | str:
    """The block as data at this call, or why the module must run its own submodules."""
    reason = dispatch.module_reason(module)
    if reason is not None:
        return reason
    block = adapter(module, *args, **kwargs)
    return block.reason if isinstance(block, NotNow) else block


def fusible(module: nn.Module) -> Block | DenseBlock | str | None:
    """What `fuse` goes by: the block as data, the reason why it can't be fused, or None for what is no known block.

    Hooks, parametrizations and an adapter's NotNow don't count: they come and go, and each call looks for them.
    """
    adapter = adapter_of(type(module))
    if adapter is None:
        return None
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    found = adapter(module)
    block = found.block if isinstance(found, NotNow) else found
    return block if isinstance(block, str) else dispatch.block_reason(block) or block


def is_fused(module: nn.Module) -> bool:
    """True where a call may reach the kernels."""
    return module.fused if isinstance(module, MBConv) else isinstance(module, FusedBlock)


def swap_in(module: nn.Module, memory: Memory, ways: Ways | None = None) -> None:
    """Make a fusible block a fused one; `ways` says what it is where no adapter does."""
    if isinstance(module, MBConv):
        module.fused, module.memory = True, memory
        return
    cls: Any = type(module)
    fused = isinstance(module, FusedBlock)
    module.__class__ = fused_class(cls.original if fused else cls, memory, ways or (cls.ways if fused else None))


def swap_out(module: nn.Module) -> None:
    """Give a swapped module its own class back; RuntimeError if somebody changed its class since."""
    if isinstance(module, MBConv):
        module.fused = False
    elif isinstance(module, Swapped):
        cls: Any = type(module)
        if "original" not in vars(cls):
            raise RuntimeError(f"module is a {cls.__name__}: its class was changed after fuse; undo that change first")
        module.__class__ = cls.original


@cache
def fused_class(original: Any, memory: Memory, ways: Ways | None = None) -> Any:
    """The fused subclass of a block's class, made once for all that compute the same."""
    adapter: Any = adapter_of(original) if ways is None else partial(read_written, ways)
    body: dict[str, Any] = {} if ways is None else {"adapter": staticmethod(adapter)}
    body |= {
        "is_swap": True,
        "read": staticmethod(partial(read, adapter)),
        "original": original,
        "memory": memory,
        "ways": ways,
        "image": list(signature(vars(forward_owner(original))["forward"]).parameters)[1],
        "__module__": FusedBlock.__module__,
        "__doc__": original.__doc__,
    }
    return type(f"Fused{original.__name__}", (FusedBlock, original), body)


def _rebuild(original: Any, memory: Memory = "fast", ways: Ways | None = None) -> nn.Module:
    """An empty fused module, for copy and pickle to fill: stored models name this function."""
    cls = fused_class(original, memory, ways)
    return cls.__new__(cls)
