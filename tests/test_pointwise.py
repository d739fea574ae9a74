"""The 1x1 convolution, forward, against float64: prologue, product, moments; many small tiles."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from blocks import (  # noqa: F401
    HALVES,
    INTERPRETED,
    PRECISE,
    bn_module,
    nchw,
    nhwc,
    norm_data,
    norm_vectors,
    normal,
    shrink,
)
from parity import assert_parity

from fastmbconv import reference
from fastmbconv.fused import stages
from fastmbconv.kernels import pointwise, pool, project_backward

SMALL = dict(BM=16, BK=16, BO=16)
STREAMED = dict(RESIDENT=0, **SMALL)
HALF = (torch.float16, torch.bfloat16)


class Row(NamedTuple):
    image: tuple[int, int, int, int]  # N, C, H, W
    out: int
    activation: str | None = None  # of the prologue; None for no prologue
    gate: bool = False
    tiles: dict[str, int] = {}
    group: int | None = None


ROWS = {
    "plain": Row((2, 8, 3, 5), 24),
    "one-channel": Row((2, 1, 3, 3), 1, "silu", gate=True),
    "odd-channels": Row((3, 3, 5, 2), 7, "silu"),
    "one-pixel": Row((2, 5, 1, 1), 3, "relu6", gate=True),
    "gate": Row((3, 24, 2, 3), 8, "silu", gate=True),
    "no-activation": Row((3, 24, 2, 3), 8, "none", gate=True),
    "tiled": Row((3, 40, 5, 3), 24, "silu", gate=True, tiles=SMALL),
    "tiled-exactly": Row((2, 32, 4, 4), 16, tiles=SMALL),
    "tiles-per-program": Row((5, 20, 3, 5), 17, "relu", gate=True, tiles=SMALL, group=2),
    "images-in-a-tile": Row((5, 40, 3, 3), 24, "silu", gate=True, tiles=STREAMED, group=1),
    "more-images-in-a-tile-than-vectors": Row((7, 40, 1, 2), 24, "silu", gate=True, tiles=STREAMED, group=1),
    "streamed-tiles-per-program": Row((3, 40, 5, 7), 17, "relu", gate=True, tiles=STREAMED, group=3),
    "streamed-without-a-prologue": Row((2, 40, 4, 4), 17, tiles=STREAMED, group=2),
    "blocks-of-inputs": Row((2, 90, 5, 3), 17, "silu", tiles=SMALL | dict(BK=64)),
    "more-tiles-per-program-than-tiles": Row((1, 20, 3, 5), 17, tiles=SMALL, group=3),
}
KERNELS = {"gate", "tiles-per-program", "images-in-a-tile", "streamed-tiles-per-program"}


def rows(names=None):
    return [
        pytest.param(ROWS[name], id=name, marks=[pytest.mark.kernels] if name in KERNELS else [])
        for name in names or ROWS
    ]


def arguments(row, dtype, device):
    n, c, h, w = row.image
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        x=normal(*row.image, dtype=dtype, device=device),
        weight=normal(row.out, c, 1, 1, dtype=dtype, device=device),
        norm=None if row.activation is None else norm_vectors(c, dtype, device),
        gate=normal(n, c, dtype=wide, device=device).sigmoid() if row.gate else None,
    )


def eager_forward(x, weight, norm, gate, activation):
    if norm is not None:
        scale, shift = norm[2:, :, None, None].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        x = reference.ACTIVATIONS[activation]((x * scale + shift).to(x.dtype))
    if gate is not None:
        x = x * gate[..., None, None].to(x.dtype)
    u = F.conv2d(x, weight)
    wide = u.double()
    rstd = (wide.var((0, 2, 3), unbiased=False) + 1e-3).rsqrt()
    return {"u": u, "mean": wide.mean((0, 2, 3)), "rstd": rstd}


def forward(x, weight, norm, gate, activation):
    u, out = stages.pointwise_bn(nhwc(x), weight, norm, gate, activation, norm_data())
    return {"u": nchw(u), "mean": out[0], "rstd": out[1]}


def assert_forward(row, dtype, device):
    given = arguments(row, dtype, device)
    activation = row.activation or "none"
    exact = {k: None if v is None else v.double() for k, v in given.items()}
    theirs, truth = (eager_forward(**a, activation=activation) for a in (given, exact))
    for name, value in forward(**given, activation=activation).items():
        assert_parity(name, value, theirs[name], truth[name])


@pytest.mark.parametrize("row", rows())
def test_forward_and_moments(row, device, monkeypatch):
    shrink(monkeypatch, row.group, **row.tiles)
    assert_forward(row, PRECISE, device)


@pytest.mark.parametrize("row", rows(["plain", "gate", "no-activation", "tiles-per-program"]))
def test_product_by_the_library(row, device, monkeypatch):
    monkeypatch.setattr(pointwise, "form_tiles", lambda *_: dict(LIBRARY=1))
    shrink(monkeypatch, row.group, **row.tiles)
    assert_forward(row, PRECISE, device)


def test_forms_by_shape():
    """B0's and B4's at their batches of 128 and 64: a product by the library costs launches, three or four for one."""

    def library(batch, side, reduce, out, vectors, dtype=torch.bfloat16):
        return pointwise.form_tiles(batch * side**2, reduce, out, vectors, dtype)["LIBRARY"]

    assert not library(128, 7, 1152, 192, 3) and library(128, 7, 1152, 320, 3)
    assert library(64, 12, 1632, 272, 3) and library(64, 12, 448, 2688, 0)
    assert not library(64, 12, 272, 1632, 0) and not library(64, 24, 672, 112, 3)
    assert not library(1, 12, 1632, 272, 3)
    assert INTERPRETED or not library(64, 12, 1632, 272, 3, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_narrow_types(dtype, device, monkeypatch):
    shrink(monkeypatch, 2, **SMALL)
    assert_forward(ROWS["tiled"], dtype, device)


@pytest.mark.parametrize("dtype", [PRECISE, *HALVES])
@pytest.mark.parametrize("row", rows(["plain", "one-pixel", "tiled-exactly", "more-tiles-per-program-than-tiles"]))
def test_statistics_of_an_output_that_is_not_kept(row, dtype, device, monkeypatch):
    """They are those of the walk that computes it again, before rounding: of half precision to fp32's digits."""
    shrink(monkeypatch, row.group, **row.tiles)
    given = arguments(row, dtype, device)
    x, weight = given["x"], given["weight"]
    wide = torch.float32 if dtype in HALF else dtype
    theirs, truth = (eager_forward(x.to(to), weight.to(to), None, None, "none") for to in (wide, torch.float64))
    norm = stages.expand_norm(nhwc(x), weight, norm_data())
    for name, value in {"mean": norm[0], "rstd": norm[1]}.items():
        assert_parity(name, value, theirs[name], truth[name])


