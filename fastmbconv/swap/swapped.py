"""What every swapped module has: the name that a reader sees, and a way past TorchScript.

TorchScript compiles the source of a module's class, so a module of its own class must stand in a swapped one's place.
torch.jit.script asks each module for such a one (`__prepare_scriptable__`), and writes it into the caller's model, for
good. It gets a copy of the module tree to write into instead, which shares every parameter and buffer: the script is of
the un-fused model. Nothing of the caller's is touched, so nothing has to be put back, whatever happens on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import nn

_lock = threading.Lock()


class Swapped:
    """Mixed in before a module's own class, `original`, whose subclass it then is."""

    original: ClassVar[type[nn.Module]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "original" in vars(cls):
            _let_script_copy()

    def __prepare_scriptable__(self) -> nn.Module:
        return unfused_copy(self)

    def _get_name(self) -> str:
        """For `repr`; `__name__` is an identifier, which TorchScript and tracing write into source."""
        cls = type(self)
        return f"{cls.original.__name__} (fused)" if "original" in vars(cls) else cls.__name__


def unfused_copy(module: Any, memo: dict[int, Any] | None = None) -> Any:
    """The tree of modules once more, of the classes that they had before `fuse`; everything else is shared."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, torch.jit.ScriptModule):  # compiled already, and never written to
        return module
    cls: Any = type(module).original if isinstance(module, Swapped) else type(module)
    twin = memo[id(module)] = object.__new__(cls)
    for name, value in vars(module).items():
        if isinstance(value, nn.Module):
            value = unfused_copy(value, memo)
        elif name == "_modules":
            value = {key: None if child is None else unfused_copy(child, memo) for key, child in value.items()}
        twin.__dict__[name] = value
    return twin


def _let_script_copy() -> None:
    """Make torch.jit.script prepare a copy of those models that hold a swapped module; others see no difference."""
    script: Any = torch.jit._script
    with _lock:
        prepare = getattr(script, "call_prepare_scriptable_func", None)
        if prepare is not None and not hasattr(prepare, "copies_swapped"):
            script.call_prepare_scriptable_func = _copying(prepare)


def _copying(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(prepare)
    def prepared(obj: Any) -> Any:
        swapped = isinstance(obj, nn.Module) and any(isinstance(module, Swapped) for module in _reached(obj, set()))
        return prepare(unfused_copy(obj) if swapped else obj)

    prepared.copies_swapped = True  # type: ignore[attr-defined]
    return prepared


def _reached(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """A module and all below it, plain attributes included, as torch.jit.script goes through them."""
    if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add(id(module))
    yield module
    for child in (*module._modules.values(), *vars(module).values()):
        if isinstance(child, nn.Module):
            yield from _reached(child, seen)
