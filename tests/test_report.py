"""Result files become pages: every GPU, commit and figure here is made up."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import comparison, figures, record, report, report_plot
from benchmarks.record import BrokenFile, read
from benchmarks.registry import shapes

ROOT = Path(__file__).parents[1]
GPU, OTHER = "Imaginary GPU 9000", "NVIDIA Imaginary GPU 9001 200GB"
NOTES = (ROOT / "benchmarks" / "NOTES.md").read_text()
PAGES = ("README.md", "CHANGELOG.md", "benchmarks/NOTES.md", "benchmarks/results/README.md")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def head(**changes):
    made = {"command": "first", "commit": "abc1234", "dirty": False, "date": "2026-11-27T22:00:00Z", "measured": True}
    return {"head": made | {"python": "3.12.3", "fastmbconv": "0.1.0", "limit_s": 330} | changes}


def versions(gpu=GPU):
    row = {"section": "versions", "what": "versions", "gpu": gpu, "driver": "580.1", "cuda": "13.0", "cudnn": 91000}
    return row | {"torch": "2.11.0+cu130", "triton": "3.6.0"}


def compared(what, times, section="blocks", mode="fwd_bwd", count=1, model="b0", **more):
    """A row whose candidates took these milliseconds; memory is a tenth of a GB for each of them."""
    results = {n: {"p20": t * 0.9, "p50": t, "p80": t * 1.1, "peak_bytes": int(t * 1e8)} for n, t in times.items()}
    if not what.startswith("mbconv"):
        images = int(what.split(" n")[1].split()[0])
        results = {name: result | {"images_s": images / result["p50"] * 1e3} for name, result in results.items()}
    row = {"section": section, "what": what, "model": model, "count": count, "mode": mode, "dtype": "bfloat16"}
    peers = [name for name in times if not name.startswith("fastmbconv")]
    best = min(peers, key=times.__getitem__)
    figures = {"results": results, "best_peer": best, "speedup": times[best] / times["fastmbconv"]}
    return row | figures | {"errors": {}, "problems": {}} | more


def blocks(ours=1.0):
    """B0's 16 blocks: eager-nhwc is faster than ours in stage 1, eager-nchw in the 4 blocks of stage 6."""
    for shape in shapes("b0"):
        times = {"fastmbconv": ours, "eager-nhwc": 0.5 if shape.stage == 1 else 2.0}
        times["eager-nchw"] = 0.5 if shape.stage == 6 else 3.0
        yield compared(f"mbconv {shape.name}", times, count=shape.count)


def store(root, *rows, name="2026-11-27-imaginary-gpu-9000-abc1234-first.jsonl", end="\n"):
    path = root / "benchmarks" / "results" / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def run(root, *arguments):
    return report.main(["--root", str(root), *arguments])


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def measured(root):
    text = (root / "README.md").read_text()
    return text.partition(report.MEASURED[0])[2].partition(report.MEASURED[1])[0]


def listed(root):
    return (root / "benchmarks" / "results" / "README.md").read_text().partition(report.ROWS[0])[2]


