"""Which path a call takes: the Triton kernels, or eager PyTorch and why.

`FASTMBCONV_BACKEND` (or `set_backend`, or `with backend(...)`) is one of
* auto: kernels where they run and are supported, eager elsewhere, never an error;
* triton: kernels or a ValueError that names the reason (on a CPU this wants TRITON_INTERPRET=1 before the start);
* eager: PyTorch everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)

from fastmbconv import ranks
from fastmbconv.block import BatchNorm, Block, DenseBlock, Padding, SqueezeExcite

BACKENDS = ("auto", "triton", "eager")
KERNEL_SIZES = (3, 5)
STRIDES = (1, 2)
ACTIVATIONS = ("silu", "relu", "relu6", "hardswish", "gelu", "gelu_tanh")
GATES = ("sigmoid", "hardsigmoid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)  # compute capability
IMAGE_VALUES, PIXELS = 2**31, 2**30  # of one image, and of a batch: kernels count both in 32 bits
MOST_INPUTS, MOST_REDUCED = 4096, 1024  # channels of an expansion's input and of a squeeze, which a program takes whole
EMPTY = "an empty batch"
TRANSFORMED = "inside a torch.func transform or forward-mode AD"
WAY_OUT = "run the model inside `with fastmbconv.backend('eager')`, or take them out with fastmbconv.unfuse(model)"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: allowed are {', '.join(BACKENDS)}")
    return name


HAS_TRITON = find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
_backend = _checked(os.environ.get("FASTMBCONV_BACKEND", "auto"), "FASTMBCONV_BACKEND")


def get_backend() -> str:
    """The backend in force: "auto", "triton" or "eager"."""
    return _backend


def set_backend(name: str) -> None:
    """Choose the backend for this process; ValueError for an unknown name."""
    global _backend
    _backend = _checked(name, "backend")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend inside a `with` block."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def interpret() -> None:
    """Let kernels run in Triton's interpreter in this process, on CPU tensors and slowly; before Triton is imported."""
    global _interpreted
    os.environ["TRITON_INTERPRET"] = "1"
    _interpreted = True


def interpreted() -> bool:
    """True where kernels run in Triton's interpreter: started with TRITON_INTERPRET=1, or `interpret` was called."""
    return _interpreted


def device_reason(x: Tensor) -> str | None:
    """Why no kernel can run on this tensor's device and dtype, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if torch.compiler.is_exporting() or torch.jit.is_scripting() or torch.jit.is_tracing():
        return "the model is being exported or traced"
    if interpreted():
        if x.device.type != "cpu":
            return f"TRITON_INTERPRET=1 runs on CPU tensors, and this one is on {x.device}"
        if get_backend() == "auto":
            return "a CPU tensor (the interpreter runs only with the backend set to triton)"
        return None if x.dtype in (*DTYPES, torch.float64) else f"dtype {x.dtype}"
    if x.device.type != "cuda":
        return f"a {x.device.type} tensor"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    # A compiled graph would ask about the GPU at each call.
    return None if torch.compiler.is_compiling() else _gpu_reason(x.device)


@cache
def _gpu_reason(device: torch.device) -> str | None:
    """Why this GPU runs no kernel, or None."""
    if torch.version.hip is not None:
        return "a GPU under ROCm (supported: NVIDIA's)"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return "a GPU of compute capability {}.{} (supported: {}.{} and later)".format(*capability, *OLDEST)
    return None


def activation_reason(activation: str, none: bool = False) -> str | None:
    """Why no kernel computes this activation, or None; `none`: there may be none."""
    if activation in ACTIVATIONS or (none and activation == "none"):
        return None
    return f"activation {activation!r} (supported: {', '.join(ACTIVATIONS)}{', none' if none else ''})"


def shape_reason(kernel_size: int, stride: int, padding: Padding, activation: str) -> str | None:
    """Why no kernel exists for this depthwise convolution and the activation behind it, or None."""
    if kernel_size not in KERNEL_SIZES:
        return f"kernel size {kernel_size} (supported: 3, 5)"
    if stride not in STRIDES:
        return f"stride {stride} (supported: 1, 2)"
    if (reason := activation_reason(activation, none=True)) is not None:
        return reason
    sides = (0,) if padding == "same" else padding if isinstance(padding, tuple) else (padding,)
    if not all(0 <= side < kernel_size for side in sides):
        return f"padding {padding} (supported: 0 to kernel size - 1, or 'same')"
    return None


def block_reason(block: Block | DenseBlock) -> str | None:
    """Why this block can't be fused whatever its input, or None."""
    reason = activation_reason(block.activation) if isinstance(block, DenseBlock) else _convolutions_reason(block)
    if reason is None and (last := activation_reason(block.project_activation, none=True)) is not None:
        reason = last.replace(" (", " after the projection (", 1)
    if reason is None and block.se is not None:
        reason = activation_reason(block.se.activation) or squeeze_reason(block.se)
    return reason or bias_reason(*norms(block))


