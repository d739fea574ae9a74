"""benchmarks/results/README.md: every row of every result file, and the kernels that are furthest from their floor."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report_plot
from benchmarks.figures import Device, Kernel, format_speedup, list_errors, pick_times
from benchmarks.record import GRAPHED, OURS, Row, Run

FOLDED = 40  # rows from which a table is folded
LISTED = 12  # kernels that the terminal shows
CANDIDATES = (OURS, GRAPHED, "eager-nhwc", "eager-nchw", "eager-graph", "compile", "reduce-overhead", "max-autotune")
SHOWN = ("section", "what", "model", "count", "mode", "dtype", "results", "best_peer", "speedup", "problems", "errors")
LOST_HEAD = ("kernel", "launches", "us", "floor us", "lost us", "of its floor", "lost most in")

Cells = Sequence[str]


def format_rows(gpus: list[Device], link: Callable[[Path], str], plot: bool) -> str:
    """Markdown below the marker: the newest run first, nothing left out."""
    parts = [f"![Speedup over each peer, by block and model]({report_plot.NAME})"] if plot else []
    for device in gpus:
        kernels = device.kernels()
        if kernels:
            parts += [f"## Furthest from their floor: {device.name}", _sum_lost(kernels)]
            parts.append(_join(LOST_HEAD, [_format_kernel(kernel) for kernel in kernels]))
    runs = {run.path: run for device in gpus for build in device.builds for run in build.runs}.values()
    for run in sorted(runs, key=lambda run: (run.date, run.path.name), reverse=True):
        parts += _format_run(run, link)
    return "\n\n".join(parts)


def format_kernels(gpus: list[Device]) -> str:
    """The kernels that lose most, for whoever started the command."""
    lines = []
    for device in gpus:
        kernels = device.kernels()
        if kernels:
            lines.append(f"\nfurthest from their floor on {device.name} (us, one step)")
            lines.append(f"{'kernel':32} {'launches':>8} {'us':>9} {'floor':>9} {'lost':>9}")
        for kernel in kernels[:LISTED]:
            floor, lost = (f"{kernel.floor:9.1f}", f"{kernel.lost:9.1f}") if kernel.floor else ("unknown", "unknown")
            lines.append(f"{kernel.name:32} {kernel.launches:8} {kernel.us:9.1f} {floor:>9} {lost:>9}  {kernel.worst}")
        if len(kernels) > LISTED:
            lines.append(f"{len(kernels) - LISTED} more in benchmarks/results/README.md")
    return "\n".join(lines) if lines else "no profile in these results: no list of kernels"


def escape(text: str) -> str:
    """Free text for a table's cell: an error message may hold anything."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]]|__)", lambda found: "".join(f"\\{sign}" for sign in found[0]), text)


def _sum_lost(kernels: list[Kernel]) -> str:
    together, lost = sum(kernel.us for kernel in kernels), sum(kernel.lost for kernel in kernels)
    return f"One step's kernels take {together:,.0f} us, {lost:,.0f} of them above the floors that are known."


def _format_kernel(kernel: Kernel) -> Cells:
    figures = ("unknown", "", "")
    if kernel.floor is not None:
        figures = (f"{kernel.floor:,.1f}", f"{kernel.lost:,.1f}", f"{kernel.us / kernel.floor:.2f} x")
    return (
        kernel.name,
        str(kernel.launches),
        f"{kernel.us:,.1f}",
        *figures,
        escape(kernel.worst),
    )


def _format_run(run: Run, link: Callable[[Path], str]) -> list[str]:
    parts = [f"## [{run.path.name}]({link(run.path)})"]
    said = ", ".join(f"{name} {escape(_format(name, value))}" for name, value in run.head.items())
    torn = f" **Line {run.torn} was cut off and is left out.**" if run.torn else ""
    parts.append(f"{run.gpu}: {said}.{torn}")
    for section in dict.fromkeys(row["section"] for row in run.rows):
        mine = [row for row in run.rows if row["section"] == section]
        parts.append(f"### {section}")
        # Comparisons have a form of their own, and a profile's summary other columns than its launches.
        compared = [row for row in mine if "results" in row and "error" not in row]
        step = [row for row in mine if row["what"] == "step"]
        rest = [row for row in mine if not any(row is other for other in (*compared, *step))]
        for kind, tabulate in ((compared, _tabulate_comparisons), (step, _tabulate), (rest, _tabulate)):
            parts += [_fold(tabulate(kind), len(kind))] if kind else []
    return parts


