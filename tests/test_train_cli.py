"""The commands train, eval and predict, as a user meets them."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import library
from parity import assert_parity

for needed in ("torchvision", "timm", "rich", "matplotlib", "sklearn", "tensorboard"):
    library(needed)
Image = library("PIL.Image")

from fastmbconv.cli import main  # noqa: E402
from fastmbconv.efficientnet import efficientnet_b0  # noqa: E402
from fastmbconv.training import checkpoint  # noqa: E402
from fastmbconv.training.loop import Trainer  # noqa: E402

TINY = ["--width", "0.1", "--depth", "0.1", "--resolution", "32", "--workers", "0", "--epochs", "2"]
TINY += ["--warmup-epochs", "0.5", "--batch-size", "20", "--augment", "none", "--optimizer", "sgd", "--lr", "0.01"]
TINY += ["--device", "cpu"]
LIGHT = "--no-tensorboard"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes that a glance tells apart, 30 pictures each, one of them broken."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (root / name).mkdir()
        for index in range(30):
            pixels = generator.integers(low, low + 100, (40, 36, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
    (root / "dark" / "07.png").write_bytes(b"no picture")
    return root


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(*arguments):
    return main(["train", *map(str, arguments)])


def weights(folder):
    return checkpoint.load(Path(folder) / checkpoint.LAST)["model"]


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_trained_judged_and_predicted(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(pictures, *TINY, "--output", run) == 0
    printed = capsys.readouterr().out
    assert "48 pictures to train on, 12 held out, 2 classes" in printed and "epoch 2/2: loss" in printed
    assert "07.png: not a picture" in printed and "skipped 1 pictures" in printed
    assert is_picture(run / "curves.png") and is_picture(run / "confusion.png")
    history = json.loads((run / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2]
    assert list((run / "tensorboard").glob("events*"))

    assert main(["eval", "--checkpoint", str(run), "--picture", str(tmp_path / "c.png"), "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    best = max(history, key=lambda row: row["val_top1"])
    assert judged["top1"] == pytest.approx(best["val_top1"]) and judged["loss"] == pytest.approx(best["val_loss"])
    assert np.sum(judged["confusion"]) == judged["pictures"] and is_picture(tmp_path / "c.png")

    chosen = [str(pictures / "dark" / name) for name in ("00.png", "07.png")]
    drawn = tmp_path / "p.png"
    assert main(["predict", *chosen, "--checkpoint", str(run), "--picture", str(drawn), "--json"]) == 1
    out, error = capsys.readouterr()
    (row,) = json.loads(out)
    assert {(each["class"], each["name"]) for each in row["classes"]} == {(0, "bright"), (1, "dark")}
    shares = [each["probability"] for each in row["classes"]]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert "07.png: not a picture" in error and is_picture(drawn)

    again = tmp_path / "again"
    assert train("--config", run / "config.toml", "--output", again, LIGHT) == 0
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(run).items())
    tuned = (pictures, *TINY, LIGHT, "--weights", run / "best.pt", "--freeze", 7, "--output", tmp_path / "tuned")
    assert train(*tuned) == 0
    kept = torch.load(run / "best.pt")["state_dict"]
    moved = {name for name, value in weights(tmp_path / "tuned").items() if not torch.equal(value, kept[name])}
    assert moved and all(name.startswith(("head.", "classifier.")) for name in moved)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_want_a_gpu(pictures, tmp_path, capsys):
    assert train(pictures, *TINY, LIGHT, "--graph", "--output", tmp_path / "run") == 2
    assert "--graph is set, on cpu: there is no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_judged_in_its_own_precision(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(pictures, *TINY, LIGHT, "--epochs", 1, "--amp", "bf16", "--output", run) == 0
    (row,) = json.loads((run / "history.json").read_text())
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(run), "--picture", str(tmp_path / "c.png"), "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert (judged["precision"], judged["loss"]) == ("bfloat16", pytest.approx(row["val_loss"], rel=1e-6))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_ends_the_run(number, pictures, tmp_path, capsys, monkeypatch):
    run, step = tmp_path / "run", Trainer._step
    arguments = (pictures, *TINY, LIGHT, "--output", run)
    with monkeypatch.context() as patch:

        def interrupted(self, batches):
            step(self, batches)
            if self.step == 2:
                signal.raise_signal(number)

        patch.setattr(Trainer, "_step", interrupted)
        assert train(*arguments) == 128 + number
    state = checkpoint.load(run / checkpoint.LAST)
    assert (state["epoch"], state["position"]) == (1, 1)
    assert train(*arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert train("--output", run, "--resume") == 0
    assert f"going on with {run / 'last.pt'}: epoch 2, step 1" in capsys.readouterr().out
    assert not list(run.glob(".*.part"))


def test_a_full_disk_and_a_lost_loss_keep_the_last_good_checkpoint(pictures, tmp_path, capsys, monkeypatch):
    run, fsync = tmp_path / "run", checkpoint.os.fsync
    writes = []

    def full(file):
        writes.append(file)
        if len(writes) > 3:  # config.toml, best.pt and last.pt of the first epoch
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        assert train(pictures, *TINY, LIGHT, "--output", run) == 2
    error = capsys.readouterr().err
    assert "the disk is full: make room" in error and str(run / checkpoint.LAST) in error
    before = checkpoint.load(run / checkpoint.LAST)
    assert before["epoch"] == 1 and not list(run.glob(".*.part"))
    assert train("--output", run, "--resume", "--lr", "1e30") == 2
    error = capsys.readouterr().err
    assert "the loss is no number any more, in epoch 2" in error and "lower --lr (now 1e+30)" in error
    assert checkpoint.load(run / checkpoint.LAST)["step"] == before["step"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/nowhere"], "it is no folder here"),
        (["digits", "--model", "resnet50"], "--model is 'resnet50': allowed are efficientnet_b0"),
        (["digits", "--device", "tpu9"], "--device is tpu9: it can't be used here"),
        (["digits", "--batch-size", "5000"], "there are 1438 pictures to train on"),
        (["digits", "--batch-size", "10", "--accumulate", "3"], "must be a multiple of 3"),
        (["digits", "--weights", "B1"], "a checkpoint of another model"),
        (["digits", "--weights", "WORDS"], "WORDS is no checkpoint, or is cut off or damaged (5 bytes)"),
        (["digits", "--weights", "NAMES"], "that is checkpoints.load(model, source, scheme=...) in Python"),
    ],
)
def test_bad_input_says_what_to_do(arguments, told, tmp_path, capsys):
    if "B1" in arguments:
        torch.save(efficientnet_b0(num_classes=3).state_dict(), tmp_path / "B1")
        arguments = [*arguments, "--model", "efficientnet_b1"]
    (tmp_path / "WORDS").write_text("words")
    torch.save({"a": torch.ones(1)}, tmp_path / "NAMES")
    arguments = [str(tmp_path / a) if a in ("B1", "WORDS", "NAMES") else a for a in arguments]
    assert train(*arguments, "--output", tmp_path / "run", LIGHT) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_predict_names_what_is_missing(tmp_path, capsys):
    assert main(["predict", "x.png", "--checkpoint", str(tmp_path)]) == 2
    assert "it holds no checkpoint (expected model.safetensors, pytorch_model.bin, best.pt, last.pt)" in (
        capsys.readouterr().err
    )
    torch.save(efficientnet_b0(num_classes=0).state_dict(), tmp_path / "b0.pt")
    assert main(["predict", "x.png", "--checkpoint", str(tmp_path / "b0.pt")]) == 2
    assert "it has no classifier, and so no classes to name" in capsys.readouterr().err


def test_a_picture_that_has_no_place_is_named(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(pictures, *TINY, LIGHT, "--epochs", 1, "--output", run) == 0
    for command in (["predict", str(pictures / "dark" / "00.png")], ["eval"]):
        assert main([*command, "--checkpoint", str(run), "--picture", str(tmp_path / "no" / "p.png")]) == 2
        assert "p.png can't be written: No such file or directory" in capsys.readouterr().err
    assert train("--output", run, "--resume") == 0
    assert "all 1 epochs are done; a higher --epochs trains on" in capsys.readouterr().out


def test_two_processes_are_one(pictures, tmp_path):
    """The same steps, on one process and on two that torchrun starts; frozen BNs, which see no batch."""
    same = (str(pictures), *TINY, LIGHT, "--freeze-bn", "--drop-path", "0", "--dropout", "0", "--flip", "0.5")
    assert train(*same, "--output", tmp_path / "one") == 0
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*launch, "-m", "fastmbconv.cli", "train", *same, "--output", str(tmp_path / "two"))
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("epoch 2/2") == 1 and "2 processes" in result.stdout
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        if value.is_floating_point():
            assert_parity(name, two[name], value, value)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    for ours, theirs in zip(*histories, strict=True):
        assert ours["val_top1"] == theirs["val_top1"]
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
