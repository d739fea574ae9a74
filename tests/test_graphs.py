"""CUDA graphs of a model's forward: replayed where there is a GPU; elsewhere the rules, by a recording that runs."""

import copy
import threading
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import fastmbconv
from fastmbconv import graphs, graphs_training
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.mbconv import MBConv

GPU = torch.cuda.is_available()


class Rerun:
    """Stands for a captured graph: writes what `run` gives now into the tensors that it gave first."""

    def __init__(self, run, device):
        self.run, self.outputs = run, run()

    def turn(self):
        return nullcontext()

    def replay(self):
        new = iter(torch.utils._pytree.tree_leaves(self.run()))
        tree_map_only(torch.Tensor, lambda t: t.copy_(next(new)), self.outputs)


@pytest.fixture
def make(monkeypatch, device):
    """`graph` behind its checks of the device."""
    if not GPU:
        monkeypatch.setattr(graphs, "Recording", Rerun)
        return lambda model, example, copy=True: graphs.Graphed(model, example, copy)
    return fastmbconv.graph


@pytest.fixture
def model(device):
    return nn.Sequential(MBConv(4, 4, expand_ratio=2), nn.Conv2d(4, 3, 1)).to(device).eval()


def images(device, *shape):
    return torch.randn(*(shape or (2, 4, 5, 6)), device=device)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(model, device):
    with pytest.raises(RuntimeError, match="no CUDA GPU here"):
        fastmbconv.graph(model, images(device))


def test_what_is_no_model_or_no_tensor(model, device):
    with pytest.raises(TypeError, match="model is a function"):
        fastmbconv.graph(lambda x: x, images(device))
    with pytest.raises(TypeError, match="example is a list"):
        fastmbconv.graph(model, [1.0])


BAD = {
    "cpu-example": (lambda m: m.eval(), lambda: torch.zeros(1, 4, 5, 5), "example is on cpu"),
    "training-inside": (lambda m: m.eval()[0].depthwise_bn.train(), lambda: OnGPU(), "0.depthwise_bn is in training"),
    "cpu-model": (lambda m: m.cpu().eval(), lambda: OnGPU(), "0.expand_conv.weight is on cpu, example on cuda:0"),
    "empty": (lambda m: m.eval(), lambda: OnGPU(0), r"example has the shape \(0, 4\)"),
}


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @staticmethod
    def __new__(cls, count=1):
        return torch.Tensor._make_wrapper_subclass(cls, (count, 4), device="cuda:0")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran on it")


def test_the_models_mode_chooses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs, "Graphed", lambda *arguments: ("eval", *arguments))
    monkeypatch.setattr(graphs_training, "GraphedTraining", lambda *arguments: ("training", *arguments))
    model, example = nn.Identity(), OnGPU()
    assert fastmbconv.graph(model, example, copy=False) == ("training", model, example, False)
    assert fastmbconv.graph(model.eval(), example) == ("eval", model, example, True)


