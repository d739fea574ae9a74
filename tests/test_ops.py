"""The operators under torch.library and torch.compile: true schemas and shapes, one graph, the same numbers."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from blocks import BatchNorm, bn_module, make_block, nhwc, normal, outcome
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastmbconv
from benchmarks.launches import caught
from fastmbconv import call, functional, ops
from fastmbconv.block import Block, DenseBlock, SqueezeExcite
from fastmbconv.fused import PARTS, mbconv, single
from fastmbconv.fused import dense as dense_part
from fastmbconv.kernels import expand_backward, launching
from fastmbconv.mbconv import MBConv

NAMES = sorted(ops.OPERATORS)


def calls(device, dtype=torch.float32):
    """(settings, x, shortcut, keep, weights, statistics) by part, every optional tensor there once and missing once."""
    n, h, w, c, e, r, o = 2, 3, 2, 3, 5, 2, 4

    def image(channels, height=h, width=w):
        return nhwc(normal(n, channels, height, width, dtype=dtype, device=device))

    def weight(*shape):
        return normal(*shape, dtype=dtype, device=device)

    def norm(channels, training=True, **options):
        return BatchNorm.of(bn_module(channels, torch.float32, device, **options).train(training).requires_grad_(False))

    def bare(channels, training=True):
        return norm(channels, training, affine=False, track_running_stats=not training)

    def block(expands, training=True, se=True, stride=1, padding=1, act="silu"):
        make = norm if se else bare
        return Block(
            weight(e, c, 1, 1) if expands else None,
            make(e, training) if expands else None,
            weight(e, 1, 3, 3),
            make(e, training),
            excite if se else None,
            weight(o, e, 1, 1),
            make(o, training),
            stride,
            padding,
            act,
            False,
        )

    def dense(projects, se, training=True):
        make, none = (norm if se else bare), None
        project = (weight(o, e, 1, 1), make(o, training)) if projects else (none, none)
        return DenseBlock(
            nn.Identity(), weight(e, 4, 3, 3), 1, 1, make(e, training), excite if se else none, *project, "silu", False
        )

    excite = SqueezeExcite(weight(r, e, 1, 1), weight(r), weight(e, r, 1, 1), weight(e), "relu")
    keep = torch.tensor([0.0, 2.0], device=device)
    reduced, alone = SqueezeExcite(weight(r, e, 1, 1), weight(r), weight(e, r, 1, 1), weight(e)), norm(e, momentum=None)

    hard = SqueezeExcite(weight(r, e), weight(r), weight(e, r), weight(e), "relu", "hardsigmoid")
    others = replace(block(True, act="hardswish"), se=hard, depthwise_activation="gelu", project_activation="gelu_tanh")

    def of_mbconv(x, keep, block, lean=False, shortcut=None):
        weights, statistics, settings = mbconv.describe(block, x.shape[3] == o, lean)
        return settings, x, shortcut, keep, weights, statistics

    def of_dense(x, shortcut, keep, block):
        weights, statistics, settings = dense_part.describe(block, shortcut is not None)
        return settings, x, shortcut, keep, weights, statistics

    def of_single(part, x, weights, bn, act="silu"):
        return call.describe_single(part, bn, act)._replace(padding=1), x, None, None, weights, call.statistics(bn)

    eval_block = replace(block(True, False), project_weight=weight(c, e, 1, 1), bn3=norm(c, False))
    taps, affine = weight(e, 1, 3, 3), call.affine
    return {
        "mbconv": [
            of_mbconv(image(c), keep, block(True)),
            of_mbconv(image(c), None, block(True, padding="same", stride=2), lean=True),
            of_mbconv(image(e), None, block(False, se=False, act="relu6")),
            of_mbconv(image(c), None, eval_block),
            of_mbconv(image(e), None, block(False, False, se=False, stride=2, padding=(0, 1))),
            of_mbconv(image(c), keep, others, shortcut=image(o)),
            of_mbconv(image(e), None, replace(block(False), depthwise_activation="none", project_activation="relu6")),
        ],
        "dense": [
            of_dense(image(e), image(o), keep, dense(True, True)),
            of_dense(image(e), None, None, dense(True, False)),
            of_dense(image(e), image(e), None, dense(False, False)),
            of_dense(image(e), image(o), None, dense(True, True, False)),
            of_dense(image(e), None, None, dense(False, False, False)),
        ],
        "depthwise_bn_act": [
            of_single("depthwise_bn_act", image(e), single.DepthwiseWeights(taps, *affine(bn)), bn)
            for bn in (alone, norm(e, False), bare(e))
        ]
        + [of_single("depthwise_bn_act", image(e), single.DepthwiseWeights(taps, *affine(alone)), alone, "none")],
        "squeeze_excite": [
            (call.Settings("squeeze_excite", **call.excite_settings(se)), image(e), None, None, call.excite(se), ())
            for se in (reduced, hard)
        ],
        "bn_act": [
            of_single("bn_act", image(e), single.NormWeights(*affine(bn)), bn, "relu")
            for bn in (norm(e, False), bare(e, False))
        ],
        "pointwise_bn_act_pool": [
            of_single("pointwise_bn_act_pool", image(c), single.DepthwiseWeights(weight(e, c, 1, 1), *affine(bn)), bn)
            for bn in (norm(e, False),)
        ],
    }  # fmt: skip


def arguments(device, dtype=torch.float32):
    """The same as operators take them, by operator."""
    found = {name: [] for name in NAMES}
    for name, rows in calls(device, dtype).items():
        part = PARTS[name]
        for settings, x, shortcut, keep, weights, statistics in rows:
            packed, weights = call.pack(settings), part.weights(*weights)
            lists = call.list_moved(settings, statistics), call.list_read(settings, statistics)
            if part.forward is not None:
                found[f"{name}_forward"].append((x, shortcut, keep, list(weights), *lists, *packed))
                y, saved = part.forward(x, shortcut, keep, weights, statistics, settings)
                kept = [tensor for tensor in saved if tensor is not None]
                for needs in ([True] * (1 + len(weights)), [False] * (len(weights) - 1) + [True] * 2):
                    there = [each and t is not None for each, t in zip(needs, (x, *weights), strict=True)]
                    dy = nhwc(torch.randn_like(y))
                    found[f"{name}_backward"].append((dy, x, keep, kept, list(weights), there, *packed))
            if part.infer is not None and not lists[0] and all(own is None or own.tracked for own in settings.norms):
                found[f"{name}_infer"].append((x, shortcut, list(weights), lists[1], *packed))
    return found


def test_every_operator_has_a_row(device):
    assert sorted(name for name, rows in arguments(device).items() if rows) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    """No hidden mutation or alias, and the fake implementation's shapes, strides and dtypes are the kernels' own."""
    for args in arguments(device)[name]:
        torch.library.opcheck(ops.OPERATORS[name], args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")])
def test_fake_dtypes_in_half_precision(dtype, device):
    for name, rows in arguments(device, dtype).items():
        torch.library.opcheck(ops.OPERATORS[name], rows[0], test_utils="test_faketensor")


@pytest.mark.parametrize("name", ["mbconv_forward", "mbconv_backward", "dense_forward", "mbconv_infer"])
def test_opcheck_under_aot_dispatch(name, device):
    """With symbolic shapes: a new batch size compiles nothing new."""
    torch.library.opcheck(ops.OPERATORS[name], arguments(device)[name][0], test_utils="test_aot_dispatch_dynamic")


def test_a_call_crosses_an_operator_whole(device):
    for rows in calls(device).values():
        for settings, *_, statistics in rows:
            assert call.unpack(settings.part, *call.pack(settings)) == settings
            back = call.join_statistics(
                settings, call.list_moved(settings, statistics), call.list_read(settings, statistics)
            )
            for there, before in zip(back, statistics, strict=True):
                assert there is None or there is before


class DepthwiseBNAct(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(normal(4, 1, 3, 3, dtype=torch.float32, device=device))
        self.bn = bn_module(4, torch.float32, device)

    def forward(self, x):
        return functional.depthwise_bn_act(x, self.weight, BatchNorm.of(self.bn), 1, 1)


class SE(nn.Module):
    def __init__(self, device):
        super().__init__()
        shapes = ((2, 4, 1, 1), (2,), (4, 2, 1, 1), (4,))
        self.weights = nn.ParameterList([normal(*s, dtype=torch.float32, device=device) for s in shapes])

    def forward(self, x):
        return functional.squeeze_excite(x, SqueezeExcite(*self.weights))


def subject(kind, device):
    if kind == "depthwise_bn_act":
        return DepthwiseBNAct(device)
    if kind == "squeeze_excite":
        return SE(device)
    module = make_block(4, 4, expand_ratio=2, drop_path=0.0, device=device)
    return module.eval() if kind == "mbconv-eval" else module


@pytest.mark.parametrize("kind", ["mbconv", "mbconv-eval", "depthwise_bn_act", "squeeze_excite"])
def test_compiled_is_one_graph_with_the_same_numbers(kind, device, triton_backend):
    """Statistics included: they move once, not once in tracing and once in running."""
    torch._dynamo.reset()
    module = subject(kind, device)
    x, dy = (normal(2, 4, 3, 2, dtype=torch.float32, device=device) for _ in range(2))
    plain, compiled = copy.deepcopy(module), copy.deepcopy(module)
    expected = outcome(plain, plain, x, dy)
    ours = outcome(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"), x, dy)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_no_graph_breaks(device, triton_backend):
    torch._dynamo.reset()
    module = subject("mbconv", device)
    explained = torch._dynamo.explain(module)(normal(2, 4, 3, 2, dtype=torch.float32, device=device))
    assert explained.graph_break_count == 0 and explained.graph_count == 1


def test_a_second_batch_size_compiles_at_most_once_more(device, triton_backend):
    torch._dynamo.reset()
    module = subject("mbconv-eval", device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in (2, 3, 5, 4):
            x = normal(n, 4, 3, 2, dtype=torch.float32, device=device)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


def test_a_compiled_block_sees_a_frozen_batch_norm(device, triton_backend):
    """eval() on one BatchNorm after compiling: the graph is guarded on it."""
    torch._dynamo.reset()
    module = subject("mbconv", device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = normal(2, 4, 3, 2, dtype=torch.float32, device=device)
    with torch.no_grad():
        compiled(x)
        module.project_bn.eval()
        before = module.project_bn.running_mean.clone()
        torch.testing.assert_close(compiled(x), copy.deepcopy(module)(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(module.project_bn.running_mean, before)


def test_eager_backend_compiles_to_one_graph_too(device):
    torch._dynamo.reset()
    with fastmbconv.backend("eager"):
        module = subject("mbconv", device)
        explained = torch._dynamo.explain(module)(normal(2, 4, 3, 2, dtype=torch.float32, device=device))
    assert explained.graph_break_count == 0


def test_an_eager_step_goes_straight_to_the_launchers(device, triton_backend):
    """An operator's dispatch costs the host tens of microseconds: eager calls leave it out, watched ones do not."""
    module, x = subject("mbconv", device), normal(2, 4, 3, 2, dtype=torch.float32, device=device)
    x.requires_grad_()
    module(x).sum().backward()

    def operators(mode):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, mode:
            module(x).sum().backward()
        return {event.name for event in profile.events() if event.name.startswith("fastmbconv::")}

    assert operators(contextlib.nullcontext()) == set()
    assert operators(_Watching()) == {"fastmbconv::mbconv_forward", "fastmbconv::mbconv_backward"}


