"""Files that are whole or not there: written beside their place, forced to the disk, and then renamed."""

from __future__ import annotations

import errno
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastmbconv.sources.facts import RUN_PARTS, is_run
from fastmbconv.sources.reading import CheckpointError, read_stored
from fastmbconv.training.errors import TrainingError

LAST, BEST = "last.pt", "best.pt"
# What a run goes on from, beside what every checkpoint says of its run.
STATE = ("epoch", "position", "step", "history", "best", "broken", "sums", "sizes", "model", "average", "optimizer")


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint in one piece; an interruption or a full disk leaves the file that was there.

    Raises:
        TrainingError: if the disk is full or not writable.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, content: bytes | memoryview) -> None:
    """As `save`, for any bytes."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full: make room" if full else f"{error.strerror or error}"
        kept = f"; the last good one is still there, and --resume goes on from it: {path}" if path.exists() else ""
        raise TrainingError(f"{path.name} could not be written, {reason}{kept}") from error


def load(path: Path) -> dict[str, Any]:
    """A checkpoint that `save` wrote, on the CPU; tensors and plain values only.

    Raises:
        TrainingError: if it can't be read, or is something else.
    """
    try:
        content = read_stored(path).content
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
    if not is_run(content):
        raise TrainingError(f"{path} is no checkpoint of `fastmbconv train`")
    if missing := [name for name, kind in RUN_PARTS.items() if not isinstance(content.get(name), kind)]:
        raise TrainingError(f"{path} is damaged: it has no {missing[0]}")
    return content


def load_last(folder: Path) -> dict[str, Any]:
    """The state that a run goes on from.

    Raises:
        TrainingError: as `load`; it says so if there is a whole `BEST` to start from instead.
    """
    try:
        state = load(folder / LAST)
        if missing := [name for name in STATE if name not in state]:
            raise TrainingError(f"{folder / LAST} is no state of a run to go on from: it has no {missing[0]}")
        return state
    except TrainingError as error:
        try:
            epoch = load(folder / BEST)["metrics"]["epoch"]
        except TrainingError:
            raise error from None
        raise TrainingError(
            f"{error}; {folder / BEST} is whole, the weights after epoch {epoch:.0f}: --weights {folder / BEST} with "
            "another --output starts from them"
        ) from error
