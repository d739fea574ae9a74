"""What a block reads, writes and keeps in a training step and in inference, eager and fused; needs no GPU.

    python -m benchmarks.traffic [--model b0 b4] [--batch 128] [--launches] [--json report.json]

Figures are in passes: bytes over the bytes of E, the expanded tensor at the depthwise convolution's input, in bf16.
* fused: what every launcher states (kernels/traffic.py) while the block runs under autocast on CPU tensors, its
  launches caught. "images" are the activations; "rest" is partial sums, fp32 weights and vectors.
* eager: the count of fastmbconv/traffic.py: activations alone, while fused's sum has the rest too.
* inference: one forward without gradients; "folded" is eager with its BatchNorms folded into the convolutions.
* lean: the same as fused, with `memory="lean"`, which keeps no expanded tensor before the depthwise convolution.
* Fused-MBConv's blocks have a table of their own, in passes of u, the dense convolution's output, which a library
  computes: its bytes are counted, those of what follows are stated.
* KernelBench's problems have a table too, in bytes and in their own float32: the count of fastmbconv/traffic.py for a
  step and for an inference, summed over the blocks that `fuse` finds in each; "-" where it finds none.
* saved: bytes that autograd keeps for backward, from its own hooks, without parameters and buffers; a storage once.
It is a count, not a measurement: each launch takes its tensors from memory once, and no cache spans two launches.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # tile sizes, and with them partial sums, are a GPU's and not the interpreter's
    os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor, nn

import fastmbconv
from benchmarks.kernelbench import PROBLEMS, Problem
from benchmarks.launches import caught
from benchmarks.registry import DENSE, Shape, shapes
from benchmarks.subjects import FusedMBConv
from fastmbconv.dense import dense_mbconv
from fastmbconv.kernels.traffic import Launch, recorded
from fastmbconv.traffic import Sizes, Traffic, count, count_dense

DTYPE = torch.bfloat16
# Images per GPU in training; `registry.BATCHES` for the models that are timed.
BATCHES = {"b0": 128, "b1": 128, "b2": 128, "b3": 64, "b4": 64, "b5": 32, "b6": 32, "b7": 32}
LITE = {"lite0": 128, "lite4": 64}


@dataclass(frozen=True)
class Side:
    """Passes of E in one training step of one block, and what it keeps in between."""

    forward: float
    backward: float
    saved: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Inference:
    """Passes of E in one forward without gradients; `rest` is the part of fused that is not activations."""

    eager: float
    folded: float
    fused: float
    rest: float
    modelled: float


@dataclass(frozen=True)
class Row:
    """One block in passes: `rest` is the part of fused that is not activations, `modelled` what is expected of them.

    `lean` is fused with memory="lean".
    """

    shape: Shape
    eager: Side
    fused: Side
    rest: float
    modelled: float
    lean: Side
    inference: Inference
    launches: tuple[tuple[str, Launch], ...]


def moved(launch: Launch, *, images: bool | None = None) -> int:
    """Bytes of a launch; `images` chooses activations or what is none."""
    tensors = (*launch.reads, *launch.writes)
    return sum(t.size for t in tensors if images is None or (t.dtype == DTYPE and len(t.shape) == 4) is images)


@contextmanager
def kept(module: nn.Module) -> Iterator[dict[int, int]]:
    """Storages that autograd saves inside the block, and their bytes; the module's own tensors are left out."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def make_input(shape: Shape, device: str) -> Tensor:
    size = (shape.batch, shape.in_channels, shape.size, shape.size)
    return torch.empty(size, dtype=DTYPE, device=device, memory_format=torch.channels_last).requires_grad_()


