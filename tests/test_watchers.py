"""Who asks an operator for itself gets the un-fused model's answer: counters, tracers, checkpoint policies."""

import copy
import warnings
from functools import partial

import pytest
import torch
from blocks import BatchNorm, bn_module, launches, make_block, normal
from libraries import library
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastmbconv
from fastmbconv import dispatch, flops, functional, ops, reference
from fastmbconv.block import SqueezeExcite
from fastmbconv.ends import ConvBNAct

pytestmark = pytest.mark.usefixtures("triton_backend")


class Counter(TorchDispatchMode):
    """Counts by PyTorch's formulas, as counters of other packages do."""

    def __init__(self):
        super().__init__()
        self.total, self.unknown, self.operators = 0, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators.add(func.name())
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif func.namespace == "fastmbconv":
            self.unknown.add(func.name())
        return out


class Aware(Counter):
    sees_fastmbconv = True


def step(module, x, forward=None):
    """Output, gradients and buffers of one training step."""
    x = x.clone().requires_grad_()
    y = (forward or module)(x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **{name: b.clone() for name, b in module.named_buffers()}}


def counted(module, x, counter, training):
    with counter:
        if training:
            step(module, x)
        else:
            with torch.no_grad():
                module(x)
    return counter


BLOCKS = {
    "se": {},
    "lean": dict(memory="lean"),
    "lean-k5": dict(memory="lean", kernel_size=5),
    "no-se": dict(se_ratio=0),
    "no-expansion": dict(expand_ratio=1),
    "same-strided": dict(out_channels=6, stride=2, kernel_size=5, padding="same"),
}


def block(device, memory="fast", **kwargs):
    module = make_block(4, device=device, **{"out_channels": 4, "expand_ratio": 3, "se_ratio": 0.5, **kwargs})
    module.memory = memory
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", BLOCKS.values(), ids=BLOCKS)
def test_formulas_count_a_block_as_the_eager_one(kwargs, training, device):
    """Whatever is computed again; forward and backward together."""
    module, x = block(device, **kwargs).train(training), normal(2, 4, 7, 5, dtype=torch.float32, device=device)
    expected = counted(fastmbconv.unfuse(copy.deepcopy(module)), x, Counter(), training)
    found = counted(module, x, Aware(), training)
    assert not found.unknown and any(name.startswith("fastmbconv::") for name in found.operators)
    assert found.total == expected.total > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", ["edge", "edge-se", "single"])
def test_formulas_count_fused_mbconv_as_the_eager_one(make, training, device):
    library("timm")
    timm_blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    module = {
        "edge": lambda: timm_blocks.EdgeResidual(4, 4, exp_ratio=2),
        "edge-se": lambda: timm_blocks.EdgeResidual(4, 4, exp_ratio=2, se_layer=timm_blocks.SqueezeExcite),
        "single": lambda: timm_blocks.ConvBnAct(4, 4, 3),
    }[make]().to(device)
    x = normal(2, 4, 5, 4, dtype=torch.float32, device=device)
    expected = counted(copy.deepcopy(module).train(training), x, Counter(), training)
    found = counted(fastmbconv.fuse(module).train(training), x, Aware(), training)
    assert not found.unknown and found.total == expected.total > 0


class Functions(nn.Module):
    """Both functions that are no block; without parameters that train, unless `x` wants a gradient."""

    def __init__(self, device, functions):
        super().__init__()
        self.functions = functions
        self.taps = nn.Parameter(normal(4, 1, 3, 3, dtype=torch.float32, device=device))
        shapes = ((2, 4, 1, 1), (2,), (4, 2, 1, 1), (4,))
        self.excite = nn.ParameterList([normal(*s, dtype=torch.float32, device=device) for s in shapes])
        self.bn = bn_module(4, torch.float32, device)

    def forward(self, x):
        x = self.functions.depthwise_bn_act(x, self.taps, BatchNorm.of(self.bn), 2, 1, "silu")
        return self.functions.squeeze_excite(x, SqueezeExcite(*self.excite))


