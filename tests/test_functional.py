"""The public functions: parity at random shapes, autocast, empty batches, bad input refused before anything moves."""

import copy
import dataclasses

import pytest
import torch
from blocks import (  # noqa: F401
    FLOATS,
    PRECISE,
    BatchNorm,
    assert_module_parity,
    assert_outcomes,
    assert_untouched,
    batch_norms,
    bn_module,
    fused,
    launches,
    make_block,
    normal,
    outcome,
    state,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fastmbconv
from fastmbconv import functional, reference
from fastmbconv.block import SqueezeExcite
from fastmbconv.mbconv import MBConv


class DepthwiseBNAct(nn.Module):
    def __init__(self, channels, kernel_size, stride, padding, activation, dtype, device, **bn):
        super().__init__()
        self.weight = nn.Parameter(normal(channels, 1, kernel_size, kernel_size, dtype=dtype, device=device))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.bn = bn_module(channels, wide, device, **bn)
        self.setting = (stride, padding, activation)

    def forward(self, x):
        return functional.depthwise_bn_act(x, self.weight, BatchNorm.of(self.bn), *self.setting)

    def forward_eager(self, x):
        return reference.depthwise_bn_act(x, self.weight, BatchNorm.of(self.bn), *self.setting)


def assert_depthwise(module, x, dtype):
    dy = normal(*copy.deepcopy(module).forward_eager(x).shape, dtype=dtype, device=x.device)
    eager, truth = copy.deepcopy(module), copy.deepcopy(module).double()
    theirs = outcome(eager, eager.forward_eager, x, dy)
    exact = outcome(truth, truth.forward_eager, x.double(), dy.double())
    assert_outcomes(outcome(module, module, x, dy), theirs, exact)


DEPTHWISE = {
    "k3-silu": ((2, 5, 4, 3), (3, 1, 1, "silu"), {}, True),
    "k5-same-relu6": ((2, 5, 6, 3), (5, 2, "same", "relu6"), {}, True),
    "unpadded-relu": ((2, 5, 5, 4), (3, 2, 0, "relu"), {}, True),
    "eval": ((2, 5, 4, 3), (3, 1, 1, "silu"), {}, False),
    "cumulative": ((2, 5, 4, 3), (3, 1, 1, "silu"), dict(momentum=None), True),
    "no-affine": ((2, 5, 4, 3), (3, 1, 1, "silu"), dict(affine=False), True),
    "untracked-eval": ((2, 5, 4, 3), (3, 1, 1, "silu"), dict(track_running_stats=False), False),
}


@pytest.mark.parametrize("image, setting, bn, training", [pytest.param(*v, id=k) for k, v in DEPTHWISE.items()])
def test_depthwise_bn_act(image, setting, bn, training, device, triton_backend):
    module = DepthwiseBNAct(image[1], *setting, PRECISE, device, **bn).train(training)
    assert_depthwise(module, normal(*image, dtype=PRECISE, device=device), PRECISE)


@pytest.mark.parametrize("dtype", FLOATS)
def test_depthwise_bn_act_narrow(dtype, device, triton_backend):
    module = DepthwiseBNAct(40, 3, 2, "same", "silu", dtype, device)
    assert_depthwise(module, normal(4, 40, 6, 5, dtype=dtype, device=device), dtype)


blocks = st.fixed_dictionaries(
    dict(
        kernel_size=st.sampled_from([3, 5]),
        stride=st.sampled_from([1, 2]),
        expand_ratio=st.sampled_from([1, 2, 3.5]),
        se_ratio=st.sampled_from([0, 0.4]),
        activation=st.sampled_from(["silu", "relu6"]),
        out_channels=st.integers(1, 9),
    )
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # no shrinking: interpreted, it takes minutes, and the shapes are small as they come
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kwargs=blocks,
    n=st.integers(2, 4),
    c=st.integers(1, 9),
    h=st.integers(1, 6),
    w=st.integers(1, 3),
    padding=st.sampled_from([None, "same", 0, 1, 2]),
)
def test_any_block_and_size(kwargs, n, c, h, w, padding, device):
    """Shapes alone: in float64 where that runs. Sizes that leave no output are an error, as in eager."""
    torch.manual_seed(1)
    module = make_block(c, padding="same" if padding == "same" else None, dtype=PRECISE, device=device, **kwargs)
    if isinstance(padding, int):
        module.padding, module.depthwise_conv.padding = padding, (padding, padding)
        module.residual = module.residual and 2 * padding == module.depthwise_conv.kernel_size[0] - 1
    x = normal(n, c, h, w, dtype=PRECISE, device=device)
    try:
        shape = copy.deepcopy(module).forward_eager(x).shape
    except RuntimeError:
        with pytest.raises(ValueError, match="too small for kernel size"):
            fused(module)(x)
        return
    if n * shape[2] * shape[3] <= 4:  # batch statistics of so few values amplify every rounding at will
        module.eval()
    assert_module_parity(module, x, normal(*shape, dtype=PRECISE, device=device))


def under_autocast(forward, dtype):
    def call(x):
        with torch.autocast(x.device.type, dtype=dtype):
            return forward(x)

    return call


AUTOCAST = {
    "residual": (dict(in_channels=24, out_channels=24), torch.float32),
    "no-residual": (dict(in_channels=24, out_channels=40), torch.float32),
    "half-input": (dict(in_channels=24, out_channels=24), torch.bfloat16),
    "no-se-strided": (dict(in_channels=24, out_channels=24, stride=2, se_ratio=0), torch.float32),
}


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")])
@pytest.mark.parametrize("kwargs, given_dtype", [pytest.param(*v, id=k) for k, v in AUTOCAST.items()])
def test_autocast_follows_eager(kwargs, given_dtype, dtype, device):
    """fp32 parameters: fp32 gradients and statistics, eager's output dtype, errors by the parity rule."""
    given_dtype = given_dtype if given_dtype == torch.float32 else dtype
    module = make_block(expand_ratio=2, device=device, **kwargs)
    x = normal(4, 24, 5, 4, dtype=given_dtype, device=device)
    eager, truth = copy.deepcopy(module), copy.deepcopy(module).double()
    with torch.no_grad():
        dy = normal(*copy.deepcopy(module).forward_eager(x.float()).shape, dtype=dtype, device=device)
    theirs = outcome(eager, under_autocast(eager.forward_eager, dtype), x, dy)
    exact = outcome(truth, truth.forward_eager, x.double(), dy.double())
    ours = outcome(module, under_autocast(fused(module), dtype), x, dy)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert_outcomes(ours, theirs, exact)


@pytest.mark.parametrize("op", ["depthwise_bn_act", "squeeze_excite"])
@pytest.mark.parametrize(
    "given_dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
)
def test_autocast_of_the_parts_gives_eagers_dtype(op, given_dtype, device, triton_backend):
    x = normal(2, 4, 3, 3, dtype=given_dtype, device=device)
    if op == "squeeze_excite":
        shapes = ((2, 4, 1, 1), (2,), (4, 2, 1, 1), (4,))
        args = (SqueezeExcite(*(normal(*s, dtype=torch.float32, device=device) for s in shapes)),)
    else:
        weight = normal(4, 1, 3, 3, dtype=torch.float32, device=device)
        args = (weight, BatchNorm.of(bn_module(4, torch.float32, device)), 1, 1, "silu")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, theirs = getattr(functional, op)(x, *args), getattr(reference, op)(x, *args)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("training", [pytest.param(True, id="training"), pytest.param(False, id="eval")])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=["no-images", "no-rows"])
