"""Anybody's module as a graph, by `torch.fx`: what its forward computes of one image.

What is traced is a shadow of the module: other objects of the same classes that share parameters and have no
hooks, so that nothing of the module itself is called, and either mode can be looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fastmbconv.swap.registry import forward_owner
from fastmbconv.swap.swapped import unfused_copy

HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
ROOT = "inner"  # the traced module's name inside of what is traced


@dataclass(frozen=True, slots=True)
class Trace:
    """A graph and the modules that it calls, by their names inside the traced module.

    `outputs` is the traced module's output; of a Sequential, what each of its children gives, in order.
    """

    graph: fx.Graph
    image: fx.Node
    outputs: tuple[fx.Node, ...]
    modules: dict[str, nn.Module]
    training: bool


def is_torchs(module: nn.Module) -> bool:
    """Whether a module computes what torch's own class of that name does, though it may be a subclass of it."""
    return forward_owner(type(module)).__module__.startswith("torch.nn.")


def is_sequence(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, as nn.Sequential does."""
    return forward_owner(type(module)) is nn.Sequential and "forward" not in vars(module)


def has_tensors(module: nn.Module) -> bool:
    """Whether there is a parameter or a buffer in a module."""
    return next(iter((*module.parameters(), *module.buffers())), None) is not None


def shadow(module: nn.Module, *, training: bool) -> nn.Module:
    """The same tree of other objects, un-fused, without hooks, in this mode; parameters are shared, buffers copied."""
    twin: nn.Module = unfused_copy(module)
    for each in twin.modules():
        if isinstance(each, torch.jit.ScriptModule):  # the caller's own: there is no copy
            continue
        each.training = training
        own = vars(each)
        own.update({name: OrderedDict() for name in HOOKS if name in own})
        own["_buffers"] = {
            name: b if b is None or is_lazy(b) else b.detach().clone() for name, b in each._buffers.items()
        }
        own.update({name: copy(value) for name, value in own.items() if type(value) in (list, dict, set)})
    return twin


class _Call(nn.Module):
    """A module's call with one image, and all else that it may take left at its default."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.given: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if not is_sequence(self.inner):
            self.given.append(self.inner(x))
            return cast(Tensor, self.given[-1])
        for child in self.inner.children():
            x = child(x)
            self.given.append(x)
        return x


class _Tracer(fx.Tracer):
    """Goes into modules that hold tensors, down to torch's own, unless `opaque` names them."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: frozenset[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.opaque:
            return True
        quantised = type(m).__module__.startswith("torch.ao.")
        return not is_sequence(m) and (is_torchs(m) or quantised or not has_tensors(m))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if is_sequence(m) and m not in self.opaque:  # perhaps a slice of one, which has no name
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def trace(twin: nn.Module, opaque: frozenset[nn.Module] = frozenset()) -> Trace | str:
    """The graph of a shadow's forward, or why there is none; `opaque` are not looked into.

    Nor is a convolution of somebody's own whose forward can't be traced: behaviour.py tells what it does.
    """
    call = _Call(twin)
    if torch.nn.modules.module._has_any_global_hook():
        return "a hook on every module"
    if not isinstance(twin, nn.Conv2d):
        own = (each for each in twin.modules() if isinstance(each, nn.Conv2d) and not is_torchs(each))
        opaque |= {each for each in own if isinstance(trace(each), str)}
    before = {each: _attributes(each) for each in twin.modules()}
    try:
        graph = _Tracer(opaque).trace(call)
    except fx.proxy.TraceError:
        return "its forward takes another way for other values or sizes of its input"
    except Exception as error:  # whatever somebody's code does with what is no tensor
        return f"torch.fx can't trace its forward: {first_line(error)}"
    if not all(isinstance(given, fx.Proxy) for given in call.given):
        (kind,) = {type(given).__name__ for given in call.given if not isinstance(given, fx.Proxy)} or {"nothing"}
        return f"its forward returns a {kind}, not one tensor"
    for each, attributes in before.items():
        now = _attributes(each)
        changed = [name for name in {**attributes, **now} if now.get(name, before) != attributes.get(name, before)]
        if changed:
            return f"its forward changes an attribute ({changed[0]})"
    modules = dict(twin.named_modules(remove_duplicate=False))
    (image,) = (node for node in graph.nodes if node.op == "placeholder")
    return Trace(graph, image, tuple(given.node for given in call.given), modules, twin.training)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward might change of a module, by identity; of a list, how long it is."""
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: (id(value), len(value) if type(value) in (list, dict, set) else 0) for name, value in plain.items()}


def path_of(target: Any) -> str:
    """A node's target as a name inside the traced module."""
    return str(target).removeprefix(ROOT).removeprefix(".")


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's positional and named arguments, themselves or inside a list or slice."""
    return node.all_input_nodes


def run(nodes: list[fx.Node], values: dict[fx.Node, Any], modules: dict[str, nn.Module]) -> Any:
    """The last node's value, from values of those that come before all of them."""
    values = dict(values)
    for node in nodes:
        args, kwargs = (fx.node.map_arg(given, lambda each: values[each]) for given in (node.args, node.kwargs))
        values[node] = _run_one(node, args, kwargs, modules)
    return values[nodes[-1]]


def _run_one(node: fx.Node, args: Any, kwargs: Any, modules: dict[str, nn.Module]) -> Any:
    if node.op == "call_module":
        return modules[path_of(node.target)](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return cast(Any, node.target)(*args, **kwargs)
    raise ValueError(f"node is a {node.op}: expected a call")


def calls_of(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> Iterator[str]:
    """What the nodes call, for a reader: a module's repr, a function's or a method's name."""
    for node in nodes:
        if node.op == "call_module":
            yield repr(modules[path_of(node.target)]).partition("\n")[0].removesuffix("(")
        else:
            yield getattr(node.target, "__name__", str(node.target)).strip("_")


def conv2d_arguments(node: fx.Node) -> dict[str, Any]:
    """What a node calls `F.conv2d` with, by name; settings as nn.Conv2d has them, None for one that is computed."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return given | {name: _plain(given[name]) for name in ("stride", "padding", "dilation", "groups")}


def _plain(value: Any) -> Any:
    """A convolution's setting as nn.Conv2d has it; None where it is computed."""
    if isinstance(value, (list, tuple)):
        return tuple(value) if all(isinstance(each, int) for each in value) else None
    return value if isinstance(value, (int, str)) else None


def first_line(error: Exception) -> str:
    """An error's kind and first sentence."""
    line = str(error).strip().partition("\n")[0].partition(". ")[0].partition(" - got")[0]
    return f"{type(error).__name__}: {line}"