@pytest.mark.parametrize("prepare, example, words", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_arguments(prepare, example, words, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prepare(model)
    with pytest.raises(ValueError, match=words):
        fastmbconv.graph(model, example())


def test_each_call_gives_the_models_own_output(make, model, device):
    x, y = images(device), images(device)
    replay = make(model, x)
    with torch.no_grad():
        first, second = model(x), model(y)
    a, b = replay(x), replay(y.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(a, first)  # a copy: the second call left it alone
    torch.testing.assert_close(b, second)
    assert not b.requires_grad
    shared = make(model, x, copy=False)
    assert shared(x) is shared(y)
    torch.testing.assert_close(shared(y), second)


def test_weights_and_statistics_changed_in_place_are_seen(make, model, device):
    x = images(device)
    replay = make(model, x)
    before = replay(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
        model.load_state_dict(other.state_dict())
        assert not torch.allclose(replay(x), before)
        torch.testing.assert_close(replay(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.double(), id="dtype"),
        pytest.param(lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), id="assign"),
        pytest.param(lambda m: setattr(m[1], "weight", None), id="gone"),
    ],
)
def test_a_tensor_that_moved_is_an_error(change, make, model, device):
    if not GPU:  # a graph would go on reading the memory that it was captured with
        Rerun.replay, kept = (lambda self: None), Rerun.replay
    try:
        replay = make(model, images(device))
        change(model)
        with pytest.raises(RuntimeError, match="has moved in memory since the capture"):
            replay(images(device))
    finally:
        if not GPU:
            Rerun.replay = kept


def test_training_mode_is_an_error(make, model, device):
    replay = make(model, images(device))
    model.train()
    with pytest.raises(RuntimeError, match="in training mode"):
        replay(images(device))


WRONG = {
    "shape": (lambda x: x[:1], r"shape \(1, 4, 5, 6\): this graph was captured for \(2, 4, 5, 6\)"),
    "dtype": (lambda x: x.half(), "dtype torch.float16: this graph was captured for torch.float32"),
    "device": (lambda x: x.to("meta"), "device meta: this graph was captured for"),
}


@pytest.mark.parametrize("change, words", [pytest.param(*v, id=k) for k, v in WRONG.items()])
def test_another_kind_of_input_is_refused(change, words, make, model, device):
    replay = make(model, images(device))
    with pytest.raises(ValueError, match=words):
        replay(change(images(device)))
    with pytest.raises(TypeError, match="x is a list"):
        replay([1.0])


def test_several_outputs_keep_their_structure(make, device):
    class Two(nn.Module):
        def forward(self, x):
            return {"twice": 2 * x, "parts": [x + 1, x - 1]}

    x = images(device)
    found = make(Two().eval(), x)(x)
    torch.testing.assert_close(found, Two()(x))


def test_a_model_without_tensors_is_refused(make, device):
    class Nothing(nn.Module):
        def forward(self, x):
            return x.dim()

    with pytest.raises(TypeError, match="model returns a int"):
        make(Nothing().eval(), images(device))


def test_autocasts_copies_of_weights_are_made_inside_the_graph(make, device):
    """A cached copy would be the weight of the capture."""

    class Flag(nn.Module):
        def forward(self, x):
            seen.append(torch.is_autocast_cache_enabled())
            return x + 1

    seen = []
    with torch.autocast(device.type, torch.bfloat16):
        make(Flag().eval(), images(device))
        assert torch.is_autocast_cache_enabled()
    assert seen and not any(seen)


def test_threads_take_turns(make, model, device):
    inputs = [images(device) for _ in range(4)]
    replay, found = make(model, inputs[0]), [None] * 4

    def work(i):
        for _ in range(5):
            found[i] = replay(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for x, y in zip(inputs, found, strict=True):
            torch.testing.assert_close(y, model(x))


def test_a_capture_forbids_other_threads_nothing(monkeypatch):
    """By default whoever allocates meanwhile, as a loader that pins memory, ends it."""
    cuda, runs = MagicMock(), []
    monkeypatch.setattr(torch, "cuda", cuda)
    assert graphs.Recording(lambda: runs.append(None) or len(runs), "cuda:0").outputs == graphs.WARMUP + 1
    cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value, capture_error_mode="thread_local")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("batch", [1, 16])
def test_a_fused_model_replays_bitwise(batch, device):
    model = EfficientNet(num_classes=10).to(device).eval().to(memory_format=torch.channels_last)
    example = torch.randn(batch, 3, 96, 96, device=device)
    with torch.autocast("cuda", torch.bfloat16), fastmbconv.backend("triton"):
        replay = fastmbconv.graph(model, example)
        for _ in range(3):
            x = torch.randn_like(example)
            with torch.no_grad():
                torch.testing.assert_close(replay(x), model(x), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
def test_streams_take_turns(model, device):
    inputs = [images(device, 2, 4, 64, 64) for _ in range(8)]
    replay = fastmbconv.graph(model, inputs[0])
    torch.cuda.synchronize()
    found = []
    for x in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(replay(x))
    torch.cuda.synchronize()
    with torch.no_grad():
        for x, y in zip(inputs, found, strict=True):
            torch.testing.assert_close(y, model(x))
