"""Squeeze-and-excitation, alone: pool, excite and their backward against float64."""

from typing import NamedTuple

import pytest
import torch
from blocks import HALVES, PRECISE, nchw, nhwc, norm_vectors, normal, shrink  # noqa: F401
from parity import assert_parity

from fastmbconv import functional, reference
from fastmbconv.block import SqueezeExcite
from fastmbconv.fused import stages
from fastmbconv.kernels import squeeze_excite as kernels


class Row(NamedTuple):
    image: tuple[int, int, int, int]  # N, C, H, W
    reduced: int
    activation: str = "silu"
    gate: str = "sigmoid"
    linear: bool = False
    tiles: dict[str, int] = {}
    whole_weight: int | None = None  # a larger one takes two launches


ROWS = {
    "plain": Row((2, 8, 3, 5), 4),
    "one-of-everything": Row((1, 1, 1, 1), 1),
    "odd-channels": Row((3, 13, 2, 3), 3, "relu"),
    "relu6": Row((2, 24, 1, 5), 6, "relu6"),
    "wide-reduction": Row((2, 5, 2, 2), 21),
    "reduction-blocks": Row((2, 40, 2, 2), 37),
    "channel-blocks": Row((2, 40, 2, 2), 5, tiles=dict(BC=16)),
    "exact-channel-blocks": Row((2, 32, 2, 2), 16, tiles=dict(BC=16)),
    "pixel-blocks": Row((2, 20, 3, 5), 17, tiles=dict(BC=16, BM=4)),
    "image-blocks": Row((18, 3, 1, 2), 2, tiles=dict(BN=16)),
    "two-launches": Row((2, 13, 2, 3), 5, "relu", whole_weight=0),
    "two-launches-of-blocks": Row((18, 40, 2, 2), 37, tiles=dict(BN=16, BR=16, BC=16), whole_weight=0),
    "two-launches-one-image": Row((1, 20, 3, 5), 17, "relu6", tiles=dict(BC=16, BM=4), whole_weight=0),
    "hard-gate": Row((3, 13, 2, 3), 5, "relu", "hardsigmoid"),
    "two-launches-hard-gate": Row((3, 20, 3, 5), 17, "hardswish", "hardsigmoid", whole_weight=0),
    "linear": Row((3, 13, 2, 3), 5, "gelu", linear=True),
    "two-launches-linear": Row((2, 13, 2, 3), 5, "gelu_tanh", "hardsigmoid", True, whole_weight=0),
    "many-parts": Row((3, 277, 1, 2), 3, tiles=dict(BC=16), whole_weight=0),
}
KERNELS = {"odd-channels", "hard-gate", "pixel-blocks", "two-launches-of-blocks"}


def rows():
    return [
        pytest.param(v, id=k, marks=[pytest.mark.kernels] if k in KERNELS else []) for k, v in ROWS.items()
    ]  # fmt: skip


def excite(channels, reduced, dtype, device):
    weights = (
        normal(reduced, channels, 1, 1), normal(reduced), normal(channels, reduced, 1, 1), normal(channels)
    )  # fmt: skip
    return [w.to(dtype).to(device) for w in weights]


def outcome(function, x, weights, dy, *functions):
    x, *weights = (t.detach().requires_grad_() for t in (x, *weights))
    y = function(x, SqueezeExcite(*weights, *functions))
    y.backward(dy.to(y.dtype))
    names = ("dx", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
    return {"y": y.detach(), **{n: t.grad for n, t in zip(names, (x, *weights), strict=True)}}


def prepare(row, monkeypatch):
    shrink(monkeypatch, **row.tiles)
    if row.whole_weight is not None:
        monkeypatch.setattr(kernels, "WHOLE_WEIGHT", row.whole_weight)


def assert_row(row, dtype, device):
    x, dy = (normal(*row.image, dtype=dtype, device=device) for _ in range(2))
    weights = [
        w.flatten(1) if row.linear and w.dim() == 4 else w for w in excite(row.image[1], row.reduced, dtype, device)
    ]
    functions = row.activation, row.gate
    ours = outcome(functional.squeeze_excite, x, weights, dy, *functions)
    theirs = outcome(reference.squeeze_excite, x, weights, dy, *functions)
    truth = outcome(reference.squeeze_excite, x.double(), [w.double() for w in weights], dy.double(), *functions)
    for name, value in ours.items():
        assert value.dtype == dtype and (name in ("y", "dx") or value.stride() == theirs[name].stride())
        assert_parity(name, value, theirs[name], truth[name])


@pytest.mark.parametrize("row", rows())
def test_both_directions(row, device, triton_backend, monkeypatch):
    prepare(row, monkeypatch)
    assert_row(row, PRECISE, device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", ["odd-channels", "two-launches", "two-launches-linear"])
def test_narrow_types(name, dtype, device, triton_backend, monkeypatch):
    prepare(ROWS[name], monkeypatch)
    assert_row(ROWS[name], dtype, device)


@pytest.mark.parametrize("whole_weight", [0, 60], ids=["two-launches", "one"])
@pytest.mark.parametrize("activation", ["silu", "relu6"])
def test_pool_normalises_and_activates_first(activation, whole_weight, device, monkeypatch):
    """Pixels beyond the image add nothing, though act(shift) is not zero there."""
    shrink(monkeypatch, BM=4, BC=16)
    monkeypatch.setattr(kernels, "WHOLE_WEIGHT", whole_weight)
    u = normal(3, 20, 3, 3, dtype=PRECISE, device=device)
    norm = norm_vectors(20, PRECISE, device)
    weights = excite(20, 3, PRECISE, device)
    pooled, act_sums, r, gate = stages.squeeze_excite(
        nhwc(u), norm, stages.ExciteWeights(*weights), activation, "silu", "sigmoid"
    )
    v = (u * norm[2, :, None, None] + norm[3, :, None, None]).requires_grad_()
    a = reference.ACTIVATIONS[activation](v)
    slope = torch.autograd.grad(a.sum(), v)[0]
    xhat = (u - norm[0, :, None, None]) * norm[1, :, None, None]
    torch.testing.assert_close(act_sums, torch.stack([t.sum((2, 3)) for t in (slope, slope * xhat)], 1))
    truth = a.detach().mean((2, 3))
    torch.testing.assert_close(pooled, truth)
    reduced = truth @ weights[0][..., 0, 0].T + weights[1]
    torch.testing.assert_close(r, reduced)
    torch.testing.assert_close(
        gate, torch.sigmoid(torch.nn.functional.silu(reduced) @ weights[2][..., 0, 0].T + weights[3])
    )


def test_gate_saturates_without_nan(device, triton_backend):
    x = normal(2, 3, 2, 2, dtype=torch.float32, device=device)
    weights = excite(3, 2, torch.float32, device)
    weights[3] = torch.tensor([200.0, -200.0, 0.0], device=device)
    ours = outcome(functional.squeeze_excite, x, weights, torch.ones_like(x), "silu")
    theirs = outcome(reference.squeeze_excite, x, weights, torch.ones_like(x), "silu")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")


def test_a_sum_over_pixels_does_not_overflow_half(device, triton_backend):
    """The pooled mean is a sum in fp32: 40,000 + 40,000 is beyond fp16."""
    x = torch.full((1, 2, 2, 2), 40000.0, dtype=torch.float16, device=device)
    weights = [w.zero_() for w in excite(2, 2, torch.float16, device)]
    y = functional.squeeze_excite(x, SqueezeExcite(*weights))
    assert torch.equal(y, torch.full_like(x, 20000.0))
