import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import library

from fastmbconv import scaling
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.scaling import COEFFICIENTS, Coefficients, compound, cost, count_macs, count_parameters

# As measured on timm, torchvision, efficientnet_pytorch and transformers; multiply-accumulates in G.
PARAMETERS = {
    "b0": 5_288_548,
    "b1": 7_794_184,
    "b2": 9_109_994,
    "b3": 12_233_232,
    "b4": 19_341_616,
    "b5": 30_389_784,
    "b6": 43_040_704,
    "b7": 66_347_960,
    "b8": 87_413_142,
    "l2": 480_309_308,
    "lite0": 4_652_008,
    "lite1": 5_416_680,
    "lite2": 6_092_072,
    "lite3": 8_197_096,
    "lite4": 13_006_568,
}
GMACS = {
    "b0": 0.386,
    "b1": 0.687,
    "b2": 0.994,
    "b3": 1.827,
    "b4": 4.394,
    "b5": 10.266,
    "b6": 19.068,
    "b7": 37.746,
    "b8": 62.6,
    "l2": 475.7,
}


@pytest.mark.parametrize("variant", COEFFICIENTS)
def test_parameters_are_the_published_ones(variant):
    coefficients = COEFFICIENTS[variant]
    with torch.device("meta"):
        model = EfficientNet(coefficients)
    assert count_parameters(model) == count_parameters(coefficients) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", GMACS)
def test_macs_are_the_published_ones(variant):
    assert count_macs(COEFFICIENTS[variant]) / 1e9 == pytest.approx(GMACS[variant], rel=5e-3)


@pytest.mark.parametrize(
    ("coefficients", "family", "size"),
    [
        pytest.param(COEFFICIENTS["b0"], "torch", (65, 73), id="b0"),
        pytest.param(COEFFICIENTS["lite4"], "tf", (225, 31), id="lite4"),
        pytest.param(compound(-0.7), "tf", 47, id="phi-0.7"),
    ],
)
def test_arithmetic_counts_what_the_model_runs(coefficients, family, size):
    with torch.device("meta"):
        model = EfficientNet(coefficients, family=family)
    assert count_macs(model, size) == count_macs(coefficients, size)


@pytest.mark.parametrize(
    ("coefficients", "size", "num_classes", "in_chans"),
    [
        pytest.param(COEFFICIENTS["b3"], (97, 64), 10, 1, id="b3"),
        pytest.param(COEFFICIENTS["lite4"], (33, 47), 1000, 3, id="lite4"),
        pytest.param(compound(-1.3, 1.3, 1.05, 1.2), (40, 40), 0, 4, id="no-classifier"),
    ],
)
def test_cost_is_that_of_the_model(coefficients, size, num_classes, in_chans):
    with torch.device("meta"):
        model = EfficientNet(coefficients, num_classes=num_classes, in_chans=in_chans).eval()
        rows = [model.stem, *model.stages, model.head, *([model.classifier] if num_classes else [])]
        written = dict.fromkeys(rows, 0)
        for row in rows:
            for layer in row.modules():
                if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):

                    def add(layer, x, y, row=row):
                        written[row] += y.numel()

                    layer.register_forward_hook(add)
        model(torch.empty(1, in_chans, *size))
    found = cost(coefficients, size, num_classes, in_chans)
    assert [r.parameters for r in found.rows] == [count_parameters(row) for row in rows]
    assert [r.activations for r in found.rows] == list(written.values())
    assert [r.repeats for r in found.rows[1:8]] == [len(stage) for stage in model.stages]
    assert (found.parameters, found.macs) == (count_parameters(model), count_macs(model, size))


@pytest.mark.parametrize(("variant", "millions"), [("b0", 6.75), ("b1", 10.88), ("lite2", 12.9)])
def test_activations_are_those_that_others_count(variant, millions):
    """Source: fvcore's count in timm's results/benchmark-infer-fp32-nchw-pt240-cpu-i7_12700h-dynamo.csv."""
    assert cost(COEFFICIENTS[variant]).activations / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_huge_network_costs_no_time():
    assert cost(compound(200)).macs > 2.0**180 * cost(COEFFICIENTS["b0"]).macs


