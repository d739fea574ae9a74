"""Squeeze-and-excitation against eager and torch.compile: `pytest benchmarks/bench_squeeze_excite.py`."""

import pytest

from benchmarks import subjects
from benchmarks.registry import Shape
from benchmarks.tabulate import every_candidate, every_mode, every_shape, replayed, tabulate


@replayed
@every_candidate
@every_mode
@every_shape
def test_squeeze_excite(benchmark, pytestconfig: pytest.Config, shape: Shape, mode: str, candidate: str) -> None:
    tabulate(benchmark, subjects.squeeze_excite, shape, mode, candidate, pytestconfig.getoption("--dry"))
