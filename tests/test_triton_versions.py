"""The tests marked `kernels`, interpreted, under the oldest and the newest Triton that are supported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GIVEN = os.environ.get("FASTMBCONV_TRITON_DEPS")
DEPS = ROOT / (GIVEN or ".deps")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
@pytest.mark.parametrize(("folder", "version"), [("triton36", "3.6."), ("triton39", "3.9.")])
def test_kernels_under(folder, version):
    target = DEPS / folder
    if not (target / "triton").is_dir():
        message = f"{target} holds no Triton: `make test` installs it"
        pytest.fail(message) if GIVEN else pytest.skip(message)
    environment = os.environ | {"PYTHONPATH": str(target), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    code = "import triton; print(triton.__version__)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.startswith(version), f"{target} holds Triton {found.stdout or found.stderr}"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", "-m", "kernels", "-q", "-x", "-p", "no:cacheprovider"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 20, result.stdout[-2000:]
