"""Floors of a block's training step by bytes, by instruction issue and by tensor cores: a model, not a measurement.

    python -m benchmarks.roofline [--gpu h200 h100 a100] [--model b0 b4] [--simulated FILE ...]
                                  [--write benchmarks/ROOFLINE.md]

Bytes are what the launchers state (benchmarks/traffic.py), FLOPs those of the matrix products, instructions the counts
below times the elements of a launch. A launch takes the longest of the three, a block the sum of its launches; eager's
floor is its bytes alone. No launch cost, no idle lanes, no cache between two launches. Beside the floors stand times
that `benchmarks.simulate --json FILE` has written: simulated, not measured either, with what the floors leave out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

if __name__ == "__main__":  # as in benchmarks/traffic.py
    os.environ.pop("TRITON_INTERPRET", None)

from benchmarks.registry import BATCHES
from benchmarks.simulator.assumed import count_flops
from benchmarks.traffic import DTYPE, Row, moved, rows_of
from fastmbconv.kernels.pointwise import fetches_weight_often
from fastmbconv.kernels.traffic import Launch

TILE = 64  # columns of a matrix product's tile: its other operand is loaded again for every such tile


@dataclass(frozen=True)
class Gpu:
    """Ceilings per second: bytes, FLOPs of bf16 matrix products, instructions of a thread."""

    name: str
    bandwidth: float
    tensor: float
    issue: float
    source: str


MEASURED = "copy and matrix product measured elsewhere (no result file here), 1.83 GHz"
GPUS = {
    "h200": Gpu("H200", 4.3e12, 780e12, 132 * 128 * 1.83e9, MEASURED),
    "h100": Gpu("H100", 3.0e12, 798e12, 132 * 128 * 1.83e9, MEASURED),
    "a100": Gpu("A100 80 GB", 2.0e12, 312e12, 108 * 128 * 1.41e9, "data sheet: peaks that no copy reaches"),
}

# Issued instructions per element, loops in sm_90 machine code of the kernels in bf16 (benchmarks/static.py).
# Depthwise by (kernel size, stride): forward per output, backward per input.
WALK_FORWARD = {(3, 1): 28, (5, 1): 47, (3, 2): 56, (5, 2): 77}
WALK_BACKWARD = {(3, 1): 49, (5, 1): 94, (3, 2): 25, (5, 2): 36}
POOL, OUTPUT, REDUCE = 16, 10, 8.5  # per element read
# 1x1 convolution: per input and tile of outputs, or per activated input, by whether the weight is resident; per output.
LOAD_PLAIN, LOAD_ACTIVATED, STORE_PLAIN, STORE_MOMENTS = 2, {True: 8, False: 17}, 8, 12
# Behind the projection, per element of u2, by (data gradient or sums, weight resident or da3 read).
PROJECT = {(False, True): 22, (True, True): 32, (False, False): 27, (True, False): 27}
AFFINE = 13  # per element of du
EXPAND = {False: 13, True: 19}  # per element of dv1, by whether in slices


@dataclass(frozen=True)
class Work:
    """What a launch asks of each ceiling."""

    size: float = 0
    flops: float = 0
    instructions: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.size + other.size, self.flops + other.flops, self.instructions + other.instructions)

    def seconds(self, gpu: Gpu) -> tuple[float, float, float]:
        return self.size / gpu.bandwidth, self.instructions / gpu.issue, self.flops / gpu.tensor


def work(launch: Launch) -> Work:
    """Of one launch; kernels of vectors and weights alone count as bytes."""
    size = moved(launch)
    shapes, out = [t.shape for t in launch.reads], launch.writes[0].shape
    first = prod(shapes[0])
    if launch.kernel == "depthwise_fwd":
        return Work(size, 0, prod(out) * WALK_FORWARD[_walk(shapes[1], shapes[0], out)])
    if launch.kernel == "depthwise_bwd":
        return Work(size, 0, prod(out) * WALK_BACKWARD[_walk(shapes[2], out, shapes[0])])
    if launch.kernel in ("pool", "bn_act_fwd", "bn_act_bwd_reduce"):
        return Work(size, 0, first * {"pool": POOL, "bn_act_fwd": OUTPUT}.get(launch.kernel, REDUCE))
    if launch.kernel == "pointwise":
        channels = shapes[1][0]
        activated = (4, shapes[0][3]) in shapes
        resident = not fetches_weight_often(
            shapes[0][3], 2 * activated + ((shapes[0][0], shapes[0][3]) in shapes), DTYPE
        )
        load = LOAD_ACTIVATED[resident] if activated else LOAD_PLAIN * _tiles(channels)
        outputs = first // shapes[0][3] * channels
        moments = len(launch.writes) == 2 or len(out) == 3  # [P, 3, O]: nothing but moments
        store = STORE_MOMENTS if moments else STORE_PLAIN
        return Work(size, 2 * first * channels, first * load + outputs * store)
    if launch.kernel in ("project_bwd_sums", "project_bwd_data"):
        inputs, data = max(shapes, key=prod), launch.kernel == "project_bwd_data"  # u2
        resident = shapes[1][2:] in ((), (1, 1))  # du3 and the weight in place of da3
        products = (2 if data else 1) * 2 * first * inputs[3] if resident else 0
        return Work(size, products, prod(inputs) * PROJECT[data, resident])
    if launch.kernel == "bn_act_bwd":
        return Work(size, 0, first * AFFINE)
    if launch.kernel == "mm":
        return Work(size, count_flops(launch))
    if launch.kernel == "expand_pass":
        return Work(size, 3 * 2 * first * out[3], first * EXPAND[out[3] > 32])
    return Work(size)


def _tiles(columns: int) -> int:
    return -(-columns // TILE)


def _walk(weight: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[int, int]:
    return weight[-1], 1 if inputs[1] == outputs[1] else 2


@dataclass(frozen=True)
class Floor:
    """Seconds of blocks on one GPU: each ceiling's alone, eager's by bytes, and the sum of each launch's longest."""

    eager: float
    size: float
    issue: float
    tensor: float
    bound: float

    @classmethod
    def of(cls, row: Row, gpu: Gpu) -> Floor:
        times = [work(launch).seconds(gpu) for phase, launch in row.launches if phase != "inference"]
        eager = row.eager.total * row.shape.elements * DTYPE.itemsize / gpu.bandwidth
        return cls(eager, *map(sum, zip(*times, strict=True)), bound=sum(map(max, times)))

    def __mul__(self, blocks: int) -> Floor:
        return Floor(*(blocks * t for t in (self.eager, self.size, self.issue, self.tensor, self.bound)))

    def __add__(self, other: Floor) -> Floor:
        mine, theirs = ((f.eager, f.size, f.issue, f.tensor, f.bound) for f in (self, other))
        return Floor(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def cells(self) -> list[str]:
        times = (self.eager, self.size, self.issue, self.tensor, self.bound)
        return [*(f"{t * 1e6:.0f}" for t in times), f"{self.eager / self.bound:.2f}x"]


HEAD = ["block", "x", "eager", "bytes", "issue", "tensor", "floor", "gain", "simulated", "over its floor"]
Simulated = dict[tuple[str, str], float]  # microseconds of a training step, by GPU and block


def read_simulated(files: Iterable[Path]) -> Simulated:
    """What `benchmarks.simulate --json` wrote, without inference; later files replace blocks of earlier ones."""
    found: Simulated = {}
    for file in files:
        mine: defaultdict[tuple[str, str], float] = defaultdict(float)
        for row in json.loads(file.read_text())["rows"]:
            if row["phase"] != "inference":
                mine[row["gpu"], row["shape"]] += row["us"]
        found |= mine
    return found


def table(rows: list[Row], gpu: Gpu, simulated: Simulated) -> list[list[str]]:
    """Microseconds of each block, forward and backward, and of all blocks of the model."""
    floors = [Floor.of(row, gpu) for row in rows]
    total = sum((f * row.shape.count for row, f in zip(rows, floors, strict=True)), Floor(0, 0, 0, 0, 0))
    times = [simulated.get((gpu.name, row.shape.name)) for row in rows]
    lines = [
        [row.shape.name, str(row.shape.count), *f.cells, *_compare(us, f.bound)]
        for row, f, us in zip(rows, floors, times, strict=True)
    ]
    step = sum(row.shape.count * us for row, us in zip(rows, times, strict=True) if us) if all(times) else None
    first = rows[0].shape
    rates = f"{first.batch / total.eager:.0f} -> {first.batch / total.bound:.0f} images/s"
    blocks = sum(row.shape.count for row in rows)
    ours = [f"{first.model}: all blocks, {rates}", str(blocks), *total.cells, *_compare(step, total.bound)]
    return [HEAD, *lines, ours]


def _compare(us: float | None, bound: float) -> list[str]:
    return ["-", "-"] if us is None else [f"{us:.0f}", f"{us / bound / 1e6:.2f}x"]


def text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    )


