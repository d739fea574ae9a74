"""A diverged model shows it: where eager has NaN, the kernels have NaN.

Outputs and running statistics have it in the same places. Gradients may have more: a kernel multiplies by 0 where eager
selects, or has no such term, and 0 * NaN is NaN.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from blocks import fused, make_block, normal, outcome

NAN = float("nan")


class Case(NamedTuple):
    """What is NaN: a pixel of the image x, or one entry of a parameter or buffer; `all`: then all of y is."""

    where: str
    training: bool
    all: bool = True


CASES = {
    "a running mean": Case("depthwise_bn.running_mean", False),
    "a running variance": Case("expand_bn.running_var", False),
    "the last running mean": Case("project_bn.running_mean", False, all=False),
    "a pixel": Case("x", False, all=False),
    "a pixel in training": Case("x", True),
    "an expand weight in training": Case("expand_conv.weight", True),
    "a tap in training": Case("depthwise_conv.weight", True),
    "a project weight in training": Case("project_conv.weight", True, all=False),
}


def build(case, activation, device):
    module = make_block(4, 5, activation=activation, se_ratio=0, device=device)
    module.train(case.training)
    x = normal(2, 4, 5, 5, dtype=torch.float32, device=device)
    named = {"x": x, **dict(module.named_parameters()), **dict(module.named_buffers())}
    entry = {"x": (0, 0, 2, 2), "depthwise_conv.weight": (0, 0, 1, 1)}.get(case.where, (0,) * named[case.where].dim())
    with torch.no_grad():
        named[case.where][entry] = NAN
    return module, x


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_nan_is_where_eager_has_it(case, activation, device):
    module, x = build(case, activation, device)
    eager = copy.deepcopy(module)
    dy = normal(2, 5, 5, 5, dtype=torch.float32, device=device)
    theirs, ours = outcome(eager, eager.forward_eager, x, dy), outcome(module, fused(module), x, dy)
    assert theirs["y"].isnan().any() and theirs["y"].isnan().all() == case.all
    buffers = dict(module.named_buffers())
    for name, value in theirs.items():
        if name == "y" or name in buffers:
            assert torch.equal(ours[name].isnan(), value.isnan()), name
        else:
            assert not (value.isnan() & ~ours[name].isnan()).any(), name


@pytest.mark.parametrize("se_ratio", [0, 0.5])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if not case.training])
def test_nan_is_where_eager_has_it_without_gradients(case, activation, se_ratio, device):
    module, x = build(case._replace(training=False), activation, device)
    if se_ratio:
        other = make_block(4, 5, activation=activation, se_ratio=se_ratio, device=device).eval()
        other.load_state_dict(module.state_dict(), strict=False)
        module = other
    eager = copy.deepcopy(module)
    with torch.no_grad():
        ours, theirs = fused(module)(x), eager.forward_eager(x)
    assert theirs.isnan().any()
    assert torch.equal(ours.isnan(), theirs.isnan())
