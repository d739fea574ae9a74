"""Launch settings: accumulator types, and tile sizes by shape (larger where the interpreter pays per operation)."""

import torch
import triton
import triton.language as tl

from .math import INTERPRETED

MIN_DOT = 16  # smallest tile side that tl.dot takes


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums, statistics and vectors: fp32, and fp64 for fp64 (interpreter only)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def numeric(dtype: torch.dtype) -> dict[str, object]:
    """The constexpr arguments that follow from the activations' dtype."""
    return dict(
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        FAST=dtype == torch.bfloat16 and not INTERPRETED.value,
    )


def precision(dtype: torch.dtype) -> str:
    """Matrix products of fp32 follow the switch that cuDNN's convolutions follow."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


def pow2(size: int, low: int, high: int) -> int:
    """The power of two that holds `size`, within [low, high] (all powers of two)."""
    return min(max(triton.next_power_of_2(size), low), high)


def matmul_tiles(rows: int, reduce: int, out: int) -> dict[str, int]:
    """[BM rows, BK reduced] x [BK, BO out]."""
    if INTERPRETED:
        return dict(BM=pow2(rows, MIN_DOT, 2048), BK=pow2(reduce, MIN_DOT, 256), BO=pow2(out, MIN_DOT, 256))
    return dict(BM=64, BK=pow2(reduce, MIN_DOT, 32), BO=pow2(out, MIN_DOT, 64), num_warps=4, num_stages=3)


def row_tiles(rows: int, channels: int) -> dict[str, int]:
    """[BM rows, BC channels] for elementwise work and reductions over rows."""
    if INTERPRETED:
        return dict(BM=pow2(rows, 1, 2048), BC=pow2(channels, 1, 256))
    return dict(BM=32, BC=pow2(channels, 16, 64), num_warps=4)


def walk_tiles(
    images: int, height: int, channels: int, kernel_size: int, stride: int, backward: bool
) -> dict[str, int]:
    """[NB images, BC channels] per register tile and R rows per program; the tiles in flight must fit 255 registers."""
    if INTERPRETED:
        return dict(NB=pow2(images, 1, 64), BC=pow2(channels, 1, 256), R=4 if height > 2 else 2)
    tile = {(3, False): 512, (5, False): 512, (3, True): 256, (5, True): 256}[kernel_size, backward]
    block = pow2(channels, 16, 64)
    return dict(NB=pow2(images, 1, tile // block), BC=block, R=4 if height > 2 else 2, num_warps=4)


def groups(tiles: int, columns: int, programs: int = 2048) -> int:
    """Row tiles per program: enough programs to fill a GPU several times, few enough that partial sums stay small."""
    return max(1, tiles * columns // programs)
