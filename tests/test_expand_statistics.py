"""Moments of the expand convolution's output from x alone: against the output itself."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from blocks import HALVES, PRECISE, nhwc, normal
from parity import assert_parity

from fastmbconv.kernels.expand_statistics import expand_statistics


def moments(x, weight):
    u = F.conv2d(x, weight).transpose(0, 1).flatten(1)
    mean = u.mean(1)
    return torch.stack((torch.full_like(mean, u.shape[1]), mean, (u - mean[:, None]).square().sum(1)))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "image, expanded, mean",
    [((2, 4, 3, 5), 24, 0.0), ((1, 1, 1, 2), 3, 0.0), ((3, 20, 10, 11), 40, 0.0), ((3, 5, 4, 4), 20, 100.0)],
    ids=["plain", "two-values", "several-blocks", "large-mean"],
)
def test_moments(image, expanded, mean, device, monkeypatch):
    module = import_module("fastmbconv.kernels.expand_statistics")
    monkeypatch.setattr(module, "pow2", lambda size, low, high: low)
    x = normal(*image, dtype=PRECISE, device=device, mean=mean)
    weight = normal(expanded, image[1], 1, 1, dtype=PRECISE, device=device)
    truth = moments(x.double(), weight.double())
    for ours, eager, exact in zip(expand_statistics(nhwc(x), weight)[0], moments(x, weight), truth, strict=True):
        assert_parity("moments", ours, eager, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_moments_of_half_precision(dtype, device):
    x = normal(4, 24, 5, 5, dtype=dtype, device=device, mean=3.0)
    weight = normal(40, 24, 1, 1, dtype=dtype, device=device)
    ours = expand_statistics(nhwc(x), weight)[0]
    for value, eager, exact in zip(ours, moments(x, weight), moments(x.double(), weight.double()), strict=True):
        assert_parity("moments", value.to(dtype), eager, exact)
