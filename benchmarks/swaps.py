"""The README's table of models: how many blocks of each library's model are fused, and how exact they are.

    python -m benchmarks.swaps [--models timm:efficientnet_b0 ...] [--dtype float32] [--write README.md]

Each model gets random weights and BatchNorms as after training, and IMAGES images of SIDE pixels. Each block that is
fused gets the input that it has inside the model (of blocks that agree in all shapes and settings only the first), and
runs three times: by the library's own code in float64, by the library's own code in `--dtype`, and through the kernels
(interpreted on a CPU), in a training step and in eval mode without gradients. Exit code 1 if a tensor breaks the
parity rule: error of the kernels <= 2 x the library's own error + a small constant per dtype.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from textwrap import fill

import torch
from torch import Tensor, nn

import fastmbconv
from fastmbconv import dispatch, parity
from fastmbconv.block import DenseBlock
from fastmbconv.cli import blocks, errors, models
from fastmbconv.swap.fused import fusible

MODELS = (
    "timm:efficientnet_b0",
    "timm:tf_efficientnet_b0",
    "timm:tf_efficientnet_lite0",
    "timm:tf_efficientnetv2_s",
    "timm:mobilenetv2_100",
    "timm:mobilenetv3_large_100",
    "timm:mobilenetv4_conv_small",
    "torchvision:efficientnet_b0",
    "torchvision:efficientnet_v2_s",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_large",
    "lukemelas:efficientnet-b0",
    "transformers:efficientnet-b0",
    "smp:efficientnet-b0",
)
LIBRARIES = {"lukemelas": "efficientnet_pytorch", "smp": "segmentation_models_pytorch"}
DTYPES = ("float32", "float16", "bfloat16")
# In half precision a value may round across a kink of ReLU6 in one path and not in the other, and takes a gradient with
# it: where a last stage has 1 pixel only many images give both paths the same share of such values.
IMAGES = {torch.float32: 8, torch.float16: 32, torch.bfloat16: 32}
SIDE = 32
BEGIN, END = "<!-- swaps: written by `python -m benchmarks.swaps --write README.md` -->", "<!-- /swaps -->"
HEADER = (
    "library",
    "model",
    "fused, eval",
    "fused, training",
    "error ratio, eval",
    "error ratio, training",
    "within the rule",
)
ROW = re.compile(
    r"\| (\S+) \| (.+?) \| (\d+) / (\d+) \| (\d+) / \d+ \| (\S+) \((\S+)\) \| (\S+) \((\S+)\) \| (\d+) / (\d+) \|"
)


@dataclass(frozen=True)
class Largest:
    """The largest error ratio of one model, and the kernels' error in that tensor."""

    ratio: float
    error: float

    @classmethod
    def of(cls, rows: Iterable[errors.Row]) -> Largest:
        row = max(rows, key=lambda row: row.ratio)
        return cls(row.ratio, row.fused)

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.error:.0e})"


@dataclass(frozen=True)
class Line:
    """One model in the table. `tensors` were compared, `passed` of them keep the parity rule."""

    library: str
    model: str
    fused_evaluation: int
    all: int
    fused_training: int
    evaluation: Largest
    training: Largest
    passed: int
    tensors: int

    def __str__(self) -> str:
        cells = (
            self.library,
            self.model,
            f"{self.fused_evaluation} / {self.all}",
            f"{self.fused_training} / {self.all}",
            str(self.evaluation),
            str(self.training),
            f"{self.passed} / {self.tensors}",
        )
        return f"| {' | '.join(cells)} |"


def names(model: str) -> tuple[str, str]:
    """The library's and the model's name for a reader, from the command line's LIBRARY:MODEL."""
    library, _, name = model.partition(":")
    return LIBRARIES.get(library, library), f"Unet, {name}" if library == "smp" else name


def counted(model: str) -> tuple[int, int, int]:
    """(blocks fused in eval mode, all blocks, blocks fused in training); on meta tensors, nothing is computed."""
    with torch.device("meta"):
        module = fastmbconv.fuse(models.load(model).module)
    evaluation, training = (fastmbconv.explain(module.train(mode)) for mode in (False, True))
    return evaluation.fused, len(evaluation), training.fused


