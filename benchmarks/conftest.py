"""`pytest benchmarks/bench_*.py` needs a GPU and says so; `--dry` runs tiny sizes interpreted: no measurement."""

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dry", action="store_true", help="benchmarks: tiny sizes on a CPU, interpreted: no measurement")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--dry"):
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--dry"):
        return
    why = "benchmarks need a CUDA GPU: timings on a CPU would say nothing (--dry runs tiny sizes, interpreted)"
    for item in items:
        item.add_marker(pytest.mark.skip(reason=why))
