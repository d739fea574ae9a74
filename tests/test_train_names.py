"""Names of classes and files, whatever is in them: printed, stored, drawn, and told apart."""

import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import library
from tiny import RUN

for needed in ("torchvision", "timm", "rich", "matplotlib", "tensorboard"):
    library(needed)
Image = library("PIL.Image")
builder = library("fontTools.fontBuilder")

from matplotlib import font_manager  # noqa: E402

from fastmbconv.cli import main  # noqa: E402
from fastmbconv.training import lettering  # noqa: E402
from fastmbconv.training.config import Config, read_toml, resumed, toml  # noqa: E402
from fastmbconv.training.errors import TrainingError  # noqa: E402
from fastmbconv.training.names import printable, say, shorten  # noqa: E402
from fastmbconv.training.predict import Guess, draw  # noqa: E402
from fastmbconv.training.progress import Log  # noqa: E402
from fastmbconv.training.report import draw_confusion  # noqa: E402
from fastmbconv.training.restore import Trained, imagenet_names, same_classes  # noqa: E402

START = "a beginning that they share, "


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["cat", "a" * 20, "b" * 21], ["cat", "a" * 20, "b" * 19 + "…"]),
        ([START + "one", START + "two"], ["a beginnin…hare, one", "a beginnin…hare, two"]),
        ([START + "1" + START, START + "2" + START], ["a beginning that t…0", "a beginning that t…1"]),
        (["crane", "crane"], ["crane…0", "crane…1"]),
        (["\u00e9", "e\u0301", "e"], ["\u00e9…0", "e\u0301…1", "e"]),
        (["a\nb", "na\udcff"], ["a\\nb", "na\\udcff"]),
    ],
)
def test_short_names_stay_apart(names, shown):
    assert shorten(names, 20) == shown


def test_any_name_is_printed():
    for encoding, wanted in (
        ("utf-8", "\u732b\\udcff :dog: [b] a\\x1bb\n"),
        ("ascii", "\\u732b\\udcff :dog: [b] a\\x1bb\n"),
    ):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding)
        say("\u732b\udcff :dog: [b] a\x1bb", file)
        log = Log(speaks=True)
        log.console.file = file
        log.say("\u732b\udcff :dog: [b] a\x1bb")
        file.flush()
        assert raw.getvalue().decode(encoding) == wanted * 2
    assert printable("e\u0301 \u200d $") == "e\u0301 \u200d $"


@pytest.mark.parametrize("data", ["\U0001f600 \u732b", "a\x7fb\x01\\\"'\n\t", "na\udcff\udc80", "$x$"])
def test_any_path_comes_back_from_a_configuration(data, tmp_path):
    config = Config(data=data, clip_grad=float("inf"), lr=1e30)
    (tmp_path / "config.toml").write_bytes(toml(config).encode(errors="surrogateescape"))
    assert Config(**read_toml(tmp_path / "config.toml")) == config


def test_a_resumed_run_splits_copies_as_it_did():
    stored = {"data": "d", "duplicates": "warn"}
    assert resumed(stored, {"duplicates": "error"})[1] == ["--duplicates warn -> error"]
    with pytest.raises(TrainingError, match="--duplicates is ignore and the run to resume has warn"):
        resumed(stored, {"duplicates": "ignore"})
    with pytest.raises(TrainingError, match="--layout is classes and the run to resume has None"):
        resumed(stored, {"layout": "classes"})


def test_imagenet_has_a_thousand_names_and_takes_its_folders():
    from timm.data import ImageNetInfo

    names = imagenet_names()
    assert len(set(names)) == 1000
    assert [names[i] for i in (0, 134, 517, 638, 639)] == [
        "tench",
        "crane (n02012849)",
        "crane (n03126707)",
        "maillot",
        "maillot, tank suit",
    ]
    trained = Trained(None, names, None, Config(), "")
    info = ImageNetInfo()
    ids = [info.index_to_label_name(index) for index in range(1000)]
    same_classes(trained, ids, "d")
    for classes, told in (
        (ids[:999], "the model doesn't know n01440764"),
        (sorted(names), "the names are the same, in another order"),
        ([names[0].upper(), *names[1:]], "only case or Unicode's normal form differs"),
    ):
        with pytest.raises(TrainingError, match=told):
            same_classes(trained, classes, "d")


ODD = ("\u732b", "\u72d7 dog", "$5", "a$b$c", "na\udcff", "x\ny", "\U0001f9ff", "plain")


