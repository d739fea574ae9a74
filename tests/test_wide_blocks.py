"""What MBConv, the module, leaves out, by the kernels: outputs, gradients and statistics against float64."""

import copy
from dataclasses import replace

import pytest
import torch
from blocks import FLOATS, PRECISE, assert_outcomes, batch_norms, fused, outcome
from conftest import GPU
from test_ahead import named
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from wide_blocks import WIDE_ROWS, assert_wide_parity, beside_weights, build_wide

from fastmbconv import ahead, dispatch, functional, plans
from fastmbconv.kernels import depthwise_inference, launching

KERNELS = {"mobilenet-v3", "start-everything"}


def rows():
    return [
        pytest.param(row, id=name, marks=[pytest.mark.kernels] if name in KERNELS else [])
        for name, row in WIDE_ROWS.items()
    ]


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("row", rows())
def test_training(row, memory, device):
    module, x, dy = build_wide(row, PRECISE, device)
    module.memory = memory
    assert_wide_parity(module, x, dy)


@pytest.mark.parametrize("row", rows())
def test_gradients_with_running_statistics(row, device):
    assert_wide_parity(*build_wide(row, PRECISE, device, training=False))


def inferred(module, x):
    with torch.no_grad():
        return {"y": module(x)}


def assert_inference(module, x):
    eager, truth = copy.deepcopy(module), copy.deepcopy(module).double()
    ours, theirs = inferred(fused(module), x), inferred(eager.forward_eager, x)
    assert_outcomes(ours, theirs, inferred(truth.forward_eager, x.double()))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("row", rows())
def test_inference(row, inside, device, monkeypatch):
    monkeypatch.setattr(depthwise_inference, "expands_inside", lambda *_: inside)
    module, x, _ = build_wide(row, PRECISE, device, training=False)
    assert_inference(module, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["mobilenet-v3", "gelu", "gelu-tanh", "start-everything"])
def test_inference_in_narrow_types(name, dtype, device):
    module, x, _ = build_wide(WIDE_ROWS[name], dtype, device, training=False)
    assert_inference(module, x)


CHANGES = {
    "first-frozen": lambda m: m.expand_bn.eval(),
    "second-frozen": lambda m: m.depthwise_bn.eval(),
    "third-frozen": lambda m: m.project_bn.eval(),
    "start-frozen": lambda m: m.start_bn.eval(),
    "start-frozen-alone": lambda m: m.eval().start_bn.train(),
    "cumulative": lambda m: set_norms(m, momentum=None),
    "untracked": lambda m: set_norms(m, track_running_stats=False),
    "frozen-biases": lambda m: [c.bias.requires_grad_(False) for c in m.children() if isinstance(c, nn.Conv2d)],
    "norms-without-weights": lambda m: set_norms(m.eval(), weight=None),
}  # fmt: skip


def set_norms(module, **attributes):
    for bn in batch_norms(module):
        bn.num_batches_tracked.fill_(3)
        for name, value in attributes.items():
            setattr(bn, name, value)


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_biases_and_a_start_with_other_norms(change, device):
    module, x, dy = build_wide(WIDE_ROWS["start-everything"], PRECISE, device)
    change(module)
    assert_wide_parity(module, x, dy)


@pytest.mark.parametrize("name", ["start_conv.weight", "start_conv.bias", "depthwise_conv.bias", "start_bn.weight"])
def test_one_gradient_alone(name, device):
    """Of no image and of no weight of the block's own: still no inference."""
    module, x, dy = build_wide(WIDE_ROWS["start-everything"], PRECISE, device, training=False)
    for own, parameter in module.named_parameters():
        parameter.requires_grad_(own == name)
    wanted = module.get_parameter(name)
    found = [torch.autograd.grad(forward(x), wanted, dy)[0] for forward in (fused(module), module.forward_eager)]
    torch.testing.assert_close(*found)


def test_a_bias_before_a_norm_without_one_is_refused(device):
    module, x, _ = build_wide(WIDE_ROWS["biases"], torch.float32, device)
    module.depthwise_bn.bias = None
    assert dispatch.block_reason(module.describe()) == "a convolution's bias before a BatchNorm without one"


REFUSED = {
    "gate": (lambda b: replace(b, se=replace(b.se, gate="tanh")), "gate 'tanh' (supported: sigmoid, hardsigmoid)"),
    "first": (lambda b: replace(b, activation="mish"), "activation 'mish' (supported: silu, relu, relu6, hardswish"),
    "second": (lambda b: replace(b, depthwise_activation="mish"), "activation 'mish' (supported: silu, relu"),
    "third": (
        lambda b: replace(b, project_activation="mish"),
        "activation 'mish' after the projection (supported: silu",
    ),
    "start": (
        lambda b: replace(b, start=replace(b.start, stride=3)),
        "in front of the block stride 3 (supported: 1, 2)",
    ),
}


@pytest.mark.parametrize("change, reason", [pytest.param(*v, id=k) for k, v in REFUSED.items()])
def test_reasons(change, reason):
    module, _, _ = build_wide(WIDE_ROWS["start-everything"])
    assert dispatch.block_reason(module.describe()) is None
    assert dispatch.block_reason(change(module.describe())).startswith(reason)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["start-everything", "start-strided"])
