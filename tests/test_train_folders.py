"""What a folder of pictures is: which real files, which classes, which split; said, and never guessed."""

import os
import struct
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from libraries import library
from rare_pictures import tiff

library("PIL.Image")
hypothesis = library("hypothesis")

from hypothesis import strategies as st  # noqa: E402

from fastmbconv.training import copies  # noqa: E402
from fastmbconv.training.config import Config  # noqa: E402
from fastmbconv.training.copies import EDGE  # noqa: E402
from fastmbconv.training.data import open_data, pictures_of, read_folder, split  # noqa: E402
from fastmbconv.training.errors import TrainingError  # noqa: E402
from fastmbconv.training.pictures import PictureError  # noqa: E402


class Disk:
    """Files below a folder `data`, with contents of their own unless they are given one."""

    def __init__(self, root):
        self.root, self.written = root / "data", 0
        self.root.mkdir()

    def files(self, folder, number, content=None):
        for index in range(number):
            path = self.root / folder / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.written += 1
            path.write_bytes(content or b"%d" % self.written)

    def all_of(self, folders):
        for folder in folders.split():
            name, _, number = folder.partition("=")
            self.files(name, int(number or 2))

    def link(self, path, target):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).symlink_to(target)

    def open(self, **options):
        return open_data(Config(data=str(self.root), **options))


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


def names(samples, disk):
    return sorted(str(path.relative_to(disk.root)) for path in samples.pictures)


@pytest.mark.parametrize(
    ("path", "target", "told"),
    [
        ("red/back", "..", "not followed: red/back -> .., it leads back to DATA"),
        ("red/back", ".", "not followed: red/back -> ., it leads back to red"),
        ("red/a/b/back", "../..", "not followed: red/a/b/back -> ../.., it leads back to red"),
        ("red/back", "/", "not followed: red/back -> /, it leads back to DATA"),
        ("loop", ".", "not followed: loop -> ., it leads back to DATA"),
        ("red/again", "0.png", None),
        ("red/again.png", "0.png", "1 file is reached twice, by links, and counts once"),
        ("red/gone", "nowhere", "a link to nothing, left out: red/gone"),
        ("gone", "nowhere", "a link to nothing, left out: gone"),
        (".hidden", "red", None),
    ],
)
def test_a_link_adds_nothing_twice_and_never_leads_back(path, target, told, disk):
    disk.all_of("red=5 blue=5")
    disk.link(path, target)
    train, val = disk.open()
    assert len(train) + len(val) == 10 and train.classes == ("blue", "red")
    assert list(train.notes) == list(val.notes) == ([told] if told else [])


def test_links_to_other_folders_are_followed_and_the_plain_path_is_kept(disk, tmp_path):
    disk.all_of("red=3 red/deep=3 blue ../elsewhere/a")
    disk.link("red/a-link", "deep")
    disk.link("red/deep/more", tmp_path / "elsewhere")
    disk.link("red/deep/round", tmp_path / "elsewhere")
    disk.link("../elsewhere/back", tmp_path)
    samples = read_folder(disk.root)
    wanted = [f"red/{where}{index}.png" for where in ("", "deep/") for index in range(3)]
    wanted += [f"blue/{index}.png" for index in range(2)] + [f"red/deep/more/a/{index}.png" for index in range(2)]
    assert names(samples, disk) == sorted(wanted)
    assert "5 files are reached twice, by links, and count once" in samples.notes
    assert [note for note in samples.notes if "leads back to DATA" in note]


def test_many_links_between_folders_end_soon(disk):
    folders = [f"red/{index}" for index in range(30)]
    disk.all_of("blue " + " ".join(folders))
    for folder in folders:
        for other in folders:
            disk.link(f"{folder}/to-{Path(other).name}", f"../{Path(other).name}")
    assert len(read_folder(disk.root)) == 62


def test_pictures_for_predictions_come_once_and_no_pipe_is_opened(disk):
    disk.all_of("a a/b")
    disk.link("a/b/back", "..")
    disk.link("a/b/2.png", "0.png")
    os.mkfifo(disk.root / "a" / "pipe.png")
    notes = []
    found = pictures_of([disk.root, disk.root / "nothing.png"], notes)
    told = [str(path.relative_to(disk.root)) for path in found]
    assert told == ["a/0.png", "a/1.png", "a/b/0.png", "a/b/1.png", "a/pipe.png", "nothing.png"]
    assert len(notes) == 2 and f"leads back to {disk.root / 'a'}" not in notes[0] and "leads back to a" in notes[0]


