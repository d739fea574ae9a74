"""timm's models through the swap: every kind of block that is fused, and every kind that is not, with its reason."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from agreement import assert_described, assert_kernels_agree, assert_same, assert_same_masks, outcome, randomised
from libraries import library
from parity import assert_parity
from torch import nn

from fastmbconv import backend, explain, fuse, unfuse
from fastmbconv.block import Block
from fastmbconv.swap.fused import FusedBlock, fusible

timm = library("timm")
blocks = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm has no _efficientnet_blocks")
builder = pytest.importorskip("timm.models._efficientnet_builder", reason="timm has no _efficientnet_builder")
layers = pytest.importorskip("timm.layers", reason="timm has no layers")


def inverted(in_chs=8, out_chs=8, exp_ratio=4, act_layer=nn.SiLU, se=True, **options):
    se_layer = blocks.SqueezeExcite if se is True else (se or None)
    return blocks.InvertedResidual(
        in_chs, out_chs, exp_ratio=exp_ratio, act_layer=act_layer, se_layer=se_layer, **options
    )


def separable(in_chs=8, out_chs=8, act_layer=nn.SiLU, se=True, **options):
    se_layer = blocks.SqueezeExcite if se is True else (se or None)
    return blocks.DepthwiseSeparableConv(in_chs, out_chs, act_layer=act_layer, se_layer=se_layer, **options)


def universal(out_chs=8, exp_ratio=4, act_layer=nn.ReLU, **options):
    return blocks.UniversalInvertedResidual(
        8, out_chs, exp_ratio=exp_ratio, act_layer=act_layer, layer_scale_init_value=None, **options
    )


def changed_universal(change):
    module = universal()
    change(module)
    return module


def hard(kernel=5, **options):
    """MobileNetV3's block."""
    gate = partial(blocks.SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round)
    return inverted(dw_kernel_size=kernel, act_layer=nn.Hardswish, se=gate, **options)


def _with(change):
    module = inverted()
    change(module)
    return module


