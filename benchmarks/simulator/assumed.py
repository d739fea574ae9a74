"""What is assumed: how often tensors come from memory, and times of launches whose code is a library's.

Those times are from bytes and operations alone:

* `mm`, a matrix product: 0.85 of memory's bandwidth or 500 TFLOP/s, whichever is slower, and 3 us for everything else,
  the gap to the next kernel too.
* `sum`, `copy` and whatever else torch runs: two thirds of the bandwidth, 2 us at least, and the gap.
"""

from __future__ import annotations

from collections import Counter
from math import prod, sqrt

import torch

from fastmbconv.kernels.traffic import Launch

PRODUCT_BANDWIDTH, PRODUCT_FLOPS, PRODUCT_REST = 0.85, 500e12, 3e-6  # share, per second, seconds
SUM_BANDWIDTH, SUM_LEAST = 2 / 3, 2e-6

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


def count_repeats(tensors: dict[str, int], launch: Launch, kinds: dict[str, Kind]) -> None:
    """Make bytes by argument as often as the launcher states them; those of one kind, which it doesn't name, alike."""
    often = Counter((m.shape, m.dtype) for m in (*launch.reads, *launch.writes))
    alike = Counter(kinds.values())
    for name, kind in kinds.items():
        tensors[name] = int(tensors[name] * max(1.0, often[kind] / alike[kind]))


def assume_seconds(launch: Launch, stated: int, bandwidth: float, gap: float) -> float:
    """The time of a launch of torch's, with what follows it until the next kernel starts."""
    if launch.kernel == "mm":
        return max(stated / (PRODUCT_BANDWIDTH * bandwidth), count_flops(launch) / PRODUCT_FLOPS) + PRODUCT_REST
    return max(stated / (SUM_BANDWIDTH * bandwidth), SUM_LEAST) + gap


def count_flops(launch: Launch) -> float:
    """Of a product [M, K] x [K, N], whose operands are the launch's first two tensors."""
    first, second, result = (prod(t.shape) for t in (*launch.reads[:2], launch.writes[0]))
    return 2 * result * sqrt(first * second / result)
