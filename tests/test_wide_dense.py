"""Dense blocks with everything that the libraries' own leave out: other activations and gates, biases."""

import copy

import pytest
import torch
from blocks import FLOATS, PRECISE, Drop, assert_outcomes, batch_norms, normal, outcome, randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from wide_blocks import GATES, beside_weights

import fastmbconv
from fastmbconv import dense, dispatch, functional, reference
from fastmbconv.block import BatchNorm, DenseBlock, SqueezeExcite
from fastmbconv.mbconv import ACTIVATIONS

ROWS = {
    "hardswish": dict(activations=("hardswish", "none"), se=("relu", "hardsigmoid")),
    "activation-at-the-end": dict(activations=("gelu", "gelu_tanh"), se=None),
    "linear-squeeze": dict(activations=("gelu_tanh", "none"), se=("gelu", "sigmoid"), linear=True),
    "biases": dict(activations=("silu", "hardswish"), se=None, biases=True),
    "biases-alone": dict(activations=("silu", "none"), se=None, biases=True, projects=False),
}


class WideDense(nn.Module):
    """Its own layers in `forward_eager`, a `DenseBlock` in `describe`; the bias of the dense convolution is its own."""

    def __init__(self, channels, activations, se, linear=False, biases=False, projects=True):
        super().__init__()
        hidden = 3 * channels if projects else channels
        self.conv, self.bn1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=biases), nn.BatchNorm2d(hidden)
        self.activations, self.se, self.linear, self.projects = activations, se, linear, projects
        self.acts = nn.ModuleList(ACTIVATIONS[activation]() for activation in activations)
        if se is not None:
            layer = nn.Linear if linear else lambda *sizes: nn.Conv2d(*sizes, 1)
            self.squeeze, self.excite = layer(hidden, 3), layer(3, hidden)
            self.se_act, self.gate = ACTIVATIONS[se[0]](), GATES[se[1]]()
        if projects:
            self.project, self.bn2 = nn.Conv2d(hidden, channels, 1, bias=biases), nn.BatchNorm2d(channels)
        self.drop_path = Drop()

    def forward_eager(self, x):
        h = self.acts[0](self.bn1(self.conv(x)))
        if self.se is not None:
            pooled = h.mean((2, 3)) if self.linear else h.mean((2, 3), keepdim=True)
            gate = self.gate(self.excite(self.se_act(self.squeeze(pooled))))
            h = h * (gate[:, :, None, None] if self.linear else gate)
        if self.projects:
            h = self.acts[1](self.bn2(self.project(h)))
        return (self.drop_path(h) if self.training else h) + x

    def describe(self):
        se = None
        if self.se is not None:
            tensors = (self.squeeze.weight, self.squeeze.bias, self.excite.weight, self.excite.bias)
            se = SqueezeExcite(*tensors, *self.se)
        return DenseBlock(
            conv=self.conv,
            weight=self.conv.weight,
            stride=1,
            padding=1,
            bn1=BatchNorm.of(self.bn1),
            se=se,
            project_weight=self.project.weight if self.projects else None,
            bn2=BatchNorm.of(self.bn2, self.project.bias) if self.projects else None,
            activation=self.activations[0],
            residual=True,
            drop=self.drop_path if self.training else None,
            project_activation=self.activations[1],
        )

    def forward(self, x):
        with fastmbconv.backend("triton"):
            return dense.dense_mbconv(x, self.describe())


def build(name, dtype, device, channels=6, training=True):
    module = randomise(WideDense(channels, **ROWS[name]).double()).to(dtype).to(device).train(training)
    for bn in batch_norms(module):
        bn.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return module, *(normal(3, channels, 5, 4, dtype=dtype, device=device) for _ in range(2))


def assert_agrees(module, x, dy):
    eager, truth = copy.deepcopy(module), copy.deepcopy(module).double()
    theirs = outcome(eager, eager.forward_eager, x, dy)
    exact = outcome(truth, truth.forward_eager, x.double(), dy.double())
    assert_outcomes(*map(beside_weights, (outcome(module, module, x, dy), theirs, exact)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ROWS)
def test_gradients(name, training, device):
    assert_agrees(*build(name, PRECISE, device, training=training))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["hardswish", "biases", "activation-at-the-end"])
def test_narrow_types(name, dtype, device):
    torch.manual_seed(2)  # as in test_wide_blocks.py
    assert_agrees(*build(name, dtype, device, channels=24))


@pytest.mark.parametrize("name", ROWS)
def test_inference_and_the_reference(name, device):
    module, x, _ = build(name, PRECISE, device, training=False)
    with torch.no_grad():
        expected = module.forward_eager(x)
        torch.testing.assert_close(reference.dense_mbconv(x, module.describe()), expected)
        torch.testing.assert_close(module(x), expected)


def test_a_linear_squeeze_counts_as_a_convolution(device, triton_backend):
    module, x, dy = build("linear-squeeze", torch.float32, device)
    se = module.describe().se
    u, flops = normal(3, 18, 5, 4, dtype=torch.float32, device=device).requires_grad_(), []
    for function in (functional.squeeze_excite, reference.squeeze_excite):
        with FlopCounterMode(display=False) as counter:
            function(u, se).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_an_unknown_activation_at_the_end_is_named(device):
    module, *_ = build("hardswish", torch.float32, device)
    module.activations = ("silu", "mish")
    assert dispatch.block_reason(module.describe()).startswith("activation 'mish' after the projection")
