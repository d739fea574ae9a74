"""The report's picture: our speedup over every peer, by model and block, a panel per GPU."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import Device, Timing, describe, name_model, sort_key
from benchmarks.record import GRAPHED
from fastmbconv.cli.extras import require

NAME = "measured.png"
WIN, LOSS, INK, FAINT, GRID = "#0b6e99", "#c2412d", "#1f2430", "#6b7280", "#e5e7eb"
PEERS = {  # marker and colour; others take what is left
    "eager-nhwc": ("o", "#6b7280"),
    "eager-nchw": ("s", "#b9bec7"),
    "compile": ("^", "#d98c3f"),
    "max-autotune": ("v", "#8a5a20"),
    "reduce-overhead": ("P", "#a3843b"),
    "eager-graph": ("D", "#4a7d62"),
}
OTHERS = ("X", "*", "h", "<", ">")
ROW, LABELS, PANEL, FIGURES = 0.25, 3.4, 4.2, 2.7  # inches: a row's height, names, a panel's width, figures beside it
TOP, BOTTOM, ENTRY = 1.2, 0.4, 1.45  # above and below the panels; an entry of the legend
TICKS = (1, 2, 0.5, 4, 3, 1.5, 0.75, 10, 0.1, 6, 0.25, 20, 100, 0.01, 50, 8)  # by importance: kept where there is room
GAP, MARGIN = 0.4, 0.12  # inches between ticks; left of everything


NOTE = "A peer's time over ours, logarithmic. Bars end at the fastest peer, marks are all. Left of 1x ours is slower."


@dataclass(frozen=True)
class Line:
    """A row of the picture: a heading, or a name with a timing per GPU. A text stands where a comparison failed."""

    name: str
    timings: tuple[Timing | str | None, ...] = ()
    heading: bool = False
    strong: bool = False


def draw(gpus: Sequence[Device]) -> bytes | None:
    """The picture as a PNG; None where nothing was compared. Without matplotlib: CommandError says how to get it."""
    gpus = [device for device in gpus if _has_timing(list_lines([device]))]
    if not gpus:
        return None
    lines = list_lines(gpus)
    require("matplotlib", "plot").use("Agg")
    from matplotlib import pyplot as plt

    styles = _choose_styles(lines)
    width = LABELS + len(gpus) * (PANEL + FIGURES)
    columns = min(len(styles) + 2, int(width / ENTRY))
    bottom = BOTTOM + 0.22 * math.ceil((len(styles) + 2) / columns)
    height = TOP + bottom + ROW * (_place_rows(lines)[-1] + 1.5)
    figure, panels = plt.subplots(1, len(gpus), figsize=(width, height), dpi=110, squeeze=False, sharey=True)
    figure.patch.set_facecolor("white")
    figure.subplots_adjust(
        left=LABELS / width,
        right=1 - FIGURES / width,
        top=1 - TOP / height,
        bottom=bottom / height,
        wspace=FIGURES / PANEL,
    )
    limits = _choose_limits(lines)
    for index, (axes, device) in enumerate(zip(panels[0], gpus, strict=True)):
        _draw_panel(axes, device, lines, index, styles, limits)
    _label_rows(panels[0][0], lines)
    left = MARGIN / width
    figure.text(left, 1 - 0.32 / height, "Speedup of fastmbconv over each peer", fontsize=14, color=INK, weight="bold")
    figure.text(left, 1 - 0.56 / height, NOTE, fontsize=9, color=FAINT)
    marks = [plt.Line2D([], [], marker=m, color=c, linestyle="", label=name) for name, (m, c) in styles.items()]
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=WIN, label="over the best peer"),
        plt.Rectangle((0, 0), 1, 1, color=LOSS, hatch="////", fill=False, label="slower than it"),
        *marks,
    ]
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.2 * left, 0), ncols=columns, frameon=False, fontsize=8.5,
        labelcolor=INK, handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
    return buffer.getvalue()


def list_lines(gpus: Sequence[Device]) -> list[Line]:
    """Models first, then each model's blocks under their sum, in the dtype that most was measured in."""
    groups: dict[str, dict[tuple[Any, ...], tuple[str, bool, dict[int, Timing | str]]]] = {}

    def add(group: str, order: tuple[Any, ...], name: str, index: int, timing: Timing | str, strong: bool) -> None:
        groups.setdefault(group, {}).setdefault((order, name), (name, strong, {}))[2][index] = timing

    for index, device in enumerate(gpus):
        for comparison in (*device.comparisons("model"), *device.comparisons("model", GRAPHED)):
            row, graphed = comparison.row, comparison.ours == GRAPHED
            if row.get("dtype", device.dtype) == device.dtype:
                group = "Whole models, training step" if row.get("mode") == "fwd_bwd" else "Whole models, inference"
                name = describe(row) + (", CUDA graph" if graphed else "")
                found = comparison.timing or f"no figure: {comparison.why}"
                add(group, (row.get("model", "~"), len(row["what"]), row["what"], graphed), name, index, found, False)
        for trunk in device.trunks():
            if trunk.dtype == device.dtype:
                blocks = "all blocks" if trunk.blocks == trunk.total else f"{trunk.blocks} of {trunk.total} blocks"
                name = f"{blocks}, as often as they occur"
                add(_name_group(trunk.model, trunk.mode), ("", 0), name, index, trunk.timing, True)
        for comparison in device.comparisons("block"):
            row = comparison.row
            if row.get("dtype", device.dtype) == device.dtype:
                group = _name_group(row["what"].split()[1].partition(".")[0], row.get("mode", ""))
                found = comparison.timing or f"no figure: {comparison.why}"
                add(group, sort_key(row), describe(row), index, found, False)
    lines = []
    for group in sorted(groups, key=lambda name: (not name.startswith("Whole"), name.endswith("inference"), name)):
        lines.append(Line(group, heading=True))
        for _, (name, strong, timings) in sorted(groups[group].items(), key=lambda item: item[0]):
            lines.append(Line(name, tuple(timings.get(index) for index in range(len(gpus))), strong=strong))
    return lines


