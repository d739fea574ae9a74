"""act(BN(depthwise(x))) against eager and torch.compile: `pytest benchmarks/bench_depthwise.py`."""

import pytest

from benchmarks import subjects
from benchmarks.registry import Shape
from benchmarks.tabulate import every_candidate, every_mode, every_shape, replayed, tabulate


@replayed
@every_candidate
@every_mode
@every_shape
def test_depthwise(benchmark, pytestconfig: pytest.Config, shape: Shape, mode: str, candidate: str) -> None:
    tabulate(benchmark, subjects.depthwise, shape, mode, candidate, pytestconfig.getoption("--dry"))
