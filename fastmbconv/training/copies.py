"""The same file, or the same bytes, at two places of a folder of pictures: what that means for labels and splits."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from fastmbconv.training.errors import TrainingError
from fastmbconv.training.folders import Found, Labelled, count

EDGE = 4096
MOST_READ = 200_000  # files whose ends are read, up to 8 KiB of each, at each start of each process

Key = TypeVar("Key", bound=Hashable)


class Groups(NamedTuple):
    """A number for each entry; equal numbers: the same real file, or the same bytes.

    unread: files of equal size, where they are more than are read.
    """

    files: np.ndarray
    contents: np.ndarray
    unread: int = 0


def group(found: Sequence[Found], look: bool) -> Groups:
    """Which entries are the same; contents are read only if asked to look."""
    keys: list[Hashable] = [each.identity or each.path for each in found]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    files = np.array([numbers[key] for key in keys], dtype=np.int64)
    if not look:
        return Groups(files, files)
    first: dict[Hashable, Hashable] = {}
    real = {each.identity: each for each in found if each.identity and each.size}
    candidates = sum(len(same) for _, same in _several(real.values(), lambda each: each.size))
    if candidates > MOST_READ:
        return Groups(files, files, candidates)
    for copies in _copies(real.values()):
        first.update({each.identity: copies[0].identity for each in copies})
    contents = [numbers[first.get(key, key)] for key in keys]
    return Groups(files, np.array(contents, dtype=np.int64))


def _copies(files: Iterable[Found]) -> list[list[Found]]:
    """Real files with the same bytes: of equal size, then equal at both ends, then equal."""
    out: list[list[Found]] = []
    for size, same_size in _several(files, lambda each: each.size):
        for _, same_ends in _several(same_size, _hash_ends):
            if size <= 2 * EDGE:
                out.append(same_ends)
            else:
                out += [same for _, same in _several(same_ends, _hash_all)]
    return out


def _several(files: Iterable[Found], key: Callable[[Found], Key | None]) -> list[tuple[Key, list[Found]]]:
    groups: dict[Key, list[Found]] = defaultdict(list)
    for each in files:
        if (value := key(each)) is not None:
            groups[value].append(each)
    return [(value, group) for value, group in groups.items() if len(group) > 1]


def _hash_ends(found: Found) -> bytes | None:
    try:
        with open(found.path, "rb") as file:
            ends = file.read(EDGE)
            file.seek(max(EDGE, found.size - EDGE))
            return hashlib.blake2b(ends + file.read(EDGE)).digest()
    except OSError:  # whoever opens it as a picture says so
        return None


def _hash_all(found: Found) -> bytes | None:
    try:
        with open(found.path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None


def judge(train: Labelled, val: Labelled | None, mode: str) -> tuple[Groups, list[str]]:
    """Groups over the entries of both, and notes on what is the same.

    Raises:
        TrainingError: with mode `error`, if a real file has two classes, or a file or its copy is trained on and held
            out.
    """
    found = train.found + (val.found if val is not None else [])
    groups = group(found, look=mode != "ignore")
    if mode == "ignore":
        return groups, []
    facts: list[str] = []
    advice: list[str] = []
    notes: list[str] = []
    if groups.unread:
        notes.append(
            f"{groups.unread} pictures have the size of another one, more than {MOST_READ}: their contents are not "
            "compared, so copies are not found (links are)"
        )
    cut = len(train.found)
    for where, part in ((slice(0, cut), train), (slice(cut, None), val)):
        if part is None:
            continue
        number, pair = _torn(groups.files[where], part.labels, part.found)
        if pair:
            facts.append(f"{count(number, 'file has', 'files have')} two classes, by links; the first is {_both(pair)}")
            advice.append("remove one of the two")
        number, pair = _torn(groups.contents[where], part.labels, part.found, groups.files[where])
        if pair:
            told = count(number, "picture has a copy", "pictures have copies")
            notes.append(f"{told} under another class; the first is {_both(pair)}")
    if val is not None:
        number, pair = _torn(groups.contents, np.arange(len(found)) >= cut, found)
        if pair:
            told = count(number, "picture is", "pictures are")
            facts.append(f"{told} trained on and held out too, by links or copies; the first is {_both(pair)}")
            advice.append("what is trained on can't be judged by: remove one of the two")
    if facts and mode == "error":
        told = "; and ".join(f"{fact}: {what}" for fact, what in zip(facts, advice, strict=True))
        raise TrainingError(f"DATA: {told}, or go on with --duplicates warn")
    return groups, facts + notes


def _torn(
    groups: np.ndarray, labels: np.ndarray, found: Sequence[Found], files: np.ndarray | None = None
) -> tuple[int, tuple[Found, Found] | None]:
    """How many groups have entries under different labels, and the first two such entries, of two files if given."""
    first: dict[int, int] = {}
    torn: dict[int, tuple[int, int]] = {}
    for index, (number, label) in enumerate(zip(groups.tolist(), labels.tolist(), strict=True)):
        before = first.setdefault(number, index)
        apart = files is None or files[before] != files[index]
        if apart and number not in torn and labels[before] != label:
            torn[number] = (before, index)
    pair = next(iter(torn.values()), None)
    return len(torn), (found[pair[0]], found[pair[1]]) if pair else None


def _both(pair: tuple[Found, Found] | None) -> str:
    assert pair is not None
    return " and ".join(os.fspath(each.path) for each in pair)