def test_a_folder_that_can_not_be_listed_is_named(disk, monkeypatch):
    disk.all_of("a b b/closed")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(TrainingError, match=r"b/closed can't be listed \(Permission denied\)"):
        disk.open()


@pytest.mark.parametrize(
    ("folders", "layout", "classes", "held_out", "told"),
    [
        ("bus=9 car=9 train/steam=4 train/electric=5", None, "bus car train", None, "--layout split reads it alone"),
        ("bus car train", None, "bus car train", None, "train is read as a class"),
        ("bus car Test/a", None, "Test bus car", None, "Test is read as a class"),
        ("bus car train test", None, "bus car test train", None, "test is read as a class"),
        ("train/a train/b", None, "a b", None, None),
        ("train/a train/b empty=0", None, "a b", None, None),
        ("Training/a Training/b Testing/a Testing/b", None, "a b", "Testing", None),
        ("TRAIN/a TRAIN/b Dev/a Dev/b", None, "a b", "Dev", None),
        ("train/a train/b eval/a eval/b", None, "a b", "eval", None),
        ("train/a train/b val/a val/b test/a test/b", None, "a b", "val", "val is held out; not read: test"),
        ("train/a train/b val/a val/b test", None, "a b", "val", "not read: test"),
        ("train/a train/b val/a val/b test/a testing/a", None, "a b", "val", "not read: test, testing"),
        ("train/a train/b test/a test/b dev/a dev/b", None, "a b", "dev", "not read: test"),
        ("train/a train/b train=3 val/a val/b", None, "a b", "val", "3 pictures in train beside the class folders"),
        ("a b .=2", None, "a b", None, "2 pictures in DATA beside the class folders: not read"),
        ("bus car train/bus train/car", "split", "bus car", None, "not read: bus, car"),
        ("bus car train/bus train/car", "classes", "bus car train", None, None),
        ("train/a train/b val/a val/b extra", "split", "a b", "val", "not read: extra"),
        ("train/a train/b val/a val/b", "classes", "train val", None, None),
        ("train val", "classes", "train val", None, None),
        ("val/a val/b bus", "classes", "bus val", None, None),
    ],
)
def test_train_is_a_split_or_a_class_by_what_is_there(folders, layout, classes, held_out, told, disk):
    disk.all_of(folders)
    train, val = disk.open(layout=layout)
    assert train.classes == val.classes == tuple(classes.split())
    assert {Path(name).parts[0] == held_out for name in names(val, disk)} == {held_out is not None}
    assert (told in "; ".join(train.notes)) if told else not train.notes


@pytest.mark.parametrize(
    ("folders", "layout", "told"),
    [
        ("bus car train/bus train/car", None, "bus, car lie both in it and in train: set --layout split to read train"),
        ("bus car train/Bus", None, "Bus lie both in it and in train: set --layout split"),
        ("bus train/a train/b val/a val/b", None, "bus lie beside them: set --layout split .* or --layout classes"),
        (
            "bus car val/bus",
            None,
            "bus lie both in it and in val: move bus, car into a folder train .*--layout classes",
        ),
        ("train/a train/b Training/a", None, "data/Training and .*data/train mean the same: .* remove or rename"),
        ("train/a train/b val/a Val/a", None, "data/Val and .*data/val mean the same"),
        ("train/a train/b valid/a validation/a", None, "valid and .*validation mean the same.*--layout classes"),
        ("train/a train/b test/a testing/a", None, "test and .*testing mean the same"),
        (
            "train val",
            None,
            "train holds 2 pictures and no folder: put .*if train, val are classes, set --layout classes",
        ),
        ("train val/a val/b", None, "train holds 2 pictures and no folder"),
        ("train/a train/b val", None, "val holds 2 pictures and no folder: put each .* or move val away"),
        ("val/a val/b", None, "holds val and no train folder: expected train/CLASS/PICTURE"),
        ("train", None, "train holds 2 pictures and no folder"),
        ("bus car", "split", "--layout is 'split' and DATA is .*: expected train/CLASS/PICTURE there, got bus, car"),
        ("train val", "split", "val holds 2 pictures and no folder"),
        ("train/a train/b val/A val/b", None, "val lacks 'a' and .* only case or Unicode's normal form differs"),
        ("train/ä train/b val/ä val/b", None, "only case or Unicode's normal form differs"),
    ],
)
def test_what_can_be_read_in_two_ways_is_asked(folders, layout, told, disk):
    disk.all_of(folders.replace("val/ä", "val/" + unicodedata.normalize("NFD", "ä")))
    with pytest.raises(TrainingError, match=told):
        disk.open(layout=layout)


