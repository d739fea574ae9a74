"""Blocks of classes that no adapter knows: which are fused, which are not and why, and what changes that at a call."""

import copy

import pytest
import torch
from agreement import assert_inference_agrees, assert_kernels_agree, assert_same, outcome, randomised
from near_misses import NEAR_MISSES, SHAPE, TRAIN
from written import WRITTEN

import fastmbconv
from benchmarks.kernelbench import PROBLEMS
from fastmbconv import explain, fuse
from fastmbconv.swap.fused import FusedBlock
from fastmbconv.swap.matching import Recipe
from fastmbconv.swap.proving import why_not
from fastmbconv.swap.tracing import shadow
from fastmbconv.swap.written import block_of_recipe, find

# (fused in eval mode, in training, of how many), and reasons of the others.
TAKEN = {
    "v1_module": (2, 2, 2, ()),
    "v1_flat": (3, 3, 3, ()),
    "v2_one_sequential": (3, 3, 3, ()),
    "v2_conv_bn_relu": (3, 3, 3, ()),
    "v2_shortcut": (2, 2, 3, ("what is added last is not the block's own input",)),
    "v2_flat": (2, 2, 2, ()),
    "v2_nested": (2, 2, 2, ()),
    "v2_module_list": (3, 3, 3, ()),
    "v3_gate_before_activation": (3, 3, 4, ("the squeeze-excite stands before the activation: not supported",)),
    "v3_gate_after_activation": (3, 3, 3, ()),
    "v3_activated_sum": (
        1,
        1,
        3,
        ("a ReLU(inplace=True) behind the sum with the block's input: not supported", "an add after the"),
    ),
    "v4_universal": (3, 3, 4, ("a dense convolution where the depthwise convolution is expected",)),
    "v4_bias": (2, 2, 2, ()),
    "mobilevit": (2, 2, 2, ()),
    "swish_module": (3, 3, 3, ()),
    "swish_autograd": (1, 1, 1, ()),
    "same_padding": (3, 3, 3, ()),
    "static_padding": (2, 2, 2, ()),
    "mean": (4, 4, 4, ()),
    "argument": (3, 3, 3, ()),
    "argument_left_out": (2, 2, 2, ()),
    "checkpointed": (1, 0, 1, ("in training its 0.bn1.running_mean is",)),
    "asserting": (0, 0, 2, ("its forward takes another way for other values or sizes of its input",)),
    "drop_path_module": (3, 3, 3, ()),
    "tutorial": (3, 1, 3, ("rand() received an invalid combination of arguments",)),
    "v2_efficientnet": (2, 2, 2, ()),
    "coatnet": (2, 2, 3, ("the expansion is 1x1, stride 2, groups 1, not 1x1",)),
    "coatnet_prenorm": (2, 2, 2, ()),
    "maxvit": (3, 3, 3, ()),
    "maxvit_window": (0, 0, 1, ("as the squeeze: not supported (supported: the image's mean)",)),
    "maxvit_sliced": (1, 1, 1, ()),
    "maxvit_gelu": (2, 2, 2, ()),
    "tinyvit": (0, 0, 2, ("a GELU(approximate='none') behind the sum with the block's input: not supported",)),
    "tinyvit_relu": (0, 0, 1, ("a ReLU() behind the sum with the block's input: not supported",)),
}
# Near misses that are fused into what they are.
RIGHT = {"padding_asymmetric", "relu", "training"}
# Those that differ from their twins in nothing that one call of the block shows.
UNSEEN = {"side_effect", "gate_unused", "half_the_groups", "size", "values"}


def row_counts(model):
    rows = explain(model).rows
    return sum(row.path == "fused" for row in rows), len(rows), [row.reason for row in rows if row.reason]


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernelbench(name):
    problem = PROBLEMS[name]
    model = fuse(problem.make())
    fused, rows, reasons = row_counts(model)
    assert fused == problem.blocks
    if name == "EfficientNetB2":
        assert rows == 5
        assert set(reasons) == {"the projection takes the squeeze-excite's gate itself: nothing is multiplied by it"}
    else:
        assert rows == fused and not reasons


@pytest.mark.parametrize("name", WRITTEN)
def test_written(name):
    eval_count, training_count, total, reasons = TAKEN[name]
    model = fuse(WRITTEN[name].make())
    for training, count in ((False, eval_count), (True, training_count)):
        fused, rows, found = row_counts(model.train(training))
        assert (fused, rows) == (count, total), found
    assert all(any(reason in each for each in found) for reason in reasons)
    assert len(found) == total - training_count


def test_every_written_model_is_expected():
    assert TAKEN.keys() == WRITTEN.keys()


# One of each kind, and those where biases in front of a BatchNorm have gradients of rounding and nothing else.
RUN = ("v1_flat", "v2_shortcut", "v3_gate_after_activation", "same_padding", "mean", "drop_path_module", "coatnet")
BIASED = ("v4_universal", "v4_bias", "maxvit_gelu")


@pytest.mark.parametrize("name", RUN + BIASED)
def test_kernels_agree(name):
    torch.manual_seed(0)
    model, x = randomised(WRITTEN[name].make()), torch.randn(WRITTEN[name].shape, dtype=torch.float64)
    assert_inference_agrees(copy.deepcopy(model), x)
    if name not in BIASED:
        assert_kernels_agree(model.train(), x)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_not_their_twins(name):
    near = NEAR_MISSES[name]
    for training in (True, False):
        torch.manual_seed(1)
        own = randomised(near.make()).train(training)
        fused = fuse(copy.deepcopy(own))
        ways = type(fused).ways if isinstance(fused, FusedBlock) else ()
        assert not ways or name in RIGHT or any(way.modal for way in ways)
        x = torch.randn(SHAPE, dtype=torch.float64)
        with fastmbconv.backend("triton"):
            ours = outcome(fused, fused, x)
        theirs = outcome(own, own, x)
        assert_same(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(NEAR_MISSES.keys() - UNSEEN))
def test_proof_alone_catches_near_misses(name):
    """As if the matcher had taken them for their twins."""
    near = NEAR_MISSES[name]
    (found,) = find(near.plain())
    (way,) = found.ways
    assert isinstance(way.recipe, Recipe)
    reasons = []
    for training in (True, False):
        twin = shadow(near.make(), training=training)
        reasons.append(why_not(twin, lambda module: block_of_recipe(module, way.recipe)))
    assert any(reasons)
    assert reasons[0] or TRAIN in near.same
