"""What the nodes of a trace are: layers, functions of one tensor, sums and products, paddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fastmbconv.mbconv import NORMS
from fastmbconv.swap import behaviour
from fastmbconv.swap.tracing import Trace, calls_of, conv2d_arguments, has_tensors, is_torchs, path_of, run

SUMS = {"add", "add_", "iadd"}
PRODUCTS = {"mul", "mul_", "imul"}
# Functions and methods of one tensor, and of numbers, that work element by element.
ELEMENTWISE = (
    SUMS
    | PRODUCTS
    | {"sub", "sub_", "isub", "div", "div_", "truediv", "itruediv", "true_divide", "neg", "pow", "exp", "tanh", "tanh_"}
    | {"erf", "clamp", "clamp_", "clip", "relu", "relu_", "relu6", "silu", "hardswish", "hardswish_", "hardsigmoid"}
    | {"hardtanh", "hardtanh_", "gelu", "mish", "elu", "selu", "leaky_relu", "softplus", "sigmoid", "sigmoid_", "sqrt"}
    | {"abs", "square", "maximum", "minimum", "dropout", "clone", "contiguous"}
)
ACTIVATIONS = "torch.nn.modules.activation"
SIZES = {"size", "dim", "getattr", "getitem", "floordiv", "numel"}  # of sizes, not of values


class NoMatch(Exception):
    """Why a graph holds no such block there."""


@dataclass(frozen=True, slots=True)
class ConvRecipe:
    """A convolution: the module at `path`, or (`fixed`) `F.conv2d` with that module's weight and bias.

    `fixed` is (stride, padding, dilation, groups, whether there is a bias).
    """

    path: str
    fixed: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of one trace."""

    trace: Trace
    seen: dict[nn.Module, behaviour.Behaviour] = field(default_factory=dict)

    def behaviour_of(self, module: nn.Module) -> behaviour.Behaviour:
        """`behaviour.behaviour_of`, asked once for each module; none of torch's activations does nothing."""
        if type(module).__module__ == ACTIVATIONS:
            return "other"
        if module not in self.seen:
            self.seen[module] = behaviour.behaviour_of(module)
        return self.seen[module]

    def root(self, v: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """The one node that v is an elementwise function of, or v itself, and the nodes between, v the last."""
        if not self.is_elementwise(v):
            return v, []
        found = [self.root(given) for given in v.all_input_nodes]
        if len({root for root, _ in found}) != 1:
            return v, []
        nodes = list(dict.fromkeys(node for _, region in found for node in region))
        return found[0][0], [*nodes, v]

    def is_elementwise(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            if has_tensors(module) or len(node.all_input_nodes) != 1:
                return False
            if self.behaviour_of(module) in ("same", "drop", "dropout"):
                return True
            return type(module).__module__ == ACTIVATIONS or behaviour.is_known(module)
        return (
            node.op in ("call_function", "call_method") and name_of(node) in ELEMENTWISE and bool(node.all_input_nodes)
        )

    def activation(self, root: fx.Node, region: list[fx.Node], role: str) -> Any:
        if not region:
            return "none"
        named = behaviour.activation_named(lambda x: run(region, {root: x}, self.trace.modules))
        if named is None:
            raise NoMatch(f"{self.calls(region)} after the {role}: not supported")
        return named

    def norm(self, node: fx.Node) -> str | None:
        """A BatchNorm's path."""
        module = self.module(node)
        known = type(module) in NORMS or (isinstance(module, nn.BatchNorm2d) and is_torchs(module))
        return path_of(node.target) if known else None

    def conv(self, u: fx.Node, role: str) -> ConvRecipe:
        if self.conv_of(u) is None:
            raise NoMatch(f"{self.call(u)} where the {role} is expected")
        if u.op == "call_module":
            return ConvRecipe(path_of(u.target))
        given = conv2d_arguments(u)
        weight, bias = given["weight"], given["bias"]
        if not all(each is None or getattr(each, "op", "") == "get_attr" for each in (weight, bias)):
            raise NoMatch(f"the {role}'s weight is computed in the forward: not supported")
        path = path_of(weight.target).rpartition(".")
        if path[2] != "weight" or (bias is not None and path_of(bias.target) != f"{path[0]}.bias".lstrip(".")):
            raise NoMatch(f"the {role}'s weight and bias are called {path_of(weight.target)} and not weight and bias")
        fixed = tuple(given[name] for name in ("stride", "padding", "dilation", "groups"))
        if None in fixed:
            raise NoMatch(f"the {role}'s sizes are computed in the forward: not supported")
        return ConvRecipe(path[0], (*fixed, bias is not None))

    def conv_of(self, node: fx.Node) -> Any:
        """The module whose convolution a node is, or None."""
        module = self.module(node)
        if module is not None:
            known = isinstance(module, nn.Conv2d) and (is_torchs(module) or behaviour.pads_same(module))
            return module if known else None
        if node.op == "call_function" and name_of(node) == "conv2d":
            weight = conv2d_arguments(node)["weight"]
            return self.trace.modules.get(path_of(getattr(weight, "target", "")).rpartition(".")[0])
        return None

    def groups(self, conv: ConvRecipe) -> int:
        module: Any = self.trace.modules[conv.path]
        return int(module.groups if conv.fixed is None else conv.fixed[3])

    def is_pointwise(self, node: fx.Node) -> bool:
        conv = self.conv_of(node)
        return conv is not None and tuple(conv.weight.shape[2:]) == (1, 1) and getattr(conv, "groups", 1) == 1

    def padded(self, v: fx.Node) -> tuple[int, int] | None:
        module = self.module(v)
        sides: Any = None
        if isinstance(module, nn.ZeroPad2d) and is_torchs(module):
            sides = module.padding
        elif v.op == "call_function" and name_of(v) == "pad":
            given = dict(zip(("input", "pad", "mode", "value"), v.args, strict=False)) | dict(v.kwargs)
            sides = given["pad"]
            if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
                raise NoMatch("a padding that is not of zeros: not supported")
        elif module is not None and not has_tensors(module) and self.behaviour_of(module) == "same":
            return 0, 0
        if sides is None:
            return None
        left, right, top, bottom = (*sides, 0, 0)[:4]
        if not all(isinstance(side, int) for side in (left, right, top, bottom)):
            raise NoMatch("a padding that depends on the image's size: not supported")
        if (left, right) != (top, bottom):
            raise NoMatch(f"a padding of {(left, right, top, bottom)} (supported: left as top, and right as bottom)")
        return left, right

    def pair(self, node: fx.Node, names: set[str]) -> tuple[fx.Node, fx.Node] | None:
        """The two tensors that a node adds or multiplies."""
        if name_of(node) not in names:
            return None
        given = [each for each in node.args if isinstance(each, fx.Node)]
        given += [each for name, each in node.kwargs.items() if name == "other" and isinstance(each, fx.Node)]
        return (given[0], given[1]) if len(given) == 2 else None

    def module(self, node: fx.Node) -> Any:
        return self.trace.modules[path_of(node.target)] if node.op == "call_module" else None

    def call(self, node: fx.Node) -> str:
        return (
            "the block's input" if node.op == "placeholder" else _with_article([*calls_of([node], self.trace.modules)])
        )

    def calls(self, nodes: list[fx.Node]) -> str:
        return _with_article([name for name in calls_of(nodes, self.trace.modules) if name not in SIZES])


def _with_article(named: list[str]) -> str:
    if not named:
        return "nothing"
    return f"{'an' if named[0][0] in 'aeiouAEIOU' else 'a'} {', '.join(named)}"


def name_of(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    return getattr(node.target, "__name__", str(node.target))
