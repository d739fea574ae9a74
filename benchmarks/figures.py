"""Which measured rows are quoted, and what follows from them: best peers, sums over a model's blocks, lost time."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from benchmarks import registry
from benchmarks.record import GRAPHED, OURS, Row, Run

Key = tuple[str, str, str]  # what, mode, dtype
YARDSTICK = "eager-nhwc"  # its errors are those that the parity rule compares with
SIZE = re.compile(r"\bn(\d+) (\d+)px")  # in every name of a block or a model: batch and resolution


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of ours and of each peer that ran beside it."""

    ours: float
    peers: dict[str, float]

    @property
    def best(self) -> str | None:
        """The fastest peer."""
        return min(self.peers, key=self.peers.__getitem__, default=None)

    @property
    def speedup(self) -> float | None:
        """The fastest peer's time over ours: below 1 is a loss. None where no peer ran."""
        return self.peers[self.best] / self.ours if self.best else None


@dataclass(frozen=True)
class Comparison:
    """One quoted comparison. `ours` is the name of our candidate in it; without `timing` it failed, and `why`."""

    run: Run
    row: Row
    ours: str
    timing: Timing | None
    why: str = ""


@dataclass(frozen=True)
class Trunk:
    """The blocks of one model together, each as often as the model has it: `blocks` of `total` have a figure."""

    model: str
    batch: int | None
    mode: str
    dtype: str
    build: Build
    blocks: int
    total: int
    timing: Timing


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in the profiled step, in microseconds; `floor` is None where none is known."""

    name: str
    launches: int
    us: float
    floor: float | None
    worst: str = ""  # the block whose launch lost most

    @property
    def lost(self) -> float:
        return 0.0 if self.floor is None else self.us - self.floor


@dataclass(frozen=True)
class Error:
    """Relative L2 errors of one output, gradient or statistic against a more exact reference."""

    what: str
    tensor: str
    ours: float
    eager: float

    @property
    def ratio(self) -> float:
        """Ours over eager's; infinite where eager alone is exact, and where ours is NaN."""
        if math.isnan(self.ours) or (self.eager == 0 and self.ours > 0):
            return math.inf
        return self.ours / self.eager if self.eager > 0 else 1.0


@dataclass(frozen=True)
class Build:
    """The runs of one state of the code, oldest first."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        head = self.runs[-1].head
        return head["commit"] + (" with uncommitted changes" if head.get("dirty") else "")

    def rows(self) -> Iterator[tuple[Run, Row]]:
        return ((run, row) for run in self.runs for row in run.rows)


@dataclass(frozen=True)
class Device:
    """Everything that was measured on one GPU, the newest build first: its figures are quoted where it has them."""

    name: str
    builds: tuple[Build, ...] = field(repr=False)

    @cached_property
    def dtype(self) -> str:
        """The dtype of most comparisons."""
        found = Counter(row["dtype"] for build in self.builds for _, row in build.rows() if "results" in row)
        return max(found, key=found.__getitem__, default="bfloat16")

    def key(self, row: Row) -> Key:
        """What makes two rows the same comparison; a row that failed early may not say its dtype."""
        return row["what"], row.get("mode", ""), row.get("dtype", self.dtype)

    def build(self, run: Run) -> Build:
        return next(build for build in self.builds if run in build.runs)

    def comparisons(self, kind: str, ours: str = OURS) -> list[Comparison]:
        """The quoted ones of "block", "model" or "op", each key once."""
        rows = [row for build in self.builds for _, row in build.rows() if classify(row) == kind]
        found = (self.quote(key, ours) for key in dict.fromkeys(map(self.key, rows)))
        return [comparison for comparison in found if comparison]

    def quote(self, key: Key, ours: str = OURS) -> Comparison | None:
        """Of the newest build that tried it: the row with most peers, the later of equals; or why all failed."""
        for build in self.builds:
            tried = [(run, row) for run, row in build.rows() if classify(row) and self.key(row) == key]
            timed = [(run, row) for run, row in tried if ours in row.get("results", {}) and "error" not in row]
            if timed:
                run, row = max(reversed(timed), key=lambda pair: len(pair[1]["results"]))
                return Comparison(run, row, ours, pick_times(row, ours))
            for run, row in reversed(tried):
                why = row.get("error") if ours == OURS else row.get("problems", {}).get(ours)
                if why:
                    return Comparison(run, row, ours, None, str(why))
        return None

    def trunks(self) -> list[Trunk]:
        """Sums are never mixed from several builds: each is of the newest one that has a block of that model."""
        found: dict[tuple[str, int | None, str, str], Trunk] = {}
        for build in self.builds:
            alone = replace(self, builds=(build,))
            groups: dict[tuple[str, int | None, str, str], list[Comparison]] = {}
            for block in alone.comparisons("block"):
                if block.timing:
                    group = (block.row["model"], find_batch(block.row), block.row["mode"], block.row["dtype"])
                    groups.setdefault(group, []).append(block)
            for group, blocks in groups.items():
                found.setdefault(group, _add_up(group, build, blocks))
        return list(found.values())

    def kernels(self) -> list[Kernel]:
        """Of the newest run that profiled a step: the kernel that loses most time to its floor first."""
        for run in (run for build in self.builds for run in reversed(build.runs)):
            rows = [row for row in run.rows if row["section"] == "profile" and "us" in row]
            if rows:
                kernels = [_sum_up(name, rows) for name in dict.fromkeys(row["what"] for row in rows)]
                return sorted(kernels, key=lambda k: (k.floor is None, -k.lost, -k.us))
        return []

    def largest_error(self) -> tuple[Error, Build] | None:
        """Where our error is the largest multiple of eager's, in the newest build that compared any."""
        for build in self.builds:
            found = [error for _, row in build.rows() for error in list_errors(row)]
            if found:
                return max(found, key=lambda error: error.ratio), build
        return None


