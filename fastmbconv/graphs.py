"""`graph(model, example)`: a model as CUDA graphs, for batches so small that launches take the time.

In eval mode its forward, here; in training mode forward and backward, in graphs_training.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from fastmbconv.graphs_training import GraphedTraining

WARMUP = 3  # runs before the capture: kernels compile, cuDNN chooses its algorithms


class Recording:
    """A captured graph: `outputs` are the tensors that each replay writes, in the order in which calls take turns."""

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
            # Other threads may go on: a loader that pins memory would end a capture of the default kind.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.outputs = run()
            self._done.record()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is queued inside waits on the device for the turn before, whichever stream that was on."""
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            yield
            self._done.record()

    def replay(self) -> None:
        self._graph.replay()


class Captured:
    """A model as it was at the capture: where its tensors are, which modules it has, and in which mode each is.

    The tensors' memory stays theirs while a graph reads it, even if the model gets other ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(name or "the model", module, module.training) for name, module in model.named_modules()]
        self._children = [
            (f"{name}.{key}".lstrip("."), module._modules, key, child)
            for name, module in model.named_modules()
            for key, child in module._modules.items()
        ]
        self._tensors = [
            (f"{name}.{key}".lstrip("."), owner, key, tensor.data_ptr(), tensor.untyped_storage())
            for name, module in model.named_modules()
            for owner in (module._parameters, module._buffers)
            for key, tensor in owner.items()
            if tensor is not None
        ]

    def check(self) -> None:
        """RuntimeError if a graph would not do any more what the model does."""
        for name, module, training in self._modules:
            if module.training != training:
                now, then = ("training", "eval") if module.training else ("eval", "training")
                raise RuntimeError(f"{name} is in {now} mode, and this graph was captured in {then} mode")
        for name, children, key, child in self._children:
            if children.get(key) is not child:
                raise RuntimeError(f"{name} is another module than at the capture: call fastmbconv.graph again")
        for name, owner, key, place, _ in self._tensors:
            tensor = owner.get(key)
            if tensor is None or tensor.data_ptr() != place:
                raise RuntimeError(f"{name} has moved in memory since the capture: call fastmbconv.graph again")


def check_input(x: Tensor, captured: Any) -> None:
    """TypeError or ValueError if x is of another kind than what a graph was captured for."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}: allowed is a tensor")
    for name in ("shape", "dtype", "device"):
        given, wanted = getattr(x, name), getattr(captured, name)
        if given != wanted:
            given, wanted = (tuple(v) if name == "shape" else v for v in (given, wanted))
            raise ValueError(f"x has the {name} {given}: this graph was captured for {wanted}; make another one")


class Graphed:
    """A captured forward; see `graph`, which makes it.

    Attributes:
        model: the model that was captured.
        shape, dtype, device: what every call's tensor must have.
    """

    def __init__(self, model: nn.Module, example: Tensor, copy: bool) -> None:
        self.model, self._copy = model, copy
        self.shape, self.dtype, self.device = example.shape, example.dtype, example.device
        self._lock = threading.Lock()
        self._x = example.detach().clone(memory_format=torch.preserve_format)
        self._captured = Captured(model)
        with torch.no_grad(), uncached_autocast():
            self._recording = Recording(lambda: model(self._x), example.device)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(self._recording.outputs)):
            raise TypeError(f"model returns a {type(self._recording.outputs).__name__}: allowed are tensors")

    def __call__(self, x: Tensor) -> Any:
        check_input(x, self)
        with self._lock, torch.no_grad(), self._recording.turn():
            self._x.copy_(x)
            self._recording.replay()
            y = self._recording.outputs
            if self._copy:
                y = tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.preserve_format), y)
        self._captured.check()  # while the device is busy
        return y


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Casts of weights become part of the graph: autocast's cached ones would be old, and freed with its context."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def graph(model: nn.Module, example: Tensor, *, copy: bool = True) -> Graphed | GraphedTraining:
    """Capture a model as CUDA graphs, and return a callable of one tensor that replays them.

    A replay is one launch for the whole model. Parameters and buffers that change in place (an optimiser's step,
    `load_state_dict`) are seen by the next call. Autocast is as it was at the capture.

    In eval mode this is the forward, and gradients don't flow through it; threads take turns, and what two streams
    queue is ordered on the device.

    In training mode it is forward and backward (`torch.cuda.make_graphed_callables`): the output's gradients reach the
    parameters, and x if `example.requires_grad`. Stochastic depth and dropout draw anew at every replay, BatchNorms
    move and count. What is returned is an nn.Module with the model's own parameters under their names; the capture
    changes no value of the model, no `.grad` and no random state. Optimizer, GradScaler and loss stay outside:

        with torch.autocast("cuda", torch.bfloat16):
            step = fastmbconv.graph(model, images)
        step = DistributedDataParallel(step)  # behind `graph`, with several processes

    Each backward belongs to the last call, once, on the stream of that call. No other thread may use the GPU during
    the capture: start loaders that pin memory behind it.

    Args:
        model: on a GPU; its forward must not wait for the GPU, nor depend on values. Fused or not. In training mode
            without checkpointing, which asks for the random state.
        example: an input; every later one has its shape, dtype and device. Another memory format is copied.
        copy: return a copy of the outputs, and of gradients. Without it they are the graph's own buffers, which the
            next call overwrites: `zero_grad(set_to_none=True)` must come between two backwards.

    Returns:
        A callable of one tensor. Another shape, dtype or device, or an x that wants a gradient where `example` did not,
        is a ValueError. A RuntimeError is a parameter that is elsewhere than at the capture (`model.to`,
        `assign=True`), another mode, another module, or in training another `requires_grad`.

    Raises:
        TypeError: for a model that is no nn.Module, an example that is no tensor, or a model that returns none.
        ValueError: for an empty example, tensors that are not on one GPU, a model in eval mode with a part in training
            mode, or in training a DistributedDataParallel, hooks, synchronised BatchNorms, or buffers with gradients.
        RuntimeError: where there is no GPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: allowed is a torch.nn.Module")
    if not isinstance(example, Tensor):
        raise TypeError(f"example is a {type(example).__name__}: allowed is a tensor")
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA GPU here, and a CUDA graph needs one; call the model itself instead")
    if example.device.type != "cuda":
        raise ValueError(f"example is on {example.device}: allowed is a CUDA device")
    if example.numel() == 0:
        raise ValueError(f"example has the shape {tuple(example.shape)}: allowed is one with at least one value")
    for name, module in model.named_modules():
        if module.training and not model.training:
            raise ValueError(f"{name} is in training mode, and the model is not: call model.eval() or model.train()")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(f"{name} is on {tensor.device}, example on {example.device}: allowed is one GPU")
    if model.training:
        from fastmbconv.graphs_training import GraphedTraining

        return GraphedTraining(model, example, copy)
    return Graphed(model, example, copy)
