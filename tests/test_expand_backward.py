"""Backward of the expand convolution and its BatchNorm, in each form: against autograd through both."""

import inspect
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from blocks import HALVES, PRECISE, nchw, nhwc, normal, shrink
from parity import assert_parity

from fastmbconv.kernels import expand_backward, tuning
from fastmbconv.kernels.launching import written


class Row(NamedTuple):
    image: tuple[int, int, int, int]  # N, C, H, W
    expanded: int
    batch: bool = True
    residual: bool = False
    resident: bool = True  # the weight in shared memory; else products by the library
    small: bool = False  # tiles of 16
    slice: int = 1024  # expanded channels
    kept: bool = True  # u1 is there
    values: str = "normal"  # how x is drawn


ROWS = {
    "plain": Row((2, 4, 3, 5), 24),
    "one-channel": Row((2, 1, 2, 2), 3, residual=True),
    "two-values": Row((2, 3, 1, 1), 6),
    "frozen": Row((2, 4, 3, 5), 24, batch=False, residual=True),
    "tiled": Row((3, 20, 3, 5), 40, residual=True, small=True),
    "tiled-exactly": Row((2, 16, 4, 4), 32, small=True),
    "tiled-frozen": Row((3, 20, 3, 5), 17, batch=False, small=True),
    "slices": Row((3, 20, 3, 5), 40, residual=True, small=True, slice=16),
    "slices-of-blocks": Row((3, 20, 3, 5), 104, residual=True, slice=64),
    "slices-frozen": Row((3, 20, 3, 5), 56, batch=False, small=True, slice=32),
    "products": Row((3, 20, 3, 5), 40, residual=True, resident=False, small=True),
    "products-frozen": Row((2, 4, 3, 5), 24, batch=False, resident=False),
    "products-lean": Row((2, 4, 3, 5), 24, resident=False, kept=False),
    "products-lean-frozen": Row((2, 4, 3, 5), 24, batch=False, resident=False, kept=False),
}
KERNELS = {"tiled", "frozen", "slices", "products"}
FAR = [  # what a sum about one pivot, or about none, loses digits at
    Row((4, 8, 6, 6), 32, resident=resident, values=values)
    for resident in (True, False)
    for values in ("outlying image", "outlying pixel", "outlying channel", "large mean", "almost constant channel")
]


def rows(names=None):
    return [
        pytest.param(ROWS[name], id=name, marks=[pytest.mark.kernels] if name in KERNELS else [])
        for name in names or ROWS
    ]


def shrunk(monkeypatch, row):
    monkeypatch.setattr(expand_backward, "form_tiles", lambda *shape: dict(RESIDENT=int(row.resident)))
    shrink(monkeypatch, SLICE=row.slice, **(dict(BM=16, BE=16, BC=16) if row.small else {}))


def drawn(row, dtype, device):
    """x, [N, C, H, W]."""
    x = normal(*row.image)
    match row.values:
        case "outlying image":
            x = x * 0.01 + 1
            x[0] = 1000
        case "outlying pixel":
            x[0, :, 0, 0] = 1e4
        case "outlying channel":
            x[:, 0] *= 1e3
        case "large mean":
            x += 100
        case "almost constant channel":
            x[:, 0] = 7 + x[:, 0] * 1e-3
    return x.to(dtype).to(device)


def assert_row(row, dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, c, h, w = row.image
    x = drawn(row, dtype, device)
    residual = normal(*row.image, dtype=dtype, device=device) if row.residual else None
    weight = normal(row.expanded, c, 1, 1, dtype=dtype, device=device)
    dv = normal(n, row.expanded, h, w, dtype=dtype, device=device)
    slope = normal(row.expanded, device=device)
    exact = F.conv2d(x.double(), weight.double())
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), unbiased=False)
    if not row.batch:
        mean, var = mean + 1.0, var * 2.0

    def eager(kind):
        a, b = x.to(kind).detach().requires_grad_(), weight.to(kind).detach().requires_grad_()
        stats = (None, None) if row.batch else (mean.to(kind), var.to(kind))
        F.batch_norm(F.conv2d(a, b), *stats, slope.to(kind), None, row.batch, 0.0, 1e-3).backward(dv.to(kind))
        return {"dx": a.grad if residual is None else a.grad + residual.to(kind), "dw": b.grad}

    rstd = (var + 1e-3).rsqrt()
    xhat = (exact - mean[:, None, None]) * rstd[:, None, None]
    d_slope, d_bias = (dv.double() * xhat).sum((0, 2, 3)), dv.double().sum((0, 2, 3))
    p, count = slope * rstd, n * h * w
    q = -p * rstd * d_slope / count if row.batch else torch.zeros_like(p)
    r = -p * d_bias / count if row.batch else torch.zeros_like(p)
    coef = torch.stack((p, q, r, mean)).to(wide)
    u1 = nhwc(F.conv2d(x, weight)) if row.kept else None
    dx, dw = expand_backward.expand_bwd(
        nhwc(dv), u1, nhwc(x), weight, coef, None if residual is None else nhwc(residual), row.batch
    )
    theirs, truth = eager(dtype), eager(torch.float64)
    assert_parity("dx", nchw(dx), theirs["dx"], truth["dx"])
    assert_parity("dw", dw, theirs["dw"], truth["dw"])


@pytest.mark.parametrize("row", rows())
def test_both_gradients(row, device, monkeypatch):
    shrunk(monkeypatch, row)
    assert_row(row, PRECISE, device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("row", rows(["tiled", "slices", "products"]))
def test_narrow_types(row, dtype, device, monkeypatch):
    shrunk(monkeypatch, row)
    assert_row(row, dtype, device)


@pytest.mark.parametrize("row", FAR, ids=lambda row: f"{row.values}{'' if row.resident else ', products'}")
def test_values_far_from_each_other(row, device, monkeypatch):
    shrunk(monkeypatch, row)
    assert_row(row, torch.float32, device)


def test_what_lies_behind_the_last_pixel_adds_nothing(device):
    """There u1 is 0 and its distance from a mean of 100 large: 1e5 is infinite in fp16."""
    x = torch.full((1, 1, 3, 16), 100.0, dtype=torch.float16, device=device)  # of a tile of 16 pixels
    weight = torch.eye(16, dtype=torch.float16, device=device)[..., None, None]
    p, q, r, mean = torch.zeros(4, 16, device=device)
    coef = torch.stack((p, q + 1e3, r, mean + 100))
    dx, dw = expand_backward.expand_bwd(torch.zeros_like(x), x, x, weight, coef, None, True)
    assert not dx.any() and not dw.any()


def fixed(images):
    """What the kernels of a batch of images are compiled for, apart from pointers and sizes."""
    x, dv = (torch.empty(images, 112, 112, channels, dtype=torch.bfloat16, device="meta") for channels in (16, 96))
    with written() as launches:
        expand_backward.expand_bwd(
            dv, dv, x, torch.empty(96, 16, 1, 1, device="meta"), torch.empty(3, 96, device="meta"), None, True
        )
    return [
        {name: one.arguments[name] for name, p in signature.items() if p.annotation is tl.constexpr}
        for one in launches
        for signature in [inspect.signature(one.function.fn).parameters]
    ]


def test_batches_of_other_sizes_compile_nothing_anew(monkeypatch):
    for module in (tuning, expand_backward):
        monkeypatch.setattr(module, "INTERPRETED", tl.constexpr(False))
    assert fixed(128) == fixed(144)
