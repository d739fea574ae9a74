"""Backbones that give the features of several stages, through the swap: timm's `features_only` in all its forms."""

import pytest
import torch
from libraries import library

from fastmbconv import explain, fuse, unfuse

timm = library("timm")
pytest.importorskip("timm.models._features", reason="timm has no _features")

BACKBONES = {
    "efficientnet": ("efficientnet_b0", {}, 16),
    "fewer-stages": ("tf_efficientnet_b0", {"out_indices": (1, 2)}, 16),
    "lite": ("efficientnet_lite0", {"out_indices": (-1,)}, 16),
    "hooks-on-the-blocks": ("efficientnet_b0", {"feature_cls": "hook"}, 16),
    "getter": ("efficientnet_b0", {"feature_cls": "getter", "out_indices": (0, 1, 2)}, 5),
    "mobilenetv2": ("mobilenetv2_050", {}, 17),
}


@pytest.mark.parametrize("name, options, fused", BACKBONES.values(), ids=BACKBONES)
def test_features_are_unaffected(name, options, fused, calls):
    model = timm.create_model(name, features_only=True, **options).eval()
    x = torch.randn(1, 3, 32, 32)
    channels, before = model.feature_info.channels(), model(x)
    state = list(model.state_dict())
    assert explain(fuse(model)).fused == fused
    after = model(x)
    assert len(after) == len(before) and calls
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert list(model.state_dict()) == state and model.feature_info.channels() == channels
    assert all(torch.equal(a, b) for a, b in zip(unfuse(model)(x), before, strict=True))


def test_gradients_reach_every_stage(calls):
    model = fuse(timm.create_model("efficientnet_b0", features_only=True).train())
    sum(feature.square().mean() for feature in model(torch.randn(2, 3, 32, 32))).backward()
    assert calls and all(p.grad is not None for p in model.parameters())


def test_hook_on_a_block(calls):
    model = fuse(timm.create_model("efficientnet_b0", features_only=True)).eval()
    seen = {}
    block = model.blocks[1][0]
    block.register_forward_hook(lambda module, args, output: seen.update(output=output))
    features = model(torch.randn(1, 3, 32, 32))
    assert seen["output"].shape == (1, 24, 8, 8) and len(features) == 5 and len(calls) == 16


def test_traced_features_have_no_blocks_left(calls):
    """fx took the blocks apart before the swap came: it finds none, and says nothing of them."""
    model = timm.create_model("efficientnet_b0", features_only=True, feature_cls="fx", out_indices=(0, 1)).eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    assert explain(fuse(model)).fused == 0
    assert all(torch.equal(a, b) for a, b in zip(model(x), before, strict=True)) and not calls


def test_intermediates(calls):
    model = timm.create_model("efficientnet_b0", num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    before = model.forward_intermediates(x, intermediates_only=True)
    after = fuse(model).forward_intermediates(x, intermediates_only=True)
    assert len(calls) == 16
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs)
