"""Started by test_simulate.py, without the interpreter: small kernels of known speed through the simulator, as JSON.

The kernels are written for this; their sizes, warps and programs are those at which others measured theirs:
* BabelStream on an H200, an element a thread: NVIDIA/cccl issue 1673, comment of 2024-07-11.
* ReLU^2, RMSNorm, LayerNorm on an H100: linkedin/Liger-Kernel at ead96b6, benchmark/data/all_benchmark_data.csv, less 6.2 us
  that its clock adds to every kernel. On an H20: FlagGems' pull requests, less 5.5 us.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from math import prod
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
