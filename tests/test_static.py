"""Every kernel of a block compiles for a GPU that is not there, and keeps its tiles in registers."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.sass import Code, Loop, Path

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has no compiler here")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "report.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["--shapes", "held", "tiny", "--arch", "90", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.static", *options],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())["rows"]


@pytest.fixture
def report(rows):
    return [row for row in rows if row["shape"].startswith("tiny")]


@pytest.fixture
def held(rows):
    return [row for row in rows if not row["shape"].startswith("tiny")]


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


@pytest.mark.slow
def test_loops_are_recognised(report):
    """No figure: the source's loops and those of the machine code were not brought together."""
    work = ("_depthwise", "_pointwise", "_project", "_pool", "_bn_act", "_expand_pass")
    counted = [row for row in report if row["kernel"].startswith(work)]
    assert counted
    assert not [f"{row['kernel']} {row['settings']}" for row in counted if not row["per_element"]]


@pytest.mark.slow
def test_shipped_walks_keep_their_budgets(held):
    assert {(row["kernel"], row["budget"]) for row in held} == {
        ("_depthwise_fwd_kernel", 28),
        ("_depthwise_fwd_kernel", 50),
        ("_depthwise_bwd_kernel", 55),
        ("_depthwise_bwd_kernel", 95),
    }
    assert not [row for row in held if row["error"] or row["spills"]]
    assert not [row for row in held if row["in_loop"] > row["budget"]]


CODE = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   MOV R3, R2 ;
        /*0020*/               @P0 BRA 0x40 ;
        /*0030*/                   STG.E [R2], R3 ;
        /*0040*/                   FADD R3, R3, R1 ;
        /*0050*/              @!P1 BRA 0x20 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
"""


@pytest.mark.parametrize(
    ("loops", "issued"),
    [
        ((Loop(10),), 2 + 10 * 4 + 1),
        ((Loop(10, guarded=0.5),), 2 + 10 * (3 + 0.5) + 1),
        ((Loop(1, (Loop(10),)),), 2 + 10 * 4 + 1),  # a loop of one round is gone
        ((Loop(8, fixed=True), Loop(20)), 2 + 20 * 4 + 1),  # the other one was unrolled
        ((Loop(20), Loop(20)), None),
    ],
)
def test_issued_instructions_of_a_loop(loops, issued):
    assert Code(CODE).issued((Path(1.0, loops),)) == issued


def test_refuses_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.static"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "without TRITON_INTERPRET" in done.stderr
