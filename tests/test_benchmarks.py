"""The benchmarks' own steps at tiny sizes on a CPU: they run, gate, record and refuse; nothing here is a timing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import registry, step_profile, subjects
from benchmarks.comparison import Comparison, Plan
from benchmarks.record import read
from fastmbconv import functional, parity
from fastmbconv.device_timer import DeviceTimer
from fastmbconv.kernels import launching, traffic

ROOT = Path(__file__).resolve().parents[1]


def _python(*args, **environment):
    # pytest-benchmark goes silent where it takes itself for a worker of pytest-xdist.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    env = inherited | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def _pytest(*args):
    return _python("-m", "pytest", "-q", "-p", "no:cacheprovider", *args)


def test_every_bench_file_collects():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    files = sorted(str(f) for f in (ROOT / "benchmarks").glob("bench_*.py"))
    done = _pytest("--collect-only", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"bench_{name}.py" in done.stdout for name in ("mbconv", "depthwise", "squeeze_excite"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_to_time_a_cpu():
    done = _python("-m", "benchmarks.gpu")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr and "make gpu-rehearsal" in done.stderr


@pytest.mark.interpreter
@pytest.mark.slow
def test_pytest_benchmark_tabulates_a_dry_run():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    done = _pytest("benchmarks/bench_squeeze_excite.py", "--dry", "-k", "b0.2-n128-56 and fwd_no_grad")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreted, not a measurement" in done.stdout
    assert "3 passed" in done.stdout  # ours and eager in two memory formats


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    chosen = ["ceilings", "correctness", "profile", "models", "inference"]
    done = _python("-m", "benchmarks.gpu", "--dry", "--out", str(out), "--sections", *chosen)
    (path,) = out.glob("*.jsonl")
    return done, read(path)


@pytest.mark.interpreter
@pytest.mark.slow
def test_dry_run_goes_through_its_steps(dry_run):
    done, run = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["section"] for row in run.rows} == {
        "versions", "ceilings", "correctness", "host", "profile", "models", "inference",
    }  # fmt: skip
    assert not [row for row in run.rows if "error" in row]
    assert all(row["bitwise"] for row in run.rows if row["section"] == "correctness")


@pytest.mark.interpreter
@pytest.mark.slow
def test_dry_rows_say_that_they_measure_nothing(dry_run):
    _, run = dry_run
    assert run.head["measured"] is False
    rows = [row for row in run.rows if "results" in row]
    assert {row["section"] for row in rows} == {"models", "inference"}
    for row in rows:
        assert row["note"] == "interpreted, not a measurement"
        assert {"fastmbconv", "eager-nchw", "eager-nhwc"} == set(row["results"])
        assert row["kernels"], "ours ran without a kernel"


@pytest.mark.interpreter
def test_a_red_gate_reports_no_figure():
    """A fused path that is wrong by a few percent must not be timed."""
    code = """
import json, torch
from benchmarks import subjects
from benchmarks.comparison import Plan, compare
from benchmarks.registry import by_weight

def wrong(self, x):
    return self.__class__.__base__.forward(self, x) * 1.05

shape = by_weight()[0].tiny()
good = subjects.squeeze_excite(shape)

def make():
    module = good.make()
    module.__class__ = type("Wrong", (type(module),), {"forward": wrong})
    return module