def test_autocast(name, dtype, device):
    """A wider shortcut than the branch, and a bias that eager casts."""
    torch.manual_seed(2)
    row = WIDE_ROWS[name]
    row = row._replace(image=(4, 24, *row.image[2:]), block=row.block | dict(out_channels=24, linear=False))
    module, x, dy = build_wide(row, torch.float32, device)

    def narrow(forward):
        def call(x):
            with torch.autocast(device.type, dtype):
                return forward(x)

        return call

    eager, truth = copy.deepcopy(module), copy.deepcopy(module).double()
    eager.drop_path = truth.drop_path = module.drop_path
    theirs = outcome(eager, narrow(eager.forward_eager), x, dy)
    exact = outcome(truth, truth.forward_eager, x.double(), dy.double())
    ours = outcome(module, narrow(fused(module)), x, dy)
    assert ours["y"].dtype == theirs["y"].dtype
    half = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in beside_weights(ours).items()
    }
    theirs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in beside_weights(theirs).items()
    }
    assert_outcomes(half, theirs, beside_weights(exact))


def test_a_transformed_backward(device, triton_backend):
    """Of many gradients at once, by eager."""
    module, x, dy = build_wide(WIDE_ROWS["start-everything"], PRECISE, device)
    inputs = [x.requires_grad_(), *module.parameters()]
    several = torch.stack((dy, 2 * dy))
    y = fused(module)(x)
    found = torch.autograd.grad(y, inputs, several, is_grads_batched=True, retain_graph=True)
    expected = torch.autograd.grad(y, inputs, dy)
    for ours, once in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.stack((once, 2 * once)), rtol=1e-6, atol=1e-9)


def step(module, x, dy):
    for parameter in module.parameters():
        parameter.grad = None
    return outcome(module, fused(module), x, dy)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["mobilenet-v3", "start-everything"])
def test_a_replay_is_what_launchers_do(name, training, device):
    plans.forget()
    module, x, dy = build_wide(WIDE_ROWS[name], torch.float32, device, training)
    for _ in range(2):
        step(module, x + 1, dy)
    other = copy.deepcopy(module)
    other.drop_path = module.drop_path
    ours = step(module, x, dy)
    with launching.watching():
        expected = step(other, x, dy)
    for key, value in expected.items():
        assert torch.equal(value, ours[key]), key
    assert len(plans.made()) == (4 if module.start_conv is not None else 2)


def test_a_bias_of_another_dtype_is_noticed(device, triton_backend):
    """The block is described once: the tensors are what they were, their data is not."""
    module, x, _ = build_wide(WIDE_ROWS["biases"], torch.float32, device, training=False)
    block = module.describe()
    with torch.no_grad():
        functional.mbconv(x, block)
        (ready,) = block.calls.values()
        assert ready.holds()
        module.depthwise_conv.bias.data = module.depthwise_conv.bias.data.half()
        assert not ready.holds()
        with pytest.raises(ValueError, match="block.bn2.conv_bias has dtype torch.float16"):
            functional.mbconv(x, block)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled(training, device, triton_backend):
    module, x, dy = build_wide(WIDE_ROWS["start-everything"], torch.float32, device, training)
    other = copy.deepcopy(module)
    other.drop_path = module.drop_path
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: functional.mbconv(x, module.describe()), backend=counter, fullgraph=True)
    ours, expected = outcome(module, compiled, x, dy), step(other, x, dy)
    assert counter.frame_count == 1
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kind", ["train", "infer"])
@pytest.mark.parametrize("name", ["start-everything", "start-strided", "mobilenet-v3"])
def test_ahead_are_the_launches_of_the_step(name, kind, device, triton_backend):
    module, x, _ = build_wide(WIDE_ROWS[name], torch.float32, device, kind == "train")
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(kind == "train")
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.set_grad_enabled(kind == "train"):
        expected = ahead.model_launches(x, module.describe(), "fast", kind)
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        with launching.written() as launches:
            y = functional.mbconv(x, module.describe())
            if kind == "train" and not GPU:
                y.backward(torch.ones_like(y))
    seen = named(launches)
    assert seen == named(expected)[: len(seen)]
    assert GPU or len(seen) == len(expected)


WIDER = {name: row for name, row in WIDE_ROWS.items() if name in KERNELS | {"gelu", "gelu-tanh", "biases"}}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in WIDER.items()])
def test_narrow_types(row, dtype, device):
    """More channels: over a handful of values, rounding noise hides which of two errors is the larger.

    And a draw in which a half falls on the same side of a hard gate's ends as the double, for kernels and for eager:
    a gate that does not has another derivative, and there are few of them.
    """
    torch.manual_seed(2)
    out = 24 if row.block["out_channels"] == row.image[1] else 40
    row = row._replace(block=row.block | dict(out_channels=out), image=(4, 24, *row.image[2:]))
    assert_wide_parity(*build_wide(row, dtype, device))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_bias_in_a_model_of_halves(dtype, training, device):
    """BatchNorms of halves too: what their bias becomes with the convolution's is no half."""
    torch.manual_seed(2)
    row = WIDE_ROWS["biases"]
    row = row._replace(image=(4, 24, *row.image[2:]), block=row.block | dict(out_channels=24))
    module, x, dy = build_wide(row, dtype, device, training)
    module.to(dtype)
    with torch.no_grad():
        module.depthwise_conv.bias.add_(100)
        module.depthwise_bn.running_mean.add_(100)
    assert_wide_parity(module, x, dy)
