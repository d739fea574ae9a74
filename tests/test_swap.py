"""The swap itself, on a small class of this file that stands for a foreign library's, and on our own MBConv."""

import copy
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
from agreement import assert_described, assert_same, outcome, randomised
from torch import nn

import fastmbconv
from fastmbconv import dispatch, explain, fuse, unfuse
from fastmbconv.mbconv import MBConv
from fastmbconv.swap import registry
from fastmbconv.swap.fused import FusedBlock
from fastmbconv.swap.parts import Kinds, NotNow, Parts, Stage, assemble
from fastmbconv.traffic import Sizes, count


class Bottleneck(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x, scale: float = 1.0):
        return scale * self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))


class Child(Bottleneck):
    pass


class Other(Bottleneck):
    def forward(self, x):
        return super().forward(x) + 1


def describe(module, scale=1.0):
    if scale != 1.0:
        return f"scale {scale}"
    depthwise, project = Stage(module.conv1, module.bn1, module.act), Stage(module.conv2, module.bn2, None)
    return assemble(Parts(None, depthwise, None, project, residual=False, drop=None, drop_rate=0.0), Kinds())


@pytest.fixture(autouse=True)
def adapter(monkeypatch):
    monkeypatch.setitem(registry.ADAPTERS, f"{__name__}.Bottleneck", describe)


@pytest.fixture
def x():
    return torch.randn(2, 8, 6, 6)


def chain():
    return nn.Sequential(nn.Conv2d(8, 8, 1), Bottleneck(), nn.ReLU(), Child())


def test_import_needs_no_library():
    libraries = ("timm", "torchvision", "efficientnet_pytorch", "transformers", "segmentation_models_pytorch")
    code = f"import sys, fastmbconv.swap; sys.exit(any(name in sys.modules for name in {libraries}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fuse_keeps_every_object_and_key(calls, x):
    model = chain()
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    assert fuse(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
    assert type(model[1]).__name__ == "FusedBottleneck" and isinstance(model[1], Bottleneck)
    assert isinstance(model[3], Child)
    model(x)
    assert len(calls) == 2


def test_fused_computes_the_same(calls):
    model = randomised(chain())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    fused = fuse(copy.deepcopy(model))
    assert_same(outcome(fused, fused, x), outcome(model, model, x), rtol=1e-9, atol=1e-9)
    assert calls


def test_unfuse_is_bitwise(x):
    model = chain().eval()
    types, before = [type(m) for m in model.modules()], model(x)
    state = copy.deepcopy(model.state_dict())
    assert unfuse(fuse(model)) is model
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_fuse_twice_and_unfuse_twice():
    model = fuse(chain())
    cls = type(model[1])
    assert type(fuse(model)[1]) is cls and type(fuse(chain())[1]) is cls
    assert type(unfuse(unfuse(model))[1]) is Bottleneck
    assert type(unfuse(chain())[1]) is Bottleneck


def test_memory_is_the_later_choice():
    model = fuse(fuse(nn.Sequential(Bottleneck(), MBConv(8, 8)), memory="lean"))
    assert [block.memory for block in model] == ["fast", "fast"]
    fuse(model, lambda module, name: name == "1", memory="lean")
    fuse(model[0], memory="lean")
    assert [block.memory for block in copy.deepcopy(model)] == ["lean", "lean"]
    with pytest.raises(ValueError, match="memory is 'small': allowed are 'fast' and 'lean'"):
        fuse(model, memory="small")
    assert type(unfuse(model)[0]) is Bottleneck


def test_root_block_and_shared_block(calls, x):
    block = fuse(Bottleneck())
    block(x)
    shared = nn.Sequential(block, block)
    assert explain(shared).fused == len(explain(shared)) == 1
    fuse(shared)(x)
    assert len(calls) == 3
    assert type(unfuse(block)) is Bottleneck


def test_filter_fn():
    asked = []

    def second(module, name):
        asked.append((name, type(module)))
        return name == "3"

    model = fuse(chain(), second)
    assert asked == [("1", Bottleneck), ("3", Child)]
    assert [row.path for row in explain(model)] == ["eager", "fused"]
    assert "not fused" in explain(model).rows[0].reason


@pytest.mark.parametrize("function", [fuse, unfuse, explain])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model is a dict"):
        function({})


def test_filter_not_callable():
    with pytest.raises(TypeError, match="filter_fn is a str"):
        fuse(chain(), "blocks.0")


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied, calls, x):
    model = fuse(chain()).eval()
    twin = copied(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(twin(x), model(x)) and len(calls) == 4
    assert type(unfuse(twin)[1]) is Bottleneck


def test_torch_save_whole_model_and_state_dict(x):
    model = fuse(chain()).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded[1], FusedBlock) and torch.equal(loaded(x), model(x))
    plain = chain().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def test_optimizer_from_before_the_swap(calls, x):
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    fuse(model)(x).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.grad.abs().max() > 0} and len(changed) > 8