bad = subjects.Subject("wrong", make, good.size, good.elements, good.model)
plan = Plan("cpu", torch.float32, ("eager-nchw",), 1, interpreted=True)
print(json.dumps(compare(bad, "fwd_no_grad", plan)))
"""
    done = _python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert "parity: y" in row["error"]
    assert "results" not in row


def test_shapes_are_the_models_blocks():
    from benchmarks.registry import by_weight, shapes

    assert [sum(s.count for s in shapes(model)) for model in ("b0", "b4")] == [16, 32]
    assert {s.model for s in by_weight()[:4]} == {"b0", "b4"}
    widest = max(shapes("b4"), key=lambda s: s.hidden)
    assert (widest.size, widest.hidden, widest.out_channels, widest.kernel_size) == (12, 2688, 448, 3)


def test_float32_is_compared_without_tf32():
    """Where cuDNN picks an exact kernel for eager, TF32 products of ours would look like a fault."""
    seen = []
    plan = Plan("cpu", torch.float32, (), 1, interpreted=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "truth", lambda self: seen.append(flags()) or {})
        patch.setattr(Comparison, "admit", lambda *_: {})
        for how in (plan, replace(plan, tf32=True)):
            Comparison(subjects.mbconv(registry.by_weight()[0].tiny()), "fwd_no_grad", how).row()
    assert seen == [(False, False), (True, True)]


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_tf32_is_judged_by_the_digits_that_it_has():
    plan = Plan("cpu", torch.float32, tf32=True)
    assert plan.label == "tf32" and Plan("cpu", torch.bfloat16).label == "bfloat16"
    assert plan.limit(0.0) == parity.limit(0.0, torch.float16) > replace(plan, tf32=False).limit(0.0)


def test_warm_ups_are_no_launches():
    seen, function = [], SimpleNamespace(__name__="kernel", warmup=lambda grid: None)
    kernel = launching.kernel(function)
    with launching.hooked(lambda *launch: seen.append(launch)):
        kernel.warmup(grid=(1,))
        kernel[(1,)](x=2)
    assert seen == [(function, (1,), {"x": 2})]


def test_a_block_that_ended_a_process_runs_eager_in_a_model(monkeypatch):
    ran = []
    monkeypatch.setattr(functional, "mbconv", lambda x, block, *, eager=None, memory="fast": ran.append(memory))
    shape = registry.by_weight()[0].tiny()
    block, x = shape.block().describe(), torch.zeros(2, 8, 6, 6)
    names = [f"mbconv {shape.name}", "tests/test_depthwise.py::test_forward"]
    with subjects.left_eager(names) as left:
        assert functional.mbconv(x, block, eager=lambda x: x + 1).eq(1).all()
        functional.mbconv(torch.zeros(4, 8, 6, 6), block)
    assert left == {shape.name.split(" ", 1)[1]} and ran == ["fast"]


def test_kernels_are_matched_with_what_their_launchers_state():
    def launch(kernel, elements):
        moved = traffic.Moved((elements,), torch.float32, 4 * elements)
        return traffic.Launch(kernel, (moved,), ())

    stated = [launch("pool", 1000), launch("sum", 10), launch("pool", 2000), launch("excite_fwd", 5)]
    ran = [("_pool_kernel", 8.0), ("at::reduce_kernel", 3.0), ("_pool_kernel", 4.0)]
    *rows, step = step_profile.match(ran, stated, bandwidth=1e9)
    assert [(row["block"], row["bytes"], row["floor_us"], row["share"]) for row in rows] == [
        ("1000", 4000, 4.0, 0.5), ("2000", 8000, 8.0, 2.0),
    ]  # fmt: skip
    assert step == {"what": "step", "launches": 2, "kernels_us": 12.0, "others_us": 3.0, "unmatched": 1}


def test_a_sample_starts_with_a_cold_and_clean_l2(monkeypatch):
    """The buffer that pushes the step's data out is written back before the clock starts: by reading another one."""
    asked = []
    events = [SimpleNamespace(record=lambda: asked.append("begin")), SimpleNamespace(
        record=lambda: asked.append("end"), synchronize=lambda: None)]  # fmt: skip
    events[0].elapsed_time = lambda end: 1.5
    buffers = iter((SimpleNamespace(zero_=lambda: asked.append("write one buffer")), "the other buffer"))
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: next(buffers))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "sum", lambda tensor, **kwargs: asked.append(f"read {tensor}"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append("sleep"))
    monkeypatch.setattr(torch.cuda, "Event", lambda **kwargs: events.pop(0))
    assert DeviceTimer()(lambda: asked.append("step"), 0.2) == 1.5
    assert asked == ["write one buffer", "read the other buffer", "sleep", "begin", "step", "end"]
