"""Weights at the command line: what their source says is believed, what it doesn't say is told, as is every choice."""

import argparse
import json

import numpy as np
import pytest
import torch
from libraries import library
from tiny import RUN, tiny_b0, tiny_weights

for needed in ("torchvision", "timm", "rich", "matplotlib"):
    library(needed)
Image = library("PIL.Image")
library("safetensors.torch")

from safetensors.torch import save_file  # noqa: E402

from fastmbconv.checkpoints import read_contents  # noqa: E402
from fastmbconv.cli import main  # noqa: E402
from fastmbconv.sources.facts import IMAGENET  # noqa: E402
from fastmbconv.training import checkpoint  # noqa: E402
from fastmbconv.training.weights import normalisation  # noqa: E402

CFG = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 40, 40], "crop_pct": 0.9, "interpolation": "bilinear"}


@pytest.fixture(autouse=True)
def _tiny():
    with tiny_b0():
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a picture and two classes of six."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("red", "blue"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(6):
            pixels = generator.integers(0, 255, (36, 36, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "data" / "red" / "0.png").read_bytes())
    return tmp_path


def hub(path, **changes):
    path.mkdir()
    save_file(tiny_weights("timm"), path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "tf_efficientnet_b0",
        "num_classes": 3,
        "label_names": ["x", "y", "z"],
        "pretrained_cfg": CFG,
    }
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def store(path):
    """The sources of these tests, each in its way of saying something or nothing."""
    torch.save(tiny_weights("timm"), path / "plain.pth")
    torch.save(tiny_weights("timm"), path / "tf_efficientnet_b0_ap.pth")
    torch.save(tiny_weights("torchvision"), path / "vision.pth")
    torch.save(tiny_weights("timm", num_classes=1000), path / "imagenet.pth")
    both = {"state_dict": tiny_weights("timm"), "state_dict_ema": tiny_weights("timm", 2)}
    options = {"arch": "tf_efficientnet_b0", "args": argparse.Namespace(model="tf_efficientnet_b0")}
    torch.save({**options, **both}, path / "trained.pth.tar")
    hub(path / "hub")


ASSUMED = "family torch (symmetric padding, BN eps 1e-05) is assumed"
BY_SOURCE = {
    "plain.pth": [ASSUMED, "--family tf if the weights are timm's tf_*", "family torch is class", "in family tf class",
                  "nothing names its 3 classes", "resolution 32 (--resolution)", "normalize imagenet (--normalize)"],
    "tf_efficientnet_b0_ap.pth": ["family tf, BN eps 0.001: the file's name, tf_efficientnet_b0_ap.pth, says so"],
    "vision.pth": ["family torch, BN eps 1e-05: a torchvision checkpoint says so"],
    "imagenet.pth": ["its 1000 classes are taken to be ImageNet's, in their usual order"],
    "trained.pth.tar": ["'state_dict_ema' is taken, the moving average; --part 'state_dict' takes the other weights",
                        "family tf, BN eps 0.001: the checkpoint (arch 'tf_efficientnet_b0') says so"],
    "hub": ["model.safetensors is taken", "family tf", "the classes' names are config.json's"],
}  # fmt: skip


