"""The depthwise column walk against float64: both directions, every parity of stride and padding, many small tiles."""

from typing import NamedTuple

import pytest
import torch
from blocks import HALVES, PRECISE, nchw, nhwc, norm_data, norm_vectors, normal, shrink
from parity import assert_parity

from fastmbconv import reference
from fastmbconv.block import pads
from fastmbconv.call import Geometry
from fastmbconv.fused import stages
from fastmbconv.kernels import depthwise


class Row(NamedTuple):
    k: int
    stride: int
    padding: int | str | tuple[int, int]
    image: tuple[int, int, int, int]  # N, C, H, W
    activation: str | None = None  # of the prologue; None for no prologue
    residual: bool = False
    tiles: dict[str, int] = {}


ROWS = {
    "k3": Row(3, 1, 1, (2, 8, 5, 4), "silu"),
    "k3-one-pixel": Row(3, 1, 1, (2, 3, 1, 1)),
    "k3-one-pixel-strided": Row(3, 2, 1, (2, 3, 1, 1), "silu"),
    "k3-strided-odd": Row(3, 2, 1, (3, 3, 7, 5), "relu6"),
    "k3-strided-even": Row(3, 2, 1, (2, 8, 6, 4), "silu"),
    "k3-same-even": Row(3, 2, "same", (2, 3, 6, 4), "silu"),
    "k3-same-odd-by-even": Row(3, 2, "same", (2, 3, 7, 4), "relu"),
    "k3-same-stride-1": Row(3, 1, "same", (2, 1, 3, 4)),
    "k3-pair-odd": Row(3, 2, (0, 1), (2, 3, 7, 5), "silu"),
    "k3-unpadded": Row(3, 1, 0, (2, 3, 5, 4), "silu"),
    "k3-unpadded-strided-even": Row(3, 2, 0, (2, 3, 6, 8), "silu"),  # the last row and column feed nothing
    "k3-fully-padded": Row(3, 1, 2, (2, 3, 3, 2), "silu"),  # the output is larger than the input
    "k3-fully-padded-strided": Row(3, 2, 2, (2, 3, 5, 4), "silu"),
    "k5": Row(5, 1, 2, (2, 5, 5, 4), "silu"),
    "k5-larger-than-image": Row(5, 1, 2, (3, 24, 2, 2), "silu"),
    "k5-strided-odd": Row(5, 2, 2, (2, 3, 7, 5), "silu"),
    "k5-strided-even": Row(5, 2, 2, (2, 3, 6, 4)),
    "k5-same-even": Row(5, 2, "same", (2, 3, 6, 4), "silu"),
    "k5-same-odd": Row(5, 2, "same", (1, 8, 5, 3), "relu6"),
    "k5-pair-odd": Row(5, 2, (1, 2), (2, 3, 7, 5), "silu"),
    "k5-unpadded-to-one-pixel": Row(5, 1, 0, (2, 3, 5, 5), "silu"),
    "k5-unpadded-strided": Row(5, 2, 0, (2, 3, 8, 6), "silu"),
    "k5-fully-padded": Row(5, 1, 4, (2, 3, 2, 3), "silu"),
    "k5-fully-padded-strided": Row(5, 2, 4, (2, 3, 3, 4), "silu"),
    "row-of-pixels": Row(3, 1, 1, (2, 3, 1, 9), "silu"),
    "column-of-pixels": Row(5, 1, 2, (2, 3, 9, 1), "silu"),
    "column-of-pixels-strided": Row(3, 2, 1, (2, 3, 9, 1), "silu"),
    "residual": Row(3, 1, 1, (2, 3, 4, 3), None, residual=True),
    "tiled-images": Row(3, 1, 1, (5, 3, 3, 2), "silu", tiles=dict(NB=2)),
    "tiled-channels": Row(3, 1, 1, (2, 40, 3, 2), "silu", tiles=dict(BC=16)),
    "tiled-rows": Row(3, 1, 1, (2, 3, 7, 2), "silu", tiles=dict(R=2)),
    "tiled-single-rows": Row(3, 1, 1, (2, 3, 3, 3), "silu", tiles=dict(R=1)),
    "tiled-rows-k5": Row(5, 1, 2, (2, 3, 7, 3), "silu", tiles=dict(R=2)),
    "tiled-rows-k5-strided": Row(5, 2, "same", (2, 3, 10, 3), "silu", tiles=dict(R=2)),
    "tiled-rows-k3-strided": Row(3, 2, 1, (2, 3, 9, 4), None, residual=True, tiles=dict(R=2)),
    "tiled-rows-unpadded-strided": Row(3, 2, 0, (1, 3, 10, 4), "silu", tiles=dict(R=2)),
    # A program that holds the whole height loads no padding; with rows beyond the image too.
    "one-strip": Row(5, 1, 2, (2, 3, 7, 3), "silu", tiles=dict(R=7)),
    "one-strip-residual": Row(3, 1, 1, (2, 3, 5, 4), None, residual=True, tiles=dict(R=7)),
    "one-strip-strided": Row(5, 2, 2, (2, 3, 7, 5), "silu", tiles=dict(R=8)),
    "one-strip-strided-residual": Row(3, 2, 1, (2, 3, 7, 4), None, residual=True, tiles=dict(R=8)),
    "one-strip-same-strided": Row(5, 2, "same", (2, 3, 8, 4), "silu", tiles=dict(R=8)),
    "one-strip-unpadded-strided": Row(3, 2, 0, (2, 3, 6, 8), "silu", tiles=dict(R=6)),
    "one-strip-fully-padded": Row(5, 1, 4, (2, 3, 3, 3), "silu", tiles=dict(R=8)),
    # Two programs that meet in the middle, the second upside down; and three, of which none is.
    "two-strips": Row(5, 1, 2, (2, 3, 8, 3), "silu", tiles=dict(R=4)),
    "two-strips-odd": Row(5, 1, 2, (3, 3, 7, 3), "silu", tiles=dict(R=4)),
    "two-strips-residual": Row(3, 1, 1, (2, 3, 6, 4), None, residual=True, tiles=dict(R=3)),
    "two-strips-smaller-than-the-kernel": Row(5, 1, 2, (2, 3, 3, 3), "silu", tiles=dict(R=2)),
    "two-strips-fully-padded": Row(3, 1, 2, (2, 3, 6, 4), "silu", tiles=dict(R=4)),
    "two-strips-strided": Row(5, 2, 2, (2, 3, 8, 4), "silu", tiles=dict(R=4)),
    "three-strips": Row(5, 1, 2, (2, 3, 9, 3), "silu", tiles=dict(R=3)),
    "tiled-everywhere": Row(3, 1, 1, (3, 20, 5, 3), "silu", tiles=dict(NB=2, BC=16, R=2)),
    "tiled-everywhere-strided": Row(3, 2, "same", (3, 20, 6, 3), "silu", tiles=dict(NB=2, BC=16, R=2)),
}
KERNELS = {"k3", "k3-same-even", "k5-strided-odd", "k5-unpadded-strided", "tiled-everywhere-strided"}


