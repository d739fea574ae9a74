"""Without gradients and batch statistics: four launches a small batch at most, eager's numbers, no old statistic."""

import copy
import timeit
from dataclasses import dataclass

import pytest
import torch
from blocks import (  # noqa: F401
    HALVES,
    PRECISE,
    BatchNorm,
    batch_norms,
    bn_module,
    fused,
    launches,
    make_block,
    nhwc,
    normal,
    randomise,
    shrink,
)
from parity import assert_parity

import fastmbconv
from benchmarks.launches import counted
from fastmbconv import dispatch, functional, reference
from fastmbconv.ends import ConvBNAct
from fastmbconv.kernels import squeeze_excite
from fastmbconv.mbconv import MBConv

interpreted = pytest.mark.skipif(not dispatch.interpreted(), reason="about CPU tensors under the interpreter")


@dataclass(frozen=True)
class Row:
    """A block (arguments of MBConv), an image [N, C, H, W], tile sizes, and how many kernels it launches."""

    block: dict
    image: tuple
    launches: int
    tiles: dict | None = None


def block(out, kernel_size=3, stride=1, expand_ratio=2, se_ratio=0.5, **kwargs):
    return dict(
        out_channels=out, kernel_size=kernel_size, stride=stride, expand_ratio=expand_ratio, se_ratio=se_ratio, **kwargs
    )


TILED = dict(NB=2, BC=16, R=2, SPAN=3, BM=16, BK=16, BO=16)
ROWS = {
    "residual": Row(block(4), (2, 4, 5, 4), 3),
    "k5": Row(block(4, 5), (2, 4, 4, 3), 4),
    "k5-same-strided": Row(block(5, 5, 2, padding="same"), (2, 4, 6, 5), 4),
    "k3-same-strided": Row(block(5, 3, 2, padding="same"), (2, 4, 6, 4), 3),
    "no-expansion": Row(block(4, expand_ratio=1), (2, 4, 3, 5), 3),
    "no-se-relu6": Row(block(4, se_ratio=0, activation="relu6"), (2, 4, 4, 3), 2),
    "relu": Row(block(6, activation="relu"), (1, 4, 3, 3), 3),
    "no-expansion-no-se": Row(block(5, expand_ratio=1, se_ratio=0), (1, 4, 3, 3), 2),
    "many-programs": Row(block(9, 5), (3, 9, 3, 5), 4, TILED),
    "many-programs-inside": Row(block(9), (2, 9, 3, 5), 3, TILED | dict(NB=16)),
    "many-programs-strided": Row(block(17, 3, 2, expand_ratio=1), (3, 17, 5, 9), 3, TILED),
}
# More channels than above: over a handful of values, rounding noise hides which of two errors is the larger.
WIDE = {
    "wide": Row(block(24), (3, 24, 5, 4), 3),
    "wide-k5": Row(block(40, 5, 2, padding="same"), (3, 24, 6, 4), 4),
    "wide-lite": Row(block(24, se_ratio=0, activation="relu6"), (3, 24, 4, 4), 2),
}
KERNELS = {"residual", "k5-same-strided", "no-se-relu6", "many-programs", "many-programs-strided"}
BLOCK_KERNELS = {
    "_depthwise_inference_kernel", "_pointwise_kernel", "_excite_fwd_kernel", "_excite_reduce_kernel",
    "_excite_expand_kernel",
}  # fmt: skip


def rows(table):
    return [pytest.param(row, id=name, marks=[pytest.mark.kernels] * (name in KERNELS)) for name, row in table.items()]


def build(row, dtype, device):
    module = make_block(row.image[1], dtype=dtype, device=device, **row.block).eval()
    return module, normal(*row.image, dtype=dtype, device=device)


@torch.no_grad()
def assert_block(module, x):
    with counted() as kernels:
        ours = fused(module)(x)
    theirs = copy.deepcopy(module).forward_eager(x)
    truth = copy.deepcopy(module).double().forward_eager(x.double())
    assert ours.dtype == theirs.dtype and set(kernels) <= BLOCK_KERNELS
    assert_parity("y", ours, theirs, truth)
    return sum(kernels.values())


