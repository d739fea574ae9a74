"""The paper's recipe by its formulas: rates, RMSprop as TensorFlow computes it, the average's warm-up."""

import pytest
import torch
from libraries import library

library("timm")

from fastmbconv.training.config import Config  # noqa: E402
from fastmbconv.training.recipe import Average, optimizer_for, rate  # noqa: E402


@pytest.mark.parametrize(
    ("warmup", "steps_per_epoch", "expected"),
    [
        (5.0, 10, {0: 1 / 50, 24: 0.5, 49: 1.0, 50: 0.97**2, 71: 0.97**2, 72: 0.97**3, 3499: 0.97**145}),
        (0.5, 5, {0: 0.4, 1: 0.8, 2: 1.0, 3: 1.0, 11: 1.0, 12: 0.97, 23: 0.97, 24: 0.97**2}),
        (0.0, 7, {0: 1.0, 16: 1.0, 17: 0.97, 33: 0.97, 34: 0.97**2}),
    ],
    ids=["the paper's", "half an epoch", "none"],
)
def test_the_rate_falls_by_3_percent_every_2_4_epochs(warmup, steps_per_epoch, expected):
    config = Config(warmup_epochs=warmup)
    assert {step: pytest.approx(rate(config, 1.0, step, steps_per_epoch)) for step in expected} == expected


def test_rmsprop_is_tensorflows():
    """ms starts at 1, eps is under the root, the rate goes into the momentum; decay pulls at weights, not at biases."""
    layer, config = torch.nn.Linear(2, 2), Config(weight_decay=0.1, momentum=0.9)
    optimizer = optimizer_for(layer, config, 0.01)
    expected, state = {}, {}
    for name, decay in (("weight", 0.1), ("bias", 0.0)):
        value = getattr(layer, name).detach().double()
        ms, momentum = torch.ones_like(value), torch.zeros_like(value)
        for step in range(3):
            gradient = value.new_full(value.shape, step + 1.0) + decay * value
            ms = 0.9 * ms + 0.1 * gradient**2
            momentum = 0.9 * momentum + 0.01 * gradient / (ms + 1e-3).sqrt()
            value = value - momentum
        expected[name], state[name] = value, ms
    for step in range(3):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        optimizer.step()
    for name, value in expected.items():
        torch.testing.assert_close(getattr(layer, name).detach().double(), value, rtol=1e-6, atol=1e-6)


def test_the_average_warms_up():
    """It starts as a copy; after n updates its decay is (1 + n) / (10 + n), at most what was asked for."""
    layer = torch.nn.Linear(1, 1)
    average, expected = Average(layer, 0.25), 0.0
    for n in range(4):
        layer.weight.detach().fill_(float(n))
        average.update_parameters(layer)
        decay = min(0.25, (1 + n) / (10 + n)) if n else 0.0
        expected = decay * expected + (1 - decay) * n
    assert average.module.weight.item() == pytest.approx(expected)


def test_the_average_sends_nothing_between_devices(monkeypatch):
    """torch's own copies the count, which is on the CPU, to the GPU at each step, and so waits for it."""
    layer = torch.nn.BatchNorm2d(2)
    average = Average(layer, 0.25)
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("a copy"))
    layer.num_batches_tracked.add_(3)
    for _ in range(2):
        average.update_parameters(layer)
    assert average.module.num_batches_tracked == 3
