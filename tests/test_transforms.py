"""Transforms of a forward, or of a backward alone, run the un-fused model's own operations: its numbers, no error."""

import copy

import pytest
import torch
from blocks import (
    BatchNorm,
    Drop,
    assert_untouched,
    batch_norms,
    bn_module,
    make_block,
    normal,
    randomise,
    state,
)
from libraries import library
from parity import assert_parity
from torch import nn
from torch.autograd import forward_ad

import fastmbconv
from fastmbconv import dense, dispatch, functional, reference
from fastmbconv.block import DenseBlock, SqueezeExcite

warned = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def dual(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def per_sample(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    return torch.cat([g.flatten() for g in torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values()])


FORWARD = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "vmap": lambda model, x: torch.func.vmap(model)(x[:, None]),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
    "vjp": lambda model, x: torch.func.vjp(lambda x: model(x).sum(), x)[1](torch.tensor(1.0, device=x.device))[0],
    "jacrev": lambda model, x: torch.func.jacrev(lambda x: model(x).mean((1, 2, 3)))(x),
    "jacfwd": lambda model, x: torch.func.jacfwd(lambda scale: model(x * scale))(torch.ones(3, 1, 1, device=x.device)),
    "per-sample": per_sample,
    "forward-mode": dual,
    "compiled": lambda model, x: torch.compile(torch.func.vmap(model), backend="eager")(x[:, None]),
}


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("transform", FORWARD.values(), ids=FORWARD)
def test_a_transformed_forward_is_the_modules_own(transform, backend, device):
    torch._dynamo.reset()
    model = nn.Sequential(make_block(3, 3, expand_ratio=2, device=device), make_block(3, 4, device=device)).eval()
    x = normal(2, 3, 4, 4, dtype=torch.float32, device=device)
    expected = transform(fastmbconv.unfuse(copy.deepcopy(model)), x)
    before = state(model)
    with fastmbconv.backend(backend):
        assert torch.equal(transform(model, x), expected)
    assert_untouched(before, model)


def library_model(device):
    """With depthwise-separable, inverted-residual and Fused-MBConv blocks, and a stem and a head."""
    model = library("timm").create_model("test_efficientnet", num_classes=4)
    return randomise(model.double()).float().to(device).eval()


@pytest.mark.parametrize("name", ["vmap", "jvp", "forward-mode", "vjp"])
@torch.no_grad()
def test_a_whole_model_with_its_ends(name, device, triton_backend):
    model = library_model(device)
    x = normal(2, 3, 32, 32, dtype=torch.float32, device=device)

    def image(x):
        return model(x)[:, :, None, None]

    expected = FORWARD[name](image, x)
    fastmbconv.fuse(model)
    assert torch.equal(FORWARD[name](image, x), expected)


def ops(x):
    """Calls of the functions themselves, by name: what each takes and how."""
    block = make_block(3, 3, expand_ratio=2, device=x.device).eval()
    taps, bn = normal(3, 1, 3, 3, dtype=x.dtype, device=x.device), bn_module(3, x.dtype, x.device).eval()
    shapes = ((2, 3, 1, 1), (2,), (3, 2, 1, 1), (3,))
    se = SqueezeExcite(*(normal(*shape, dtype=x.dtype, device=x.device) for shape in shapes))
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False).to(x.device)
    single = DenseBlock(conv, conv.weight, 1, 1, BatchNorm.of(bn), None, None, None, "silu", residual=True)
    return {
        "mbconv": (lambda x: functional.mbconv(x, block.describe()), block.forward_eager),
        "depthwise_bn_act": (
            lambda x: functional.depthwise_bn_act(x, taps, BatchNorm.of(bn), 1, 1),
            lambda x: reference.depthwise_bn_act(x, taps, BatchNorm.of(bn), 1, 1, "silu"),
        ),
        "squeeze_excite": (lambda x: functional.squeeze_excite(x, se), lambda x: reference.squeeze_excite(x, se)),
        "dense_mbconv": (lambda x: dense.dense_mbconv(x, single), lambda x: reference.dense_mbconv(x, single)),
    }


@pytest.mark.parametrize("op", ["mbconv", "depthwise_bn_act", "squeeze_excite", "dense_mbconv"])
def test_a_function_runs_eager_or_says_why_not(op, device):
    """Where kernels are demanded, a call that has no module's own forward to go to is an error with the way out."""
    x = normal(2, 3, 4, 4, dtype=torch.float32, device=device)
    function, eager = ops(x)[op]
    with fastmbconv.backend("auto"):
        assert torch.equal(FORWARD["grad"](function, x), FORWARD["grad"](eager, x))
    words = r"'triton'.*inside a torch.func transform or forward-mode AD; .*backend\('eager'\)"
    with fastmbconv.backend("triton"), pytest.raises(RuntimeError, match=words):
        FORWARD["jvp"](function, x)


