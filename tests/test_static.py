"""Every kernel of a block compiles for a GPU that is not there, and keeps its tiles in registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has no compiler here")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "report.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", "--shapes", "tiny", "--arch", "90", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_every_kernel_compiles(report):
    assert not [f"{row['kernel']}: {row['error']}" for row in report if row["error"]]


@pytest.mark.slow
def test_every_kernel_there_is_was_launched(report):
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    written = set(re.findall(r"^def (_\w+_kernel)\(", source, re.M))
    assert written
    assert written - {row["kernel"] for row in report} == set()


@pytest.mark.slow
def test_no_kernel_spills(report):
    assert not [f"{row['kernel']} ({row['settings']}): {row['spills']}" for row in report if row["spills"]]


@pytest.mark.slow
def test_activations_move_in_wide_accesses(report):
    """The kernels that read the expanded tensor: 16 bits would be one bf16 channel per load."""
    moving = [row for row in report if row["kernel"].startswith(("_depthwise", "_pointwise", "_project", "_pool"))]
    assert moving
    assert not [f"{row['kernel']}: {row['load_bits']} bits" for row in moving if row["load_bits"] < 32]


def test_refuses_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.static"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "without TRITON_INTERPRET" in done.stderr
