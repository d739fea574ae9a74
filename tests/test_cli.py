"""The command: what each part prints, its exit codes, and what it says when it can't run."""

import re
import subprocess
import sys

import pytest
import torch
from libraries import library
from torch import nn

import fastmbconv
from fastmbconv import dispatch, parity, plans
from fastmbconv.cli import blocks, check, demo, errors, main, models
from fastmbconv.cli.extras import CommandError, require, require_timm
from fastmbconv.mbconv import MBConv

GPU = torch.cuda.is_available()
PHOTOS = ("tiger cat", "espresso", "missile", "moped", "palace")


@pytest.fixture(autouse=True)
def _backend_stays():
    before = fastmbconv.get_backend()
    yield
    assert fastmbconv.get_backend() == before


@pytest.fixture
def small_model(monkeypatch):
    def load(name):
        # Wide enough that no gradient is a single number, whose rounding is luck in either path.
        options = dict(expand_ratio=2, se_ratio=1.0)
        return nn.Sequential(nn.Conv2d(3, 16, 1), MBConv(16, 16, **options), MBConv(16, 8, 5, 2, **options))

    monkeypatch.setattr(check, "load", lambda name: models.Model(load(name), 224))


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "explain", "check", "info"))


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", printed, re.M)
    assert re.search(rf"^fastmbconv +{re.escape(fastmbconv.__version__)}$", printed, re.M)
    assert re.search(r"^cpu, float32 +eager: ", printed, re.M)
    assert re.search(r"^launches +planned \((interpreted, )?Triton \d+\.\d+\)$", printed, re.M)


def test_info_says_why_launches_are_not_planned(capsys, monkeypatch):
    monkeypatch.setattr(plans, "INTERPRETED", False)
    monkeypatch.setattr(plans, "TRITON", (3, 10))
    assert main(["info"]) == 0
    assert "each anew: Triton 3.10 is not known here (3.6 to 3.9 are)\n" in capsys.readouterr().out
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert main(["info"]) == 0
    assert re.search(r"^launches +none: Triton is not installed$", capsys.readouterr().out, re.M)


def test_module_runs_as_a_command():
    result = subprocess.run([sys.executable, "-m", "fastmbconv.cli", "--version"], capture_output=True, text=True)
    assert result.stdout.strip() == f"fastmbconv {fastmbconv.__version__}"


