"""Issued instructions per element: each kernel's loops and elements, from its launch, and the budgets they are held to.

MODELS is the one table of loops, for `benchmarks.static` and `benchmarks.simulate`. A kernel has a function there, from
the launch's arguments by name, its constexprs and "grid" among them, to its elements (0 for a kernel of vectors) and to
its loops in the source's order, with their trips: `_one(Loop(trips, inner))`, or a Path with its share of the programs
for each side of a branch on the program's number. `fixed` is a loop over constexprs alone, which the compiler may
unroll; `guarded` the share of a loop's rounds that run an `if` in it. Loops of tl.static_range are none. Where a figure
is missing, or the simulator says `fits: no`, loops and code did not match.

`per_element` is what all threads of a launch issue, idle lanes and rows, prologue and epilogue included, over the
elements of the launch's own work: outputs of a forward convolution, inputs of a depthwise backward, elements of u2 for
the projection's backward, of dv1 for the expansion's, and elements read for pool and BatchNorm's passes.
`in_loop` leaves all but the walk's loop out: what the image's size can't change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from typing import Any

from benchmarks.sass import Code, Loop, Path

Arguments = dict[str, Any]
Model = Callable[[Arguments], tuple[int, tuple[Path, ...]]]


def _depthwise_fwd(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    columns = -(-a["K"] // a["S"])
    first = min(a["PL"] // a["S"], columns - 1)
    rounds = a["WO"] + columns - 1 - first
    inside = a["WO"] * a["HO"] / (rounds * ceil(a["HO"] / a["R"]) * a["R"])
    return a["N"] * a["HO"] * a["WO"] * a["C"], _one(Loop(rounds, fixed=True, guarded=inside))


def _depthwise_bwd(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    rounds = ceil(a["W"] / a["S"])
    strips = ceil(a["H"] / a["R"])
    inside = a["W"] * a["H"] / (rounds * a["S"] * strips * a["R"])
    return a["N"] * a["H"] * a["W"] * a["C"], _one(Loop(rounds, fixed=True, guarded=inside))


def _depthwise_inference(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    if a["SPANS"] == 1:
        return _depthwise_fwd(a)
    rounds = a["SPAN"] - 1 + -(-a["K"] // a["S"])
    inside = a["WO"] * a["HO"] / (rounds * a["SPANS"] * ceil(a["HO"] / a["R"]) * a["R"])
    return a["N"] * a["HO"] * a["WO"] * a["C"], _one(Loop(rounds, fixed=True, guarded=inside))


def _pointwise(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    tiles = ceil(a["PIXELS"] / a["BM"])
    blocks = Loop(ceil(a["CI"] / a["BK"]), fixed=True)
    resident = Loop(tiles, guarded=1 / tiles if a["HAS_MOMENTS"] else 1.0)
    return a["N"] * a["HW"] * a["CO"], _one(*([resident] if a["RESIDENT"] else [blocks] * a["TILES"]))


def _project_bwd(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    return a["N"] * a["HW"] * a["CI"], _one(Loop(ceil(a["PIXELS"] / a["BM"])))


def _pointwise_pool(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    products = Loop(ceil(a["CI"] / a["BK"]), fixed=True)
    images = a["grid"][0] // ceil(a["CO"] / a["BO"])
    return images * a["HW"] * a["CO"], _one(Loop(ceil(a["HW"] / a["BM"]), (products,)))


def _expand_pass(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    return a["M"] * a["CE"], _one(*[Loop(a["TILES"])] * ceil(a["CE"] / a["SLICE"]))


def _pool(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    return a["N"] * a["HW"] * a["C"], _one(Loop(max(1, min(a["PIXELS"], a["HW"]) // a["BM"])))


def _rows(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    return a["M"] * a["C"], _one(*([Loop(a["TILES"])] if "TILES" in a else []))


def _bn_finalize(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    return 0, _one(*([_over(a, "P", "BP")] if a.get("BATCH", True) else []))


def _bn_bwd_finalize(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    norm, weight = ceil(a["C"] / a["BC"]), ceil(a["WIDTH"] / a["BW"])
    if not weight:
        return 0, _one(_over(a, "P", "BP"))
    rows = ((norm, _over(a, "P", "BP")), (weight, _over(a, "P", "BQ")))
    return 0, tuple(Path(programs / (norm + weight), (loop,)) for programs, loop in rows)


def _excite_fwd(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    channels, sums = _over(a, "C", "BC", fixed=True), 3 if a["ROWS"] == 3 else 1
    return 0, _one(replace(channels, inner=(_over(a, "P", "BP"),) * sums), channels)


def _excite_reduce(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    sums = 3 if a["ROWS"] == 3 else 1
    return 0, _one(Loop(a["P"]), _over(a, "R", "BR", fixed=True), *[Loop(a["P"])] * (sums - 1))


def _excite_expand(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    return 0, _one(_blocks_of_parts(a))


def _excite_finish(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    images, blocks = _over(a, "N", "BN"), _blocks_of_parts(a)
    count = ceil(a["R"] / a["BR"])
    each = 1 / (1 + 2 * count)
    pool = Path(each, (replace(images, inner=(blocks,)),))
    reduce = Path(count * each, (replace(images, inner=(_over(a, "PARTS", "AT_ONCE"),)),))
    expand = Path(count * each, (images,))
    return 0, (pool, expand, reduce) if count == 1 else (pool, reduce, expand)  # the machine code's order


def _blocks_of_parts(a: Arguments) -> Loop:
    """A loop over blocks of reduced channels that adds up the parts of each, or what is left of it for one block."""
    blocks, parts = _over(a, "R", "BR", fixed=True), _over(a, "PARTS", "AT_ONCE")
    return parts if blocks.trips == 1 else replace(blocks, inner=(parts,))


def _straight(a: Arguments) -> tuple[int, tuple[Path, ...]]:
    return 0, _one()


def _over(a: Arguments, size: str, block: str, fixed: bool = False) -> Loop:
    return Loop(ceil(a[size] / a[block]), fixed=fixed)


def _one(*loops: Loop) -> tuple[Path, ...]:
    return (Path(1.0, loops),)


MODELS: dict[str, Model] = {
    "_depthwise_fwd_kernel": _depthwise_fwd,
    "_depthwise_bwd_kernel": _depthwise_bwd,
    "_depthwise_inference_kernel": _depthwise_inference,
    "_pointwise_kernel": _pointwise,
    "_project_bwd_sums_kernel": _project_bwd,
    "_project_bwd_data_kernel": _project_bwd,
    "_pointwise_pool_kernel": _pointwise_pool,
    "_expand_pass_kernel": _expand_pass,
    "_pool_kernel": _pool,
    "_moments_kernel": _rows,
    "_bn_act_fwd_kernel": _rows,
    "_bn_act_bwd_reduce_kernel": _rows,
    "_bn_act_bwd_kernel": _rows,
    "_bn_finalize_kernel": _bn_finalize,
    "_bn_merge_kernel": _bn_finalize,
    "_bn_bwd_finalize_kernel": _bn_bwd_finalize,
    "_bn_coef_kernel": _straight,
    "_excite_fwd_kernel": _excite_fwd,
    "_excite_reduce_kernel": _excite_reduce,
    "_excite_expand_kernel": _excite_expand,
    "_excite_bwd_kernel": _excite_reduce,
    "_excite_finish_kernel": _excite_finish,
}

# A stride-1 walk in bf16 on sm_90 with BatchNorm, SiLU and sums issues no more in its loop, per element that a round
# finishes, by (kernel, kernel size).
BUDGETS = {
    ("_depthwise_fwd_kernel", 3): 28,
    ("_depthwise_fwd_kernel", 5): 50,
    ("_depthwise_bwd_kernel", 3): 55,
    ("_depthwise_bwd_kernel", 5): 95,
}
# What an H200 issues in the time of the kernel's passes over E, 14.4 each (benchmarks/NOTES.md): more is issue-bound.
AIMS = {
    "_project_bwd_sums_kernel": 19,
    "_project_bwd_data_kernel": 34,
    "_expand_pass_kernel": 22,
    "_pool_kernel": 14,
}


def budget(kernel: str, arguments: Arguments, arch: int) -> float | None:
    """The limit of `in_loop`, or None where nothing is held."""
    a = arguments
    if (kernel, a.get("K")) not in BUDGETS or arch != 90:
        return None
    walked = a["S"] == 1 and a["HAS_NORM"] and a.get("HAS_MOMENTS", True) and not a["EXPAND"]
    return BUDGETS[kernel, a["K"]] if walked and a["FAST"] and a["ACT"] == "silu" else None


def in_loop(kernel: str, arguments: Arguments, code: Code, threads: int) -> float | None:
    """Of a depthwise walk: what one round of its loop issues per element that the round finishes, every lane in use."""
    a = arguments
    if not kernel.startswith("_depthwise"):
        return None
    columns = a["S"] if "bwd" in kernel else 1
    body = max((code.body(cycle) for cycle in code.innermost), key=len, default=[])
    return len(body) * threads / (columns * a["R"] * a["NB"] * a["BC"]) if body else None


def per_element(kernel: str, arguments: Arguments, code: Code, threads: int) -> float | None:
    """What a launch issues per element of its work; None for a kernel of vectors, or where the loops don't fit."""
    if kernel not in MODELS:
        return None
    elements, paths = MODELS[kernel](arguments)
    issued = code.issued(paths)
    return None if issued is None or not elements else issued * threads * prod(arguments["grid"]) / elements