def texts_of(monkeypatch, function, *arguments):
    """What is written into a figure, and the notes; a warning of Matplotlib's is an error."""
    from fastmbconv.training import predict, report

    seen = []

    def look(figure, path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.canvas.draw()
            for axes in figure.axes:
                seen.extend(text for text in (*axes.get_yticklabels(), *axes.texts, axes.title) if text.get_text())

    for module in (predict, report):
        monkeypatch.setattr(module, "save", look)
    notes = function(*arguments)
    assert not any(text.get_parse_math() for text in seen)
    return [text.get_text() for text in seen], notes


def test_names_are_drawn_as_they_are_or_by_number(monkeypatch, tmp_path):
    without = [family for family in lettering._families() if family.startswith(("DejaVu", "STIX"))]
    monkeypatch.setattr(lettering, "_families", lambda: without)
    texts, notes = texts_of(monkeypatch, draw_confusion, tmp_path, torch.ones(8, 8), ODD)
    assert {"class 0", "class 1", "$5", "a$b$c", "na\\udcff", "x\\ny", "class 6", "plain"} <= set(texts)
    assert len(notes) == 1 and "U+72D7 U+732B U+1F9FF" in notes[0] and "Noto Emoji, Noto Sans CJK" in notes[0]
    Image.new("RGB", (8, 8)).save(tmp_path / "\u732b$1$.png")
    guesses = [Guess(tmp_path / "\u732b$1$.png", (4, 0, 2), ("na\udcff", "\u732b", "$5"), (0.5, 0.3, 0.2))]
    texts, notes = texts_of(monkeypatch, draw, tmp_path, guesses)
    assert {"na\\udcff", "class 0", "$5", "\\u732b$1$.png"} <= set(texts) and "U+732B" in notes[0]
    assert not texts_of(monkeypatch, draw_confusion, tmp_path, torch.ones(2, 2), ("caf\u00e9", "\u05d0"))[1]


def test_a_font_that_has_the_letters_is_taken(monkeypatch, tmp_path):
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for step, point in enumerate([(0, 0), (0, 500), (500, 500)]):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({0x732B: "cat"})
    font.setupGlyf({".notdef": pen.glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (600, 0), "cat": (600, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    font.setupOS2(usWeightClass=400)
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    manager.addfont(tmp_path / "cats.ttf")
    monkeypatch.setattr(lettering, "_families", lambda: ["STIXGeneral", "Cats"])
    texts, notes = texts_of(monkeypatch, draw_confusion, tmp_path, torch.ones(2, 2), ("\u732b", "dog"))
    assert "\u732b" in texts and not notes


TINY = [*RUN, "--width", "0.1", "--depth", "0.1", "--batch-size", "8"]


def test_a_run_with_odd_names_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "da\udcff \U0001f600"
    generator = np.random.default_rng(0)
    for name in ("$5 :dog: [b]", "na\udcfe", "\u732b\n"):
        (data / name).mkdir(parents=True)
        for index in range(6):
            Image.fromarray(generator.integers(0, 255, (9, 9, 3), np.uint8)).save(data / name / f"{index}.png")
        (data / name / "x\udcfd.png").write_bytes(b"broken")
    (data / "$5 :dog: [b]" / "up").symlink_to("..")
    os.mkfifo(data / "$5 :dog: [b]" / "pipe.png")
    assert main(["train", str(data), *TINY, "--output", "run"]) == 0
    out = capsys.readouterr().out
    assert out.count("not followed: $5 :dog: [b]/up -> ..") == 1 and "a named pipe, no file" in out
    assert read_toml("run/config.toml")["data"] == str(data)
    assert main(["eval", "--checkpoint", "run", "--split", "train", "--json"]) == 0
    out, error = capsys.readouterr()
    assert len(json.loads(out)["confusion"]) == 3 and error.count("not followed") == 1
    for layout, code in (("classes", 2), (None, 0)):
        options = ["--layout", layout] if layout else []
        assert main(["eval", "--checkpoint", "run", *options]) == code
    assert "--layout is classes and the run to resume has None" in capsys.readouterr().err
    assert main(["eval", str(data), "--checkpoint", "run"]) == 0
    capsys.readouterr()
    assert main(["predict", str(data), "--checkpoint", "run", "--json"]) == 1
    out, error = capsys.readouterr()
    assert len(json.loads(out)) == 18 and "not followed" in error and "a named pipe, no file" in error
    assert [set(each) for each in json.loads(out)[0]["classes"]] == [{"class", "name", "probability"}] * 3
    assert main(["predict", str(data), "--checkpoint", "run"]) == 1
    assert Path("predictions.png").exists() and "na\\udcfe" in capsys.readouterr().out


def test_other_data_are_read_by_their_own_layout(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("own/train/a", "own/train/b", "own/a", "other/a", "other/b"):
        Path(name).mkdir(parents=True)
        for index in range(6):
            Image.fromarray(generator.integers(0, 255, (9, 9, 3), np.uint8)).save(f"{name}/{index}.png")
    assert main(["train", "own", *TINY, "--output", "run"]) == 2
    assert "set --layout split" in capsys.readouterr().err
    assert main(["train", "own", *TINY, "--output", "run", "--layout", "split"]) == 0
    for arguments in ([], [str(tmp_path / "own")], ["other"], ["other", "--layout", "classes"]):
        assert main(["eval", *arguments, "--checkpoint", "run"]) == 0
    assert main(["eval", "other", "--checkpoint", "run", "--layout", "split"]) == 2
    assert "--layout is 'split' and DATA is other" in capsys.readouterr().err
