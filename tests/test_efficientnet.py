import math

import pytest
import torch

from fastmbconv import efficientnet as family
from fastmbconv.efficientnet import EfficientNet, efficientnet, efficientnet_b0, efficientnet_lite0
from fastmbconv.mbconv import MBConv
from fastmbconv.scaling import COEFFICIENTS, Coefficients

TINY = Coefficients(width=0.25, depth=0.5, resolution=32, dropout=0.2)


def rates(model):
    return [block.drop_path.rate for block in model.modules() if isinstance(block, MBConv)]


def settings(model):
    """What tells families apart: (paddings, eps, momenta) in use."""
    bns = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    blocks = [m for m in model.modules() if isinstance(m, MBConv)]
    return {b.padding for b in blocks}, {b.eps for b in bns}, {b.momentum for b in bns}


@pytest.mark.parametrize("variant", COEFFICIENTS)
def test_each_variant_has_a_function(variant):
    with torch.device("meta"):
        by_function = getattr(family, f"efficientnet_{variant}")(num_classes=7)
        by_name = efficientnet(f"efficientnet_{variant}", num_classes=7)
    assert by_function.coefficients == by_name.coefficients == COEFFICIENTS[variant]
    assert by_function.resolution == COEFFICIENTS[variant].resolution
    assert by_function.dropout.p == COEFFICIENTS[variant].dropout
    assert by_function.classifier.out_features == 7


def test_stochastic_depth_grows_linearly():
    model = EfficientNet()
    assert rates(model) == pytest.approx([0.0125 * i for i in range(16)])
    assert rates(EfficientNet(drop_path=0.0)) == [0.0] * 16
    deeper = rates(efficientnet("b2", drop_path=0.23))
    assert deeper == pytest.approx([0.23 * i / 23 for i in range(23)])


def test_families():
    with torch.device("meta"):
        assert settings(efficientnet_b0()) == ({1, 2}, {1e-5}, {0.1})
        assert settings(efficientnet_b0(family="tf")) == ({"same"}, {1e-3}, {0.01})
        assert settings(efficientnet_lite0()) == ({"same"}, {1e-3}, {0.01})
        assert settings(efficientnet_lite0(family="torch")) == ({1, 2}, {1e-5}, {0.1})
        assert settings(efficientnet_b0(eps=2e-3, momentum=0.05)) == ({1, 2}, {2e-3}, {0.05})


def test_lite_has_no_squeeze_excitation_and_relu6():
    with torch.device("meta"):
        model = efficientnet_lite0()
    assert all(block.se is None for block in model.modules() if isinstance(block, MBConv))
    assert not any(isinstance(m, torch.nn.SiLU) for m in model.modules())


def test_initial_weights():
    model = efficientnet_b0(num_classes=100)
    head, block = model.head.conv.weight, model.stages[5][1]
    assert head.std().item() == pytest.approx(math.sqrt(2 / 1280), rel=0.02)
    assert block.depthwise_conv.weight.std().item() == pytest.approx(math.sqrt(2 / 25), rel=0.02)
    assert model.classifier.weight.abs().max() <= 0.1
    assert model.classifier.weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
    assert not model.classifier.bias.any()
    assert not block.se.expand.bias.any()


@pytest.mark.parametrize("phi", [-1.5, 0.3])
def test_any_phi_runs(phi):
    model = EfficientNet.scaled(phi=phi, num_classes=3).eval()
    assert model.resolution == round(224 * 1.15**phi)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 33)).shape == (1, 3)


@pytest.mark.parametrize("numerics", ["torch", "tf"])
def test_shapes_at_an_odd_resolution(numerics):
    model = EfficientNet(TINY, family=numerics, in_chans=2, num_classes=5).eval()
    x = torch.randn(2, 2, 65, 73)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 3, 3)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model(x).shape == (2, 5)


def test_features_only():
    model = efficientnet_b0(features_only=True).eval()
    assert [f.channels for f in model.feature_info] == [16, 24, 40, 112, 320]
    assert [f.reduction for f in model.feature_info] == [2, 4, 8, 16, 32]
    assert [f.name for f in model.feature_info] == ["stages.0", "stages.1", "stages.2", "stages.4", "stages.6"]
    assert not any(name.startswith(("head", "classifier")) for name, _ in model.named_parameters())
    height, width = 65, 73
    with torch.no_grad():
        maps = model(torch.randn(1, 3, height, width))
    for feature, value in zip(model.feature_info, maps, strict=True):
        expected = (1, feature.channels, -(-height // feature.reduction), -(-width // feature.reduction))
        assert value.shape == expected


def test_out_indices_prune_what_they_do_not_need():
    model = EfficientNet(TINY, features_only=True, out_indices=(3, 1, -2)).eval()
    assert [f.reduction for f in model.feature_info] == [4, 16]
    assert len(model.stages) == 5
    whole = EfficientNet(TINY).eval()
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
    x = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(model(x), (whole.forward_stages(x)[i] for i in (1, 3)), strict=True):
        assert torch.equal(ours, theirs)


def test_reset_classifier():
    model = EfficientNet(TINY, num_classes=5).double().eval()
    model.reset_classifier(7)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert model(x).shape == (1, 7)
    assert not model.classifier.training
    assert model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_features(x).mean((2, 3)))


def training_step(checkpointing, frozen=False):
    torch.manual_seed(1)
    model = EfficientNet(TINY, num_classes=4, drop_path=0.5).train()
    if frozen:
        model.stages[1].eval()
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(2)
    x = torch.randn(3, 3, 40, 36, requires_grad=True)
    model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    return gradients, {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("frozen", [False, True], ids=["train", "partly-frozen"])
def test_checkpointing_changes_nothing_and_counts_statistics_once(frozen):
    gradients, buffers = training_step(False, frozen)
    again, counted = training_step(True, frozen)
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name
    for name, buffer in buffers.items():
        assert torch.equal(counted[name], buffer), name
    assert counted["stem.bn.num_batches_tracked"] == counted["stages.3.0.expand_bn.num_batches_tracked"] == 1


def test_checkpointing_saves_memory():
    def saved(checkpointing):
        model = EfficientNet(TINY, num_classes=4).train()
        model.set_grad_checkpointing(checkpointing)
        elements = 0

        def pack(tensor):
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(2, 3, 64, 64))
        return elements

    assert saved(True) < 0.5 * saved(False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes is -1: allowed are whole numbers >= 0"),
        ({"in_chans": 0}, "in_chans is 0: allowed are whole numbers >= 1"),
        ({"family": "keras"}, "family is 'keras': allowed are torch, tf"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"drop_path": -0.1}, "drop_path is -0.1"),
        ({"out_indices": (1,)}, "needs features_only=True"),
        ({"features_only": True, "out_indices": (5,)}, r"out_indices is \(5,\): allowed are numbers from -5 to 4"),
        ({"features_only": True, "out_indices": ()}, "at least one"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        EfficientNet(TINY, **options)


def test_bad_calls():
    with pytest.raises(ValueError, match="name is 'b9': allowed are b0"):
        efficientnet("b9")
    with pytest.raises(ValueError, match="phi is nan"):
        EfficientNet.scaled(phi=math.nan)
    model = EfficientNet(TINY)
    with pytest.raises(ValueError, match=r"x has the shape \(1, 4, 32, 32\): allowed is \[N, 3, H, W\]"):
        model(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match="num_classes is -2"):
        model.reset_classifier(-2)
    with pytest.raises(ValueError, match="features_only has no classifier"):
        EfficientNet(TINY, features_only=True).reset_classifier(3)
