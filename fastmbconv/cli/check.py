"""`fastmbconv check`: the error of every block's output, gradients and statistics on this machine, next to eager's.

Each block gets the input that it has inside the model, for a training step and for a forward in eval mode without
gradients. Truth is the block in eager float64; eager and fused run in the same dtype (half precision under autocast),
and the parity rule says how far the fused one may be off: 2x eager's error plus a small constant per dtype.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from fastmbconv.cli.extras import CommandError
from fastmbconv.cli.models import HELP, load

if TYPE_CHECKING:
    from fastmbconv.cli.errors import Row

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
    from fastmbconv.cli import blocks, errors

    torch.manual_seed(0)
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, options.dtype)
    size, batch = options.size or (224 if gpu else 32), options.batch or 8
    model = load(options.model).module.to(device).train()
    errors.settle(model)
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
        found = [row for mode in errors.MODES for row in errors.compare(name, module, inputs[name], dtype, mode)]
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


def where(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, interpreted"