def test_averaged_model(calls, x):
    model = fuse(chain())
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update_parameters(model)
    assert torch.equal(average.module[1].bn1.weight, model[1].bn1.weight)
    average(x)
    assert calls


def test_train_eval_to_and_half(calls):
    model = fuse(chain())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        y = model.to(dtype).eval()(torch.randn(2, 8, 6, 6, dtype=dtype))
        assert y.dtype == calls[-1].project_weight.dtype == dtype and not calls[-1].bn2.training
    model.train()(torch.randn(2, 8, 6, 6, dtype=torch.float16))
    assert calls[-1].bn2.training


def test_frozen_norm_inside_training(calls, x):
    model = fuse(chain()).train()
    model[1].bn2.eval()
    mean = model[1].bn2.running_mean.clone()
    model(x)
    assert calls[0].bn2.training and not calls[0].bn3.training
    assert torch.equal(model[1].bn2.running_mean, mean)


def test_replaced_parameters_are_seen(calls, x):
    model = fuse(chain())
    model[1].conv2.weight = nn.Parameter(torch.zeros(8, 8, 1, 1))
    model(x)
    assert calls[0].project_weight is model[1].conv2.weight


def _forward_hook(block, seen):
    return block.bn1.register_forward_hook(lambda *_: seen.append(1))


def _pre_hook(block, seen):
    return block.conv2.register_forward_pre_hook(lambda *_: seen.append(1))


def _global_hook(block, seen):
    return nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(1))


@pytest.mark.parametrize("hook", [_forward_hook, _pre_hook, _global_hook])
def test_hooks_inside_keep_the_block_eager(hook, calls, x):
    model, seen = fuse(Bottleneck()), []
    handle = hook(model, seen)
    try:
        model(x)
        row = explain(model).rows[0]
    finally:
        handle.remove()
    assert seen and not calls
    assert row.path == "eager" and "hook on" in row.reason
    model(x)
    assert calls and explain(model).fused == 1


def test_hooks_on_the_block_itself_run(calls, x):
    model, seen = Bottleneck(), []
    model.register_forward_hook(lambda *_: seen.append("before"))
    fuse(model).register_forward_hook(lambda *_: seen.append("after"))
    model(x)
    assert seen == ["before", "after"] and calls


def test_parametrization_keeps_the_block_eager(calls, x):
    model = fuse(chain())
    nn.utils.parametrizations.weight_norm(model[1].conv2)
    model(x)
    assert len(calls) == 1
    assert explain(model).rows[0].reason == "a parametrization on conv2"


def test_sync_batch_norm_after_fuse(calls, x):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(chain()))
    model(x)
    assert calls and explain(model).fused


def test_where_no_kernel_runs_a_call_costs_no_description(monkeypatch, x):
    def read_nothing(module):
        raise AssertionError("described")

    model = fuse(chain())
    monkeypatch.setattr(type(model[1]), "read", staticmethod(read_nothing))
    with fastmbconv.backend("eager"):
        model(x)
        monkeypatch.setattr(dispatch, "call_reason", lambda x: None)
        with pytest.raises(AssertionError, match="described"):
            model(x)


def test_reason_of_one_call(calls, x, monkeypatch):
    """NotNow: the block is fused, runs eager meanwhile, and says so."""

    def patient(module):
        block = describe(module)
        return NotNow(block, "momentum 0.5") if module.bn1.momentum == 0.5 else block

    monkeypatch.setitem(registry.ADAPTERS, f"{__name__}.Patient", patient)
    model = type("Patient", (Bottleneck,), {"__module__": __name__, "forward": Bottleneck.forward})()
    model.bn1.momentum = 0.5
    assert "not fused" in explain(model).rows[0].reason
    fuse(model)(x)
    row = explain(model).rows[0]
    assert not calls and (row.path, row.reason, row.geometry.channels) == ("eager", "momentum 0.5", (8, 8, 8))
    model.bn1.momentum = 0.1
    model(x)
    assert len(calls) == 1 and explain(model).fused == 1


