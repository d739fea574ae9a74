"""The errors of one block, fused and eager, against itself in float64: for `fastmbconv check` and benchmarks/swaps.py.

Whole models are not compared: behind a dozen BatchNorms of few values each, a rounding error grows by itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import fastmbconv
from fastmbconv import parity

Mode = Literal["training", "eval"]
MODES: tuple[Mode, ...] = ("training", "eval")
DROPS = ("Dropout", "DropPath", "StochasticDepth")


@dataclass(frozen=True)
class Row:
    """One tensor of one block: the errors of both paths against float64, and what the rule allows."""

    block: str
    tensor: str
    fused: float
    eager: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.fused <= self.limit  # False for NaN

    @property
    def ratio(self) -> float:
        """The kernels' error over eager's; 1 where neither has any."""
        if self.eager > 0:
            return self.fused / self.eager
        return float("inf") if self.fused > 0 else 1.0

    @property
    def excess(self) -> float:
        """By which factor the error is larger than what is allowed."""
        return self.fused / self.limit if self.limit > 0 else self.fused


def compare(name: str, module: nn.Module, x: Tensor, dtype: torch.dtype, mode: Mode = "training") -> list[Row]:
    """Run one block in float64, in eager and fused, and compare every tensor.

    Args:
        name: of the block, for the rows.
        module: a block that can be fused, by itself; it stays as it is.
        x: [N, C, H, W], the block's input.
        dtype: of both paths; half precision runs under autocast.
        mode: "training" is a forward and a backward in the modes that the module's parts have: output, gradients and
            running statistics. "eval" is a forward in eval mode without gradients: the output.
    """
    truth = tensors_of(module, x, torch.float64, "eager", mode)
    eager = tensors_of(module, x, dtype, "eager", mode)
    fused = tensors_of(module, x, dtype, "triton", mode)
    rows = []
    for tensor, true in truth.items():
        theirs = parity.relative_error(eager[tensor], true)
        ours = parity.relative_error(fused[tensor], true)
        rows.append(Row(name, tensor, ours, theirs, parity.limit(theirs, dtype)))
    return rows


def tensors_of(module: nn.Module, x: Tensor, dtype: torch.dtype, backend: str, mode: Mode) -> dict[str, Tensor]:
    """What `compare` compares, by name, from a copy of the block."""
    block = copy.deepcopy(module)
    if dtype == torch.float64:
        block = block.double()
    half = dtype in (torch.float16, torch.bfloat16)
    autocast = torch.autocast(x.device.type, dtype=dtype if half else None, enabled=half)
    if mode == "eval":
        model = fastmbconv.fuse(nn.Sequential(block)).eval()
        with fastmbconv.backend(backend), autocast, torch.no_grad():
            return {"output in eval": model(x.to(dtype))}
    model = fastmbconv.fuse(nn.Sequential(block))
    x = x.to(dtype, copy=True).requires_grad_()
    with fastmbconv.backend(backend), autocast:
        y = model(x)
        generator = torch.Generator(y.device).manual_seed(1)
        gradient = torch.randn(y.shape, generator=generator, device=y.device)
        y.backward(gradient.to(dtype).to(y.dtype))
    found = {"output": y, "d input": x.grad}
    found |= {f"d {name}": parameter.grad for name, parameter in block.named_parameters()}
    found |= {name: buffer for name, buffer in block.named_buffers() if buffer.is_floating_point()}
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def settle(model: nn.Module) -> None:
    """Make a model with fresh weights comparable across dtypes.

    Dropout and stochastic depth go off: a mask drawn in another dtype is another mask. BatchNorms get scales and shifts
    as after training: with a fresh model's zero shifts the next batch mean is rounding error and nothing else.
    """
    for module in model.modules():
        if type(module).__name__ in DROPS:
            module.eval()
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
