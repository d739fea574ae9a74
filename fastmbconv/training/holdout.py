"""Holding out a part of each class where some pictures must stay together, within a class or across classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastmbconv.training.errors import TrainingError

TRIES = 20  # changes per class, to give each class pictures on both sides


def hold_out(
    members: Sequence[np.ndarray],
    counts: Sequence[int],
    groups: np.ndarray,
    classes: Sequence[str],
    generator: np.random.Generator,
) -> np.ndarray:
    """The pictures to hold out: about `counts` of each class, in the order of `members`, groups whole.

    Raises:
        TrainingError: if a class would have none on one side.
    """
    sizes = [Counter(groups[each].tolist()) for each in members]
    for name, size, here in zip(classes, sizes, members, strict=True):
        if len(size) < 2:
            raise TrainingError(
                f"DATA: class {name!r} has {len(here)} pictures that are all copies of one: it needs one to train and "
                "another to test; add some, make a val folder, or set --duplicates ignore"
            )
    held: dict[int, bool] = {}
    for each, target, size in zip(members, counts, sizes, strict=True):
        out = sum(number for key, number in size.items() if held.get(key, False))
        for key in groups[each].tolist():
            if key not in held:
                held[key] = out + size[key] <= target
                out += size[key] * held[key]
    _give_both_sides(held, counts, sizes, classes, generator)
    return np.flatnonzero([held[key] for key in groups.tolist()])


def _give_both_sides(
    held: dict[int, bool],
    counts: Sequence[int],
    sizes: Sequence[Counter[int]],
    classes: Sequence[str],
    generator: np.random.Generator,
) -> None:
    """Move groups until no class lies on one side: each time the one that leaves the fewest such classes."""
    having: dict[int, list[int]] = {}
    for label, size in enumerate(sizes):
        for key in size:
            having.setdefault(key, []).append(label)
    out = [sum(number for key, number in size.items() if held[key]) for size in sizes]
    totals = [size.total() for size in sizes]
    one_sided = {label for label in range(len(sizes)) if out[label] in (0, totals[label])}

    def cost(key: int) -> tuple[int, int]:
        moved = [
            (label, out[label] + (-sizes[label][key] if held[key] else sizes[label][key])) for label in having[key]
        ]
        bad = sum(now in (0, totals[label]) for label, now in moved)
        good = sum(label in one_sided for label, _ in moved)
        return bad - good, sum(abs(now - counts[label]) for label, now in moved)

    for _ in range(TRIES * len(sizes)):
        if not one_sided:
            return
        label = min(one_sided)
        keys = list(sizes[label])
        # A random one now and then, so that two classes don't take a group from each other for ever.
        key = min(keys, key=cost) if generator.random() < 0.8 else keys[int(generator.integers(len(keys)))]
        held[key] = not held[key]
        for label in having[key]:
            out[label] += sizes[label][key] if held[key] else -sizes[label][key]
            (one_sided.add if out[label] in (0, totals[label]) else one_sided.discard)(label)
    if one_sided:
        name = classes[min(one_sided)]
        raise TrainingError(
            f"DATA: class {name!r} shares its pictures, by links or copies, with other classes so that none can be "
            "held out apart from those trained on: make a val folder, or set --duplicates ignore"
        )
