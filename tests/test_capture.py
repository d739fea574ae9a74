"""A whole training step as one CUDA graph, and what a capture forbids: nothing on the way waits for the device."""

import copy

import pytest
import torch
from conftest import GPU
from torch import nn

import fastmbconv
from fastmbconv.kernels.launching import written
from fastmbconv.mbconv import MBConv

HOST_WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def network(device):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    blocks = (MBConv(8, 8, 3, drop_path=0.2), MBConv(8, 16, 5, 2), MBConv(16, 16, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, *head).to(device, memory_format=torch.channels_last)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None if part.num_features == 16 else 0.1  # the cumulative average is counted on the device
    return fastmbconv.fuse(model)


@pytest.mark.skipif(GPU, reason="the backward's launches would run in another thread")
def test_no_part_of_a_step_waits_for_the_device(triton_backend):
    model = network("cpu")
    images = torch.randn(2, 3, 12, 12)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, written() as launches:
        model(images).sum().backward()
    assert len(launches) > 40
    assert not HOST_WAITS & {event.name for event in profile.events()}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_training_step_replays_as_it_ran(memory, device, triton_backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the stem's convolution is cuDNN's
    model = fastmbconv.fuse(network(device), memory=memory)
    for part in model.modules():
        if isinstance(part, MBConv):
            part.drop_path.rate = 0.0  # a replay draws its own seeds
    other = copy.deepcopy(model)
    batches = [(torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)) for _ in range(3)]
    warm = batches[0]

    def step(net, optimizer, images, target):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(images), target)
        loss.backward()
        optimizer.step()
        return loss

    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in (model, other)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizers[0], *warm)
    torch.cuda.current_stream().wait_stream(side)
    images, target = (tensor.clone() for tensor in warm)
    optimizers[0].zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizers[0], images, target)
    for _ in range(3):
        step(other, optimizers[1], *warm)
    for batch in batches:
        for static, tensor in zip((images, target), batch, strict=True):
            static.copy_(tensor)
        graph.replay()
        torch.testing.assert_close(loss, step(other, optimizers[1], *batch), rtol=0, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