def test_a_named_set_has_no_layout():
    with pytest.raises(TrainingError, match="--layout is 'split' and DATA is digits"):
        open_data(Config(data="digits", layout="split"))


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize(
    ("folders", "source", "target", "told"),
    [
        ("red=4 blue=4", "red/0.png", "blue/9.png", "1 file has two classes, by links"),
        ("train/a train/b val/a val/b", "train/a/0.png", "val/a/9.png", "1 picture is trained on and held out too"),
        ("train/a train/b val/a val/b", "train/a/0.png", "val/b/9.png", "1 picture is trained on and held out too"),
    ],
)
def test_one_file_in_two_places_is_an_error_or_told(folders, source, target, told, link, disk):
    disk.all_of(folders)
    link(disk.root / source, disk.root / target)
    with pytest.raises(TrainingError, match=f"{told}.*--duplicates warn") as raised:
        disk.open()
    assert str(disk.root / source) in str(raised.value) and str(disk.root / target) in str(raised.value)
    train, val = disk.open(duplicates="warn")
    assert told in train.notes[0] and str(disk.root / target) in train.notes[0]
    assert not disk.open(duplicates="ignore")[0].notes
    if "val" not in folders:
        both = [{name in (source, target) for name in names(part, disk)} for part in (train, val)]
        assert sorted(map(sorted, both)) == [[False], [False, True]]


def test_a_folder_linked_as_two_classes_is_an_error(disk):
    disk.all_of("red=4 blue=4")
    disk.link("rot", "red")
    with pytest.raises(TrainingError, match="4 files have two classes, by links"):
        disk.open()