def _fold(table: str, count: int) -> str:
    if count < FOLDED:
        return table
    return f"<details><summary>{count} rows</summary>\n\n{table}\n\n</details>"


def _tabulate_comparisons(rows: list[Row]) -> str:
    """A column per candidate: median (20th to 80th percentile) in ms, and what else is known of it."""
    names = {name for row in rows for name in (*row["results"], *row.get("problems", {}))}
    ordered = [name for name in CANDIDATES if name in names] + sorted(names.difference(CANDIDATES))
    known = {
        "section",
        "what",
        "model",
        "count",
        "mode",
        "dtype",
        "results",
        "best_peer",
        "speedup",
        "problems",
        "errors",
    }
    more = list(dict.fromkeys(name for row in rows for name in row if name not in known))
    head = ("comparison", "count", "mode, dtype", *ordered, "best peer", "speedup", "largest error / eager's", *more)
    lines = []
    for row in rows:
        figures = [_format_candidate(row, name) for name in ordered]
        times = pick_times(row, OURS)
        found = max(list_errors(row), key=lambda error: error.ratio, default=None)
        error = f"{found.tensor}: {found.ours:.1e} / {found.eager:.1e}" if found else ""
        rest = [escape(_format(name, row[name])) if name in row else "" for name in more]
        mode = f"{row['mode']}, {row['dtype']}"
        gain = (times.best or "no peer ran", format_speedup(times.speedup))
        lines.append((escape(row["what"]), str(row["count"]), mode, *figures, *gain, escape(error), *rest))
    return _join(head, lines)


def _format_candidate(row: Row, name: str) -> str:
    result = row["results"].get(name)
    problem = row.get("problems", {}).get(name)
    if result is None:
        return f"*{escape(str(problem))}*" if problem else ""
    spread = f" ({result['p20']:.3f} to {result['p80']:.3f})" if result.get("p20") and result.get("p80") else ""
    parts = [f"{result['p50']:.3f}{spread}"]
    rest = {key: value for key, value in result.items() if key not in ("p20", "p50", "p80")}
    parts += [_format_measure(key, value) for key, value in rest.items()]
    return "<br>".join([*parts, *([f"*{escape(str(problem))}*"] if problem else [])])


def _format_measure(name: str, value: Any) -> str:
    titles = {"passes": "passes", "images_s": "images/s", "peak_bytes": "peak"}
    text = _format(name, value)
    return f"{text} {titles.get(name, name)}" if name != "peak_bytes" else f"{titles[name]} {text}"


def _tabulate(rows: list[Row]) -> str:
    """A column per key; why a row has no figures comes last and in bold."""
    reasons = [key for key in ("skipped", "error") if any(isinstance(row.get(key), str) for row in rows)]
    keys = dict.fromkeys(key for row in rows for key in row if key != "section" and key not in reasons)
    lines = []
    for row in rows:
        cells = [escape(_format(key, row[key])) if key in row else "" for key in keys]
        lines.append((*cells, *(f"**{escape(_format(key, row[key]))}**" if key in row else "" for key in reasons)))
    return _join((*keys, *reasons), lines)


def _format(name: str, value: Any) -> str:
    """A value for readers: bytes with their unit, four digits, nested values flat."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, (int, float)):
        if name.endswith("bytes") and math.isfinite(value):
            return _format_bytes(value)
        return (
            f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
        )
    if isinstance(value, dict):
        return ", ".join(f"{key} {_format_nested(key, each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(_format_nested(name, each) for each in value)
    return str(value)


def _format_nested(name: str, value: Any) -> str:
    return f"({_format(name, value)})" if isinstance(value, (dict, list)) else _format(name, value)


def _format_bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g} B"


def _join(head: Cells, lines: Iterable[Cells]) -> str:
    rule = "|---" * len(head) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in lines)])