def cells(text, start):
    """Of the only line of a table that begins with this."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


def test_candidates_have_the_names_that_comparisons_write():
    assert (record.OURS, record.GRAPHED) == (comparison.OURS, comparison.GRAPHED)


def test_the_committed_pages_are_what_the_command_writes(root):
    for path in (ROOT / "benchmarks" / "results").rglob("*.jsonl"):
        shutil.copy(path, root / "benchmarks" / "results")
    assert run(root) == 0
    for page in PAGES:
        assert (root / page).read_text() == (ROOT / page).read_text()
    if not list((root / "benchmarks" / "results").glob("*.jsonl")):
        assert report.STATUS in measured(root)
        assert listed(root).startswith(f"\n**{report.STATUS}**\n<!-- /rows -->")


def test_no_results_change_nothing(root, capsys):
    before = contents(root)
    assert run(root) == 0
    assert contents(root) == before
    folder = root / "benchmarks" / "results"
    assert capsys.readouterr().out == f"no results in {folder}: nothing to report\n"
    assert run(root, "--results", str(root / "nowhere")) == 1
    assert "nowhere is no folder" in capsys.readouterr().err


def test_a_sum_counts_blocks_and_takes_one_peer_for_all_of_them(root):
    """16 x 1.0 ms; eager-nhwc 15 x 2.0 + 0.5 = 30.5, eager-nchw 12 x 3.0 + 4 x 0.5 = 38; compile ran for one only."""
    extra = compared("mbconv b0.1 n128 112px 32-32-16 k3s1", {"fastmbconv": 1.0, "eager-nhwc": 0.5, "eager-nchw": 3.0})
    extra["results"]["compile"] = {"p50": 0.4}
    store(root, head(), versions(), *blocks(), extra | {"section": "compile"})
    assert run(root) == 0
    row = cells(measured(root), "B0, batch 128: all blocks, forward + backward")
    assert row == ["16.00 ms", "30.50 ms (eager-nhwc)", "1.91 x"]
    assert report.STATUS not in measured(root)


def test_losses_are_counted_and_marked(root):
    store(root, head(), versions(), *blocks())
    assert run(root) == 0
    assert "12 comparisons: 3 slower than the best peer, 0 without a figure" in " ".join(measured(root).split())
    assert listed(root).count("**0.50 x, slower**") == 3
    picture = (root / "benchmarks" / "results" / "measured.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    (device,) = figures.group_by_gpu([read(path) for path in root.rglob("*.jsonl")])
    lines = [line for line in report_plot.list_lines([device]) if not line.heading]
    speedups = {line.name: round(line.timings[0].speedup, 2) for line in lines}
    assert speedups["stage 1: 112 px, 32-32-16, k3s1"] == speedups["stage 6: 7 px, 192-1152-192, k5s1, 3 times"] == 0.5
    assert lines[0].name == "all blocks, as often as they occur"


def test_a_draw_after_rounding_is_still_a_loss():
    assert figures.format_speedup(0.999) == "**0.99 x, slower**"
    assert figures.format_speedup(1.0) == "1.00 x"


def test_a_sum_says_which_part_it_is_of(root):
    most = list(blocks())[:-2]  # without stage 6's three and stage 7's
    store(root, head(), versions(), *most, {"section": "blocks", "what": "mbconv b0.7 n128 7px", "error": "it | broke"})
    assert run(root) == 0
    row = cells(measured(root), "B0, batch 128: all blocks, forward + backward")
    assert row == ["12.00 ms (12 of 16 blocks)", "22.50 ms (eager-nhwc)", "1.88 x"]
    assert "1 without a figure; rows with an error: 1" in " ".join(measured(root).split())
    assert r"**it \| broke**" in listed(root)


def test_models_plain_and_graphed(root):
    """Step: 128 images in 20 ms and 12.8 ms; memory 2 GB against the best plain peer's 3.2."""
    times = {"fastmbconv": 20.0, "eager-nhwc": 32.0, "eager-nchw": 40.0, "fastmbconv-graph": 12.8, "eager-graph": 10.0}
    step = compared("efficientnet_b0 n128 224px (timm's)", times, section="models", without=["b0.3"])
    latency = {"fastmbconv": 5.0, "eager-nhwc": 4.0}
    alone = compared("efficientnet_b0 n1 224px (timm's)", latency, section="inference", mode="fwd_no_grad")
    store(root, head(), versions(), step, alone | {"problems": {"fastmbconv-graph": "RuntimeError: capture"}})
    assert run(root) == 0
    text, name = measured(root), "B0, batch 128, 224 px: training step"
    one = "6,400 images/s (1 block shape ran eager)"
    assert cells(text, name) == [one, "4,000 images/s (eager-nhwc)", "1.60 x"]
    graphed = cells(text, f"{name} as a CUDA graph")
    assert graphed == [one.replace("6,400", "10,000"), "12,800 images/s (eager-graph)", "**0.78 x, slower**"]
    assert cells(text, f"{name}, peak memory") == ["2.00 GB", "3.20 GB (eager-nhwc)", "0.62 of it"]
    inference = cells(text, "B0, batch 1, 224 px: inference")
    assert inference == ["200 images/s", "250 images/s (eager-nhwc)", "**0.80 x, slower**"]
    assert cells(text, "B0, batch 1, 224 px: inference as a CUDA graph")[0] == "no figure: RuntimeError: capture"


