"""What lies in a folder of pictures: which real files, by which links, and whether `train` is a split or a class."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmbconv.training.errors import TrainingError
from fastmbconv.training.pictures import SUFFIXES

TRAIN_NAMES = ("train", "training")
# The first that is there is held out; names in one row mean the same.
VAL_NAMES = (("val", "valid", "validation"), ("dev",), ("eval",), ("test", "testing"))
SHOWN = 5

Identity = tuple[int, int]


class Found(NamedTuple):
    """A file that is called like a picture; without an identity it is none that can be opened."""

    path: Path
    identity: Identity | None
    size: int
    linked: bool


class Labelled(NamedTuple):
    """Files with their classes."""

    found: list[Found]
    labels: np.ndarray
    classes: tuple[str, ...]


class Tree:
    """A folder and all below it, through links, but never through one that leads back to where the walk came from.

    Args:
        root: the folder.
        argument: what its user calls it.
    """

    def __init__(self, root: Path, argument: str = "DATA") -> None:
        self.root, self.argument = root, argument
        self.real = os.path.realpath(root)
        self._not_followed: dict[str, None] = {}
        self._dangling: dict[str, None] = {}
        self._twice: set[Identity] = set()

    def notes(self) -> list[str]:
        """What was met on the way and is not read."""
        notes = _first_of("not followed: ", list(self._not_followed))
        notes += _first_of("a link to nothing, left out: ", list(self._dangling))
        if self._twice:
            several = len(self._twice) > 1
            files = count(len(self._twice), "file is", "files are")
            notes.append(f"{files} reached twice, by links, and {'count' if several else 'counts'} once")
        return notes

    def entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """What is in a folder and not hidden, sorted.

        Raises:
            TrainingError: if it can't be listed.
        """
        try:
            with os.scandir(folder) as entries:
                return sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
        except OSError as error:
            raise TrainingError(
                f"{self.argument}: the folder {folder} can't be listed ({error.strerror}): make it readable, or "
                "remove it"
            ) from error

    def folders(self, folder: Path) -> list[Path]:
        """The folders in a folder, sorted."""
        active = (os.path.realpath(folder),)
        return [folder / entry.name for entry in self.entries(folder) if self._enters(entry, status_of(entry), active)]

    def loose(self, folder: Path) -> int:
        """How many pictures lie directly in a folder."""
        return sum(is_named_picture(e.name) and not _is_folder(status_of(e)) for e in self.entries(folder))

    def holds_picture(self, folder: Path) -> bool:
        return next(iter(_Walk(self, folder)), None) is not None

    def pictures(self, folder: Path) -> list[Found]:
        """Each real file below a folder that is called like a picture, once, sorted by its path.

        Of a file's several paths the first that takes no link is given.
        """
        walk = _Walk(self, folder)
        kept: dict[Identity | Path, Found] = {}
        for found in walk:
            key = found.identity or found.path
            before = kept.get(key)
            if before is None:
                kept[key] = found
                continue
            self._twice.add(found.identity)  # type: ignore[arg-type]
            kept[key] = min(before, found, key=lambda each: (each.linked, each.path))
        self._twice |= walk.met_again()
        return sorted(kept.values(), key=lambda each: each.path)

    def _enters(self, entry: os.DirEntry[str], status: os.stat_result | None, active: Sequence[str]) -> str | None:
        """The real path of a folder to walk, or None for anything else."""
        if not _is_folder(status):
            if status is None and not is_named_picture(entry.name):
                self._dangling[self.shown(entry.path)] = None
            return None
        if not entry.is_symlink():
            return os.path.join(active[-1], entry.name)
        target = os.path.realpath(entry.path)
        for each in (self.real, *active):
            if each == target or each.startswith(target.rstrip(os.sep) + os.sep):
                where = self.argument if each == self.real else self.shown(target)
                link = f"{self.shown(entry.path)} -> {os.readlink(entry.path)}"
                self._not_followed[f"{link}, it leads back to {where}"] = None
                return None
        return target

    def shown(self, path: str | Path) -> str:
        """A path as seen from the root."""
        for root in (str(self.root), self.real):
            if str(path).startswith(root.rstrip(os.sep) + os.sep):
                return os.path.relpath(path, root)
        return str(path)


class _Walk:
    """Files called like pictures below a folder. Each real folder is walked once, by a path without links first."""

    def __init__(self, tree: Tree, folder: Path) -> None:
        self.tree, self.folder = tree, folder
        self._files: dict[Identity, list[Identity]] = {}
        self._inside: dict[Identity, list[Identity]] = {}
        self._again: list[Identity] = []

    def __iter__(self) -> Iterator[Found]:
        active: tuple[str, ...] = (os.path.realpath(self.folder),)
        now, later = [(str(self.folder), active, False)], deque[tuple[str, tuple[str, ...], bool]]()
        while now or later:
            path, active, linked = now.pop() if now else later.popleft()
            here = self._identity(path)
            if here in self._files:
                self._again.append(here)
                continue
            self._files[here], self._inside[here] = [], []
            for entry in self.tree.entries(path):
                plain = entry.is_file(follow_symlinks=False)
                if plain and not is_named_picture(entry.name):
                    continue
                status = status_of(entry)
                if not plain and (real := self.tree._enters(entry, status, active)) is not None:
                    self._inside[here].append(_identity_of(status))
                    if entry.is_symlink():
                        later.append((entry.path, (*active, real), True))
                    else:
                        now.append((entry.path, (*active[:-1], real), linked))
                elif not _is_folder(status) and is_named_picture(entry.name):
                    found = _found(entry, status, linked)
                    if found.identity is not None:
                        self._files[here].append(found.identity)
                    yield found

    def _identity(self, path: str) -> Identity:
        try:
            return _identity_of(os.stat(path))
        except OSError as error:
            raise TrainingError(f"{self.tree.argument}: the folder {path} can't be read ({error.strerror})") from error

    def met_again(self) -> set[Identity]:
        """Files in folders that links led to a second time."""
        todo, seen, files = list(self._again), set[Identity](), set[Identity]()
        while todo:
            folder = todo.pop()
            if folder not in seen:
                seen.add(folder)
                files.update(self._files[folder])
                todo += [each for each in self._inside[folder] if each in self._files]
        return files


def is_named_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def status_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of what a name leads to, or None where it leads to nothing."""
    try:
        return os.stat(entry.path)
    except OSError:
        return None