DESCRIBED = {
    "expand": inverted,
    "k5-stride2": lambda: inverted(dw_kernel_size=5, stride=2, out_chs=12),
    "same-k3-stride2": lambda: inverted(pad_type="same", stride=2),
    "same-k5": lambda: inverted(pad_type="same", dw_kernel_size=5),
    "relu6-no-se": lambda: inverted(act_layer=nn.ReLU6, se=False),
    "relu": lambda: inverted(act_layer=nn.ReLU),
    "no-skip": lambda: inverted(noskip=True),
    "drop-path": lambda: inverted(drop_path_rate=0.5),
    "drop-path-unscaled": lambda: _with(lambda m: setattr(m, "drop_path", layers.DropPath(0.5, scale_by_keep=False))),
    "different-acts": lambda: _with(lambda m: setattr(m.bn1, "act", nn.ReLU())),
    "mobile-v3": hard,
    "mobile-v3-timms-own": lambda: inverted(act_layer=layers.get_act_layer("hard_swish"), se=False),
    "gelu": lambda: inverted(act_layer=layers.get_act_layer("gelu")),
    "gelu-tanh": lambda: inverted(act_layer=layers.get_act_layer("gelu_tanh"), se=False),
    "universal": universal,
    "universal-start": lambda: universal(dw_kernel_size_start=5),
    "universal-start-stride2": lambda: universal(12, dw_kernel_size_start=3, dw_kernel_size_mid=5, stride=2),
    "universal-drop-path": lambda: universal(dw_kernel_size_start=3, drop_path_rate=0.5),
    "universal-same": lambda: universal(12, dw_kernel_size_start=3, stride=2, pad_type="same"),
    "separable": separable,
    "separable-pw-act": lambda: separable(pw_act=True, act_layer=nn.ReLU, se=False),
    "separable-same": lambda: separable(pad_type="same", stride=2, dw_kernel_size=5, out_chs=12),
    "separable-drop-path": lambda: separable(drop_path_rate=0.5, se=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", DESCRIBED.values(), ids=DESCRIBED)
def test_described(make, training):
    assert_described(randomised(make()).train(training), torch.randn(4, 8, 9, 7, dtype=torch.float64))


def test_described_details():
    block = fusible(inverted(pad_type="same", act_layer=nn.ReLU6, stride=2))
    assert block.padding == "same" and block.activation == block.se.activation == "relu6" and not block.residual
    assert fusible(inverted(pad_type="same")).padding == 1  # timm itself takes the symmetric convolution here
    assert fusible(inverted(drop_path_rate=0.5).train()).drop is not None
    assert fusible(inverted(drop_path_rate=0.5).eval()).drop is None
    assert fusible(inverted(drop_path_rate=0.5, stride=2).train()).drop is None


def test_frozen_norm_is_described():
    module = randomised(inverted()).train()
    module.bn2.eval()
    block = assert_described(module, torch.randn(4, 8, 9, 7, dtype=torch.float64))
    assert block.bn1.training and not block.bn2.training and block.bn3.training


UNFUSIBLE = {
    "dilation": (lambda: inverted(dilation=2), "dilation 2"),
    "group-size": (lambda: inverted(group_size=2), "the depthwise convolution has 16 groups for 32 -> 32 channels"),
    "kernel": (lambda: inverted(dw_kernel_size=7), "kernel size 7"),
    "exp-kernel": (lambda: inverted(exp_kernel_size=3), "the expansion is 3x3"),
    "mixed-kernels": (lambda: inverted(dw_kernel_size=[3, 5]), "the depthwise convolution is a MixedConv2d"),
    "mish": (lambda: inverted(act_layer=nn.Mish, se=False), "is Mish"),
    "mish-in-se": (lambda: _with(lambda m: setattr(m.se, "act1", nn.Mish())), "squeeze-excite activation is Mish"),
    "tanh": (lambda: _with(lambda m: setattr(m.se, "gate", nn.Tanh())), "the squeeze-excite gate is Tanh"),
    "eca": (lambda: inverted(se=lambda c, **_: layers.EcaModule(c)), "the squeeze-excite is a timm.layers.eca"),
    "anti-aliasing": (lambda: inverted(aa_layer=layers.BlurPool2d, stride=2), "anti-aliasing"),
    "space-to-depth": (lambda: inverted(s2d=1), "space-to-depth"),
    "group-norm": (
        lambda: inverted(32, 32, norm_layer=layers.GroupNormAct),
        "the norm after the expansion is a GroupNormAct",
    ),
    "frozen-norm": (
        lambda: layers.freeze_batch_norm_2d(inverted()),
        "the norm after the expansion is a FrozenBatchNormAct2d",
    ),
    "sync-norm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(inverted()),
        "is a SyncBatchNorm with a drop that it does not call",
    ),
    "drop-in-norm": (lambda: _with(lambda m: setattr(m.bn1, "drop", nn.Dropout())), "holds a Dropout"),
    "other-drop": (
        lambda: _with(lambda m: setattr(m, "drop_path", nn.Dropout(0.1))),
        "the residual branch is dropped by a Dropout",
    ),
    "new-child": (lambda: _with(lambda m: m.add_module("gamma", nn.Identity())), "an unknown submodule gamma"),
    "lost-child": (lambda: _with(lambda m: delattr(m, "bn2")), "no submodule bn2"),
    "cond-conv": (lambda: blocks.CondConvResidual(8, 8, num_experts=2), "CondConv"),
    "universal-scaled": (lambda: blocks.UniversalInvertedResidual(8, 8), "layer scale (layer_scale)"),
    "universal-end": (lambda: universal(dw_kernel_size_end=3), "a depthwise convolution behind the projection"),
    "universal-no-middle": (lambda: universal(dw_kernel_size_mid=0), "no depthwise convolution behind the expansion"),
    "universal-anti-aliasing": (lambda: universal(12, aa_layer=layers.BlurPool2d, stride=2), "anti-aliasing (BlurPool"),
    "universal-part": (
        lambda: changed_universal(lambda m: setattr(m, "pw_exp", nn.Conv2d(8, 8, 1))),
        "pw_exp is a Conv2d",
    ),
}


@pytest.mark.parametrize("make, reason", UNFUSIBLE.values(), ids=UNFUSIBLE)
def test_unfusible_says_why(make, reason):
    module = make()
    row = explain(fuse(module)).rows[0]
    assert not isinstance(module, FusedBlock)
    assert row.path == "eager" and reason in row.reason


MODELS = {
    "efficientnet_b0": (16, 16, {"drop_path_rate": 0.2}),
    "tf_efficientnet_b0": (16, 16, {}),
    "tf_efficientnet_lite0": (16, 16, {}),
    "mobilenetv2_050": (17, 17, {}),
    "efficientnet_b0_gn": (0, 16, {}),
    "efficientnet_cc_b0_4e": (8, 16, {}),
    "tf_efficientnet_b7": (55, 55, {}),
    "efficientnet_lite4": (30, 30, {}),
    "mnasnet_100": (17, 17, {}),
    "semnasnet_100": (16, 16, {}),
    "efficientnetv2_rw_t": (39, 39, {}),
    "tf_efficientnetv2_s": (40, 40, {}),
    "gc_efficientnetv2_rw_t": (10, 39, {}),
    "mobilenetv3_large_100": (16, 16, {}),
    "mobilenetv4_conv_small": (16, 17, {}),
    "mixnet_s": (1, 16, {}),
    "efficientnet_blur_b0": (12, 16, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_fused(name):
    fused, total, options = MODELS[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3, **options)
    state, parameters = list(model.state_dict()), list(model.parameters())
    explanation = explain(fuse(model))
    assert (explanation.fused, len(explanation)) == (fused, total)
    assert all(row.reason for row in explanation if row.path == "eager")
    assert list(model.state_dict()) == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    types = {type(m) for m in unfuse(model).modules()}
    assert not any(issubclass(t, FusedBlock) for t in types)


def test_dilated_blocks_stay_eager():
    explanation = explain(fuse(timm.create_model("efficientnet_b0", num_classes=3, output_stride=16)))
    reasons = {row.reason for row in explanation if row.path == "eager"}
    assert 0 < explanation.fused < 16 and reasons == {"the depthwise convolution has dilation 2"}


def small_model(pad_type="", act_layer=nn.SiLU):
    """timm's own EfficientNet, small, with every stride and kernel size."""
    stages = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e4_c12_se0.25"], ["ir_r1_k3_s2_e4_c16"]]
    return timm.models.EfficientNet(
        builder.decode_arch_def(stages),
        num_classes=3,
        stem_size=8,
        num_features=16,
        pad_type=pad_type,
        act_layer=act_layer,
        se_layer=blocks.SqueezeExcite,
        drop_path_rate=0.5,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"pad_type": "same", "act_layer": nn.ReLU6}], ids=["silu", "same-relu6"])
def test_model_computes_the_same(options, training, calls):
    model = small_model(**options).double().train(training)
    fused = fuse(copy.deepcopy(model))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert_same(outcome(fused, fused, x), outcome(model, model, x), rtol=1e-6, atol=1e-8)
    assert len(calls) == 4


def test_unfuse_is_bitwise():
    model = timm.create_model("efficientnet_b0", num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    types, before = [type(m) for m in model.modules()], model(x)
    assert torch.equal(unfuse(fuse(model))(x), before)
    assert [type(m) for m in model.modules()] == types


def test_copies_pickle_save_and_ema(calls):
    model = fuse(small_model()).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        average.module,
    ]
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    for twin in copies:
        assert torch.equal(twin.eval()(x), expected)
        assert explain(twin).fused == 4
    assert len(calls) == 4 * 5
    with torch.no_grad():
        model.blocks[1][0].conv_pw.weight.zero_()
    average.update(model)
    assert not torch.equal(average.module.blocks[1][0].conv_pw.weight, copies[0].blocks[1][0].conv_pw.weight)


def test_features_with_hooks_inside_blocks(calls):
    options = {"features_only": True, "out_indices": (1, 2), "feature_location": "expansion"}
    model = timm.create_model("efficientnet_b0", **options).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    rows = explain(fuse(model))
    hooked = [row for row in rows if row.path == "eager"]
    assert hooked and all(row.reason == "a hook on conv_pwl" for row in hooked)
    for ours, theirs in zip(model(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == rows.fused > 0


def test_features_at_the_blocks(calls):
    model = timm.create_model("mobilenetv2_035", features_only=True).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    for ours, theirs in zip(fuse(model)(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert calls


def test_sync_norm_after_fuse(calls):
    model = nn.Sequential(inverted())
    x = torch.randn(2, 8, 8, 8)
    converted = layers.convert_sync_batchnorm(fuse(model)).eval()
    expected = unfuse(copy.deepcopy(converted))(x)
    torch.testing.assert_close(converted(x), expected)
    assert calls and explain(converted).fused == 1


def test_gradient_checkpointing(calls):
    model = small_model()
    model.set_grad_checkpointing()
    fuse(model).train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 2 * 4 and all(p.grad is not None for p in model.parameters())


def test_description_is_no_copy():
    module = inverted()
    block = fusible(module)
    assert isinstance(block, Block)
    assert block.expand_weight is module.conv_pw.weight and block.bn2.running_var is module.bn2.running_var


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [inverted, lambda: inverted(pad_type="same", stride=2, dw_kernel_size=5, act_layer=nn.ReLU6)],
    ids=["residual", "stride-2"],
)
def test_through_the_kernels(make, training, device):
    module = randomised(make()).train(training).to(device)
    assert_kernels_agree(module, torch.randn(2, 8, 6, 5, dtype=torch.float64, device=device))


def test_same_masks_through_the_kernels(device):
    assert_same_masks(inverted(drop_path_rate=0.5).to(device).train(), torch.randn(8, 8, 3, 3, device=device))


def maxvit(out_chs=8, stride=1, drop_path=0.0, **options):
    maxxvit = pytest.importorskip("timm.models.maxxvit", reason="timm has no maxxvit")
    return maxxvit.MbConvBlock(8, out_chs, stride, cfg=maxxvit.MaxxVitConvCfg(**options), drop_path=drop_path)


MAXVIT = {
    "residual": lambda: maxvit(drop_path=0.5),
    "stride-2": lambda: maxvit(12, 2, act_layer="gelu_tanh", padding="same"),
    "pooled": lambda: maxvit(12, 2, stride_mode="pool", pre_norm_act=True, output_bias=False),
    "no-se": lambda: maxvit(attn_layer="", act_layer="silu"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", MAXVIT.values(), ids=MAXVIT)
def test_a_block_among_other_layers(make, training, device):
    """MaxViT's and CoAtNet's: a norm and a pool before it, no norm at its end, and a shortcut of its own."""
    module = randomised(make()).train(training).to(device)
    module.norm1.eval()  # or what comes before it has gradients of rounding alone
    assert explain(fuse(copy.deepcopy(module))).fused == 1
    assert_kernels_agree(module, torch.randn(4, 8, 6, 7, dtype=torch.float64, device=device))


def test_a_block_without_a_last_norm_follows_its_module(device):
    """What stands for the norm is on the module's device, and of its dtype, at each call."""
    block, x = fuse(randomised(maxvit()).eval()).to(device), torch.randn(2, 8, 6, 6, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        block.to(dtype)
        own, image = unfuse(copy.deepcopy(block)), x.to(dtype)
        with backend("triton"), torch.no_grad():
            y = block(image)
        with torch.no_grad():
            assert_parity("y", y, own(image), own.double()(image.double()))


UNFUSIBLE_MAXVIT = {
    "early": (lambda: maxvit(attn_early=True), "squeeze-excite in front of the BatchNorm (se_early)"),
    "stride in the expansion": (lambda: maxvit(12, 2, stride_mode="1x1"), "the expansion is 1x1, stride 2"),
    "eca": (lambda: maxvit(attn_layer="eca"), "the squeeze-excite is a timm.layers.eca"),
    "layer norm": (lambda: maxvit(norm_layer="layernorm2d"), "the norm after the expansion is a LayerNormAct2d"),
}


@pytest.mark.parametrize("make, reason", UNFUSIBLE_MAXVIT.values(), ids=UNFUSIBLE_MAXVIT)
def test_maxvit_that_is_not_fused(make, reason):
    assert explain(fuse(make())).rows[0].reason.startswith(reason)