def test_the_largest_error_over_eager_s(root):
    errors = {"fastmbconv": {"y": 2e-3, "dx": 3e-3}, "eager-nhwc": {"y": 1e-3, "dx": 2e-3}}
    row = {"section": "correctness", "what": "mbconv b0.2 n128", "errors": errors, "bitwise": False}
    store(root, head(), versions(), row)
    assert run(root) == 0
    expected = ["2.0e-03 (y of b0.2 n128)", "1.0e-03 (eager-nhwc)", "2.00 x eager's"]
    assert cells(measured(root), "largest error against the reference") == expected
    assert "**1 blocks differ from run to run**" in measured(root)
    assert "measured.png" not in measured(root)  # nothing was timed


def test_a_comparison_is_quoted_from_the_newest_commit_and_there_with_most_peers(root, capsys):
    block = "mbconv b0.7 n128 7px 192-1152-320 k3s1"
    old = compared(block, {"fastmbconv": 1.0, "eager-nhwc": 9.0, "eager-nchw": 9.0, "compile": 9.0})
    few = compared(block, {"fastmbconv": 1.0, "eager-nhwc": 3.0})
    most = compared(block, {"fastmbconv": 1.0, "eager-nhwc": 3.0, "compile": 2.0}, section="compile")
    model = compared("efficientnet_b0 n128 224px (timm's)", {"fastmbconv": 1.0, "eager-nhwc": 2.0}, section="models")
    date = {"date": "2026-11-20T22:00:00Z", "commit": "old0000"}
    store(root, head(**date), versions(), old, model, name="old.jsonl")
    store(root, head(), versions(), most)
    later = head(command="second", date="2026-11-27T22:10:00Z")
    store(root, later, versions(), few, name="2026-11-27-imaginary-gpu-9000-abc1234-second.jsonl")
    assert run(root) == 0
    row = cells(measured(root), "B0, batch 128: all blocks, forward + backward")
    assert row == ["1.00 ms (1 of 16 blocks)", "2.00 ms (compile)", "2.00 x"]
    assert "[commit old0000]" in cells(measured(root), "B0, batch 128, 224 px: training step")[0]
    text = " ".join(measured(root).split())
    folder = "benchmarks/results/2026-11-27-imaginary-gpu-9000-abc1234"
    assert f"commit abc1234 ([first]({folder}-first.jsonl), [second]({folder}-second.jsonl))" in text
    assert "commit old0000 ([first](benchmarks/results/old.jsonl))" in text
    assert f"{GPU}: torch 2.11.0+cu130, Triton 3.6.0, CUDA 13.0, driver 580.1, commit abc1234" in text

    broken = {"section": "blocks", "what": block, "mode": "fwd_bwd", "error": "parity"}
    store(root, head(commit="new0000", date="2026-12-01T00:00:00Z"), versions(), broken, name="new.jsonl")
    assert run(root) == 0  # an older figure must not stand for code that has none
    assert "2 comparisons: 0 slower than the best peer, 1 without a figure" in " ".join(measured(root).split())


def test_two_gpus_stand_side_by_side(root):
    store(root, head(), versions(), *blocks())
    store(root, head(commit="def5678"), versions(OTHER), *blocks(ours=4.0), name="other.jsonl")
    # A run that ended before it named its GPU: its file does.
    name = "2026-11-28-imaginary-gpu-9001-200gb-def5678-second.jsonl"
    step = compared("efficientnet_b0 n128 224px (timm's)", {"fastmbconv": 1.0, "eager-nhwc": 2.0}, section="models")
    store(root, head(commit="def5678", date="2026-11-28T00:00:00Z"), step, name=name)
    assert run(root) == 0
    row = cells(measured(root), "B0, batch 128: all blocks, forward + backward")
    assert row == [
        "64.00 ms",
        "30.50 ms (eager-nhwc)",
        "**0.48 x, slower**",
        "16.00 ms",
        "30.50 ms (eager-nhwc)",
        "1.91 x",
    ]
    assert "| | Imaginary GPU 9001 200GB: ours | best peer | gain | Imaginary GPU 9000: ours |" in measured(root)
    step = cells(measured(root), "B0, batch 128, 224 px: training step")
    assert step[2] == "2.00 x"
    assert not any(cell.strip("| ") for cell in step[3:])


