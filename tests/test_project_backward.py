"""Backward behind the project convolution, in both forms: against plain products and against autograd."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from blocks import HALVES, PRECISE, nchw, nhwc, norm_vectors, normal, shrink
from parity import assert_parity

from fastmbconv import reference
from fastmbconv.call import NormSettings
from fastmbconv.fused import stages
from fastmbconv.kernels import batch_norm, project_backward


class Row(NamedTuple):
    image: tuple[int, int, int, int]  # N, C, H, W
    out: int
    activation: str = "silu"
    gate: bool = True
    keep: bool = False
    resident: bool = True  # the weight in shared memory; else products by the library
    small: bool = False  # tiles of 16


ROWS = {
    "plain": Row((2, 8, 3, 5), 5),
    "one-of-everything": Row((1, 1, 1, 1), 1),
    "no-gate": Row((3, 7, 2, 3), 4, "relu6", gate=False, keep=True),
    "relu": Row((3, 7, 2, 3), 4, "relu", keep=True),
    "tiled": Row((2, 40, 5, 5), 24, small=True),
    "tiled-exactly": Row((2, 16, 4, 4), 32, keep=True, small=True),
    "tiled-no-gate": Row((2, 20, 3, 6), 17, gate=False, small=True),
    "products": Row((2, 8, 3, 5), 5, resident=False),
    "products-one-of-everything": Row((1, 1, 1, 1), 1, resident=False),
    "products-no-gate": Row((3, 7, 2, 3), 4, "relu6", gate=False, keep=True, resident=False),
    "products-tiled": Row((3, 40, 5, 5), 70, keep=True, resident=False, small=True),
}
KERNELS = {"relu", "tiled", "tiled-no-gate", "products-tiled"}


def rows(names=None):
    return [
        pytest.param(ROWS[name], id=name, marks=[pytest.mark.kernels] if name in KERNELS else [])
        for name in names or ROWS
    ]


def shrunk(monkeypatch, row):
    monkeypatch.setattr(project_backward, "form_tiles", lambda *shape: dict(RESIDENT=int(row.resident)))
    if row.small:
        shrink(monkeypatch, BM=16, BO=16, BC=16)


def arguments(row, dtype, device):
    n, c, h, w = row.image
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        dy=normal(n, row.out, h, w, dtype=dtype, device=device),
        u3=normal(n, row.out, h, w, dtype=dtype, device=device),
        coef=normal(4, row.out, dtype=wide, device=device),
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
    p, q, r, mean = coef[..., None, None]
    kept = dy.to(wide) if keep is None else dy.to(wide) * keep[:, None, None, None]
    du3 = (p * kept + q * (u3.to(wide) - mean) + r).to(kind)
    v = (u2.to(wide) * norm[2, :, None, None] + norm[3, :, None, None]).requires_grad_()
    a = reference.ACTIVATIONS[activation](v)
    xhat = (u2.to(wide) - norm[0, :, None, None]) * norm[1, :, None, None]
    slope = torch.autograd.grad(a.sum(), v)[0]
    a, slope_xhat, slope = (t.detach().to(kind) for t in (a, slope * xhat, slope))  # what eager stores, it rounds
    gated = a if gate is None else (a * gate[..., None, None]).to(kind)
    da = F.conv_transpose2d(du3, weight).to(wide)
    sums = [da * slope, da * slope_xhat]
    if gate is not None:
        sums.append(da * a)
    sums = torch.stack([s.sum((2, 3)) for s in sums], 1)
    return {"sums": sums, "da": da.to(kind), "dw": torch.nn.grad.conv2d_weight(gated, weight.shape, du3)}


def assert_row(row, dtype, device):
    given = arguments(row, dtype, device)
    theirs = plain(given, row.activation)
    truth = plain({k: None if v is None else v.double() for k, v in given.items()}, row.activation)
    dy, u3, u2 = (nhwc(given[k]) for k in ("dy", "u3", "u2"))
    weight, norm, gate = given["weight"], given["norm"], given["gate"]
    du3 = batch_norm.bn_act_bwd(dy, u3, None, given["coef"], given["keep"], "none")
    assert project_backward.is_resident(u2, weight) == row.resident
    da3 = None if row.resident else project_backward.multiply_weight(du3, weight)
    sums = project_backward.project_bwd_sums(da3, du3, weight, u2, norm, gate, row.activation).sum(0)
    for i in range(sums.shape[1]):
        assert_parity(f"sum {i}", sums[:, i], theirs["sums"][:, i], truth["sums"][:, i])
    coef2, offset = normal(4, u2.shape[3], dtype=norm.dtype, device=device), None
    if row.gate:
        offset = normal(*gate.shape, dtype=norm.dtype, device=device)
    rest = (weight, u2, norm, coef2, gate, offset, row.activation)
    none, nothing = project_backward.project_bwd_data(None if da3 is None else da3.clone(), du3, *rest, False)
    du2, dw = project_backward.project_bwd_data(da3, du3, *rest, True)
    assert nothing is None and torch.equal(none, du2)
    assert_parity("dw", dw, theirs["dw"], truth["dw"])
    wide = [None if t is None else t.double() for t in (coef2, gate, offset)]
    assert_parity("du2", nchw(du2), *(data(given, made["da"], *wide, row.activation) for made in (theirs, truth)))


def data(given, da, coef, gate, offset, activation):
    """du2 by its definition, from da3 [N, C, H, W] as it was stored."""
    u2, norm = given["u2"].double(), given["norm"].double()
    v = (u2 * norm[2, :, None, None] + norm[3, :, None, None]).requires_grad_()
    slope = torch.autograd.grad(reference.ACTIVATIONS[activation](v).sum(), v)[0]
    p, q, r, mean = coef[..., None, None]
    da = da.double() if gate is None else da.double() * gate[..., None, None] + offset[..., None, None]
    return (p * da * slope + q * (u2 - mean) + r).to(da.dtype)


@pytest.mark.parametrize("row", rows())
def test_sums_and_gradients(row, device, monkeypatch):
    shrunk(monkeypatch, row)
    assert_row(row, PRECISE, device)


@pytest.mark.parametrize("name", ["tiled", "products-tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_narrow_types(dtype, name, device, monkeypatch):
    shrunk(monkeypatch, ROWS[name])
    assert_row(ROWS[name], dtype, device)


def test_large_images_of_few_outputs_keep_the_weight(device):
    def resident(size, out, dtype=torch.bfloat16):
        u2 = torch.empty(1, size, size, 8, dtype=dtype, device=device)
        return project_backward.is_resident(u2, torch.empty(out, 8, 1, 1, device=device))

    assert resident(23, 64) and not resident(22, 64) and not resident(23, 65)


PROJECT = {
    "gate": Row((2, 7, 2, 3), 4),
    "no-gate": Row((2, 7, 2, 3), 4, gate=False),
    "tiled": Row((3, 20, 3, 6), 17, keep=True, small=True),
    "products": Row((3, 20, 3, 6), 17, keep=True, small=True, resident=False),
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
    p, q, o, centre = given["coef"].double()[..., None, None]
    kept = given["dy"].double() * (1 if row.keep is False else given["keep"].double()[:, None, None, None])
    F.conv2d(gated, weight).backward(p * kept + q * (given["u3"].double() - centre) + o)

    rstd = (var + 1e-3).rsqrt()
    norm = torch.stack((mean, rstd, slope * rstd, bias - mean * slope * rstd)).to(wide)
    v = (x.detach() * norm[2, :, None, None] + norm[3, :, None, None]).requires_grad_()
    act_slope = torch.autograd.grad(F.silu(v).sum(), v)[0]
    xhat = (x.detach() - mean[:, None, None]) * rstd[:, None, None]
    act_sums = torch.stack([t.sum((2, 3)) for t in (act_slope, act_slope * xhat)], 1)
    excited = halves = None
    if row.gate:
        gate, pooled, r = (t.detach().to(wide).flatten(1) for t in (gate, pooled, r))
        excited = stages.Excite(pooled, act_sums.to(wide), r, gate)
        halves = stages.ExciteWeights(reduce_w.to(PRECISE), None, expand_w.to(PRECISE), None)
    du2, dw, grads, d_excite = stages.project_backward_from(
        nhwc(given["dy"]), nhwc(given["u3"]), None, "none", given["coef"], given["keep"], given["weight"],
        nhwc(given["u2"]), norm, excited, halves, "silu", "silu", "sigmoid",
        NormSettings(1e-3, 0.1, batch, True, None), True,
    )  # fmt: skip
    ours = [du2.permute(0, 3, 1, 2), dw, grads[0], grads[1]] + (list(d_excite) if row.gate else [])
    names = ("du2", "dw", "dslope", "dbias", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
    for name, value, leaf in zip(names, ours, leaves, strict=False):
        torch.testing.assert_close(
            value.double().reshape(leaf.shape), leaf.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
