"""A whole training step as one CUDA graph, and what a capture forbids.

Nothing on the way waits for the device, two steps make the same calls, tensors that stay are read where they were, and
what a step makes is allocated in it. Without a GPU a device that records stands for it: torch's meta device, which has
no values to wait for, or the CPU with launches that are seen and not run.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import GPU
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastmbconv
from benchmarks.launches import caught
from fastmbconv.kernels.launching import written
from fastmbconv.mbconv import MBConv

HOST_WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def network(device, memory="fast"):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    blocks = (MBConv(8, 8, 3, drop_path=0.2), MBConv(8, 16, 5, 2), MBConv(16, 16, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, *head).to(device, memory_format=torch.channels_last)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None if part.num_features == 16 else 0.1  # the cumulative average is counted on the device
    return fastmbconv.fuse(model, memory=memory)


class Calls(TorchDispatchMode):
    """Each operator with its arguments, a tensor as its kind."""

    sees_fastmbconv = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((str(function), str(tree_map_only(Tensor, kind, (args, kwargs)))))
        return function(*args, **(kwargs or {}))


def kind(tensor):
    return tensor.dtype, tensor.device.type, tuple(tensor.shape), tensor.stride()


class Launches(list):
    """Each launch with its arguments: a tensor of `kept` by its name and offset, another one by its kind."""

    def __init__(self, kept):
        super().__init__()
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in kept.items()}
        self.made = []  # alive, so that no later tensor gets their memory

    def see(self, kernel, grid, given):
        described = tree_map_only(Tensor, self._described, {"grid": grid, **given})
        self.append((kernel.__name__, str(described)))

    def _described(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        if place in self.names:
            return self.names[place], tensor.storage_offset(), *kind(tensor)
        self.made.append(tensor)
        return "made", *kind(tensor)

    def places(self):
        return {tensor.untyped_storage().data_ptr() for tensor in self.made if tensor.numel()}


def seen_step(model, images, target, watched):
    """The launches and the operators of a step whose kernels don't run."""
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers()), "images": images}
    launches, calls = Launches(kept), Calls()
    model.zero_grad(set_to_none=True)
    with caught(launches.see), calls if watched else nullcontext():
        nn.functional.cross_entropy(model(images), target).backward()
    return launches, calls.seen


@pytest.mark.skipif(GPU, reason="the backward's launches would run in another thread")
@pytest.mark.parametrize("watched", [False, True], ids=["launchers", "operators"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_two_steps_make_the_same_calls(memory, amp, watched):
    """A graph replays one's pointers: parameters and statistics stay at theirs, the rest is allocated in the step."""
    model = network("cpu", memory)
    images, target = torch.randn(2, 3, 12, 12), torch.tensor([1, 3])
    with torch.autocast("cpu", amp, enabled=amp is not None, cache_enabled=False):
        (first, before), (second, after) = (seen_step(model, images, target, watched) for _ in range(2))
    assert len(first) > 40 and first == second
    assert before == after and bool(before) is watched
    assert not HOST_WAITS & {name.rpartition(".")[0].replace(".", "::") for name, _ in before}
    assert not first.places() & second.places(), "a tensor outlives its step"
    told = " ".join(arguments for _, arguments in first)
    for name, tensor in model.state_dict().items():
        of_a_block = name[0] in "123" and tensor.ndim == 1  # a longer weight may be rounded on its way
        assert not of_a_block or f"'{name}'" in told, name


@pytest.mark.skipif(GPU, reason="the backward's launches would run in another thread")
@pytest.mark.parametrize("watched", [False, True], ids=["launchers", "operators"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_step_runs_on_a_device_without_values(memory, watched, monkeypatch):
    """Whoever reads one, or copies it to the host, ends it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)  # it doesn't know the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model = network("meta", memory)
    images, target = (torch.empty(2, 3, 12, 12, device="meta"), torch.empty(2, dtype=torch.long, device="meta"))
    launches, _ = seen_step(model, images, target, watched)
    assert watched or len(launches) > 40  # watched, an operator on this device is its fake
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


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
