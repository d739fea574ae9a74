"""Stems and heads through the swap, of libraries' models and of one's own. Blocks run eager: they have their tests."""

import copy
import pickle
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from libraries import library
from parity import assert_parity
from torch import nn

import fastmbconv
from fastmbconv import explain, fuse, unfuse
from fastmbconv.efficientnet import efficientnet
from fastmbconv.kernels.traffic import recorded
from fastmbconv.mbconv import MBConv
from fastmbconv.swap import ends
from fastmbconv.swap.ends import FusedEnd, ends_of
from fastmbconv.swap.fused import FusedBlock, own_forward, swap_out

BN = "bn_act_fwd"


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


def transformers():
    config = library("transformers").EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=0.1, image_size=32, hidden_dim=1280, return_dict=False
    )
    model = library("transformers").EfficientNetModel(config)
    model.encoder.blocks = model.encoder.blocks[:1]
    model.encoder.top_conv = nn.Conv2d(16, 1280, 1, padding="same", bias=False)
    return model


def align():
    library("transformers")
    from transformers.models.align import modeling_align

    embeddings = modeling_align.AlignVisionEmbeddings(modeling_align.AlignVisionConfig())
    return nn.Sequential(embeddings, MBConv(embeddings.out_dim, 8))


class ConvBNReLU(nn.Sequential):
    """As in many a repository."""

    def __init__(self, inputs, outputs, kernel=3):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class Unit(nn.Module):
    """With functions, a bias, padding outside, and arguments that nobody uses."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm = nn.BatchNorm2d(outputs)
        self.weights = nn.Conv2d(inputs, outputs, 3, stride=2)
        self.power = 1

    def forward(self, x, factor=None):
        y = self.norm(self.weights(F.pad(x, (0, 1, 0, 1))))
        y = y * torch.sigmoid(y)
        return y if factor is None else y * factor


def written(stem=Unit, head=ConvBNReLU, between=nn.Identity):
    return nn.Sequential(stem(3, 8), MBConv(8, 8), between(), MBConv(8, 8), head(8, 16))


def plain(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.SiLU())


def synchronised(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


MODELS = {
    "timm": (lambda: timm(num_classes=0), 2),
    "timm-same": (lambda: timm("tf_efficientnet_lite0", num_classes=0), 2),
    "timm-features": (lambda: timm(features_only=True), 1),
    "timm-getter": (lambda: timm(features_only=True, feature_cls="getter"), 1),
    "timm-synchronised": (lambda: library("timm").layers.convert_sync_batchnorm(timm(num_classes=0)), 2),
    "torchvision": (torchvision, 2),
    "torchvision-mobilenet": (lambda: torchvision("mobilenet_v2"), 2),
    "transformers": (transformers, 1),
    "align": (align, 1),
    "smp-timm": (
        lambda: library("segmentation_models_pytorch").encoders.get_encoder("tu-efficientnet_b0", weights=None),
        1,
    ),
    "written": (written, 2),
    "written-plain": (lambda: written(plain, plain), 2),
    "written-between": (lambda: written(between=lambda: nn.Sequential(nn.Sequential(ConvBNReLU(8, 8, 1)))), 3),
    "written-synchronised": (lambda: synchronised(written()), 2),
}
USUAL = [timm, torchvision, written]


@cache
def made(make):
    return make()


def prepared(make):
    """In eval mode, with BatchNorms at both ends that no wrong path would get right by chance."""
    model = copy.deepcopy(made(make)).eval()
    with torch.no_grad():
        for end in ends_of(model):
            norm = end.norm
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -1, 1)):
                tensor.uniform_(low, high)
            norm.running_var.uniform_(0.5, 2)
    return model


def fuse_ends(model):
    for module in fuse(model).modules():
        if isinstance(module, (FusedBlock, MBConv)):
            swap_out(module)
    return model


@torch.no_grad()
def run(model, x, *args):
    """(tensors that come out, how many passes of ours ran): through the kernels or an error, as far as wanted."""
    for module in model.modules():
        if isinstance(module, MBConv):
            module.fused = False
    with fastmbconv.backend("triton"), recorded() as launches:
        found = tensors(model(x, *args))
    assert {launch.kernel for launch in launches} <= {BN}
    return found, len(launches)


def tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for part in (found.values() if isinstance(found, dict) else found) for tensor in tensors(part)]


@pytest.fixture
def x():
    return torch.randn(2, 3, 20, 12)


@pytest.mark.parametrize("make, passes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_models(make, passes, x):
    """What the kernels compute, and that nothing but some classes changes, and changes back."""
    model = prepared(make)
    classes, state = [(m, type(m)) for m in model.modules()], model.state_dict(keep_vars=True)
    theirs, truth = tensors(model(x)), tensors(copy.deepcopy(model).double()(x.double()))
    ours, launched = run(fuse_ends(model), x)
    assert launched == passes == len(explain(model).ends)
    for i, value in enumerate(ours):
        assert value.shape == theirs[i].shape and value.dtype == theirs[i].dtype
        assert_parity(str(i), value, theirs[i], truth[i])
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is value for key, value in state.items())
    assert all(ours is module for ours, (module, _) in zip(model.modules(), classes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), theirs, strict=True))
    assert all(type(m) is cls for m, (_, cls) in zip(unfuse(model).modules(), classes, strict=True))
    assert run(model, x)[1] == 0


def _counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return ConvBNReLU.forward(self, x)


MISSES = {
    "no activation": lambda self, x: self[1](self[0](x)),
    "activation first": lambda self, x: self[1](self[2](self[0](x))),
    "norm twice": lambda self, x: self[2](self[1](self[1](self[0](x)))),
    "more behind": lambda self, x: ConvBNReLU.forward(self, x) * 2,
    "more before": lambda self, x: ConvBNReLU.forward(self, x * 2),
    "shortcut": lambda self, x: self[2](self[1](u := self[0](x))) + u,
    "by size": lambda self, x: ConvBNReLU.forward(self, x) if x.shape[2] < 30 else x,
    "by values": lambda self, x: ConvBNReLU.forward(self, x) if x.mean() < 30 else x,
    "counts": _counts,
    "convolution as a function": lambda self, x: self[2](self[1](F.conv2d(x, self[0].weight))),
    "unknown activation": lambda self, x: F.mish(self[1](self[0](x))) + 0,
    "reflected": lambda self, x: ConvBNReLU.forward(self, F.pad(x, (1, 1, 1, 1), mode="reflect")),
}


@pytest.mark.parametrize("forward", MISSES.values(), ids=MISSES)
def test_what_is_no_unit_stays(forward, x):
    miss = type("Miss", (ConvBNReLU,), {"forward": forward})
    model = written(miss).eval()
    theirs, _ = run(model, x)
    ours, launched = run(fuse_ends(model), x)
    assert launched == 1 and type(model[0]) is miss and len(explain(model).ends) == 1
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf"])
def test_a_model_without_blocks_is_left_alone(name):
    for make in (getattr(library("torchvision").models, name), lambda: ConvBNReLU(3, 8)):
        model = make().eval()
        classes = [type(m) for m in model.modules()]
        assert [type(m) for m in fuse(model).modules()] == classes and not explain(model).ends


HOOKED = {
    "timm-conv": (timm, "conv_stem", 2),
    "timm-norm": (timm, "bn2", 2),
    "timm-act": (timm, "bn2.act", 1),
    "torchvision-unit": (torchvision, "features.3", 2),
    "torchvision-inside": (torchvision, "features.3.1", 1),
    "torchvision-conv": (torchvision, "features.0.0", 1),
    "written": (written, "0.norm", 1),
}


@pytest.mark.parametrize("make, path, passes", HOOKED.values(), ids=HOOKED)
def test_a_hook_or_a_replaced_forward_is_run(make, path, passes, x):
    model = prepared(make)
    seen, inner = [], model.get_submodule(path)
    handle = inner.register_forward_hook(lambda module, args, output: seen.append(output))
    theirs, _ = run(model, x)
    ours, launched = run(fuse_ends(model), x)
    assert launched == passes and len(seen) == 2
    torch.testing.assert_close(*seen)
    torch.testing.assert_close(ours, theirs)
    handle.remove()
    fused = run(model, x)[1]
    twin = unfuse(copy.deepcopy(inner))
    inner.forward = lambda x: twin(x) + 1
    changed, launched = run(model, x)
    assert launched < fused or path == "conv_stem"
    torch.testing.assert_close(changed, run(unfuse(model), x)[0])
    assert not torch.allclose(changed[-1], theirs[-1])


CHANGED = "has changed since fuse"
CHANGES = {
    "norm's act": (timm, lambda m: setattr(m.bn2, "act", nn.Mish()), "the activation after the convolution is Mish"),
    "norm's forward": (timm, lambda m: setattr(m.bn2, "forward", own_forward(m.bn2)), "replaced on the instance"),
    "unit's act": (torchvision, lambda m: setattr(m.features[0], "2", nn.Mish()), CHANGED),
    "unit's norm": (written, lambda m: setattr(m[0], "norm", nn.Sequential(nn.BatchNorm2d(8))), CHANGED),
    "unit's attribute": (written, lambda m: setattr(m[0], "power", 2), CHANGED),
    "unit's child": (written, lambda m: m[4].append(nn.ReLU()), CHANGED),
    "no norm": (written, lambda m: m[4].__delitem__(1), CHANGED),
    "dropout": (
        lambda: written(head=lambda *sizes: plain(*sizes).append(nn.Dropout2d(0.5))),
        lambda m: m[4][3].train(),
        "training",
    ),
}


@pytest.mark.parametrize("make, change, reason", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_later_runs_as_it_is(make, change, reason, x):
    model = fuse_ends(prepared(make))
    assert run(model, x)[1] == 2
    change(model)
    torch.manual_seed(1)
    ours, launched = run(model, x)
    assert launched == 1
    (row,) = (row for row in explain(model).ends if row.path == "eager")
    assert reason in row.reason
    torch.manual_seed(1)
    torch.testing.assert_close(ours, run(unfuse(model), x)[0])


def test_fused_again_a_unit_is_what_it_has_become(x):
    model = fuse_ends(prepared(written))
    model[0].power, model[4][2] = 2, nn.SiLU().eval()
    assert run(fuse_ends(model), x)[1] == 2
    model[4][2] = nn.Mish()
    assert run(fuse_ends(model), x)[1] == 1 and type(model[4]) is ConvBNReLU and len(explain(model).ends) == 1


def test_calls_of_another_kind_run_the_modules_own_forward(x):
    model = fuse_ends(prepared(written))
    stem, twin = model[0], unfuse(copy.deepcopy(model[0]))
    with torch.no_grad(), fastmbconv.backend("triton"), recorded() as launches:
        for args, named in (((x, 2.0), {}), ((x,), {"factor": 2.0}), ((), {"x": x}), ((x[:0],), {})):
            torch.testing.assert_close(stem(*args, **named), twin(*args, **named))
    assert not launches
    assert run(stem, x)[1] == 1


def test_settings_and_weights_are_read_at_each_call(x):
    model = fuse_ends(prepared(written))
    run(model, x)
    model[0].weights.stride, model[0].norm.eps = (1, 1), 1.0
    model[0].weights.weight = nn.Parameter(model[0].weights.weight * 2)
    ours, launched = run(model, x)
    assert launched == 2
    torch.testing.assert_close(ours, run(unfuse(model), x)[0])


@pytest.mark.parametrize("make", USUAL)
def test_a_forward_kept_from_a_fused_model_runs_the_unfused_one(make, x):
    model = fuse(prepared(make))
    modules = [module for module in model.modules() if isinstance(module, FusedEnd)]
    kept = [(module, module.forward) for module in modules]
    unfuse(model)
    inputs = {}
    for module in modules:
        module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0].clone()}))
    run(model, x)
    for module, forward in kept:
        with torch.no_grad(), fastmbconv.backend("triton"), recorded() as launches:
            assert torch.equal(forward(inputs[module]), module(inputs[module])) and not launches


@pytest.mark.parametrize("make", USUAL)
def test_training_and_gradients_are_eager(make, x):
    model = prepared(make)
    x.requires_grad_()
    theirs = tensors(model(x))
    fuse_ends(model)
    with fastmbconv.backend("triton"), recorded() as launches:
        ours = tensors(model(x))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        ours[-1].sum().backward()
        for p in model.parameters():
            p.requires_grad_(False)
        model(x)  # the image wants a gradient
        assert not launches
        model(x.detach())
        assert len(launches) == 2
    assert x.grad is not None
    norm = ends_of(model)[0].norm.train()
    assert run(model, x)[1] == 1
    norm.eval().track_running_stats, norm.running_mean, norm.running_var = False, None, None
    assert run(model, x)[1] == 1
    assert run(model.train(), x)[1] == 0 and all("training" in row.reason for row in explain(model).ends)


@pytest.mark.parametrize("make", USUAL)
def test_copies_and_later_weights(make, x):
    model, other = fuse_ends(prepared(make)), prepared(make)
    expected, passes = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ours, launched = run(twin, x)
        assert launched == passes == 2 and torch.equal(ours[-1], expected[-1])
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert run(unfuse(twin), x)[1] == 0
    assert fuse(model) is model and run(fuse_ends(model), x)[1] == passes
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(model, x)[0], run(other, x)[0])


@pytest.mark.parametrize("make", USUAL)
def test_autocast(make, x):
    model = prepared(make)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = run(model, x)
        ours, launched = run(fuse_ends(model), x)
    assert launched == 2 and ours[-1].dtype == theirs[-1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=0.05, atol=0.05)


def test_on_another_default_device():
    with torch.device("meta"):
        model = fuse(written().eval())
    assert [row.path for row in explain(model).ends] == ["fused"] * 2


def test_with_a_filter_they_stay(x):
    model = fuse(prepared(written), lambda module, name: False)
    assert run(model, x)[1] == 0
    assert [row.reason for row in explain(model).ends] == ["not fused: fastmbconv.fuse without a filter does it"] * 2


@pytest.mark.parametrize("make", USUAL)
def test_without_kernels_nothing_is_looked_at(make, x, monkeypatch):
    model = fuse_ends(prepared(make))
    monkeypatch.setattr(ends, "block_of", None)
    with torch.no_grad():
        model(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", USUAL)
def test_compiled_with_the_kernels_and_exported_as_eager(make, x):
    model = fuse_ends(prepared(make))
    expected, passes = run(model, x)
    torch._dynamo.reset()
    ours, launched = run(torch.compile(model, backend="eager", fullgraph=True), x)
    assert launched == passes == 2
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        assert not any("fastmbconv" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(x), expected)
        assert torch.equal(torch.jit.trace(model, x)(x), expected)
        if make is timm:  # TorchScript takes no torchvision block behind this suite's torch.empty
            assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), expected)


def test_explain_has_their_rows_beside_the_blocks():
    model = timm(blocks=7).eval()
    before = explain(model, (2, 3, 64, 64))
    assert len(before) == 16 and [row.path for row in before.ends] == ["eager"] * 2
    found = explain(fuse(model), (2, 3, 64, 64))
    stem, head = found.ends
    assert len(found) == found.fused == 16
    assert [(row.name, row.block, row.path) for row in found.ends] == [
        ("bn1", "stem", "fused"),
        ("bn2", "head", "fused"),
    ]
    image, u, trunk, last = 2 * 3 * 64 * 64, 2 * 32 * 32 * 32, 2 * 320 * 2 * 2, 2 * 1280 * 2 * 2
    assert stem.saving.bytes == (4 * (image + 5 * u), 4 * (image + 3 * u))
    assert head.saving.bytes == (4 * (trunk + 5 * last), 4 * (trunk + 3 * last))
    assert (stem.geometry.channels, stem.geometry.kernel_size, stem.geometry.stride) == ((3, 32), 3, 2)
    lines = str(found).splitlines()
    assert lines[1].startswith("bn1") and lines[18].startswith("bn2")
    assert "The fused stem and head move" in " ".join(line.strip() for line in lines)
    handle = model.bn2.act.register_forward_hook(lambda *_: None)
    (hooked,) = (row for row in explain(model).ends if row.path == "eager")
    assert (hooked.name, hooked.reason) == ("bn2", "a hook on act")
    handle.remove()


def test_explain_says_where_a_unit_stands():
    """Of the smallest module that holds blocks around it: each of two models has its own ends."""
    two = nn.Sequential(written(between=lambda: ConvBNReLU(8, 8)), nn.Sequential(written(), ConvBNReLU(16, 8))).eval()
    for model in (two, fuse(two)):
        assert [(row.name, row.block) for row in explain(model).ends] == [
            ("0.0", "stem"),
            ("0.2", "between"),
            ("0.4", "head"),
            ("1.0.0", "stem"),
            ("1.0.4", "head"),
            ("1.1", "head"),
        ]


def test_explain_of_our_own_model():
    model = efficientnet("b0").eval()
    rows = [(row.name, row.block, row.path) for row in explain(model).ends]
    assert rows == [("stem", "stem", "fused"), ("head", "head + pool", "fused")]
    unfused = {row.reason for row in explain(unfuse(model)).ends}
    assert unfused == {"not fused: fastmbconv.fuse without a filter does it"}
    model.stem.act = nn.Mish()
    assert [row.reason for row in explain(fuse(model)).ends if row.path == "eager"] == ["act is a Mish"]
    assert [row.path for row in explain(model.train()).ends] == ["eager"] * 2
