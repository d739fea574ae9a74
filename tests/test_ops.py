"""The operators under torch.library and torch.compile: true schemas and shapes, one graph, the same numbers."""

import contextlib
import copy

import pytest
import torch
import triton.language as tl
from blocks import BatchNorm, bn_module, make_block, nhwc, norm_vectors, normal, outcome
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastmbconv
from benchmarks.launches import caught
from fastmbconv import ahead, functional, ops
from fastmbconv.block import SqueezeExcite
from fastmbconv.kernels import expand_backward, launching
from fastmbconv.mbconv import MBConv

NAMES = sorted(name for name in vars(ops) if isinstance(getattr(ops, name), torch._library.custom_ops.CustomOpDef))


def arguments(device, dtype=torch.float32):
    """One or more calls of each operator, every optional tensor there once and missing once."""
    n, h, w, c, e, r, o = 2, 3, 2, 3, 5, 2, 4

    def image(channels, height=h, width=w):
        return nhwc(normal(n, channels, height, width, dtype=dtype, device=device))

    def vectors(*shape):
        return normal(*shape, dtype=torch.float32, device=device)

    def norm(channels):
        return norm_vectors(channels, dtype, device)

    def batch_norm(channels, update):
        bn = bn_module(channels, torch.float32, device)
        running = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        return (bn.weight.detach(), bn.bias.detach(), *running, 1e-3, 0.1, update, update)

    def bare(channels):
        return (None,) * 5 + (1e-3, None, True, False)

    expand, project = vectors(e, c, 1, 1).to(dtype), vectors(o, e, 1, 1).to(dtype)
    taps = vectors(e, 1, 3, 3).to(dtype)
    excite = [t.to(dtype) for t in (vectors(r, e, 1, 1), vectors(r), vectors(e, r, 1, 1), vectors(e))]
    pooled, reduced, gate = vectors(n, e), vectors(n, r), vectors(n, e).sigmoid()
    act_sums = vectors(n, 2, e)
    keep = torch.tensor([0.0, 2.0], device=device)
    return {
        "pointwise_bn": [
            (image(c), expand, None, None, "none", *batch_norm(e, True)),
            (image(e), project, norm(e), gate, "silu", *batch_norm(o, False)),
            (image(e), project, norm(e), None, "relu6", *bare(o)),
        ],
        "depthwise_bn": [
            (image(e), None, taps, norm(e), "silu", 1, 1, 1, h, w, *batch_norm(e, True)),
            (image(e), None, taps, None, "none", 2, 1, 1, 2, 1, *bare(e)),
            (image(c), expand, taps, norm(e), "silu", 1, 1, 1, h, w, *bare(e)),
        ],
        "pointwise": [(image(c), expand)],
        "round_weight": [(expand, image(c).bfloat16())],
        "expand_norm": [
            (image(c), expand, *batch_norm(e, True)),
            (image(c), expand, *batch_norm(e, False)),
        ],
        "pool_excite": [
            (image(e), norm(e), *excite, "silu", "silu"),
            (image(e), None, *excite, "none", "relu"),
        ],
        "bn_act": [
            (image(o), norm(o), None, keep, image(o), "none"),
            (image(e), None, gate, None, None, "none"),
        ],
        "bn_bwd": [
            (image(o), image(o), norm(o), keep, "none", True),
            (image(e), image(e), norm(e), None, "silu", False),
        ],
        "bn_act_bwd": [
            (image(e), image(e), norm(e), vectors(4, e), None, "silu"),
            (image(e), image(e), norm(e), vectors(4, e), keep, "relu"),
        ],
        "image_norm": [(image(e), *batch_norm(e, True)), (image(e), *batch_norm(e, False))],
        "project_bwd": [
            (image(o), image(o), vectors(4, o), keep, project, image(e), norm(e), gate, act_sums, pooled, reduced,
             excite[0], excite[2], "silu", "silu", True, True),
            (image(o), image(o), vectors(4, o), None, project, image(e), norm(e), *(None,) * 6, "silu", "none", False,
             False),
        ],
        "depthwise_bwd": [
            (image(e), image(e), None, taps, norm(e), None, "silu", 1, 1, 1, True),
            (image(e), image(e), None, taps, None, image(e), "none", 1, 1, 1, False),
            (image(e), image(c), expand, taps, norm(e), None, "silu", 1, 1, 1, True),
        ],
        "expand_bwd": [
            (image(e), image(e), image(c), expand, vectors(4, e), image(c), True),
            (image(e), None, image(c), expand, vectors(4, e), None, False),
        ],
        "squeeze_excite_bwd": [
            (image(e), image(e), pooled, reduced, gate, excite[0], excite[2], "silu"),
        ],
    }  # fmt: skip


def test_every_operator_has_a_row(device):
    assert sorted(arguments(device)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    """No hidden mutation or alias, and the fake implementation's shapes, strides and dtypes are the kernels' own."""
    for args in arguments(device)[name]:
        torch.library.opcheck(getattr(ops, name), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")])
def test_fake_dtypes_in_half_precision(dtype, device):
    for name, calls in arguments(device, dtype).items():
        torch.library.opcheck(getattr(ops, name), calls[0], test_utils="test_faketensor")


@pytest.mark.parametrize("name", ["depthwise_bn", "project_bwd"])
def test_opcheck_under_aot_dispatch(name, device):
    """With symbolic shapes: a new batch size compiles nothing new."""
    torch.library.opcheck(getattr(ops, name), arguments(device)[name][0], test_utils="test_aot_dispatch_dynamic")


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
    assert len(operators(_Watching())) >= 8


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
        block = MBConv(16, 16, 3).to("meta").describe()
        x = torch.empty(2**20, 16, 16, 16, device="meta")
        with caught(lambda kernel, args, kwargs: grids.append((kernel.__name__, kwargs["grid"]))), torch.no_grad():
            ahead.train(functional._arguments(x, block, memory, x.dtype, None))

    with pytest.raises(ValueError, match=r"x is too large for _depthwise_fwd_kernel: its grid would be \(\d+, \d+\)"):
        step()
    monkeypatch.setattr(launching, "MOST_PROGRAMS", 2**31)
    step()
    larger = {name for name, grid in grids if max(grid[1:], default=0) > 65535 or grid[0] >= 2**31}
    assert larger == {"_depthwise_fwd_kernel", "_depthwise_bwd_kernel"}