def test_the_reason_is_told(device):
    model = make_block(3, 3, device=device)
    with fastmbconv.backend("triton"), forward_ad.dual_level():
        assert fastmbconv.explain(model).rows[0].reason == dispatch.TRANSFORMED
    with fastmbconv.backend("triton"):
        assert fastmbconv.explain(model).fused == 1


def with_drop(module):
    module.drop_path = Drop()
    return module


def frozen(module):
    module.depthwise_bn.eval()
    return module


def lean(module):
    module.memory = "lean"
    return module


def same(module):
    return module


def half_vectors(module):
    for bn in batch_norms(module):
        bn.half()
    return module


BLOCKS = {
    "training": ({}, same),
    "eval": ({}, nn.Module.eval),
    "frozen-inside": ({}, frozen),
    "lean": ({}, lean),
    "lean-k5": (dict(kernel_size=5), lean),
    "drop": ({}, with_drop),
    "no-se": (dict(se_ratio=0, activation="relu6"), same),
    "no-expansion": (dict(expand_ratio=1), same),
    "same-strided": (dict(out_channels=16, stride=2, padding="same"), same),
    "strided": (dict(out_channels=16, kernel_size=5, stride=2), nn.Module.eval),
}


def batched(y, x, parameters, seeds):
    """Gradients by torch.autograd's own vmap of the backward."""
    return torch.autograd.grad(y, (x, *parameters), seeds, is_grads_batched=True)


def func_batched(y, x, parameters, seeds):
    """The same by torch.func's."""
    return torch.func.vmap(lambda dy: torch.autograd.grad(y, (x, *parameters), dy, retain_graph=True))(seeds)


def batched_gradients(module, forward, x, seeds, batch=batched):
    x = x.detach().requires_grad_()
    y = forward(x)
    buffers = [b.clone() for b in module.buffers()]
    parameters = dict(module.named_parameters())
    found = batch(y, x, parameters.values(), seeds.to(y.dtype))
    assert all(torch.equal(*pair) for pair in zip(buffers, module.buffers(), strict=True))
    return dict(zip(("x", *parameters), found, strict=True))


def assert_batched(module, forward, eager_forward, x, seeds, batch=batched, autocast=None):
    """The parity rule for each gradient of a vmapped backward; `forward` and `eager_forward` take a module."""
    truth, theirs = copy.deepcopy(module).double(), copy.deepcopy(module)
    exact = batched_gradients(truth, eager_forward(truth), x.double(), seeds.double())
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        eager = batched_gradients(theirs, eager_forward(theirs), x, seeds)
        with fastmbconv.backend("triton"):
            ours = batched_gradients(module, forward(module), x, seeds, batch)
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype, name
        assert_parity(name, value, eager[name], exact[name])


@warned
@pytest.mark.parametrize("kwargs, change", BLOCKS.values(), ids=BLOCKS)
def test_a_vmapped_backward_of_a_block(kwargs, change, device):
    kwargs = {"out_channels": 12, "expand_ratio": 2, "se_ratio": 0.5, **kwargs}
    module = change(make_block(12, device=device, **kwargs))
    x = normal(4, 12, 5, 4, dtype=torch.float32, device=device)
    seeds = normal(3, *copy.deepcopy(module).forward_eager(x).shape, dtype=torch.float32, device=device)
    assert_batched(module, lambda m: m, lambda m: m.forward_eager, x, seeds)


@warned
@pytest.mark.parametrize("kwargs, change", [BLOCKS["training"], BLOCKS["drop"]], ids=["training", "drop"])
def test_a_vmapped_backward_under_autocast(kwargs, change, device):
    """In the dtype of the forward; the block's shortcut is wider than its branch."""
    module = change(make_block(24, 24, expand_ratio=2, device=device, **kwargs))
    x = normal(4, 24, 6, 5, dtype=torch.float32, device=device)
    seeds = normal(2, *x.shape, dtype=torch.float32, device=device)
    assert_batched(module, lambda m: m, lambda m: m.forward_eager, x, seeds, autocast=torch.bfloat16)


@warned
@pytest.mark.parametrize("make", ["edge", "edge-se", "single"])
@pytest.mark.parametrize("training", [True, False])
def test_a_vmapped_backward_of_fused_mbconv(make, training, device):
    library("timm")
    timm_blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    own = {
        "edge": lambda: timm_blocks.EdgeResidual(8, 8, exp_ratio=2),
        "edge-se": lambda: timm_blocks.EdgeResidual(8, 8, exp_ratio=2, se_layer=timm_blocks.SqueezeExcite),
        "single": lambda: timm_blocks.ConvBnAct(8, 8, 3, skip=True),
    }[make]()
    module = randomise(own.double()).float().to(device).train(training)
    x = normal(4, 8, 5, 4, dtype=torch.float32, device=device)
    seeds = normal(3, *x.shape, dtype=torch.float32, device=device)
    assert_batched(module, fastmbconv.fuse, lambda m: m, x, seeds)