def fused_launches(shape: Shape, memory: str = "fast") -> tuple[list[Launch], list[Launch], list[Launch], int]:
    """Launches of forward, backward and inference, and the bytes kept; activations are allocated, never touched."""
    with torch.device("meta"):
        module = shape.block()
    module.to_empty(device="cpu")
    fastmbconv.fuse(module, memory=memory)
    x = make_input(shape, "cpu")
    with caught(lambda *_: None):
        with kept(module) as found, recorded() as forward, torch.autocast("cpu", DTYPE):
            y = module(x)
        with recorded() as backward:
            y.backward(torch.empty_like(y))
        with recorded() as inference, torch.autocast("cpu", DTYPE), torch.no_grad():
            module.eval()(x)
    return forward, backward, inference, sum(found.values())


def eager_saved(shape: Shape) -> int:
    """Bytes that the eager block keeps, on tensors without data."""
    with torch.device("meta"):
        module = shape.block().to(DTYPE)
    with kept(module) as found:
        module.forward_eager(make_input(shape, "meta"))
    return sum(found.values())


def modelled(shape: Shape) -> Traffic:
    """The count of fastmbconv/traffic.py, in elements."""
    with torch.device("meta"):
        block = shape.block().describe()
    return count(Sizes.of(block, (shape.batch, shape.in_channels, shape.size, shape.size)))


def row(shape: Shape) -> Row:
    forward, backward, inference, saved = fused_launches(shape)
    lean_forward, lean_backward, _, lean_saved = fused_launches(shape, "lean")
    model, e = modelled(shape), shape.elements
    per_pass = e * DTYPE.itemsize

    def passes(launches: list[Launch], images: bool | None = None) -> float:
        return sum(moved(launch, images=images) for launch in launches) / per_pass

    return Row(
        shape,
        Side(
            model.eager_training_forward / e,
            (model.eager_training - model.eager_training_forward) / e,
            eager_saved(shape) / per_pass,
        ),
        Side(passes(forward), passes(backward), saved / per_pass),
        passes([*forward, *backward], images=False),
        model.fused_training / e,
        Side(passes(lean_forward), passes(lean_backward), lean_saved / per_pass),
        Inference(
            model.eager_inference / e,
            model.eager_inference_folded / e,
            passes(inference),
            passes(inference, images=False),
            model.fused_inference / e,
        ),
        tuple(
            (phase, launch)
            for phase, launches in (("forward", forward), ("backward", backward), ("inference", inference))
            for launch in launches
        ),
    )


def table(rows: list[Row]) -> str:
    """A line per distinct block, and each model's sum weighted by its blocks' bytes."""
    head = f"{'block':42} {'x':>2}  {'eager fwd':>9} {'bwd':>5} {'sum':>5} {'saved':>5}"
    lines = [f"{head}  {'fused fwd':>9} {'bwd':>5} {'sum':>5} {'rest':>5} {'saved':>5}  {'less':>5}"]
    lines[0] += f"  | {'lean':>5} {'saved':>5}  | {'inference':>9} {'folded':>6} {'fused':>5} {'rest':>5}  {'less':>5}"
    for model in dict.fromkeys(r.shape.model for r in rows):
        mine = [r for r in rows if r.shape.model == model]
        lines += [_line(r.shape.name, r.shape.count, lambda f, r=r: f(r)) for r in mine]
        weights = [r.shape.elements * r.shape.count for r in mine]

        def mean(figure: Callable[[Row], float], mine: list[Row] = mine, weights: list[int] = weights) -> float:
            return sum(figure(r) * w for r, w in zip(mine, weights, strict=True)) / sum(weights)

        lines.append(_line(f"{model}: all blocks", sum(r.shape.count for r in mine), mean))
    return "\n".join(lines)