@pytest.mark.slow
def test_demo_classifies_draws_and_counts_its_blocks(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    assert main(["demo", "--size", "32", "--budget", "0.01", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PHOTOS)
    blocks_run = re.search(r"Path: Triton kernels .* for (\d+) of 16 blocks at 32 px", printed)
    assert blocks_run and int(blocks_run[1]) == (16 if GPU else 1)
    assert "the time budget was used up" in printed or GPU
    difference = re.search(r"Largest difference .*: (\S+) in a logit, (\S+) in a probability", printed)
    assert difference and float(difference[1]) < (0.1 if GPU else 1e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(GPU, reason="a GPU has no time budget")
def test_demo_says_so_when_no_block_ran_through_kernels(capsys, tmp_path):
    assert main(["demo", "--size", "32", "--budget", "0", "--output", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out
    assert "Path: eager PyTorch for all 16 blocks (the time budget was used up)" in printed
    assert "Largest difference from eager at 32 px: 0.00e+00" in printed


def test_a_fused_run_leaves_the_model_as_it_was(device):
    model = nn.Sequential(MBConv(4, 4), nn.Identity(), MBConv(4, 4)).to(device).eval()
    x = torch.randn(2, 4, 3, 3, device=device)
    result = blocks.run_fused(model, x, None)
    assert list(result.seconds) == ["0", "2"] and result.total == 2 and result.reason is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(row.path == "fused" for row in fastmbconv.explain(model))
    parity.assert_parity("output", result.output, model(x), model.double()(x.double()))


@pytest.mark.parametrize(
    ("option", "value", "told"), [("--size", "8", "32 and more"), ("--output", "/no/x.png", "folder")]
)
def test_demo_names_a_wrong_option(capsys, option, value, told):
    assert main(["demo", option, value]) == 2
    error = capsys.readouterr().err
    assert option in error and value in error and told in error


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_reports_every_block(capsys, dtype):
    assert main(["check", "--size", "8", "--batch", "3", "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 blocks checked" in printed and ", 0 outside the rule" in printed
    assert re.search(r"^1 +\S+", printed, re.M) and re.search(r"^2 +\S+", printed, re.M)


@pytest.mark.usefixtures("small_model")
def test_check_fails_where_the_rule_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(parity, "FACTOR", 0.0)
    monkeypatch.setattr(parity, "ATOL", {torch.float32: 0.0})
    assert main(["check", "--size", "8", "--batch", "3"]) == 1
    assert "BROKEN 1 output" in capsys.readouterr().out


@pytest.mark.usefixtures("small_model")
@pytest.mark.skipif(GPU, reason="a GPU has no time budget")
def test_check_says_what_it_left_out(capsys):
    assert main(["check", "--size", "8", "--batch", "3", "--budget", "0.001"]) == 0
    assert "not checked, the time budget was used up: 2" in capsys.readouterr().out


def test_check_compares_independent_gradients(device):
    block, x = MBConv(4, 4, expand_ratio=2).to(device), torch.randn(3, 4, 4, 4, device=device)
    rows = errors.compare("block", block, x, torch.float32)
    names = {row.tensor for row in rows}
    assert {"output", "d input", "d se.reduce.bias", "project_bn.running_var"} <= names
    assert all(row.eager < 1e-4 for row in rows if row.tensor.startswith(("d input", "output")))
    assert all(parameter.grad is None for parameter in block.parameters())
    assert [row.tensor for row in errors.compare("block", block, x, torch.float32, "eval")] == ["output in eval"]


def test_check_names_a_wrong_model(capsys):
    assert main(["check", "resnet50"]) == 2
    error = capsys.readouterr().err
    assert "'resnet50'" in error and "LIBRARY:MODEL" in error and "efficientnet_b0" in error


def test_check_refuses_a_model_without_blocks(capsys, monkeypatch):
    monkeypatch.setattr(check, "load", lambda name: models.Model(nn.Conv2d(3, 3, 1), 8))
    assert main(["check", "--size", "8"]) == 2
    assert "no MBConv block" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), [("rich", "cli"), ("matplotlib", "plot")])
def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--output", str(tmp_path / "demo.png")]) == 2
    error = capsys.readouterr().err
    assert module in error and f"fastmbconv[{extra}]" in error


def test_missing_photos_are_named(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"fastmbconv\[demo\]"):
        demo.load_photo("skimage", "data/chelsea.png")


def test_timm_imports_here():
    assert require_timm("demo").create_model is not None
    assert require("json", "none").dumps([]) == "[]"


EXPLAINED = {
    "efficientnet_b7": ("", 55, 55, 600),
    "timm:tf_efficientnet_b4": ("timm", 32, 32, 380),
    "torchvision:efficientnet_b0": ("torchvision", 16, 16, 224),
    "lukemelas:efficientnet-b1": ("efficientnet_pytorch", None, 23, 240),
    "transformers:efficientnet-b0": ("transformers", None, 16, 224),
    "smp:efficientnet-b0": ("segmentation_models_pytorch", None, 16, 224),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain(name, capsys, monkeypatch):
    package, fused, total, resolution = EXPLAINED[name]
    if package:
        library(package)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["explain", name, "--batch", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{name}: 2 x 3 x (\d+) x \1, bfloat16", head)
    assert f" {resolution}," in head
    assert max(map(len, lines)) <= 80
    counted = re.match(r"(\d+) of (\d+) blocks fused", lines[-1])
    assert counted and int(counted[2]) == total and (fused is None or int(counted[1]) == fused)


def test_explain_takes_a_resolution_and_a_batch(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    saved = {}
    for batch, resolution, more in ((1, 64, []), (4, 64, []), (1, 128, []), (1, 64, ["--inference"])):
        options = ["--batch", str(batch), "--resolution", str(resolution), "--dtype", "float32", *more]
        assert main(["explain", "efficientnet_lite0", *options]) == 0
        printed = capsys.readouterr().out
        moved = re.search(r"move ([\d.]+) (\wB) instead\s+of\s+([\d.]+) (\wB)", printed)
        saved[batch, resolution, *more] = float(moved[3]) * {"MB": 1, "GB": 1000}[moved[4]]
    assert saved[4, 64] == pytest.approx(4 * saved[1, 64], rel=0.01)
    assert saved[1, 128] == pytest.approx(4 * saved[1, 64], rel=0.01)
    assert saved[1, 64, "--inference"] < saved[1, 64] / 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["keras:b0"], "'keras' is no library; allowed are timm, torchvision, lukemelas, transformers, smp"),
        (["resnet50"], "efficientnet_lite4"),
        (["timm:efficientnet_b99"], "timm has no such model; near it: efficientnet_b"),
        (["torchvision:effnet"], "torchvision has no such model; near it: "),
        (["lukemelas:efficientnet_b0"], "near it: efficientnet-b0"),
        (["efficientnet_b0", "--batch", "0"], "--batch is 0: allowed are 1 and more"),
        (["efficientnet_b0", "--resolution", "8"], "--resolution is 8: allowed are 32 and more"),
    ],
)
def test_explain_names_what_is_wrong(arguments, told, capsys):
    if (package := arguments[0].partition(":")[0]) in ("timm", "torchvision", "lukemelas"):
        library({"lukemelas": "efficientnet_pytorch"}.get(package, package))
    assert main(["explain", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("timm:efficientnet_b0", "timm", "demo"),
        ("torchvision:efficientnet_b0", "torchvision", "train"),
        ("lukemelas:efficientnet-b0", "efficientnet_pytorch", "test"),
        ("transformers:efficientnet-b0", "transformers", "test"),
        ("smp:efficientnet-b0", "segmentation_models_pytorch", "test"),
    ],
)
def test_explain_names_the_missing_extra(name, module, extra, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["explain", name]) == 2
    assert f"this needs {module}: pip install 'fastmbconv[{extra}]'" in capsys.readouterr().err