@pytest.mark.parametrize("training", [True, False])
def test_direct_calls_are_counted_by_formula_under_any_counter(training, device):
    x = normal(2, 4, 7, 5, dtype=torch.float32, device=device)
    expected = counted(Functions(device, reference).train(training), x, Counter(), training)
    found = counted(Functions(device, functional).train(training), x, Counter(), training)
    assert "fastmbconv::squeeze_excite_forward" in found.operators and found.total == expected.total > 0
    with FlopCounterMode(display=False) as counter:
        counted(Functions(device, functional).train(training), x, Counter(), training)
    assert counter.get_total_flops() == expected.total


def test_formulas_count_the_stem_and_the_head(device):
    stem, head = ConvBNAct(3, 4, 3, 2, "same", "silu", 1e-3, 0.1), ConvBNAct(4, 6, 1, 1, 0, "silu", 1e-3, 0.1)
    model, x = nn.ModuleList((stem, head)).to(device).eval(), normal(2, 3, 6, 5, dtype=torch.float32, device=device)

    def total(counter):
        with torch.no_grad(), counter:
            head.pooled(stem(x))
        return counter

    found = total(Aware())
    assert "fastmbconv::pointwise_bn_act_pool_infer" in found.operators
    fastmbconv.unfuse(model)
    assert found.total == total(Counter()).total > 0


def test_every_operator_has_a_formula():
    names = ops.OPERATORS.keys()
    assert names == flops.FORMULAS.keys()
    assert all(getattr(torch.ops.fastmbconv, name) in flop_registry for name in names)


def small_model(device):
    return library("timm").create_model("test_efficientnet", num_classes=4).to(device)


@pytest.mark.parametrize("training", [True, False])
def test_a_counter_of_somebody_elses_sees_atens_operators(training, device):
    """All of the un-fused model's, with its stem and its head, where kernels are demanded too."""
    model, x = small_model(device).train(training), normal(2, 3, 32, 32, dtype=torch.float32, device=device)
    expected = counted(copy.deepcopy(model), x, Counter(), training)
    found = counted(fastmbconv.fuse(model), x, Counter(), training)
    assert found.total == expected.total and found.operators == expected.operators


def test_the_backward_of_kernels_is_counted_by_formula(device):
    """Of a forward that ran before the counter was there."""
    module, x = block(device), normal(2, 4, 7, 5, dtype=torch.float32, device=device)
    totals = []
    for each in (module, fastmbconv.unfuse(copy.deepcopy(module))):
        loss = each(x.clone().requires_grad_()).square().sum()
        with Counter() as counter:
            loss.backward()
        totals.append(counter.total)
    assert totals[0] == totals[1] > 0 and not counter.unknown


