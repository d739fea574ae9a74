"""What autograd promises: gradcheck, what is saved, repeatability, layouts, and clear errors for what is not there."""

import copy

import pytest
import torch
from blocks import (  # noqa: F401
    INTERPRETED,
    BatchNorm,
    bn_module,
    fused,
    make_block,
    normal,
    outcome,
)

import fastmbconv
from benchmarks.launches import counted
from fastmbconv import dense, functional
from fastmbconv.block import DenseBlock, SqueezeExcite

float64 = pytest.mark.skipif(not INTERPRETED, reason="float64 kernels run interpreted only")


def se_weights(channels, reduced, dtype, device):
    shapes = ((reduced, channels, 1, 1), (reduced,), (channels, reduced, 1, 1), (channels,))
    return [normal(*s, dtype=dtype, device=device).requires_grad_() for s in shapes]


def small_block(dtype, device, out=3, **kwargs):
    module = make_block(3, out, dtype=dtype, device=device, **{"expand_ratio": 2, "se_ratio": 0.7, **kwargs})
    x = normal(2, 3, 3, 3, dtype=dtype, device=device)
    shape = copy.deepcopy(module).forward_eager(x).shape
    return module, x, normal(*shape, dtype=dtype, device=device)


def gradcheck(function, *inputs):
    """All inputs as one vector: the quick check then costs the interpreter a few evaluations, not a few per tensor."""
    flat = torch.cat([t.detach().flatten() for t in inputs]).requires_grad_()

    def unpacked(flat):
        parts = flat.split([t.numel() for t in inputs])
        return function(*(part.view(t.shape) for part, t in zip(parts, inputs, strict=True)))

    return torch.autograd.gradcheck(unpacked, flat, fast_mode=True)


@float64
@pytest.mark.parametrize(
    "kwargs, training",
    [
        pytest.param({}, True, id="training"),
        pytest.param(dict(out=2, stride=2, padding="same", se_ratio=0, expand_ratio=1), False, id="eval"),
    ],
)
def test_gradcheck_of_the_block(kwargs, training, device, triton_backend):
    module, x, _ = small_block(torch.float64, device, **kwargs)
    module.train(training)
    names = [name for name, _ in module.named_parameters()]

    def block(x, *parameters):
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        return torch.func.functional_call(module, {**dict(zip(names, parameters, strict=True)), **buffers}, (x,))

    assert gradcheck(block, x[:, :, :2, :2], *module.parameters())


@float64
def test_gradcheck_of_depthwise_bn_act(device, triton_backend):
    bn = bn_module(2, torch.float64, device)

    def op(x, weight, gamma, beta):
        setting = BatchNorm(gamma, beta, None, None, None, 1e-3, 0.1, True)
        return functional.depthwise_bn_act(x, weight, setting, 2, "same", "silu")

    assert gradcheck(op, normal(2, 2, 3, 2, device=device), normal(2, 1, 3, 3, device=device), bn.weight, bn.bias)


@float64
def test_gradcheck_of_squeeze_excite(device, triton_backend):
    weights = se_weights(3, 2, torch.float64, device)
    assert gradcheck(
        lambda x, *w: functional.squeeze_excite(x, SqueezeExcite(*w)), normal(2, 3, 2, 2, device=device), *weights
    )


def test_three_runs_are_bitwise_equal(device):
    module, x, dy = small_block(torch.float32, device)
    runs = []
    for _ in range(3):
        again = copy.deepcopy(module)
        runs.append(outcome(again, fused(again), x, dy))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]) and torch.equal(value, runs[2][name]), name


def layouts(x):
    wide = torch.zeros(x.shape[0] * 2, x.shape[1] + 2, x.shape[2] + 1, x.shape[3] * 2, dtype=x.dtype, device=x.device)
    sliced = wide[::2, 1:-1, 1:, ::2]
    sliced.copy_(x)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_any_layout_gives_the_same(layout, device):
    """Of the input and of the output's gradient; neither is written to."""
    module, x, dy = small_block(torch.float32, device)
    plain = outcome(whole := copy.deepcopy(module), fused(whole), x, dy)
    x2, dy2 = layouts(x)[layout], layouts(dy)[layout]
    again = copy.deepcopy(module)
    other = outcome(again, fused(again), x2, dy2)
    assert torch.equal(plain["y"], other["y"]) and torch.equal(plain["dx"], other["dx"])
    assert torch.equal(x2, x) and torch.equal(dy2, dy)
    assert other["dx"].shape == x.shape


