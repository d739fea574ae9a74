"""An MBConv block in a graph, found by structure: backwards from its output to its input.

    first -[expand 1x1, BN, act]- depthwise, BN, act -[a * gate(a)]- project 1x1, BN -[act, drop, + shortcut]

Between two layers that hold tensors there may stand any functions and modules without tensors; what they compute is
told by values (behaviour.py). Every value inside has one consumer, and the shortcut is the block's own input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx, nn

from fastmbconv.block import Activation, Gate
from fastmbconv.swap import behaviour
from fastmbconv.swap.nodes import PRODUCTS, SIZES, SUMS, ConvRecipe, Nodes, NoMatch, name_of
from fastmbconv.swap.tracing import Trace, has_tensors, is_torchs, path_of, run


@dataclass(frozen=True, slots=True)
class StageRecipe:
    """A convolution, its BatchNorm's path, the activation behind it, and what is padded in front of it.

    `padded` counts pixels (at top and left, at bottom and right), or is TensorFlow's way.
    """

    conv: ConvRecipe
    norm: str
    act: Activation
    padded: tuple[int, int] | Literal["same"] = (0, 0)


@dataclass(frozen=True, slots=True)
class GateRecipe:
    """Paths of a squeeze-excite's two layers, and what stands behind each."""

    reduce: str
    act: Activation
    expand: str
    gate: Gate


@dataclass(frozen=True, slots=True)
class Recipe:
    """A block in names: where in a module its layers are, and what its forward makes of them."""

    start: StageRecipe | None
    expand: StageRecipe | None
    depthwise: StageRecipe
    se: GateRecipe | None
    project: StageRecipe
    residual: bool
    drop: str | None


@dataclass(frozen=True, slots=True)
class Match:
    """A recipe, the node that is the block's input, and all nodes that the block computes."""

    recipe: Recipe
    first: fx.Node
    nodes: frozenset[fx.Node]


def match(trace: Trace, out: fx.Node, starts: Collection[fx.Node], taken: Collection[fx.Node] = ()) -> Match:
    """The block whose output is `out` and whose input is one of `starts`; `taken` belong to other blocks.

    Raises:
        NoMatch: with what stands in the way.
    """
    return _Matcher(Nodes(trace), starts, taken).match(out)


def match_whole(trace: Trace) -> Recipe:
    """The block that a graph computes, and nothing else.

    Raises:
        NoMatch: with what stands in the way.
    """
    matcher = _Matcher(Nodes(trace), {trace.image}, ())
    found = matcher.match(trace.outputs[-1])
    matcher.check_nothing_else()
    return found.recipe


def match_stage(trace: Trace) -> StageRecipe:
    """The convolution, BatchNorm and activation that a graph computes, and nothing else.

    Raises:
        NoMatch: with what stands in the way.
    """
    matcher, out = _Matcher(Nodes(trace), {trace.image}, ()), trace.outputs[-1]
    stage, first = matcher._stage(out, "convolution")
    if first is not trace.image:
        raise NoMatch(f"{matcher.at.call(first)} before the convolution: not supported")
    matcher._check_consumers(out, first)
    matcher.check_nothing_else()
    return stage


