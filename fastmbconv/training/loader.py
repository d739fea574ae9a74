"""From samples to batches: which picture comes when, how it is cropped and augmented, and what can't be read.

Nothing here has a state of its own. The order of an epoch follows from (seed, epoch), a picture's augmentation from
(seed, epoch, picture): so a run goes on in the middle of an epoch, with any number of workers and processes, exactly
as if it had not stopped.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from fastmbconv.training.config import Config
from fastmbconv.training.data import Samples
from fastmbconv.training.pictures import PictureError

CONSTANTS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
GREY = [128, 128, 128]
REPLACEMENTS = 100
GRACE = 20  # seconds that a worker lives on after a SIGTERM that the whole group of processes got


class Look(NamedTuple):
    """How pictures are brought to the network's size: what config and model say together."""

    resolution: int
    crop: float
    interpolation: str
    normalize: str


class Batch(NamedTuple):
    """Pictures [N, 3, H, W], normalised, their labels [N], and (name, reason) of those that could not be read."""

    images: Tensor
    labels: Tensor
    broken: list[tuple[str, str]]


Item = tuple[Tensor | None, int, list[tuple[str, str]]]


def look(config: Config, resolution: int, lite: bool) -> Look:
    """TensorFlow's centre crop leaves out 16 pixels on each side, and never more than an eighth of the picture."""
    side = config.resolution or resolution
    crop = config.crop or max(0.875, side / (side + 32))
    return Look(side, crop, config.interpolation, config.normalize or ("half" if lite else "imagenet"))


def train_transform(config: Config, look: Look) -> v2.Transform:
    """Random crop, flip and policy as the configuration says."""
    steps: list[Any] = [
        v2.RandomResizedCrop(look.resolution, scale=(config.min_scale, 1.0), interpolation=_mode(look)),
    ]
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.augment == "autoaugment":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=GREY))
    elif config.augment == "randaugment":
        steps.append(v2.RandAugment(fill=GREY))
    steps += _to_tensor(look)
    if config.erase:
        steps.append(v2.RandomErasing(config.erase))
    return v2.Compose(steps)


def eval_transform(look: Look) -> v2.Transform:
    """The middle of the picture, at the network's size."""
    resize = v2.Resize(round(look.resolution / look.crop), interpolation=_mode(look))
    return v2.Compose([resize, v2.CenterCrop(look.resolution), *_to_tensor(look)])


def mixing(config: Config, classes: int) -> v2.Transform | None:
    """MixUp, CutMix, or for each batch one of the two; None if both are off."""
    mixes: list[v2.Transform] = []
    if config.mixup:
        mixes.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        mixes.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if len(mixes) > 1 else next(iter(mixes), None)


def seed_of(*parts: int) -> int:
    """A seed of 63 bits from whole numbers >= 0."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Pictures(Dataset[Item]):
    """Transformed pictures by (index, seed); without a seed the transform must not draw.

    A picture that can't be read is replaced by the next one that can, so that batches keep their size on every
    process; `replace=False` leaves it out instead.
    """

    def __init__(self, samples: Samples, transform: v2.Transform, replace: bool) -> None:
        self.samples, self.transform, self.replace = samples, transform, replace

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        index, seed = key
        broken: list[tuple[str, str]] = []
        for _ in range(REPLACEMENTS if self.replace else 1):
            try:
                picture = self.samples.load(index)
            except PictureError as error:
                broken.append((self.samples.name(index), str(error)))
                index = (index + 1) % len(self.samples)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return self.transform(picture), int(self.samples.labels[index]), broken
        return None, -1, broken


class Order(Sampler[list[tuple[int, int]]]):
    """Which pictures one process sees in which forward pass of an epoch.

    A step takes `batch_size` pictures of a permutation, whatever the number of processes; the rest of the epoch that
    doesn't fill a step is left out. Set `epoch` and `start` (a step) before iterating.
    """

    def __init__(self, count: int, batch_size: int, accumulate: int, seed: int, rank: int, world: int) -> None:
        self.count, self.batch_size, self.accumulate = count, batch_size, accumulate
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = self.start = 0
        self.steps = count // batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for step in range(self.start, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            for part in batch.reshape(self.accumulate, self.world, -1)[:, self.rank]:
                yield [(int(index), seed_of(self.seed, self.epoch, int(index))) for index in part]


def shard(count: int, batch_size: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """Batches for evaluation: each process sees its part, once."""
    mine = [(index, 0) for index in range(rank, count, world)]
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


def collate(items: Sequence[Item]) -> Batch:
    broken = [each for _, _, several in items for each in several]
    good = [(image, label) for image, label, _ in items if image is not None]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), broken)
    return Batch(torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good]), broken)


def loader(
    dataset: Pictures, batches: Order | list[list[tuple[int, int]]], workers: int, pin: bool
) -> DataLoader[Batch]:
    """A DataLoader whose workers leave signals to the main process, which must be able to finish its step."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,  # type: ignore[arg-type]
        pin_memory=pin,
        worker_init_fn=_patient if workers else None,
    )


def _patient(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def _mode(look: Look) -> InterpolationMode:
    return InterpolationMode(look.interpolation)


def _to_tensor(look: Look) -> list[v2.Transform]:
    mean, deviation = CONSTANTS[look.normalize]
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation), v2.Lambda(_plain)]


def _plain(image: Tensor) -> Tensor:
    return image.as_subclass(Tensor)  # type: ignore[return-value]