def test_counting_leaves_the_model_alone():
    model = EfficientNet(COEFFICIENTS["lite0"]).train()
    model.stages[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    count_macs(model, 33)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_macs_of_another_librarys_model():
    model = library("timm").create_model("efficientnet_b0")
    assert count_macs(model, 224) == count_macs(COEFFICIENTS["b0"])


def test_flops_grow_with_depth_and_with_the_squares_of_width_and_resolution():
    base = count_macs(COEFFICIENTS["b0"])

    def growth(width=1.0, depth=1.0, resolution=224):
        return count_macs(Coefficients(width, depth, resolution, 0.2)) / base

    assert growth(depth=2) == pytest.approx(2, rel=0.02)
    assert growth(width=2) == pytest.approx(4, rel=0.07)  # depthwise convolutions grow with the width itself
    assert growth(resolution=448) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("filters", "width", "expected"),
    [(32, 1.0, 32), (40, 1.4, 56), (16, 1.2, 24), (320, 4.3, 1376), (32, 0.01, 8), (80, 1.1, 88)],
)
def test_round_filters(filters, width, expected):
    assert scaling.round_filters(filters, width) == expected


@given(filters=st.integers(1, 4096), width=st.floats(0.01, 10))
@settings(max_examples=100, deadline=None)
def test_round_filters_never_loses_a_tenth(filters, width):
    rounded = scaling.round_filters(filters, width)
    assert rounded % 8 == 0
    assert rounded >= max(8, 0.9 * filters * width)
    assert rounded <= max(8, filters * width + 8)


@pytest.mark.parametrize(("depth", "expected"), [(1.0, 3), (1.1, 4), (2.6, 8), (0.1, 1)])
def test_round_repeats(depth, expected):
    assert scaling.round_repeats(3, depth) == expected


@pytest.mark.parametrize(
    ("variant", "repeats", "channels", "outer"),
    [
        ("b3", (2, 3, 3, 5, 5, 6, 2), (24, 32, 48, 96, 136, 232, 384), (40, 1536)),
        ("b7", (4, 7, 7, 10, 10, 13, 4), (32, 48, 80, 160, 224, 384, 640), (64, 2560)),
        ("lite4", (1, 4, 4, 6, 6, 8, 1), (24, 32, 56, 112, 160, 272, 448), (32, 1280)),
    ],
)
def test_plan(variant, repeats, channels, outer):
    plan = scaling.plan(COEFFICIENTS[variant])
    assert tuple(stage.repeats for stage in plan.stages) == repeats
    assert tuple(stage.channels for stage in plan.stages) == channels
    assert (plan.stem, plan.head) == outer


def test_compound_follows_the_formula():
    assert compound(0) == COEFFICIENTS["b0"]
    two = compound(2)
    assert (two.depth, two.width, two.resolution) == (pytest.approx(1.44), pytest.approx(1.21), 296)
    assert compound(7).dropout == compound(9).dropout == 0.5
    other = compound(1.5, alpha=1.3, beta=1.0, gamma=1.2)
    assert (other.depth, other.width, other.resolution) == (1.3**1.5, 1.0, round(224 * 1.2**1.5))


@given(phi=st.floats(-20, 20))
@settings(max_examples=50, deadline=None)
def test_any_real_phi_makes_a_network(phi):
    coefficients = compound(phi)
    assert count_macs(coefficients) > 0
    assert all(stage.repeats >= 1 for stage in scaling.plan(coefficients).stages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phi": math.nan}, "phi is nan: allowed are finite"),
        ({"phi": math.inf}, "phi is inf: allowed are finite"),
        ({"phi": 1e6}, "phi is 1000000.0: too large"),
        ({"phi": -1e6}, "phi is -1000000.0: too small"),
        ({"phi": 1, "alpha": 0.9}, "alpha is 0.9: allowed are finite numbers >= 1"),
        ({"phi": 1, "gamma": math.inf}, "gamma is inf"),
    ],
)
def test_compound_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        compound(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 224, 0.2), "width is 0.0"),
        ((1.0, math.nan, 224, 0.2), "depth is nan"),
        ((1.0, 1.0, 0, 0.2), "resolution is 0"),
        ((1.0, 1.0, 224, 1.0), "dropout is 1.0"),
    ],
)
def test_coefficients_reject(arguments, message):
    with pytest.raises(ValueError, match=message):
        Coefficients(*arguments)


def test_count_macs_rejects():
    with pytest.raises(ValueError, match="resolution is None and Conv2d has none"):
        count_macs(torch.nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match="resolution is 0"):
        count_macs(COEFFICIENTS["b0"], 0)
    with pytest.raises(ValueError, match="num_classes is -1: allowed are whole numbers >= 0"):
        cost(COEFFICIENTS["b0"], num_classes=-1)
    with pytest.raises(ValueError, match="in_chans is 0: allowed are whole numbers >= 1"):
        cost(COEFFICIENTS["b0"], in_chans=0)
    with pytest.raises(ValueError, match="no Conv2d"):
        count_macs(torch.nn.Linear(3, 8), 4)
