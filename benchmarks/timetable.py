"""What `python -m benchmarks.gpu` runs, in which order, and how long each part may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

DTYPES = ("bfloat16", "float16", "float32", "tf32")  # tf32: float32 tensors whose products take TF32
CLOSING_SECONDS = 5.0  # for the summary


@dataclass(frozen=True)
class Section:
    """One child process: `item_seconds` without a word from it, and what it was at is taken for hung."""

    name: str
    seconds: float
    item_seconds: float
    what: str


FIRST = (
    # A fresh machine reads PyTorch off its disk for the first time; what that does not take is the next section's.
    Section("ceilings", 32, 30, "versions, cache, copy and matrix product"),
    Section("tests", 36, 30, "the kernels' tests"),
    Section("correctness", 42, 15, "B0's blocks at full size against fp32, twice the same bits"),
    Section("profile", 25, 20, "each kernel of a B0 step; the host's time per block"),
    Section("blocks", 56, 20, "B0's blocks against eager"),
    Section("models", 78, 40, "training steps of B0 and B4, plain and as CUDA graphs"),
    Section("compile", 56, 50, "torch.compile on a block and on B0"),
)
SECOND = (
    Section("variants", 145, 45, "other tiles for the three kernels furthest from their floor"),
    Section("peers", 90, 60, "blocks and models against torch.compile and max-autotune"),
    Section("inference", 45, 30, "B0 and B4 without gradients, plain and as CUDA graphs"),
    Section("capture", 40, 20, "the tests of captured steps"),
    Section("memcheck", 35, 30, "compute-sanitizer over small blocks"),
)
APART = (  # in neither command; `--sections` chooses them
    Section("start", 140, 75, "from fuse to the first step, with an empty cache and a full one"),
    Section("ops", 60, 20, "depthwise and squeeze-excite by themselves"),
    Section("kernelbench", 240, 60, "KernelBench's MBConv models, as it times them"),
    Section("training", 240, 120, "the same loss curve, fused and eager"),
)
SECTIONS = {section.name: section for section in (*FIRST, *SECOND, *APART)}


def timetable(sections: Sequence[Section], minutes: float | None = None) -> list[Section]:
    """These sections, stretched or shortened so that all of it, the closing included, takes `minutes`."""
    planned = sum(section.seconds for section in sections)
    scale = 1.0 if minutes is None else max(0.0, 60 * minutes - CLOSING_SECONDS) / planned
    return [replace(s, seconds=scale * s.seconds, item_seconds=max(1.0, scale) * s.item_seconds) for s in sections]


def total_seconds(sections: Sequence[Section]) -> float:
    return sum(section.seconds for section in sections) + CLOSING_SECONDS


def plan(sections: Sequence[Section]) -> str:
    """Section, seconds, running total; the last number is the whole run's seconds."""
    lines, passed = [f"{'section':12} {'what':62} {'seconds':>7} {'until':>5}"], 0.0
    for section in sections:
        passed += section.seconds
        lines.append(f"{section.name:12} {section.what:62} {section.seconds:7.0f} {passed:5.0f}")
    return "\n".join([*lines, f"{'summary':12} {'':62} {CLOSING_SECONDS:7.0f} {total_seconds(sections):5.0f}"])
