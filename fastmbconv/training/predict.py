"""The likeliest classes of single pictures, and a picture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import nn

from fastmbconv.training.lettering import lettering
from fastmbconv.training.loader import eval_transform
from fastmbconv.training.names import shorten
from fastmbconv.training.pictures import PictureError, open_picture
from fastmbconv.training.report import save
from fastmbconv.training.restore import Trained

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

INK, FAINT, BAR, REST = "#1f2430", "#6b7280", "#7fb8d4", "#dbe4ea"
COLUMNS, THUMBNAIL, NAME_WIDTH, TITLE_WIDTH = 3, 480, 36, 44


@dataclass(frozen=True)
class Guess:
    """A picture's likeliest classes, by their places and names, and their probabilities, the likeliest first."""

    path: Path
    classes: tuple[int, ...]
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
            guesses.append(Guess(path, tuple(chosen), tuple(trained.classes[i] for i in chosen), tuple(row)))
    return guesses, broken


def draw(path: Path, guesses: Sequence[Guess]) -> list[str]:
    """Each picture with its classes as bars below it.

    Returns:
        A note for what no installed font can draw.
    """
    names = {place: name for guess in guesses for place, name in zip(guess.classes, guess.names, strict=True)}
    with lettering([*names.values(), *(guess.path.name for guess in guesses)]) as letters:
        labels = dict(zip(names, letters.labels(list(names.values()), NAME_WIDTH, names), strict=True))
        files = list({guess.path.name: None for guess in guesses})
        titles = dict(zip(files, shorten([letters.escape(name) for name in files], TITLE_WIDTH), strict=True))
        columns = min(COLUMNS, len(guesses))
        rows = -(-len(guesses) // columns)
        figure = plt.figure(figsize=(4.2 * columns, 4.6 * rows), dpi=100, facecolor="white", layout="constrained")
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.2, 1] * rows)
        for index, guess in enumerate(guesses):
            row, column = divmod(index, columns)
            _picture(figure.add_subplot(grid[2 * row, column]), guess, titles[guess.path.name])
            _bars(figure.add_subplot(grid[2 * row + 1, column]), guess, labels)
        save(figure, path)
    return letters.notes()


def _picture(axes: Any, guess: Guess, title: str) -> None:
    picture = open_picture(guess.path)
    small = max(picture.size) < 64
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    axes.imshow(picture, interpolation="nearest" if small else "antialiased")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, color=FAINT)


def _bars(axes: Any, guess: Guess, labels: Mapping[int, str]) -> None:
    places = range(len(guess.names))
    axes.barh(places, guess.probabilities, color=[BAR, *[REST] * (len(guess.names) - 1)], height=0.8)
    for place, number, share in zip(places, guess.classes, guess.probabilities, strict=True):
        weight = "bold" if place == 0 else "normal"
        axes.text(0.015, place, labels[number], va="center", fontsize=9, color=INK, weight=weight)
        axes.text(1.0, place, f"{share:.1%}", va="center", ha="right", fontsize=9, color=INK, weight=weight)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(guess.names) - 0.5, -0.5)
    axes.set_axis_off()
