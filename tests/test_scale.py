"""`fastmbconv scale`: what it prints and draws, and what it says when it can't."""

import re

import pytest

from fastmbconv.cli import main
from fastmbconv.cli.scale_plot import ACCURACY
from fastmbconv.scaling import COEFFICIENTS, compound, cost


def printed(capsys, *arguments):
    assert main(["scale", *arguments]) == 0
    return capsys.readouterr().out


def last_numbers(text):
    """The totals: parameters, MACs in M, activations in M."""
    found = re.search(r"^in all +\d+ +([\d,]+) +([\d,.]+) +([\d,.]+)$", text, re.M)
    return [float(number.replace(",", "")) for number in found.groups()]


def test_phi_prints_coefficients_stages_and_costs(capsys):
    text = printed(capsys, "--phi", "3")
    assert re.search(r"^depth +1.728 \(1.2 \*\* 3\)$", text, re.M)
    assert re.search(r"^width +1.331 \(1.1 \*\* 3\)$", text, re.M)
    assert re.search(r"^resolution 341 px \(224 \* 1.15 \*\* 3\)$", text, re.M)
    assert re.search(r"^stage 5 +MBConv6 5x5 +6 +152 +22 x 22 +2,082,552 ", text, re.M)
    total = cost(compound(3))
    assert last_numbers(text) == [
        total.parameters,
        pytest.approx(total.macs / 1e6, abs=0.01),
        pytest.approx(total.activations / 1e6, abs=0.01),
    ]
    assert "EfficientNet.scaled(3.0)" in text


@pytest.mark.parametrize("variant", ["b4", "B4", "efficientnet_b4", "efficientnet-b4"])
def test_a_published_variant(variant, capsys):
    text = printed(capsys, "--variant", variant)
    assert "EfficientNet-B4" in text and "resolution 380 px (published)" in text
    assert last_numbers(text)[0] == 19_341_616


def test_other_factors_resolution_and_classes(capsys):
    text = printed(capsys, "--phi", "-0.5", "--alpha", "1.4", "--gamma", "1.2", "--resolution", "97", "--classes", "10")
    coefficients = compound(-0.5, alpha=1.4, gamma=1.2)
    assert last_numbers(text)[:2] == [
        cost(coefficients, num_classes=10).parameters,
        pytest.approx(cost(coefficients, 97, 10).macs / 1e6, abs=0.01),
    ]
    assert "here       97 px" in text and "EfficientNet.scaled(-0.5, alpha=1.4, gamma=1.2)" in text


def test_the_published_table_beside_the_formulas(capsys):
    lines = printed(capsys, "--table").splitlines()
    rows = {line.split()[0]: line.split() for line in lines if re.match(r"B\d ", line)}
    assert list(rows) == [f"B{number}" for number in range(8)]
    assert rows["B4"][1:10] == ["1.800", "1.400", "380", "19,341,616", "4.394", "3.22", "3.53", "3.78", "3.73"]
    assert rows["B4"][10:] == ["|", "4", "2.074", "1.464", "392", "25,916,448", "6.320"]
    assert "alpha * beta**2 * gamma**2 = 1.92" in lines[0]


def test_a_table_of_other_factors_has_no_phi_where_a_factor_is_one(capsys):
    text = printed(capsys, "--table", "--alpha", "1", "--beta", "1", "--gamma", "1.4")
    assert re.search(r"^B7 .* +- +- +2.93 ", text, re.M)


def test_the_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text = printed(capsys, "--plot", str(tmp_path / "scale.svg"))
    assert text == f"Picture: {tmp_path / 'scale.svg'}\n"
    assert "<svg" in (tmp_path / "scale.svg").read_text()
    accuracies = [ACCURACY[variant] for variant in sorted(ACCURACY)]
    assert accuracies == sorted(accuracies) and set(ACCURACY) <= set(COEFFICIENTS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "nothing to do: give --phi PHI, --variant NAME, --table or --plot FILE"),
        ("--phi nan", "--phi is nan: allowed are finite numbers"),
        ("--phi 1e9", "--phi is 1000000000.0: too large"),
        ("--phi 3000", "--phi is 3000.0: too large"),
        ("--phi -15", "--phi is -15: the resolution is then 28, allowed are 32 and more"),
        ("--phi 1 --alpha 0.9", "--alpha is 0.9: allowed are finite numbers >= 1"),
        ("--table --gamma inf", "--gamma is inf: allowed are finite numbers >= 1"),
        ("--phi 1 --resolution 8", "--resolution is 8: allowed are 32 and more"),
        ("--phi 1 --classes -1", "--classes is -1: allowed are 0 and more"),
        ("--variant b9", "--variant is 'b9': allowed are b0, b1,"),
        ("--variant b1 --beta 1.2", "--beta goes with --phi"),
        ("--plot /no/x.png", "--plot is /no/x.png: /no is not a folder"),
    ],
)
def test_what_is_wrong_is_named(arguments, told, capsys):
    assert main(["scale", *arguments.split()]) == 2
    assert told in capsys.readouterr().err


def test_an_unknown_format_of_the_picture_is_named(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["scale", "--plot", str(tmp_path / "x.doc")]) == 2
    assert "x.doc can't be written" in capsys.readouterr().err
