"""What fusing a block saves: the bytes that a call moves, eager and fused, by the count of fastmbconv/traffic.py."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmbconv import dispatch
from fastmbconv.block import Block, DenseBlock
from fastmbconv.traffic import Sizes, count, count_dense, count_end

NOMINAL_SIDE = 32  # passes of E barely depend on the resolution; they are counted at this one where none is given


@dataclass(frozen=True, slots=True)
class Saving:
    """Traffic of one block in one call, in elements: a training step for a block that trains, else a forward.

    Of a stem or a head too; `expanded` is then its convolution's output. `shape` is the input [N, C, H, W], None where
    it is unknown: then the count is for one image of 32 pixels.
    """

    shape: tuple[int, int, int, int] | None
    training: bool
    expanded: int
    eager: int
    fused: int
    itemsize: int

    @property
    def passes(self) -> tuple[float, float]:
        """(eager, fused), each over the size of the expanded tensor."""
        return self.eager / self.expanded, self.fused / self.expanded

    @property
    def bytes(self) -> tuple[int, int] | None:
        """(eager, fused), or None where the input's shape is unknown."""
        return None if self.shape is None else (self.eager * self.itemsize, self.fused * self.itemsize)


def saving(block: Block | DenseBlock, training: bool, shape: tuple[int, int, int, int] | None) -> Saving:
    """What fusing this block saves in a call on an input of this shape."""
    image = shape or (1, block.in_channels, NOMINAL_SIDE, NOMINAL_SIDE)
    if isinstance(block, DenseBlock):
        expanded, traffic = count_dense(block, image)
    else:
        sizes = Sizes.of(block, image)
        expanded, traffic = sizes.u1, count(sizes)
    eager = traffic.eager_training if training else traffic.eager_inference
    fused = traffic.fused_training if training else traffic.fused_inference
    weight = block.weight if isinstance(block, DenseBlock) else block.project_weight
    return Saving(shape, training, expanded, eager, fused, weight.element_size())


def end_saving(conv: Any, norm: Any, pooled: bool, shapes: dict[nn.Module, tuple[int, int, int, int]]) -> Saving:
    """What fusing a stem or a head saves in a forward; `shapes`: what its convolution and its norm get."""
    shape = shapes.get(conv)
    image = shape or (1, conv.in_channels, NOMINAL_SIDE, NOMINAL_SIDE)
    side = -(-NOMINAL_SIDE // conv.stride[0])
    x, u = prod(image), prod(shapes.get(norm) or (1, conv.out_channels, side, side))
    eager, fused = count_end(x, u, pooled)
    return Saving(shape, False, u, eager, fused, conv.weight.element_size())


def input_shapes(
    model: nn.Module, modules: list[nn.Module], shape: tuple[int, ...]
) -> dict[nn.Module, tuple[int, int, int, int]]:
    """The input shape of each module's first call when the model gets an image tensor of `shape`; nothing is computed.

    The model runs on meta tensors in place of its parameters and buffers: no value of it is read or changed.

    Raises:
        ValueError: where the model does not run on such a tensor.
    """
    sharded = [name for name, p in model.named_parameters() if is_traceable_wrapper_subclass(p)]
    if sharded:
        raise ValueError(f"input_shape is {tuple(shape)} and {sharded[0]} is sharded: explain the model before FSDP")
    found: dict[nn.Module, tuple[int, int, int, int]] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        images = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        if images and images[0].dim() == 4:
            n, c, h, w = images[0].shape
            found.setdefault(module, (n, c, h, w))

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    sharing = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        for norm in sharing:
            norm.training = False  # or it would wait for the other processes
        with dispatch.backend("eager"), torch.no_grad():
            functional_call(model, on_meta, (torch.empty(shape, dtype=dtype, device="meta"),))
    except Exception as error:
        raise ValueError(f"input_shape is {tuple(shape)}: the model does not run on it: {error}") from error
    finally:
        for norm in sharing:
            norm.training = True
        for handle in handles:
            handle.remove()
    return found