def test_forward_replaced_on_the_instance(x):
    model = chain()
    model[1].forward = lambda x: x
    assert explain(fuse(model)).rows[0].reason == "its forward was replaced on the instance"
    assert type(model[1]) is Bottleneck


def test_class_changed_after_fuse(x):
    model = fuse(chain())
    model[3].__class__ = type("Wrapped", (type(model[3]),), {})
    with pytest.raises(RuntimeError, match="module is a Wrapped"):
        unfuse(model)


def test_subclass_with_its_own_forward_is_another_block():
    model = fuse(nn.Sequential(Other()))
    assert type(model[0]) is Other
    assert explain(model).rows[0].reason == "a mul, add after the projection: not supported"


def test_further_arguments_of_a_call(calls, x):
    model = fuse(Bottleneck().eval())
    expected = 2 * model(x)
    assert len(calls) == 1
    torch.testing.assert_close(model(x, scale=2.0), expected)
    torch.testing.assert_close(model(x=x, scale=2.0), expected)
    assert len(calls) == 1
    torch.testing.assert_close(2 * model(scale=1.0, x=x), expected)
    assert len(calls) == 2
    with pytest.raises(TypeError):
        model()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_by_fx_scripted_and_exported(calls, x):
    model = fuse(chain()).eval()
    expected = model(x)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(torch.jit.script(model)(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training, calls, x):
    model = fuse(chain()).train(training)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert isinstance(model[1], FusedBlock)


UNFUSIBLE = {
    "1x1": (lambda m: setattr(m, "conv2", nn.Conv2d(8, 8, 3, bias=False)), "the projection is 3x3"),
    "groups": (
        lambda m: setattr(m, "conv1", nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)),
        "the depthwise convolution has 4 groups for 8 -> 8 channels",
    ),
    "dilation": (lambda m: setattr(m.conv1, "dilation", (2, 2)), "the depthwise convolution has dilation 2"),
    "rectangle": (lambda m: setattr(m.conv1, "stride", (1, 2)), "stride is 1x2, not square"),
    "stride": (lambda m: setattr(m.conv1, "stride", (3, 3)), "stride 3"),
    "kernel": (lambda m: setattr(m, "conv1", nn.Conv2d(8, 8, 7, groups=8, bias=False)), "kernel size 7"),
    "reflect": (lambda m: setattr(m.conv1, "padding_mode", "reflect"), "pads with 'reflect'"),
    "subclass": (lambda m: setattr(m.conv1, "__class__", type("MyConv", (nn.Conv2d,), {})), "is a MyConv"),
    "norm": (lambda m: setattr(m, "bn1", nn.GroupNorm(2, 8)), "is a GroupNorm (supported: BatchNorm2d, SyncBatchNorm)"),
    "activation": (lambda m: setattr(m, "act", nn.Mish()), "is Mish (supported: SiLU, ReLU, ReLU6, Hardswish, GELU)"),
}