@pytest.mark.parametrize("row", rows(ROWS))
def test_parity(row, device, monkeypatch):
    if row.tiles:
        shrink(monkeypatch, **row.tiles)
    module, x = build(row, PRECISE, device)
    found = assert_block(module, x)
    assert found == row.launches or not x.is_cpu and found <= 4


@pytest.mark.parametrize("dtype", [pytest.param(PRECISE, id="precise"), *HALVES])
def test_excite_of_many_images_takes_two_launches(dtype, device, monkeypatch):
    monkeypatch.setattr(squeeze_excite, "WHOLE_WEIGHT", 0)
    monkeypatch.setattr(squeeze_excite, "FEW_IMAGES", 3)
    assert assert_block(*build(ROWS["many-programs"], dtype, device)) == 5


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), *HALVES])
@pytest.mark.parametrize("row", rows(WIDE))
def test_parity_of_narrow_types(row, dtype, device):
    assert_block(*build(row, dtype, device))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_without_weights_and_with_half_statistics(affine, device):
    module, x = build(ROWS["residual"], torch.float16, device)
    for bn in batch_norms(module):
        bn.half()
        if not affine:
            bn.affine, bn.weight, bn.bias = False, None, None
    assert_block(module, x)


@torch.no_grad()
def test_a_moved_statistic_is_seen_at_once(device):
    """In place, as loading a state dict or a step of averaging weights does it: nothing folded is kept."""
    module, x = build(ROWS["residual"], torch.float32, device)
    before = fused(module)(x)
    for bn in batch_norms(module):
        bn.running_mean.add_(1.0)
        bn.running_var.mul_(3.0)
        bn.weight.neg_()
    assert not torch.allclose(before, fused(module)(x))
    assert_block(module, x)


def operators(module, x, mode=torch.enable_grad):
    with launches() as seen, mode():
        fused(module)(x)
    return {name.removeprefix("fastmbconv::").partition(".")[0] for name in seen}


def test_which_calls_take_it(device):
    module, x = build(ROWS["residual"], torch.float32, device)
    assert "mbconv_infer" not in operators(module, x)  # its weights want gradients
    assert operators(module, x, torch.no_grad) == {"mbconv_infer"}
    assert operators(module, x, torch.inference_mode) == {"mbconv_infer"}
    module.requires_grad_(False)
    assert operators(module, x) == {"mbconv_infer"}
    assert "mbconv_infer" not in operators(module, x.clone().requires_grad_())
    module.se.reduce.bias.requires_grad_()
    assert "mbconv_infer" not in operators(module, x)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_batch_norm_with_batch_statistics_keeps_the_training_path(which, device):
    module, x = build(ROWS["residual"], torch.float32, device)
    batch_norms(module)[which].train()
    assert "mbconv_infer" not in operators(module, x, torch.no_grad)
    assert batch_norms(module)[which].num_batches_tracked == 1
    bn = batch_norms(module.eval())[which]
    bn.track_running_stats, bn.running_mean, bn.running_var, bn.num_batches_tracked = False, None, None, None
    assert "mbconv_infer" not in operators(module, x, torch.no_grad)