def test_statistics_of_a_large_mean_do_not_cancel(device, monkeypatch):
    """Mean 1000, std 1 in every tile, tiles merged within and between programs."""
    shrink(monkeypatch, 2, **SMALL)
    x = normal(5, 3, 5, 3, dtype=torch.float32, device=device, mean=1000.0)
    weight = torch.eye(3, device=device)[..., None, None]
    _, norm = stages.pointwise_bn(nhwc(x), weight, None, None, "none", norm_data(eps=1e-9))
    truth = x.double()
    torch.testing.assert_close(norm[0].double(), truth.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(norm[1].double(), truth.var((0, 2, 3), unbiased=False).rsqrt(), rtol=1e-5, atol=0)


def test_running_statistics_move_as_batch_norm_moves_them(device):
    x = normal(3, 8, 2, 3, dtype=torch.float32, device=device)
    weight = normal(5, 8, 1, 1, dtype=torch.float32, device=device)
    bn = bn_module(5, torch.float32, device)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    described = norm_data(bn.weight, bn.bias, (mean, var, bn.num_batches_tracked), bn.eps)
    stages.pointwise_bn(nhwc(x), weight, None, None, "none", described)
    bn(F.conv2d(x, weight))
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var, bn.running_var)


def test_grids_of_the_largest_images_are_launchable(monkeypatch):
    """B7's first stages at 600 px, batch 256: CUDA ends every axis but the first at 65535."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda **kwargs: None

    for module, name in (
        (pointwise, "_pointwise_kernel"),
        (pool, "_pool_kernel"),
        *((project_backward, f"_project_bwd_{part}_kernel") for part in ("sums", "data")),
    ):
        monkeypatch.setattr(module, name, Kernel())
    monkeypatch.setattr(pointwise, "product_tiles", lambda *_: dict(RESIDENT=0, BM=64, BK=32, BO=32, STAGES=3))
    small, large = (torch.empty(256, 300, 300, c, dtype=torch.bfloat16, device="meta") for c in (32, 192))
    weight = torch.empty(32, 192, 1, 1, device="meta")
    pointwise.pointwise_fwd(large, weight, None, None, "none", False)
    pointwise.pointwise_fwd(large, weight, None, None, "none", True)
    norm, gate = torch.empty(4, 192, device="meta"), torch.empty(256, 192, device="meta")
    pool.pool(large, norm, None, "silu")
    project_backward.project_bwd_sums(None, small, weight, large, norm, gate, "silu")
    project_backward.project_bwd_data(None, small, weight, large, norm, norm, gate, gate, "silu", True)
    assert len(grids) == 5
    assert all(size <= 65535 for grid in grids for size in grid[1:])
