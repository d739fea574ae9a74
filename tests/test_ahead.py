"""What compiles ahead is what a training step launches, and a thread that fails costs nothing."""

import copy
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import GPU
from test_triton_versions import DEPS, GIVEN
from torch import nn

import fastmbconv
from fastmbconv import ahead
from fastmbconv.kernels.launching import kernel, written
from fastmbconv.mbconv import MBConv

ROOT = Path(__file__).resolve().parents[1]
KERNELS_OF_A_B0_STEP = 144  # batch 128, bf16, no stochastic depth: each more is a longer cold start


def image(device, channels=8, size=6):
    x = torch.randn(2, channels, size, size, device=device).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def named(launches):
    return [(one.function.__name__, specialised(one.arguments)) for one in launches]


def specialised(arguments):
    values = {k: v.dtype if isinstance(v, torch.Tensor) else str(v) for k, v in arguments.items()}
    return sorted(values.items(), key=lambda item: item[0])


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"expand_ratio": 1}, {"se_ratio": 0}, {"drop_path": 0.5}])
def test_ahead_are_the_launches_of_the_step(settings, device, triton_backend):
    module, x = MBConv(8, 8, **settings).to(device), image(device)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    seed = torch.get_rng_state()
    expected = ahead.model_launches(x, module.describe(), "fast", "train")
    assert torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    with written() as launches:  # the backward runs in this thread on a CPU, in another one on a GPU
        y = module(x)
        if not GPU:
            y.backward(torch.ones_like(y))
    seen = named(launches)
    assert seen == named(expected)[: len(seen)]
    assert GPU or len(seen) == len(expected)


def test_what_is_ahead_holds_no_memory(device, triton_backend):
    """A whole model's launches are noted before the first one compiles: its tensors together don't fit a GPU."""
    launches = ahead.model_launches(image(device), MBConv(8, 8).to(device).describe(), "fast", "train")
    tensors = [v for one in launches for v in one.arguments.values() if isinstance(v, torch.Tensor)]
    assert len(tensors) > 100
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0


def test_the_blocks_after_the_first_are_ahead_too(device, triton_backend):
    model = fastmbconv.fuse(nn.Sequential(MBConv(8, 8, 3), MBConv(8, 16, 5, 2), MBConv(16, 16, 3)).to(device))
    x = image(device)
    each, h = [], x
    for block in model:
        alone = fastmbconv.fuse(copy.deepcopy(block))  # a copy is followed by nobody
        each += named(ahead.model_launches(h, alone.describe(), "fast", "train"))
        h = block(h).detach()
    assert named(ahead.model_launches(x, model[0].describe(), "fast", "train")) == each


def test_a_block_that_is_gone_ends_the_chain(device, triton_backend):
    model = fastmbconv.fuse(nn.Sequential(MBConv(8, 8), MBConv(8, 8)).to(device))
    both = ahead.model_launches(image(device), model[0].describe(), "fast", "train")
    del model[1]
    one = ahead.model_launches(image(device), model[0].describe(), "fast", "train")
    assert len(both) == 2 * len(one)


def test_what_a_thread_could_not_compile_its_launch_compiles():
    attempts = []

    def compile_kernel():
        attempts.append(None)
        if len(attempts) == 1:
            raise OSError("no room")
        return "kernel"

    with ThreadPoolExecutor(1) as pool:
        assert ahead.Compiled(pool, compile_kernel).result() == "kernel"


def test_training_goes_on_where_nothing_can_be_said_ahead(device, triton_backend, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ahead, "wanted", lambda x: True)
    monkeypatch.setattr(ahead, "model_launches", broken)
    monkeypatch.setattr(ahead, "_seen", set())
    module, x = MBConv(8, 8).to(device), image(device)
    module(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_no_kernel_escapes_the_list():
    for path in (ROOT / "kernels").glob("*.py"):
        module = import_module(f"fastmbconv.kernels.{path.stem}")
        mine = {n: v for n, v in vars(module).items() if n.startswith("_") and n.endswith("_kernel")}
        assert not [name for name, value in mine.items() if not isinstance(value, kernel)]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no compiler here")
def test_the_kernels_of_a_step_of_b0_do_not_become_more(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = tmp_path / "cold.json"
    command = [sys.executable, "-m", "benchmarks.cold", "--count", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert file.exists(), done.stdout + done.stderr
    assert json.loads(file.read_text())["kernels"] <= KERNELS_OF_A_B0_STEP


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Runs tests/ahead_worker.py under the Triton in a folder, "" for the installed one."""
    if sys.platform != "linux" or not (shutil.which("gcc") and shutil.which("g++")):
        pytest.skip("the rehearsal's device is built by gcc and g++, for Linux")
    libraries = tmp_path_factory.mktemp("libraries")

    def run(folder):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join((*([str(folder)] if folder else []), str(ROOT)))
        command = [sys.executable, "tests/ahead_worker.py", str(libraries)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("folder", ["triton36", ""], ids=["oldest", "installed"])
def test_a_step_of_b0_compiles_nothing_in_its_own_thread(folder, rehearsed):
    """On a device that is not there: launches find what is under way, and the launchers that gcc builds up to 3.6."""
    if folder and not (DEPS / folder / "triton").is_dir():
        message = f"{DEPS / folder} holds no Triton: `make test` installs it"
        pytest.fail(message) if GIVEN else pytest.skip(message)
    found = rehearsed(DEPS / folder if folder else "")
    assert found["triton"].startswith("3.6.") is bool(folder)
    training, inference = found["training"], found["inference"]
    assert training["launched"] == 305 and training["elsewhere"] == []
    assert training["launchers"] == training["compiled"] and training["launchers_elsewhere"] == 0
    # The head is no block: its one kernel compiles at its launch.
    assert inference["launched"] == 65 and inference["elsewhere"] == ["_pointwise_pool_kernel"]
    assert inference["launchers_elsewhere"] == 0


def test_ahead_are_the_launches_of_an_inference(device, triton_backend):
    module, x = MBConv(8, 8).to(device).eval(), image(device)
    with torch.no_grad():
        expected = ahead.model_launches(x, module.describe(), "fast", "infer")
        with written() as launches:
            module(x)
    assert named(launches) == named(expected)


def test_training_and_inference_of_a_block_are_ahead_apart(device):
    """A frozen block is the same block in both, and its kernels are others."""
    block, x = MBConv(8, 8).to(device).eval().describe(), image(device)
    steps = ("train", "infer")
    assert len({ahead.key(x, block, "fast", step) for step in steps}) == 2
