"""The search for alpha, beta, gamma: Tan & Le, EfficientNet, 2019, equation 3, by a grid, as in section 3.3.

from fastmbconv.scaling import compound, search

def evaluate(alpha, beta, gamma):
    return accuracy_of(EfficientNet(compound(1, alpha, beta, gamma)))

ranking = search(evaluate, resume="search.json")
print(ranking)
ranking.draw("search.png")
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmbconv.files import replacing

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the grid, what `evaluate` said of it, and the seconds that took."""

    alpha: float
    beta: float
    gamma: float
    score: float
    seconds: float

    @property
    def factors(self) -> tuple[float, float, float]:
        return self.alpha, self.beta, self.gamma

    @property
    def product(self) -> float:
        return product(*self.factors)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The evaluated points, the highest score first; of equal ones, the cheapest first."""

    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        return self.points[0]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __str__(self) -> str:
        lines = ["rank   alpha    beta   gamma  product      score  seconds"]
        for rank, p in enumerate(self.points, 1):
            lines.append(
                f"{rank:>4}  {p.alpha:>6.4g}  {p.beta:>6.4g}  {p.gamma:>6.4g}  {p.product:>7.3f}"
                f"  {p.score:>9.5g}  {p.seconds:>7.1f}"
            )
        return "\n".join(lines)

    def draw(self, path: str | os.PathLike[str], score: str = "score") -> None:
        """Write a picture of the ranking; needs matplotlib. `score` is the name of its axis."""
        from fastmbconv.cli.scale_plot import draw_ranking

        draw_ranking(self, Path(path), score)


def product(alpha: float, beta: float, gamma: float) -> float:
    """What FLOPs grow by when phi grows by one."""
    return alpha * beta**2 * gamma**2


def grid(budget: float = 2.0, step: float = 0.05, tolerance: float = 0.05) -> list[tuple[float, float, float]]:
    """The points (alpha, beta, gamma) of a search, in the order in which it evaluates them.

    Args:
        budget: what alpha * beta ** 2 * gamma ** 2 should be.
        step: alpha, beta and gamma are 1, 1 + step, 1 + 2 * step, ...
        tolerance: how far the product may be from the budget, as a share of the budget.

    Raises:
        ValueError: if an argument is out of its range, or no point of the grid is close enough.
    """
    for name, value, low in (("budget", budget, 1.0), ("step", step, 0.0)):
        if not (math.isfinite(value) and value > low):
            raise ValueError(f"{name} is {value}: allowed are finite numbers > {low:g}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}: allowed are 0 <= tolerance < 1")
    allowed = tolerance * budget * (1 + 1e-9)
    top = budget + allowed
    if top / step > 1e4:
        raise ValueError(f"step is {step}: too fine for a grid up to {top:g}")
    points, nearest = [], 1.0
    for beta in _steps(math.sqrt(top), step):
        for gamma in _steps(math.sqrt(top) / beta, step):
            # Of alpha's values only those at both ends of the band and between them can be close enough.
            base = beta**2 * gamma**2
            low, high = ((budget + sign * allowed) / base for sign in (-1, 1))
            first, last = (max(0, math.floor((bound - 1) / step)) for bound in (low, high))
            for index in range(first, last + 2):
                alpha = round(1 + index * step, 10)
                found = product(alpha, beta, gamma)
                nearest = min(nearest, found, key=lambda value: abs(value - budget))
                if abs(found - budget) <= allowed:
                    points.append((alpha, beta, gamma))
    if not points:
        raise ValueError(
            f"tolerance is {tolerance}: no point of the grid with step {step} is so close to the budget {budget}; "
            f"the nearest has the product {nearest:.4g}, allowed are tolerances >= {abs(nearest / budget - 1):.2g}"
        )
    return sorted(points)


def search(
    evaluate: Callable[[float, float, float], float],
    budget: float = 2.0,
    step: float = 0.05,
    tolerance: float = 0.05,
    *,
    resume: str | os.PathLike[str] | None = None,
    name: str = "",
) -> Ranking:
    """Evaluate every point of `grid(budget, step, tolerance)` and rank them.

    The defaults give 111 points, the published alpha 1.2, beta 1.1, gamma 1.15 among them.

    Args:
        evaluate: called as evaluate(alpha, beta, gamma); more is better. As a rule it trains
            `EfficientNet(compound(1, alpha, beta, gamma))` and returns its accuracy on held-out data.
        budget, step, tolerance: as in `grid`.
        resume: a JSON file that has every score as soon as it is there, written atomically. If it exists, the search
            goes on behind its last point. One process at a time.
        name: says what `evaluate` measures; a file with another name is not this search's.

    Raises:
        ValueError: as `grid`; if evaluate returns no finite number; if resume is the file of another search, is
            damaged, or lies in no folder. Whatever evaluate raises goes through; the points before it stay in the file.
    """
    points = grid(budget, step, tolerance)
    settings = {"name": name, "budget": budget, "step": step, "tolerance": tolerance}
    path = None if resume is None else Path(resume)
    done = {} if path is None else {point.factors: point for point in _read(path, settings, set(points))}
    if path is not None:
        _write(path, settings, done.values())
    for factors in points:
        if factors in done:
            continue
        start = time.perf_counter()
        score = _number(evaluate(*factors), factors)
        done[factors] = Point(*factors, score, round(time.perf_counter() - start, 3))
        if path is not None:
            _write(path, settings, done.values())
    return Ranking(tuple(sorted(done.values(), key=lambda point: (-point.score, point.product, point.factors))))


def _steps(top: float, step: float) -> list[float]:
    return [round(1 + i * step, 10) for i in range(math.floor((top - 1) / step + 1e-9) + 1)]


def _number(score: Any, factors: tuple[float, float, float]) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"evaluate{factors} returned {score!r}: allowed are finite numbers")
    return value


def _read(path: Path, settings: dict[str, Any], points: set[tuple[float, float, float]]) -> list[Point]:
    if not path.parent.is_dir():
        raise ValueError(f"resume is {path}: {path.parent} is not a folder")
    if not path.exists():
        return []
    damaged = f"resume is {path}: it is not the file of a search, or is damaged"
    try:
        content = json.loads(path.read_text())
        found, done = content["search"], [Point(**point) for point in content["points"]]
        known = content["format"] == FORMAT and all(math.isfinite(p.score + p.seconds) for p in done)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{damaged} ({type(error).__name__}: {error})") from error
    if not known:
        raise ValueError(damaged)
    if found != settings:
        raise ValueError(f"resume is {path}: it belongs to another search, {found}; this one is {settings}")
    if strange := [point.factors for point in done if point.factors not in points]:
        raise ValueError(f"{damaged}: {strange[0]} is no point of its grid")
    return done


def _write(path: Path, settings: dict[str, Any], points: Any) -> None:
    content = {"format": FORMAT, "search": settings, "points": [asdict(point) for point in points]}
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1))
