"""KernelBench's MBConv models against eager and torch.compile: `pytest benchmarks/bench_kernelbench.py`.

`fwd_training` is what KernelBench times: the forward in training mode without gradients, in float32, whose convolutions
may take TF32. Fused runs in channels_last, its input too, as eager-nhwc does. `published_ms` beside it is from another
GPU, host and PyTorch (benchmarks/kernelbench.py).
"""

import pytest

from benchmarks import subjects
from benchmarks.kernelbench import NOTHING_FUSED, PROBLEMS, Problem
from benchmarks.subjects import MODES, TRAINING_FORWARD
from benchmarks.tabulate import every_candidate, replayed, tabulate


@replayed
@every_candidate
@pytest.mark.parametrize("mode", (TRAINING_FORWARD, *MODES))
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_kernelbench(benchmark, pytestconfig: pytest.Config, problem: Problem, mode: str, candidate: str) -> None:
    if not problem.explained().fused:
        pytest.skip(f"{problem.name}: {NOTHING_FUSED}")
    published = mode == TRAINING_FORWARD
    if published:
        benchmark.extra_info["published_ms"] = dict(zip(("eager", "compile"), problem.published, strict=True))
    dry = pytestconfig.getoption("--dry")
    tabulate(benchmark, subjects.kernelbench, problem, mode, candidate, dry, tf32=published)