def _line(name: str, blocks: int, of: Callable[[Callable[[Row], float]], float]) -> str:
    eager, fused = of(lambda r: r.eager.total), of(lambda r: r.fused.total)
    theirs = f"{of(lambda r: r.eager.forward):9.2f} {of(lambda r: r.eager.backward):5.2f} {eager:5.2f}"
    ours = f"{of(lambda r: r.fused.forward):9.2f} {of(lambda r: r.fused.backward):5.2f} {fused:5.2f}"
    kept = f"{of(lambda r: r.rest):5.2f} {of(lambda r: r.fused.saved):5.2f}"
    folded, infers = of(lambda r: r.inference.folded), of(lambda r: r.inference.fused)
    inference = (
        f"{of(lambda r: r.inference.eager):9.2f} {folded:6.2f} {infers:5.2f} {of(lambda r: r.inference.rest):5.2f}"
    )
    training = f"{theirs} {of(lambda r: r.eager.saved):5.2f}  {ours} {kept}  {eager / fused:4.2f}x"
    lean = f"{of(lambda r: r.lean.total):5.2f} {of(lambda r: r.lean.saved):5.2f}"
    return f"{name:42} {blocks:2}  {training}  | {lean}  | {inference}  {folded / infers:4.2f}x"


@dataclass(frozen=True)
class DenseRow:
    """One Fused-MBConv block, passes of u in a training step and in inference; `rest` is not in the fused figures."""

    shape: Shape
    count: Traffic
    elements: int
    training: float
    inference: float
    rest: float