class Functional(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A tensor that looks at every operator that it meets."""

    seen = set()

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(func.name())
        args = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, args)
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, func(*args, **(kwargs or {})))


def test_other_watchers_see_eager_too(device):
    module, x = block(device).eval(), normal(2, 4, 6, 5, dtype=torch.float32, device=device)
    with torch.no_grad():
        with Functional() as mode:
            module(x)
        assert torch.conv2d in mode.seen
        with fastmbconv.backend("auto"):
            module(Tagged(x))
    assert "aten::convolution" in Tagged.seen and not any("fastmbconv" in name for name in Tagged.seen)


def test_the_reason_is_told(device):
    module = block(device)
    with Counter():
        assert fastmbconv.explain(module).rows[0].reason == "Counter, a TorchDispatchMode, watches the operators"
    with Functional():
        assert dispatch.watching_reason() == "Functional, a TorchFunctionMode, watches the operators"
    with Aware(), torch.device(device):
        assert dispatch.watching_reason() is None


def test_torchs_own_modes_see_the_kernels_and_change_nothing(device):
    debug = pytest.importorskip("torch.utils._debug_mode", reason="torch has no DebugMode")
    module, x = block(device), normal(2, 4, 6, 5, dtype=torch.float32, device=device)
    expected, again = step(copy.deepcopy(module), x), copy.deepcopy(module)
    with debug.DebugMode() as mode:
        found = step(again, x)
    assert "fastmbconv::mbconv_backward" in mode.debug_string()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_flop_counter_mode(device):
    """Its hook on every module sends the blocks to eager, so that each layer has its own line."""
    module, x = small_model(device), normal(2, 3, 32, 32, dtype=torch.float32, device=device)
    tables = []
    for each in (copy.deepcopy(module), fastmbconv.fuse(module)):
        with FlopCounterMode(display=False) as counter:
            step(each, x)
        tables.append({name.removeprefix("Fused"): value for name, value in counter.get_flop_counts().items()})
    assert tables[0] == tables[1]


def test_mem_tracker(device):
    """It hooks every module too."""
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker", reason="torch has no MemTracker")
    module, x = block(device), normal(2, 4, 6, 5, dtype=torch.float32, device=device)
    peaks = []
    for each in (fastmbconv.unfuse(copy.deepcopy(module)), module):
        memory = tracker.MemTracker()
        memory.track_external(each)
        with memory, launches() as seen:
            step(each, x)
        peaks.append({str(device): sum(peak.values()) for device, peak in memory.get_tracker_snapshot("peak").items()})
    assert peaks[0] == peaks[1] and not seen


def saves(word):
    def policy(ctx, func, *args, **kwargs):
        choice = checkpoint.CheckpointPolicy
        return choice.MUST_SAVE if word in func.name() else choice.PREFER_RECOMPUTE

    return partial(checkpoint.create_selective_checkpoint_contexts, policy)


POLICIES = {
    "all-of-ours": ("fastmbconv::", True),
    "one-of-ours": ("fastmbconv::mbconv_forward", True),
    "atens": ("aten::convolution", True),
    "nothing": ("nothing", True),
    "eval": ("fastmbconv::", False),
}


@pytest.mark.parametrize("word, training", POLICIES.values(), ids=POLICIES)
def test_selective_checkpointing(word, training, device):
    """Whatever a policy saves. As in eager, what is computed again moves the running statistics again."""
    module = block(device, se_ratio=0, expand_ratio=2).train(training)
    x = normal(2, 4, 3, 2, dtype=torch.float32, device=device)
    expected, again = step(copy.deepcopy(module), x), copy.deepcopy(module)
    found = step(
        again, x, lambda x: checkpoint.checkpoint(again, x, use_reentrant=False, context_fn=saves(word), debug=False)
    )
    for name in ("y", "x", *(name for name, _ in module.named_parameters())):
        assert torch.equal(found[name], expected[name]), name
    eager = fastmbconv.unfuse(copy.deepcopy(module))
    theirs = step(eager, x, lambda x: checkpoint.checkpoint(eager, x, use_reentrant=False))
    statistics = {name for name, _ in module.named_buffers() if "running" in name}
    as_once = expected if word.startswith("fastmbconv") else theirs  # a forward that is saved is not run again
    for name in statistics:
        torch.testing.assert_close(found[name], as_once[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operators(mode, training, device):
    module, x = block(device).train(training), normal(2, 4, 3, 2, dtype=torch.float32, device=device)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        traced = make_fx(copy.deepcopy(module), tracing_mode=mode, _allow_non_fake_inputs=True)
        graph = traced(x)
        assert torch.equal(graph(x), expected(x))
    assert any("fastmbconv" in str(node.target) for node in graph.graph.nodes)


def test_the_profiler_counts_atens_operators_alone(device):
    """torch.profiler has no registry: its flops are those of aten's operators that it knows by name."""
    model, x = block(device), normal(2, 4, 6, 5, dtype=torch.float32, device=device)
    with warnings.catch_warnings(), torch.profiler.profile(with_flops=True) as profile:
        warnings.simplefilter("ignore")
        model(x)
    assert sum(event.flops for event in profile.key_averages()) == 0
