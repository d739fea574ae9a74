"""Kernels run on the GPU if there is one, else interpreted on the CPU; allocations of ours start as NaN."""

import os
from importlib.metadata import version

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest  # noqa: E402

import fastmbconv  # noqa: E402
from benchmarks.poison import poisoned  # noqa: E402
from fastmbconv import dispatch, functional, reference  # noqa: E402
from fastmbconv.dispatch import HAS_TRITON  # noqa: E402


def pytest_collection_modifyitems(items):
    """Triton 3.6's interpreter fails with NumPy >= 2.4, and that pair is found beside GPUs, which don't interpret."""
    numbers = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")] if HAS_TRITON else []
    if numbers and numbers[0] < (3, 7) and numbers[1] >= (2, 4):
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason="Triton 3.6 does not interpret with NumPy >= 2.4"))


@pytest.fixture(autouse=True)
def poison():
    """A lane that no kernel wrote shows as NaN."""
    with poisoned():
        yield


@pytest.fixture(autouse=True, scope="session")
def ieee():
    """fp32 products in fp32: TF32 is a choice of the user's, and has its own row."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def triton_backend():
    """Kernels or an error: nothing falls back silently."""
    with fastmbconv.backend("triton"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """Collects the blocks that reach functional.mbconv, which runs their description there, on any device."""
    seen = []

    def mbconv(x, block, eager, memory):
        seen.append(block)
        return reference.mbconv(x, block)

    monkeypatch.setattr(functional, "mbconv", mbconv)
    monkeypatch.setattr(dispatch, "call_reason", lambda x: None)
    return seen


@pytest.fixture(autouse=True, scope="session")
def _paths_are_honest():
    assert dispatch.interpreted() is not GPU