def measured(model: str, dtype: torch.dtype, device: torch.device) -> Line:
    """The counts and errors of one model."""
    torch.manual_seed(0)
    module = models.load(model).module.to(device).train()
    errors.settle(module)
    x = torch.randn(IMAGES[dtype], 3, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)
    rows: dict[errors.Mode, list[errors.Row]] = {mode: [] for mode in errors.MODES}
    for name, block, image in distinct(module, x):
        for mode in errors.MODES:
            rows[mode] += errors.compare(name, block, image, dtype, mode)
    for row in (*rows["training"], *rows["eval"]):
        if not row.passed:
            print(f"BROKEN {model} {row.block} {row.tensor}: {row.fused:.2e}, allowed {row.limit:.2e}", file=sys.stderr)
    evaluation, training = Largest.of(rows["eval"]), Largest.of(rows["training"])
    found = [row.passed for mode in errors.MODES for row in rows[mode]]
    return Line(*names(model), *counted(model), evaluation, training, sum(found), len(found))


def distinct(model: nn.Module, x: Tensor) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The fusible blocks with their inputs, one of those that agree in all shapes and settings."""
    inputs, seen = blocks.inputs_of(model, x), set()
    for name, module in blocks.blocks_of(model).items():
        block, image = fusible(module), inputs[name]
        assert block is not None and not isinstance(block, str)
        padding = block.padding if isinstance(block, DenseBlock) else (block.padding, block.depthwise_weight.shape)
        weights = tuple((key, tensor.shape) for key, tensor in module.state_dict().items())
        key = (type(module), weights, image.shape, block.stride, padding, block.activations, block.residual)
        if key not in seen:
            seen.add(key)
            yield name, module, image


def table(lines: Iterable[Line], dtype: torch.dtype, device: torch.device) -> str:
    """Markdown: the table, what its figures mean, and what they were found with."""
    libraries = sorted({LIBRARIES.get(name.partition(":")[0], name.partition(":")[0]) for name in MODELS})
    packages = ", ".join(f"{name} {version(name.replace('_', '-'))}" for name in ("torch", "triton", *libraries))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, kernels interpreted"
    text = f"""\
A fused block counts if its calls in that mode take the kernels where they run: transformers drops single elements in
training, and while that rate is above 0 its blocks with a residual run eager. Error ratio: the kernels' error over that
of the library's own block in the same dtype, both against float64 (relative L2), in that output, gradient or running
statistic where it is largest; the kernels' error there stands in brackets. The rule allows {parity.FACTOR:g} x the
library's own error plus {parity.ATOL[dtype]:.0e}: a ratio above {parity.FACTOR:g} is of an error that this covers.
The last column counts the tensors that keep the rule; of blocks that agree in all shapes and settings one was run, with
dropout off. Random weights, {IMAGES[dtype]} images of {SIDE} pixels, {str(dtype).removeprefix("torch.")}, on {where};
{packages}."""
    head = (f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}")
    return "\n".join([*head, *map(str, lines), "", fill(text, 120, break_on_hyphens=False)])


def parsed(text: str) -> list[Line]:
    """The lines of a table that `table` wrote."""
    found = []
    for library, model, evaluated, total, trained, *figures, passed, tensors in ROW.findall(text):
        evaluation, training = (Largest(float(figures[i]), float(figures[i + 1])) for i in (0, 2))
        counts = (int(evaluated), int(total), int(trained))
        found.append(Line(library, model, *counts, evaluation, training, int(passed), int(tensors)))
    return found


def section(text: str) -> str:
    """What stands between the markers; ValueError unless each is there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the file has not exactly one {BEGIN} and one {END}")
    return text.partition(BEGIN)[2].partition(END)[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="LIBRARY:MODEL")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this file")
    options = parser.parse_args(arguments)
    before = "" if options.write is None else section(options.write.read_text())
    gpu = torch.cuda.is_available()
    if not gpu:
        dispatch.interpret()
    device, dtype = torch.device("cuda" if gpu else "cpu"), getattr(torch, options.dtype)
    lines = []
    workers = 1 if gpu else len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for line in pool.map(partial(measured, dtype=dtype, device=device), options.models):
            lines.append(line)
            print(line, file=sys.stderr, flush=True)
    text = table(lines, dtype, device)
    print(text)
    if options.write is not None:
        whole = options.write.read_text()
        options.write.write_text(whole.replace(f"{BEGIN}{before}{END}", f"{BEGIN}\n{text}\n{END}"))
    return 0 if all(line.passed == line.tensors for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