def test_empty_input_does_what_eager_does(shape, training, device, triton_backend):
    module = MBConv(4, 4, expand_ratio=2).to(device).train(training)
    eager = copy.deepcopy(module)
    results = []
    for owner, forward in ((module, module), (eager, eager.forward_eager)):
        try:
            y = forward(torch.zeros(shape, device=device))
            results.append((y.shape, y.dtype))
        except Exception as error:
            results.append(type(error))
        results[-1] = (results[-1], {k: v.clone() for k, v in owner.state_dict().items()})
    (ours, our_state), (theirs, their_state) = results
    assert ours == theirs
    for name, value in their_state.items():
        torch.testing.assert_close(our_state[name], value, equal_nan=True)


class Broken:
    """A block's description with one part replaced."""

    def __init__(self, part, value):
        self.part, self.value = part, value

    def __call__(self, block):
        head, _, rest = self.part.partition(".")
        if not rest:
            return dataclasses.replace(block, **{head: self.value(block)})
        return dataclasses.replace(
            block, **{head: dataclasses.replace(getattr(block, head), **{rest: self.value(getattr(block, head))})}
        )


BAD_BLOCKS = {
    "expand-shape": (Broken("expand_weight", lambda b: b.expand_weight[:, :, 0]), ["expand_weight", "(8, 4, 1)"]),
    "expand-in-channels": (Broken("expand_weight", lambda b: b.expand_weight[:, :3]), ["4 channels", "expect 3"]),
    "expand-without-bn": (Broken("bn1", lambda b: None), ["expand_weight", "bn1", "both or neither"]),
    "bn-without-expand": (Broken("expand_weight", lambda b: None), ["4 channels", "expect 8"]),
    "expand-device": (Broken("expand_weight", lambda b: b.expand_weight.to("meta")), ["expand_weight", "meta"]),
    "expand-dtype": (Broken("expand_weight", lambda b: b.expand_weight.half()), ["torch.float16", "torch.float32"]),
    "depthwise-shape": (Broken("depthwise_weight", lambda b: b.depthwise_weight[..., :2]), ["(8, 1, 3, 2)"]),
    "depthwise-dtype": (Broken("depthwise_weight", lambda b: b.depthwise_weight.double()), ["torch.float64"]),
    "project-shape": (Broken("project_weight", lambda b: b.project_weight[:, :7]), ["project_weight", "(4, 8, 1, 1)"]),
    "project-device": (Broken("project_weight", lambda b: b.project_weight.to("meta")), ["project_weight", "meta"]),
    "bn-weight-shape": (Broken("bn2.weight", lambda b: b.weight[:7]), ["bn2.weight", "(7,)", "(8,)"]),
    "bn-mean-shape": (Broken("bn3.running_mean", lambda b: b.running_mean[:1]), ["bn3.running_mean", "(1,)", "(4,)"]),
    "bn-var-device": (Broken("bn1.running_var", lambda b: b.running_var.to("meta")), ["bn1.running_var", "meta"]),
    "bn-eps": (Broken("bn1.eps", lambda b: -1e-3), ["bn1.eps", "-0.001", ">= 0"]),
    "se-reduce-shape": (Broken("se.reduce_weight", lambda b: b.reduce_weight[:, :7]), ["reduce_weight", "8"]),
    "se-bias-shape": (Broken("se.expand_bias", lambda b: b.expand_bias[:7]), ["se.expand_bias", "(7,)", "(8,)"]),
    "stride-zero": (Broken("stride", lambda b: 0), ["stride is 0", ">= 1"]),
    "stride-type": (Broken("stride", lambda b: 1.5), ["stride is 1.5", "integer"]),
    "padding-negative": (Broken("padding", lambda b: -1), ["padding is -1", ">= 0", "same"]),
    "padding-pair": (Broken("padding", lambda b: (0, -1)), ["padding is (0, -1)", "a pair"]),
    "padding-four": (Broken("padding", lambda b: (0, 1, 0, 1)), ["padding is (0, 1, 0, 1)", "a pair"]),
    "padding-word": (Broken("padding", lambda b: "valid"), ["padding is 'valid'", "same"]),
    "residual-with-stride": (Broken("stride", lambda b: 2), ["residual", "stride 2"]),
    "unsupported-activation": (Broken("activation", lambda b: "mish"), ["'mish'", "silu, relu, relu6"]),
    "unsupported-se-activation": (Broken("se.activation", lambda b: "tanh"), ["'tanh'", "silu, relu, relu6"]),
}