def test_kernels_are_listed_by_the_time_they_lose(root, capsys):
    def launch(what, us, floor, block):
        return {"section": "profile", "what": what, "block": block, "order": 1, "us": us, "floor_us": floor}

    launches = [
        launch("pool", 30.0, 10.0, "b0.1"),
        launch("sweep", 50.0, 45.0, "b0.1"),
        launch("sweep", 40, 10, "b0.2"),
    ]
    unknown = {"section": "profile", "what": "torch's sum", "block": "", "order": 3, "us": 500.0}
    step = {"section": "profile", "what": "step", "kernels_us": 9000.0, "unmatched": 1}
    store(root, head(), versions(), *launches, unknown, step)
    assert run(root) == 0
    text = listed(root).partition("## [")[0]
    assert cells(text, "sweep")[:6] == ["2", "90.0", "55.0", "35.0", "1.64 x", "b0.2"]
    assert cells(text, "pool")[1:5] == ["30.0", "10.0", "20.0", "3.00 x"]
    assert text.index("| sweep |") < text.index("| pool | 1 |") < text.index("| torch's sum | 1 |")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("sweep", "pool"))]
    assert lines == [["sweep", "2", "90.0", "55.0", "35.0", "b0.2"], ["pool", "1", "30.0", "10.0", "20.0", "b0.1"]]


def test_every_row_is_shown(root):
    rows = [
        {"section": "ceilings", "what": "ceilings", "copy_gb_s": 3000.5, "matmul_tflop_s": 790.0},
        {"section": "tests", "what": "kernel tests", "passed": 65, "failed": 1, "skipped": 0, "failures": ["t[a|b]"]},
        {"section": "capture", "what": "streams", "verdict": "passed"},
        {"section": "memcheck", "what": "memcheck", "skipped": "no <compute-sanitizer>\nhere"},
        {
            "section": "variants",
            "what": "pool",
            "default_us": 80.0,
            "best_us": 60.0,
            "tiles": {"BLOCK": 32},
            "timed": 2,
        },
        {"section": "sections", "what": "blocks", "status": "hung at mbconv b0.2", "seconds": 58.2},
        {"section": "something new", "what": "later", "figure": 1e-4},
        compared("mbconv b0.7 n128 7px", {"fastmbconv": 1.0, "eager-nhwc": 2.0}, problems={"compile": "skipped: late"}),
    ]
    store(root, head(), versions(), *rows)
    assert run(root) == 0
    text = listed(root)
    assert cells(text, "ceilings") == ["3,000.5", "790"]
    assert cells(text, "kernel tests") == ["65", "1", "0", r"t\[a\|b\]"]
    assert cells(text, "streams") == ["passed"]
    assert cells(text, "memcheck") == ["**no &lt;compute-sanitizer> here**"]
    assert cells(text, "pool") == ["80", "60", "BLOCK 32", "2"]
    assert cells(text, "later") == ["0.0001"]
    block = cells(text, "mbconv b0.7 n128 7px")
    assert block[2] == "1.000 (0.900 to 1.100)<br>peak 100 MB"
    assert block[4] == "*skipped: late*"
    words = " ".join(measured(root).split())
    assert "kernel tests: 65 passed, 1 failed" in words
    assert "section blocks: hung at mbconv b0.2" in words


