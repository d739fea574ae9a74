"""Predict the time of every kernel of a model's blocks on a Hopper GPU that is not there: simulated, never measured.

    python -m benchmarks.simulate --model b0 --gpu h100 [--phase inference] [--block 56px] [--json FILE] [--total]

Each distinct kernel is compiled for sm_90 once (B0: 10 minutes of a core, then kept in $FASTMBCONV_SIMULATOR_CACHE or
the user's cache directory) and one multiprocessor runs its machine code: latency, occupancy, barriers and few programs
count, which bytes and instructions don't show. Needs a C compiler and no GPU. How it works, where its constants come
from, how near to published times it is and what it leaves out: benchmarks/simulator/machine.py.

Blocks alone, without stem, head and optimiser. Launches of torch's (matrix products, sums, copies) are not simulated:
their time is assumed from bytes and operations, and every table says so. A kernel's loops are described in
benchmarks/issue.py; `fits: no` marks one without, or whose loops are not found in its code: its figure is a guess.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # as in benchmarks/traffic.py
    os.environ.pop("TRITON_INTERPRET", None)

from benchmarks.registry import BATCHES, Shape, shapes
from benchmarks.simulator.core import NoCompiler, load_core
from benchmarks.simulator.kernels import PHASES, Compiled, Work, collect, compile_special
from benchmarks.simulator.machine import GPUS, WARM, Gpu, Time, assume, simulate
from benchmarks.static import MODELS, TINY
from benchmarks.traffic import DTYPE, modelled
from benchmarks.workers import Failed, spread
from fastmbconv import dispatch
from fastmbconv.block import Activation

SHARE_OF_EAGER = (0.60, 0.66)  # of its own byte floor, that eager training reaches on published figures (NOTES.md)
WORST = 8


@dataclass(frozen=True)
class Row:
    """One launch of a block and its time."""

    work: Work
    time: Time

    @property
    def us(self) -> float:
        """Of all the model's blocks of this kind."""
        return self.work.count * self.time.us

    @property
    def floor(self) -> float:
        return self.work.count * self.time.floor_us

    @property
    def name(self) -> str:
        return self.work.name.strip("_").removesuffix("_kernel")


def choose_shapes(model: str, batch: int | None, block: str, activation: Activation | None = None) -> list[Shape]:
    """A model's distinct blocks whose name has `block` in it, perhaps with another activation."""
    found = TINY if model == "tiny" else shapes(model, BATCHES.get(model, 32) if batch is None else batch)
    chosen = [shape for shape in found if block in shape.name]
    return chosen if activation is None else [replace(shape, activation=activation) for shape in chosen]


def compile_all(works: Iterable[Work], jobs: int, timeout: float) -> dict[str, Compiled]:
    """The machine code of every launch, by its key; raises for one that doesn't compile."""
    distinct = list({work.special.key: work.special for work in works if work.special}.values())
    for special, failed in zip(distinct, spread(_compile, distinct, jobs, timeout), strict=True):
        if isinstance(failed, Failed):
            raise RuntimeError(f"{special.kernel.__name__} of {special.shape} does not compile: {failed.reason}")
    return {special.key: compile_special(special) for special in distinct}


def _compile(special: object) -> None:
    compile_special(special)


def time_all(works: list[Work], compiled: dict[str, Compiled], gpu: Gpu, warm: int) -> list[Row]:
    """Every launch with its time; equal ones are simulated once."""
    done: dict[str, Time] = {}
    rows = []
    for work in works:
        if work.special is None:
            rows.append(Row(work, assume(work, gpu)))
            continue
        key = f"{work.special.key} {work.grid} {sorted(work.arguments.items(), key=str)} {sorted(work.tensors.items())}"
        if key not in done:
            done[key] = simulate(work, compiled[work.special.key], gpu, warm)
        rows.append(Row(work, replace(done[key], floor_us=work.stated / gpu.bandwidth * 1e6)))
    return rows