def refused(module, x, block, words):
    """ValueError with all of `words`; no kernel ran and nothing moved."""
    before = state(module)
    with launches() as seen, pytest.raises(ValueError) as error:
        functional.mbconv(x, block)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in {str(error.value)!r}"
    assert not seen
    assert_untouched(before, module)


@pytest.mark.parametrize("break_it, words", [pytest.param(*v, id=k) for k, v in BAD_BLOCKS.items()])
def test_a_bad_block_is_refused(break_it, words, device, triton_backend):
    module = make_block(4, 4, expand_ratio=2, se_ratio=0.5, drop_path=0.5, device=device)
    x = normal(2, 4, 3, 3, dtype=torch.float32, device=device)
    refused(module, x, break_it(module.describe()), words)


BAD_INPUTS = {
    "rank": (lambda x: x[0], ["x has 3 dimensions", "(4, 3, 3)", "[N, C, H, W]"]),
    "channels": (lambda x: x[:, :3], ["x has 3 channels", "expect 4"]),
    "integer": (lambda x: x.long(), ["torch.int64", "floating-point"]),
    "dtype": (lambda x: x.half(), ["torch.float32", "torch.float16"]),
    "device": (lambda x: x.to("meta"), ["meta", "one device"]),
    "one-value": (lambda x: x[:1, :, :1, :1], ["more than 1 value per channel when training", "(1, 4, 1, 1)"]),
}