class _Watching(TorchDispatchMode):
    sees_fastmbconv = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_running_statistics_that_moved_say_so(device, triton_backend):
    """Autograd's check of tensors that were changed since they were saved sees the launchers' writes too."""
    module = subject("mbconv", device)
    before = module.project_bn.running_mean._version
    module(normal(2, 4, 3, 2, dtype=torch.float32, device=device).requires_grad_())
    assert module.project_bn.running_mean._version > before


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_only_the_walks_reach_the_end_of_a_grid(memory, monkeypatch):
    """CUDA takes 65535 programs along the second and third axis; who asks for more is told so."""
    monkeypatch.setattr(expand_backward, "INTERPRETED", tl.constexpr(False))  # its chunks are 2 tiles
    grids = []

    def step():
        weights, statistics, settings = mbconv.describe(MBConv(16, 16, 3).to("meta").describe(), True, memory == "lean")
        x = torch.empty(2**20, 16, 16, 16, device="meta")
        with caught(lambda kernel, grid, given: grids.append((kernel.__name__, grid))), torch.no_grad():
            y, saved = mbconv.forward(x, None, None, weights, statistics, settings)
            mbconv.backward(y.permute(0, 2, 3, 1), x, None, saved, weights, settings, [True] * (1 + len(weights)))

    with pytest.raises(ValueError, match=r"x is too large for _depthwise_fwd_kernel: its grid would be \(\d+, \d+\)"):
        step()
    monkeypatch.setattr(launching, "MOST_PROGRAMS", 2**31)
    step()
    larger = {name for name, grid in grids if max(grid[1:], default=0) > 65535 or grid[0] >= 2**31}
    assert larger == {"_depthwise_fwd_kernel", "_depthwise_bwd_kernel"}
