"""The traffic report: what launchers state is what their launches are given, and it stays at the design's figures."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import subjects
from benchmarks.launches import caught
from benchmarks.registry import DENSE, Shape
from benchmarks.traffic import dense_row
from fastmbconv.kernels.traffic import recorded, state

ROOT = Path(__file__).resolve().parents[1]
PASSES, SLICED, LATE = 14.7, 15.7, 28  # large images; in slices of the expansion; small ones, by library products
SAVED, SAVED_LEAN, INFERENCE = 2.4, 1.4, 4.6
SMALLEST = 0.15  # of few pixels, whose sums and rounded weight are kept beside them
PASSES_LEAN = 13.1


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Every block of B0 to B7 and of Lite, with a GPU's tile sizes."""
    path = tmp_path_factory.mktemp("traffic") / "report.json"
    command = [sys.executable, "-m", "benchmarks.traffic", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, timeout=300)
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())


def fused(row):
    return row["fused"]["forward"] + row["fused"]["backward"]


def elements(shape):
    return shape["batch"] * shape["size"] ** 2 * shape["in_channels"] * shape["expand_ratio"]


def beyond(report, figure, limit, least=40):
    rows = [row for row in report if row["standard"]]
    assert len(rows) > least
    return [f"{row['name']}: {figure(row):.2f}" for row in rows if figure(row) > limit]


def is_large(row):
    return row["shape"]["size"] >= 28 and row["shape"]["in_channels"] <= 64


def is_sliced(row):
    return is_large(row) and row["shape"]["in_channels"] > 32


def test_activations_move_at_most_the_design_s_passes(report):
    def activations(row):
        return fused(row) - row["rest"]

    kinds = [
        ([row for row in report if is_large(row) and not is_sliced(row)], PASSES),
        ([row for row in report if is_sliced(row)], SLICED),
        ([row for row in report if not is_large(row)], LATE),
    ]
    for rows, limit in kinds:
        assert not beyond(rows, activations, limit, least=3)


def test_a_model_s_blocks_move_at_most_half_of_eager_s_with_everything(report):
    """Weights and partial sums too, which eager's count leaves out."""
    for model in {row["shape"]["model"] for row in report}:
        mine = [row for row in report if row["shape"]["model"] == model]
        weights = [row["shape"]["count"] * elements(row["shape"]) for row in mine]

        def together(figure, mine=mine, weights=weights):
            return sum(figure(row) * weight for row, weight in zip(mine, weights, strict=True)) / sum(weights)

        assert together(fused) <= together(lambda row: row["eager"]["forward"] + row["eager"]["backward"]) / 2, model


@pytest.mark.parametrize(("low", "high", "limit"), [(56, 1000, 1.15), (24, 56, 1.5), (1, 24, 5.2)])
def test_what_is_no_activation_stays_small(report, low, high, limit):
    """Partial sums of weight gradients and of the pool above all; below 24 px a block's tensors fit an L2 cache."""
    chosen = [row for row in report if low <= row["shape"]["size"] < high]
    assert len(chosen) > 5
    assert not beyond(chosen, lambda row: row["rest"], limit, least=1)


def test_saved_for_backward(report):
    assert not beyond(report, lambda row: row["fused"]["saved"] - SMALLEST * (row["shape"]["size"] < 20), SAVED)


def inferred(row):
    return row["inference"]["fused"]


def inferred_counting_all_above_20_px(row):
    """Below, weights in fp32 and sums are no longer small beside an image's activations."""
    return inferred(row) - row["inference"]["rest"] * (row["shape"]["size"] <= 20)


def test_inference_moves_at_most_the_design_s_passes(report):
    assert not beyond(report, inferred_counting_all_above_20_px, INFERENCE)
    for row in report:
        launches = [one["kernel"] for one in row["launches"] if one["phase"] == "inference"]
        rest = ("copy", "excite_expand")  # a long weight's, rounded; the second half of a wide block's excite
        assert sum(kernel not in rest for kernel in launches) <= 4, row["name"]


def test_inference_moves_less_than_eager_with_folded_batch_norms(report):
    for row in report:
        if row["standard"]:
            assert row["inference"]["eager"] == pytest.approx(16 + 1 / 6)
            assert row["inference"]["folded"] == pytest.approx(11 + 5 / 6)
        activations = inferred(row) - row["inference"]["rest"]
        assert activations == pytest.approx(row["inference"]["modelled"], rel=0.02), row["name"]
        assert inferred(row) < row["inference"]["folded"], row["name"]


