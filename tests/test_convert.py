"""`fastmbconv convert`: another library's names, the same outputs there, and a refusal for what doesn't fit."""

import re
import sys

import pytest
import torch
from libraries import library
from torch import nn

from fastmbconv import checkpoints
from fastmbconv.checkpoints import CheckpointError, identify
from fastmbconv.cli import convert, main, peers
from fastmbconv.efficientnet import EfficientNet, efficientnet

PACKAGES = {"lukemelas": "efficientnet_pytorch"}


def state(variant="b0", scheme="fastmbconv", num_classes=3, **options):
    """A checkpoint of ours with BNs that have moved, under a library's names."""
    torch.manual_seed(0)
    model = efficientnet(variant, num_classes=num_classes, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
    return checkpoints.convert(model, model.state_dict(), scheme)


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.pth"
    torch.save(state(scheme="timm"), path)
    return path


@pytest.fixture
def alone(monkeypatch):
    """No library but ours is installed."""
    for package in ("timm", "torchvision", "efficientnet_pytorch", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("origin", "to", "suffix", "numerics"),
    [
        ("timm", "torchvision", ".pth", "family torch, BN eps 1e-05: torchvision's own; timm's names are the same"),
        ("lukemelas", "transformers", ".pt", "family tf, BN eps 0.001: lukemelas's own"),
        ("transformers", "timm", ".safetensors", "family tf, BN eps 0.001: transformers's own"),
    ],
)
def test_the_other_librarys_own_model_agrees(origin, to, suffix, numerics, capsys, tmp_path):
    for name in {origin, to} - {"fastmbconv"}:
        library(PACKAGES.get(name, name))
    before = state(scheme=convert.LIBRARIES[origin])
    source, target = tmp_path / "source.pth", tmp_path / f"target{suffix}"
    torch.save({"state_dict": before}, source)
    assert main(["convert", str(source), str(target), "--from", origin, "--to", to]) == 0
    printed = capsys.readouterr().out
    assert f"{origin}'s efficientnet b0" in printed and numerics in printed
    lines = re.findall(r"(SRC|DST) in (\w+)'s own model, .* difference (\S+) in float64, agrees", printed)
    assert [line[:2] for line in lines] == [("SRC", origin), ("DST", to)]
    assert all(float(difference) < 1e-12 for *_, difference in lines)
    after = checkpoints.read(target)
    assert identify(after) == checkpoints.Identity(convert.LIBRARIES[to], "b0", 3, 3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            before.values(),
            checkpoints.convert(identify(before).model(), after, convert.LIBRARIES[origin]).values(),
            strict=True,
        )
    )


@pytest.mark.parametrize("change", ["weight", "family"])
def test_models_that_differ_are_caught_and_nothing_is_written(change, timm_file, capsys, tmp_path, monkeypatch):
    library("torchvision")
    if change == "weight":
        renamed = state(scheme="torchvision")
        renamed["features.4.1.block.1.1.running_var"].mul_(1.001)
        monkeypatch.setattr(
            checkpoints,
            "convert",
            lambda model, source, to, own=checkpoints.convert: (
                renamed if to == "torchvision" else own(model, source, to)
            ),
        )
    else:
        monkeypatch.setattr(peers, "numerics", lambda *_: (peers.Numerics("tf", 1e-3), "wrong"))
    assert main(["convert", str(timm_file), str(tmp_path / "x.pt"), "--to", "torchvision"]) == 1
    printed = capsys.readouterr().out
    assert "DST in torchvision's own model" in printed and "DIFFERS" in printed and "x.pt is not written" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("alone")
def test_libraries_that_are_not_installed_are_named_and_force_overwrites(timm_file, capsys, tmp_path):
    target = tmp_path / "x.pt"
    target.write_text("mine")
    assert main(["convert", str(timm_file), str(target), "--to", "lukemelas", "--family", "tf", "--force"]) == 0
    printed = capsys.readouterr().out
    assert "SRC in timm's own model: not compared, this needs timm" in printed
    assert "DST in lukemelas's own model: not compared, this needs efficientnet_pytorch" in printed
    with torch.device("meta"):
        names = state(scheme="lukemelas")
    assert list(checkpoints.read(target)) == list(names)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


REFUSED = {
    "--to lukemelas --family torch": "lukemelas: its models are of family tf, .*timm's names are the same in both",
    "--to torchvision --family tf": "--to is torchvision: its models are of family torch, .* allowed are timm and fast",
    "--to torchvision --model tf_efficientnet_b0": "its models are of family torch",
    "--to torchvision --model tf_b0 --family torch": "--model is 'tf_b0' and --family torch: tf_ says family tf",
    "--to torchvision --model b1": "--model is b1: SRC fits efficientnet b0",
    "--to torchvision --model b9": "--model is 'b9': allowed are b0, b1,",
    "--to torchvision --from lukemelas": "--from is lukemelas: SRC has the names of timm",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_refused(options, timm_file, capsys, tmp_path):
    assert main(["convert", str(timm_file), str(tmp_path / "x.pt"), *options.split()]) == 2
    assert re.search(REFUSED[options], capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "target", "variant", "family", "message"),
    [
        ("torchvision", "lukemelas", "b0", None, "--to is lukemelas: .* torchvision has weights of family torch"),
        ("torchvision", "timm", "b0", "tf", "--family is tf: torchvision's weights are of family torch"),
        ("lukemelas", "torchvision", "b0", None, "lukemelas has weights of family tf, BN eps 0.001"),
        ("timm", "torchvision", "b5", None, "b5 runs BN eps 0.001, timm's 1e-05 .*: --eps 0.001 if it came from"),
    ],
)
def test_numeric_families_that_do_not_go_together(source, target, variant, family, message):
    with pytest.raises(convert.CommandError, match=message):
        peers.numerics(source, target, checkpoints.Identity("timm", variant, 1000, 3), family)