@pytest.mark.parametrize("change, reason", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(change, reason, calls, x):
    model = Bottleneck()
    change(model)
    row = explain(fuse(model)).rows[0]
    assert not isinstance(model, FusedBlock)
    assert row.path == "eager" and reason in row.reason


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_norms(options, training):
    model = Bottleneck()
    model.bn1 = nn.BatchNorm2d(8, **options)
    if options.get("momentum", 0) is None:
        model.act = nn.Identity()
    if not training:  # where its gradient is more than rounding
        model.conv2 = nn.Conv2d(8, 8, 1)
    assert_described(randomised(model).train(training), torch.randn(2, 8, 6, 6, dtype=torch.float64))


def test_statistics_held_but_not_tracked():
    model = randomised(Bottleneck())
    model.bn1.track_running_stats = False
    assert_described(model, torch.randn(2, 8, 6, 6, dtype=torch.float64))
    assert_described(model.eval(), torch.randn(2, 8, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
def test_padding(padding):
    model = Bottleneck()
    model.conv1 = nn.Conv2d(8, 8, 5, padding=padding, groups=8, bias=False)
    assert_described(randomised(model), torch.randn(2, 8, 9, 7, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"expand_ratio": 1, "se_ratio": 0}, {"stride": 2, "padding": "same"}], ids=str)
def test_our_mbconv_is_described(options):
    module = MBConv(8, 8, drop_path=0.5, **options)
    assert_described(randomised(module), torch.randn(4, 8, 7, 6, dtype=torch.float64))


def test_our_mbconv_turns_on_and_off(calls, x):
    model = nn.Sequential(MBConv(8, 8), MBConv(8, 16, stride=2))
    model(x)
    assert len(calls) == 2 and explain(model).fused == 2
    unfuse(model)(x)
    assert len(calls) == 2 and explain(model).fused == 0
    fuse(model)(x)
    assert len(calls) == 4 and all(type(m) is MBConv for m in model)


def test_our_mbconv_with_a_hook_inside(calls, x):
    model = unfuse(MBConv(8, 8))
    handle = model.project_conv.register_forward_hook(lambda *_: None)
    fuse(model)(x)
    assert not calls and explain(model).rows[0].reason == "a hook on project_conv"
    handle.remove()
    model(x)
    assert calls and explain(model).fused == 1


def test_our_mbconv_with_a_replaced_norm(calls, x):
    model = MBConv(8, 8)
    model.expand_bn = nn.InstanceNorm2d(48)
    model(x)
    assert not calls and explain(model).rows[0].reason == "expand_bn is a InstanceNorm2d"


def test_explain_prints():
    explanation = explain(fuse(nn.ModuleDict({"a": MBConv(8, 12, 5, stride=2), "b": Other(), "c": Other()})))
    header, first, second, _, reason, passes, summary = explanation.table(200).splitlines()
    assert header.split() == ["block", "class", "channels", "kernel", "SE", "path", "passes"]
    assert re.fullmatch(r"a +MBConv +8->48->12 +5x5 /2 +yes +fused +[\d.]+ -> [\d.]+", first)
    assert re.fullmatch(r"b +Other +8->8->8 +3x3 +no +eager \[1\]", second)
    assert reason == "[1] a mul, add after the projection: not supported (2 blocks: b, c)"
    assert "a training step" in passes and "a count, not a measurement" in passes
    assert summary.startswith("1 of 3 blocks fused; here they run ")
    assert len(explanation) == 3 and [row.name for row in explanation] == ["a", "b", "c"]
    assert str(explain(nn.Linear(2, 2))) == "no MBConv block found"


@pytest.mark.parametrize("training", [True, False])
def test_explain_counts_what_is_saved(training):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), MBConv(8, 8), Bottleneck(), MBConv(8, 8, stride=2)).train(training)
    before = copy.deepcopy(model.state_dict())
    handle = fuse(model)[1].project_conv.register_forward_hook(lambda *_: None)
    first, plain, last = explain(model, (2, 3, 20, 12)).rows
    handle.remove()
    assert (first.saving.shape, plain.saving.shape, last.saving.shape) == ((2, 8, 20, 12),) * 3
    expected = count(Sizes.of(model[3].describe(), (2, 8, 20, 12)))
    eager, fused = (
        (expected.eager_training, expected.fused_training)
        if training
        else (expected.eager_inference, expected.fused_inference)
    )
    assert last.saving.bytes == (4 * eager, 4 * fused)
    assert last.saving.passes == (eager / (2 * 48 * 240), fused / (2 * 48 * 240))
    assert first.path == "eager" and first.saving.bytes[0] > first.saving.bytes[1]  # what the hook costs
    assert explain(model).rows[2].saving.bytes is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training is training and not model[1]._forward_pre_hooks


def test_explain_fits_its_width():
    model = fuse(nn.ModuleDict({"a": MBConv(8, 12, 5, stride=2), "b": Other()}))
    for width in (40, 60, 80):
        lines = explain(model).table(width).splitlines()[:-1]
        assert max(map(len, lines)) <= width and lines[0].startswith("block") and "path" in lines[0]
    wide = nn.Sequential(nn.Conv2d(3, 8, 1), MBConv(8, 8))
    header = explain(wide, (1, 3, 8, 8)).table(140).splitlines()[0].split()
    assert header == ["block", "class", "input", "channels", "kernel", "SE", "path", "passes", "saves"]


def test_explain_names_a_shape_that_does_not_run():
    with pytest.raises(ValueError, match=r"input_shape is \(1, 3, 8, 8\): the model does not run on it"):
        explain(Bottleneck(), (1, 3, 8, 8))


def test_explain_says_what_runs_here(device):
    model = fuse(Bottleneck()).to(device)
    with fastmbconv.backend("eager"):
        assert explain(model).rows[0].runs == "eager: the backend is set to eager"
    with fastmbconv.backend("triton"):
        assert explain(model).rows[0].runs == "kernels"
        assert explain(model).summary() == "1 of 1 blocks fused; here they run kernels"
