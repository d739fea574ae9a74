"""The reference against the layers that a block stands for, and its arguments, checked by name."""

import copy
import dataclasses

import pytest
import torch
from blocks import outcome
from torch import nn
from wide_blocks import WIDE_ROWS, build_wide

from fastmbconv import functional, reference
from fastmbconv.mbconv import MBConv, computes


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in WIDE_ROWS.items()])
def test_the_reference_is_what_the_layers_compute(row, training):
    module, x, dy = build_wide(row, torch.float64, training=training)
    eager = copy.deepcopy(module)
    eager.drop_path = module.drop_path
    theirs = outcome(eager, eager.forward_eager, x, dy)
    ours = outcome(module, lambda x: reference.mbconv(x, module.describe()), x, dy)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")


def described(name):
    module, x, _ = build_wide(WIDE_ROWS[name])
    return module.describe(), x


def replaced(of, **changes):
    return lambda block: dataclasses.replace(block, **{of: dataclasses.replace(getattr(block, of), **changes)})


WRONG = {
    "start-weight": ("start", replaced("start", weight=torch.zeros(5, 1, 3, 3)), "block.start.weight has shape"),
    "start-stride": ("start", replaced("start", stride=0), "block.start.stride is 0: expected an integer"),
    "start-padding": ("start", replaced("start", padding=-1), "block.start.padding is -1: expected an integer"),
    "start-residual": ("start", replaced("start", stride=2), "block.residual is True with strides 2 and 1"),
    "conv-bias": ("biases", replaced("bn2", conv_bias=torch.zeros(3)), r"block.bn2.conv_bias has shape \(3,\)"),
    "conv-bias-dtype": ("biases", replaced("bn2", conv_bias=torch.zeros(24).half()), "block.bn2.conv_bias has dtype"),
    "linear": ("linear-squeeze", replaced("se", reduce_weight=torch.zeros(3, 7)), r"expected \(3, 24\)"),
}  # fmt: skip


@pytest.mark.parametrize("name, change, message", [pytest.param(*v, id=k) for k, v in WRONG.items()])
def test_a_wrong_argument_is_named(name, change, message):
    block, x = described(name)
    with pytest.raises(ValueError, match=message):
        functional.mbconv(x, change(block))


def test_a_module_computes_one_activation():
    assert computes(nn.GELU(), "gelu") and computes(nn.GELU("tanh"), "gelu_tanh")
    assert not computes(nn.GELU(), "gelu_tanh") and not computes(nn.SiLU(), "gelu") and not computes(None, "silu")
    module = MBConv(4, 4, activation="gelu_tanh")
    assert module.replaced_reason() is None
    module.act = nn.GELU()
    assert module.replaced_reason() == "act is a GELU"
