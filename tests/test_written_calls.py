"""Blocks of classes that no adapter knows, once they are fused: what a call sees, copies, wrappers, refusals."""

import copy
import io
import pickle

import pytest
import torch
import written_efficientnets as e
from agreement import assert_same, outcome, randomised
from near_misses import NEAR_MISSES
from torch import nn
from written import WRITTEN

import fastmbconv
from fastmbconv import explain, fuse, unfuse
from fastmbconv.swap.runs import FusedRuns


def fused_block(**settings):
    torch.manual_seed(2)
    return fuse(randomised(e.MeanBlock(8, 8, **settings)))


def image(channels=8, size=8):
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def reason(model):
    """Why a call runs the one block of a model eager, "" for through the kernels."""
    (row,) = explain(model).rows
    return row.reason


def wrapped_forward(module):
    def forward(x):
        return 2 * type(module).forward(module, x)

    module.forward = forward


CHANGES = {
    "hook": (lambda m: m.bn1.register_forward_hook(lambda *_: None), "a hook on bn1"),
    "leaf of another type": (
        lambda m: setattr(m, "bn1", nn.GroupNorm(2, 16)), "an attribute or a submodule of it has changed since fuse",
    ),
    "leaf of a subclass": (
        lambda m: setattr(m, "conv_dw", e.SameConv2d(16, 16, 3, 1, 16)), "an attribute or a submodule of it has",
    ),
    "attribute": (lambda m: setattr(m, "use_se", False), "an attribute or a submodule of it has changed since fuse"),
    "more children": (lambda m: m.add_module("more", nn.Identity()), "an attribute or a submodule of it has changed"),
    "forward of a child": (lambda m: wrapped_forward(m.bn2), "a forward replaced on bn2"),
    "padding mode": (
        lambda m: setattr(m.conv_dw, "padding_mode", "circular"), "the depthwise convolution pads with 'circular'",
    ),
    "bias": (lambda m: setattr(m.conv_pw, "bias", nn.Parameter(torch.ones(16, dtype=torch.float64))), ""),
    "weight": (lambda m: setattr(m.conv_pw, "weight", nn.Parameter(m.conv_pw.weight * 2)), ""),
    "frozen norm": (lambda m: m.bn2.eval(), ""),
    "eps": (lambda m: setattr(m.bn3, "eps", 0.1), ""),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_each_call_sees_what_changed(change):
    """And computes what the block's own forward does then."""
    model = fused_block()
    x = image()
    with fastmbconv.backend("triton"):
        model(x)
    apply, expected = CHANGES[change]
    apply(model)
    model.double()
    assert reason(model).startswith(expected) and bool(reason(model)) == bool(expected)
    state, outcomes = copy.deepcopy(model.state_dict()), []
    for path in ("eager", "triton"):
        model.load_state_dict(state)
        model.zero_grad()
        with fastmbconv.backend(path):
            found = outcome(model, model, image())
        outcomes.append({key: None if value is None else value.clone() for key, value in found.items()})
    assert_same(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-9)


def test_forward_replaced_on_the_instance():
    model = e.MeanBlock(8, 8)
    wrapped_forward(model)
    assert explain(fuse(model)).fused == 0


def test_fuse_again_takes_what_changed():
    model = fused_block()
    model.use_se = False
    assert reason(model)
    assert reason(fuse(model)) == ""
    model.use_residual = "maybe"  # another attribute of no use
    fuse(model)
    model.bn1 = nn.GroupNorm(2, 16)
    fuse(model)
    assert type(model) is e.MeanBlock and "GroupNorm" in reason(model)


def test_stochastic_depth_is_the_blocks_own():
    """The same samples from the same seed, and a rate that changes later."""
    torch.manual_seed(4)
    own = randomised(e.DropPathBlock(8, 8, drop_rate=0.5))
    fused = fuse(copy.deepcopy(own))
    x = torch.cat([image()] * 8)
    for rate in (0.5, 0.9, 0.0):
        for module in (own, fused):
            next(m for m in module.modules() if isinstance(m, e.DropPath)).drop_prob = rate
        assert reason(fused) == ""
        with fastmbconv.backend("triton"):
            ours = outcome(fused, fused, x)
        theirs = outcome(own, own, x)
        assert_same(ours, theirs, rtol=1e-9, atol=1e-9)


def test_other_arguments_run_eager():
    own = randomised(e.ArgumentBlock(8, 8)).train()
    fused = fuse(copy.deepcopy(own))
    for args, kwargs in (((), {}), ((0.5,), {}), ((), {"drop_connect_rate": 0.5}), ((None,), {})):
        torch.manual_seed(5)
        theirs = own(image(), *args, **kwargs)
        torch.manual_seed(5)
        with fastmbconv.backend("triton"):
            torch.testing.assert_close(fused(image(), *args, **kwargs), theirs, rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError):
        fused(image(), 0.1, 0.2, 0.3)
    with fastmbconv.backend("triton"):
        assert fused(x=image()).shape == image().shape


class TwoValues(e.MeanBlock):
    def forward(self, x):
        return super().forward(x), x


class NeedsMore(e.MeanBlock):
    def forward(self, x, scale):
        return super().forward(x)


class Counts(e.MeanBlock):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class Appends(e.MeanBlock):
    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x)


