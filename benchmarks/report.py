"""Result files of `python -m benchmarks.gpu` become pages: the README's table and plot, and every row in results/.

    python -m benchmarks.report [--results benchmarks/results] [--root .]

Reads every *.jsonl below --results. Writes, below --root, README.md between its markers `measured`,
benchmarks/results/measured.png, and benchmarks/results/README.md between its markers `rows`; prints the kernels that
lose most time to their floor. A comparison that was run several times is quoted from the newest commit, and there from
the row with most peers. Files that did not change are not written.

Exit status: 0 if the pages are written or up to date, and 0 if there is no result yet, which changes nothing; 1 if a
file can't be read, is a rehearsal (`measured` is false) or has no markers: then nothing is changed either.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from benchmarks import figures, report_plot, report_rows
from benchmarks.figures import Build, Comparison, Device, Timing, format_speedup
from benchmarks.record import GRAPHED, OURS, SUFFIX, BrokenFile, Run, read
from fastmbconv.cli.extras import CommandError
from fastmbconv.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks", "results")
MEASURED = ("<!-- measured: written by `python -m benchmarks.report` -->", "<!-- /measured -->")
ROWS = ("<!-- rows: written by `python -m benchmarks.report` -->", "<!-- /rows -->")
STATUS = "No GPU figure has been measured yet."
EXPLANATION = """\
Medians; models are timm's unless they say whose. The best peer is the fastest of all that ran: eager PyTorch in NCHW
and in channels_last, and torch.compile, its modes with CUDA graphs included; as a CUDA graph ours stands against graphs
of eager too. All blocks: each as often as the model has it, against the peer that is fastest over all of them together.
A training step is forward, backward and optimiser, its peak memory what it takes beyond weights and input. Error:
relative L2 against a more exact reference, of that output, gradient or statistic where ours is the largest multiple of
eager's."""
VERSIONS = (("torch", "torch"), ("Triton", "triton"), ("CUDA", "cuda"), ("driver", "driver"))


class CannotReport(Exception):
    """Why there is no report; the message is all that its reader needs."""


@dataclass(frozen=True)
class Entry:
    """A line of the README's table for one GPU: ours, the best peer, the gain. `order` sorts lines of several GPUs."""

    order: tuple[int | str, ...]
    label: str
    cells: tuple[str, str, str]
    build: Build


def list_entries(device: Device, dtype: str) -> list[Entry]:
    """The figures for users; lines of another dtype than this one name theirs."""
    found = [*_list_trunks(device, dtype), *_list_models(device, dtype)]
    largest = device.largest_error()
    if largest:
        error, build = largest
        where = f"{error.ours:.1e} ({error.tensor} of {error.what.removeprefix('mbconv ')})"
        cells = (where, f"{error.eager:.1e} (eager-nhwc)", f"{error.ratio:.2f} x eager's")
        found.append(Entry(("~",), "largest error against the reference", cells, build))
    return [_mark_older(entry, device) for entry in found]


def _mark_older(entry: Entry, device: Device) -> Entry:
    """A figure that isn't of the newest commit says so."""
    if entry.build is device.builds[0]:
        return entry
    ours, peer, gain = entry.cells
    return Entry(entry.order, entry.label, (f"{ours} [commit {entry.build.name}]", peer, gain), entry.build)


def _list_trunks(device: Device, dtype: str) -> Iterator[Entry]:
    for trunk in device.trunks():
        mode = "forward + backward" if trunk.mode == "fwd_bwd" else "inference"
        size = f", batch {trunk.batch}" if trunk.batch else ""
        label = f"{figures.name_model(trunk.model)}{size}: all blocks, {mode}"
        missing = "" if trunk.blocks == trunk.total else f" ({trunk.blocks} of {trunk.total} blocks)"
        ours, peer, gain = _format_times(trunk.timing)
        order = (trunk.model, 0, trunk.mode, trunk.batch or 0, trunk.dtype)
        yield Entry(order, label + _name_dtype(trunk.dtype, dtype), (ours + missing, peer, gain), trunk.build)


def _format_times(timing: Timing) -> tuple[str, str, str]:
    peer = f"{timing.peers[timing.best]:.2f} ms ({timing.best})" if timing.best else "no peer ran"
    return f"{timing.ours:.2f} ms", peer, format_speedup(timing.speedup)


def _name_dtype(dtype: str, usual: str) -> str:
    return "" if dtype == usual else f", {dtype}"


