"""`python -m benchmarks.gpu` without a GPU: its timetable, and what a section costs the others when it goes wrong."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import triton

from benchmarks import cache, gpu, recorder, section, suites, timetable
from benchmarks.record import read
from benchmarks.rehearsal.run import FAULTS, full_disk, stale_cache
from benchmarks.section import Context, DeviceLost
from benchmarks.summary import slow, summarise, wrong
from benchmarks.timetable import FIRST, SECOND, Section

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("scripted_section.py")


def run_module(*arguments, **environment):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("options", "seconds"), [([], 330), (["--second"], 360), (["--minutes", "9"], 540)])
def test_the_plans_last_number_is_the_runs_seconds(options, seconds):
    done = run_module("benchmarks.gpu", "--plan", *options)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == seconds
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    passed = 0
    for row in rows:
        passed += int(row[-2])
        assert abs(passed - int(row[-1])) <= len(rows)  # each is rounded


def test_a_figure_comes_in_the_first_minute():
    assert FIRST[0].name == "ceilings" and FIRST[0].seconds <= 60
    order = [section.name for section in FIRST]
    assert order == ["ceilings", "tests", "correctness", "profile", "blocks", "models", "compile"]


@pytest.mark.parametrize("section", [*FIRST, *SECOND], ids=lambda section: section.name)
def test_a_hang_is_noticed_before_its_section_is_over(section):
    assert section.item_seconds < section.seconds


class Play:
    """Runs `gpu.run` over scripted sections; a section is a list of (item, what happens at it)."""

    def __init__(self, out):
        self.out = out

    def __call__(self, seconds=20.0, item_seconds=10.0, **plays):
        sections = [Section(name, seconds, item_seconds, "scripted") for name in plays]
        self.recorder = recorder.Recorder(self.out, recorder.head("first", 330.0, measured=True), "Imaginary GPU 9000")
        commands = gpu.Commands("bfloat16", self.recorder.rows, {"plays": plays})
        commands.program = [sys.executable, str(SCRIPT)]
        self.status = gpu.run(sections, self.recorder, commands, None)
        return list(read(self.recorder.path).rows)


@pytest.fixture
def play(tmp_path):
    return Play(tmp_path / "out")


def of(rows, section):
    return [row for row in rows if row["section"] == section]


def status(rows, name):
    return next(row["status"] for row in rows if row["section"] == "sections" and row["what"] == name)


GOOD = [["a", "row"], ["b", "row"]]


def test_a_run_without_a_fault(play, capsys):
    rows = play(ceilings=GOOD, blocks=GOOD)
    printed = capsys.readouterr().out
    assert play.status == 0
    assert [row["what"] for row in of(rows, "blocks")] == ["a", "b"]
    assert status(rows, "blocks") == "done"
    assert "nothing is wrong" in printed
    assert "8 came out of the cache, 4 were compiled here" in printed


def test_what_a_section_learnt_goes_along(play):
    rows = play(ceilings=GOOD, blocks=GOOD)
    assert [row["seen"] for row in of(rows, "blocks")] == [3000.0, 3000.0]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("kill", "killed by SIGKILL"),
        ("crash", "ended with exit status 3"),
        ("lost", "lost its GPU at bad: an illegal memory access"),
        ("hang", "hung: no word for 1 s"),
        ("stubborn", "hung: no word for 1 s"),
    ],
)
def test_one_item_ends_its_process_and_costs_itself(act, says, play, capsys):
    rows = play(item_seconds=1.0, tests=[["a", "row"], ["bad", act], ["b", "row"]], blocks=[["bad", act], *GOOD])
    printed = capsys.readouterr().out
    assert play.status == 1
    (error,) = [row for row in rows if "error" in row]
    assert (error["section"], error["what"]) == ("tests", "bad") and says in error["error"]
    assert [row["what"] for row in of(rows, "tests") if "copy_gb_s" in row] == ["a", "b"]  # each once
    assert status(rows, "tests").endswith("; then done")
    assert [row["what"] for row in of(rows, "blocks") if "copy_gb_s" in row] == ["a", "b"]  # it went around
    first = printed[printed.index("==") :].splitlines()[:3]
    assert "things are wrong" in first[0] and says in first[1] and "bad" in first[1]


def test_a_section_ends_with_its_time_and_the_next_one_goes_on(play):
    rows = play(seconds=5.0, item_seconds=60.0, models=[["a", "row"], ["long", "slow"], ["more", "slow"]], blocks=GOOD)
    assert status(rows, "models") == "out of time"
    assert [row["what"] for row in of(rows, "models")] == ["a", "long"]
    assert not [row for row in rows if "error" in row]
    assert play.status == 1  # but the summary says so
    assert any("out of time" in text for text in wrong(rows))


def test_time_that_a_section_leaves_is_the_next_ones(play):
    rows = play(seconds=4.5, item_seconds=60.0, tests=GOOD, models=[["long", "slow"], ["never", "slow"]])
    models = next(row for row in of(rows, "sections") if row["what"] == "models")
    assert models["status"] == "done" and 4.5 < models["seconds"] < 10


def test_a_gpu_that_is_gone_is_not_asked_by_every_section(play):
    rows = play(tests=GOOD, blocks=[["a", "gone"]], models=[["a", "gone"]], compile=[["a", "gone"]])
    assert [row["what"] for row in of(rows, "tests")] == ["a", "b"]
    assert ["found no GPU" in row["error"] for row in of(rows, "blocks") + of(rows, "models")] == [True, True]
    assert of(rows, "compile")[0]["skipped"].startswith("two sections found no GPU")


def test_a_disk_that_is_full_for_a_while_loses_no_row(tmp_path, capsys):
    play = Play(tmp_path)
    original = recorder.Recorder.__init__

    def full(self, *args):
        original(self, *args)
        self.stack = full_disk(self, "blocks")
        self.stack.__enter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.Recorder, "__init__", full)
        rows = play(tests=GOOD, blocks=GOOD, models=GOOD)
        play.recorder.stack.__exit__(None, None, None)
    printed = capsys.readouterr().out
    assert play.status == 1
    assert [len(of(rows, name)) for name in ("tests", "blocks", "models")] == [2, 2, 2]
    assert "could not be written: No space left on device" in printed[printed.index("==") :].splitlines()[1]


def test_rows_that_no_disk_takes_are_printed(tmp_path, capsys, monkeypatch):
    made = recorder.Recorder(tmp_path, recorder.head("first", 1.0, measured=True), "Imaginary GPU 9000")
    made.add("tests", {"what": "a"})

    def refuse(file, text, place):
        os.pwrite_before(file, text[:5], place)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite_before", os.pwrite, raising=False)
    monkeypatch.setattr(os, "pwrite", refuse)
    made.add("blocks", {"what": "b"})
    made.add("blocks", {"what": "c"})
    made.close()
    printed = capsys.readouterr().out
    assert [row["what"] for row in read(made.path).rows] == ["a"]  # whole lines only
    rest = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["what"] for row in rest] == ["b", "c", "disk"]


def test_a_run_leaves_two_files_and_nothing_else(play, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    play(ceilings=GOOD, blocks=GOOD)
    assert sorted(path.suffix for path in play.out.iterdir()) == [".jsonl", ".log"]
    assert "what a library prints" in next(play.out.glob("*.log")).read_text()
    assert not list((tmp_path / "tmp").iterdir())


def test_two_runs_of_a_day_have_a_file_each(play):
    play(ceilings=GOOD)
    play(ceilings=GOOD)
    assert len(list(play.out.glob("*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--minutes", "0"], "expected --minutes above 0, got 0"),
        (["--cache", "pyproject.toml"], "expected a folder for --cache, got the file pyproject.toml"),
        (["--dry"], "measures nothing"),
    ],
)
def test_refuses_before_anything_is_written(options, says):
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = run_module("benchmarks.gpu", *options)
    assert done.returncode == 2 and says in done.stderr
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_a_copied_tree_names_its_commit(monkeypatch):
    monkeypatch.setenv("FASTMBCONV_COMMIT", "abc123")
    head = recorder.head("first", 330.0, measured=True)
    assert head["commit"] == "abc123" and head["limit_s"] == 330.0 and head["measured"] is True
    assert all(head[key] for key in ("date", "python", "fastmbconv"))


@pytest.fixture
def said():
    return []


def make_context(said, **options):
    return Context("blocks", options.pop("seconds", 100.0), say=said.append, dry=True, **options)


def test_an_item_that_fails_loses_no_other_one(said):
    context = make_context(said, avoid=["bad"])
    for what in ("bad", "wrong", "good"):
        with context.item(what, {"mode": "fwd_bwd"}) as begun:
            if begun and what == "wrong":
                raise ValueError("a shape that no kernel takes")
            if begun:
                context.add({"what": what, "samples": [1.0]})
    rows = [message["row"] for message in said if "row" in message]
    assert rows == [
        {"what": "bad", "mode": "fwd_bwd", "skipped": "it ended a process before"},
        {"what": "wrong", "mode": "fwd_bwd", "error": "ValueError: a shape that no kernel takes"},
        {"what": "good"},
    ]
    assert [m for m in said if "begin" in m or "end" in m] == [
        {"begin": "wrong : fwd_bwd"}, {"end": "wrong : fwd_bwd"},
        {"begin": "good : fwd_bwd"}, {"end": "good : fwd_bwd"},
    ]  # fmt: skip


def test_what_a_child_before_has_finished_is_not_done_again(said):
    context = make_context(said, finished=["shape : fwd_bwd"])
    for mode in ("fwd_bwd", "fwd_no_grad"):
        with context.item("shape", {"mode": mode}):
            pass
    assert said == [{"begin": "shape : fwd_no_grad"}, {"end": "shape : fwd_no_grad"}]


def test_an_item_after_its_time_is_skipped(said):
    context = make_context(said, seconds=0.0)
    with context.item("late") as begun:
        assert not begun
    assert said == [{"row": {"what": "late", "skipped": "its time is up"}}]


def test_a_lost_device_ends_the_process_with_its_name(said, monkeypatch):
    context = make_context(said)
    context.dry = False

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    with pytest.raises(DeviceLost, match="lost its GPU at culprit: CUDA error"), context.item("culprit"):
        pass
    assert said == [{"begin": "culprit"}]


def make_cache(place):
    for name, text in (("k.cubin", "x"), ("k.json", "{}"), ("k.ptx", "x"), ("k.ttir", "x")):
        (place / "KEY").mkdir(parents=True, exist_ok=True)
        (place / "KEY" / name).write_text(text)
    group = {"child_paths": {"k.cubin": str(place / "KEY" / "k.cubin")}}
    (place / "KEY" / "__grp__k.json").write_text(json.dumps(group))
    return cache.seal(place, 90)


def test_a_sealed_cache_is_what_a_launch_reads(tmp_path):
    manifest = make_cache(tmp_path / "cache")
    assert manifest["kernels"] == 1
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert kept == {"k.cubin", "k.json", "__grp__k.json", cache.MANIFEST}


def test_a_moved_cache_is_found_where_it_lies(tmp_path):
    make_cache(tmp_path / "there")
    here = (tmp_path / "there").rename(tmp_path / "here")
    cache.settle(here)
    group = json.loads((here / "KEY" / "__grp__k.json").read_text())
    assert group["child_paths"]["k.cubin"] == str(here.resolve() / "KEY" / "k.cubin")
    assert cache.read(here)["root"] == str(here.resolve())


def test_the_cache_says_whether_it_holds_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "hashes", lambda arch=None: {"compiler": "c", "kernels": "k"})
    assert cache.verdict() == "none was brought: kernels compile here"
    make_cache(tmp_path)
    assert cache.verdict() == "matches: 1 kernels"
    with stale_cache(tmp_path):
        assert cache.verdict() == "does not match, kernels compile here: made for compiler 0123456789abcdef, here c"
    assert cache.verdict().startswith("matches")


def test_the_summary_begins_with_what_is_wrong_and_what_is_slow():
    results = {"fastmbconv": {"p50": 2.0}, "eager-nhwc": {"p50": 1.0}}
    block = {
        "section": "blocks", "what": "mbconv b0.2", "mode": "fwd_bwd", "dtype": "bfloat16", "model": "b0", "count": 1,
        "results": results, "best_peer": "eager-nhwc", "speedup": 0.5, "problems": {},
    }  # fmt: skip
    rows = [
        {"section": "versions", "what": "versions", "gpu": "Imaginary GPU 9000", "cache": "does not match, ..."},
        {"section": "correctness", "what": "mbconv b0.1", "error": "another run gives other bits: dx"},
        {"section": "profile", "what": "pool", "us": 100.0, "floor_us": 10.0},
        block,
    ]
    head = {"measured": True, "command": "first", "commit": "abc"}
    lines = summarise(head, rows, "file").splitlines()
    assert lines[1] == "== 2 things are wrong; first command, Imaginary GPU 9000, commit abc"
    assert lines[2] == "  WRONG  the cache of kernels does not match, ..."
    assert lines[3] == "  WRONG  correctness: mbconv b0.1: another run gives other bits: dx"
    assert lines[4] == "  SLOW   mbconv b0.2 fwd_bwd: 0.50x of eager-nhwc"
    assert lines[5] == "  SLOW   pool: 100 us in 1 launches, 10 at the copy's speed (10%)"
    assert slow([]) == []


def test_every_kind_of_fault_is_rehearsed():
    assert {fault.kind for fault in FAULTS} == {"raise", "hang", "kill", "lost", "gone", "disk", "cache"}
    assert all(fault.says for fault in FAULTS)


def test_a_lack_of_word_is_no_lack_of_time(play):
    """A child that goes on saying that it lives is not hung."""
    began = time.monotonic()
    rows = play(seconds=30.0, item_seconds=1.0, models=[["long", "slow"]])
    assert status(rows, "models") == "done" and time.monotonic() - began > 4


def test_sections_are_known_to_both_sides():
    from benchmarks import sections, suites

    for name in timetable.SECTIONS:
        assert callable(getattr(sections, f"run_{name}", None) or getattr(suites, f"run_{name}", None)), name


def test_a_run_that_is_ended_early_still_says_what_it_has(play, capsys, monkeypatch):
    def interrupt(self, section, end):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Watch, "_section", interrupt)
    rows = play(blocks=GOOD)
    assert play.status == 1
    assert rows[-1]["error"] == "interrupted before its end"
    assert "record: run: interrupted before its end" in capsys.readouterr().out


def test_a_folder_that_takes_no_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "file" / "out")])
    monkeypatch.setattr(gpu, "gpu_name", lambda: "Imaginary GPU 9000")
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "no result file can be made in --out" in capsys.readouterr().err


def test_a_child_that_compiles_lives(said, monkeypatch):
    """A 5x5 walk compiles for half a minute, and says nothing on the way."""
    monkeypatch.setattr(section, "COMPILING_SECONDS", 0.01)
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    section.listen_to_compiler(make_context(said))
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="fastmbconv_0")
    time.sleep(0.1)
    assert {"alive": True} not in said
    thread.start()
    time.sleep(0.1)
    done.set()
    thread.join()
    assert {"alive": True} in said


@pytest.mark.parametrize(
    ("status", "output", "says"),
    [
        (0, "ERROR SUMMARY: 0 errors", None),
        (9, "ERROR SUMMARY: 3 errors", "3 errors"),
        (1, "no summary", "exit status 1"),
        (None, "", None),  # ended for time: no verdict, and no fault
    ],
)
def test_a_memory_check_that_fails_is_wrong(status, output, says, said, monkeypatch):
    monkeypatch.setattr(suites.shutil, "which", lambda name: name)
    monkeypatch.setattr(suites, "run_apart", lambda *_: (status, output))
    suites.run_memcheck(make_context(said))
    (row,) = [message["row"] for message in said if "row" in message]
    assert says in row["error"] if says else "error" not in row
