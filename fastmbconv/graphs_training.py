"""A model's forward and backward as CUDA graphs: what `fastmbconv.graph` returns for a model in training mode.

torch's `make_graphed_callables` records and replays; here is what it leaves to its caller. The capture leaves the
model, its gradients and the random state alone. It knows aliases of the parameters only, so that no autograd node of
theirs becomes part of it. Gradients are copies: a parameter's `.grad` would otherwise be the graph's own buffer, which
the next backward overwrites before it is added. A backward that would read another call's activations is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastmbconv import ranks
from fastmbconv.graphs import WARMUP, Captured, check_input, uncached_autocast

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class GraphedTraining(nn.Module):
    """A captured forward and backward; see `fastmbconv.graph`, which makes it.

    Its parameters, buffers and children are the model's own, under the same names: an optimizer, a state dict or
    DistributedDataParallel finds in it what it would find in the model.

    Attributes:
        model: the model that was captured.
        shape, dtype, device: what every call's tensor must have.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, example: Tensor, copy: bool) -> None:
        super().__init__()
        refuse(model)
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = getattr(model, shared)
        self.__dict__["model"] = model
        self.shape, self.dtype, self.device = example.shape, example.dtype, example.device
        self._copy, self._wants_gradient = copy, example.requires_grad
        self._captured = Captured(model)
        self._flags = [
            (f"{name}.{key}".lstrip("."), module._parameters, key, parameter, parameter.requires_grad)
            for name, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._turn, self._open = 0, -1  # the call that came last, and the one whose backward may come
        self._handed: set[int] = set()  # addresses of gradients that are the graph's own
        with torch.inference_mode(False), torch.enable_grad(), uncached_autocast(), _untouched(model, example):
            x = example.detach().clone(memory_format=torch.preserve_format).requires_grad_(self._wants_gradient)
            self._trained = self._rehearse(x)
            self._replay = self._record(x)

    def _rehearse(self, x: Tensor) -> dict[str, nn.Parameter]:
        """Run once as the model runs; the parameters that get a gradient."""
        outputs = [leaf for leaf in tree_leaves(self.model(x)) if isinstance(leaf, Tensor)]
        if not outputs:
            raise TypeError("model returns no tensor: allowed are tensors")
        self._differentiable = [y.requires_grad for y in outputs]
        ends = [y for y in outputs if y.requires_grad]
        wanted = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not wanted or not ends:
            return {}
        dy = [torch.zeros_like(y) for y in ends]
        gradients = torch.autograd.grad(ends, tuple(wanted.values()), dy, allow_unused=True)
        return {name: p for (name, p), g in zip(wanted.items(), gradients, strict=True) if g is not None}

    def _record(self, x: Tensor) -> Any:
        aliases = [nn.Parameter(p.detach()) for p in self._trained.values()]

        def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(self._trained, parameters, strict=True))
            leaves, self._structure = tree_flatten(torch.func.functional_call(self.model, given, (x,)))
            self._constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        with torch.cuda.device_of(x):
            return torch.cuda.make_graphed_callables(run, (x, *aliases), num_warmup_iters=WARMUP)

    def train(self, mode: bool = True) -> GraphedTraining:
        """The model's mode: a call in another one than at the capture is a RuntimeError."""
        self.model.train(mode)
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Any:
        self._check(x)
        self._turn += 1
        self._open = self._turn
        with torch.cuda.device_of(x):
            outputs = self._replay(*_Inputs.apply(self, x, *self._trained.values()))
            new = iter(_Outputs.apply(self, self._turn, *outputs))
        leaves = [next(new) if constant is None else constant[0] for constant in self._constants]
        return tree_unflatten(leaves, self._structure)

    def _check(self, x: Tensor) -> None:
        check_input(x, self)
        if x.requires_grad and not self._wants_gradient and torch.is_grad_enabled():
            raise ValueError("x requires a gradient: this graph was captured for an example without; make another one")
        self._captured.check()
        for name, owner, key, parameter, wanted in self._flags:
            if owner.get(key) is not parameter:
                raise RuntimeError(f"{name} is another parameter than at the capture: call fastmbconv.graph again")
            if parameter.requires_grad != wanted:
                raise RuntimeError(
                    f"{name} has requires_grad={parameter.requires_grad}, and this graph was captured with {wanted}: "
                    "call fastmbconv.graph again"
                )

    def _begin_backward(self, turn: int) -> None:
        if turn != self._open:
            raise RuntimeError(
                "this call's activations are overwritten: a graph's backward runs once for each call, and before the "
                "next one"
            )
        held = {p.grad.data_ptr() for p in self._trained.values() if p.grad is not None} if self._handed else set()
        if held & self._handed:
            raise RuntimeError(
                "gradients of the last backward are still there, in the graph's own buffers: call "
                "zero_grad(set_to_none=True) before each backward, or fastmbconv.graph with copy=True"
            )
        self._open = -1

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a graph can't be copied or pickled: do that with its model, and call fastmbconv.graph again")


class _Inputs(torch.autograd.Function):
    """What goes into a graph, as it is; its gradients leave as copies if `graph` is to copy."""

    @staticmethod
    def forward(ctx: Any, graph: GraphedTraining, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[1:], strict=True)]
        there = [g for g in wanted if g is not None]
        if not ctx.graph._copy:
            ctx.graph._handed = {g.data_ptr() for g in there}
            return None, *wanted
        copies = [torch.empty_like(g) for g in there]
        torch._foreach_copy_(copies, there)
        new = iter(copies)
        return None, *(None if g is None else next(new) for g in wanted)


class _Outputs(torch.autograd.Function):
    """What comes out of a graph, copied if `graph` is to copy; a backward that comes too late is an error."""

    @staticmethod
    def forward(ctx: Any, graph: GraphedTraining, turn: int, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.graph, ctx.turn = graph, turn
        given = tuple(y.clone() if graph._copy else y.detach() for y in outputs)
        ctx.mark_non_differentiable(*(y for y, of in zip(given, graph._differentiable, strict=True) if not of))
        return given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.graph._begin_backward(ctx.turn)
        return None, None, *gradients


@contextmanager
def _untouched(model: nn.Module, x: Tensor) -> Iterator[None]:
    """What runs inside moves no buffer, and no random generator of the CPU or of x's device."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


def refuse(model: nn.Module) -> None:
    """ValueError for what can't be part of a captured training step, before anything of it ran."""
    for name, module in model.named_modules():
        name = name or "model"
        if isinstance(module, DistributedDataParallel):
            raise ValueError(f"{name} is a DistributedDataParallel: graph what is in it, and wrap the result")
        if isinstance(module, nn.SyncBatchNorm) and ranks.group_of(module) is not None:
            raise ValueError(f"{name} is synchronised over processes: allowed are BatchNorms of one process")
        if any(getattr(module, hooks) for hooks in HOOKS):
            raise ValueError(f"{name} has a hook, which a replay would not call: allowed are modules without hooks")
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise ValueError(f"{name} is a buffer with requires_grad=True: allowed are buffers without gradients")