@pytest.mark.parametrize(
    ("source", "target", "variant", "family", "expected"),
    [
        ("torchvision", "timm", "b5", None, ("torch", 1e-3)),
        ("timm", "fastmbconv", "lite0", None, ("tf", 1e-3)),
        ("timm", "fastmbconv", "b0", "tf", ("tf", 1e-3)),
        ("fastmbconv", "lukemelas", "b0", None, ("tf", 1e-3)),
    ],
)
def test_numerics_are_those_of_the_library_that_has_one_family(source, target, variant, family, expected):
    assert peers.numerics(source, target, checkpoints.Identity("timm", variant, 1000, 3), family)[0] == expected


@pytest.mark.parametrize(
    ("source", "target", "variant", "eps", "expected"),
    [
        ("timm", "torchvision", "b5", 1e-3, None),
        ("timm", "torchvision", "b0", 1e-3, "--eps is 0.001: torchvision's b0 runs 1e-05"),
        ("torchvision", "timm", "b5", 1e-5, "--eps is 1e-05: torchvision's b5 has BN eps 0.001"),
        ("fastmbconv", "timm", "b5", 1e-3, None),
    ],
)
def test_another_eps_goes_where_it_fits(source, target, variant, eps, expected):
    identity = checkpoints.Identity("timm", variant, 1000, 3)
    if expected is None:
        assert peers.numerics(source, target, identity, None, eps)[0] == ("torch", eps)
        return
    with pytest.raises(convert.CommandError, match=expected):
        peers.numerics(source, target, identity, None, eps)


def test_a_model_with_the_same_numerics_is_named():
    identity = checkpoints.Identity("timm", "b5", 10, 3)
    made = [
        peers.recipe(target, identity, peers.Numerics(*numerics))
        for target, numerics in (
            ("timm", ("torch", 1e-3)),
            ("timm", ("tf", 1e-3)),
            ("fastmbconv", ("torch", 1e-3)),
            ("timm", ("torch", 1e-5)),
            ("torchvision", ("torch", 1e-3)),
        )
    ]
    assert made == [
        "timm.create_model('efficientnet_b5', num_classes=10, bn_eps=0.001)",
        "timm.create_model('tf_efficientnet_b5', num_classes=10)",
        "efficientnet('b5', num_classes=10, family='torch', eps=0.001)",
        None,
        None,
    ]


def test_a_runs_own_family_is_known(capsys, tmp_path):
    run = {"format": 1, "look": {}, "config": {"family": "tf"}, "classes": ["a", "b", "c"], "state_dict": state()}
    torch.save(run, tmp_path / "best.pt")
    for target, code, told in (("timm", 0, "as the run's configuration says"), ("torchvision", 2, "family torch")):
        library(target)
        assert main(["convert", str(tmp_path / "best.pt"), str(tmp_path / f"{target}.pt"), "--to", target]) == code
        assert told in "".join(capsys.readouterr())


FILES = {
    "junk": (lambda path: path.write_text("no checkpoint"), "SRC is .*source.pth is no checkpoint"),
    "module": (lambda path: torch.save(nn.Linear(2, 2), path), "more than tensors; store model.state_dict"),
    "numbers": (lambda path: torch.save({"a": 3}, path), r"source.pth holds a \(int\): expected a state dict"),
    "cut": (lambda path: _cut(path), "source.pth is cut off: its end is missing"),
    "other": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "names of no known library"),
}


def _cut(path):
    torch.save(state(scheme="timm"), path)
    path.write_bytes(path.read_bytes()[:-4000])


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_checkpoint(kind, capsys, tmp_path):
    write, message = FILES[kind]
    write(tmp_path / "source.pth")
    assert main(["convert", str(tmp_path / "source.pth"), str(tmp_path / "x.pt"), "--to", "timm"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x.pt").exists()


def test_paths_are_checked_before_anything_is_read(capsys, tmp_path):
    source = tmp_path / "source.pt"
    source.write_text("anything")
    (tmp_path / "there.pt").write_text("mine")
    for first, second, message in (
        (tmp_path / "none.pt", tmp_path / "x.pt", "there is no such file"),
        (source, tmp_path / "x.onnx", r"allowed are names that end in .pt, .pth, .safetensors"),
        (source, tmp_path / "no" / "x.pt", "is not a folder"),
        (source, source, "it is SRC itself"),
        (source, tmp_path / "there.pt", "it exists; --force overwrites it"),
    ):
        assert main(["convert", str(first), str(second), "--to", "timm"]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_an_unknown_library_is_named(capsys, timm_file):
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(timm_file), "x.pt", "--to", "keras"])
    assert stop.value.code == 2
    assert "invalid choice: 'keras'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "options"),
    [("b1", {}), ("b2", {"num_classes": 10}), ("lite0", {"in_chans": 1}), ("b0", {"num_classes": 0})],
)
def test_a_checkpoint_is_identified_by_names_and_shapes(variant, options):
    with torch.device("meta"):
        model = efficientnet(variant, **options)
    expected = checkpoints.Identity("timm", variant, model.num_classes, model.in_chans)
    assert identify(checkpoints.convert(model, model.state_dict(), "timm")) == expected
    assert isinstance(expected.model(), EfficientNet)


def test_a_checkpoint_that_fits_no_variant_names_the_nearest():
    entries = state(scheme="timm")
    entries["blocks.1.0.conv_pw.weight"] = torch.ones(7)
    with pytest.raises(CheckpointError, match=r"fits none of b0, .*: b0 comes nearest, but stages.1.0.expand_conv"):
        identify(entries)
