"""Launch settings: accumulator types, tile sizes by shape, and which others a table (tables.py) may hold instead.

The interpreter gets larger tiles: it pays per operation.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .math import INTERPRETED

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
MIN_DOT = 16  # smallest tile side that tl.dot takes
PROGRAMS = 264  # two for each multiprocessor of an H100: where a batch is small, fewer leave some idle
PRODUCTS = ("pointwise_fwd", "pointwise_moments", "pointwise_inference")  # launchers of pointwise.py's kernel
SMALL_SHARED = (86, 89, 120, 121)  # compute capabilities with 99 KB of shared memory a program

# Of a walk: elements of a register tile for 4 warps, two a thread, so that 16-bit loads may go through shared memory
# ahead; and most rows in flight. Taps, sums or window must fit 255 registers without a spill.
WALK_TILE, WALK_ROWS = 256, 8


@dataclass(frozen=True)
class Choice:
    """Values that one tile size may have; none beyond what holds the formula's parameter `bound` is worth a try."""

    values: tuple[int, ...]
    bound: str | None = None


_WARPS = Choice((1, 2, 4, 8))
_STAGES = Choice((1, 2, 3, 4))
_POINTWISE = dict(
    RESIDENT=Choice((0, 1)),
    BM=Choice((16, 32, 64, 128, 256), "rows"),
    BO=Choice((16, 32, 64, 128, 256), "out"),
    BK=Choice((16, 32, 64, 128), "reduce"),
    STAGES=_STAGES,
    num_warps=_WARPS,
)
_PRODUCT = {name: choice for name, choice in _POINTWISE.items() if name not in ("RESIDENT", "STAGES")}
_WALK = dict(
    R=Choice((1, 2, 3, 4, 5, 6, 7, 8), "height"),
    NB=Choice((1, 2, 4, 8, 16), "images"),
    BC=Choice((16, 32, 64, 128), "channels"),
    STAGES=_STAGES,
    num_warps=_WARPS,
)
_ROWS = dict(BM=Choice((8, 16, 32, 64, 128), "rows"), BC=Choice((16, 32, 64, 128), "channels"), num_warps=_WARPS)
_PROJECT = dict(
    BM=Choice((16, 32, 64, 128), "pixels"),
    BC=Choice((16, 32, 64, 128), "channels"),
    BO=Choice((16, 32, 64), "out"),
    STAGES=_STAGES,
    num_warps=_WARPS,
)

