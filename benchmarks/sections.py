"""What the sections of `python -m benchmarks.gpu` do, each in a process of its own (benchmarks/section.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import cache, comparison, step_profile, subjects, timing, training
from benchmarks.comparison import COMPILE, EAGER, LATENCY, Plan
from benchmarks.figures import group_by_gpu, make_slug
from benchmarks.kernelbench import NOTHING_FUSED, PROBLEMS
from benchmarks.record import SUFFIX, read
from benchmarks.recorder import RESULTS, versions
from benchmarks.registry import BATCHES, Shape, by_weight, shapes
from benchmarks.section import Context
from benchmarks.subjects import MODES, TRAINING_FORWARD, Subject
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.scaling import COEFFICIENTS

if TYPE_CHECKING:
    from fastmbconv.tuner import Found, Launch

MODEL_COMPILE_SCALE = 4.0  # a whole model's graph against one block's
INFERENCE_BATCHES = (1, 32, 256)
KERNELS_TUNED = 3
LEAST_COMPILE_SECONDS = 20.0

Work = Iterable[tuple[Subject, str, Plan]]


def plan(context: Context, **settings: Any) -> Plan:
    """How this section compares, until its time is up."""
    if context.dry:
        return Plan("cpu", torch.float32, tuple(EAGER), 1, interpreted=True)
    copy = context.facts.get("copy_gb_s")
    settings["rounds"] = context.rounds(settings.get("rounds", 30))
    bandwidth, tf32 = copy and copy * 1e9, context.label == "tf32"
    return Plan(
        "cuda",
        context.dtype,
        bandwidth=bandwidth,
        deadline=context.deadline,
        tf32=tf32,
        alive=context.alive,
        **settings,
    )


def chosen(context: Context, blocks: Iterable[Shape]) -> list[Shape]:
    if context.dry:
        kinds = ((5, 2), (3, 1))
        blocks = [next(s for s in by_weight() if (s.kernel_size, s.stride) == kind).tiny() for kind in kinds]
    return list(blocks)[: context.facts.get("shapes")]


def compare(context: Context, work: Work) -> None:
    """A row per comparison; without the blocks that ended a process before, in a model too."""
    for subject, mode, how in work:
        with context.item(subject.name, {"mode": mode}) as begun, subjects.left_eager(context.avoid) as without:
            if begun:
                row = comparison.compare(subject, mode, how)
                section = "compile" if context.name == "peers" else None  # the same comparisons, with more peers
                context.add(row | ({"without": sorted(without)} if without else {}), section)


def run_ceilings(context: Context) -> None:
    """What this device reaches: a copy, counting bytes read and written, and a matrix product on random data."""
    with context.item("versions") as begun:
        if begun:
            context.add({"what": "versions", **versions(context.dry), "cache": cache.verdict()}, "versions")
    with context.item("ceilings") as begun:
        if begun:
            context.add({"what": "ceilings"} | ceilings(context))


def ceilings(context: Context) -> dict[str, float]:
    dtype, side = (torch.float32, 64) if context.dry else (torch.bfloat16, 8192)
    x = torch.randn(1 << 12 if context.dry else 1 << 30, device=context.device, dtype=dtype)
    y = torch.empty_like(x)
    a, b = (torch.randn(side, side, device=context.device, dtype=dtype) for _ in range(2))
    steps = {"copy": lambda: y.copy_(x), "matmul": lambda: a @ b}
    for step in steps.values():
        step()
    medians = {n: timing.quantiles(s)["p50"] for n, s in timing.interleaved(steps, context.rounds(10)).items()}
    return {
        "copy_gb_s": 2 * x.nbytes / medians["copy"] / 1e6,
        "matmul_tflop_s": 2 * side**3 / medians["matmul"] / 1e9,
    }


def run_correctness(context: Context) -> None:
    """B0's blocks at full size, forward and backward, against fp32; then the same again, bit for bit."""
    for shape in chosen(context, shapes("b0")):
        subject = subjects.mbconv(shape)
        with context.item(subject.name, {"mode": "fwd_bwd"}) as begun:
            if begun:
                context.add(comparison.check(subject, plan(context)))


def run_profile(context: Context) -> None:
    """Each kernel of a B0 step with its share of the copy's speed; and what a block costs the host."""
    with context.item("host") as begun:
        if begun:
            context.add(
                {"what": "a block"} | step_profile.host_microseconds(context.device, context.rounds(20)), "host"
            )
    subject = subjects.tiny_model() if context.dry else subjects.whole("b0")
    with context.item(f"step of {subject.name}") as begun, subjects.left_eager(context.avoid):
        if begun:
            for row in step_profile.profile(subject, plan(context)):
                context.add(row)


def run_blocks(context: Context) -> None:
    """B0's blocks against eager in both memory formats, then B4's; training first."""
    how = plan(context, peers=tuple(EAGER), rounds=20)
    everything = [shape for model in BATCHES for shape in sorted(shapes(model), key=lambda s: -s.elements * s.count)]
    compare(context, ((subjects.mbconv(s), m, how) for m in reversed(MODES) for s in chosen(context, everything)))


def run_models(context: Context) -> None:
    """Training steps with their optimiser: images per second and peak memory, plain and as CUDA graphs."""
    how = plan(context, peers=tuple(EAGER), rounds=6, graphed=True)
    compare(context, ((subject, "fwd_bwd", how) for subject in _models(context)))


