"""The demo's picture: the photos with what the network says, and each block's memory traffic, eager and fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmbconv.cli.extras import require
from fastmbconv.traffic import Traffic

EAGER, FUSED, INK, FAINT = "#b9bec7", "#0b6e99", "#1f2430", "#6b7280"


@dataclass(frozen=True)
class Panel:
    """One photo: its pixels [H, W, 3], and lines of text for below it, the first one emphasised."""

    pixels: np.ndarray
    lines: Sequence[str]


def draw(
    path: Path,
    title: str,
    panels: Sequence[Panel],
    blocks: Sequence[str],
    traffic: Sequence[Traffic],
    itemsize: int,
    footer: str,
) -> None:
    """Write the picture; its format follows from the path's suffix. `traffic` is in elements, per image."""
    require("matplotlib", "plot").use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(14, 9), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
        2, 1, height_ratios=(0.75, 1), hspace=0.46, left=0.055, right=0.985, top=0.92, bottom=0.145
    )
    top = grid[0].subgridspec(1, len(panels), wspace=0.08)
    for index, panel in enumerate(panels):
        _photo(figure.add_subplot(top[index]), panel)
    bottom = grid[1].subgridspec(1, 2, wspace=0.14)
    megabytes = itemsize / 1e6
    _bars(
        figure.add_subplot(bottom[0]),
        "Inference: one forward",
        blocks,
        [t.eager_inference * megabytes for t in traffic],
        [t.fused_inference * megabytes for t in traffic],
    )
    _bars(
        figure.add_subplot(bottom[1]),
        "Training: one forward and backward",
        blocks,
        [t.eager_training * megabytes for t in traffic],
        [t.fused_training * megabytes for t in traffic],
    )
    figure.text(0.02, 0.962, title, fontsize=15, color=INK, weight="bold")
    figure.text(0.02, 0.022, footer, fontsize=9.5, color=FAINT, linespacing=1.4)
    try:
        figure.savefig(path)
    finally:
        plt.close(figure)


def _photo(axes: Any, panel: Panel) -> None:
    axes.imshow(panel.pixels)
    axes.set_axis_off()
    for row, line in enumerate(panel.lines):
        axes.text(
            0.5,
            -0.05 - 0.12 * row,
            line,
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=11 if row == 0 else 9,
            weight="bold" if row == 0 else "normal",
            color=INK if row == 0 else FAINT,
        )


def _bars(axes: Any, title: str, names: Sequence[str], eager: Sequence[float], fused: Sequence[float]) -> None:
    rows = np.arange(len(names))
    axes.bar(rows - 0.2, eager, 0.4, color=EAGER, label=f"eager: {sum(eager):.0f} MB in all")
    axes.bar(rows + 0.2, fused, 0.4, color=FUSED, label=f"fused: {sum(fused):.0f} MB in all")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_ylabel("memory traffic per image, MB", color=FAINT)
    axes.set_xlabel("block", color=FAINT)
    axes.set_xticks(rows, names, fontsize=8)
    axes.legend(frameon=False, fontsize=10)
    axes.tick_params(colors=FAINT, length=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