class CountsInABuffer(e.MeanBlock):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (TwoValues, "its forward returns a tuple, not one tensor"),
        (NeedsMore, "missing 1 required positional argument: 'scale'"),
        (Counts, "its forward changes an attribute (calls)"),
        (Appends, "its forward changes an attribute (seen)"),
        (CountsInABuffer, "it computes more than a block: an add"),
    ],
)
def test_refused(cls, expected):
    model = fuse(cls(8, 8))
    assert type(model) is cls and expected in reason(model)
    assert not getattr(model, "seen", []) and float(getattr(model, "calls", 0)) == 0


def test_nothing_of_the_callers_is_touched():
    """By fuse and explain: no hook of his runs, no random number is drawn, no statistic or mode changes."""
    model = nn.Sequential(e.DropPathBlock(8, 8, drop_rate=0.5), e.MeanBlock(8, 8))
    called = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append(1))
    model[0].eval()
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [m.training for m in model.modules()]
    seeds = len(torch.cuda._queued_calls)  # of GPUs, once there are some
    fuse(model)
    explain(model)
    assert not called
    explain(model, (2, 8, 8, 8))  # runs it, on tensors without values
    assert torch.equal(torch.get_rng_state(), before[1]) and len(torch.cuda._queued_calls) == seeds
    assert [m.training for m in model.modules()] == before[2]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))
    assert list(model.state_dict()) == list(before[0])


@pytest.mark.parametrize("make", [e.MeanBlock, WRITTEN["v1_flat"].make], ids=["module", "run"])
def test_copies_and_files(make):
    model = fuse(make(8, 8) if make is e.MeanBlock else make())
    x = torch.randn(2, 8, 16, 16) if make is e.MeanBlock else torch.randn(WRITTEN["v1_flat"].shape)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    expected = copy.deepcopy(model).eval()(x)
    for each in copies:
        assert type(each) is type(model) and explain(each).fused == explain(model).fused > 0
        assert torch.equal(each.eval()(x), expected)
        assert "fused" not in repr(unfuse(each))


def test_filter_and_names():
    model, names = WRITTEN["v1_flat"].make(), []
    fuse(model, lambda module, name: names.append((name, type(module))) or name == "[9:15]")
    assert names == [(f"[{begin}:{begin + 6}]", nn.Sequential) for begin in (3, 9, 15)]
    assert isinstance(model, FusedRuns)
    assert [row.path for row in explain(model).rows] == ["eager", "fused", "eager"]
    assert fuse(model) is model and explain(model).fused == 3
    fuse(model, lambda *_: True, memory="lean")
    assert {run.memory for run in type(model).runs} == {"lean"}
    assert type(unfuse(model)) is nn.Sequential


def test_runs_see_what_changed():
    """A hook in a run, a child that was replaced, and one that was taken out: the Sequential's own forward counts."""
    torch.manual_seed(6)
    model = fuse(randomised(WRITTEN["v1_flat"].make()).eval())
    x = torch.randn(WRITTEN["v1_flat"].shape, dtype=torch.float64)

    def check():
        with fastmbconv.backend("triton"):
            ours = model(x)
        torch.testing.assert_close(ours, unfuse(copy.deepcopy(model))(x), rtol=1e-9, atol=1e-9)

    check()
    seen = []
    handle = model[5].register_forward_hook(lambda *_: seen.append(1))
    with fastmbconv.backend("triton"):
        model(x)
    assert seen
    handle.remove()
    model[4] = nn.Identity()
    check()
    model[20] = nn.Sigmoid()
    check()
    del model[22:]
    check()


def test_a_slice_of_fused_layers_runs_its_own():
    torch.manual_seed(10)
    model = fuse(randomised(WRITTEN["v1_flat"].make()).eval())
    for layers in (model[3:15], model[9:], model[4:21], fuse(nn.Sequential(*model[3:9]))[:3]):
        x = image(layers[0].num_features if isinstance(layers[0], nn.BatchNorm2d) else layers[0].in_channels)
        with fastmbconv.backend("triton"):
            torch.testing.assert_close(layers(x), nn.Sequential(*layers)(x), rtol=1e-9, atol=1e-9)


def test_what_others_make_of_a_fused_block():
    """A compiled one, and a subclass of its class, as FSDP makes: neither is another block."""
    model = fused_block()
    model.compile(backend="eager")
    assert reason(model) == ""
    model.__class__ = type("Sharded", (type(model),), {})
    assert reason(model) == ""
    with fastmbconv.backend("triton"):
        y = model(image())
    assert y.shape == image().shape


