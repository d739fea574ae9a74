"""What a block's calls cost the host, against eager's: launches, torch's calls and allocations, and its CPU time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU

import fastmbconv
from fastmbconv.kernels.launching import written
from fastmbconv.mbconv import MBConv

LAUNCHES = 21  # of a block with expansion and squeeze-and-excitation, forward and backward
TRAINING_LAUNCHES, INFERENCE_LAUNCHES = 19, 4  # of the benchmark's block
MOST = {"training": 1.6, "inference": 1.1}  # of eager's CPU time; in quiet hours 1.0 to 1.2 and 0.5 to 0.7
MOST_OF_A_CPU = 0.75  # in quiet hours 0.44
ALLOCATING = ("aten::empty", "aten::empty_strided")


def counts(module):
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, written() as launches:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.backward(torch.ones_like(y))
    names = [event.name for event in profile.events() if event.name.startswith("aten::")]
    return len(launches), len(names), sum(name in ALLOCATING for name in names)


@pytest.mark.skipif(GPU, reason="the backward's launches would run in another thread")
def test_a_fused_block_asks_less_of_the_host_than_an_eager_one(triton_backend):
    fused, eager = MBConv(16, 16), fastmbconv.unfuse(MBConv(16, 16))
    counts(fused)  # torch's own first calls
    launches, calls, allocations = counts(fused)
    none, theirs, allocated = counts(eager)
    assert launches <= LAUNCHES and none == 0
    assert calls < 0.7 * theirs
    assert allocations < allocated


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Rows of benchmarks.host by their names, and its last line."""
    if sys.platform != "linux" or not (shutil.which("gcc") and shutil.which("g++")):
        pytest.skip("the benchmark's device is built by gcc and g++, for Linux")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("the benchmark's operators stand in the place of CUDA's")
    file = tmp_path_factory.mktemp("host") / "host.jsonl"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host", "--calls", "400", "--json", str(file)]
    root = Path(fastmbconv.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, watched = map(json.loads, file.read_text().splitlines())
    return {row["what"]: row for row in rows}, watched


@pytest.mark.slow
def test_every_timed_call_takes_the_kernels(timed):
    rows, watched = timed
    expected = {"training": TRAINING_LAUNCHES, "inference": INFERENCE_LAUNCHES}
    assert {what: row["launches"] for what, row in rows.items()} == {
        what: expected[what.partition(",")[0]] for what in rows
    }
    assert list(watched) == ["training_ratio", "training_ratio_cpu", "training_us", "inference_us", "launch_us"]
    assert min(watched.values()) > 0


@pytest.mark.slow
def test_a_training_step_costs_the_host_about_what_eager_costs_it(timed):
    rows, watched = timed
    assert watched["training_ratio_cpu"] < MOST_OF_A_CPU
    assert {what: row["ratio"] for what, row in rows.items() if row["ratio"] > MOST[what.partition(",")[0]]} == {}
