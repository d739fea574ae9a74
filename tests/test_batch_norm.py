"""BatchNorm's second stage and its elementwise passes against float64 and against nn.BatchNorm2d."""

import pytest
import torch
from blocks import HALVES, PRECISE, bn_module, nchw, nhwc, norm_vectors, normal, shrink
from parity import assert_parity

from fastmbconv import reference
from fastmbconv.call import NormSettings
from fastmbconv.fused import stages
from fastmbconv.kernels import batch_norm

ACC = torch.float64 if torch.float64 == PRECISE else torch.float32


def moments(values, sizes):
    """Partial moments [P, 3, C] of consecutive pieces of `values` [M, C]; a piece may be empty."""
    parts = []
    for piece in values.split(sizes):
        count = torch.full_like(values[0], len(piece))
        mean = piece.mean(0) if len(piece) else torch.zeros_like(values[0])
        parts.append(torch.stack((count, mean, ((piece - mean) ** 2).sum(0))))
    return torch.stack(parts)


FINALIZE = {
    "update": (5, [7, 3, 1], {}),
    "one-channel": (1, [2, 2], {}),
    "uneven-and-empty-parts": (3, [1, 0, 9, 0], {}),
    "cumulative": (5, [4, 4], dict(momentum=None)),
    "momentum-1": (5, [4, 4], dict(momentum=1.0)),
    "momentum-0": (5, [4, 4], dict(momentum=0.0)),
    "no-affine": (5, [4, 4], dict(affine=False)),
    "no-running-statistics": (5, [4, 4], dict(track_running_stats=False)),
    "large-eps": (5, [4, 4], dict(eps=1.0)),
    "channel-blocks": (70, [3, 5], {}),
    "part-blocks": (3, [1] * 131, {}),
}
KERNELS = {"update", "cumulative", "channel-blocks", "part-blocks"}


@pytest.mark.parametrize(
    "channels, sizes, options",
    [pytest.param(*v, id=k, marks=[pytest.mark.kernels] if k in KERNELS else []) for k, v in FINALIZE.items()],
)
def test_finalize_does_what_batch_norm_does(channels, sizes, options, device):
    values = normal(sum(sizes), channels, dtype=PRECISE, device=device, mean=3.0)
    bn = bn_module(channels, ACC, device, **options)
    before = [None if b is None else b.clone() for b in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]
    if before[2] is not None:
        bn.num_batches_tracked.fill_(4)
        before[2].fill_(5)  # functional counts the batch before the kernels read it
    norm = batch_norm.bn_finalize(
        moments(values, sizes).to(ACC), bn.weight, bn.bias, *before, bn.eps, bn.momentum, bn.running_mean is not None,
        PRECISE, channels,
    )  # fmt: skip
    y = bn(values[..., None, None])[..., 0, 0]
    torch.testing.assert_close(values * norm[2] + norm[3], y.to(ACC))
    torch.testing.assert_close(norm[0], values.mean(0).to(ACC))
    torch.testing.assert_close(norm[1], (values.var(0, unbiased=False) + bn.eps).rsqrt().to(ACC))
    if before[0] is not None:
        torch.testing.assert_close(before[0], bn.running_mean)
        torch.testing.assert_close(before[1], bn.running_var)
        assert before[2] == bn.num_batches_tracked


@pytest.mark.parametrize("channels, affine", [pytest.param(3, True, id="affine"), pytest.param(40, False, id="plain")])
def test_finalize_from_running_statistics(channels, affine, device):
    bn = bn_module(channels, ACC, device, affine=affine).eval()
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    norm = batch_norm.bn_finalize(
        None, bn.weight, bn.bias, bn.running_mean, bn.running_var, None, bn.eps, 0.1, False, PRECISE, channels
    )
    x = normal(3, channels, 2, 2, dtype=ACC, device=device)
    torch.testing.assert_close(x * norm[2, :, None, None] + norm[3, :, None, None], bn(x))
    assert torch.equal(mean, bn.running_mean) and torch.equal(var, bn.running_var)


@pytest.mark.parametrize("dtype", HALVES)
def test_finalize_takes_half_parameters(dtype, device):
    """A model in half precision has its BatchNorms' parameters and statistics in half precision too."""
    values = normal(6, 5, dtype=torch.float32, device=device)
    bn = bn_module(5, dtype, device)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    norm = batch_norm.bn_finalize(
        moments(values, [2, 4]), bn.weight, bn.bias, mean, var, bn.num_batches_tracked, bn.eps, 0.1, True, dtype, 5
    )
    assert norm.dtype == torch.float32 and norm.isfinite().all()
    exact_mean = 0.9 * bn.running_mean.double() + 0.1 * values.double().mean(0)
    exact_var = 0.9 * bn.running_var.double() + 0.1 * values.double().var(0)
    assert torch.equal(mean, exact_mean.to(dtype)) and torch.equal(var, exact_var.to(dtype))


