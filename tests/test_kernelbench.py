"""KernelBench's models: their structure, that they run, and that their benchmark and their count do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import subjects
from benchmarks.comparison import Comparison, Plan, compare
from benchmarks.kernelbench import PROBLEMS
from benchmarks.subjects import TRAINING_FORWARD
from benchmarks.traffic import kernelbench_table

ROOT = Path(__file__).resolve().parents[1]
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def depthwise(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]


def test_the_six_problems():
    counts = {p.number: (p.name, p.depthwise, p.blocks) for p in PROBLEMS.values()}
    assert counts == {
        19: ("MobileNetV1", 13, 13), 20: ("MobileNetV2", 17, 17), 21: ("EfficientNetMBConv", 1, 1),
        22: ("EfficientNetB0", 13, 13), 23: ("EfficientNetB1", 7, 7), 24: ("EfficientNetB2", 5, 0),
    }  # fmt: skip
    assert [p.shape[0] for p in PROBLEMS.values()] == [10, 10, 10, 10, 10, 2]


@every_problem
def test_a_model_on_its_own_shape(problem):
    """On meta tensors: nothing is computed."""
    with torch.device("meta"):
        model, x = problem.make(), torch.empty(problem.shape)
    assert model.training and len(depthwise(model)) == problem.depthwise
    expected = (10, 192, 112, 112) if problem.expanded else (problem.shape[0], 1000)
    assert model(x).shape == expected
    if problem.expanded:
        (conv,) = depthwise(model)
        assert problem.expanded == conv.in_channels * x.numel() // x.shape[1]


@every_problem
def test_a_tiny_one_runs(problem):
    tiny = problem.tiny()
    model = tiny.make()
    assert len(depthwise(model)) == problem.depthwise
    with torch.no_grad():
        for training in (True, False):
            y = model.train(training)(torch.randn(tiny.shape))
            assert y.shape[0] == tiny.shape[0] and y.isfinite().all()


def test_b2_s_gate_multiplies_nothing():
    tiny = PROBLEMS["EfficientNetB2"].tiny()
    model, sizes = tiny.make(), []
    for number in range(1, 6):
        getattr(model, f"mbconv{number}").register_forward_hook(lambda _, __, y: sizes.append(y.shape[2:]))
    model(torch.randn(tiny.shape))
    assert sizes == [(1, 1)] * 5


def test_nothing_of_b2_is_fused():
    assert PROBLEMS["EfficientNetB2"].explained().fused == 0


def test_the_count_has_a_line_for_each_problem():
    lines = kernelbench_table().splitlines()[1:]
    assert [line.split()[1] for line in lines] == list(PROBLEMS)
    assert lines[-1].split("|")[0].split()[-3:] == ["-", "-", "-"]


@pytest.mark.interpreter
@pytest.mark.slow
def test_a_forward_in_training_mode_is_gated_with_its_statistics():
    row = compare(
        subjects.tiny_model(), TRAINING_FORWARD, Plan("cpu", torch.float32, ("eager-nchw",), 1, interpreted=True)
    )
    assert "error" not in row and row["mode"] == TRAINING_FORWARD
    assert {name.rpartition(".")[2] for name in row["errors"]["fastmbconv"]} == {"y", "running_mean", "running_var"}


def test_a_forward_in_training_mode_wants_no_gradient():
    compared = Comparison(subjects.tiny_model(), TRAINING_FORWARD, Plan("cpu", torch.float32, interpreted=True))
    made = compared.candidate(torch.channels_last, lambda m: m.forward_eager)
    outputs = made.outputs()
    assert made.module.training and list(outputs) == ["y"] and not outputs["y"].requires_grad


@pytest.mark.interpreter
@pytest.mark.slow
def test_pytest_benchmark_tabulates_a_dry_run():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    chosen = "EfficientNetMBConv and fwd_training"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_kernelbench.py"]
    done = subprocess.run(
        [*command, "--dry", "-k", chosen, "-rs"], cwd=ROOT, env=inherited | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