def group_by_gpu(runs: Iterable[Run]) -> list[Device]:
    """A device per GPU, the one measured last first."""
    gpus: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.date, run.path.name)):
        gpus.setdefault(make_slug(run.gpu), []).append(run)
    newest_first = sorted(gpus.values(), key=lambda mine: mine[-1].date, reverse=True)
    return [Device(_find_name(mine), _split_by_commit(mine)) for mine in newest_first]


def make_slug(gpu: str) -> str:
    """As in the names of result files."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")


def _find_name(runs: list[Run]) -> str:
    return next((run.gpu for run in reversed(runs) if run.versions), runs[-1].gpu)


def _split_by_commit(runs: list[Run]) -> tuple[Build, ...]:
    """Runs of one commit belong together; uncommitted changes and unknown commits are states of their own."""
    builds: dict[str, list[Run]] = {}
    for run in runs:
        commit = run.head["commit"]
        builds.setdefault(str(run.path) if run.head.get("dirty") or commit == "unknown" else commit, []).append(run)
    return tuple(Build(tuple(mine)) for mine in sorted(builds.values(), key=lambda mine: mine[-1].date, reverse=True))


def classify(row: Row) -> str:
    """ "block", "model", "op", or "" for what compares no times."""
    if row["section"] not in ("blocks", "models", "inference", "compile", "ops") or "skipped" in row:
        return ""
    if row["what"].startswith("mbconv "):
        return "block"
    if row["section"] == "ops" or row["what"].startswith(("depthwise_bn_act ", "squeeze_excite ")):
        return "op"
    return "model" if SIZE.search(row["what"]) else ""


def pick_times(row: Row, ours: str) -> Timing:
    """Plain ours against all peers but graphs; ours as a CUDA graph against all peers."""
    times = {name: result["p50"] for name, result in row["results"].items()}
    peers = {n: t for n, t in times.items() if n not in (OURS, GRAPHED) and (ours == GRAPHED or "-graph" not in n)}
    return Timing(times[ours], peers)


def find_batch(row: Row) -> int | None:
    named = SIZE.search(row["what"])
    return int(named[1]) if named else None


def _add_up(group: tuple[str, int | None, str, str], build: Build, blocks: list[Comparison]) -> Trunk:
    """Only peers that ran every one of the blocks take part; the best of them is best over all blocks together."""
    timings = [(block.row["count"], block.timing) for block in blocks if block.timing]
    shared = set.intersection(*(set(each.peers) for _, each in timings))
    names = [name for name in timings[0][1].peers if name in shared]
    together = Timing(
        sum(count * each.ours for count, each in timings),
        {name: sum(count * each.peers[name] for count, each in timings) for name in names},
    )
    there = sum(count for count, _ in timings)
    return Trunk(*group, build, there, max(there, _count_blocks(group[0])), together)


def _count_blocks(model: str) -> int:
    try:
        return sum(shape.count for shape in registry.shapes(model))
    except KeyError:
        return 0


def _sum_up(name: str, rows: list[Row]) -> Kernel:
    mine = [row for row in rows if row["what"] == name]
    known = all(row.get("floor_us") for row in mine)
    worst = max(mine, key=lambda row: row["us"] - (row.get("floor_us") or 0))
    floor = sum(row["floor_us"] for row in mine) if known else None
    return Kernel(name, len(mine), sum(row["us"] for row in mine), floor, worst.get("block") or "")


def list_errors(row: Row) -> Iterator[Error]:
    """Of every tensor in a row that names both errors."""
    both = row.get("errors")
    if isinstance(both, dict) and OURS in both and YARDSTICK in both:
        for tensor, ours in both[OURS].items():
            eager = both[YARDSTICK].get(tensor)
            if ours is not None and eager is not None:
                yield Error(row["what"], tensor, ours, eager)


def name_model(model: str) -> str:
    return model.upper() if re.fullmatch(r"b\d|l2", model) else model


def describe(row: Row) -> str:
    """A name for readers: "B0, batch 128, 224 px" for timm's model, "stage 2: 56 px, 24-144-24, k3s1" for a block."""
    what, model = row["what"], row.get("model", "")
    block = re.fullmatch(r"mbconv \w+\.(\d+) n\d+ (\d+)px (\S+) (\S+)", what)
    if block:
        times = f", {row['count']} times" if row.get("count", 1) > 1 else ""
        return f"stage {block[1]}: {block[2]} px, {block[3]}, {block[4]}{times}"
    whole = re.fullmatch(r"(\S+) n(\d+) (\d+)px(?: \((.*)\))?", what)
    if whole:
        name = name_model(model) if model and whole[1] == f"efficientnet_{model}" else whole[1]
        library = "" if whole[4] == "timm's" else whole[4]
        return ", ".join(filter(None, (name, f"batch {whole[2]}", f"{whole[3]} px", library)))
    return what


def sort_key(row: Row) -> tuple[str, int, int, str]:
    """Sorts blocks as their model has them: by stage, and the one that changes the size first."""
    named = re.match(r"mbconv (\w+)\.(\d+) n\d+ (\d+)px", row["what"])
    return (named[1], int(named[2]), -int(named[3]), row["what"]) if named else ("~", 0, 0, row["what"])


def format_speedup(speedup: float | None) -> str:
    """Markdown, with losses in bold; rounding never turns one into a draw."""
    if speedup is None:
        return ""
    return f"{speedup:.2f} x" if speedup >= 1 else f"**{min(speedup, 0.99):.2f} x, slower**"