def _is_folder(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISDIR(status.st_mode)


def _identity_of(status: os.stat_result | None) -> Identity:
    assert status is not None
    return status.st_dev, status.st_ino


def _found(entry: os.DirEntry[str], status: os.stat_result | None, linked: bool) -> Found:
    regular = status is not None and stat.S_ISREG(status.st_mode)
    identity, size = (_identity_of(status), status.st_size) if regular and status is not None else (None, 0)
    return Found(Path(entry.path), identity, size, linked or entry.is_symlink())


def read_classes(tree: Tree, root: Path) -> Labelled:
    """Every picture below each folder of `root`; the folders' names, sorted, are the classes.

    Raises:
        TrainingError: if there is no class folder, or one without pictures.
    """
    folders = tree.folders(root)
    if not folders:
        loose = tree.loose(root)
        held = f"{loose} pictures and no folder" if loose else "no folder with pictures"
        raise TrainingError(f"DATA: {root} holds {held}: put each class's pictures into a folder named after the class")
    found: list[Found] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        here = tree.pictures(folder)
        if not here:
            raise TrainingError(
                f"DATA: {folder} holds no picture ({', '.join(sorted(SUFFIXES))}): add some, or remove the folder"
            )
        found += here
        labels += [label] * len(here)
    return Labelled(found, np.array(labels), tuple(folder.name for folder in folders))


class Layout(NamedTuple):
    """Where class folders are: those to train on, those held out (or None), and what was decided on the way."""

    train: Path
    val: Path | None
    notes: list[str]


def find_layout(tree: Tree, wanted: str | None) -> Layout:
    """Whether `train` and `val` in the root are a split or classes, by what is in them and beside them.

    Raises:
        TrainingError: if both could be meant, or `wanted` (split or classes) is not possible.
    """
    folders = [folder for folder in tree.folders(tree.root) if tree.holds_picture(folder)]
    train = [folder for folder in folders if _role(folder) == "train"]
    val = [folder for folder in folders if _role(folder) == "val"]
    others = [folder for folder in folders if _role(folder) is None]
    if wanted == "split":
        return _split_layout(tree, train, val, others, told=True)
    if wanted == "classes" or not (train or val):
        return Layout(tree.root, None, _loose_notes(tree, tree.root))
    nested = {folder: _nested(tree, folder) for folder in (*train, *val)}
    is_split = any(nested[folder] for folder in train)
    if not others:
        if not is_split:
            raise TrainingError(_no_class_folders(tree, train, val))
        return _split_layout(tree, train, val, others, told=False)
    _refuse_two_readings(tree, train, val, others, nested)
    return Layout(tree.root, None, _loose_notes(tree, tree.root) + [_is_class(f, nested[f]) for f in (*train, *val)])


def _role(folder: Path) -> str | None:
    name = folder.name.lower()
    if name in TRAIN_NAMES:
        return "train"
    return "val" if any(name in row for row in VAL_NAMES) else None


def _nested(tree: Tree, folder: Path) -> list[str]:
    """The names of the class folders in a folder."""
    return [each.name for each in tree.folders(folder) if tree.holds_picture(each)]


def _split_layout(tree: Tree, train: list[Path], val: list[Path], others: list[Path], told: bool) -> Layout:
    if not train:
        raise TrainingError(
            f"--layout is 'split' and DATA is {tree.root}: expected train/CLASS/PICTURE there, got "
            f"{_listed([f.name for f in (*val, *others)]) or 'no folder with pictures'}"
        )
    used = [_the_one(train)]
    labelled = [folder for folder in val if _nested(tree, folder)]
    for row in VAL_NAMES:
        if here := [folder for folder in labelled if folder.name.lower() in row]:
            used.append(_the_one(sorted(here, key=lambda folder: row.index(folder.name.lower()))))
            break
    if val and len(used) == 1:
        raise TrainingError(
            f"DATA: {val[0]} holds {tree.loose(val[0])} pictures and no folder: put each class's pictures into "
            f"a folder named after the class, as in {train[0]}, or move {val[0].name} away to hold out a part of "
            f"{train[0].name}"
        )
    unread = [folder.name for folder in (*val, *others) if folder not in used]
    notes = [note for folder in used for note in _loose_notes(tree, folder)]
    if unread:
        held_out = f", {used[1].name} is held out" if len(used) > 1 else ""
        told_so = " (--layout split)" if told else ""
        notes.append(f"{used[0].name} is trained on{held_out}{told_so}; not read: {_listed(unread)}")
    return Layout(used[0], used[1] if len(used) > 1 else None, notes)


def _the_one(folders: list[Path]) -> Path:
    if len(folders) > 1:
        raise TrainingError(
            f"DATA: {' and '.join(str(folder) for folder in folders)} mean the same: expected one of them; remove or "
            "rename the others, or set --layout classes if they are classes"
        )
    return folders[0]


def _no_class_folders(tree: Tree, train: list[Path], val: list[Path]) -> str:
    names = _listed([folder.name for folder in (*train, *val)])
    as_classes = f"; if {names} are classes, set --layout classes" if len(train) + len(val) > 1 else ""
    if not train:
        return (
            f"DATA is {tree.root}: it holds {names} and no train folder: expected train/CLASS/PICTURE beside "
            f"{val[0].name}{as_classes}"
        )
    return (
        f"DATA: {train[0]} holds {tree.loose(train[0])} pictures and no folder: put each class's pictures into "
        f"a folder named after the class{as_classes}"
    )


def _refuse_two_readings(
    tree: Tree, train: list[Path], val: list[Path], others: list[Path], nested: dict[Path, list[str]]
) -> None:
    trained, judged = ([folder for folder in role if nested[folder]] for role in (train, val))
    beside = _listed([folder.name for folder in others])
    if trained and judged:
        raise TrainingError(
            f"DATA is {tree.root}: {trained[0].name} and {judged[0].name} hold class folders, and {beside} lie beside "
            "them: set --layout split to read the two alone, or --layout classes if all of them are classes"
        )
    names = {same_looks(folder.name) for folder in others}
    for folder in (*trained, *judged):
        shared = [name for name in nested[folder] if same_looks(name) in names]
        if shared and folder in trained:
            raise TrainingError(
                f"DATA is {tree.root}: {_listed(shared)} lie both in it and in {folder.name}: set --layout split to "
                f"read {folder.name} alone, or --layout classes if {folder.name} is a class like {beside}"
            )
        if shared:
            raise TrainingError(
                f"DATA is {tree.root}: {_listed(shared)} lie both in it and in {folder.name}: move {beside} into a "
                f"folder train if {folder.name} is to be held out, or set --layout classes if it is a class like them"
            )


def _is_class(folder: Path, nested: list[str]) -> str:
    if _role(folder) == "train" and nested:
        return f"{folder.name} is read as a class, as folders lie beside it; --layout split reads it alone, as a split"
    return f"{folder.name} is read as a class, as folders lie beside it"


def _loose_notes(tree: Tree, folder: Path) -> list[str]:
    loose = tree.loose(folder) if tree.folders(folder) else 0
    where = f"in {folder.name}" if folder != tree.root else "in DATA"
    return [f"{count(loose, 'picture')} {where} beside the class folders: not read"] if loose else []


def same_looks(name: str) -> str:
    """What names that differ only in case or in Unicode's normal form have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def look_alikes(names: Iterable[str]) -> list[str]:
    """A note for each group of class names that look the same."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(same_looks(name), []).append(name)
    return [
        f"classes whose names differ only in case or Unicode's normal form: {', '.join(map(ascii, group))}"
        for group in groups.values()
        if len(group) > 1
    ]


def count(number: int, one: str, more: str = "") -> str:
    """1 picture, 2 pictures."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _first_of(what: str, several: Sequence[str]) -> list[str]:
    notes = [what + each for each in several[:SHOWN]]
    return [*notes, f"{what}{len(several) - SHOWN} more"] if len(several) > SHOWN else notes
