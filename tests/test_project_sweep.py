"""The backward sweep: per-image sums and the project weight's gradient, against plain products and against autograd."""

from importlib import import_module
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from blocks import HALVES, PRECISE, nhwc, norm_vectors, normal, shrink
from parity import assert_parity

from fastmbconv import ops, reference
from fastmbconv.kernels.project_sweep import project_sweep


class Row(NamedTuple):
    image: tuple[int, int, int, int]  # N, C, H, W
    out: int
    activation: str = "silu"
    gate: bool = True
    keep: bool = False
    small: bool = False  # tiles of 16
    images: int | None = None  # per program
    wide: int | None = None  # the form for many outputs, in tiles of 16 and so many of them a program


ROWS = {
    "plain": Row((2, 8, 3, 5), 5),
    "one-of-everything": Row((1, 1, 1, 1), 1),
    "no-gate": Row((3, 7, 2, 3), 4, "relu6", gate=False, keep=True),
    "keep": Row((3, 7, 2, 3), 4, "relu", keep=True),
    "tiled": Row((2, 40, 5, 5), 24, small=True),
    "tiled-exactly": Row((2, 16, 4, 4), 32, keep=True, small=True),
    "tiled-no-gate": Row((2, 20, 3, 6), 17, gate=False, small=True),
    "images-per-program": Row((3, 20, 2, 3), 17, keep=True, small=True, images=2),
    "images-per-program-no-gate": Row((5, 4, 2, 3), 3, gate=False, images=2),
    "wide": Row((2, 8, 5, 7), 70, keep=True),
    "wide-one-part": Row((3, 20, 4, 5), 40, keep=True, wide=3),
    "wide-parts": Row((3, 20, 3, 7), 40, "relu6", wide=1),
    "wide-no-gate": Row((2, 16, 4, 4), 32, gate=False, keep=True, wide=2),
    "wide-more-images-than-columns": Row((18, 3, 4, 4), 5, wide=1),
    "wide-images-per-program": Row((5, 7, 3, 7), 17, "relu", keep=True, wide=2, images=2),
}
KERNELS = {"keep", "tiled-no-gate", "images-per-program", "wide-images-per-program"}


def rows(names=None):
    return [
        pytest.param(ROWS[name], id=name, marks=[pytest.mark.kernels] if name in KERNELS else [])
        for name in names or ROWS
    ]


def shrunk(monkeypatch, row):
    if row.wide is not None:
        sweep, wide = (import_module(f"fastmbconv.kernels.project_{name}") for name in ("sweep", "wide"))
        sizes = dict(BM=16, BO=16, BC=16, TILES=row.wide)
        monkeypatch.setattr(sweep, "takes", lambda *args: True)
        monkeypatch.setattr(sweep, "wide_tiles", lambda pixels, out, channels, dtype: sizes)
        monkeypatch.setattr(wide, "group_of", lambda *args: row.images or 16)
    if row.small:
        shrink(monkeypatch, BM=16, BK=16, BO=16, BC=16)
        module = import_module("fastmbconv.kernels.project_sweep")
        if hasattr(module, "pow2"):
            monkeypatch.setattr(module, "pow2", lambda size, low, high: low)
    if row.images is not None:
        module = import_module("fastmbconv.kernels.project_sweep")
        monkeypatch.setattr(module, "groups", lambda *args, **kwargs: row.images)


def arguments(row, dtype, device):
    n, c, h, w = row.image
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        dy=normal(n, row.out, h, w, dtype=dtype, device=device),
        u3=normal(n, row.out, h, w, dtype=dtype, device=device),
        coef=normal(3, row.out, dtype=wide, device=device),
        keep=(torch.arange(n, device=device) % 2 * 2).to(wide) if row.keep else None,
        weight=normal(row.out, c, 1, 1, dtype=dtype, device=device),
        u2=normal(*row.image, dtype=dtype, device=device),
        norm=norm_vectors(c, dtype, device),
        gate=normal(n, c, dtype=wide, device=device).sigmoid() if row.gate else None,
    )


def plain(given, activation):
    """The definition, one product after the other."""
    dy, u3, coef, keep, weight, u2, norm, gate = given.values()
    kind, wide = u2.dtype, norm.dtype
    p, q, r = coef[..., None, None]
    kept = dy.to(wide) if keep is None else dy.to(wide) * keep[:, None, None, None]
    du3 = (p * kept + q * u3.to(wide) + r).to(kind)
    v = (u2.to(wide) * norm[2, :, None, None] + norm[3, :, None, None]).requires_grad_()
    a = reference.ACTIVATIONS[activation](v)
    xhat = (u2.to(wide) - norm[0, :, None, None]) * norm[1, :, None, None]
    slope = torch.autograd.grad(a.sum(), v)[0]
    a, slope_xhat, slope = (t.detach().to(kind) for t in (a, slope * xhat, slope))  # what eager stores, it rounds
    gated = a if gate is None else (a * gate[..., None, None]).to(kind)
    da = F.conv_transpose2d(du3, weight).to(wide)
    sums = [da * slope, da * slope_xhat]
    if gate is not None:
        sums += [da * a, slope.to(wide), slope_xhat.to(wide)]
    sums = torch.stack([s.sum((2, 3)) for s in sums], 1)
    return {"sums": sums, "dw": torch.nn.grad.conv2d_weight(gated, weight.shape, du3)}