@dataclass
class _Matcher:
    at: Nodes
    starts: Collection[fx.Node]
    taken: Collection[fx.Node]
    nodes: set[fx.Node] = field(default_factory=set)

    def match(self, out: fx.Node) -> Match:
        v, shortcut = self._split_residual(out)
        v, drop = self._strip_drop(v)
        if drop is not None and shortcut is None:
            raise NoMatch("stochastic depth without a residual: not supported")
        project, v = self._stage(v, "projection")
        v, se = self._excite(v)
        depthwise, v = self._stage(v, "depthwise convolution")
        if self.at.groups(depthwise.conv) == 1:
            raise NoMatch("a dense convolution where the depthwise convolution is expected")
        expand, first = self._expansion(v)
        start, first = self._start(first, shortcut, expand)
        if first not in self.starts or (shortcut is not None and first is not shortcut):
            if expand is None:
                self._stage(first, "expansion")  # has the reason
            raise NoMatch(f"{self.at.call(first)} before the first convolution: not supported")
        self._check_consumers(out, first)
        norms = [self.at.trace.modules[each.norm] for each in (start, expand, depthwise, project) if each is not None]
        if len(set(norms)) < len(norms):
            raise NoMatch("a BatchNorm stands in two places: not supported")
        recipe = Recipe(start, expand, depthwise, se, project, shortcut is not None, drop)
        return Match(recipe, first, frozenset(self.nodes))

    def check_nothing_else(self) -> None:
        for node in self.at.trace.graph.nodes:
            if (
                node not in self.nodes
                and node.op not in ("placeholder", "get_attr", "output")
                and not self._is_size(node)
            ):
                raise NoMatch(f"it computes more than a block: {self.at.call(node)}")

    def _split_residual(self, out: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        pair = self.at.pair(out, SUMS)
        if pair is None:
            return out, None
        if name_of(out) in ("iadd", "add_") and pair[0] in self.starts:
            raise NoMatch("the residual is added to the block's own input in place")
        if float(out.kwargs.get("alpha", 1)) != 1:  # type: ignore[arg-type]
            raise NoMatch("the residual is scaled: not supported")
        for shortcut, branch in (pair, pair[::-1]):
            if shortcut in self.starts:
                self.nodes.add(out)
                return branch, shortcut
        raise NoMatch("what is added last is not the block's own input")

    def _strip_drop(self, v: fx.Node) -> tuple[fx.Node, str | None]:
        """What is behind modules that do nothing, and a stochastic depth's path."""
        drop = None
        while v.op == "call_module" and (module := self.at.module(v)) is not None and not has_tensors(module):
            kind = self.at.behaviour_of(module)
            if kind == "drop" and drop is None:
                drop = path_of(v.target)
            elif kind != "same" and not (kind == "dropout" and not self.at.trace.training):
                break
            self.nodes.add(v)
            (v,) = v.all_input_nodes
        return v, drop

    def _stage(self, v: fx.Node, role: str) -> tuple[StageRecipe, fx.Node]:
        """The convolution, BatchNorm and activation that end in v, and the convolution's input."""
        root, region = self.at.root(v)
        norm = self.at.norm(root)
        if norm is None:
            raise NoMatch(self._why_no_norm(root, region, role))
        act = self.at.activation(root, region, role)
        (u,) = root.all_input_nodes
        conv = self.at.conv(u, role)
        v, padded = self._unpad(u.all_input_nodes[0])
        self.nodes.update((*region, root, u))
        if not is_torchs(self.at.conv_of(u)) and conv.fixed is None:
            if padded != (0, 0):
                raise NoMatch(
                    f"a padding before a {type(self.at.conv_of(u)).__name__}, which pads itself: not supported"
                )
            return StageRecipe(conv, norm, act, "same"), v
        return StageRecipe(conv, norm, act, padded), v

    def _expansion(self, v: fx.Node) -> tuple[StageRecipe | None, fx.Node]:
        root, _ = self.at.root(v)
        if self.at.norm(root) is None or root in self.taken or not self.at.is_pointwise(root.all_input_nodes[0]):
            return None, v
        return self._stage(v, "expansion")

    def _start(
        self, first: fx.Node, shortcut: fx.Node | None, expand: StageRecipe | None
    ) -> tuple[StageRecipe | None, fx.Node]:
        """A depthwise convolution and its BatchNorm in front of an expansion, where the block begins before them."""
        if expand is None or first is shortcut or self.at.norm(first) is None or first in self.taken:
            return None, first
        (u,) = first.all_input_nodes
        conv = self.at.conv_of(u)
        before = self._unpad(u.all_input_nodes[0], note=False)[0] if conv is not None else None
        if conv is None or not (conv.groups == conv.in_channels > 1) or before not in self.starts:
            return None, first
        return self._stage(first, "start")

    def _excite(self, v: fx.Node) -> tuple[fx.Node, GateRecipe | None]:
        """What is multiplied by a gate, and the gate; v itself where none is."""
        root, region = self.at.root(v)
        pair = self.at.pair(root, PRODUCTS)
        if pair is None:
            if self.at.norm(root) is None:
                self._refuse_bare_gate(v)
            return v, None
        reasons = []
        for a, gate in (pair, pair[::-1]):
            nodes = set(self.nodes)
            try:
                found = self._gate(gate, a)
            except NoMatch as reason:
                self.nodes = nodes
                reasons.append(str(reason))
                continue
            if self.at.activation(root, region, "squeeze-excite") != "none":
                raise NoMatch("the squeeze-excite stands before the activation: not supported")
            self.nodes.update((*region, root))
            return a, found
        raise NoMatch(min(reasons, key=lambda reason: "not the depthwise" in reason))

    def _refuse_bare_gate(self, v: fx.Node) -> None:
        nodes = set(self.nodes)
        try:
            self._gate(v, None)
        except NoMatch:
            return
        finally:
            self.nodes = nodes
        raise NoMatch("the projection takes the squeeze-excite's gate itself: nothing is multiplied by it")

    def _gate(self, v: fx.Node, a: fx.Node | None) -> GateRecipe:
        expand, behind, layer = self._layer_before(v, a)
        inputs, between, reducer = self._layer_before(expand.all_input_nodes[0], a)
        squeezed = inputs.all_input_nodes[0]
        image = behaviour.probe(4, layer.weight.shape[0], 6, 6)
        gate = behaviour.gate_named(self._function(behind, expand, layer, a, image), image[:, :, 0, 0])
        if gate is None:
            raise NoMatch(f"{self.at.calls(behind)} as the squeeze-excite's gate: not supported")
        x = behaviour.probe(4, reducer.weight.shape[0])
        act = behaviour.activation_named(self._function(between, inputs, reducer, a, image), x)
        if act is None:
            raise NoMatch(f"{self.at.calls(between)} inside the squeeze-excite: not supported")
        pooling = self._between(squeezed, a)
        if a is not None and not behaviour.is_mean(lambda t: run(pooling, {a: t}, self.at.trace.modules), image):
            raise NoMatch(f"{self.at.calls(pooling)} as the squeeze: not supported (supported: the image's mean)")
        self.nodes.update((*behind, expand, *between, inputs, *pooling))
        return GateRecipe(path_of(inputs.target), act, path_of(expand.target), gate)

    def _function(
        self, nodes: list[fx.Node], layer: fx.Node, module: Any, a: fx.Node | None, image: Tensor
    ) -> Callable[[Tensor], Any]:
        """What nodes make of a layer's output, [N, C] in and out."""

        def function(x: Tensor) -> Any:
            given = x if isinstance(module, nn.Linear) else x[:, :, None, None]
            values = {layer: given} | ({} if a is None else {a: image})
            y = run(nodes, values, self.at.trace.modules) if nodes else given
            if y.dim() == 4:
                return y.expand(*y.shape[:2], 1, 1)[:, :, 0, 0] if y.shape[2:] == (1, 1) else y.mean((2, 3))
            return y

        return function

    def _layer_before(self, v: fx.Node, a: fx.Node | None) -> tuple[fx.Node, list[fx.Node], Any]:
        """The 1x1 convolution or linear layer that v follows from, what is between, and its module."""
        nodes, ends = self._behind(v, a)
        if any(end.op != "call_module" for end in ends):
            raise NoMatch("a gate that does not follow from two layers: not supported")
        if len(ends) != 1:
            raise NoMatch("a gate that is not the depthwise stage's own: not supported")
        module = self.at.module(ends[0])
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or not is_torchs(module):
            raise NoMatch(f"a {type(module).__name__} inside the squeeze-excite: not supported")
        return ends[0], nodes, module

    def _between(self, v: fx.Node, a: fx.Node | None) -> list[fx.Node]:
        """The nodes that v follows from, after a."""
        nodes, ends = self._behind(v, a)
        if ends and a is not None:
            raise NoMatch("the squeeze is of another tensor, not the depthwise stage's output")
        return nodes

    def _behind(self, v: fx.Node, a: fx.Node | None) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes that v follows from, as far as a, v the last; and where the way ends: those that hold tensors."""
        nodes: list[fx.Node] = []
        ends: list[fx.Node] = []

        def walk(node: fx.Node) -> None:
            if node in nodes or node in ends or node is a:
                return
            module = self.at.module(node)
            if node.op in ("placeholder", "get_attr") or (module is not None and has_tensors(module)):
                ends.append(node)
                return
            for given in node.all_input_nodes:
                walk(given)
            nodes.append(node)

        walk(v)
        return nodes, ends

    def _why_no_norm(self, root: fx.Node, region: list[fx.Node], role: str) -> str:
        if (pair := self.at.pair(root, SUMS)) is not None and any(each in self.starts for each in pair):
            return f"{self.at.calls(region or [root])} behind the sum with the block's input: not supported"
        if self.at.conv_of(root) is not None:
            return f"no BatchNorm after the {role}"
        if root.op == "placeholder":
            return f"no {role} was found"
        return f"{self.at.call(root)} after the {role}: not supported"

    def _unpad(self, v: fx.Node, *, note: bool = True) -> tuple[fx.Node, tuple[int, int]]:
        """What is padded with zeros, and by how much at (top and left, bottom and right)."""
        sides = self.at.padded(v)
        if sides is None:
            return v, (0, 0)
        if note:
            self.nodes.add(v)
        inner, (before, after) = self._unpad(v.all_input_nodes[0], note=note)
        return inner, (before + sides[0], after + sides[1])

    def _check_consumers(self, out: fx.Node, first: fx.Node) -> None:
        for node in self.nodes - {out}:
            for user in node.users:
                if user not in self.nodes and not self._is_size(user):
                    raise NoMatch(f"{self.at.call(node)}'s output has another use: {self.at.call(user)}")

    def _is_size(self, node: fx.Node) -> bool:
        """Whether a node tells sizes only, to nodes of the block or to nobody."""
        return name_of(node) in SIZES and all(user in self.nodes or self._is_size(user) for user in node.users)
