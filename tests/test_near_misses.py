"""The near misses are what they say: they have their twins' weights, and compute something else."""

import pytest
import torch
from agreement import randomised
from near_misses import EVAL, NEAR_MISSES, TRAIN, dark


def outputs(module, mode):
    """Output of one call, and all else that it leaves; the module is as it was."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = dark().double().requires_grad_()
    y = module.train(mode == TRAIN)(x)
    y.sum().backward()
    after = {name: value.clone() for name, value in module.named_buffers()}
    module.load_state_dict(before)
    return y.detach(), {"dx": x.grad, **after, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_no_plain_block(name):
    miss = NEAR_MISSES[name]
    ours, theirs = randomised(miss.make()), miss.plain().double()
    theirs.load_state_dict(ours.state_dict())
    for mode in (TRAIN, EVAL):
        mine, its = outputs(ours, mode)[0], outputs(theirs, mode)[0]
        same = mine.shape == its.shape and torch.allclose(mine, its, rtol=1e-6, atol=1e-6)
        assert same == (mode in miss.same), mode


@pytest.mark.parametrize("name", ["norm_momentum", "gate_detached"])
def test_what_gives_the_same_output_differs_in_the_rest(name):
    miss = NEAR_MISSES[name]
    ours, theirs = randomised(miss.make()), miss.plain().double()
    theirs.load_state_dict(ours.state_dict())
    (_, mine), (_, its) = outputs(ours, TRAIN), outputs(theirs, TRAIN)
    assert [key for key in its if mine[key] is None or not torch.allclose(mine[key], its[key])]


def test_a_kept_tensor_is_kept():
    module = NEAR_MISSES["side_effect"].make()
    module(dark())
    assert module.features.shape == (3, 16, 8, 8)
