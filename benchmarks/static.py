"""Compile every kernel that a block launches, for GPUs that are not there, and read what the compiler made of it.

    python -m benchmarks.static [--arch 80 90 100] [--shapes few|all|tiny] [--dtype bfloat16] [--json report.json]

A block's forward and backward run on CPU tensors whose launches are caught, so kernels, tile sizes and specialisations
are the launchers' own at that shape. Nothing is executed on a device and nothing is computed. Columns: registers per
thread, spills (local loads and stores in the machine code), stack and shared memory in bytes, widest global load and
store in bits, instructions, instructions of the longest loop, MUFU (ex2, rcp, tanh) and matrix instructions in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import zip_longest
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
from benchmarks import subjects
from benchmarks.launches import caught
from benchmarks.registry import Shape, by_weight

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
MATRIX = ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA", "UTCHMMA")
FEW = 4


@dataclass
class Report:
    """What the compiler made of one kernel at one specialisation."""

    shape: str
    kernel: str
    settings: str
    arch: int
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    load_bits: int = 0
    store_bits: int = 0
    instructions: int = 0
    loop: int = 0
    loop_mufu: int = 0
    loop_matrix: int = 0
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

    @classmethod
    def of(cls, shape: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: int) -> Specialised:
        backend = make_backend(GPUTarget("cuda", arch, 32))
        kwargs = {"debug": False, **kwargs}
        bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
            *args, **kwargs
        )
        options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
        return cls(shape, kernel, arch, signature, constexprs, attrs, options)

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

    def keep(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for arch in archs:
            one = Specialised.of(shape.name, kernel, args, kwargs, arch)
            found.setdefault(one.key, one)

    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    around = (subjects.fused_mbconv, subjects.fused_mbconv_single, subjects.ends)
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
    return list(found.values())


def disassemble(cubin: bytes, report: Report) -> None:
    """Fill in the figures that the machine code shows."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(option: str) -> str:
            return subprocess.run(
                [BIN / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
            ).stdout

        usage, sass = tool("--dump-resource-usage"), tool("-sass")
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    report.registers, report.stack = int(used["REG"]), int(used["STACK"])
    code = [(int(at, 16), op, rest) for at, op, rest in INSTRUCTION.findall(sass) if op != "NOP"]
    report.instructions = len(code)
    report.spills = sum(op.split(".")[0] in ("LDL", "STL") for _, op, _ in code)
    report.load_bits = max((_bits(op) for _, op, _ in code if op.startswith(("LDG", "LDGSTS"))), default=0)
    report.store_bits = max((_bits(op) for _, op, _ in code if op.startswith("STG")), default=0)
    longest: list[str] = []
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            body = [name for place, name, _ in code if int(target[1], 16) <= place <= at]
            longest = max(longest, body, key=len)
    kinds = Counter(name.split(".")[0] for name in longest)
    report.loop, report.loop_mufu = len(longest), kinds["MUFU"]
    report.loop_matrix = sum(kinds[name] for name in MATRIX)


def _bits(opcode: str) -> int:
    parts = opcode.split(".")
    wide = [int(p) for p in parts if p in ("64", "128", "256")]
    narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
    return max(wide, default=min((narrow[p] for p in parts if p in narrow), default=32))


def compile_one(work: Specialised) -> Report:
    report = Report(work.shape, work.kernel.__name__, work.settings, work.arch)
    try:
        source = ASTSource(work.kernel, work.signature, work.constexprs, work.attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", work.arch, 32), options=work.options.__dict__)
        report.shared = compiled.metadata.shared
        disassemble(compiled.asm["cubin"], report)
    except Exception as error:  # one kernel that doesn't compile must not hide the others
        report.error = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"[:300]
    return report


def reports(shapes: list[Shape], archs: list[int], dtype: torch.dtype, part: int = 0, parts: int = 1) -> list[Report]:
    """A report per distinct kernel, or every `parts`-th of them."""
    distinct: dict[str, Specialised] = {}
    for shape in shapes:
        for one in launches(shape, dtype, archs, ops=shape is shapes[0]):
            distinct.setdefault(one.key, one)
    return [compile_one(one) for one in list(distinct.values())[part::parts]]


def shared_out(args: argparse.Namespace) -> list[Report]:
    """The same as `reports`, by one fresh process per job: a kernel that kills the compiler ends with its process."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{job}.json" for job in range(args.jobs)]
        same = ["--shapes", args.shapes, "--dtype", args.dtype, "--arch", *map(str, args.arch)]
        command = [sys.executable, "-m", "benchmarks.static", *same, "--jobs", "1"]
        children = [
            subprocess.Popen([*command, "--part", f"{job}/{args.jobs}", "--json", str(file)], stdout=subprocess.DEVNULL)
            for job, file in enumerate(files)
        ]
        for child in children:
            child.wait()
        if not all(file.exists() for file in files):
            raise SystemExit(
                f"a compiling process ended early: {[child.returncode for child in children]} (try --jobs 1)"
            )
        shares = [[Report(**row) for row in json.loads(file.read_text())["rows"]] for file in files]
    return [row for rows in zip_longest(*shares) for row in rows if row is not None]


def table(rows: list[Report]) -> str:
    columns = f"{'regs':>4} {'spill':>5} {'stack':>5} {'smem':>6} {'ld':>3} {'st':>3} {'sass':>5} {'loop':>5}"
    lines, last = [f"{'kernel':32} {'sm':>3} {columns} {'mufu':>4} {'mma':>4}  settings"], ""
    for r in rows:
        if r.shape != last:
            lines.append(f"-- first launched by {r.shape}")
            last = r.shape
        figures = (
            f"{r.registers:4} {r.spills:5} {r.stack:5} {r.shared:6} {r.load_bits:3} {r.store_bits:3} "
            f"{r.instructions:5} {r.loop:5} {r.loop_mufu:4} {r.loop_matrix:4}  {r.settings}"
        )
        lines.append(f"{r.kernel:32} {r.arch:3} {r.error or figures}")
    return "\n".join(lines)


def chosen(which: str) -> list[Shape]:
    if which == "tiny":
        return [Shape("tiny", 0, 16, 14, 24, 24, 6, 3, 1), Shape("tiny", 0, 16, 14, 24, 40, 6, 5, 2)]
    return by_weight() if which == "all" else by_weight()[:FEW]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="compile the kernels ahead of time and report registers, spills and machine code"
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, 90 for Hopper")
    parser.add_argument("--shapes", choices=("few", "all", "tiny"), default="few", help="few: the four that cost most")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile side by side")
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    args = parser.parse_args()
    if args.jobs > 1:
        rows = shared_out(args)
    else:
        part, parts = map(int, args.part.split("/"))
        rows = reports(chosen(args.shapes), args.arch, getattr(torch, args.dtype), part, parts)
    if not rows:
        print("no kernel was launched: this tree has none, or the block runs eager", file=sys.stderr)
        return 2
    print(table(rows))
    if args.json:
        head = {"triton": triton.__version__, "torch": torch.__version__, "dtype": args.dtype}
        args.json.write_text(json.dumps({"head": head, "rows": [asdict(r) for r in rows]}, indent=1))
    failed, spilled = sum(bool(r.error) for r in rows), sum(r.spills > 0 for r in rows)
    print(f"{len(rows)} kernels, {failed} did not compile, {spilled} spill (Triton {triton.__version__})")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