@pytest.mark.parametrize("shape", ["sum", "mean-over-image"])
def test_an_expanded_gradient_is_read_right(shape, device):
    """y.sum() sends a gradient with stride 0 everywhere, a pooled head one with stride 0 over the image."""
    module, x, _ = small_block(torch.float32, device)
    reduce = (lambda y: y.sum()) if shape == "sum" else (lambda y: (y.mean((2, 3)) ** 2).sum())
    grads = []
    for forward in (fused, lambda m: m.forward_eager):
        m = copy.deepcopy(module)
        leaf = x.clone().requires_grad_()
        reduce(forward(m)(leaf)).backward()
        grads.append((leaf.grad, m.expand_conv.weight.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_second_backward_gives_the_same(device):
    module, x, dy = small_block(torch.float32, device)
    x.requires_grad_()
    y = fused(module)(x)
    inputs = (x, *module.parameters())
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("op", ["mbconv", "depthwise_bn_act", "squeeze_excite"])
def test_double_backward_says_no(op, device, triton_backend):
    module, x, dy = small_block(torch.float32, device)
    x.requires_grad_()
    bn, weight = bn_module(3, torch.float32, device), normal(3, 1, 3, 3, dtype=torch.float32, device=device)
    y = {
        "mbconv": lambda: module(x),
        "depthwise_bn_act": lambda: functional.depthwise_bn_act(x, weight, BatchNorm.of(bn), 1, 1),
        "squeeze_excite": lambda: functional.squeeze_excite(x, SqueezeExcite(*se_weights(3, 2, torch.float32, device))),
    }[op]()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)  # dy needs no gradient: a penalty on dx must still say no
    with pytest.raises(RuntimeError, match=r"double backward: .*backend\('eager'\)"):
        dx.sum().backward()


def penalty(function, x):
    (dx,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), x, allow_unused=True)


SECOND = {
    "penalty": penalty,
    "hessian": torch.autograd.functional.hessian,
    "vectorised-hessian": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "vhp": lambda f, x: torch.autograd.functional.vhp(f, x, x.detach()),
    "jvp-by-two-backwards": lambda f, x: torch.autograd.functional.jvp(f, x, x.detach()),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_second_derivatives_are_never_taken_for_zero(second, layout, device, triton_backend):
    """By who asks for some inputs' alone, and takes what autograd doesn't find for unused."""
    x = normal(1, 3, 2, 3, dtype=torch.float32, device=device).contiguous(memory_format=layout).requires_grad_()
    module = make_block(3, 3, expand_ratio=2, device=device).eval().requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"double backward: .*backend\('eager'\)"):
        second(lambda x: module(x).square().sum(), x)


def test_what_is_upstream_of_frozen_weights_is_not_computed(device):
    """The head of a block trained alone: neither the depthwise nor the expand backward runs."""
    module, x, dy = small_block(torch.float32, device)
    complete = outcome(whole := copy.deepcopy(module), fused(whole), x, dy)
    for part in (module.expand_conv, module.expand_bn, module.depthwise_conv):
        part.requires_grad_(False)
    with counted() as kernels:
        fused(module)(x).backward(dy)
    assert not {"_depthwise_bwd_kernel", "_expand_pass_kernel"} & kernels.keys()
    assert "_project_bwd_sums_kernel" in kernels
    for name, p in module.named_parameters():
        assert torch.equal(p.grad, complete[f"d {name}"]) if p.requires_grad else p.grad is None, name


def test_what_needs_no_gradient_gets_none(device):
    module, x, dy = small_block(torch.float32, device)
    whole = copy.deepcopy(module)
    complete = outcome(whole, fused(whole), x, dy)
    frozen = ("expand_conv.weight", "depthwise_bn.bias", "se.reduce.bias", "project_conv.weight")
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)
    partial = outcome(module, fused(module), x, dy)
    assert complete.keys() - partial.keys() == {f"d {name}" for name in frozen}
    assert all(p.grad is None for name, p in module.named_parameters() if name in frozen)
    assert all(torch.equal(complete[name], value) for name, value in partial.items())