def test_the_same_output_every_time_and_in_every_layout(device):
    module, x = build(ROWS["k5"], torch.float32, device)
    with torch.inference_mode():
        first = fused(module)(x)
        wide = x.new_zeros(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x)
        for same in (x, x.contiguous(memory_format=torch.channels_last), wide):
            again = fused(module)(same)
            assert torch.equal(first, again) and again.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("given", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize("name", ["residual", "k5-same-strided"])
@torch.no_grad()
def test_autocast_follows_eager(name, given, device):
    module, x = build(ROWS[name], torch.float32, device)
    x = x.to(given)
    truth = copy.deepcopy(module).double().forward_eager(x.double())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, theirs = fused(module)(x), module.forward_eager(x)
    assert ours.dtype == theirs.dtype
    assert_parity("y", ours.bfloat16(), theirs.bfloat16(), truth)


@pytest.mark.parametrize("name", ["residual", "k5"])
@torch.no_grad()
def test_compiled_is_one_graph_with_the_same_numbers(name, device, triton_backend):
    torch._dynamo.reset()
    module, x = build(ROWS[name], torch.float32, device)
    expected = module(x)
    with counted() as kernels:
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert sum(kernels.values()) == ROWS[name].launches or not x.is_cpu
    assert torch.equal(compiled, expected)


@torch.no_grad()
def test_depthwise_bn_act(device, triton_backend):
    x = normal(3, 20, 5, 7, dtype=PRECISE, device=device)
    weight, bn = normal(20, 1, 5, 5, dtype=PRECISE, device=device), bn_module(20, PRECISE, device).eval()
    with counted() as kernels:
        ours = functional.depthwise_bn_act(x, weight, BatchNorm.of(bn), 2, "same", "silu")
    assert kernels == {"_depthwise_inference_kernel": 1}
    eager = reference.depthwise_bn_act(x, weight, BatchNorm.of(bn), 2, "same", "silu")
    truth = reference.depthwise_bn_act(x.double(), weight.double(), BatchNorm.of(bn.double()), 2, "same", "silu")
    assert_parity("y", ours, eager, truth)


def ends(channels, out, dtype, device):
    stem = ConvBNAct(3, channels, 3, 2, "same", "silu", 1e-3, 0.1)
    head = ConvBNAct(channels, out, 1, 1, 0, "silu", 1e-3, 0.1)
    return [randomise(part.double()).to(dtype).to(device).eval() for part in (stem, head)]


def at_the_ends(x, stem, head):
    h = stem(x)
    return {"stem": h, "pooled": head.pooled(h)}


@pytest.mark.parametrize("tiles", [None, TILED], ids=["large-tiles", "small-tiles"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), *HALVES])
@torch.no_grad()
def test_stem_and_head(dtype, tiles, device, monkeypatch):
    if tiles:
        shrink(monkeypatch, **tiles)
    parts = ends(24, 40, dtype, device)
    x = normal(2, 3, 9, 12, dtype=dtype, device=device)
    with fastmbconv.backend("triton"), counted() as kernels:
        ours = at_the_ends(x, *parts)
    assert kernels == {"_bn_act_fwd_kernel": 1, "_pointwise_pool_kernel": 1}
    with fastmbconv.backend("eager"):
        theirs = at_the_ends(x, *parts)
        truth = at_the_ends(x.double(), *(copy.deepcopy(part).double() for part in parts))
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert_parity(name, value, theirs[name], truth[name])


def test_a_hooked_training_or_unfused_end_runs_its_own_layers(device, triton_backend):
    stem, head = ends(4, 6, torch.float32, device)
    x = normal(2, 3, 5, 5, dtype=torch.float32, device=device)
    seen = []

    def kernels():
        with counted() as found:
            at_the_ends(x, stem, head)
        return set(found)

    assert not kernels()  # the weights want gradients
    with torch.no_grad():
        assert len(kernels()) == 2
        handles = [part.register_forward_hook(lambda *args: seen.append(args)) for part in (stem.bn, head)]
        assert kernels() == {"_bn_act_fwd_kernel"} and len(seen) == 2  # the head's own pass over its map
        for handle in handles:
            handle.remove()
        stem.train()
        assert kernels() == {"_pointwise_pool_kernel"}
        fastmbconv.unfuse(torch.nn.Sequential(stem.eval(), head))
        assert not kernels()
        fastmbconv.fuse(torch.nn.Sequential(stem, head))
        assert len(kernels()) == 2


@interpreted
def test_on_a_cpu_a_block_is_not_even_looked_at(monkeypatch):
    """What `fuse` costs where no kernel runs is one look at the tensor; see benchmarks/NOTES.md."""
    module, x = build(ROWS["residual"], torch.float32, "cpu")
    monkeypatch.setattr(MBConv, "describe", None)
    monkeypatch.setattr(dispatch, "module_reason", None)
    with fastmbconv.backend("auto"):
        assert torch.equal(module(x), module.forward_eager(x))
    kept = min(timeit.repeat(lambda: dispatch.eager_at_once(module, x), number=200, repeat=20)) / 200
    assert kept < 100e-6
