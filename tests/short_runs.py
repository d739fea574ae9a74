"""A few steps of training on digits with two blocks, for tests that repeat them: eager, fused, on two processes."""

from dataclasses import replace
from unittest import mock

import torch
from libraries import library

for needed in ("torchvision", "timm", "rich", "matplotlib", "sklearn"):
    library(needed)

from fastmbconv import efficientnet, scaling  # noqa: E402
from fastmbconv.training.config import Config  # noqa: E402
from fastmbconv.training.distributed import World  # noqa: E402
from fastmbconv.training.loop import Trainer  # noqa: E402
from fastmbconv.training.progress import Log  # noqa: E402
from fastmbconv.training.signals import Wish  # noqa: E402

__all__ = ["World", "steps"]

SHORT = dict(
    data="digits", width=0.01, depth=0.1, resolution=32, workers=0, epochs=2, warmup_epochs=0.5, val_fraction=0.98,
    batch_size=8, augment="none", dropout=0.0, drop_path=0.0, tensorboard=False, amp="none", ema=0.0, optimizer="sgd",
    lr=0.1,
)  # fmt: skip


class Recorded(Trainer):
    """Keeps the loss of each step, summed over all pictures so far and all processes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.curve = []

    def _step(self, batches):
        super()._step(batches)
        self.curve.append(self.world.sum(self.sums[:1].clone()).item())


def short_plan(coefficients):
    """B0's second and last stage: a strided block, and one with a residual."""
    whole = scaling.plan(coefficients)
    return replace(whole, stages=(whole.stages[1], whole.stages[6]))


def steps(world, **changes):
    """The curve, the weights and the statistics after two steps, a vector each."""
    with mock.patch.object(efficientnet, "plan", short_plan):
        run = Recorded(Config(**{**SHORT, **changes}), world, Log(False), Wish())
    run.order.steps = 2
    run._train_epoch()
    parts = {"curve": [torch.tensor(run.curve)], "weights": run.network.parameters(), "buffers": run.network.buffers()}
    return {name: torch.cat([t.detach().float().flatten() for t in part]) for name, part in parts.items()}