def run_inference(context: Context) -> None:
    """Whole models without gradients, plain and as CUDA graphs: latency of one image, then throughput."""
    how = plan(context, peers=tuple(EAGER), rounds=8, graphed=True)
    compare(context, ((subject, "fwd_no_grad", how) for subject in _models(context, INFERENCE_BATCHES)))


def _models(context: Context, batches: Iterable[int | None] = (None,)) -> list[Subject]:
    if context.dry:
        return [subjects.tiny_model()]
    return [subjects.whole(name, b) for name in list(BATCHES)[: context.facts.get("models")] for b in batches]


def run_ops(context: Context) -> None:
    """The single ops at the shapes that weigh most."""
    how = plan(context, peers=tuple(EAGER), rounds=20)
    makers, weightiest = (subjects.depthwise, subjects.squeeze_excite), chosen(context, by_weight()[:8])
    compare(context, ((make(s), m, how) for s in weightiest for m in reversed(MODES) for make in makers))


def run_compile(context: Context) -> None:
    """torch.compile beside ours and eager, on the block that weighs most and on B0."""
    how = plan(context, peers=(*EAGER, "compile"), rounds=8)
    work = [subjects.mbconv(chosen(context, shapes("b0")[1:])[0]), _models(context)[0]]
    compare(context, ((subject, "fwd_bwd", how) for subject in work))


def run_peers(context: Context) -> None:
    """torch.compile and max-autotune beside ours and eager, blocks and models by weight, while time is left."""
    for subject, mode, how in _peers_work(context):
        if how.left() < LEAST_COMPILE_SECONDS and not context.dry:
            context.add({"what": subject.name, "mode": mode, "skipped": "its time is up, and that of all after it"})
            return
        compare(context, [(subject, mode, how)])


def _peers_work(context: Context) -> Iterator[tuple[Subject, str, Plan]]:
    block = plan(context, peers=(*EAGER, *COMPILE))
    model = replace(block, rounds=context.rounds(8), compile_scale=MODEL_COMPILE_SCALE)
    training_steps = _models(context)
    for index, shape in enumerate(chosen(context, by_weight())):
        yield subjects.mbconv(shape), "fwd_bwd", block
        if index % 2 == 1 and training_steps:
            yield training_steps.pop(0), "fwd_bwd", model
    if not context.dry:
        latency = replace(model, peers=(*EAGER, *LATENCY), graphed=True)
        for subject in _models(context, (1,)):
            yield subject, "fwd_no_grad", latency


def run_variants(context: Context) -> None:
    """Other tiles beside the shipped ones, for the launches of a B0 step that are furthest from their floor."""
    from fastmbconv import tuner

    folder = Path(context.facts.get("results", RESULTS))
    kernels = context.facts.get("kernels") or worst_kernels(folder)
    if not kernels:
        why = f"no profile of this GPU in {folder} says which kernels are the slowest: run the first command"
        context.add({"what": "variants", "skipped": why})
        return
    b0 = subjects.whole("b0")
    with torch.device("cpu"):
        cases = tuner.cases(EfficientNet(COEFFICIENTS["b0"]), b0.size)
        launches = tuner.launches(cases, context.dtype, ("fast",))
    for launch in (launch for launch in launches if launch.question.kernel in kernels):
        with context.item(f"{launch.question.kernel} {launch.question.key}") as begun:
            if begun:
                context.add(describe(launch, tuner.search(launch, launch.step(context.device), left=context.left)))


def describe(launch: Launch, found: Found) -> dict[str, Any]:
    """The row of one search."""
    row: dict[str, Any] = {
        "what": launch.question.kernel, "question": launch.question.key, "count": launch.count, "timed": found.timed,
        "default_tiles": launch.question.default, "tiles": found.tiles, "rejected": found.rejected,
    }  # fmt: skip
    if found.tiles is None:
        return row | {"error": "nothing could be timed"}
    return row | {"default_us": 1e3 * found.default_ms, "best_us": 1e3 * found.ms}


def worst_kernels(folder: Path) -> list[str]:
    """The kernels that lost most time to their floor, in the newest profile of this GPU in a folder of results."""
    runs = [read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    here = make_slug(torch.cuda.get_device_name())
    for device in group_by_gpu(runs):
        if make_slug(device.name) == here:
            return [kernel.name for kernel in device.kernels() if kernel.lost > 0][:KERNELS_TUNED]
    return []


def run_kernelbench(context: Context) -> None:
    """KernelBench's models as it times them: forward in training mode, float32 whose convolutions may take TF32."""
    how = plan(context, peers=(*EAGER, "compile"), rounds=10, compile_scale=MODEL_COMPILE_SCALE)
    if not context.dry:
        how = replace(how, dtype=torch.float32, tf32=True)
    for problem in PROBLEMS.values():
        problem = problem.tiny() if context.dry else problem
        subject = subjects.kernelbench(problem)
        if problem.explained().fused:
            compare(context, [(subject, TRAINING_FORWARD, how)])
        else:
            context.add({"what": subject.name, "mode": TRAINING_FORWARD, "skipped": NOTHING_FUSED})


def run_training(context: Context) -> None:
    """200 steps on digits, fused and eager: the same loss curve? The given dtype first, others as time allows."""
    dtypes = [torch.float32] if context.dry else [context.dtype, torch.float16, torch.bfloat16, torch.float32]
    setting = training.DRY if context.dry else replace(training.LARGE, device="cuda")
    with context.item("training") as begun:
        if begun:
            for row in training.compare(setting, list(dict.fromkeys(dtypes)), training.digits(setting.size)):
                context.add(row)
                if context.left() <= 0:
                    break