# By kernel, in the order of how much each is likely to matter.
SPACE: dict[str, dict[str, Choice]] = {
    "depthwise_bwd": _WALK,
    "depthwise_fwd": _WALK,
    "pointwise": dict(LIBRARY=Choice((0, 1))),
    "pointwise_fwd": _POINTWISE,
    "project_bwd": dict(RESIDENT=Choice((0, 1))),
    "project_bwd_sums": _PROJECT,
    "project_bwd_data": _PROJECT,
    "expand_bwd": dict(RESIDENT=Choice((0, 1))),
    "expand_pass": dict(
        BM=Choice((16, 32, 64, 128), "rows"),
        BE=Choice((16, 32, 64), "expanded"),
        SLICE=Choice((64, 128, 256, 512), "expanded"),
        STAGES=_STAGES,
        num_warps=_WARPS,
    ),
    "pointwise_moments": _POINTWISE,
    "depthwise_inference": _WALK,
    "pointwise_inference": _POINTWISE,
    "pointwise_pool": _PRODUCT | dict(num_stages=_STAGES),
    "pool": _ROWS | dict(STAGES=_STAGES),
    "bn_act_fwd": _ROWS,
    "bn_act_bwd": _ROWS,
    "bn_act_bwd_reduce": _ROWS,
    "moments": _ROWS,
}


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
    """Matrix products of fp32 follow the switch that cuDNN's convolutions follow.

    Not by `cudnn.allow_tf32`: that raises where somebody has set `cudnn.conv.fp32_precision`.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def cdiv(size: int, part: int) -> int:
    """Parts that hold `size`. Triton's own serves kernels too, and costs a launcher several microseconds a call."""
    return -(-size // part)


def pow2(size: int, low: int, high: int) -> int:
    """The power of two that holds `size`, within [low, high] (all powers of two)."""
    return min(max(1 << (size - 1).bit_length(), low), high)


def row_tiles(rows: int, channels: int) -> dict[str, int]:
    """[BM rows, BC channels] for elementwise work and reductions over rows."""
    if INTERPRETED:
        return dict(BM=pow2(rows, 1, 2048), BC=pow2(channels, 1, 256))
    return dict(BM=32, BC=pow2(channels, 16, 64), num_warps=4)


def finalize_tiles(parts: int, channels: int) -> dict[str, int]:
    """[BP partial results, BC channels], few channels: many programs share the rows, and each waits for few of them.

    ALIGN divides `channels`: where it is not 1, rows are read by vectors.
    """
    align = 8 if channels % 8 == 0 else 1
    if INTERPRETED:
        return dict(BP=pow2(parts, 1, 256), BC=pow2(channels, 1, 256), ALIGN=align, STAGES=1)
    return dict(BP=pow2(parts, 64, 128), BC=4, ALIGN=align, STAGES=3 if parts > 64 else 1, num_warps=4)


def weight_tiles(parts: int, width: int) -> dict[str, int]:
    """[BQ partial results, BW columns] of a program that adds up rows of `width`."""
    if INTERPRETED:
        return dict(BQ=pow2(parts, 1, 256), BW=pow2(width, 1, 4096))
    return dict(BQ=32, BW=16 if width <= 16 * PROGRAMS else 64)


def channel_block(channels: int) -> int:
    """64 channels fill a 128-byte line in 16 bits; 32 where 64 would leave more than an eighth of the lanes idle."""
    wide = cdiv(channels, 64) * 64
    return pow2(channels, MIN_DOT, 64 if wide * 7 <= channels * 8 else 32)


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether products of ours run on tensor cores and give up no digits; interpreted, it makes no difference."""
    return bool(INTERPRETED) or dtype in (torch.float16, torch.bfloat16)


def walks_expansion(kernel_size: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether the walk computes the expansion of so many input channels itself without running out of registers."""
    return kernel_size == 3 and (bool(INTERPRETED) or (channels <= 64 and dtype in (torch.float16, torch.bfloat16)))


def walk_tiles(
    images: int,
    height: int,
    channels: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
    backward: bool,
    expand: int = 0,
) -> dict[str, int]:
    """[NB images, BC channels] per register tile and R rows per program (a multiple of the stride when going back).

    `expand` is the number of input channels where the walk computes the expansion itself; BX holds them.
    """
    if INTERPRETED:
        tiles = dict(NB=pow2(images, MIN_DOT if expand else 1, 64), BC=pow2(channels, MIN_DOT if expand else 1, 256))
        rows = 4 if height > 2 else 2
        return tiles | dict(BX=pow2(expand, MIN_DOT, 4096) if expand else tiles["BC"], R=rows, STAGES=1)
    most = WALK_ROWS if (stride == 2 if backward else kernel_size == 3 and stride == 1) else WALK_ROWS - 1
    if kernel_size == 5 and stride == 2 and not backward and (height > most or dtype != torch.bfloat16):
        most = 4  # more are no faster, take three times as long to compile, and spill without the fast activation
    if expand:  # a matrix product per tile: at least 16 images, and registers for its operands
        most = 2 if backward else 4 if stride == 1 else 3 if expand <= MIN_DOT else 2
    step = stride if backward else 1
    halo = 1.0 if backward else (kernel_size - stride) * 0.25  # what a strip costs beside its rows, in rows
    rows = min(range(step, most + 1, step), key=lambda r: cdiv(height, r) * (r + halo))
    if expand:
        return dict(NB=MIN_DOT, BX=pow2(expand, MIN_DOT, 4096), BC=32, R=rows, STAGES=3, num_warps=4)
    block = channel_block(channels)
    count = pow2(images, 1, WALK_TILE // block)
    block = pow2(channels, MIN_DOT, WALK_TILE // count) if count * block < WALK_TILE else block
    warps = pow2(max(1, count * block // 64), 1, 4)

    def programs() -> int:
        return cdiv(images, count) * cdiv(height, rows) * cdiv(channels, block)

    # A small batch: as many elements a thread, fewer threads a program.
    while programs() < PROGRAMS and warps > 1 and (count > 1 or block > MIN_DOT):
        count, block, warps = (count // 2, block, warps // 2) if count > 1 else (count, block // 2, warps // 2)
    while programs() < PROGRAMS and rows >= 4 * step:
        rows = cdiv(rows, 2 * step) * step
    return dict(NB=count, BX=block, BC=block, R=rows, STAGES=3, num_warps=warps)


def relieved(kernel: str, tiles: dict[str, int], sizes: dict[str, Any], capability: int) -> dict[str, int]:
    """The formula's tiles, smaller where they do not fit or, as `python -m benchmarks.static` says, spill."""
    if kernel == "expand_pass":
        channels = sizes["channels"]
        if capability in SMALL_SHARED:
            tiles = tiles | dict(STAGES=min(tiles["STAGES"], 2))
        # wgmma takes a product's operands from shared memory; tcgen05 and mma.sync need more registers beside dWe.
        if capability != 90 and channels > (32 if capability < 90 else MIN_DOT):
            tiles = tiles | dict(BM=min(tiles["BM"], 32))
        if capability // 10 not in (9, 10) and channels > 32:
            tiles = tiles | dict(BE=min(tiles["BE"], 32))
        return tiles
    if kernel in PRODUCTS and (capability in SMALL_SHARED or capability < 90):
        shared = 99 << 10 if capability in SMALL_SHARED else 163 << 10
        rows = sizes["reduce"] if tiles["RESIDENT"] else tiles["BK"]
        block = 2 * rows * tiles["BM"] + (0 if tiles["RESIDENT"] else 4 * rows * tiles["BO"])
        return tiles | dict(STAGES=max(1, min(tiles["STAGES"], shared // block - 1)))
    return tiles


def groups(tiles: int, columns: int, programs: int = 1024) -> int:
    """Row tiles per program: enough programs to fill a GPU several times, few enough that partial sums stay small."""
    return max(1, tiles * columns // programs)