def _has_timing(lines: Sequence[Line]) -> bool:
    return any(isinstance(each, Timing) and each.best for line in lines for each in line.timings)


def _place_rows(lines: Sequence[Line]) -> list[float]:
    """Where each line stands, counted in rows from the top: half a row is free above a heading."""
    place = -1.0
    places: list[float] = []
    for line in lines:
        place += 1.5 if line.heading and places else 1.0
        places.append(place)
    return places


def _name_group(model: str, mode: str) -> str:
    return f"{name_model(model)} blocks, {'inference' if mode == 'fwd_no_grad' else 'forward + backward'}"


def _name_commits(device: Device) -> str:
    quoted = [device.build(comparison.run) for kind in ("model", "block") for comparison in device.comparisons(kind)]
    names = [build.name for build in device.builds if any(build is other for other in quoted)]
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}"


def _list_ratios(timing: Timing) -> dict[str, float]:
    return {name: time / timing.ours for name, time in timing.peers.items()}


def _choose_styles(lines: Sequence[Line]) -> dict[str, tuple[str, str]]:
    peers = {name for line in lines for each in line.timings if isinstance(each, Timing) for name in each.peers}
    others = dict(zip(sorted(peers.difference(PEERS)), ((marker, INK) for marker in OTHERS), strict=False))
    return {name: style for name, style in (PEERS | others).items() if name in peers}


def _choose_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """The same for all panels, with 1x well inside."""
    timings = [each for line in lines for each in line.timings if isinstance(each, Timing)]
    ratios = [ratio for timing in timings for ratio in _list_ratios(timing).values()]
    return min(0.8, min(ratios) / 1.1), max(2.0, max(ratios) * 1.1)


def _choose_ticks(limits: tuple[float, float]) -> list[float]:
    inches = PANEL / math.log(limits[1] / limits[0])
    kept: list[float] = []
    for tick in (tick for tick in TICKS if limits[0] <= tick <= limits[1]):
        if all(abs(math.log(tick / other)) * inches >= GAP for other in kept):
            kept.append(tick)
    return kept


def _draw_panel(
    axes: Any,
    device: Device,
    lines: Sequence[Line],
    index: int,
    styles: dict[str, tuple[str, str]],
    limits: tuple[float, float],
) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    places = _place_rows(lines)
    axes.set_ylim(places[-1] + 0.75, -0.75)
    for place, line in zip(places, lines, strict=True):
        each = line.timings[index] if line.timings else None
        if isinstance(each, Timing) and each.best:
            _draw_timing(axes, place, each, styles, line.strong)
        elif not line.heading:
            text = "not measured" if each is None else "no peer ran" if isinstance(each, Timing) else each
            color = FAINT if each is None else LOSS
            text = textwrap.shorten(text, 68, placeholder=" ...")
            axes.text(1.03, place, text, fontsize=8.5, va="center", color=color, style="italic", parse_math=False)
    axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
    ticks = _choose_ticks(limits)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(colors=FAINT, length=0, labelsize=9)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        f"{device.name}\n{_name_commits(device)}, {device.dtype}", loc="left", fontsize=10, color=INK, linespacing=1.4
    )


def _draw_timing(axes: Any, place: float, timing: Timing, styles: dict[str, tuple[str, str]], strong: bool) -> None:
    """A bar from 1x to the best peer, a mark for every peer, and the figure beside the panel."""
    speedup, loss = timing.speedup or 1.0, (timing.speedup or 1.0) < 1
    axes.barh(
        place, speedup - 1, left=1, height=0.62, color="white" if loss else WIN, edgecolor=LOSS if loss else WIN,
        hatch="////" if loss else None, linewidth=1.0, zorder=2,
    )  # fmt: skip
    for name, ratio in _list_ratios(timing).items():
        marker, color = styles.get(name, ("o", INK))
        axes.plot(
            ratio, place, marker, color=color, markersize=5.5, markeredgecolor="white", markeredgewidth=0.7, zorder=4
        )
    figure = f"{min(speedup, 0.99):.2f}x, slower than {timing.best}" if loss else f"{speedup:.2f}x over {timing.best}"
    axes.text(
        1.02, place, figure, transform=axes.get_yaxis_transform(), fontsize=8.5, va="center",
        color=LOSS if loss else INK, weight="bold" if loss or strong else "normal",
    )  # fmt: skip


def _label_rows(axes: Any, lines: Sequence[Line]) -> None:
    for place, line in zip(_place_rows(lines), lines, strict=True):
        color = INK if line.heading or line.strong else FAINT
        weight = "bold" if line.heading or line.strong else "normal"
        indent = (MARGIN - LABELS if line.heading else 2.5 * MARGIN - LABELS) / PANEL
        axes.text(
            indent, place, line.name, transform=axes.get_yaxis_transform(), fontsize=9, va="center", color=color,
            weight=weight,
        )  # fmt: skip
    axes.set_yticks([])