class _Allocated(nn.Module):
    """A convolution that computes nothing."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.to("meta"))
        u = torch.empty(y.shape, dtype=DTYPE, memory_format=torch.channels_last)
        return u.requires_grad_(torch.is_grad_enabled())


def dense_row(shape: Shape) -> DenseRow:
    """What launchers state behind the convolution, and the count of what that moves itself."""
    module = FusedMBConv(shape.in_channels, shape.expand_ratio, shape.out_channels, shape.stride)
    conv = _Allocated(nn.Conv2d(*module.conv.weight.shape[1::-1], 3, shape.stride, 1, bias=False, device="meta"))
    x = make_input(shape, "cpu")
    with caught(lambda *_: None), torch.autocast("cpu", DTYPE):
        with recorded() as training:
            y = dense_mbconv(x, replace(module.describe(), conv=conv))
            y.backward(torch.empty_like(y))
        with recorded() as inference, torch.no_grad():
            dense_mbconv(x, replace(module.eval().describe(), conv=conv))
    u, traffic = count_dense(module.describe(), tuple(x.shape))
    forward, backward = x.numel() + u, 2 * (x.numel() + u) + module.residual * 3 * x.numel()

    def passes(launches: list[Launch], images: bool) -> float:
        return sum(moved(launch, images=images) for launch in launches) / DTYPE.itemsize / u

    return DenseRow(
        shape,
        traffic,
        u,
        passes(training, True) + (forward + backward) / u,
        passes(inference, True) + forward / u,
        passes(inference, False),
    )


def dense_table(rows: list[DenseRow]) -> str:
    lines = [
        f"{'Fused-MBConv':42} {'x':>2}  {'eager':>6} {'fused':>6}"
        f"  | {'inference':>9} {'folded':>6} {'fused':>6} {'rest':>6}"
    ]
    for r in rows:
        eager, theirs, folded = (
            figure / r.elements
            for figure in (r.count.eager_training, r.count.eager_inference, r.count.eager_inference_folded)
        )
        name = f"{r.shape.name:42} {r.shape.count:2}"
        lines.append(
            f"{name}  {eager:6.2f} {r.training:6.2f}  | {theirs:9.2f} {folded:6.2f} {r.inference:6.2f} {r.rest:6.4f}"
        )
    return "\n".join(lines)


def kernelbench_bytes(problem: Problem, training: bool) -> tuple[int, int, int]:
    """(blocks that are fused, their bytes by eager, their bytes fused) in a step or in an inference."""
    fused = [r.saving for r in problem.explained(training) if r.path == "fused" and r.saving is not None]
    moved_by = [saving.bytes for saving in fused if saving.bytes is not None]
    return len(fused), sum(eager for eager, _ in moved_by), sum(ours for _, ours in moved_by)


def kernelbench_table(problems: Iterable[Problem] = tuple(PROBLEMS.values())) -> str:
    """A line per problem, in GB; a count, no measurement."""
    lines = [
        f"{'KernelBench':42} {'fused':>7}  {'eager GB':>8} {'fused GB':>8} {'less':>6}"
        f"  | {'inference':>9} {'fused GB':>8} {'less':>6}"
    ]
    for problem in problems:
        (blocks, *step), (_, *inference) = (kernelbench_bytes(problem, training) for training in (True, False))
        name = f"{problem.number} {problem.name} n{problem.shape[0]} {problem.shape[2]}px"
        cells = [
            f"{eager / 1e9:{width}.2f} {ours / 1e9:8.2f} {eager / ours:5.2f}x"
            if ours
            else f"{'-':>{width}} {'-':>8} {'-':>6}"
            for width, (eager, ours) in ((8, step), (9, inference))
        ]
        lines.append(f"{name:42} {blocks:2} / {problem.blocks:2}  {cells[0]}  | {cells[1]}")
    return "\n".join(lines)


def standard(r: Row) -> bool:
    """The kind of block that the targets are about: stride 1, squeeze-and-excitation, residual, an expansion."""
    return r.shape.residual and r.shape.se and r.shape.expand_ratio != 1


def summary(rows: list[Row]) -> str:
    chosen = [r for r in rows if standard(r)]
    if not chosen:
        return ""
    figures = {
        "fused passes": [r.fused.total for r in chosen],
        "of them activations": [r.fused.total - r.rest for r in chosen],
        "saved": [r.fused.saved for r in chosen],
        "lean passes": [r.lean.total for r in chosen],
        "lean saved": [r.lean.saved for r in chosen],
        "inference": [r.inference.fused for r in chosen],
    }
    spans = "; ".join(f"{name} {min(v):.2f} / {median(v):.2f} / {max(v):.2f}" for name, v in figures.items())
    kind = "blocks with stride 1, expansion, squeeze-and-excitation, residual"
    return f"{len(chosen)} {kind}: min / median / max {spans}"


def launch_table(r: Row) -> str:
    per_pass = r.shape.elements * DTYPE.itemsize
    lines = [f"-- {r.shape.name}: passes of activations, of the rest"]
    for phase, launch in r.launches:
        images, rest = (moved(launch, images=which) / per_pass for which in (True, False))
        lines.append(f"{phase:9} {launch.kernel:20} {images:7.3f} {rest:7.4f}")
    return "\n".join(lines)


def as_json(r: Row) -> dict[str, Any]:
    launches = [
        {"phase": phase, "kernel": one.kernel, "images": moved(one, images=True), "rest": moved(one, images=False)}
        for phase, one in r.launches
    ]
    figures = {key: asdict(getattr(r, key)) for key in ("shape", "eager", "fused", "lean", "inference")}
    return {
        "name": r.shape.name,
        **figures,
        "standard": standard(r),
        "rest": r.rest,
        "modelled": r.modelled,
        "launches": launches,
    }


def rows_of(models: list[str], batch: int | None = None) -> Iterator[Row]:
    for model in models:
        yield from map(row, shapes(model, batch or {**BATCHES, **LITE}.get(model, 32)))


def main() -> int:
    parser = argparse.ArgumentParser(description="count what a block's training step moves and keeps, eager and fused")
    parser.add_argument("--model", nargs="+", default=[*BATCHES, *LITE], help="b0 .. b8, l2, lite0 .. lite4")
    parser.add_argument("--batch", type=int, help="images; default: each model's own")
    parser.add_argument("--launches", action="store_true", help="also every launch of every block")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    args = parser.parse_args()
    rows = list(rows_of(args.model, args.batch))
    if args.launches:
        print("\n".join(map(launch_table, rows)))
    print(f"{table(rows)}\n{summary(rows)}\n{dense_table(list(map(dense_row, DENSE)))}\n{kernelbench_table()}")
    if args.json:
        args.json.write_text(json.dumps([as_json(r) for r in rows], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
