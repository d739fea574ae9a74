"""Files take their place whole or not at all, and others may read them where the umask says so."""

import os
import stat

import pytest
import torch
from libraries import library

from fastmbconv import search
from fastmbconv.cli import convert
from fastmbconv.files import replacing
from fastmbconv.kernels import tables
from fastmbconv.training import checkpoint

library("safetensors")


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


def test_what_is_written_has_the_rights_that_the_umask_gives(umask, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "grid", lambda *_: [(1.2, 1.1, 1.15)])
    search.search(lambda *_: 1.0, resume=tmp_path / "search.json")
    tables.write(tmp_path / "table.json", tables.Table({}))
    checkpoint.write(tmp_path / "history.json", b"{}")
    names = ["a.pt", "a.safetensors", "history.json", "search.json", "table.json"]
    for name in names[:2]:
        convert._write(tmp_path / name, {"a": torch.ones(2)})
    assert sorted(os.listdir(tmp_path)) == names
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {umask}


def test_a_failure_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        part.write_text("half")
        raise OSError("full")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]
