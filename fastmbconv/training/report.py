"""What stays of a run for people: curves, a confusion matrix, a table, history.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from rich.table import Table
from torch import Tensor

from fastmbconv.training import checkpoint
from fastmbconv.training.errors import TrainingError
from fastmbconv.training.lettering import lettering

if TYPE_CHECKING:
    from fastmbconv.training.loop import Trainer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

INK, FAINT, FIRST, SECOND, THIRD = "#1f2430", "#6b7280", "#0b6e99", "#c2571a", "#5b8c3e"
COLUMNS = {
    "epoch": "{:.0f}",
    "rate": "{:.3g}",
    "train_loss": "{:.4f}",
    "val_loss": "{:.4f}",
    "val_top1": "{:.2%}",
    "val_top5": "{:.2%}",
    "images_per_second": "{:.0f}",
}
ROWS = 10
NAMED_CLASSES, NUMBERED_CLASSES, NAME_WIDTH = 40, 15, 20


def finish(trainer: Trainer) -> None:
    """Write the pictures and history.json, and print the table."""
    output, history, log = trainer.output, trainer.history, trainer.log
    checkpoint.write(output / "history.json", json.dumps(history, indent=1).encode())
    draw_curves(output / "curves.png", history, mixed=trainer.mix is not None)
    written = ["curves.png"]
    if trainer.evaluation is not None:
        for note in draw_confusion(output / "confusion.png", trainer.evaluation.confusion, trainer.classes):
            log.say(note)
        written.append("confusion.png")
    log.console.print(table(history))
    best = max(history, key=lambda row: row["val_top1"])
    log.say(f"best: epoch {best['epoch']:.0f}, top-1 {best['val_top1']:.2%}, top-5 {best['val_top5']:.2%}, held out")
    if trainer.broken:
        log.say(f"skipped {len(trainer.broken)} pictures that could not be read")
    log.say(f"{output}: {', '.join((checkpoint.BEST, checkpoint.LAST, 'config.toml', 'history.json', *written))}")


def table(history: Sequence[dict[str, float]]) -> Table:
    """The best epoch and some others, evenly spaced, up to the last one."""
    out = Table(*(name.replace("_", " ") for name in COLUMNS), box=None, header_style="bold")
    best = max(range(len(history)), key=lambda i: history[i]["val_top1"])
    shown = {round(i) for i in np.linspace(0, len(history) - 1, ROWS)} | {best}
    for index in sorted(shown):
        row = history[index]
        cells = (form.format(row[name]) for name, form in COLUMNS.items())
        out.add_row(*cells, style="bold" if index == best else "")
    return out


def draw_curves(path: Path, history: Sequence[dict[str, float]], mixed: bool) -> None:
    """Loss and accuracy by epoch. With MixUp or CutMix the answers in training say little, and are left out."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=110, layout="constrained")
    for key, colour, label in (("train_loss", SECOND, "training"), ("val_loss", FIRST, "held out")):
        left.plot(epochs, [row[key] for row in history], color=colour, label=label, marker=_marker(epochs))
    shares = [("val_top5", THIRD, "held out, top-5"), ("val_top1", FIRST, "held out, top-1")]
    if not mixed:
        shares.append(("train_top1", SECOND, "training, top-1"))
    for key, colour, label in shares:
        right.plot(epochs, [row[key] for row in history], color=colour, label=label, marker=_marker(epochs))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, title in ((left, "Loss"), (right, "Right answers")):
        _plain(axes, title)
        axes.set_xlabel("epoch", color=FAINT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.legend(frameon=False)
    save(figure, path)


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str]) -> list[str]:
    """Rows are the true classes, each summing to 1; cells have their counts where there is room.

    Returns:
        A note for what no installed font can draw.
    """
    named = classes if len(classes) <= NAMED_CLASSES else ()
    with lettering(named) as letters:
        _draw_confusion(path, confusion, letters.labels(named, NAME_WIDTH))
    return letters.notes()


def _draw_confusion(path: Path, confusion: Tensor, names: Sequence[str]) -> None:
    counts = confusion.numpy().astype(float)
    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(2.5 + 0.42 * size, 4.5, 12))
    figure, axes = plt.subplots(figsize=(side + 1, side), dpi=110, layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, format=PercentFormatter(1.0), label="share of the true class")
    right = counts.trace() / max(counts.sum(), 1)
    _plain(axes, f"{right:.2%} of {counts.sum():.0f} right")
    axes.set_xlabel("predicted", color=FAINT)
    axes.set_ylabel("true", color=FAINT)
    if names:
        long = max(map(len, names)) > 3
        axes.set_xticks(range(size), names, rotation=90 if long else 0, fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
    if size <= NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else INK
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=8, color=colour)
    save(figure, path)


def _marker(epochs: Sequence[float]) -> str:
    return "o" if len(epochs) < 15 else ""


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.tick_params(colors=FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it.

    Raises:
        TrainingError: if it can't be written there, or the name ends in no format of pictures.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(f"the picture {path} can't be written: {reason}") from error
    finally:
        plt.close(figure)
