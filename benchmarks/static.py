"""Compile every kernel that a block launches, for GPUs that are not there, and read what the compiler made of it.

    python -m benchmarks.static [--arch 80 90 100] [--shapes few|held|tiny|all|b0..b7] [--jobs 2] [--json report.json]

A block's forward and backward run on CPU tensors whose launches are caught, so kernels, tile sizes and specialisations
are the launchers' own at that shape: what ships. Nothing is executed on a device and nothing is computed. Columns:
registers per thread, spills (local loads and stores in the machine code), stack and shared memory in bytes, widest
global load and store in bits, instructions, of the longest loop its instructions, spills, MUFU (ex2, rcp, tanh) and
matrix instructions, and issued instructions per element (benchmarks/issue.py): of the whole launch; in brackets of a
walk's loop, next to the budget that tests hold; or next to ~ what an H200 issues in the time of the kernel's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    raise SystemExit("benchmarks.static compiles kernels: start it without TRITON_INTERPRET")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import fastmbconv
from benchmarks import issue, subjects
from benchmarks.launches import caught
from benchmarks.registry import BATCHES, Shape, by_weight, shapes
from benchmarks.sass import disassemble
from benchmarks.workers import Failed, spread
from fastmbconv.kernels import synchronised, tables

MATRIX = ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA", "UTCHMMA")
LOCAL = ("LDL", "STL")
MODELS = [f"b{number}" for number in range(8)]
FEW = 4
TINY = [
    Shape("tiny", 0, 16, 14, 24, 24, 6, 3, 1),
    Shape("tiny", 0, 16, 14, 24, 80, 6, 3, 2),
    Shape("tiny", 0, 16, 7, 192, 192, 6, 3, 1),  # large weights of squeeze-and-excitation
]
HELD = (  # the shipped walks that tests hold to their budget
    Shape("b0", 2, 128, 56, 24, 24, 6, 3, 1),
    Shape("b0", 3, 128, 28, 40, 40, 6, 5, 1),
)


@dataclass
class Report:
    """What the compiler made of one kernel at one specialisation."""

    shape: str
    kernel: str
    settings: str
    arch: int
    registers: int = 0
    spills: int = 0
    loop_spills: int = 0
    stack: int = 0
    shared: int = 0
    load_bits: int = 0
    store_bits: int = 0
    instructions: int = 0
    loop: int = 0
    loop_mufu: int = 0
    loop_matrix: int = 0
    per_element: float | None = None
    in_loop: float | None = None
    budget: float | None = None
    aim: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Specialised:
    """One kernel as one launch specialises it for one architecture; the same launch elsewhere has the same `key`."""

    shape: str
    kernel: Any
    arch: int
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: Any
    arguments: issue.Arguments

    @classmethod
    def of(cls, shape: str, kernel: Any, grid: tuple[int, ...], given: dict[str, Any], arch: int) -> Specialised:
        backend = make_backend(GPUTarget("cuda", arch, 32))
        given = {"debug": False, **given}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(**given)
        arguments = {k: v for k, v in bound.items() if not isinstance(v, torch.Tensor)} | {"grid": grid}
        options, signature, constexprs, attrs = kernel._pack_args(backend, given, bound, specialization, options)
        return cls(shape, kernel, arch, signature, constexprs, attrs, options, arguments)

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.arch} {self.signature} {self.constexprs} {self.attrs} {self.options}"

    @property
    def settings(self) -> str:
        names = self.kernel.arg_names
        fixed = {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}
        shown = [f"{k}={v}" for k, v in fixed.items() if isinstance(v, int | str) and not isinstance(v, bool)]
        return " ".join([*shown, f"warps={self.options.num_warps}", f"stages={self.options.num_stages}"])


def launches(shape: Shape, dtype: torch.dtype, archs: list[int], *, ops: bool = False) -> list[Specialised]:
    """The distinct kernels of the block, and of the single ops, in training and inference; nothing is computed."""
    found: dict[str, Specialised] = {}
    for arch in archs:
        with tables.compiled_for(arch):  # tiles differ by architecture
            for one in _launches(shape, dtype, arch, ops):
                found.setdefault(one.key, one)
    return list(found.values())


def _launches(shape: Shape, dtype: torch.dtype, arch: int, ops: bool) -> list[Specialised]:
    found: list[Specialised] = []

    def keep(kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        found.append(Specialised.of(shape.name, kernel, grid, given, arch))

    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    dense = (subjects.fused_mbconv, subjects.fused_mbconv_excited, subjects.fused_mbconv_single)
    around = (*dense, subjects.ends)
    single = (subjects.depthwise, subjects.squeeze_excite, *around)
    for make in (subjects.mbconv, *(single if ops else ())):
        subject = make(shape)
        module = subject.make()
        x = torch.empty(subject.size, dtype=dtype, memory_format=torch.channels_last).requires_grad_()
        for memory in ("fast", "lean"):
            fastmbconv.fuse(module, memory=memory)
            with caught(keep):
                with autocast:
                    y = module(x)
                y.backward(torch.empty_like(y))
        with caught(keep), autocast, torch.no_grad():
            module.eval()(x)
    if ops:
        with caught(keep):
            synchronised_norms(shape)
    return found


def synchronised_norms(shape: Shape) -> None:
    """What a block launches beside where its BatchNorms are synchronised."""
    synchronised.bn_merge(torch.empty(64, 3, shape.hidden))
    synchronised.bn_coef(torch.empty(2 * shape.hidden + 1), torch.empty(4, shape.hidden))


def compile_one(work: Specialised) -> Report:
    source = ASTSource(work.kernel, work.signature, work.constexprs, work.attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", work.arch, 32), options=work.options.__dict__)
    used, code = disassemble(compiled.asm["cubin"])
    loads = [i.bits for i in code.instructions if i.kind in ("LDG", "LDGSTS")]
    longest = max((code.body(cycle) for cycle in code.cycles), key=len, default=[])
    kinds = Counter(i.kind for i in longest)
    name, threads = work.kernel.__name__, 32 * work.options.num_warps
    return replace(
        _empty(work),
        registers=used["REG"],
        spills=sum(i.kind in LOCAL for i in code.instructions),
        loop_spills=sum(kinds[name] for name in LOCAL),
        stack=used["STACK"],
        shared=compiled.metadata.shared,
        load_bits=max(loads, default=0),
        store_bits=max((i.bits for i in code.instructions if i.kind == "STG"), default=0),
        instructions=len(code.instructions),
        loop=len(longest),
        loop_mufu=kinds["MUFU"],
        loop_matrix=sum(kinds[name] for name in MATRIX),
        per_element=issue.per_element(name, work.arguments, code, threads),
        in_loop=issue.in_loop(name, work.arguments, code, threads),
    )


def _empty(work: Specialised) -> Report:
    name, arguments = work.kernel.__name__, work.arguments
    held = issue.budget(name, arguments, work.arch)
    return Report(
        work.shape, name, work.settings, work.arch, budget=held, aim=issue.AIMS.get(name) if held is None else None
    )


def reports(work: list[Specialised], jobs: int, timeout: float) -> list[Report]:
    """A report per kernel; one that doesn't compile, ends its process or takes too long has its `error`."""
    return [
        replace(_empty(one), error=found.reason) if isinstance(found, Failed) else found
        for one, found in zip(work, spread(compile_one, work, jobs, timeout), strict=True)
    ]


