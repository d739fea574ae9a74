"""Kernels run on the GPU if there is one, else interpreted on the CPU; allocations of ours start as NaN."""

import os
import sys

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest  # noqa: E402

import fastmbconv  # noqa: E402
from fastmbconv import dispatch, functional, reference  # noqa: E402

# `with torch.device(...)` remembers torch's factories at its first use: that must come before `poison` replaces them.
with torch.device("meta"):
    torch.empty(0)


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if (
            caller.startswith("fastmbconv")
            and out.is_floating_point()
            and not isinstance(out, torch._subclasses.FakeTensor)
        ):
            out.fill_(float("nan"))
        return out

    return allocate_nan


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """A lane that no kernel wrote shows as NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


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
