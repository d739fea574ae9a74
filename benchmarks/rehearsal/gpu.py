"""A GPU that is not there, for this process: PyTorch and Triton take every path that they take on one.

Tensors on "cuda" are fake ones (shapes, dtypes, strides, no values), kernels compile for sm_90, Triton's own launcher
calls a driver (libcuda.c) whose launches compute nothing and take the time that they are told. What is read off a
tensor is 0 or True. It is for a process of its own, nothing takes it back:

    library = preload.load(folder)  # imports PyTorch
    device = gpu.install(library)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # noqa: F401 (it reads torch's own classes when it is imported)
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.rehearsal import cuda
from benchmarks.rehearsal.cuda import Device

ADDRESS = 0x7F0000000000  # of every tensor; aligned as an allocation is
OPERATION_US = 2.0  # of a kernel of PyTorch's, beside its bytes
BYTES_PER_US = 3e6


def install(library: ctypes.CDLL, *, launch_us: float = 10.0, operation_us: float = OPERATION_US) -> Device:
    """Put the device of `preload.load` in place, before a tensor is made and Triton's driver is asked."""
    device = Device(library)
    device.set_launch_us(launch_us)
    _fake_tensors(device, operation_us)
    cuda.install(device)
    from fastmbconv import ops
    from fastmbconv.kernels import launching

    ops.plain = lambda x: True  # fake tensors would take the operators' fakes, and launch nothing
    launching.watching().__enter__()  # all fake tensors are at one address, of which a plan makes nothing
    FakeTensorMode(allow_non_fake_inputs=True).__enter__()
    return device


def launched(device: Device, step: Callable[[], object]) -> list[tuple[str, float]]:
    """Names and microseconds of what a step launches: a profiler's answer."""
    before = device.launches()
    step()
    device.synchronize()
    us = device.library.fake_launch_us()
    return [(device.name(index), us) for index in range(before, device.launches())]


def _fake_tensors(device: Device, operation_us: float) -> None:
    """Values that are read are 0 or True; each operation on the device takes its time."""
    for name, value in (("item", 0.0), ("__bool__", True), ("__float__", 0.0), ("__int__", 0), ("tolist", [])):
        setattr(FakeTensor, name, lambda self, value=value: value)
    FakeTensor.data_ptr = lambda self: ADDRESS
    fake_tensor.init_gpu_context = lambda *args: None  # a tensor on the real device, which a PyTorch with CUDA tries
    FakeTensorMode.may_turn_const = lambda self, tensor: False  # it would compute with it, on the device
    torch.equal = Tensor.equal = lambda a, b: True
    torch.tensor = _made_on_the_host(torch.tensor)
    nn.Module._apply = _apply
    dispatch = FakeTensorMode.dispatch

    def queued(self: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = dispatch(self, function, types, args, kwargs)
        if isinstance(out, Tensor) and out.is_cuda and not function.is_view:
            device.queue(operation_us + 2 * out.nbytes / BYTES_PER_US)
        return out

    FakeTensorMode.dispatch = queued


def _made_on_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor of Python's numbers is filled before it is on its device, and the device has no memory to fill."""

    def tensor(*args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs).to(device or "cpu").requires_grad_(requires_grad)

    return tensor


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's own swaps a fake tensor's contents, which something else may hold."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                self._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self
