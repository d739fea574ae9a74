"""How good a model is on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastmbconv.training.distributed import World
from fastmbconv.training.errors import Interrupted, TrainingError
from fastmbconv.training.loader import Batch
from fastmbconv.training.signals import Wish

Autocast = Callable[[], torch.autocast]


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy and shares of right answers; `confusion[true, predicted]` counts pictures."""

    loss: float
    top1: float
    top5: float
    confusion: Tensor
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return int(self.confusion.sum())


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], classes: int, world: World, autocast: Autocast, wish: Wish | None = None
) -> Evaluation:
    """Each process runs its own batches; the result is that of all pictures, on every process.

    Raises:
        Interrupted: on all processes, if a signal came to one.
        TrainingError: if not one picture could be read.
    """
    model.eval()
    device = world.device
    loss = torch.zeros((), device=device, dtype=torch.float64)
    hits = torch.zeros(2, device=device, dtype=torch.long)
    confusion = torch.zeros(classes * classes, dtype=torch.long, device=device)
    broken: dict[str, str] = {}
    for batch in batches:
        broken.update(batch.broken)
        if wish is not None and wish.signal:
            break
        if not len(batch.labels):
            continue
        labels = batch.labels.to(device, non_blocking=True)
        with autocast():
            logits = model(batch.images.to(device, non_blocking=True))
        logits = logits.float()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, classes), 1).indices
        right = best == labels[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
        confusion += torch.bincount(labels * classes + best[:, 0], minlength=classes * classes)
    signal = torch.tensor(wish.signal if wish is not None else 0, device=device)
    if number := int(world.max(signal)):
        raise Interrupted(number)
    for total in (loss, hits, confusion):
        world.sum(total)
    broken = world.gather(broken)
    count = int(confusion.sum())
    if not count:
        raise TrainingError(f"none of the {len(broken)} pictures to judge by can be read: {_first(broken)}")
    top1, top5 = (hits.double() / count).tolist()
    return Evaluation(float(loss) / count, top1, top5, confusion.cpu().reshape(classes, classes), broken)


def _first(broken: dict[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in broken.items()), "there is none")