MANY = {
    "one-row-a-step": (5, 37, dict(BP=1, BC=4)),
    "steps-and-blocks-cut": (11, 300, dict(BP=32, BC=4)),
    "one-step": (3, 128, dict(BP=128)),
    "thousands": (2, 3001, dict(BP=128, BC=1)),
}


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize(
    "channels, parts, tiles",
    [
        pytest.param(*v, id=k, marks=[pytest.mark.kernels] if k == "steps-and-blocks-cut" else [])
        for k, v in MANY.items()
    ],
)
def test_finalize_of_many_parts_with_a_common_mean(channels, parts, tiles, mean, device, monkeypatch):
    """Parts of one to four values: what their means have in common takes no digits of the variance."""
    shrink(monkeypatch, **tiles)
    sizes = [1 + part % 4 for part in range(parts)]
    values = normal(sum(sizes), channels, dtype=torch.float32, device=device, mean=mean)
    partials = moments(values.double(), sizes).float()
    norm = batch_norm.bn_finalize(partials, None, None, None, None, None, 1e-9, 0.1, False, torch.float32, channels)
    again = batch_norm.bn_finalize(partials, None, None, None, None, None, 1e-9, 0.1, False, torch.float32, channels)
    assert torch.equal(norm, again)
    for name, ours, one in (
        ("mean", norm[0], lambda v: v.mean(0)),
        ("var", norm[1] ** -2, lambda v: v.var(0, unbiased=False)),
    ):
        assert_parity(name, ours, one(values), one(values.double()))


BWD_FINALIZE = {
    "no-weight": (11, 37, None, {}),
    "weight-of-one-block": (5, 3, (5, 1, 3, 3), {}),
    "blocks-and-steps-cut": (11, 37, (11, 1, 3, 3), dict(BP=8, BC=4, BQ=16, BW=8)),
    "thousands": (2, 3001, (2, 1, 5, 5), dict(BP=128, BC=1, BQ=32, BW=16)),
}


@pytest.mark.parametrize(
    "channels, parts, shape, tiles",
    [pytest.param(*v, id=k, marks=[pytest.mark.kernels] if "cut" in k else []) for k, v in BWD_FINALIZE.items()],
)
def test_backward_finalize_adds_a_weights_gradient_too(channels, parts, shape, tiles, device, monkeypatch):
    shrink(monkeypatch, **tiles)
    sums = normal(parts, 2, channels, dtype=torch.float32, device=device, mean=0.5)
    dw = None if shape is None else normal(parts, *shape, dtype=torch.float32, device=device, mean=0.5)
    norm = norm_vectors(channels, torch.float32, device)
    grads, coef, d_weight = batch_norm.bn_bwd_finalize(sums, norm, 7 * parts, True, dw)
    assert_parity("dweight", grads[0], sums[:, 1].sum(0), sums[:, 1].double().sum(0))
    assert_parity("dbias", grads[1], sums[:, 0].sum(0), sums[:, 0].double().sum(0))
    q, r = (-norm[2] * k * g / (7 * parts) for k, g in ((norm[1], grads[0]), (1.0, grads[1])))
    torch.testing.assert_close(coef, torch.stack((norm[2], q, r, norm[0])))
    if dw is None:
        assert d_weight is None
    else:
        assert_parity("d_weight", d_weight, dw.sum(0), dw.double().sum(0))


def pieces(image, dtype, device, gate, keep, residual):
    n, c, h, w = image
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        gate=normal(n, c, dtype=wide, device=device) if gate else None,
        keep=(torch.arange(n, device=device) % 2 * 2).to(wide) if keep else None,
        residual=normal(*image, dtype=dtype, device=device) if residual else None,
    )


ELEMENTWISE = {
    "normalise": ((2, 3, 3, 5), "none", True, {}, {}),
    "silu": ((2, 8, 3, 5), "silu", True, {}, {}),
    "gate-alone": ((3, 7, 2, 2), "none", False, dict(gate=True), {}),
    "everything": ((3, 24, 1, 5), "relu6", True, dict(gate=True, keep=True, residual=True), {}),
    "one-value": ((1, 1, 1, 1), "relu", True, dict(keep=True, residual=True), {}),
    "tiled": ((3, 20, 3, 3), "silu", True, dict(gate=True, keep=True, residual=True), dict(BM=4, BC=16)),
}