def test_an_input_without_gradient(device):
    module, x, dy = small_block(torch.float32, device)
    whole = copy.deepcopy(module)
    complete = outcome(whole, fused(whole), x, dy)
    fused(module)(x).backward(dy)
    assert x.grad is None
    for name, p in module.named_parameters():
        assert torch.equal(p.grad, complete[f"d {name}"]), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradients_at_all(mode, device):
    """Same numbers, nothing saved, and the running statistics move all the same."""
    module, x, _ = small_block(torch.float32, device)
    whole = copy.deepcopy(module)
    y = fused(whole)(x)
    with mode():
        z = fused(module)(x)
    assert torch.equal(y, z) and not z.requires_grad and z.grad_fn is None
    for (name, a), b in zip(module.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(a, b), name


def saved_bytes(forward, x):
    """Bytes of distinct storages that autograd keeps, without those of `forward`'s own parameters and input."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(x)
    return sum(sizes.values()), y


@pytest.mark.parametrize("se", [pytest.param(0.25, id="se"), pytest.param(0, id="no-se")])
def test_saved_are_x_and_the_three_convolutions(se, device):
    """2.33 E for expand-6, E being the expanded tensor; eager keeps about 7."""
    module = make_block(4, 4, expand_ratio=6, se_ratio=se, device=device)
    x = normal(4, 4, 12, 4, dtype=torch.float32, device=device).contiguous(memory_format=torch.channels_last)
    expanded = x.numel() * 6 * x.element_size()
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    with fastmbconv.backend("triton"):
        ours, y = saved_bytes(module, x.requires_grad_())
    assert ours <= 2.4 * expanded + 2 * parameters
    assert y.shape == x.shape


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_saved_lean(kernel_size, device):
    """1.33 E: x and the outputs of the last two convolutions."""
    module = make_block(4, 4, kernel_size, expand_ratio=6, device=device)
    module.memory = "lean"
    x = normal(4, 4, 12, 4, dtype=torch.float32, device=device).contiguous(memory_format=torch.channels_last)
    expanded = x.numel() * 6 * x.element_size()
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    with fastmbconv.backend("triton"):
        ours, _ = saved_bytes(module, x.requires_grad_())
    assert ours <= 1.4 * expanded + 2 * parameters


def test_activations_are_freed_with_the_graph(device):
    """Saved through save_for_backward and nowhere else: hooks that offload or checkpoint see all of them."""
    module, x, dy = small_block(torch.float32, device)
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.shape) or t, lambda t: unpacked.append(t.shape) or t
    ):
        y = fused(module)(x.requires_grad_())
    y.backward(dy)
    assert packed and len(packed) == len(unpacked)


def test_a_saved_tensor_changed_in_place_is_noticed(device):
    module, x, dy = small_block(torch.float32, device)
    y = fused(module)(x.requires_grad_())
    with torch.no_grad():
        module.project_conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def dense_block(x):
    conv = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False).to(x.device)
    bn1, bn2 = (BatchNorm.of(bn_module(3, x.dtype, x.device)) for _ in range(2))
    project = normal(3, 3, 1, 1, dtype=x.dtype, device=x.device)
    return DenseBlock(conv, conv.weight, 1, 1, bn1, None, project, bn2, "silu", residual=True)


def se(x):
    return SqueezeExcite(*se_weights(3, 2, torch.float32, x.device))


TAKES_X = {
    "mbconv": lambda x: functional.mbconv(x, make_block(3, 5, expand_ratio=2, device=x.device).describe()),
    "residual": lambda x: functional.mbconv(x, make_block(3, 3, expand_ratio=2, device=x.device).describe()),
    "no-expansion": lambda x: functional.mbconv(x, make_block(3, 3, expand_ratio=1, device=x.device).describe()),
    "lean": lambda x: functional.mbconv(x, make_block(3, 3, expand_ratio=2, device=x.device).describe(), memory="lean"),
    "dense": lambda x: dense.dense_mbconv(x, dense_block(x)),
    "depthwise_bn_act": lambda x: functional.depthwise_bn_act(
        x, normal(3, 1, 3, 3, dtype=torch.float32, device=x.device), BatchNorm.of(bn_module(3, x.dtype, x.device)), 1, 1
    ),
    "squeeze_excite": lambda x: functional.squeeze_excite(x, se(x)),
}


@pytest.mark.parametrize("op", TAKES_X.values(), ids=TAKES_X)
def test_an_input_changed_in_place_is_named(op, device, triton_backend):
    """By its shape and version, as in eager: what is saved is the tensor that the caller has."""
    x = normal(2, 3, 4, 4, dtype=torch.float32, device=device).contiguous(memory_format=torch.channels_last)
    x = x.requires_grad_() * 1
    y = op(x)
    with torch.no_grad():
        x.add_(1)
    words = (
        r"modified by an inplace operation: \[torch.*FloatTensor \[2, 3, 4, 4\]\].* is at version 1; expected version 0"
    )
    with pytest.raises(RuntimeError, match=words):
        y.sum().backward()


@pytest.mark.parametrize(
    "op", [v for k, v in TAKES_X.items() if k != "dense"], ids=[k for k in TAKES_X if k != "dense"]
)
def test_an_input_that_was_copied_may_be_changed_in_place(op, device, triton_backend):
    x = normal(2, 3, 4, 4, dtype=torch.float32, device=device)
    gradients = []
    for change in (0, 1):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        taken = leaf * 1
        y = op(taken)
        with torch.no_grad():
            taken.add_(change)
        y.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_the_input_may_be_used_again(device):
    """The residual comes from x: the output must not alias it, nor the gradient that comes in."""
    module, x, dy = small_block(torch.float32, device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    before, dy_before = x.detach().clone(), dy.clone()
    y = fused(module)(x)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    y.backward(dy)
    assert torch.equal(x, before) and torch.equal(dy, dy_before)
    assert x.grad.untyped_storage().data_ptr() != dy.untyped_storage().data_ptr()


def test_gradient_checkpointing_gives_the_same(device):
    module, x, dy = small_block(torch.float32, device)
    module.eval()
    whole = copy.deepcopy(module)
    complete = outcome(whole, fused(whole), x, dy)
    again = outcome(module, lambda x: torch.utils.checkpoint.checkpoint(fused(module), x, use_reentrant=False), x, dy)
    assert all(torch.equal(value, again[name]) for name, value in complete.items())
