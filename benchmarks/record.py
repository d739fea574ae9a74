"""A run's result file: JSON lines, a head and then a row a line, as benchmarks/results/README.md explains them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

# Candidates' names under "results", as benchmarks/comparison.py writes them: importing that would need Triton.
OURS, GRAPHED = "fastmbconv", "fastmbconv-graph"
SUFFIX = ".jsonl"
TEXTS = ("mode", "dtype", "model", "block", "status")  # where a row has them
LARGEST = 1e30  # no byte count, rate or time is: what is larger is broken
MODES = ("fwd_bwd", "fwd_no_grad", "fwd_training")

Row = dict[str, Any]


class BrokenFile(ValueError):
    """A result file that can't be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Run:
    """One result file. `torn` is the number of a last line that was cut off, 0 where none was; it is not in `rows`."""

    path: Path
    head: Row
    rows: tuple[Row, ...]
    torn: int = 0

    @property
    def date(self) -> datetime:
        return _parse_date(self.head["date"])

    @property
    def versions(self) -> Row:
        """The row that names GPU, driver and versions; empty where the run ended before it."""
        return next((row for row in self.rows if row["section"] == "versions" and "gpu" in row), {})

    @property
    def gpu(self) -> str:
        """The GPU's name; where the run did not say it, what the file's name says: <date>-<gpu>-<commit>-<command>."""
        named = re.fullmatch(r"\d{4}-\d\d-\d\d-(.+)-[^-]+-(first|second)(-\d+)?", self.path.stem)
        return self.versions.get("gpu") or (named[1] if named else "unknown GPU")


def read(path: Path) -> Run:
    """The run in a file. A killed run may leave its last line unfinished; whatever else is wrong raises BrokenFile."""
    lines = path.read_bytes().split(b"\n")
    unfinished = lines.pop()  # what stands after the last newline: nothing, if the file is whole
    parsed = [_parse(line, path, number) for number, line in enumerate(lines, 1)]
    torn = 0
    if unfinished.strip():
        try:
            parsed.append(_parse(unfinished, path, len(lines) + 1))
        except BrokenFile:
            torn = len(lines) + 1
    if not parsed:
        raise BrokenFile(f"{path}: no whole line, expected a head in line 1")
    for number, row in enumerate(parsed, 1):
        problem = _check_head(row) if number == 1 else _check_row(row)
        if problem:
            raise BrokenFile(f"{path}, line {number}: {problem}")
    return Run(path, parsed[0]["head"], tuple(parsed[1:]), torn)


def _parse(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line.decode())
    except ValueError as error:  # of UTF-8 or of JSON
        raise BrokenFile(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BrokenFile(f"{path}, line {number}: expected an object, got {_shorten(row)}")
    return row


def _parse_date(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _check_head(row: Row) -> str:
    """What is wrong with it, or an empty text; so do all that check."""
    head = row.get("head")
    if not isinstance(head, dict):
        return f'expected {{"head": {{...}}}}, got {_shorten(row)}'
    for name in ("command", "commit", "date"):
        if not _is_text(head.get(name)):
            return f"head: {name} is {_shorten(head.get(name))}, expected a text"
    try:
        if _parse_date(head["date"]).tzinfo is None:
            return f"head: date is {_shorten(head['date'])}, expected a time zone in it"
    except ValueError:
        return f"head: date is {_shorten(head['date'])}, expected the form 2026-11-27T22:00:00Z"
    if not isinstance(head.get("measured"), bool):
        return f"head: measured is {_shorten(head.get('measured'))}, expected true or false"
    return ""


def _check_row(row: Row) -> str:
    """Only what a page is computed from is checked: a row may say more."""
    if "head" in row:
        return "a second head"
    for name in ("section", "what"):
        if not _is_text(row.get(name)):
            return f"{name} is {_shorten(row.get(name))}, expected a text"
    place = f"{row['section']}, {row['what']}"
    for name in TEXTS:
        if not isinstance(row.get(name, ""), str):
            return f"{place}: {name} is {_shorten(row[name])}, expected a text"
    if not (isinstance(row.get("count", 1), int) and row.get("count", 1) >= 1):
        return f"{place}: count is {_shorten(row['count'])}, expected 1 or more"
    if "error" in row:
        return "" if _is_text(row["error"]) else f"{place}: error is {_shorten(row['error'])}, expected a text"
    if _is_text(row.get("skipped")):  # of tests it is a number: how many
        return ""
    if row["section"] == "versions" and not _is_text(row.get("gpu")):
        return f"{place}: gpu is {_shorten(row.get('gpu'))}, expected a text"
    if row["section"] == "profile" and row["what"] != "step":
        problem = _check_number(row, "us") or _check_number(row, "floor_us", optional=True)
    else:
        problem = _check_errors(row) or ("results" in row and _check_comparison(row)) or ""
    return f"{place}: {problem}" if problem else ""


def _check_comparison(row: Row) -> str:
    for name in ("model", "dtype"):
        if not _is_text(row.get(name)):
            return f"{name} is {_shorten(row.get(name))}, expected a text"
    if row.get("mode") not in MODES:
        return f"mode is {_shorten(row.get('mode'))}, expected one of {', '.join(MODES)}"
    if "count" not in row:
        return "count is missing, expected 1 or more"
    results = row["results"]
    if not isinstance(results, dict) or OURS not in results:
        return f"results has no {OURS}: {_shorten(results)}"
    if not isinstance(row.get("problems", {}), dict):
        return f"problems is {_shorten(row['problems'])}, expected an object"
    if not isinstance(row.get("without", []), list):
        return f"without is {_shorten(row['without'])}, expected a list"
    for name, result in results.items():
        if not isinstance(result, dict):
            return f"results.{name} is {_shorten(result)}, expected an object"
        problem = _check_number(result, "p50")
        for figure in ("p20", "p80", "images_s", "passes", "peak_bytes"):
            problem = problem or _check_number(result, figure, optional=True)
        if problem:
            return f"results.{name}.{problem}"
    return ""


def _check_errors(row: Row) -> str:
    """Errors may be NaN, or null where a writer has none: that is a finding, not a broken file."""
    errors = row.get("errors", {})
    if isinstance(errors, dict) and row["section"] not in ("capture", "memcheck"):
        for name, figures in errors.items():
            if not isinstance(figures, dict) or not all(v is None or _is_number(v) for v in figures.values()):
                return f"errors.{name} is {_shorten(figures)}, expected numbers by name"
    return ""


def _check_number(row: Row, name: str, optional: bool = False) -> str:
    value: Any = row.get(name)
    if value is None and optional:
        return ""
    number = value if _is_number(value) else math.nan
    if 0 < number < LARGEST or (number == 0 and name == "peak_bytes"):
        return ""
    return f"{name} is {_shorten(value)}, expected a number above 0"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