class Depthwise(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(normal(12, 1, 3, 3, dtype=torch.float32, device=device))
        self.bn = bn_module(12, torch.float32, device)

    def forward(self, x, function=functional.depthwise_bn_act):
        return function(x, self.weight, BatchNorm.of(self.bn), 2, "same", "silu")

    def forward_eager(self, x):
        return self(x, reference.depthwise_bn_act)


class Gate(nn.Module):
    def __init__(self, device):
        super().__init__()
        shapes = ((4, 12, 1, 1), (4,), (12, 4, 1, 1), (12,))
        self.weights = nn.ParameterList([normal(*s, dtype=torch.float32, device=device) for s in shapes])

    def forward(self, x, function=functional.squeeze_excite):
        return function(x, SqueezeExcite(*self.weights))

    def forward_eager(self, x):
        return self(x, reference.squeeze_excite)


@warned
@pytest.mark.parametrize("batch", [batched, func_batched])
@pytest.mark.parametrize("make", [Depthwise, Gate, lambda device: make_block(12, 12, expand_ratio=2, device=device)])
def test_both_vmaps_of_a_backward(make, batch, device):
    module, x = make(device), normal(4, 12, 5, 4, dtype=torch.float32, device=device)
    seeds = normal(3, *copy.deepcopy(module).forward_eager(x).shape, dtype=torch.float32, device=device)
    assert_batched(module, lambda m: m, lambda m: m.forward_eager, x, seeds, batch)


@warned
@pytest.mark.parametrize("training", [True, False])
def test_a_vectorised_jacobian_of_a_model(training, device, triton_backend):
    model = library_model(device).train(training)
    x = normal(2, 3, 64, 64, dtype=torch.float32, device=device)  # of 32 pixels the last BatchNorm sees two values

    def jacobian(model, x):
        return torch.autograd.functional.jacobian(model, x, vectorize=True)

    theirs, exact = jacobian(copy.deepcopy(model), x), jacobian(copy.deepcopy(model).double(), x.double())
    assert_parity("jacobian", jacobian(fastmbconv.fuse(model), x), theirs, exact)


@warned
def test_only_what_needs_a_gradient_gets_one(device, triton_backend):
    module = make_block(3, 3, expand_ratio=2, device=device)
    module.expand_conv.requires_grad_(False)
    x = normal(2, 3, 4, 4, dtype=torch.float32, device=device)
    wanted = module.project_conv.weight
    seeds = normal(3, *x.shape, dtype=torch.float32, device=device)
    (ours,) = torch.autograd.grad(module(x), wanted, seeds, is_grads_batched=True)
    for row, dy in zip(ours, seeds, strict=True):
        (expected,) = torch.autograd.grad(module.forward_eager(x), wanted, dy)
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-4)


@warned
@pytest.mark.parametrize("batch", ["autograd", "seeds", "func"])
def test_second_derivatives_behind_a_vmapped_backward_say_no(batch, device, triton_backend):
    module = make_block(3, 3, expand_ratio=2, device=device)
    x = normal(2, 3, 4, 4, dtype=torch.float32, device=device).requires_grad_()
    y, seeds = module(x), normal(3, *x.shape, dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match=r"double backward: .*backend\('eager'\)"):
        if batch != "func":
            seeds.requires_grad_(batch == "seeds")
            (dx,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True, create_graph=True)
        else:
            (dx,) = torch.func.vmap(lambda dy: torch.autograd.grad(y, x, dy, create_graph=True))(seeds)
        torch.autograd.grad(dx.square().sum() + x.sum() + seeds.sum(), seeds if batch == "seeds" else x)


def test_shared_statistics_say_no(device, triton_backend, monkeypatch):
    """Every process would have to be asked."""
    module = make_block(3, 3, expand_ratio=2, device=device)
    x = normal(2, 3, 4, 4, dtype=torch.float32, device=device).requires_grad_()
    y = module(x)
    node = y.grad_fn
    *others, bn3 = node.settings.norms
    node.settings = node.settings._replace(norms=(*others, bn3._replace(group="0")))
    with pytest.raises(RuntimeError, match=r"several processes share.*backend\('eager'\)"):
        torch.autograd.grad(y, x, torch.stack([y, y]).detach(), is_grads_batched=True)
