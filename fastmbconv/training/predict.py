"""The likeliest classes of single pictures, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import nn

from fastmbconv.training.loader import eval_transform
from fastmbconv.training.pictures import PictureError, open_picture
from fastmbconv.training.report import save
from fastmbconv.training.restore import Trained

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

INK, FAINT, BAR, REST = "#1f2430", "#6b7280", "#7fb8d4", "#dbe4ea"
COLUMNS, THUMBNAIL = 3, 480


@dataclass(frozen=True)
class Guess:
    """A picture's likeliest classes and their probabilities, the likeliest first."""

    path: Path
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.inference_mode()
def predict(
    trained: Trained, model: nn.Module, paths: Sequence[Path], top: int, device: torch.device, batch: int = 32
) -> tuple[list[Guess], dict[Path, str]]:
    """Guesses in the order of `paths`, and the reason for each picture that can't be read."""
    transform = eval_transform(trained.look)
    guesses: list[Guess] = []
    broken: dict[Path, str] = {}
    for start in range(0, len(paths), batch):
        good, tensors = [], []
        for path in paths[start : start + batch]:
            try:
                tensors.append(transform(open_picture(path)))
                good.append(path)
            except PictureError as error:
                broken[path] = str(error)
        if not good:
            continue
        shares = model(torch.stack(tensors).to(device)).float().softmax(1)
        values, indices = (part.cpu().tolist() for part in shares.topk(min(top, len(trained.classes)), 1))
        for path, row, chosen in zip(good, values, indices, strict=True):
            guesses.append(Guess(path, tuple(trained.classes[i] for i in chosen), tuple(row)))
    return guesses, broken


def draw(path: Path, guesses: Sequence[Guess]) -> None:
    """Each picture with its classes as bars below it."""
    columns = min(COLUMNS, len(guesses))
    rows = -(-len(guesses) // columns)
    figure = plt.figure(figsize=(4.2 * columns, 4.6 * rows), dpi=100, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.2, 1] * rows)
    for index, guess in enumerate(guesses):
        row, column = divmod(index, columns)
        _picture(figure.add_subplot(grid[2 * row, column]), guess)
        _bars(figure.add_subplot(grid[2 * row + 1, column]), guess)
    save(figure, path)


def _picture(axes: Any, guess: Guess) -> None:
    picture = open_picture(guess.path)
    small = max(picture.size) < 64
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    axes.imshow(picture, interpolation="nearest" if small else "antialiased")
    axes.set_axis_off()
    axes.set_title(guess.path.name, fontsize=9, color=FAINT)


def _bars(axes: Any, guess: Guess) -> None:
    places = range(len(guess.names))
    axes.barh(places, guess.probabilities, color=[BAR, *[REST] * (len(guess.names) - 1)], height=0.8)
    for place, name, share in zip(places, guess.names, guess.probabilities, strict=True):
        weight = "bold" if place == 0 else "normal"
        axes.text(0.015, place, f"{name}", va="center", fontsize=9, color=INK, weight=weight)
        axes.text(1.0, place, f"{share:.1%}", va="center", ha="right", fontsize=9, color=INK, weight=weight)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(guess.names) - 0.5, -0.5)
    axes.set_axis_off()
