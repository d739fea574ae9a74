"""The stem and the head of the libraries' own models through the swap. Blocks run eager here: they have their tests."""

import copy
import pickle
from functools import cache

import pytest
import torch
from libraries import library
from parity import assert_parity
from torch import nn

import fastmbconv
from fastmbconv import dispatch, explain, fuse, unfuse
from fastmbconv.efficientnet import efficientnet
from fastmbconv.kernels.traffic import recorded
from fastmbconv.swap import places
from fastmbconv.swap.ends import ends_of
from fastmbconv.swap.fused import FusedBlock, swap_out

BN, POOL = "bn_act_fwd", "pointwise_pool"


def timm(name="efficientnet_b0", blocks=1, **options):
    """Of each library: its own model, with one block left between the ends."""
    model = library("timm").create_model(name, **options)
    if hasattr(model, "conv_head") and blocks == 1:
        model.blocks = nn.Sequential(model.blocks[0], nn.Conv2d(16, model.conv_head.in_channels, 1))
    return model


def torchvision(name="efficientnet_b0"):
    model = getattr(library("torchvision").models, name)()
    model.classifier = nn.Identity()
    model.features = nn.Sequential(*model.features[:2], nn.Conv2d(16, 320, 1), model.features[-1])
    return model


def lukemelas(**options):
    model = library("efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0", image_size=32, **options)
    model._blocks = model._blocks[:1]
    model._conv_head = type(model._conv_head)(16, 1280, 1, image_size=16, bias=False)
    return model


def transformers():
    config = library("transformers").EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=0.1, image_size=32, hidden_dim=1280, return_dict=False
    )
    model = library("transformers").EfficientNetModel(config)
    model.encoder.blocks = model.encoder.blocks[:1]
    model.encoder.top_conv = nn.Conv2d(16, 1280, 1, padding="same", bias=False)
    return model


def align():
    from transformers.models.align import modeling_align

    return modeling_align.AlignVisionEmbeddings(modeling_align.AlignVisionConfig())


def smp(name):
    model = library("segmentation_models_pytorch").encoders.get_encoder(name, weights=None)
    if hasattr(model, "_blocks"):
        model._blocks = model._blocks[:3]
    return model


MODELS = {
    "timm": (lambda: timm(num_classes=0), [BN, POOL]),
    "timm-same": (lambda: timm("tf_efficientnet_lite0", num_classes=0), [BN, POOL]),
    "timm-fast-pool": (lambda: timm(num_classes=0, global_pool="fast"), [BN, POOL]),
    "timm-features": (lambda: timm(features_only=True), [BN]),
    "timm-getter": (lambda: timm(features_only=True, feature_cls="getter"), [BN]),
    "torchvision": (torchvision, [BN, POOL]),
    "torchvision-mobilenet": (lambda: torchvision("mobilenet_v2"), [BN, POOL]),
    "lukemelas": (lambda: lukemelas(include_top=False), [BN, POOL]),
    "transformers": (transformers, [BN, BN]),
    "align": (align, [BN]),
    "synchronised": (lambda: library("timm").layers.convert_sync_batchnorm(timm(num_classes=0)), [BN, POOL]),
    "smp": (lambda: smp("efficientnet-b0"), [BN]),
    "smp-timm": (lambda: smp("tu-efficientnet_b0"), [BN]),
}


@cache
def made(make):
    return make()


def prepared(make):
    """In eval mode, with BatchNorms at both ends that no wrong path would get right by chance."""
    model = copy.deepcopy(made(make)).eval()
    with torch.no_grad():
        for end in ends_of(model):
            norm = end.site.norm
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -1, 1)):
                tensor.uniform_(low, high)
            norm.running_var.uniform_(0.5, 2)
    return model


def fuse_ends(model):
    for module in fuse(model).modules():
        if isinstance(module, FusedBlock):
            swap_out(module)
    return model


@torch.no_grad()
def run(model, x, method="forward"):
    """(tensors that come out, kernels that ran): through the kernels or an error, as far as they are wanted."""
    with fastmbconv.backend("triton"), recorded() as launches:
        found = (model if method == "forward" else getattr(model, method))(x)
    return tensors(found), [launch.kernel for launch in launches]


def tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for part in (found.values() if isinstance(found, dict) else found) for tensor in tensors(part)]


@pytest.fixture
def x():
    return torch.randn(2, 3, 20, 12)


@pytest.mark.parametrize("make, kernels", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_models(make, kernels, x):
    """What the kernels compute, and that nothing but two or three classes changes, and changes back."""
    model = prepared(make)
    classes, state = [(m, type(m)) for m in model.modules()], model.state_dict(keep_vars=True)
    theirs, truth = tensors(model(x)), tensors(copy.deepcopy(model).double()(x.double()))
    ours, launched = run(fuse_ends(model), x)
    assert launched == kernels
    for i, value in enumerate(ours):
        assert value.shape == theirs[i].shape and value.dtype == theirs[i].dtype
        assert_parity(str(i), value, theirs[i], truth[i])
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is value for key, value in state.items())
    assert all(ours is module for ours, (module, _) in zip(model.modules(), classes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), theirs, strict=True))
    assert all(type(m) is cls for m, (_, cls) in zip(unfuse(model).modules(), classes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(model, x)[0], theirs, strict=True))


METHODS = {
    "timm": (timm, "forward_features", [BN, BN]),
    "timm-intermediates": (lambda: timm(blocks=7), "forward_intermediates", [BN, BN]),
    "torchvision": (torchvision, "features", [BN, BN]),
    "lukemelas": (lukemelas, "extract_features", [BN, BN]),
    "lukemelas-endpoints": (lukemelas, "extract_endpoints", [BN, BN]),
}


@pytest.mark.parametrize("make, method, kernels", METHODS.values(), ids=METHODS)
def test_methods_that_give_maps(make, method, kernels, x):
    model = prepared(make)
    theirs, before = run(model, x, method)
    ours, launched = run(fuse_ends(model), x, method)
    assert (before, launched) == ([], kernels)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


HOOKED = {
    "timm-conv": (timm, "conv_stem", [BN, POOL]),
    "timm-norm": (timm, "bn2", [BN, BN]),
    "timm-act": (timm, "bn2.act", [BN]),
    "timm-pool": (timm, "global_pool.pool", [BN, BN]),
    "torchvision-features": (torchvision, "features", [BN, BN]),
    "torchvision-head": (torchvision, "features.3", [BN, BN]),
    "torchvision-inside": (torchvision, "features.3.1", [BN]),
    "torchvision-stem": (torchvision, "features.0.0", [POOL]),
    "lukemelas-norm": (lukemelas, "_bn0", [POOL]),
    "lukemelas-act": (lukemelas, "_swish", []),
    "lukemelas-pool": (lukemelas, "_avg_pooling", [BN, BN]),
    "transformers": (transformers, "encoder.top_bn", [BN]),
}