def assert_row(row, dtype, device):
    given = arguments(row, dtype, device)
    images = {"dy", "u3", "u2"}
    sums, dw = project_sweep(**{k: nhwc(v) if k in images else v for k, v in given.items()}, activation=row.activation)
    theirs = plain(given, row.activation)
    truth = plain({k: None if v is None else v.double() for k, v in given.items()}, row.activation)
    whole = torch.cat((sums[:, :, :3].sum(0), sums[0, :, 3:]), 1)  # rows 3 and 4 don't depend on the outputs
    for i in range(whole.shape[1]):
        assert_parity(f"sum {i}", whole[:, i], theirs["sums"][:, i], truth["sums"][:, i])
    assert_parity("dw", dw, theirs["dw"], truth["dw"])


@pytest.mark.parametrize("row", rows())
def test_sums_and_weight_gradient(row, device, monkeypatch):
    shrunk(monkeypatch, row)
    assert_row(row, PRECISE, device)


@pytest.mark.parametrize("name", ["tiled", "wide-one-part"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_narrow_types(dtype, name, device, monkeypatch):
    shrunk(monkeypatch, ROWS[name])
    assert_row(ROWS[name], dtype, device)


PROJECT = {
    "gate": Row((2, 7, 2, 3), 4),
    "no-gate": Row((2, 7, 2, 3), 4, gate=False),
    "tiled": Row((3, 20, 3, 3), 17, keep=True, small=True),
}


@pytest.mark.parametrize("batch", [pytest.param(True, id="batch"), pytest.param(False, id="running")])
@pytest.mark.parametrize("row", [pytest.param(v, id=k) for k, v in PROJECT.items()])
def test_backward_to_the_depthwise_output(row, batch, device, monkeypatch):
    """du2 and every gradient on the way, against autograd through BN, activation, SE and the product."""
    shrunk(monkeypatch, row)
    n, c, h, w = row.image
    given = arguments(row, PRECISE, device)
    wide = given["norm"].dtype
    reduced = 3
    reduce_w, expand_w = normal(reduced, c, 1, 1, device=device), normal(c, reduced, 1, 1, device=device)
    reduce_b, expand_b = normal(reduced, device=device), normal(c, device=device)
    slope, bias = normal(c, device=device), normal(c, device=device)
    u2 = given["u2"].double()
    mean, var = (u2.mean((0, 2, 3)), u2.var((0, 2, 3), unbiased=False)) if batch else (slope.cos(), slope.exp())
    leaves = [t.clone().requires_grad_() for t in (u2, given["weight"].double(), slope, bias, reduce_w, reduce_b,
                                                   expand_w, expand_b)]  # fmt: skip
    x, weight, s, b, *excite = leaves
    running = (None, None) if batch else (mean, var)
    a = F.silu(F.batch_norm(x, *running, s, b, batch, 0.0, 1e-3))
    pooled = a.mean((2, 3), keepdim=True)
    r = F.conv2d(pooled, excite[0], excite[1])
    gate = torch.sigmoid(F.conv2d(F.silu(r), excite[2], excite[3]))
    gated = a * gate if row.gate else a
    p, q, o = given["coef"].double()[..., None, None]
    kept = given["dy"].double() * (1 if row.keep is False else given["keep"].double()[:, None, None, None])
    F.conv2d(gated, weight).backward(p * kept + q * given["u3"].double() + o)

    rstd = (var + 1e-3).rsqrt()
    norm = torch.stack((mean, rstd, slope * rstd, bias - mean * slope * rstd)).to(wide)
    se = [t.detach().to(wide).flatten(1) for t in (gate, pooled, r)] if row.gate else [None] * 3
    halves = [reduce_w.to(PRECISE), expand_w.to(PRECISE)] if row.gate else [None] * 2
    du2, dw, grads, *d_excite = ops.project_bwd(
        nhwc(given["dy"]), nhwc(given["u3"]), given["coef"], given["keep"], given["weight"], nhwc(given["u2"]), norm,
        *se, *halves, "silu", "silu", batch,
    )  # fmt: skip
    ours = [du2.permute(0, 3, 1, 2), dw, grads[0], grads[1]] + (d_excite if row.gate else [])
    names = ("du2", "dw", "dslope", "dbias", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
    for name, value, leaf in zip(names, ours, leaves, strict=False):
        torch.testing.assert_close(
            value.double().reshape(leaf.shape), leaf.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