def test_a_run_takes_its_last_activation_along():
    """Of a block with an expansion too, whose layers the run without it had taken."""
    layers = [nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16)]
    layers += [nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), *layers, *copy.deepcopy(layers), nn.Conv2d(8, 8, 3))
    assert [row.name for row in explain(fuse(model)).rows] == ["[1:10]", "[10:19]"]


def test_saving_is_counted():
    """Of modules and of runs, from the shapes that they get in the model."""
    rows = explain(fuse(WRITTEN["v1_flat"].make()), WRITTEN["v1_flat"].shape).rows
    assert [row.saving.shape for row in rows] == [(2, 8, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4)]
    assert all(row.saving.bytes[0] > row.saving.bytes[1] for row in rows)


def test_blocks_that_share_a_leaf():
    torch.manual_seed(7)
    own = nn.Sequential(e.MeanBlock(8, 8), e.MeanBlock(8, 8)).double()
    own[1].conv_dw, own[1].bn2 = own[0].conv_dw, own[0].bn2
    fused = fuse(copy.deepcopy(own))
    assert explain(fused).fused == 2
    with fastmbconv.backend("triton"):
        ours = outcome(fused, fused, image())
    theirs = outcome(own, own, image())
    assert_same(ours, theirs, rtol=1e-9, atol=1e-9)


def test_one_block_in_two_places_is_one():
    shared = e.MeanBlock(8, 8)
    assert len(explain(fuse(nn.Sequential(shared, shared)))) == 1


def test_without_proof():
    near = NEAR_MISSES["gate_detached"]
    assert explain(fuse(near.make(), verify=False)).fused == 1  # what only the proof can see
    assert explain(fuse(near.make())).fused == 0


def test_compiled():
    """One graph, without a break; runs of a flat Sequential run eager in it."""
    torch.manual_seed(8)
    model = fuse(randomised(nn.Sequential(e.MeanBlock(8, 8), e.MeanBlock(8, 8, 2)))).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fastmbconv.backend("triton"):
        torch.testing.assert_close(compiled(image()), model(image()), rtol=1e-9, atol=1e-9)
    flat = fuse(WRITTEN["v1_flat"].make()).eval()
    x = torch.randn(WRITTEN["v1_flat"].shape)
    with fastmbconv.backend("triton"):
        torch.testing.assert_close(torch.compile(flat, backend="eager", fullgraph=True)(x), unfuse(flat)(x))


def test_compiled_before_fuse():
    own = nn.Sequential(e.MeanBlock(8, 8)).eval()
    assert explain(fuse(torch.compile(own, backend="eager"))).fused == 1


def test_wrapped_by_data_parallel():
    assert explain(fuse(nn.DataParallel(nn.Sequential(e.MeanBlock(8, 8))))).fused == 1


def test_wrapped_for_distributed_training(tmp_path):
    """Fused inside and outside of DDP: the same gradients as without."""
    torch.manual_seed(9)
    own = randomised(nn.Sequential(e.MeanBlock(8, 8), e.DropPathBlock(8, 8)))
    fused = fuse(copy.deepcopy(own))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(own))
        assert explain(fuse(synchronised)).fused == 2  # the proof waits for nobody
        wrapped = nn.parallel.DistributedDataParallel(fused)
        assert explain(fuse(wrapped)).fused == 2
        with fastmbconv.backend("triton"):
            ours = outcome(fused, wrapped, image())
        theirs = outcome(own, own, image())
    finally:
        torch.distributed.destroy_process_group()
    assert_same(ours, theirs, rtol=1e-9, atol=1e-9)


def test_scripted_model_inside():
    """Is nobody's to trace, and keeps its mode."""
    model = nn.Sequential(e.MeanBlock(8, 8), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1)))).eval()
    assert explain(fuse(model)).fused == 1
    assert not model[1].training


class Uncopied(e.MeanBlock):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me")


def test_what_cannot_be_looked_at():
    """Is left, with what came in the way, and fuse goes on."""
    lazy = e.MeanBlock(8, 8)
    lazy.bn2 = nn.LazyBatchNorm2d()
    with torch.inference_mode():
        model = fuse(nn.Sequential(lazy, Uncopied(8, 8), e.MeanBlock(8, 8)))
    rows = explain(model).rows
    assert [row.path for row in rows] == ["eager", "eager", "fused"]
    assert rows[0].reason.startswith("a LazyBatchNorm2d(")
    assert rows[1].reason == "it can't be copied for the proof: RuntimeError: there is one of me"
    assert explain(fuse(model, verify=False)).fused == 2


def test_meta_parameters():
    with torch.device("meta"):
        model = nn.Sequential(e.MeanBlock(8, 8))
    assert explain(fuse(model)).fused == 1