def _convolutions_reason(block: Block) -> str | None:
    reason, start = shape_reason(block.kernel_size, block.stride, block.padding, block.activations[1]), block.start
    if reason is None and start is not None:
        before = shape_reason(start.kernel_size, start.stride, start.padding, "none")
        reason = None if before is None else f"in front of the block {before}"
    if reason is None and block.expand_weight is not None:
        channels = block.in_channels
        wide = f"{channels} input channels (supported: up to {MOST_INPUTS})" if channels > MOST_INPUTS else None
        reason = activation_reason(block.activation) or wide
    return reason


def norms(block: Block | DenseBlock) -> tuple[BatchNorm | None, ...]:
    """Every BatchNorm of a block, None for one that isn't there; that of a start comes last."""
    if isinstance(block, DenseBlock):
        return block.bn1, block.bn2
    return block.bn1, block.bn2, block.bn3, None if block.start is None else block.start.bn


def bias_reason(*bns: BatchNorm | None) -> str | None:
    """Why no kernel takes these BatchNorms behind their convolutions' biases, or None."""
    for bn in bns:
        if bn is not None and bn.conv_bias is not None and bn.bias is None:
            return "a convolution's bias before a BatchNorm without one"
    return None


def squeeze_reason(se: SqueezeExcite) -> str | None:
    """Why no kernel takes this squeeze-and-excitation's gate or width, or None."""
    if se.gate not in GATES:
        return f"gate {se.gate!r} (supported: {', '.join(GATES)})"
    reduced = se.reduce_weight.shape[0]
    return None if reduced <= MOST_REDUCED else f"{reduced} reduced channels (supported: up to {MOST_REDUCED})"


def call_reason(x: Tensor) -> str | None:
    """Why this call runs eager whatever the block (backend, empty batch, device, dtype), or None."""
    if get_backend() == "eager":
        return "the backend is set to eager"
    if not torch.jit.is_tracing() and x.numel() == 0:  # a tracer warns of what depends on a size
        return EMPTY
    return TRANSFORMED if transforms() else device_reason(x) or _subclass_reason(x)


def transforms() -> bool:
    """True inside a torch.func transform or forward-mode AD: the kernels have ordinary gradients only."""
    return functorch_transforms() or (forward_ad._current_level >= 0 and not torch.compiler.is_compiling())


def functorch_transforms() -> bool:
    """True inside a torch.func transform (grad, vmap, jvp, ...)."""
    return torch._C._are_functorch_transforms_active()


def eager_at_once(module: nn.Module, x: Tensor) -> bool:
    """True where a call of a fused module runs eager whatever the block: nothing of it needs to be looked at.

    Raises:
        ValueError: for an empty batch where its BatchNorms are synchronised: the other ranks would wait.
    """
    reason = call_reason(x)
    if reason == EMPTY:
        _refuse_absence(module, x)
    return _backend != "triton" and reason is not None


def _refuse_absence(module: nn.Module, x: Tensor) -> None:
    if any(isinstance(norm, nn.SyncBatchNorm) and ranks.group_of(norm) is not None for norm in module.modules()):
        raise ValueError(f"x has shape {tuple(x.shape)}: synchronised BatchNorms want a sample on every rank")


def supports(block: Block | DenseBlock, x: Tensor) -> str | None:
    """None where the kernels take this call, else the reason why eager does."""
    return call_reason(x) or block_reason(block) or _weight_reason(block) or _block_size_reason(block, x)


def size_reason(x: Tensor, channels: int) -> str | None:
    """Why images of x's size, with so many channels, are too large for the kernels' 32-bit counts, or None."""
    if x.dim() != 4:
        return None
    images, _, height, width = x.shape
    if height * width * channels >= IMAGE_VALUES:
        return f"an image of {height} x {width} pixels and {channels} channels (supported: 2^31 values)"
    if images * height * width >= PIXELS:
        return f"{images} images of {height} x {width} pixels (supported: 2^30 pixels)"
    return None


