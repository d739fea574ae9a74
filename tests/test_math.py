"""The scalar functions of the kernels, at the values where they could break."""

import pytest
import torch
import triton
import triton.language as tl
from blocks import INTERPRETED

from fastmbconv import reference
from fastmbconv.kernels.math import activate, activate_grad, gate_of, gate_slope, stored
from fastmbconv.kernels.tuning import pow2

pytestmark = pytest.mark.kernels


@triton.jit
def _activate_kernel(v_ptr, a_ptr, both_ptr, slope_ptr, ACT: tl.constexpr, FAST: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    v = tl.load(v_ptr + o)
    both, slope = activate_grad(v, ACT, FAST)
    tl.store(a_ptr + o, activate(v, ACT, FAST))
    tl.store(both_ptr + o, both)
    tl.store(slope_ptr + o, slope)


@triton.jit
def _stored_kernel(v_ptr, out_ptr, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out_ptr + o, stored(tl.load(v_ptr + o), out_ptr.dtype.element_ty))


VALUES = [
    0.0, -0.0, 1.0, -1.0, 6.0, 5.9999995, 6.0000005, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 200.0, -200.0, 3e38,
    3.0, -3.0, 2.9999998, -2.9999998, 3.0000002, -3.0000002, 0.5, -0.5, 2.0, -2.0, 5.0, -5.0, 9.0, -9.0, 1e18, -1e18,
]  # fmt: skip


@pytest.mark.parametrize("fast", [pytest.param(False, id="exact"), pytest.param(True, id="tanh")])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_and_its_derivative(activation, fast, device):
    if fast and INTERPRETED:
        pytest.skip("inline assembly needs a GPU")
    v = torch.tensor(VALUES, device=device)
    a, both, slope = (torch.empty_like(v) for _ in range(3))
    _activate_kernel[(1,)](v, a, both, slope, ACT=activation, FAST=fast, B=len(VALUES))
    leaf = v.double().requires_grad_()
    expected = reference.ACTIVATIONS[activation](leaf)
    (derivative,) = torch.autograd.grad(expected.sum(), leaf)
    if activation == "gelu_tanh":  # its derivative squares, in eager's fp32 too
        assert slope[v == 3e38].isnan()
        derivative[v == 3e38] = slope[v == 3e38] = 1.0
    tolerance = dict(rtol=1e-3, atol=1e-3) if fast else dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.double(), expected.detach(), **tolerance)
    torch.testing.assert_close(both, a, **tolerance)
    torch.testing.assert_close(slope.double(), derivative, **tolerance)


@triton.jit
def _exact_tanh(v):
    return 2.0 / (1.0 + tl.exp(-2.0 * v)) - 1.0


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_what_the_fast_forms_approximate(activation, device, monkeypatch):
    """With tanh exact: what is left is a fit's error, a tenth of what `tanh.approx` may add."""
    if not INTERPRETED:
        pytest.skip("only the interpreter looks up tanh at each call")
    monkeypatch.setattr("fastmbconv.kernels.math.tanh", _exact_tanh)
    v = torch.linspace(-30, 30, 4096, device=device)
    a, both, slope = (torch.empty_like(v) for _ in range(3))
    _activate_kernel[(1,)](v, a, both, slope, ACT=activation, FAST=True, B=len(v))
    leaf = v.double().requires_grad_()
    expected = reference.ACTIVATIONS[activation](leaf)
    (derivative,) = torch.autograd.grad(expected.sum(), leaf)
    assert ((a - expected).abs() <= 2.5e-5 * v.abs() + 1e-6).all()
    assert ((both - expected).abs() <= 2.5e-5 * v.abs() + 1e-6).all()
    torch.testing.assert_close(slope.double(), derivative, rtol=0, atol=2.5e-5)


NAN, INF = float("nan"), float("inf")
# Derivatives at NaN, inf, -inf, as torch computes them on a GPU, but that hardswish's NaN is NaN as on a CPU; its
# vectorised relu6 on a CPU has 0 at NaN.
SLOPES = {
    "silu": [NAN, NAN, NAN], "relu": [1.0, 1.0, 0.0], "relu6": [1.0, 0.0, 0.0], "none": [1.0, 1.0, 1.0],
    "hardswish": [NAN, 1.0, 0.0], "gelu": [NAN, NAN, NAN], "gelu_tanh": [NAN, NAN, NAN],
}  # fmt: skip


@pytest.mark.parametrize("fast", [pytest.param(False, id="exact"), pytest.param(True, id="tanh")])
@pytest.mark.parametrize("activation", SLOPES)
def test_activation_of_what_is_no_number(activation, fast, device):
    if fast and INTERPRETED:
        pytest.skip("inline assembly needs a GPU")
    v = torch.tensor([NAN, INF, -INF, 0.0], device=device)
    a, both, slope = (torch.empty_like(v) for _ in range(3))
    _activate_kernel[(1,)](v, a, both, slope, ACT=activation, FAST=fast, B=len(v))
    expected = reference.ACTIVATIONS[activation](v.double()).to(v)  # a CPU's vectorised gelu has NaN at inf
    torch.testing.assert_close(a, expected, equal_nan=True)
    torch.testing.assert_close(both, expected, equal_nan=True)
    torch.testing.assert_close(slope[:3].tolist(), SLOPES[activation], equal_nan=True)


@triton.jit
def _gate_kernel(q_ptr, gate_ptr, slope_ptr, GATE: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    gate = gate_of(tl.load(q_ptr + o), GATE)
    tl.store(gate_ptr + o, gate)
    tl.store(slope_ptr + o, gate_slope(gate, GATE))


@pytest.mark.parametrize("name", reference.GATES)
def test_gate_and_its_derivative_from_its_value(name, device):
    """NaN stays NaN in the derivative too, where eager's hard sigmoid has 0."""
    q = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0, -3.0, 3.5, -3.5, 20.0, -20.0, 200.0, -200.0, INF, -INF, 0.3, NAN])
    q = q.to(device)
    gate, slope = torch.empty_like(q), torch.empty_like(q)
    _gate_kernel[(1,)](q, gate, slope, GATE=name, B=len(q))
    leaf = q.double().requires_grad_()
    expected = reference.GATES[name](leaf)
    (derivative,) = torch.autograd.grad(expected.sum(), leaf)
    derivative[-1] = NAN
    torch.testing.assert_close(gate.double(), expected.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(slope.double(), derivative, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stores_keep_nan(dtype, device):
    """Whatever its other bits are: a GPU's own has them all set."""
    bits = [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000, -0x7FFFFF, 0x7F808000, 0x7FBFFFFF]
    v = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)
    out = torch.zeros(len(v), dtype=dtype, device=device)
    _stored_kernel[(1,)](v, out, B=len(v))
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stores_round_to_nearest_even(dtype, device):
    """Ties, the largest values and fp16's subnormals, as torch's own cast rounds them."""
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 3.3895e38]
    v = torch.tensor([*ties, 1e-4, -1e-7, 0.1, -0.1, 0.0, -0.0, float("inf"), 1.0], device=device)
    out = torch.empty(len(v), dtype=dtype, device=device)
    _stored_kernel[(1,)](v, out, B=len(v))
    assert torch.equal(out, v.to(dtype))


@pytest.mark.parametrize(
    "size, low, high, expected", [(1, 1, 8, 1), (3, 1, 8, 4), (9, 1, 8, 8), (1, 16, 64, 16), (64, 16, 64, 64)]
)
def test_powers_of_two(size, low, high, expected):
    assert pow2(size, low, high) == expected
