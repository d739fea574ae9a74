"""A training step's forward and backward as CUDA graphs; without a GPU the rules, by a recording that runs again."""

import copy
from contextlib import nullcontext

import pytest
import torch
from libraries import library
from rerun import make_graphed_callables
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmbconv
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.graphs_training import GraphedTraining
from fastmbconv.mbconv import MBConv

GPU = torch.cuda.is_available()


@pytest.fixture
def make(monkeypatch):
    """`graph` behind its checks of the device."""
    if not GPU:
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
        return lambda model, example, copy=True: GraphedTraining(model, example, copy)
    return fastmbconv.graph


@pytest.fixture
def model(device):
    blocks = MBConv(4, 4, expand_ratio=2), MBConv(4, 6, stride=2)
    return nn.Sequential(*blocks, nn.BatchNorm2d(6), nn.Dropout(0.0), nn.Conv2d(6, 3, 1)).to(device)


def images(device, *shape):
    return torch.randn(*(shape or (2, 4, 5, 6)), device=device)


def step(net, x, scale=1.0):
    y = net(x)
    (y * torch.linspace(-scale, scale, y.numel(), device=y.device).reshape(y.shape)).sum().backward()
    return y.detach()


def assert_same(ours, theirs, **tolerance):
    """Gradients, parameters and buffers."""
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_a_capture_changes_nothing(make, model, device):
    model[0].drop_path.rate, model[3].p = 0.5, 0.5
    step(model, images(device))
    values = copy.deepcopy(model.state_dict())
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    x = images(device).requires_grad_()
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if GPU else None
    make(model, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert not GPU or torch.equal(torch.cuda.get_rng_state(), states[1])
    assert x.grad is None and model.training
    for p, (gradient, before) in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient and torch.equal(gradient, before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_a_capture_that_fails_changes_nothing_either(make, model, device):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("this one fails")

    model.append(Fails())
    x, values = images(device), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="this one fails"):
        make(model, x)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kept", [True, False], ids=["copies", "buffers"])
def test_steps_are_the_models_own(kept, make, model, device):
    """Outputs, gradients of parameters and of x, statistics and counters, over several steps of an optimizer."""
    other = copy.deepcopy(model)
    graphed = make(model, images(device).requires_grad_(), copy=kept)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (graphed, other)]
    for _ in range(3):
        x = images(device)
        pair = x.clone().requires_grad_(), x.clone().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.testing.assert_close(step(graphed, pair[0]), step(other, pair[1]))
        torch.testing.assert_close(pair[0].grad, pair[1].grad)
        assert_same(model, other)
        for optimizer in optimizers:
            optimizer.step()
    assert model[2].num_batches_tracked == 3
    torch.testing.assert_close(graphed(x.contiguous(memory_format=torch.channels_last)), graphed(x))


@pytest.mark.parametrize("clear", [lambda net: None, lambda net: net.zero_grad(set_to_none=False)], ids=["add", "zero"])
def test_gradients_add_up(clear, make, model, device):
    """torch's own callables would add the second gradient to itself: `.grad` would be the buffer that they write."""
    other = copy.deepcopy(model)
    graphed = make(model, images(device))
    for scale in (1.0, 2.0, -0.5):
        x = images(device)
        for net in (graphed, other):
            clear(net)
            step(net, x, scale)
        assert_same(model, other)


def test_without_copies_old_gradients_are_an_error(make, model, device):
    graphed = make(model, images(device), copy=False)
    step(graphed, images(device))
    with pytest.raises(RuntimeError, match="gradients of the last backward are still there"):
        step(graphed, images(device))
    graphed.zero_grad()
    step(graphed, images(device))


def test_what_a_call_gave_stays(make, model, device):
    graphed = make(model, images(device))
    y = step(graphed, images(device))
    gradient, *before = (p := model[4].weight).grad, y.clone(), p.grad.clone()
    graphed.zero_grad()
    step(graphed, images(device))
    assert torch.equal(y, before[0]) and torch.equal(gradient, before[1])
    shared = make(model, images(device), copy=False)
    assert shared(images(device)).data_ptr() == shared(images(device)).data_ptr()


def test_a_backward_that_comes_too_late_is_an_error(make, model, device):
    graphed = make(model, images(device))
    first, second = graphed(images(device)), graphed(images(device))
    with pytest.raises(RuntimeError, match="this call's activations are overwritten"):
        first.sum().backward()
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this call's activations are overwritten"):
        second.sum().backward()
    third = graphed(images(device))
    with torch.no_grad():
        assert not graphed(images(device)).requires_grad
    with pytest.raises(RuntimeError, match="this call's activations are overwritten"):
        third.sum().backward()