def distinct(which: list[str], archs: list[int], dtype: torch.dtype) -> list[Specialised]:
    """Every kernel that the chosen blocks launch, once per specialisation; of `held` ones those with a budget."""
    found: dict[str, Specialised] = {}
    for name in which:
        blocks, held = chosen(name), name == "held"
        first = next(shape for shape in blocks if shape.expand_ratio > 1)  # brings the launches beside a block's, too
        for shape in blocks:
            for one in launches(shape, dtype, archs, ops=shape is first and not held):
                if not held or issue.budget(one.kernel.__name__, one.arguments, one.arch):
                    found.setdefault(one.key, one)
    return list(found.values())


def table(rows: list[Report]) -> str:
    columns = f"{'regs':>4} {'spill':>5} {'stack':>5} {'smem':>6} {'ld':>3} {'st':>3} {'sass':>5}"
    looped = f"{'loop':>5} {'spill':>5} {'mufu':>4} {'mma':>4}"
    lines, last = [f"{'kernel':32} {'sm':>3} {columns} {looped} {'issued':>18}  settings"], ""
    for r in rows:
        if r.shape != last:
            lines.append(f"-- first launched by {r.shape}")
            last = r.shape
        figures = (
            f"{r.registers:4} {r.spills:5} {r.stack:5} {r.shared:6} {r.load_bits:3} {r.store_bits:3} "
            f"{r.instructions:5} {r.loop:5} {r.loop_spills:5} {r.loop_mufu:4} {r.loop_matrix:4} {issued(r):>18} "
            f" {r.settings}"
        )
        lines.append(f"{r.kernel:32} {r.arch:3} {r.error or figures}")
    return "\n".join(lines)


def issued(report: Report) -> str:
    """Instructions per element, those of a walk's loop alone in brackets, next to the limit."""
    figure = "-" if report.per_element is None else f"{report.per_element:.1f}"
    if report.in_loop is not None:
        return f"{figure} ({report.in_loop:.1f} / {report.budget or '-'})"
    return f"{figure} / ~{report.aim:g}" if report.aim is not None else f"{figure} / -"


def chosen(which: str) -> list[Shape]:
    if which == "tiny":
        return TINY
    if which == "held":
        return list(HELD)
    if which == "few":
        return by_weight()[:FEW]
    models = MODELS if which == "all" else [which]
    return [shape for model in models for shape in shapes(model, BATCHES.get(model, 32))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="compile the kernels ahead of time and report registers, spills and machine code",
        epilog="few: the four blocks that cost B0 and B4 most; held: the walks that tests hold to a budget; tiny: two "
        "small blocks; b0 to b7: every block of that model, B0 with batch 128, B4 64, others 32; all: every block of "
        "all of them, so every tile size that ships. A kernel takes a second or two of a core, a 5x5 backward half a "
        "minute, once (Triton caches it): few is 120 kernels per architecture, b0 230, all 1500.",
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, 90 for Hopper")
    parser.add_argument("--shapes", nargs="+", choices=("few", "held", "tiny", "all", *MODELS), default=["few"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile side by side")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one kernel may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    args = parser.parse_args()
    work = distinct(args.shapes, args.arch, getattr(torch, args.dtype))
    if not work:
        print("no kernel was launched: this tree has none, or the block runs eager", file=sys.stderr)
        return 2
    rows = reports(work, args.jobs, args.timeout)
    print(table(rows))
    if args.json:
        head = {"triton": triton.__version__, "torch": torch.__version__, "dtype": args.dtype}
        args.json.write_text(json.dumps({"head": head, "rows": [asdict(r) for r in rows]}, indent=1))
    failed, spilled = sum(bool(r.error) for r in rows), sum(r.spills > 0 for r in rows)
    over = sum(r.budget is not None and r.in_loop is not None and r.in_loop > r.budget for r in rows)
    share = max((r.loop_spills / r.loop for r in rows if r.loop), default=0.0)
    shown = f"{failed} did not compile, {spilled} spill ({share:.1%} of a loop at most), {over} over budget"
    print(f"{len(rows)} kernels, {shown} (Triton {triton.__version__})")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