def _block_size_reason(block: Block | DenseBlock, x: Tensor) -> str | None:
    if isinstance(block, Block):
        return size_reason(x, max(block.in_channels, block.depthwise_weight.shape[0]))
    return size_reason(x, 1)  # nothing behind a dense convolution counts inside an image


def _weight_reason(block: Block | DenseBlock) -> str | None:
    """No plain tensor: under FSDP a block's weights are plain inside its forward, and DTensors outside of it."""
    weights: tuple[Tensor | None, ...]
    if isinstance(block, DenseBlock):
        weights = (block.weight, block.project_weight)
    else:
        start = None if block.start is None else block.start.weight
        weights = (block.depthwise_weight, block.project_weight, block.expand_weight, start, block.project_bias)
    for weight in weights:
        if weight is not None and is_traceable_wrapper_subclass(weight):
            return f"a weight is a {type(weight).__name__} (FSDP: outside of its forward)"
    read = weights[1:] if isinstance(block, DenseBlock) else weights
    return layout_reason(*read, *_vectors(block.se, *norms(block)))


def _vectors(se: SqueezeExcite | None, *bns: BatchNorm | None) -> Iterable[Tensor | None]:
    if se is not None:
        yield from (se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias)
    for bn in bns:
        if bn is not None:
            yield from (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.conv_bias)


def layout_reason(*tensors: Tensor | None) -> str | None:
    """Why kernels can't read these weights, or None: they take a tensor's values one behind the other."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            return f"a weight's strides are {tensor.stride()} for its shape {tuple(tensor.shape)}"
    return None


def module_reason(module: nn.Module) -> str | None:
    """Why a module must run its own submodules, or None: somebody hooked, parametrised or patched one of them.

    Or a transform is active, or a mode watches the operators: then the module runs eager under every backend.
    """
    return children_reason(module._modules)


def children_reason(children: Mapping[str, nn.Module | None]) -> str | None:
    """The same of some modules by their names, which somebody else would call."""
    return outer_reason() or _inner_reason(children, "")


def outer_reason() -> str | None:
    """The part of it that does not depend on the module."""
    if torch.nn.modules.module._has_any_global_hook():
        return "a hook on every module"
    return TRANSFORMED if transforms() else watching_reason()


def plain(x: Tensor) -> bool:
    """True where nobody watches operators: a compiler, a dispatch mode, a tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    )


def watching_reason() -> str | None:
    """Why modules run eager under a mode of somebody else's, which knows aten's operators only; None without one.

    torch's own modes take any operator, by its schema, fake implementation and FLOP formula. So does a mode whose class
    says `sees_fastmbconv = True`.
    """
    if torch.compiler.is_compiling():
        return None
    if not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack():
        return None
    for mode in (*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()):
        if _is_foreign(type(mode)):
            kind = "TorchDispatchMode" if isinstance(mode, TorchDispatchMode) else "TorchFunctionMode"
            return f"{type(mode).__name__}, a {kind}, watches the operators"
    return None


def _is_foreign(cls: type) -> bool:
    return cls.__module__.partition(".")[0] != "torch" and not getattr(cls, "sees_fastmbconv", False)


def _subclass_reason(x: Tensor) -> str | None:
    """Why eager runs on somebody else's tensor subclass that watches the operators, or None."""
    cls = type(x)
    if cls is Tensor or cls is nn.Parameter or torch.compiler.is_compiling():
        return None
    watches = cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ and _is_foreign(cls)
    return f"a {cls.__name__}, a tensor subclass that watches the operators" if watches else None


def own_reason(module: nn.Module, name: str) -> str | None:
    """Why this module, whatever is inside it, must be called as one, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook on {name}"
    return f"a forward replaced on {name}" if "forward" in module.__dict__ else None


def _inner_reason(children: Mapping[str, nn.Module | None], prefix: str) -> str | None:
    for name, child in children.items():  # named_modules() is slower, and each call pays
        if child is None:
            continue
        if name == "parametrizations":
            return f"a parametrization on {prefix.removesuffix('.') or 'the block'}"
        reason = own_reason(child, f"{prefix}{name}")
        if reason is None and child._modules:
            reason = _inner_reason(child._modules, f"{prefix}{name}.")
        if reason is not None:
            return reason
    return None