@pytest.mark.parametrize("make, path, kernels", HOOKED.values(), ids=HOOKED)
def test_a_hook_or_a_replaced_forward_is_run(make, path, kernels, x):
    model = prepared(make)
    seen, inner = [], model.get_submodule(path)
    handle = inner.register_forward_hook(lambda module, args, output: seen.append(output))
    theirs, _ = run(model, x)
    ours, launched = run(fuse_ends(model), x)
    assert launched == kernels and len(seen) >= 2
    torch.testing.assert_close(seen[-1], seen[len(seen) // 2 - 1])
    torch.testing.assert_close(ours, theirs)
    handle.remove()
    assert len(run(model, x)[1]) == 2
    twin = unfuse(copy.deepcopy(inner))
    inner.forward = lambda x: twin(x) + 1
    changed, _ = run(model, x)
    torch.testing.assert_close(changed, run(unfuse(model), x)[0])
    assert not torch.allclose(changed[-1], theirs[-1])


def _norm(module, name):
    norm = getattr(module, name)
    return library("timm").layers.GroupNormAct(norm.num_features, 8, act_layer=nn.SiLU)


UNFUSIBLE = {
    "norm": (timm, lambda m: setattr(m, "bn1", _norm(m, "bn1")), "the norm after the stem is a GroupNormAct", [POOL]),
    "act": (timm, lambda m: setattr(m.bn2, "act", nn.GELU()), "the activation after the head is GELU", [BN]),
    "forward": (timm, lambda m: setattr(m.bn2, "forward", m.bn2.forward), "forward was replaced on the instance", [BN]),
    "unit": (torchvision, lambda m: setattr(m.features[0], "2", nn.Hardswish()), "after the stem is Hardswish", [POOL]),
    "lukemelas": (lukemelas, lambda m: setattr(m, "_swish", nn.Mish()), "the activation after the stem is Mish", []),
    "transformers": (
        transformers,
        lambda m: setattr(m.encoder, "top_bn", nn.GroupNorm(8, 1280)),
        "the norm after the head is a GroupNorm",
        [BN],
    ),
}


@pytest.mark.parametrize("make, change, reason, kernels", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(make, change, reason, kernels, x):
    model = prepared(make)
    change(model)
    theirs, _ = run(model, x)
    ours, launched = run(fuse_ends(model), x)
    assert launched == kernels and any(reason in row.reason for row in explain(model).ends if row.path == "eager")
    torch.testing.assert_close(ours, theirs)


def _wider(m):
    m.conv_head = nn.Conv2d(m.conv_head.in_channels, 1280, 3, padding=1, bias=False)


def _biased(m):
    m.conv_head = nn.Conv2d(m.conv_head.in_channels, 1280, 1)


UNPOOLED = {
    "max": (lambda: timm(global_pool="max"), lambda m: None, "the head is pooled by SelectAdaptivePool2d"),
    "3x3": (timm, _wider, "the head is 3x3"),
    "bias": (timm, _biased, "the head has a bias"),
    "forward": (timm, lambda m: setattr(m, "forward", m.forward), "the model's forward was replaced"),
    "size": (torchvision, lambda m: setattr(m, "avgpool", nn.AdaptiveAvgPool2d(2)), "pooled by AdaptiveAvgPool2d"),
}


@pytest.mark.parametrize("make, change, reason", UNPOOLED.values(), ids=UNPOOLED)
def test_a_pool_that_stays(make, change, reason, x):
    model = prepared(make)
    change(model)
    theirs, _ = run(model, x)
    ours, launched = run(fuse_ends(model), x)
    assert launched == [BN, BN]
    torch.testing.assert_close(ours, theirs)
    (head,) = (row for row in explain(model).ends if row.block != "stem")
    assert (head.block, head.path) == ("head", "fused")
    assert head.reason.startswith("its pool by itself: ") and reason in head.reason
    lines = str(explain(model)).splitlines()
    assert any("fused [" in line for line in lines) and any("] its pool by itself: " in line for line in lines)


@pytest.mark.parametrize("replaced", ["forward_features", "extract_features"])
def test_a_model_that_runs_its_head_elsewhere(replaced, x):
    """A method that the model's forward calls was replaced, in a subclass or on the instance."""
    model = prepared(timm if replaced == "forward_features" else lukemelas)
    own = getattr(type(model), replaced)
    changed = copy.deepcopy(model)
    changed.__class__ = type("Changed", (type(model),), {replaced: lambda self, x: own(self, x) + 1})
    setattr(model, replaced, changed.__getattribute__(replaced))
    for each in (changed, model):
        theirs, _ = run(each, x)
        ours, launched = run(fuse_ends(each), x)
        assert POOL not in launched
        torch.testing.assert_close(ours, theirs)
        assert "head + pool" not in {row.block for row in explain(each).ends}
    reasons = (
        {row.reason for row in explain(model).ends}
        if replaced == "extract_features"
        else {end.pool_reason() for end in ends_of(model) if end.site.role == "head"}
    )
    assert all(f"{replaced} was replaced on the instance" in reason for reason in reasons)


@pytest.mark.parametrize("make, method", [(timm, "forward_features"), (lukemelas, "extract_features")])
def test_a_method_replaced_in_the_librarys_class(make, method, x, monkeypatch):
    model = prepared(make)
    own = getattr(type(model), method)
    monkeypatch.setattr(type(model), method, lambda self, x: own(self, x) + 1)
    theirs, _ = run(model, x)
    ours, launched = run(fuse_ends(model), x)
    assert POOL not in launched
    torch.testing.assert_close(ours, theirs)


def test_a_forward_that_takes_the_stem_as_modules(x, monkeypatch):
    """As segmentation_models_pytorch had it up to 0.3."""
    model = prepared(lambda: smp("efficientnet-b0"))
    encoder = type(model)

    def forward(self, x):
        return [self.stem_of()(x)]

    forward.__module__ = encoder.__module__
    monkeypatch.setattr(
        encoder, "stem_of", lambda self: nn.Sequential(self._conv_stem, self._bn0, self._swish), raising=False
    )
    monkeypatch.setattr(encoder, "forward", forward)
    theirs, _ = run(model, x)
    ours, _ = run(fuse_ends(model), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["_bn0", "_bn1"])
def test_ends_that_share_their_activation(name, x):
    """A BatchNorm that was folded into its convolution: its end is eager, and keeps the activation."""
    model = prepared(lukemelas)
    setattr(model, name, nn.Identity())
    (theirs,), _ = run(model, x, "extract_features")
    (ours,), launched = run(fuse_ends(model), x, "extract_features")
    torch.testing.assert_close(ours, theirs)
    assert launched == [BN]
    assert [row.reason.split(" is a ")[-1] for row in explain(model).ends if row.path == "eager"] == [
        "Identity (supported: BatchNorm2d, SyncBatchNorm)"
    ]


@pytest.mark.parametrize("make", [timm, torchvision, lukemelas])
def test_a_forward_kept_from_a_fused_model_runs_the_unfused_one(make, x):
    model = fuse(prepared(make))
    modules = [module for module in model.modules() if type(module).__name__.startswith("Fused")]
    kept = [(module, module.forward) for module in modules]
    unfuse(model)
    inputs = {}
    for module in modules:
        module.register_forward_pre_hook(lambda module, args: inputs.update({module: args}))
    run(model, x)
    for module, forward in kept:
        theirs, _ = run(module, *inputs[module])
        ours, launched = run(forward, *inputs[module])
        assert not launched and torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("make", [timm, torchvision, lukemelas, transformers])
def test_training_and_gradients_are_eager(make, x):
    model = prepared(make)
    x.requires_grad_()
    theirs = tensors(model(x))
    with fastmbconv.backend("triton"), recorded() as launches:
        ours = tensors(fuse_ends(model)(x))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        ours[-1].sum().backward()
        model.zero_grad()
        for p in model.parameters():
            p.requires_grad_(False)
        model(x)  # the image wants a gradient
        assert not launches
        model(x.detach())
        assert len(launches) == 2
    assert x.grad is not None
    assert run(model.train(), x)[1] == [] and all("training" in row.reason for row in explain(model).ends)


def test_norms_in_training_mode_are_eager(x):
    model = fuse_ends(prepared(timm))
    model.bn1.train()
    assert run(model, x)[1] == [POOL]
    model.bn2.train()
    assert run(model, x)[1] == []
    model.eval().bn2.track_running_stats = False
    model.bn2.running_mean = model.bn2.running_var = None
    assert run(model, x)[1] == [BN]


@pytest.mark.parametrize("make", [timm, torchvision, lukemelas])
def test_later_weights_are_seen(make, x):
    model, other = fuse_ends(prepared(make)), prepared(make)
    run(model, x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(model, x)[0], run(other, x)[0])


@pytest.mark.parametrize("make", [timm, torchvision, lukemelas, transformers])
def test_copies(make, x):
    model = fuse_ends(prepared(make))
    expected, kernels = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ours, launched = run(twin, x)
        assert launched == kernels and torch.equal(ours[-1], expected[-1])
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert run(unfuse(twin), x)[1] == []
    assert fuse(model) is model and run(fuse_ends(model), x)[1] == kernels


def test_autocast_and_layouts(x):
    model = prepared(lambda: timm(num_classes=0))
    with torch.autocast("cpu", torch.bfloat16):
        (theirs,), _ = run(model, x)
        (ours,), launched = run(fuse_ends(model), x)
    assert launched == [BN, POOL] and ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_a_model_without_known_blocks_is_left_alone():
    model = torchvision()
    model.features = nn.Sequential(model.features[0], model.features[-1])
    assert type(fuse(model)) is type(torchvision()) and not explain(model).ends


def test_with_a_filter_they_stay(x):
    model = fuse(prepared(timm), lambda module, name: False)
    assert run(model, x)[1] == []
    assert [row.reason for row in explain(model).ends] == ["not fused: fastmbconv.fuse without a filter does it"] * 2


@pytest.mark.parametrize("make", [timm, torchvision, lukemelas, transformers])
def test_without_kernels_nothing_is_looked_at(make, x, monkeypatch):
    model = fuse_ends(prepared(make))
    monkeypatch.setattr(places.Site, "described", None)
    monkeypatch.setattr(places.Names, "replaced", None)
    monkeypatch.setattr(dispatch, "children_reason", None)
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("make", [timm, torchvision, lukemelas])
def test_compiles_to_one_graph_with_the_kernels_in_it(make, x):
    model = fuse_ends(prepared(make))
    (expected,), kernels = run(model, x)
    torch._dynamo.reset()
    ours, launched = run(torch.compile(model, backend="eager", fullgraph=True), x)
    assert launched == kernels == [BN, POOL]
    torch.testing.assert_close(ours, [expected])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [timm, torchvision, lukemelas])
def test_exported_as_eager(make, x):
    model = fuse_ends(prepared(make))
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        assert not any("fastmbconv" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(x), expected)
        assert torch.equal(torch.jit.trace(model, x)(x), expected)
        if make is timm:  # TorchScript takes no MBConvBlock, and no torchvision block behind this suite's torch.empty
            assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), expected)


