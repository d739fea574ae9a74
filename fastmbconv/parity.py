"""The parity rule: error against float64 <= 2x eager's in the same dtype, plus a small atol per dtype.

Errors are relative L2 norms. The table below is the only place with tolerances; nothing scales it.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FACTOR = 2.0


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, in float64; the absolute error where truth is zero."""
    truth = truth.detach().double()
    norm = truth.norm()
    error = (value.detach().double() - truth).norm()
    return float(error / norm) if norm > 0 else float(error)


def limit(eager_error: float, dtype: torch.dtype) -> float:
    """The largest error that the rule allows where eager's is `eager_error`."""
    return FACTOR * eager_error + ATOL[dtype]


def assert_parity(name: str, fused: Tensor, eager: Tensor, truth: Tensor) -> float:
    """Raise if `fused` breaks the rule; the ratio of the two errors otherwise."""
    assert fused.shape == truth.shape, f"{name}: shape {tuple(fused.shape)}, expected {tuple(truth.shape)}"
    ours, theirs = relative_error(fused, truth), relative_error(eager, truth)
    allowed = limit(theirs, fused.dtype)
    assert ours <= allowed, f"{name}: error {ours:.2e}, eager's {theirs:.2e}, limit {allowed:.2e}"
    return ours / theirs if theirs > 0 else float(ours > 0)
