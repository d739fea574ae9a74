"""What a block's training step costs the host, in counts: launches, torch's calls and allocations, against eager's."""

import pytest
import torch
from conftest import GPU

import fastmbconv
from fastmbconv.kernels.launching import written
from fastmbconv.mbconv import MBConv

LAUNCHES = 21  # of a block with expansion and squeeze-and-excitation, forward and backward
ALLOCATING = ("aten::empty", "aten::empty_strided")


def counts(module):
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, written() as launches:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.backward(torch.ones_like(y))
    names = [event.name for event in profile.events() if event.name.startswith("aten::")]
    return len(launches), len(names), sum(name in ALLOCATING for name in names)


@pytest.mark.skipif(GPU, reason="the backward's launches would run in another thread")
def test_a_fused_block_asks_less_of_the_host_than_an_eager_one(triton_backend):
    fused, eager = MBConv(16, 16), fastmbconv.unfuse(MBConv(16, 16))
    counts(fused)  # torch's own first calls
    launches, calls, allocations = counts(fused)
    none, theirs, allocated = counts(eager)
    assert launches <= LAUNCHES and none == 0
    assert calls < 0.7 * theirs
    assert allocations < allocated