def tabulate_kernels(rows: list[Row]) -> str:
    """A line per kernel, all blocks of the model, the largest excess over the byte floor first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.name].append(row)
    total = sum(row.us for row in rows)
    lines = [
        "| kernel (simulated) | launches | us | share | byte floor us | ratio | GB/s | programs x warps "
        "| KB in flight | mostly bound by | fits |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for name, mine in sorted(groups.items(), key=lambda group: -sum(row.us - row.floor for row in group[1])):
        us, floor = sum(row.us for row in mine), sum(row.floor for row in mine)
        causes: Counter[str] = Counter()
        for row in mine:
            causes[row.time.bound.split(" (")[0]] += row.us
        assumed = mine[0].time.assumed
        cells = [
            name,
            f"{sum(row.work.count for row in mine)}",
            f"{us:.0f}",
            f"{us / total:.0%}",
            f"{floor:.0f}",
            f"{us / max(floor, 1e-9):.1f}",
            f"{sum(row.work.count * row.work.stated for row in mine) / us / 1e3:.0f}",
            "-" if assumed else _span(f"{row.time.resident} x {row.time.warps}" for row in mine),
            "-" if assumed else f"{sum(row.us * row.time.in_flight_kb for row in mine) / us:.0f}",
            ", ".join(f"{cause} {part / us:.0%}" for cause, part in causes.most_common(2)),
            "assumed" if assumed else "yes" if all(row.time.fits for row in mine) else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _span(occupancies: Iterable[str]) -> str:
    """The most and the least of what one multiprocessor holds."""
    found = sorted(set(occupancies), key=lambda text: [int(n) for n in text.split(" x ")])
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def tabulate_worst(rows: list[Row]) -> str:
    """The launches that lose most against their byte floor, and why."""
    lines = ["| kernel, block (simulated) | x | us | byte floor us | diagnosis |", "|---|--:|--:|--:|---|"]
    for row in sorted(rows, key=lambda row: row.floor - row.us)[:WORST]:
        lines.append(
            f"| {row.name}, {row.work.shape} | {row.work.count} | {row.time.us:.0f} | {row.time.floor_us:.0f} "
            f"| {_diagnose(row.time)} |"
        )
    return "\n".join(lines)


def _diagnose(time: Time) -> str:
    if time.assumed:
        return time.bound
    waits = sorted(time.waits.items(), key=lambda item: -item[1])[:3]
    parts = [
        time.bound,
        f"{time.programs} programs, {time.resident} x {time.warps} warps a multiprocessor, {time.registers} registers",
        ", ".join(f"{name} {share:.0%}" for name, share in time.busy.items() if share >= 0.1),
        "waits: " + ", ".join(f"{name} {share:.0%}" for name, share in waits),
        f"{time.in_flight_kb:.0f} KB in flight",
    ]
    if time.spilled_kb:
        parts.append(f"{time.spilled_kb:.0f} KB spilled a multiprocessor")
    if not time.fits:
        parts.append("fits: no")
    return "; ".join(parts)


def tabulate_blocks(model: str, chosen: list[Shape], rows: list[Row], gpu: Gpu, training: bool) -> str:
    """A line per block: its time, the assumed part of it, the gain over eager at its published share of its floor."""
    lines = [
        "| block (simulated) | x | us | of it assumed | byte floor us | eager's floor us | gain at 60-66 % of that |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    sums = [0.0] * 4
    for shape in chosen:
        mine = [row.time for row in rows if row.work.shape == shape.name]
        count = modelled(shape)
        eager = count.eager_training if training else count.eager_inference_folded
        figures = (
            sum(time.us for time in mine),
            sum(time.us for time in mine if time.assumed),
            sum(time.floor_us for time in mine),
            eager * DTYPE.itemsize / gpu.bandwidth * 1e6,
        )
        sums = [total + shape.count * figure for total, figure in zip(sums, figures, strict=True)]
        lines.append(_block_line(shape.name, shape.count, figures))
    lines.append(_block_line(f"{model}: these blocks", sum(shape.count for shape in chosen), sums))
    batch = chosen[0].batch
    low, high = (batch / (sums[3] / share) * 1e6 for share in SHARE_OF_EAGER)
    rates = f"{batch / sums[0] * 1e6:.0f} images/s fused, {low:.0f}-{high:.0f} eager"
    lines.append(f"\nThese blocks alone, simulated: {rates}.")
    return "\n".join(lines)


def _block_line(name: str, count: int, figures: Iterable[float]) -> str:
    ours, assumed, floor, eager = figures
    low, high = (eager / share / ours for share in reversed(SHARE_OF_EAGER))
    return f"| {name} | {count} | {ours:.0f} | {assumed:.0f} | {floor:.0f} | {eager:.0f} | {low:.2f}-{high:.2f} |"


def note_misfits(rows: list[Row]) -> str:
    """The kernels whose figures are guesses."""
    names = sorted({row.name for row in rows if not row.time.fits})
    return f"\n\nfits: no, described in benchmarks/issue.py wrongly or not at all: {', '.join(names)}" if names else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="predict kernel times from machine code: simulated, never measured")
    parser.add_argument("--model", nargs="+", choices=("tiny", *MODELS), default=["b0"], metavar="MODEL")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100"])
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=["training"])
    parser.add_argument("--batch", type=int, help="images; by default 128 for B0, 64 for B4, 32 for others")
    parser.add_argument("--block", default="", metavar="TEXT", help="only blocks whose name has this in it: b0.3, 56px")
    parser.add_argument("--activation", choices=dispatch.ACTIVATIONS, help="in all blocks, instead of the model's own")
    parser.add_argument("--clock", type=float, default=1.755, help="GHz: 1.755 to 1.98 on an SXM card")
    parser.add_argument("--warm", type=int, default=WARM >> 20, help="MB: tensors up to this size come from L2")
    parser.add_argument("--total", action="store_true", help="nothing but milliseconds on the last line, for a script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every launch there as well")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one kernel may take to compile")
    args = parser.parse_args()
    runs = [(model, gpu, phase) for model in args.model for gpu in args.gpu for phase in args.phase]
    if args.total and len(runs) > 1:
        parser.error("--total is of one model, one GPU and one phase")
    for model in args.model:
        if not choose_shapes(model, args.batch, args.block):
            names = ", ".join(shape.name for shape in choose_shapes(model, args.batch, ""))
            parser.error(f"--block {args.block!r}: no block of {model} has it in its name; they are {names}")
    try:
        load_core()
        kept = []
        for model, key, phase in runs:
            gpu = replace(GPUS[key], clock=args.clock * 1e9)
            chosen = choose_shapes(model, args.batch, args.block, args.activation)
            works = [work for shape in chosen for work in collect(shape, PHASES[phase])]
            rows = time_all(works, compile_all(works, args.jobs, args.timeout), gpu, args.warm << 20)
            _print_run(model, chosen, rows, gpu, phase)
            kept += [_to_dict(model, gpu, row) for row in rows]
    except (NoCompiler, RuntimeError) as error:
        print(f"benchmarks.simulate: {error}", file=sys.stderr)
        return 2 if isinstance(error, NoCompiler) else 1
    if args.json:
        args.json.write_text(json.dumps({"simulated": True, "rows": kept}, indent=1))
    if args.total:
        print(f"\n{model}, {phase}, these blocks on {gpu.name}, simulated, in milliseconds:")
        print(f"{sum(row.us for row in rows) / 1e3:.3f}")
    return 0


def _print_run(model: str, chosen: list[Shape], rows: list[Row], gpu: Gpu, phase: str) -> None:
    where = f"batch {chosen[0].batch}, on {gpu.name} at {gpu.clock / 1e9:g} GHz"
    tables = (
        tabulate_kernels(rows),
        tabulate_worst(rows),
        tabulate_blocks(model, chosen, rows, gpu, phase == "training"),
    )
    title = f"\n## {model}, {phase}, {where}: simulated, not measured"
    print("\n\n".join([title, *tables]) + note_misfits(rows), flush=True)


def _to_dict(model: str, gpu: Gpu, row: Row) -> dict[str, object]:
    work = row.work
    settings = work.special.settings if work.special else ""
    place = dict(model=model, gpu=gpu.name, phase=work.phase, shape=work.shape, count=work.count, settings=settings)
    return place | asdict(row.time)


if __name__ == "__main__":
    raise SystemExit(main())
