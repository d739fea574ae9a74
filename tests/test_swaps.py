"""The README's table of models is what the tool finds, and keeps the rule that it states."""

from pathlib import Path

import pytest
import torch
from libraries import library

from benchmarks import swaps
from fastmbconv import parity
from fastmbconv.cli import errors, models
from fastmbconv.mbconv import MBConv

LINES = swaps.parsed(swaps.section((Path(__file__).parents[1] / "README.md").read_text()))
MODULES = {"lukemelas": "efficientnet_pytorch", "smp": "segmentation_models_pytorch"}


def test_every_model_has_its_line():
    assert [(line.library, line.model) for line in LINES] == [swaps.names(model) for model in swaps.MODELS]


@pytest.mark.parametrize("model, line", list(zip(swaps.MODELS, LINES, strict=True)), ids=swaps.MODELS)
def test_counts_and_rule(model, line):
    """Errors were rounded to one digit, ratios to two behind the point."""
    name = model.partition(":")[0]
    library(MODULES.get(name, name))
    assert swaps.counted(model) == (line.fused_evaluation, line.all, line.fused_training)
    assert line.passed == line.tensors > 0
    for largest in (line.evaluation, line.training):
        eager = largest.error / largest.ratio
        assert largest.error <= 1.1 * parity.limit(eager, torch.float32)


def test_measures_and_reads_back(monkeypatch, device):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), *(MBConv(8, 8, expand_ratio=2) for _ in range(2)))
    monkeypatch.setattr(models, "load", lambda name: models.Model(net, 8))
    monkeypatch.setattr(swaps, "SIDE", 4)
    assert len(list(swaps.distinct(net, torch.randn(2, 3, 4, 4)))) == 1
    monkeypatch.setattr(swaps, "counted", lambda model: (2, 2, 2))
    line = swaps.measured("timm:small", torch.float32, device)
    assert line.passed == line.tensors == len(errors.compare("", net[1], torch.randn(2, 8, 4, 4), torch.float32)) + 1
    assert [str(each) for each in swaps.parsed(swaps.table([line], torch.float32, device))] == [str(line)]


@pytest.mark.parametrize("text", ["", swaps.BEGIN, f"{swaps.BEGIN}{swaps.END}{swaps.BEGIN}"])
def test_a_file_without_its_markers_is_refused(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="not exactly one"):
        swaps.main(["--models", "timm:efficientnet_b0", "--write", str(path)])
    assert path.read_text() == text
