"""The sections on a GPU that is not there: kernels compile for sm_90, Triton launches them, "cuda" tensors are fake."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.rehearsal import preload
from benchmarks.rehearsal.run import FAULTS, Rehearsal, complaints
from benchmarks.timetable import SECTIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton has no compiler here"),
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="gcc and g++ build the device"),
]
CHOSEN = [replace(SECTIONS[name], seconds=400.0, item_seconds=200.0) for name in ("ceilings", "correctness")]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    place = tmp_path_factory.mktemp("rehearsal")
    return Rehearsal(place / "out", place / "kernels", place / "libraries", {"once": True, "shapes": 1})


def rehearse(rehearsal, capsys, fault=None):
    status, rows = rehearsal.run("first", CHOSEN, fault)
    return rows, complaints(fault, status, rows, capsys.readouterr().out, CHOSEN)


def test_a_block_takes_every_path_to_the_driver(rehearsal, capsys):
    rows, missing = rehearse(rehearsal, capsys)
    assert missing == []
    (checked,) = [row for row in rows if row["section"] == "correctness"]
    assert checked["bitwise"] and "dx" in checked["errors"]["fastmbconv"]
    done = {row["what"]: row for row in rows if row["section"] == "sections"}
    assert done["correctness"]["compiled"] > 10  # and what it found a second time is no compilation
    rows, missing = rehearse(rehearsal, capsys)
    done = {row["what"]: row for row in rows if row["section"] == "sections"}
    assert missing == [] and done["correctness"]["compiled"] == 0 and done["correctness"]["cache_hits"] > 10


@pytest.mark.parametrize("kind", ["lost", "cache"])  # the others by `make gpu-rehearsal`, and by scripted children
def test_a_fault_costs_what_it_hits(kind, rehearsal, capsys):
    fault = next(fault for fault in FAULTS if fault.kind == kind)
    rows, missing = rehearse(rehearsal, capsys, fault)
    assert missing == []
    assert [row["copy_gb_s"] > 0 for row in rows if row["section"] == "ceilings"] == [True]


def test_without_a_compiler_it_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(preload.subprocess, "run", no_such_program)
    with pytest.raises(RuntimeError, match="a rehearsal builds its device with gcc"):
        preload.build(tmp_path)


def no_such_program(*args, **kwargs):
    raise FileNotFoundError("gcc")


def test_what_does_not_compile_is_shown(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "libcuda.c:1: error")
    monkeypatch.setattr(preload.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="does not compile: libcuda.c:1: error"):
        preload.build(tmp_path)