@pytest.mark.parametrize("size", [10, EDGE, 2 * EDGE, 2 * EDGE + 1, 5 * EDGE])
def test_a_copy_is_equal_to_its_last_byte(size, disk):
    disk.all_of("train/a train/b val/a val/b")
    content = bytes(size)
    (disk.root / "train" / "a" / "c.png").write_bytes(content)
    nearly = content[: size // 2] + b"\1" + content[size // 2 + 1 :]
    (disk.root / "val" / "a" / "c.png").write_bytes(nearly)
    disk.open()
    (disk.root / "val" / "a" / "c.png").write_bytes(content)
    with pytest.raises(TrainingError, match="1 picture is trained on and held out too, by links or copies"):
        disk.open()
    assert len(disk.open(duplicates="ignore")[0]) == 5


def test_copies_are_held_out_together_and_other_splits_stay(disk):
    disk.all_of("a=10 b=10")
    before = disk.open()
    plain = split(read_folder(disk.root), 0.2, 0)
    assert [part.pictures for part in before] == [part.pictures for part in plain]
    for index in range(10):
        disk.files(f"c/{index}", 2, content=b"copy %d" % index)
    for index in range(4):
        disk.files(f"d/{index}", 2, content=b"copy %d" % index)
    for seed in range(20):
        train, val = disk.open(seed=seed)
        sides = [{path.read_bytes() for path in part.pictures} for part in (train, val)]
        assert not sides[0] & sides[1] and len(train) + len(val) == 48
        assert min(np.bincount(train.labels)) > 0
        counts = zip(np.bincount(val.labels), (2, 2, 4, 2), (2, 2, 6, 4), strict=True)
        assert all(low <= number <= high for number, low, high in counts)
        assert any("4 pictures have copies under another class" in note for note in val.notes)


@pytest.mark.parametrize(
    ("contents", "told"),
    [({"a": "xx", "b": "yz"}, "class 'a' has 2 pictures that are all copies of one"),
     ({"a": "xy", "b": "yz", "c": "xz"}, "so that none can be held out")],
)  # fmt: skip
def test_copies_that_leave_nothing_to_hold_out_are_told(contents, told, disk):
    for name, several in contents.items():
        for content in several:
            disk.files(f"{name}/{disk.written}", 1, content=content.encode() * 9)
    with pytest.raises(TrainingError, match=f"{told}.*--duplicates ignore"):
        disk.open()
    assert len(disk.open(duplicates="ignore")[1]) == len(contents)


def test_contents_of_more_files_than_are_read_are_told_not_to_be_compared(disk, monkeypatch):
    disk.files("a", 4, content=b"one")
    disk.files("b", 4, content=b"two")
    monkeypatch.setattr(copies, "MOST_READ", 7)
    train, _ = disk.open()
    assert "8 pictures have the size of another one, more than 7: their contents are not compared" in train.notes[0]


def test_names_that_look_the_same_are_two_classes_and_told(disk):
    for name in ("cat", "Cat", "\u00e9", "e\u0301"):
        disk.files(name, 2)
    train, _ = disk.open()
    assert len(train.classes) == 4 and len(train.notes) == 2
    assert "'Cat', 'cat'" in train.notes[0] and r"'e\u0301', '\xe9'" in train.notes[1]


PARTS = ["a", "b", "A", "\u00e9", "e\u0301", "$5", "\u732b", "na\udcff", "deep", ".hid", "x.png"]
SPLITS = ["train", "Train", "training", "val", "valid", "test", "dev"]
FILES = ["0.png", "1.png", "2.JPG", "3.png", "note.txt", ".h.png"]
CONTENTS = [None, None, None, None, b"", b"same", b"also same", bytes(9000)]
CONTENTS += [tiff(struct.pack("<f", 7), (32,), sample_format=3), tiff(struct.pack("<H", 7), (16,)), tiff(b"\7", (8,))]
HARMLESS = [name for name in PARTS if not name.startswith(".")]


@st.composite
def trees(draw):
    """Steps: class folders with some pictures each, then a few odd things in, beside and between them."""
    names = draw(st.lists(st.sampled_from(HARMLESS), min_size=2, max_size=3, unique=True))
    tops = draw(st.sampled_from([("",)] * 3 + [("train/",), ("Train/", "test/"), ("train/", "val/", "test/")]))
    classes = [top + name for top in tops for name in names]
    inside = st.sampled_from(classes) | st.sampled_from(classes).map("{}/deep".format)
    anywhere = st.lists(st.sampled_from(PARTS + SPLITS), min_size=1, max_size=2).map("/".join)
    where = st.one_of(*[inside] * 9, anywhere)
    place = st.tuples(where, st.sampled_from(FILES)).map("/".join)
    link = st.one_of(place, st.tuples(where, st.sampled_from(["l", "m"])).map("/".join))
    odd = st.one_of(
        st.tuples(st.just("file"), place, st.sampled_from(CONTENTS)),
        st.tuples(st.just("fill"), where, st.integers(1, 4)),
        st.tuples(st.just("link"), link, st.sampled_from([".", "..", "../..", "gone", "/dev/null", "3.png"])),
        st.tuples(st.just("to"), link, st.integers(0, 50)),
        st.tuples(st.just("out"), link, st.sampled_from(["", "in", "in/0.png", "up"])),
        st.tuples(st.just("hard"), place, st.integers(0, 50)),
        st.tuples(st.sampled_from(["copy", "hard", "to"]), place, st.integers(0, 50)),
        st.tuples(st.just("copy"), place, st.integers(0, 50)),
        st.tuples(st.just("pipe"), place, st.none()),
    )
    filled = [("fill", each, draw(st.integers(2, 4))) for each in classes]
    return filled + draw(st.lists(odd, max_size=6))


def build(root, todo):
    """A tree of the steps that are possible; outside the root lies a folder that links may lead to."""
    root.mkdir()
    (root.parent / "outside" / "in").mkdir(parents=True)
    (root.parent / "outside" / "in" / "0.png").write_bytes(b"outside")
    (root.parent / "outside" / "up").symlink_to("in/..")
    for number, (kind, where, what) in enumerate(todo):
        path = root / where
        there = sorted(each for each in root.parent.rglob("*"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file" and not path.is_fifo():
                path.write_bytes(b"%d" % number if what is None else what)
            elif kind == "fill":
                for index in range(what):
                    path.mkdir(parents=True, exist_ok=True)
                    if not (path / f"{index}.png").is_fifo():
                        (path / f"{index}.png").write_bytes(b"%d %d" % (number, index))
            elif kind == "link":
                path.symlink_to(what)
            elif kind == "to":
                path.symlink_to(there[what % len(there)])
            elif kind == "out":
                path.symlink_to(root.parent / "outside" / what)
            elif kind == "copy" and not path.is_fifo() and there[what % len(there)].is_file():
                path.write_bytes(there[what % len(there)].read_bytes())
            elif kind == "hard":
                os.link(there[what % len(there)], path)
            elif kind == "pipe":
                os.mkfifo(path)
        except OSError:
            pass


def real(path):
    try:
        status = os.stat(path)
    except OSError:
        return str(path)
    return (status.st_dev, status.st_ino) if os.path.isfile(path) else str(path)


def reached(folder, active):
    """Real pictures below a folder, by every path that doesn't lead back."""
    here = os.path.realpath(folder)
    out = set()
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            target = Path(os.path.realpath(entry.path))
            if not any(target == Path(each) or target in Path(each).parents for each in (*active, here)):
                out |= reached(entry.path, (*active, here))
        elif Path(entry.name).suffix.lower() in (".png", ".jpg"):
            out.add(real(entry.path))
    return out


def check_samples(root, train, val, config):
    assert train.classes == val.classes and len(set(train.classes)) == len(train.classes) > 1
    sides = []
    for part in (train, val):
        entries = Counter((label, real(path)) for path, label in zip(part.pictures, part.labels.tolist(), strict=True))
        assert max(entries.values()) == 1
        for index in range(len(part)):
            try:
                assert part.load(index).mode == "RGB"
            except PictureError as error:
                assert str(error)
        sides.append({key for _, key in entries})
    told = [path.relative_to(root).parts for part in (train, val) for path in part.pictures]
    labels = [part.classes[label] for part in (train, val) for label in part.labels]
    if all(parts[0] == label for parts, label in zip(told, labels, strict=True)):
        roots = [root]
        seen = {name: {real(p) for p, c in zip([*train.pictures, *val.pictures], labels, strict=True) if c == name}
                for name in train.classes}  # fmt: skip
        for name, found in seen.items():
            assert found == reached(root / name, (os.path.realpath(root),))
    else:
        roots = []
        for part in (train, val):
            (top,) = {path.relative_to(root).parts[0] for path in part.pictures}
            roots.append(root / top)
        assert all(parts[1] == label for parts, label in zip(told, labels, strict=True))
        for name in train.classes:
            found = {real(p) for s in (train, val) for p, c in zip(s.pictures, s.labels, strict=True)
                     if s.classes[c] == name}  # fmt: skip
            assert found == set().union(*(reached(each / name, (os.path.realpath(root),)) for each in set(roots)))
    own_split = len(set(roots)) == 1
    if own_split or config.duplicates == "error":
        assert not sides[0] & sides[1]
    if config.duplicates == "error" or (own_split and config.duplicates == "warn"):
        contents = [{Path(p).read_bytes() for p in s.pictures if os.path.isfile(p)} for s in (train, val)]
        assert not (contents[0] & contents[1]) - {b""}


@hypothesis.settings(max_examples=int(os.environ.get("EXAMPLES", "60")), deadline=None, derandomize=True, database=None)
@hypothesis.given(
    todo=trees(),
    options=st.fixed_dictionaries(
        {
            "layout": st.sampled_from([None, None, None, "split", "classes"]),
            "duplicates": st.sampled_from(["error", "error", "warn", "ignore"]),
            "seed": st.integers(0, 3),
        }
    ),
)
def test_any_tree_is_read_rightly_or_refused(todo, options, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree") / "data"
    build(root, todo)
    config = Config(data=str(root), **options)
    try:
        train, val = open_data(config)
    except TrainingError as error:
        hypothesis.event(ascii("refused: " + str(error).replace(str(root), "")[:60]))
        assert str(root) in str(error) or "--" in str(error) or "class '" in str(error)
        with pytest.raises(TrainingError) as again:
            open_data(config)
        assert str(again.value) == str(error)
        return
    hypothesis.event("read")
    check_samples(root, train, val, config)
    for before, again in zip((train, val), open_data(config), strict=True):
        assert before.pictures == again.pictures and before.notes == again.notes
        assert np.array_equal(before.labels, again.labels)