@pytest.mark.parametrize("change, words", [pytest.param(*v, id=k) for k, v in BAD_INPUTS.items()])
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_bad_input_is_refused(change, words, backend, device):
    module = make_block(4, 4, expand_ratio=2, device=device)
    x = change(normal(2, 4, 3, 3, dtype=torch.float32, device=device))
    with fastmbconv.backend(backend):
        refused(module, x, module.describe(), words)


def test_not_a_tensor_is_refused(device):
    with pytest.raises(TypeError, match="x is a list"):
        functional.mbconv([1.0], make_block(4, 4, device=device).describe())


def test_too_small_for_the_kernel(device, triton_backend):
    module = make_block(4, 5, 5, expand_ratio=2, device=device)
    block = dataclasses.replace(module.describe(), padding=0)
    refused(module, normal(2, 4, 4, 6, dtype=torch.float32, device=device), block, ["4 x 6", "kernel size 5", "0"])


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_value_per_channel_is_counted_for_each_batch_norm(frozen, device, triton_backend):
    """The image may still have several pixels where only its strided output has one."""
    module = make_block(4, 5, stride=2, expand_ratio=2, device=device)
    x = normal(1, 4, 2, 2, dtype=torch.float32, device=device)
    module.depthwise_bn.train(not frozen)
    refused(module, x, module.describe(), ["block.bn3" if frozen else "block.bn2", "more than 1 value per channel"])
    for bn in batch_norms(module)[1:]:
        bn.eval()
    assert fused(module)(x).shape == (1, 5, 1, 1)


def test_one_value_per_channel_through_the_module_is_torchs_error(device):
    module = make_block(4, 4, expand_ratio=2, device=device)
    x = normal(1, 4, 1, 1, dtype=torch.float32, device=device)
    for backend in ("triton", "eager"):
        with fastmbconv.backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
            module(x)


def test_the_parts_refuse_bad_input_too(device, triton_backend):
    x = normal(2, 4, 3, 3, dtype=torch.float32, device=device)
    weight, bn = normal(4, 1, 3, 3, dtype=torch.float32, device=device), bn_module(4, torch.float32, device)
    shapes = ((2, 4, 1, 1), (2,), (4, 2, 1, 1), (4,))
    se = SqueezeExcite(*(normal(*s, dtype=torch.float32, device=device) for s in shapes))
    rows = [
        (lambda: functional.depthwise_bn_act(x[:, :3], weight, BatchNorm.of(bn), 1, 1), "3 channels.*expect 4"),
        (lambda: functional.depthwise_bn_act(x[0], weight, BatchNorm.of(bn), 1, 1), "3 dimensions"),
        (lambda: functional.depthwise_bn_act(x, weight[:, :, :, 0], BatchNorm.of(bn), 1, 1), r"weight.*\(4, 1, 3\)"),
        (lambda: functional.depthwise_bn_act(x, weight, BatchNorm.of(bn), 3, 1), r"stride 3 \(supported: 1, 2\)"),
        (lambda: functional.depthwise_bn_act(x, weight, BatchNorm.of(bn), 1, 3), r"padding 3 \(supported: 0 to"),
        (lambda: functional.depthwise_bn_act(x, weight, BatchNorm.of(bn), 1, 1, "mish"), "activation 'mish'"),
        (lambda: functional.squeeze_excite(x[:, :3], se), "3 channels.*expect 4"),
        (lambda: functional.squeeze_excite(x[0], se), "3 dimensions"),
        (lambda: functional.squeeze_excite(x, dataclasses.replace(se, expand_bias=se.expand_bias[:2])), "expand_bias"),
        (lambda: functional.squeeze_excite(x, dataclasses.replace(se, activation="tanh")), "activation 'tanh'"),
        (lambda: functional.squeeze_excite(x.int(), se), "int32"),
    ]
    before = state(bn)
    for call, message in rows:
        with pytest.raises(ValueError, match=message):
            call()
    assert_untouched(before, bn)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        pytest.param(dict(kernel_size=7), "kernel size 7", id="kernel-size"),
        pytest.param(dict(stride=3), "stride 3", id="stride"),
    ],
)
def test_what_no_kernel_does_is_an_error_only_when_kernels_are_demanded(kwargs, words, device):
    module = make_block(4, 5, expand_ratio=2, device=device, **kwargs)
    x = normal(2, 4, 5, 5, dtype=torch.float32, device=device)
    with fastmbconv.backend("triton"):
        refused(module, x, module.describe(), [words, "'triton'"])
    theirs = copy.deepcopy(module).forward_eager(x)
    assert torch.equal(functional.mbconv(x, module.describe()), theirs)