def test_explain_has_their_rows_beside_the_blocks():
    model = timm(blocks=7).eval()
    before = explain(model, (2, 3, 64, 64))
    assert len(before) == 16 and [row.path for row in before.ends] == ["eager"] * 2
    found = explain(fuse(model), (2, 3, 64, 64))
    head, stem = found.ends
    assert len(found) == found.fused == 16
    assert [(row.name, row.block, row.path) for row in (stem, head)] == [
        ("conv_stem", "stem", "fused"),
        ("conv_head", "head + pool", "fused"),
    ]
    image, u, trunk, last = 2 * 3 * 64 * 64, 2 * 32 * 32 * 32, 2 * 320 * 2 * 2, 2 * 1280 * 2 * 2
    assert stem.saving.bytes == (4 * (image + 5 * u), 4 * (image + 3 * u))
    assert head.saving.bytes == (4 * (trunk + 6 * last), 4 * trunk)
    assert (stem.geometry.channels, stem.geometry.kernel_size, stem.geometry.stride) == ((3, 32), 3, 2)
    lines = str(found).splitlines()
    assert lines[1].startswith("conv_stem") and lines[18].startswith("conv_head")
    assert "The fused stem and head move" in " ".join(line.strip() for line in lines)
    handle = model.bn2.act.register_forward_hook(lambda *_: None)
    (hooked,) = (row for row in explain(model).ends if row.path == "eager")
    assert (hooked.name, hooked.reason) == ("conv_head", "a hook on act")
    handle.remove()


def test_explain_of_our_own_model():
    model = efficientnet("b0").eval()
    assert [(row.name, row.block, row.path) for row in explain(model).ends] == [
        ("stem.conv", "stem", "fused"),
        ("head.conv", "head + pool", "fused"),
    ]
    assert {row.reason for row in explain(unfuse(model)).ends} == {
        "not fused: fastmbconv.fuse without a filter does it"
    }
    model.stem.act = nn.GELU()
    assert [row.reason for row in explain(fuse(model)).ends if row.path == "eager"] == ["act is a GELU"]
    assert [row.path for row in explain(model.train()).ends] == ["eager"] * 2