def test_the_second_time_nothing_changes(root, capsys):
    store(root, head(), versions(), *blocks())
    assert run(root) == 0
    before, times = contents(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    said = capsys.readouterr().out
    assert f"still says {report.STATUS!r}: {root / 'benchmarks' / 'NOTES.md'}" in said or report.STATUS not in NOTES
    assert run(root) == 0
    assert contents(root) == before
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    assert capsys.readouterr().out.count("up to date: ") == 3


@pytest.mark.parametrize("end", [b'{"section": "mod', b'{"section": "b\xc3', b"\x00\x00"])
def test_a_last_line_that_was_cut_off_is_left_out(root, capsys, end):
    path = store(root, head(), versions(), *blocks())
    path.write_bytes(path.read_bytes() + end)
    assert read(path).torn == 15
    assert run(root) == 0
    assert f"{path}, line 15: cut off, left out" in capsys.readouterr().err
    assert "**Line 15 was cut off and is left out.**" in listed(root)
    assert cells(measured(root), "B0, batch 128: all blocks, forward + backward")[0] == "16.00 ms"


def test_a_last_line_without_its_newline_counts(root):
    assert len(read(store(root, head(), versions(), end="")).rows) == 1


BLOCK = compared("mbconv b0.7 n128 7px", {"fastmbconv": 1.0, "eager-nhwc": 2.0})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no whole line"),
        (['{"he'], "no whole line"),
        (["{}\n"], "line 1: expected"),
        ([json.dumps(head()), '{"section": \n', json.dumps(versions())], "line 2: not JSON"),
        ([json.dumps(head()), "[1]\n"], "line 2: expected an object, got [1]"),
        ([json.dumps(head()), json.dumps(head()) + "\n"], "line 2: a second head"),
        ([json.dumps(head(date="yesterday"))], 'date is "yesterday"'),
        ([json.dumps(head(date="2026-11-27T22:00:00"))], "a time zone"),
        ([json.dumps(head(measured="yes"))], 'measured is "yes"'),
        ([json.dumps(head(commit=None))], "commit is null"),
        ([json.dumps(head()), '{"what": "x"}'], "line 2: section is null"),
        ([json.dumps(head()), json.dumps(BLOCK | {"count": 0})], "line 2: blocks, mbconv b0.7 n128 7px: count is 0"),
        ([json.dumps(head()), json.dumps(BLOCK | {"mode": "both"})], 'mode is "both", expected one of fwd_bwd'),
        ([json.dumps(head()), json.dumps(BLOCK | {"results": {}})], "results has no fastmbconv"),
        ([json.dumps(head()), json.dumps(BLOCK | {"results": {"fastmbconv": {"p50": 0}}})], "fastmbconv.p50 is 0"),
        ([json.dumps(head()), json.dumps(BLOCK | {"results": {"fastmbconv": {"p50": float("nan")}}})], "p50 is NaN"),
        ([json.dumps(head()), json.dumps(BLOCK | {"errors": {"fastmbconv": [1]}})], "errors.fastmbconv is [1]"),
        ([json.dumps(head()), '{"section": "profile", "what": "pool", "us": "fast"}'], 'us is "fast"'),
        ([json.dumps(head()), '{"section": "versions", "what": "versions"}'], "gpu is null"),
        ([json.dumps(head()), '{"section": "blocks", "what": "x", "error": 5}'], "error is 5, expected a text"),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_nothing_is_written(root, capsys, lines, message):
    store(root, head(), versions(), *blocks())
    path = root / "benchmarks" / "results" / "broken.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BrokenFile):
        read(path)
    before = contents(root)
    assert run(root) == 1
    said = capsys.readouterr().err
    assert str(path) in said
    assert message in said
    assert contents(root) == before


def test_a_rehearsal_is_refused_by_its_name(root, capsys):
    store(root, head(), versions(), *blocks())
    path = store(root, head(measured=False), versions(), name="rehearsal.jsonl")
    before = contents(root)
    assert run(root) == 1
    assert f"{path} is a rehearsal" in capsys.readouterr().err
    assert contents(root) == before


def test_pages_without_markers_are_refused_before_anything_is_written(root, capsys):
    store(root, head(), versions(), *blocks())
    page = root / "benchmarks" / "results" / "README.md"
    page.write_text(page.read_text().replace(report.ROWS[1], ""))
    before = contents(root)
    assert run(root) == 1
    assert f"{page}: expected one {report.ROWS[0]}" in capsys.readouterr().err
    assert contents(root) == before


def test_without_matplotlib_the_tables_are_written(root, capsys, monkeypatch):
    store(root, head(), versions(), *blocks())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(root) == 0
    assert "no plot: this needs matplotlib: pip install 'fastmbconv[plot]'" in capsys.readouterr().err
    assert "16.00 ms" in measured(root)
    assert "measured.png" not in measured(root)
    assert not (root / "benchmarks" / "results" / "measured.png").exists()


def test_signs_in_messages_don_t_break_the_picture(root):
    row = {
        "section": "blocks",
        "what": "mbconv b0.7 n128 7px 1-2-3 k3s1",
        "mode": "fwd_bwd",
        "error": "$a_{ $b | <!-- /rows -->",
    }
    store(root, head(), versions(), *blocks(), row)
    assert run(root) == 0
    assert run(root) == 0
    assert "$a_{ $b" in listed(root)