def test_second_derivatives_are_an_error(make, model, device):
    graphed = make(model, images(device))
    (gradient,) = torch.autograd.grad(graphed(images(device)).sum(), model[4].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision(amp, make, model, device):
    """As at the capture, whatever is around the call; a scaler works on the gradients as on any."""
    other = copy.deepcopy(model)
    before = torch.is_autocast_cache_enabled()
    with torch.autocast(device.type, amp):
        graphed = make(model, images(device))
    assert torch.is_autocast_cache_enabled() is before
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0, enabled=amp is torch.float16)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (graphed, other)]
    for inside in (True, False):
        x = images(device)
        for net, optimizer in zip((graphed, other), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(device.type, amp) if inside or net is other else nullcontext():
                y = net(x)
            assert y.dtype == amp
            scaler.scale(y.float().square().sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        assert_same(model, other)


def test_masks_are_drawn_anew_and_by_the_seed(make, model, device):
    model[0].drop_path.rate, model[3].p = 0.5, 0.5
    other = copy.deepcopy(model)
    x = images(device, 16, 4, 5, 6)
    graphed = make(model, x)
    with torch.no_grad():
        assert not torch.equal(graphed(x), graphed(x))
    outputs = []
    for seed in (3, 4, 3):
        torch.manual_seed(seed)
        outputs.append(step(graphed, x))
        torch.manual_seed(seed)
        torch.testing.assert_close(outputs[-1], step(other, x))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_frozen_parts_stay(make, model, device):
    model[0].requires_grad_(False)
    model[0].depthwise_bn.eval()
    other = copy.deepcopy(model)
    graphed = make(model, images(device))
    x = images(device)
    for net in (graphed, other):
        step(net, x)
    assert_same(model, other)
    assert model[0].depthwise_bn.num_batches_tracked == 0 and model[0].project_bn.num_batches_tracked == 1


def test_a_parameter_that_is_not_used_has_no_gradient(make, model, device):
    model[0].unused = nn.Parameter(torch.ones(2, device=device))
    step(make(model, images(device)), images(device))
    assert model[0].unused.grad is None and model[0].depthwise_conv.weight.grad is not None


def test_a_model_that_is_frozen_altogether(make, model, device):
    model.requires_grad_(False)
    other = copy.deepcopy(model)
    x = images(device)
    y = make(model, x)(x)
    torch.testing.assert_close(y, other(x))
    assert not y.requires_grad


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.weight * x
        return {"y": [y, y.detach() + 1], "label": y.argmax(), "name": "several", "nothing": None}


def test_several_outputs_keep_their_structure(make, device):
    model, x = Several().to(device), images(device)
    found, expected = make(model, x)(x), model(x)
    assert found["name"] == "several" and found["nothing"] is None
    torch.testing.assert_close(found["y"], expected["y"])
    assert torch.equal(found["label"], expected["label"])
    assert [y.requires_grad for y in (*found["y"], found["label"])] == [True, False, False]
    found["y"][0].sum().backward()
    torch.testing.assert_close(model.weight.grad, x.sum())


def test_a_model_without_tensors_is_refused(make, device):
    class Nothing(nn.Module):
        def forward(self, x):
            return x.dim()

    with pytest.raises(TypeError, match="model returns no tensor"):
        make(Nothing(), images(device))


BAD = {
    "shape": (lambda x: x[:1], r"shape \(1, 4, 5, 6\): this graph was captured for \(2, 4, 5, 6\)"),
    "dtype": (lambda x: x.half(), "dtype torch.float16: this graph was captured for torch.float32"),
    "device": (lambda x: x.to("meta"), "device meta: this graph was captured for"),
    "gradient": (lambda x: x.requires_grad_(), "x requires a gradient: this graph was captured for an example without"),
}


@pytest.mark.parametrize("change, words", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_another_kind_of_input_is_refused(change, words, make, model, device):
    graphed = make(model, images(device))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        graphed(change(images(device)))
    with pytest.raises(TypeError, match="x is a list"):
        graphed([1.0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_gradients_x_may_want_one(make, model, device):
    graphed = make(model, images(device))
    with torch.no_grad():
        assert not graphed(images(device).requires_grad_()).requires_grad


CHANGED = {
    "eval": (lambda m: m.eval(), "the model is in eval mode, and this graph was captured in training mode"),
    "part": (lambda m: m[0].depthwise_bn.eval(), "0.depthwise_bn is in eval mode"),
    "frozen": (lambda m: m[1].project_conv.requires_grad_(False), "1.project_conv.weight has requires_grad=False, and"),
    "dtype": (lambda m: m.double(), "0.expand_conv.weight has moved in memory since the capture"),
    "assign": (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), "has moved in memory"),
    "buffer": (lambda m: setattr(m[2], "running_mean", torch.zeros(6)), "2.running_mean has moved in memory"),
    "gone": (lambda m: setattr(m[4], "bias", None), "4.bias has moved in memory"),
    "same-place": (lambda m: setattr(m[4], "bias", nn.Parameter(m[4].bias.data)), "4.bias is another parameter"),
    "module": (lambda m: m.__setitem__(4, nn.Conv2d(6, 3, 1)), "4 is another module than at the capture"),
}


@pytest.mark.parametrize("change, words", [pytest.param(*v, id=k) for k, v in CHANGED.items()])
def test_a_model_that_changed_is_an_error(change, words, make, model, device):
    graphed = make(model, images(device))
    change(model)
    with pytest.raises(RuntimeError, match=words):
        graphed(images(device))
    assert model[2].num_batches_tracked == 0


def hooked(model):
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_gradient(model):
    model[2].running_mean.requires_grad_()
    return model


REFUSED = {
    "hook": (hooked, "0 has a hook, which a replay would not call"),
    "buffer": (with_gradient, "2.running_mean is a buffer with requires_grad=True"),
}


@pytest.mark.parametrize("prepare, words", [pytest.param(*v, id=k) for k, v in REFUSED.items()])
def test_what_can_not_be_captured_is_refused(prepare, words, make, model, device):
    with pytest.raises(ValueError, match=words):
        make(prepare(model), images(device))
    assert model[2].num_batches_tracked == 0


def test_it_is_a_module_with_the_models_names(make, model, device):
    graphed = make(model, images(device))
    assert list(graphed.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(graphed.parameters(), model.parameters(), strict=True))
    graphed.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert model[2].num_batches_tracked == 1
    graphed.eval()
    assert not model.training and not graphed.training
    with pytest.raises(RuntimeError, match="in eval mode"):
        graphed(images(device))
    assert graphed.train() is graphed and model.training
    graphed(images(device))
    for duplicate in (copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            duplicate(graphed)


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_wraps_it(alone, make, model, device):
    """Gradients reach its hooks, with and without no_sync; around a model that it wraps there is an error."""
    other = copy.deepcopy(model)
    wrapped = DistributedDataParallel(make(model, images(device)))
    assert list(wrapped.state_dict()) == [f"module.{name}" for name in model.state_dict()]
    for _ in range(2):
        for net in (wrapped, other):
            net.zero_grad()
        for context in (wrapped.no_sync(), nullcontext()):
            x = images(device)
            with context:
                step(wrapped, x)
            step(other, x)
        assert_same(model, other)
    with pytest.raises(ValueError, match="model is a DistributedDataParallel: graph what is in it"):
        make(DistributedDataParallel(model), images(device))


def test_synchronised_norms_are_refused(monkeypatch, make, model, device):
    monkeypatch.setattr("fastmbconv.ranks.group_of", lambda module: object())
    with pytest.raises(ValueError, match="0.expand_bn is synchronised over processes"):
        make(nn.SyncBatchNorm.convert_sync_batchnorm(model), images(device))


@pytest.mark.skipif(GPU, reason="kernels are interpreted")
@pytest.mark.interpreter
def test_kernels_give_the_same(make, triton_backend, device):
    """The fused path finds the aliases that a capture runs with, as it finds parameters."""
    model = nn.Sequential(MBConv(4, 4, expand_ratio=2, drop_path=0.5), MBConv(4, 8, 5, 2))
    other = copy.deepcopy(model)
    x = images(device)
    graphed = make(model, x.clone().requires_grad_())
    pair = x.clone().requires_grad_(), x.clone().requires_grad_()
    for net, each in zip((graphed, other), pair, strict=True):
        torch.manual_seed(1)
        step(net, each)
    assert_same(model, other, rtol=0, atol=0)
    assert torch.equal(pair[0].grad, pair[1].grad)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_librarys_fused_model(name, make, device):
    """Swapped modules and ends find the aliases too."""
    models = library(name).models
    rate = {"drop_path_rate": 0.2} if name == "timm" else {}
    model = fastmbconv.fuse(models.efficientnet_b0(num_classes=5, **rate)).to(device)
    other = copy.deepcopy(model)
    x = images(device, 2, 3, 32, 32)
    for net in (make(model, x), other):
        torch.manual_seed(1)
        step(net, x)
    assert_same(model, other)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("memory, rate, amp", [("fast", 0.2, torch.bfloat16), ("lean", 0.0, None)])
def test_a_fused_model_trains_bitwise_as_without_a_graph(memory, rate, amp, device, triton_backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the stem's convolution is cuDNN's
    model = EfficientNet(num_classes=10, drop_path=rate).to(device, memory_format=torch.channels_last)
    model = fastmbconv.fuse(model, memory=memory)
    other = copy.deepcopy(model)
    example = torch.randn(8, 3, 64, 64, device=device)
    with torch.autocast("cuda", amp, enabled=amp is not None):
        graphed = fastmbconv.graph(model, example)
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in (model, other)]
    for seed in range(3):
        x = torch.randn_like(example)
        losses = []
        for net, optimizer in zip((graphed, other), optimizers, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            with torch.autocast("cuda", amp, enabled=amp is not None):
                y = net(x)
            losses.append(y.float().square().mean())
            losses[-1].backward()
        assert torch.equal(*losses)
        assert_same(model, other, rtol=0, atol=0)
        for optimizer in optimizers:
            optimizer.step()
