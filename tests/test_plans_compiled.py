"""Plans of compiled kernels, on a device that is not there: each launch is its launcher's own, by every argument."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.rehearsal.run import LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
GIVEN = os.environ.get("FASTMBCONV_TRITON_DEPS")
DEPS = ROOT / (GIVEN or ".deps")
FEW = ("k3", "library")  # of the worker's cases, under Triton's other versions
TRAINING_LAUNCHES, INFERENCE_LAUNCHES = 19, 4  # of the block "k3"
STEPPED_BACK = (
    "unaligned",
    "launch_enter_hook",
    "launch_exit_hook",
    "afterwards",
    "unknown",
    "keeps its kernels",
)


def other_triton(folder):
    """The folder of another Triton, or a skip."""
    target = DEPS / folder
    if not (target / "triton").is_dir():
        message = f"{target} holds no Triton: `make test` installs it"
        pytest.fail(message) if GIVEN else pytest.skip(message)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "version", "cases"),
    [("", "", ()), ("triton36", "3.6.", FEW), ("triton39", "3.9.", FEW)],
    ids=["installed", "oldest", "newest"],
)
def test_a_plan_starts_what_its_launchers_start(folder, version, cases, tmp_path):
    if sys.platform != "linux" or not (shutil.which("gcc") and shutil.which("g++")):
        pytest.skip("the device is built by gcc and g++, for Linux")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("the device's operators stand in the place of CUDA's")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((*([str(other_triton(folder))] if folder else []), str(ROOT)))
    env["TRITON_CACHE_DIR"] = str(tmp_path)  # what is compiled is cut off behind Triton's front end
    command = [sys.executable, "tests/plan_worker.py", str(LIBRARIES), *cases]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["triton"].startswith(version)
    assert found["state"] == f"planned (Triton {'.'.join(found['triton'].split('.')[:2])})"
    check(found["cases"], cases)
    stepped = found["fallbacks"]
    assert stepped.pop("its state").startswith("each anew: Triton 3.10 is not known here")
    assert stepped == dict.fromkeys(STEPPED_BACK, True)


def check(counts, cases):
    """That the comparison saw what it is for, in two calls of each case."""
    for what, count in counts.items():
        assert min(count[kind] for kind in ("launches", "named", "inner", "constants")) > 0, what
        if what.endswith("training"):
            assert count["operations"] > 0 and count["shared"] > 0, what
    assert counts["k3, torch.bfloat16, training"]["launches"] == 2 * TRAINING_LAUNCHES
    assert counts["k3, torch.bfloat16, inference"]["launches"] == 2 * INFERENCE_LAUNCHES
    products = counts["library, torch.bfloat16, training"]["operations"]
    assert products > counts["k3, torch.bfloat16, training"]["operations"]
    assert len(counts) > 4 * len(cases or range(8))
