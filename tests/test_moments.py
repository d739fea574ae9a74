"""Moments of an image: over parts and tiles that its shape doesn't divide, far from zero."""

import pytest
import torch
from blocks import HALVES, PRECISE, nhwc, normal

from fastmbconv.kernels import batch_norm, moments


@pytest.mark.parametrize("dtype", [PRECISE, *HALVES])
@pytest.mark.parametrize("group", [1, pytest.param(3, marks=pytest.mark.kernels)])
def test_moments(dtype, group, device, monkeypatch):
    monkeypatch.setattr(moments, "row_tiles", lambda *_: dict(BM=4, BC=16))
    monkeypatch.setattr(moments, "groups", lambda *_: group)
    u = normal(3, 20, 3, 5, dtype=dtype, device=device, mean=30.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = batch_norm.bn_finalize(moments.moments(nhwc(u)), None, None, None, None, None, 1e-5, 0.1, False, dtype, 20)
    exact = u.double()
    torch.testing.assert_close(norm[0], exact.mean((0, 2, 3)).to(wide))
    torch.testing.assert_close(norm[1], (exact.var((0, 2, 3), unbiased=False) + 1e-5).rsqrt().to(wide))