@pytest.mark.parametrize("dtype", [PRECISE, *HALVES])
@pytest.mark.parametrize(
    "image, activation, has_norm, parts, tiles", [pytest.param(*v, id=k) for k, v in ELEMENTWISE.items()]
)
def test_elementwise_pass(image, activation, has_norm, parts, tiles, dtype, device, monkeypatch):
    shrink(monkeypatch, **tiles)
    u = normal(*image, dtype=dtype, device=device)
    norm = norm_vectors(image[1], dtype, device) if has_norm else None
    extra = pieces(image, dtype, device, **{"gate": False, "keep": False, "residual": False, **parts})

    def eager(kind):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        v = u.to(wide)
        if norm is not None:
            v = v * norm[2, :, None, None].to(wide) + norm[3, :, None, None].to(wide)
        v = reference.ACTIVATIONS[activation](v.to(kind))
        v = v if extra["gate"] is None else v * extra["gate"][..., None, None].to(kind)
        v = v if extra["keep"] is None else v * extra["keep"][:, None, None, None].to(kind)
        return v if extra["residual"] is None else v + extra["residual"].to(kind)

    residual = None if extra["residual"] is None else nhwc(extra["residual"])
    y = batch_norm.bn_act_fwd(nhwc(u), norm, extra["gate"], None, extra["keep"], residual, activation)
    assert_parity("y", nchw(y), eager(dtype), eager(torch.float64))


BACKWARD = {
    "batch-statistics": ((2, 3, 3, 5), "silu", True, False, {}, None),
    "running-statistics": ((2, 8, 3, 5), "silu", False, False, {}, None),
    "keep": ((3, 24, 1, 5), "none", True, True, {}, None),
    "two-values": ((2, 1, 1, 1), "none", True, False, {}, None),
    "tiled": ((3, 20, 3, 3), "relu6", True, True, dict(BM=4, BC=16), 2),
    "tiles-without-rows": ((1, 3, 1, 5), "relu", True, True, dict(BM=2), 4),
}


@pytest.mark.parametrize("dtype", [PRECISE, *HALVES])
@pytest.mark.parametrize(
    "image, activation, batch, has_keep, tiles, group",
    [pytest.param(*v, id=k, marks=[pytest.mark.kernels] if k == "tiled" else []) for k, v in BACKWARD.items()],
)
def test_backward(image, activation, batch, has_keep, tiles, group, dtype, device, monkeypatch):
    """The two sums, and du, against autograd through BatchNorm with the same statistics."""
    shrink(monkeypatch, group, **tiles)
    n, c, h, w = image
    u, dy = (normal(*image, dtype=dtype, device=device) for _ in range(2))
    keep = pieces(image, dtype, device, False, has_keep, False)["keep"]
    weight, bias = normal(c, device=device), normal(c, device=device)
    mean, var = (u.double().mean((0, 2, 3)), u.double().var((0, 2, 3), unbiased=False) + 1e-3) if batch else (
        normal(c, device=device), normal(c, device=device).exp()
    )  # fmt: skip
    norm = torch.stack((mean, var.rsqrt(), weight * var.rsqrt(), bias - mean * weight * var.rsqrt()))
    norm = norm.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def eager(kind):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        x, g, b = (t.to(k).detach().requires_grad_() for t, k in ((u, kind), (weight, wide), (bias, wide)))
        xhat = torch.nn.functional.batch_norm(
            x, None if batch else mean.to(wide), None if batch else (var - 1e-3).to(wide), g, b, batch, 0.0, 1e-3
        )
        y = reference.ACTIVATIONS[activation](xhat)
        y = y if keep is None else y * keep[:, None, None, None].to(kind)
        y.backward(dy.to(kind))
        return {"du": x.grad, "dweight": g.grad, "dbias": b.grad}

    settings = NormSettings(1e-3, 0.1, batch, True, None)
    grads, coef = stages.bn_backward(nhwc(dy), nhwc(u), norm, keep, activation, settings)
    du = batch_norm.bn_act_bwd(nhwc(dy), nhwc(u), norm, coef, keep, activation)
    theirs, truth = eager(dtype), eager(torch.float64)
    for name, value in {"du": nchw(du), "dweight": grads[0], "dbias": grads[1]}.items():
        assert_parity(name, value, theirs[name], truth[name])