def rows(names=None):
    marks = {name: [pytest.mark.kernels] if name in KERNELS else [] for name in ROWS}
    return [pytest.param(ROWS[name], id=name, marks=marks[name]) for name in names or ROWS]


def eager(x, weight, norm, residual, dy, row):
    """The same maths in plain PyTorch, in x's dtype with vectors in the accumulator's, as eager BatchNorm has them."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    mean, rstd, scale, shift = norm.to(torch.float64 if x.dtype == torch.float64 else torch.float32)[..., None, None]
    slope = (scale / rstd).requires_grad_()
    bias = (shift + mean * scale).requires_grad_()
    v = x if row.activation is None else (((x - mean) * rstd * slope + bias).to(x.dtype))
    v.retain_grad()
    a = v if row.activation is None else reference.ACTIVATIONS[row.activation](v)
    u = reference.depthwise(a, weight, row.stride, row.padding)
    u.backward(dy.to(u.dtype))
    result = {"u": u.detach(), "dw": weight.grad, "dv": v.grad}
    if row.activation is not None:
        result |= {"dslope": slope.grad.flatten(), "dbias": bias.grad.flatten()}
    if residual is not None:
        result["dv"] = result["dv"] + residual.to(x.dtype)
    wide = u.detach().double()
    result["mean"] = wide.mean((0, 2, 3))
    result["rstd"] = (wide.var((0, 2, 3), unbiased=False) + 1e-3).rsqrt()
    return result


def kernels(x, weight, norm, residual, dy, row):
    k, (_, c, h, w) = row.k, x.shape
    (top, _), (left, _) = (pads(s, k, row.stride, row.padding) for s in (h, w))
    in_norm, activation = (None, "none") if row.activation is None else (norm, row.activation)
    place, bn = Geometry(row.stride, top, left, *dy.shape[2:]), norm_data()
    u, out_norm = stages.depthwise_bn(nhwc(x), None, weight, in_norm, activation, place, bn)
    added = None if residual is None else nhwc(residual)
    dv, dw, grads, coef = stages.depthwise_backward(
        nhwc(dy), nhwc(x), None, weight, in_norm, added, activation, place, bn.settings
    )
    result = {"u": nchw(u), "dw": dw, "dv": nchw(dv), "mean": out_norm[0], "rstd": out_norm[1]}
    torch.testing.assert_close(out_norm[2], out_norm[1], rtol=0, atol=0)
    torch.testing.assert_close(out_norm[3], -out_norm[0] * out_norm[1])
    if row.activation is not None:
        result |= {"dslope": grads[0], "dbias": grads[1]}
        mean, rstd, scale, _ = norm
        count = x.numel() // c
        q = -scale * rstd * grads[0] / count
        torch.testing.assert_close(coef, torch.stack((scale, q, -scale * grads[1] / count, mean)))
    return result


def assert_row(row, dtype, device, mean=0.0):
    n, c, h, w = row.image
    x = normal(*row.image, dtype=dtype, device=device, mean=mean)
    weight = normal(c, 1, row.k, row.k, dtype=dtype, device=device)
    norm = norm_vectors(c, dtype, device)
    out = reference.depthwise(x, weight, row.stride, row.padding).shape
    dy = normal(*out, dtype=dtype, device=device)
    residual = normal(*row.image, dtype=dtype, device=device) if row.residual else None
    ours = kernels(x, weight, norm, residual, dy, row)
    theirs = eager(x, weight, norm, residual, dy, row)
    truth = eager(x.double(), weight.double(), norm, residual, dy.double(), row)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert_parity(name, value, theirs[name], truth[name])


@pytest.mark.parametrize("row", rows())
def test_both_directions(row, device, monkeypatch):
    shrink(monkeypatch, **row.tiles)
    assert_row(row, PRECISE, device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("row", rows(["k3", "k5-same-even", "tiled-everywhere"]))
def test_half_precision(row, dtype, device, monkeypatch):
    shrink(monkeypatch, **row.tiles)
    assert_row(row, dtype, device)


def test_fp32(device):
    assert_row(ROWS["k5-strided-odd"], torch.float32, device)


def test_statistics_of_a_large_mean_do_not_cancel(device, monkeypatch):
    """Mean 1000, std 1: a difference of squares would lose every digit of the variance."""
    shrink(monkeypatch, NB=2, R=2)
    weight = torch.zeros(3, 1, 3, 3, device=device)
    weight[:, :, 1, 1] = 1.0
    x = normal(3, 3, 5, 4, dtype=torch.float32, device=device, mean=1000.0)
    bn = norm_data(eps=1e-9)
    u, norm = stages.depthwise_bn(nhwc(x), None, weight, None, "none", Geometry(1, 1, 1, 5, 4), bn)
    assert torch.equal(nchw(u), x)
    truth = x.double()
    torch.testing.assert_close(norm[0].double(), truth.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(norm[1].double(), truth.var((0, 2, 3), unbiased=False).rsqrt(), rtol=1e-5, atol=0)


def test_sums_of_a_long_row_keep_their_digits(device):
    """Within 3 half-ulps of the summed magnitudes; one chain of additions over a row was 5 off, torch's sum is 1."""
    torch.manual_seed(0)
    x, dy = torch.randn(1, 4, 112, 64, device=device), torch.rand(1, 4, 112, 64, device=device) + 0.5
    taps = torch.zeros(64, 1, 3, 3, device=device)
    taps[:, 0, 1, 1] = torch.rand(64, device=device) + 0.5
    zero, one = torch.zeros(64, device=device), torch.ones(64, device=device)
    norm = torch.stack((zero, one, one, zero))  # xhat is x
    dv, _, sums = depthwise.depthwise_bwd(dy, x, None, taps, norm, None, "none", 1, 1, 1)
    terms = torch.stack((dv.double(), dv.double() * x.double())).flatten(1, 3)
    off = (sums.double().sum(0) - terms.sum(1)).norm(dim=1)
    assert (off <= 3 * 2**-24 * terms.abs().sum(1).norm(dim=1)).all()


def test_nan_stays_in_its_channel(device, monkeypatch):
    """What one channel or image holds reaches no other through a mask or a halo."""
    shrink(monkeypatch, NB=2, BC=16)
    x = normal(3, 20, 4, 3, dtype=torch.float32, device=device)
    weight = normal(20, 1, 3, 3, dtype=torch.float32, device=device)
    x[2, 19, 3, 2] = float("nan")
    u, norm = stages.depthwise_bn(nhwc(x), None, weight, None, "none", Geometry(1, 1, 1, 4, 3), norm_data())
    assert torch.equal(nchw(u).isnan(), reference.depthwise(x, weight, 1, 1).isnan())
    assert norm[:, :19].isfinite().all() and norm[:, 19].isnan().all()