@pytest.mark.parametrize("shape", DENSE, ids=lambda shape: shape.name)
def test_behind_a_dense_convolution_launchers_and_model_agree(shape):
    row = dense_row(replace(shape, batch=1))
    assert row.training == pytest.approx(row.count.fused_training / row.elements)
    assert row.inference == pytest.approx(row.count.fused_inference / row.elements)
    assert row.inference + row.rest < 0.72 * row.count.eager_inference_folded / row.elements


def test_lean_keeps_no_expanded_tensor_before_the_walk(report):
    assert not beyond(report, lambda row: row["lean"]["saved"] - SMALLEST * (row["shape"]["size"] < 20), SAVED_LEAN)


def test_lean_moves_less_where_the_walk_computes_the_expansion(report):
    walked = [row for row in report if row["shape"]["kernel_size"] == 3 and row["shape"]["in_channels"] <= 64]
    assert not beyond(walked, lambda row: row["lean"]["forward"] + row["lean"]["backward"], PASSES_LEAN, least=5)


def test_launchers_and_model_agree(report):
    for row in report:
        assert fused(row) - row["rest"] == pytest.approx(row["modelled"], rel=0.02), row["name"]


def test_eager_is_what_the_design_derives(report):
    plain = [row for row in report if row["standard"]]
    for row in plain:
        assert row["eager"]["forward"] + row["eager"]["backward"] == pytest.approx(54 + 1 / 3)
        assert 7.33 < row["eager"]["saved"] < 7.39


def test_roofline_page(tmp_path):
    page, simulated = tmp_path / "ROOFLINE.md", tmp_path / "simulated.json"
    block = dict(gpu="H200", shape="b0.6 n128 7px 192-1152-192 k5s1")
    parts = {"forward": 100.0, "backward": 200.0, "inference": 1000.0}
    rows = [block | dict(phase=phase, us=us) for phase, us in parts.items()]
    simulated.write_text(json.dumps({"simulated": True, "rows": rows}))
    command = [sys.executable, "-m", "benchmarks.roofline", "--model", "b0", "--gpu", "h200"]
    command += ["--simulated", str(simulated), "--write", str(page)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "| b0" in line]
    assert len(rows) == 13
    for name, _, *cells in rows:
        eager, *ceilings, floor = map(float, cells[:5])
        assert floor >= max(ceilings) - 1  # rounded
        assert float(cells[5].removesuffix("x")) == pytest.approx(eager / floor, rel=0.02)
        if name == block["shape"]:  # forward and backward, of one block
            assert float(cells[6]) == 300 and float(cells[7].removesuffix("x")) == pytest.approx(300 / floor, rel=0.02)
        else:
            assert cells[6:] == ["-", "-"]


MAKES = {"mbconv": subjects.mbconv, "depthwise": subjects.depthwise, "dense": subjects.fused_mbconv_excited}
KINDS = [
    Shape("residual", 0, 2, 6, 8, 8, 2, 3, 1),
    Shape("stride", 0, 2, 7, 8, 16, 2, 5, 2),
    Shape("narrow", 0, 2, 6, 8, 8, 1, 3, 1),
    Shape("lite", 0, 2, 6, 8, 16, 2, 3, 1, se=False),
]


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("shape", KINDS, ids=lambda shape: shape.model)
def test_launchers_state_what_their_launches_are_given(make, shape):
    given = []

    def seen(kernel, grid, arguments):
        tensors = [t for t in arguments.values() if torch.is_tensor(t) and t.is_floating_point()]
        given.append((kernel.__name__.removeprefix("_").removesuffix("_kernel"), Counter(t.nbytes for t in tensors)))

    subject = make(shape)
    module = subject.make()
    with caught(seen), recorded() as launches:
        y = module(torch.randn(subject.size).requires_grad_())
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            module.eval()(torch.randn(subject.size))
    stated = [one for one in launches if one.kernel not in ("sum", "mm", "copy")]  # those are torch's
    assert [one.kernel for one in stated] == [name for name, _ in given]
    for one, (name, tensors) in zip(stated, given, strict=True):
        said = Counter(moved.size for moved in (*one.reads, *one.writes))
        assert not tensors - said, name
        assert name == "bn_finalize" or not said - tensors, name  # running statistics move in place: read and written


def test_a_recorder_keeps_its_own_launches():
    x = torch.empty(3, 2)
    state("before", (x,), (x,))
    with recorded() as outer:
        state("first", (x, None), ((x, 8),))
        with recorded() as inner:
            state("second", (), (x,))
    state("after", (x,), ())
    assert [one.kernel for one in outer] == ["first"]
    assert [one.kernel for one in inner] == ["second"]
    assert [[m.size for m in side] for side in (outer[0].reads, outer[0].writes)] == [[24], [8]]
