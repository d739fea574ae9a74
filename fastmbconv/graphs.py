"""`graph(model, example)`: a model's forward as one CUDA graph, for batches so small that launches take the time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

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
        # Their memory stays theirs while the graph reads it, even if the model gets other tensors.
        self._places = [
            (owner, name, tensor.data_ptr(), tensor.untyped_storage())
            for module in model.modules()
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        with torch.no_grad(), uncached_autocast():
            self._recording = Recording(lambda: model(self._x), example.device)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(self._recording.outputs)):
            raise TypeError(f"model returns a {type(self._recording.outputs).__name__}: allowed are tensors")

    def __call__(self, x: Tensor) -> Any:
        self._check(x)
        with self._lock, torch.no_grad(), self._recording.turn():
            self._x.copy_(x)
            self._recording.replay()
            y = self._recording.outputs
            if self._copy:
                y = tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.preserve_format), y)
        self._check_model()  # while the device is busy
        return y

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}: allowed is a tensor")
        for name in ("shape", "dtype", "device"):
            given, captured = getattr(x, name), getattr(self, name)
            if given != captured:
                given, captured = (tuple(v) if name == "shape" else v for v in (given, captured))
                raise ValueError(f"x has the {name} {given}: this graph was captured for {captured}; make another one")

    def _check_model(self) -> None:
        if self.model.training:
            raise RuntimeError("the model is in training mode, and this graph was captured in eval mode")
        for owner, name, place, _ in self._places:
            tensor = owner.get(name)
            if tensor is None or tensor.data_ptr() != place:
                raise RuntimeError(f"{name} has moved in memory since the capture: call fastmbconv.graph again")


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Casts of weights become part of the graph: autocast's cached ones would be old, and freed with its context."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def graph(model: nn.Module, example: Tensor, *, copy: bool = True) -> Graphed:
    """Capture the forward of a model in eval mode as a CUDA graph, and return a callable that replays it.

    A replay is one launch for the whole model. Parameters and buffers that change in place (an optimiser's step,
    `load_state_dict`) are seen by the next call. Autocast is as it was at the capture. Gradients don't flow through it.

    Args:
        model: on a GPU, in eval mode; its forward must not wait for the GPU, nor depend on values. Fused or not.
        example: an input; every later one has its shape, dtype and device. Another memory format is copied.
        copy: return a copy of the outputs. Without it a call returns the graph's own buffers, which the next call
            overwrites.

    Returns:
        A callable of one tensor. Threads take turns; what two streams queue is ordered on the device. Another shape,
        dtype or device is a ValueError; a parameter that is elsewhere than at the capture (`model.to`, `assign=True`),
        or training mode, is a RuntimeError.

    Raises:
        TypeError: for a model that is no nn.Module, an example that is no tensor, or a model that returns none.
        ValueError: for a model in training mode, an empty example, or tensors that are not on one GPU.
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
        if module.training:
            raise ValueError(f"{name or 'model'} is in training mode: call model.eval() before the capture")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(f"{name} is on {tensor.device}, example on {example.device}: allowed is one GPU")
    return Graphed(model, example, copy)