def markdown(rows: list[list[str]]) -> str:
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" + "|--:" * (len(HEAD) - 1) + "|", *lines])


INTRODUCTION = """# Floors of the training step, and simulated times

**Models, not measurements.** Written by `python -m benchmarks.roofline --simulated FILE ... --write FILE`,
FILEs by `python -m benchmarks.simulate --json`; how: `benchmarks/roofline.py`, `benchmarks/simulator/machine.py`.

Microseconds of one block, forward and backward, bf16. *eager*: the bytes of its activations; *bytes*, *issue*,
*tensor*: what each ceiling alone asks of the fused block; *floor*: every launch at the slowest of its three; *gain*:
eager's floor over fused's. It is the floor of these kernels at these tile sizes, not of every design: where *issue* is
the largest, fewer instructions help and fewer bytes don't. Instructions per element are static counts for sm_90, used
for sm_80 as well. Those of the matrix products grow with their tiles of 64 columns. *simulated*: read off machine code
with latency, occupancy, spills and the gaps between kernels, library products as assumed; "-" where there is none.
"""


def page(tables: list[tuple[str, Gpu, list[list[str]]]]) -> str:
    """The whole of ROOFLINE.md."""
    gpus = {gpu.name: gpu for _, gpu, _ in tables}.values()
    ceilings = ["| GPU | TB/s | TFLOP/s bf16 | T instructions/s | ceilings from |", "|---|--:|--:|--:|---|"]
    for g in gpus:
        figures = f"{g.bandwidth / 1e12:.1f} | {g.tensor / 1e12:.0f} | {g.issue / 1e12:.1f}"
        ceilings.append(f"| {g.name} | {figures} | {g.source} |")
    sections = [f"## {model.upper()} on {gpu.name}\n\n{markdown(rows)}" for model, gpu, rows in tables]
    return "\n\n".join([INTRODUCTION.rstrip(), "\n".join(ceilings), *sections])


def main() -> int:
    parser = argparse.ArgumentParser(description="floors of a training step by bytes, issue and tensor cores (a model)")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--model", nargs="+", default=list(BATCHES), help="b0 .. b7, lite0 .. lite4")
    parser.add_argument("--simulated", nargs="+", type=Path, default=[], metavar="FILE", help="from simulate --json")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there as well")
    args = parser.parse_args()
    simulated = read_simulated(args.simulated)
    counted = {model: list(rows_of([model])) for model in args.model}
    tables = [
        (model, GPUS[gpu], table(rows, GPUS[gpu], simulated)) for model, rows in counted.items() for gpu in args.gpu
    ]
    print("microseconds by a model, not a measurement")
    for _, gpu, rows in tables:
        print(f"\n{gpu.name} ({gpu.source})\n{text(rows)}")
    if args.write:
        args.write.write_text(page(tables) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
