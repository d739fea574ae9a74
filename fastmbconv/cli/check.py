"""`fastmbconv check`: the error of every block's output, gradients and statistics on this machine, next to eager's.

Each block gets the input that it has inside the model. Truth is the block in eager float64; eager and fused run in the
same dtype (half precision under autocast), and the parity rule says how far the fused one may be off: 2x eager's error
plus a small constant per dtype.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmbconv.cli.extras import CommandError
from fastmbconv.cli.models import HELP, load

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPES = ("float32", "float16", "bfloat16")
DEFAULT = "efficientnet_b0"


def add_to(commands: Any) -> None:
    parser = commands.add_parser("check", help="numerical report of a model's blocks on this machine")
    parser.description = __doc__
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT,
        metavar="MODEL",
        help=f"{HELP} (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--size", type=int, help="pixels (default: 224 on a GPU, 32 on a CPU)")
    parser.add_argument("--batch", type=int, help="images (default: 8)")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds on a CPU; later blocks are left out")
    parser.set_defaults(run=run)


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


def run(options: argparse.Namespace) -> int:
    for name, low in (("size", 8), ("batch", 1)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise CommandError(f"--{name} is {value}: allowed are {low} and more")
    import torch

    from fastmbconv import dispatch

    gpu = torch.cuda.is_available()
    if not gpu:
        dispatch.interpret()
    from fastmbconv import parity
    from fastmbconv.cli import blocks

    torch.manual_seed(0)
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, options.dtype)
    size, batch = options.size or (224 if gpu else 32), options.batch or 8
    model = load(options.model).module.to(device).train()
    settle(model)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    inputs = blocks.inputs_of(model, x)
    modules = blocks.blocks_of(model)
    if not modules:
        raise CommandError(f"MODEL is {options.model!r}: it has no MBConv block")

    print(f"{options.model}, {len(modules)} blocks, {batch} images of {size} px, {options.dtype}, on {where(device)}")
    print(f"error against float64 (relative L2); allowed: {parity.FACTOR:g} x eager's + {parity.ATOL[dtype]:g}")
    print(f"\n{'block':<14} {'worst tensor':<26} {'fused':>9} {'eager':>9} {'ratio':>6} {'allowed':>9}")
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    started = time.monotonic()
    for name, module in modules.items():
        if not gpu and time.monotonic() - started > options.budget:
            skipped[name] = "the time budget was used up"
            continue
        with blocks.fastmbconv.backend("triton"):
            reason = blocks.reason_of(module, inputs[name].to(dtype))
        if reason is not None:
            skipped[name] = reason
            continue
        found = compare(name, module, inputs[name], dtype)
        rows += found
        worst = max(found, key=lambda row: (not row.passed, row.excess))
        verdict = "" if worst.passed else "  BROKEN"
        figures = f"{worst.fused:9.2e} {worst.eager:9.2e} {worst.ratio:6.2f} {worst.limit:9.2e}"
        print(f"{name:<14} {worst.tensor:<26} {figures}{verdict}", flush=True)
    return summary(rows, skipped, len(modules))


def summary(rows: list[Row], skipped: dict[str, str], total: int) -> int:
    """Print the verdict; the exit code."""
    checked = len({row.block for row in rows})
    broken = [row for row in rows if not row.passed]
    print(f"\n{checked} of {total} blocks checked, {len(rows)} tensors, {len(broken)} outside the rule")
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        print(f"not checked, {reason}: {', '.join(names)}")
    for row in broken:
        print(f"BROKEN {row.block} {row.tensor}: {row.fused:.2e}, allowed {row.limit:.2e}")
    closer = sum(row.fused <= row.eager for row in rows)
    if rows:
        ratios = sorted(row.ratio for row in rows)
        print(f"ratio of the errors, fused to eager: median {ratios[len(ratios) // 2]:.2f}, largest {ratios[-1]:.2f}")
        print(f"fused is at least as close to float64 as eager in {closer} of {len(rows)} tensors")
    if not checked:
        raise CommandError("no block could be checked")
    return 1 if broken else 0


def compare(name: str, module: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Row]:
    """Run one block in float64, in eager and fused, forward and backward, and compare every tensor."""
    import torch

    from fastmbconv import parity

    truth = tensors_of(module, x, torch.float64, "eager")
    eager = tensors_of(module, x, dtype, "eager")
    fused = tensors_of(module, x, dtype, "triton")
    rows = []
    for tensor, true in truth.items():
        theirs = parity.relative_error(eager[tensor], true)
        ours = parity.relative_error(fused[tensor], true)
        rows.append(Row(name, tensor, ours, theirs, parity.limit(theirs, dtype)))
    return rows


def tensors_of(module: nn.Module, x: Tensor, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """The block's output, the gradient of its input and parameters, and its running statistics, after one step."""
    import torch

    import fastmbconv

    block = copy.deepcopy(module)
    if dtype == torch.float64:
        block = block.double()
    model = fastmbconv.fuse(torch.nn.Sequential(block))
    x = x.to(dtype, copy=True).requires_grad_()
    half = dtype in (torch.float16, torch.bfloat16)
    with fastmbconv.backend(backend), torch.autocast(x.device.type, dtype=dtype if half else None, enabled=half):
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
    import torch

    for module in model.modules():
        if type(module).__name__ in ("Dropout", "DropPath", "StochasticDepth"):
            module.eval()
        if isinstance(module, torch.nn.BatchNorm2d) and module.affine:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)


def where(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, interpreted"