def _list_models(device: Device, dtype: str) -> Iterator[Entry]:
    for comparison in (*device.comparisons("model"), *device.comparisons("model", GRAPHED)):
        row, build = comparison.row, device.build(comparison.run)
        training, graphed = row.get("mode") == "fwd_bwd", comparison.ours == GRAPHED
        name = f"{figures.describe(row)}: {'training step' if training else 'inference'}"
        other = _name_dtype(row.get("dtype", device.dtype), dtype)
        order = (row.get("model", "~"), 1, row.get("mode", ""), figures.find_batch(row) or 0, row["what"], other)
        label = name + (" as a CUDA graph" if graphed else "") + other
        yield Entry((*order, int(graphed)), label, _format_rates(comparison), build)
        memory = _format_memory(comparison) if training and not graphed else None
        if memory:
            yield Entry((*order, 2), f"{name}, peak memory{other}", memory, build)


def _format_rates(comparison: Comparison) -> tuple[str, str, str]:
    if comparison.timing is None:
        return f"no figure: {report_rows.escape(comparison.why[:80])}", "", ""
    results, best = comparison.row["results"], comparison.timing.best
    ours, peer = (_format_rate(results[name]) if name else "no peer ran" for name in (comparison.ours, best))
    without = comparison.row.get("without", [])
    eager = f" ({len(without)} block shape{'s' * (len(without) != 1)} ran eager)" if without else ""
    return ours + eager, f"{peer} ({best})" if best else peer, format_speedup(comparison.timing.speedup)


def _format_rate(result: dict[str, float]) -> str:
    return f"{result['images_s']:,.0f} images/s" if "images_s" in result else f"{result['p50']:.2f} ms"


def _format_memory(comparison: Comparison) -> tuple[str, str, str] | None:
    """Of ours and of the peer that is fastest in that step."""
    results, best = comparison.row["results"], comparison.timing and comparison.timing.best
    if not best or not results[best].get("peak_bytes") or "peak_bytes" not in results[OURS]:
        return None
    ours, peer = (results[name]["peak_bytes"] / 1e9 for name in (OURS, best))
    share = f"{ours / peer:.2f} of it"
    return f"{ours:.2f} GB", f"{peer:.2f} GB ({best})", share if ours <= peer else f"**{share}, more**"


def format_measured(gpus: list[Device], page: Path, results: Path, plot: bool) -> str:
    """Markdown between the README's markers."""
    dtype = gpus[0].dtype
    lines = {device.name: {(e.order, e.label): e for e in list_entries(device, dtype)} for device in gpus}
    shown = [device for device in gpus if lines[device.name]]
    if not shown:
        return "Runs on a GPU have left no comparison yet: [their rows](benchmarks/results/README.md)."
    head = [cell for device in shown for cell in (f"{_shorten(device.name)}: ours", "best peer", "gain")]
    table = [f"| | {' | '.join(head)} |", f"|---|{'--:|' * len(head)}"]
    for key in sorted({key for device in shown for key in lines[device.name]}):
        found = (lines[device.name].get(key) for device in shown)
        cells = [cell for entry in found for cell in (entry.cells if entry else ("", "", ""))]
        table.append(f"| {key[1]} | {' | '.join(cells)} |")
    parts = ["\n".join(table), _wrap(" ".join(f"In {dtype} unless a line names its dtype. {EXPLANATION}".split()))]
    parts += [_name_origins(device, lines[device.name].values(), page, results) for device in shown]
    if plot:
        parts.append(f"![Speedup over each peer, by block and model]({_link(results / report_plot.NAME, page)})")
    return "\n\n".join(parts)


