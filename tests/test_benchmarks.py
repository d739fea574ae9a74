"""The benchmarks' own steps at tiny sizes on a CPU: they run, gate, record and refuse; nothing here is a timing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import steps
from benchmarks.session import Session

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("blocks", "models", "ops", "inference")


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
    assert done.returncode != 0
    assert "no CUDA GPU" in done.stderr


def test_dry_run_does_not_write_results():
    done = _python("-m", "benchmarks.gpu", "--dry", "--out", "benchmarks/results")
    assert done.returncode != 0
    assert "measures nothing" in done.stderr


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
    done = _python("-m", "benchmarks.gpu", "--dry", "--out", str(out))
    (path,) = out.glob("*.json")
    return done, json.loads(path.read_text())


@pytest.mark.slow
def test_dry_run_goes_through_every_step(dry_run):
    done, result = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    sections = {row["section"] for row in result["rows"]}
    assert sections >= {"tests", "memcheck", "ceilings", "blocks-compiled", "training", *FIGURES}
    assert not [row for row in result["rows"] if "error" in row]


@pytest.mark.slow
def test_dry_rows_say_that_they_measure_nothing(dry_run):
    _, result = dry_run
    assert result["head"]["measured"] is False
    rows = [row for row in result["rows"] if row["section"] in FIGURES]
    assert len(rows) == 11
    for row in rows:
        assert row["note"] == "interpreted, not a measurement"
        assert {"fastmbconv", "eager-nchw", "eager-nhwc"} == set(row["results"])
        assert row["kernels"], "ours ran without a kernel"


def test_header_names_versions_and_commit():
    code = "from benchmarks.session import header; import json; print(json.dumps(header(dry=True)))"
    done = _python("-c", code, TRITON_INTERPRET="1", FASTMBCONV_COMMIT="abc123")
    head = json.loads(done.stdout)
    assert head["commit"] == "abc123"
    assert head["torch"] == torch.__version__
    assert all(head[key] for key in ("gpu", "triton", "python", "date", "fastmbconv"))


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


def test_a_child_whose_time_is_up_says_what_it_knows(tmp_path):
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('3 failed')"
    session = SimpleNamespace(path=tmp_path / "result.json")
    assert steps._captured(session, "tests", [sys.executable, "-c", code], 3.0, {}) == (None, "3 failed\n")


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path, 100.0, dry=True)


def test_comparisons_share_what_is_left_to_them(tmp_path, monkeypatch):
    """However long the tests took: their time is nobody's share."""
    now, deadlines = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    session = Session(tmp_path, 100.0, dry=True)
    session.dry = False
    monkeypatch.setitem(steps.SECTIONS, "tests", lambda session: now.append(now.pop() + 60))

    def comparisons(session, dtype):
        deadlines.append(steps._plan(session, dtype, 0.5).deadline)
        now[0] += 5

    for name in ("blocks", "models"):
        monkeypatch.setitem(steps.SECTIONS, name, comparisons)
    steps.run(session, ["tests", "blocks", "models"], torch.float32)
    assert deadlines == [1080.0, 1080.0]


def test_a_lost_gpu_loses_no_other_section(session, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    commands, ran = [], []
    monkeypatch.setattr(steps.timing, "synchronize", lost)
    monkeypatch.setattr(steps.subprocess, "run", lambda command, **options: commands.append(command))
    for name in ("blocks", "models", "ops"):
        monkeypatch.setitem(steps.SECTIONS, name, lambda session, dtype, name=name: ran.append(name))
    steps.run(session, ["blocks", "models", "ops"], torch.float16)
    assert ran == ["blocks"]
    assert commands[0][-5:] == ["--dtype", "float16", "--sections", "models", "ops"]
    assert session.rows[-1]["error"].startswith("this process lost its GPU")