@pytest.mark.parametrize("name", BY_SOURCE)
def test_predict_tells_what_it_took_and_what_it_assumed(name, here, capsys):
    store(here)
    assert main(["predict", "x.png", "--checkpoint", name, "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert all(part in told for part in BY_SOURCE[name]), told
    assert (ASSUMED in told) == (name in ("plain.pth", "imagenet.pth"))


def test_what_a_source_says_of_pictures_is_not_assumed(here, capsys):
    store(here)
    for name, assumed in (("hub", ()), ("tf_efficientnet_b0_ap.pth", ("resolution", "crop", "interpolation"))):
        assert main(["predict", "x.png", "--checkpoint", name]) == 0
        told = capsys.readouterr().err
        for option in ("resolution", "crop", "interpolation", "normalize"):
            assert (f"(--{option})" in told) == (option in assumed), told


CONFLICTS = {
    ("trained.pth.tar", "--family torch"): "--family is torch, and the checkpoint (arch 'tf_efficientnet_b0') says tf",
    ("vision.pth", "--family tf"): "--family is tf, and a torchvision checkpoint says torch",
    ("vision.pth", "--eps 0.001"): "--eps is 0.001, and a torchvision checkpoint says 1e-05",
    ("hub", "--normalize imagenet"): "--normalize is imagenet, and config.json (pretrained_cfg) says half",
    (
        "plain.pth",
        "--model efficientnet_b1",
    ): "--model is efficientnet_b1, and plain.pth has the entries of efficientnet_b0",
    ("plain.pth", "--part ema"): "part is 'ema': plain.pth has one set of weights only",
    ("plain.pth", "--crop 2"): "--crop is 2.0: allowed are 0.1 to 1",
}


@pytest.mark.parametrize(("name", "options"), CONFLICTS)
def test_an_option_that_contradicts_the_source_is_an_error_that_names_both(name, options, here, capsys):
    store(here)
    assert main(["predict", "x.png", "--checkpoint", name, *options.split()]) == 2
    assert CONFLICTS[name, options] in capsys.readouterr().err


def test_a_config_that_its_entries_contradict_is_an_error(here, capsys):
    for index, (changes, told) in enumerate(
        (
            ({"num_classes": 10}, "config.json says num classes 10, and the model has 3"),
            ({"label_names": ["x", "y"]}, "config.json names 2 classes, and the classifier has 3"),
            ({"architecture": "tf_efficientnet_b1"}, "says b1, and the entries are those of b0"),
        )
    ):
        hub(here / str(index), **changes)
        assert main(["predict", "x.png", "--checkpoint", str(index)]) == 2
        assert told in capsys.readouterr().err


def test_eval_and_predict_see_pictures_as_the_source_says(here, capsys):
    from fastmbconv.training.restore import restore

    hub(here / "hub")
    assert restore("hub", {}).look == (40, 0.9, "bilinear", "half")
    assert restore("hub", {"resolution": 64}).look == (64, 0.9, "bilinear", "half")
    assert main(["eval", "data", "--checkpoint", "hub"]) == 2
    assert "class folders are not the model's 3 classes" in capsys.readouterr().err


def trained(here, *arguments):
    return main(["train", "data", *RUN, "--optimizer", "sgd", *arguments, "--output", "run"])


def test_a_run_takes_the_numerics_of_the_weights_that_it_starts_from(here, capsys):
    store(here)
    assert trained(here, "--weights", "trained.pth.tar") == 0
    told = capsys.readouterr().out
    assert "--weights-part 'state_dict' takes the other weights" in told and "family tf, BN eps 0.001" in told
    assert "the classifier is new: the checkpoint has none for 2 classes" in told
    run = checkpoint.load(here / "run" / "best.pt")
    assert run["config"]["family"] == "tf"
    assert main(["predict", "x.png", "--checkpoint", "run", "--family", "torch"]) == 2
    assert "--family is torch, and the run of run has tf: leave it out" in capsys.readouterr().err


def test_a_run_that_starts_from_weights_that_say_nothing_tells_what_it_assumes(here, capsys):
    store(here)
    assert trained(here, "--weights", "plain.pth") == 0
    assert ASSUMED in capsys.readouterr().out
    assert main(["train", "data", *RUN, "--weights", "trained.pth.tar", "--family", "torch", "--output", "no"]) == 2
    assert "--family is torch, and the checkpoint (arch 'tf_efficientnet_b0') says tf" in capsys.readouterr().err
    assert not (here / "no").exists()


def test_a_classifier_of_other_classes_is_not_kept(here, capsys):
    assert trained(here) == 0
    first = checkpoint.load(here / "run" / "best.pt")["state_dict"]["classifier.weight"]
    (here / "data" / "red").rename(here / "data" / "green")
    capsys.readouterr()
    assert (
        main(["train", "data", *RUN, "--optimizer", "sgd", "--lr", "0", "--weights", "run", "--output", "second"]) == 0
    )
    assert "the classifier is new: the checkpoint's has other classes" in capsys.readouterr().out
    second = checkpoint.load(here / "second" / "best.pt")["state_dict"]["classifier.weight"]
    assert first.shape == second.shape and not torch.allclose(first, second, atol=1e-4)


def test_weights_need_not_be_there_to_resume(here):
    store(here)
    assert trained(here, "--weights", "plain.pth") == 0
    (here / "plain.pth").unlink()
    assert main(["train", "--output", "run", "--resume", "--epochs", "2"]) == 0


def test_a_run_without_its_best_is_judged_by_the_average(here, capsys):
    assert trained(here) == 0
    (here / "run" / "best.pt").unlink()
    assert main(["predict", "x.png", "--checkpoint", "run"]) == 0
    told = capsys.readouterr().err
    assert "last.pt is taken" in told and "'average' is taken, the moving average; --part 'model' takes" in told


def test_a_broken_last_checkpoint_points_to_the_best_one(here, capsys):
    assert trained(here) == 0
    (here / "run" / "last.pt").write_bytes((here / "run" / "last.pt").read_bytes()[:1000])
    assert main(["train", "--output", "run", "--resume"]) == 2
    told = capsys.readouterr().err
    assert "last.pt is cut off" in told and "best.pt is whole, the weights after epoch 1: --weights run/best.pt" in told
    (here / "run" / "best.pt").unlink()
    assert main(["train", "--output", "run", "--resume"]) == 2
    assert "whole" not in capsys.readouterr().err


def damaged(state, how):
    """A run's last checkpoint with something else in it."""
    if how == "weights only":
        return {name: value for name, value in state.items() if name not in checkpoint.STATE}
    if how == "config":
        return {**state, "config": None}
    if how == "shape":
        return {**state, "model": {**state["model"], "stem.bn.bias": torch.ones(3)}}
    return {**state, "optimizer": {}}


def test_a_state_that_is_none_is_named(here, capsys):
    assert trained(here) == 0
    state = checkpoint.load(here / "run" / "last.pt")
    for how, told in (
        ("weights only", "last.pt is no state of a run to go on from: it has no epoch; "),
        ("config", "last.pt is damaged: it has no config; "),
        ("shape", "last.pt is damaged: its state doesn't fit this run (Error"),
        ("optimizer", "last.pt is damaged: its state doesn't fit this run"),
    ):
        torch.save(damaged(state, how), here / "run" / "last.pt")
        assert main(["train", "--output", "run", "--resume"]) == 2
        assert told in capsys.readouterr().err, how


def test_a_scripts_own_normalisation_goes_before_that_of_the_models_name():
    options = {"model": "tf_efficientnet_b0_ap", "mean": IMAGENET[0], "std": IMAGENET[1]}
    contents = read_contents({"state_dict": tiny_weights("timm"), "args": argparse.Namespace(**options)})
    assert normalisation(contents) == ("imagenet", None)


def test_convert_believes_a_source_and_takes_a_part(here, capsys):
    store(here)
    assert main(["convert", "trained.pth.tar", "a.pth", "--to", "fastmbconv", "--part", "state_dict"]) == 0
    assert "family tf, BN eps 0.001: as the checkpoint (arch 'tf_efficientnet_b0') says" in capsys.readouterr().out
    assert torch.equal(torch.load("a.pth")["stem.conv.weight"], tiny_weights("timm")["conv_stem.weight"])
    for options, told in (
        ("--family torch", "--family is torch, and the checkpoint (arch"),
        ("--part x", "part is 'x'"),
    ):
        assert main(["convert", "trained.pth.tar", "b.pth", "--to", "fastmbconv", *options.split()]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "x.png", "--checkpoint"],
        ["eval", "data", "--checkpoint"],
        ["train", "data", "--weights"],
        ["convert"],
    ],
    ids=["predict", "eval", "train", "convert"],
)
def test_a_web_page_is_one_at_every_door(arguments, here, capsys):
    (here / "page.pth").write_text("<!DOCTYPE html><html></html>")
    more = ["a.pth", "--to", "timm"] if arguments == ["convert"] else []
    assert main([*arguments, "page.pth", *more]) == 2
    told = capsys.readouterr().err
    assert "page.pth is a web page, not a checkpoint" in told and "weights_only" not in told
