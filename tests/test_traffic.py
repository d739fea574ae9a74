"""The traffic count against the passes that the design derives, in units of the expanded tensor."""

import dataclasses

import pytest
import torch
from wide_blocks import ALL_BIASES, WideRow, build_wide, wide

import fastmbconv
from benchmarks.launches import caught
from fastmbconv import functional
from fastmbconv.kernels.traffic import recorded
from fastmbconv.mbconv import MBConv
from fastmbconv.traffic import Sizes, count


def passes(block, shape):
    sizes = Sizes.of(block.describe(), shape)
    traffic = count(sizes)
    return [
        getattr(traffic, name) / sizes.u1
        for name in (
            "eager_inference",
            "eager_inference_folded",
            "eager_training",
            "fused_inference",
            "fused_training",
        )  # fmt: skip
    ]


def test_a_block_with_residual_and_squeeze_excite():
    found = passes(MBConv(24, 24, 3), (2, 24, 24, 24))
    assert found == pytest.approx([16 + 1 / 6, 11 + 5 / 6, 54 + 1 / 3, 4.5, 14.5])
    assert passes(MBConv(24, 24, 3), (2, 24, 8, 8))[4] == pytest.approx(19.5)  # products by the library
    assert passes(MBConv(40, 40, 3), (2, 40, 24, 24))[4] == pytest.approx(15)  # the expansion in two slices
    assert passes(MBConv(80, 80, 3), (2, 80, 24, 24))[4] == pytest.approx(23 + 5 / 6)
    assert passes(MBConv(24, 24, 3), (16, 24, 8, 8))[3] == pytest.approx(2.5)  # expansion inside the walk


def test_sizes_follow_the_block():
    for padding, stride, out in ((None, 2, 4), ("same", 2, 4), (None, 1, 7)):
        block = MBConv(4, 6, 5, stride, padding=padding)
        sizes = Sizes.of(block.describe(), (3, 4, 7, 7))
        y = block.forward_eager(torch.zeros(3, 4, 7, 7))
        assert y.shape[2] == out
        assert (sizes.x, sizes.u1, sizes.u2, sizes.u3) == (3 * 4 * 49, 3 * 24 * 49, 3 * 24 * out**2, y.numel())


def test_fused_moves_less_in_every_kind_of_block():
    for block in (MBConv(8, 8), MBConv(8, 8, se_ratio=0), MBConv(8, 12, 5, 2), MBConv(8, 4, expand_ratio=1)):
        traffic = count(Sizes.of(block.describe(), (1, 8, 14, 14)))
        assert traffic.fused_inference < traffic.eager_inference
        assert traffic.fused_training < traffic.eager_training


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"shape is \(1, 3, 8, 8\): this block takes 8 channels"):
        Sizes.of(MBConv(8, 8).describe(), (1, 3, 8, 8))


KINDS = {
    "start": wide(24, "relu", "relu", "none", se=None, start=(5, 1)),
    "start-strided": wide(24, "relu", "relu", "none", se=None, start=(3, 2)),
    "activation-at-the-end": wide(24, "relu6", "none", "silu"),
    "no-expansion": wide(24, "none", "none", "silu", expand_ratio=1, start=(3, 1)),
    "biases": wide(24, "gelu", "gelu", "none", biases=ALL_BIASES),
}


@pytest.mark.parametrize("row", [pytest.param(WideRow(kind, (2, 24, 24, 24)), id=name) for name, kind in KINDS.items()])
def test_launchers_and_model_agree(row):
    """Images alone; autograd's own sum of a branch and a shortcut behind a start is no launcher's."""
    module, x, dy = build_wide(row, torch.bfloat16)
    sizes = Sizes.of(module.describe(), row.image)
    with caught(lambda *_: None), fastmbconv.backend("triton"):
        with recorded() as training:
            functional.mbconv(x.requires_grad_(), module.describe()).backward(dy)
        with recorded() as inference, torch.no_grad():
            functional.mbconv(x, module.eval().describe())
    added = 3 * sizes.x if sizes.start and sizes.residual else 0
    assert images(training) == count(sizes).fused_training - added
    assert images(inference) == count(dataclasses.replace(sizes, inside=sizes.expand)).fused_inference


def images(launches):
    moved = [m for launch in launches for m in (*launch.reads, *launch.writes)]
    return sum(m.size for m in moved if len(m.shape) == 4 and m.dtype == torch.bfloat16 and m.shape[0] == 2) // 2


def test_activations_count_where_they_are():
    """Of the eager block: two passes forward and three backward of each tensor that has one."""

    def eager(*activations):
        row = WideRow(wide(24, *activations, se=None), (2, 24, 24, 24))
        sizes = Sizes.of(build_wide(row)[0].describe(), row.image)
        return sizes, count(sizes).eager_inference, count(sizes).eager_training

    sizes, forward, training = eager("none", "none", "none")
    each = (sizes.u1, sizes.u2, sizes.u3)
    for i, elements in enumerate(each):
        _, more, both = eager(*("silu" if i == j else "none" for j in range(3)))
        assert (more - forward, both - training) == (2 * elements, 5 * elements)