def _name_origins(device: Device, shown: Iterable[Entry], page: Path, results: Path) -> str:
    """GPU, versions, commit, files; then what else a reader of the figures must know."""
    used = {id(entry.build) for entry in shown}
    builds = [build for build in device.builds if id(build) in used]
    origins = []
    for build in builds:
        versions = next((run.versions for run in reversed(build.runs) if run.versions), {})
        known = [f"{title} {versions[n]}" for title, n in VERSIONS if versions.get(n)] or ["versions unknown"]
        files = ", ".join(f"[{run.head['command']}]({_link(run.path, page)})" for run in build.runs)
        origins.append(f"{', '.join(known)}, commit {build.name} ({files})")
    kinds = [(kind, ours) for kind in ("block", "model", "op") for ours in (OURS, GRAPHED)]
    quoted = [comparison for kind, ours in kinds for comparison in device.comparisons(kind, ours)]
    slower = sum(1 for c in quoted if c.timing and (c.timing.speedup or 1) < 1)
    failed = sum(1 for c in quoted if c.timing is None)
    facts = [f"{len(quoted)} comparisons: {slower} slower than the best peer, {failed} without a figure"]
    tests = next((row for build in device.builds for _, row in build.rows() if _is_tested(row)), None)
    if tests:
        facts.append(f"kernel tests: {tests['passed']} passed, {tests['failed']} failed")
    rows = [row for build in builds for _, row in build.rows()]
    facts.append(f"rows with an error: {sum(1 for row in rows if 'error' in row)}")
    unfinished = [row for row in rows if row["section"] == "sections" and row.get("status", "done") != "done"]
    facts += [f"section {row['what']}: {report_rows.escape(str(row['status']))}" for row in unfinished]
    differing = sum(1 for row in rows if row.get("bitwise") is False)
    if differing:
        facts.append(f"**{differing} blocks differ from run to run**")
    every = _link(results / "README.md", page)
    return _wrap(f"{device.name}: {'; '.join(origins)}. {'; '.join(facts)}; [every row]({every}).")


def _is_tested(row: dict[str, object]) -> bool:
    return row["section"] == "tests" and "passed" in row and "failed" in row


def _shorten(gpu: str) -> str:
    return gpu.removeprefix("NVIDIA ")


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix().replace(" ", "%20")


def _wrap(text: str) -> str:
    return fill(text, 120, break_on_hyphens=False, break_long_words=False)


def load(results: Path) -> list[Run]:
    """Every run below a folder; a rehearsal is refused by its name."""
    runs = [read(path) for path in sorted(results.rglob(f"*{SUFFIX}"))]
    for run in runs:
        if run.head["measured"] is not True:
            raise CannotReport(
                f"{run.path} is a rehearsal (measured: false): move it out of {results}, it timed nothing"
            )
    return runs


def replace_between(path: Path, markers: tuple[str, str], content: str) -> str:
    """The page with this between its markers."""
    text = path.read_text()
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise CannotReport(f"{path}: expected one {begin} and behind it one {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def write(path: Path, data: bytes) -> None:
    """Nothing where the file has these bytes already."""
    if path.exists() and path.read_bytes() == data:
        print(f"up to date: {path}")
        return
    with replacing(path) as part:
        part.write_bytes(data)
    print(f"written: {path}")


def report(results: Path, root: Path) -> None:
    """Everything is read, checked and drawn before the first page is changed."""
    page, rows = root / "README.md", root / RESULTS / "README.md"
    runs = load(results)
    if not runs:
        print(f"no results in {results}: nothing to report")
        return
    for run in runs:
        if run.torn:
            print(f"warning: {run.path}, line {run.torn}: cut off, left out", file=sys.stderr)
    gpus = figures.group_by_gpu(runs)
    try:
        picture = report_plot.draw(gpus)
    except CommandError as error:
        picture = None
        print(f"warning: no plot: {error}", file=sys.stderr)
    plot = picture is not None
    texts = {
        page: replace_between(page, MEASURED, format_measured(gpus, page, root / RESULTS, plot)),
        rows: replace_between(rows, ROWS, report_rows.format_rows(gpus, lambda path: _link(path, rows), plot)),
    }
    for path, text in texts.items():
        write(path, text.encode())
    drawn = root / RESULTS / report_plot.NAME
    if picture is not None:
        write(drawn, picture)
    elif drawn.exists():
        print(f"warning: {drawn} is of an earlier report, no page shows it", file=sys.stderr)
    print(report_rows.format_kernels(gpus))
    for path in (page, rows, root / "benchmarks" / "NOTES.md", root / "CHANGELOG.md"):
        if path.exists() and STATUS in path.read_text():
            print(f"still says {STATUS!r}: {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="whose pages are written (default: this checkout)")
    parser.add_argument("--results", type=Path, help="where result files lie (default: benchmarks/results of --root)")
    options = parser.parse_args(arguments)
    results = options.results or options.root / RESULTS
    try:
        if not results.is_dir():
            raise CannotReport(f"{results} is no folder")
        report(results, options.root)
    except (BrokenFile, CannotReport, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
