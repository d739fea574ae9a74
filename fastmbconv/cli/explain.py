"""`fastmbconv explain MODEL`: which blocks of a model the kernels take, why not the others, and what it saves.

The saving is a count of the bytes that each block's tensors move to and from memory in a training step (with
--inference in a forward), eager and fused: no GPU is needed, nothing is computed, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from fastmbconv.cli.extras import CommandError
from fastmbconv.cli.models import HELP, load

DTYPES = ("bfloat16", "float16", "float32")
SMALLEST = 32


def add_to(commands: Any) -> None:
    parser = commands.add_parser("explain", help="which blocks of a model run fused, why, and what it saves")
    parser.description = __doc__
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("--resolution", type=int, help="side of the images in pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="default: %(default)s")
    parser.add_argument("--inference", action="store_true", help="a forward in eval mode instead of a training step")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name, low in (("resolution", SMALLEST), ("batch", 1)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise CommandError(f"--{name} is {value}: allowed are {low} and more")
    import torch

    import fastmbconv
    from fastmbconv.swap.table import table

    with torch.device("meta"):
        module, resolution = load(options.model)
    side = options.resolution or resolution
    model = fastmbconv.fuse(module.to(getattr(torch, options.dtype)).train(not options.inference))
    try:
        explanation = fastmbconv.explain(model, (options.batch, 3, side, side))
    except ValueError as error:
        raise CommandError(f"MODEL is {options.model!r}: {error}") from error
    print(f"{options.model}: {options.batch} x 3 x {side} x {side}, {options.dtype}\n")
    print(table(explanation.rows, shutil.get_terminal_size((200, 0)).columns, explanation.ends))
    if not explanation.rows:
        return 0
    here = "" if torch.cuda.is_available() else "; on this machine, without a GPU, they run eager"
    print(f"{explanation.fused} of {len(explanation)} blocks fused{here}")
    return 0
