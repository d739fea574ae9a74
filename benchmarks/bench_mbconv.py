"""The whole block against eager and torch.compile: `pytest benchmarks/bench_mbconv.py`."""

import pytest

from benchmarks import subjects
from benchmarks.registry import Shape
from benchmarks.tabulate import every_candidate, every_mode, every_shape, replayed, tabulate


@replayed
@every_candidate
@every_mode
@every_shape
def test_mbconv(benchmark, pytestconfig: pytest.Config, shape: Shape, mode: str, candidate: str) -> None:
    tabulate(benchmark, subjects.mbconv, shape, mode, candidate, pytestconfig.getoption("--dry"))
