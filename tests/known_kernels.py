"""Started by test_simulate.py, without the interpreter: small kernels of known speed through the simulator, as JSON.

The kernels are written for this; their sizes, warps and programs are those at which others measured theirs:
* BabelStream on an H200, an element a thread: NVIDIA/cccl issue 1673, comment of 2024-07-11.
* ReLU^2, RMSNorm, LayerNorm on an H100: linkedin/Liger-Kernel at ead96b6, benchmark/data/all_benchmark_data.csv, less
  6.2 us that its clock adds to every kernel. On an H20: FlagGems at ed2508b, pull request 5504, less 5.5 us.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import triton
import triton.language as tl

from benchmarks.sass import Loop, Path
from benchmarks.simulator.decode import count_awaited
from benchmarks.simulator.kernels import Work, compile_source
from benchmarks.simulator.machine import GPUS, Gpu, simulate

H100 = GPUS["h100"]
STREAM = replace(GPUS["h200"], bandwidth=4.4e12, clock=1.98e9)
H20 = Gpu("H20", 3.6e12, 1.98e9, 78, l2_size=60e6)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n), mask=o < n)


@triton.jit
def _add_kernel(x_ptr, z_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n) + tl.load(z_ptr + o, mask=o < n), mask=o < n)


@triton.jit
def _relu_squared_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * n + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + o).to(tl.float32), 0.0)
    tl.store(y_ptr + o, (x * x).to(y_ptr.dtype.element_ty))


@triton.jit
def _softmax_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + tl.program_id(0) * n + o, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=o < n)


@triton.jit
def _rms_norm_kernel(x_ptr, w_ptr, y_ptr, rstd_ptr, n, eps, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    m = o < n
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * n + o, mask=m, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / n + eps)
    tl.store(rstd_ptr + row, rstd)
    y = x * rstd * tl.load(w_ptr + o, mask=m, other=0.0)
    tl.store(y_ptr + row * n + o, y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _layer_norm_kernel(x_ptr, w_ptr, b_ptr, y_ptr, n, eps, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    m = o < n
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * n + o, mask=m, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / n
    d = tl.where(m, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, 0) / n + eps)
    y = d * rstd * tl.load(w_ptr + o, mask=m, other=0.0) + tl.load(b_ptr + o, mask=m, other=0.0)
    tl.store(y_ptr + row * n + o, y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    GROUP: tl.constexpr = 8  # rows of tiles that run side by side: their columns come from L2
    program, rows, columns = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = program // (GROUP * columns) * GROUP
    size = min(rows - first, GROUP)
    row, column = first + program % (GROUP * columns) % size, program % (GROUP * columns) // size
    o_m, o_n, o_k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    p_a, p_b = a_ptr + o_m[:, None] * K + o_k[None, :], b_ptr + o_k[:, None] * N + o_n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        a = tl.load(p_a, mask=o_k[None, :] < K - k * BK, other=0.0)
        b = tl.load(p_b, mask=o_k[:, None] < K - k * BK, other=0.0)
        acc = tl.dot(a, b, acc)
        p_a += BK
        p_b += BK * N
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], acc.to(tl.float16))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, tiles, BM: tl.constexpr, BC: tl.constexpr):
    """A loop of few instructions, which the assembler unrolls; its remainder gets a loop of its own."""
    o_c = tl.arange(0, BC)
    acc = tl.zeros((BM, BC), tl.float32)
    for tile in range(0, tiles):
        o_m = (tl.program_id(0) * tiles + tile) * BM + tl.arange(0, BM)
        acc += tl.load(x_ptr + o_m[:, None].to(tl.int64) * BC + o_c[None, :]).to(tl.float32)
    tl.store(y_ptr + tl.program_id(0) * BC + o_c, tl.sum(acc, 0))


@triton.jit
def _strided_copy_kernel(x_ptr, y_ptr, tiles, BLOCK: tl.constexpr):
    """Nothing behind the loop: the assembler ends it with a predicated EXIT."""
    for tile in range(0, tiles):
        o = (tl.program_id(0) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + o, tl.load(x_ptr + o))


@dataclass(frozen=True)
class Case:
    """One launch: pointers by name with their type and elements; `measured` is in us."""

    name: str
    kernel: Any
    grid: int
    warps: int
    pointers: dict[str, tuple[str, int]]
    scalars: dict[str, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    stages: int = 1
    trips: int = 0
    described: bool = True
    flops: float = 0.0
    gpu: Gpu = H100
    measured: float | None = None

    def compiled(self) -> Any:
        names = self.kernel.arg_names
        types = {name: f"*{kind}" for name, (kind, _) in self.pointers.items()} | self.scalars
        signature = {name: types.get(name, "constexpr") for name in names}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name] != "fp32"}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        options = dict(num_warps=self.warps, num_stages=self.stages)
        return compile_source(self.kernel, signature, constants, aligned, options)

    def row(self) -> dict[str, Any]:
        """What the simulator says, without the gap to a next kernel."""
        tensors = {name: SIZES[kind] * elements for name, (kind, elements) in self.pointers.items()}
        stated, compiled = sum(tensors.values()), self.compiled()
        work = Work("", 1, "", self.name, stated, grid=(self.grid,), tensors=tensors)
        loops = (Loop(self.trips),) if self.trips else ()
        time = simulate(work, compiled, self.gpu, routes=(Path(1.0, loops),) if self.described else None)
        us = time.us - self.gpu.gap * 1e6
        rates = dict(us=us, gbs=stated / us / 1e3, tflops=self.flops / us / 1e6, measured=self.measured)
        told = dict(fits=time.fits, bound=time.bound, asked=time.asked, spilled_kb=time.spilled_kb)
        return dict(name=self.name, awaited=count_awaited(compiled.code), **rates, **told)


SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
N = {"n": "i32"}


def stream(kind: str, arrays: int, gbs: float) -> Case:
    elements = 1 << 25
    names = ("x_ptr", "y_ptr") if arrays == 2 else ("x_ptr", "z_ptr", "y_ptr")
    kernel, name = (_copy_kernel, "copy") if arrays == 2 else (_add_kernel, "add")
    measured = arrays * SIZES[kind] * elements / gbs / 1e3
    pointers = dict.fromkeys(names, (kind, elements))
    rest = dict(constants={"BLOCK": 1024}, gpu=STREAM, measured=measured)
    return Case(f"stream {name} {kind}", kernel, elements // 1024, 32, pointers, N, **rest)


def rows_of(
    kernel: Any, kind: str, rows: int, columns: int, warps: int, measured: float | None, gpu: Gpu = H100
) -> Case:
    """A kernel with a program a row."""
    pointers = dict.fromkeys(("x_ptr", "y_ptr"), (kind, rows * columns))
    pointers |= {name: (kind, columns) for name in ("w_ptr", "b_ptr") if name in kernel.arg_names}
    if "rstd_ptr" in kernel.arg_names:
        pointers["rstd_ptr"] = ("fp32", rows)
    scalars = N | ({"eps": "fp32"} if "eps" in kernel.arg_names else {})
    name = f"{kernel.__name__.strip('_').removesuffix('_kernel')} {kind} {rows} x {columns} {gpu.name}"
    return Case(name, kernel, rows, warps, pointers, scalars, {"BLOCK": columns}, gpu=gpu, measured=measured)


def matmul(size: int) -> Case:
    blocks, pointers = (
        {"BM": 128, "BN": 256, "BK": 64},
        dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), ("fp16", size * size)),
    )
    grid, sizes = size // blocks["BM"] * (size // blocks["BN"]), {"M": "i32", "N": "i32", "K": "i32"}
    rest = dict(stages=3, trips=size // blocks["BK"], flops=2.0 * size**3)
    return Case(f"matmul {size}", _matmul_kernel, grid, 8, pointers, sizes, blocks, **rest)


def looping(trips: int) -> list[Case]:
    """Loops that are unrolled by 4, with a remainder."""
    sizes, grid = {"tiles": "i32"}, 264
    copied = dict.fromkeys(("x_ptr", "y_ptr"), ("bf16", grid * trips * 1024))
    summed = {"x_ptr": ("bf16", grid * trips * 1024), "y_ptr": ("fp32", grid * 32)}
    return [
        Case(f"sum of {trips}", _sum_kernel, grid, 4, summed, sizes, {"BM": 32, "BC": 32}, trips=trips),
        Case(f"strided copy of {trips}", _strided_copy_kernel, grid, 4, copied, sizes, {"BLOCK": 1024}, trips=trips),
    ]


def copied(elements: int = 1 << 27) -> Case:
    pointers = dict.fromkeys(("x_ptr", "y_ptr"), ("bf16", elements))
    return Case("copy", _copy_kernel, elements // 1024, 4, pointers, N, {"BLOCK": 1024})


CASES = [
    stream("fp32", 2, 2255), stream("fp64", 2, 3513), stream("fp32", 3, 2959), stream("fp64", 3, 4020),
    rows_of(_relu_squared_kernel, "bf16", 4096, 4096, 8, 21.7),
    rows_of(_relu_squared_kernel, "bf16", 4096, 16384, 16, 88.2),
    rows_of(_rms_norm_kernel, "bf16", 4096, 4096, 8, 23.0),
    rows_of(_rms_norm_kernel, "bf16", 4096, 16384, 16, 88.8),
    rows_of(_rms_norm_kernel, "fp16", 4096, 4096, 4, 19.9, H20),
    rows_of(_rms_norm_kernel, "fp16", 1024, 65536, 4, 477, H20),
    rows_of(_layer_norm_kernel, "fp32", 4096, 4096, 8, 44.8),
    rows_of(_softmax_kernel, "bf16", 32768, 4096, 8, None),
    copied(), matmul(4096), *looping(50), *looping(51),
    replace(looping(50)[0], name="not described", described=False),
]  # fmt: skip


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        json.dump([case.row() for case in CASES], file)
