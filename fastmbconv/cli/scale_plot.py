"""Pictures of compound scaling: the published family, what each dimension costs, and the ranking of a search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastmbconv.cli.extras import CommandError, require
from fastmbconv.cli.plot import FAINT, FUSED, INK
from fastmbconv.scaling import ALPHA, BETA, COEFFICIENTS, GAMMA, Coefficients, compound, cost
from fastmbconv.search import Ranking, product

ACCURACY = {"b0": 77.1, "b1": 79.1, "b2": 80.1, "b3": 81.6, "b4": 82.9, "b5": 83.6, "b6": 84.0, "b7": 84.3}
SOURCE = "Top-1 on ImageNet, trained with AutoAugment: Tan & Le 2019, arXiv 1905.11946v5, table 2."
DEPTH, WIDTH, RESOLUTION, TOGETHER = "#c2571a", "#6a51a3", "#2e7d32", FUSED
STEPS = 48


def draw_scaling(path: Path, alpha: float = ALPHA, beta: float = BETA, gamma: float = GAMMA) -> None:
    """Write the picture of the family and of what its dimensions cost; its format follows from the path's suffix."""
    figure, axes = _figure(3, (17, 5.6))
    _family(axes[0])
    _alone(axes[1])
    _together(axes[2], alpha, beta, gamma)
    counted = "MACs are counted layer by layer, rounding of channels and repeats included; dashed: the formula."
    figure.text(0.012, 0.02, f"{SOURCE}\n{counted}", fontsize=9, color=FAINT, linespacing=1.5)
    figure.subplots_adjust(left=0.045, right=0.985, top=0.92, bottom=0.22, wspace=0.2)
    _save(figure, path)


def draw_ranking(ranking: Ranking, path: Path, score: str = "score") -> None:
    """Write the picture of a search: every score with its point, and the points by what they spend the budget on."""
    figure, (left, right) = _figure(2, (14, max(4.2, 1.9 + 0.3 * min(len(ranking), 30))))
    shown = ranking.points[:30]
    rows = range(len(shown))
    scores = [point.score for point in shown]
    left.plot(scores, rows, "o", color=FUSED, markersize=8)
    left.hlines(rows, min(scores), scores, color=FUSED, alpha=0.35)
    left.set_yticks(rows, [f"{p.alpha:g}, {p.beta:g}, {p.gamma:g}  ({p.product:.2f})" for p in shown], fontsize=9)
    left.invert_yaxis()
    more = f", the best {len(shown)} of {len(ranking)}" if len(shown) < len(ranking) else ""
    _label(left, f"Ranking{more}", score, "alpha, beta, gamma (product)")
    dots = right.scatter(
        [point.beta**2 for point in ranking],
        [point.alpha for point in ranking],
        c=[point.score for point in ranking],
        s=[60 + 900 * (point.gamma - 1) for point in ranking],
        cmap="viridis",
        edgecolors=INK,
        linewidths=0.6,
    )
    best = ranking.best
    right.annotate("best", (best.beta**2, best.alpha), (10, 8), textcoords="offset points", color=INK, weight="bold")
    right.margins(0.12)
    figure.colorbar(dots, ax=right, label=score)
    _label(right, "Where the budget went (larger: more gamma)", "width: beta²", "depth: alpha")
    figure.tight_layout()
    _save(figure, path)


def _family(axes: Any) -> None:
    gmacs = {variant: cost(COEFFICIENTS[variant]).macs / 1e9 for variant in ACCURACY}
    axes.plot(list(gmacs.values()), list(ACCURACY.values()), "o-", color=FUSED)
    for variant, accuracy in ACCURACY.items():
        axes.annotate(
            f"{variant.upper()} {accuracy}", (gmacs[variant], accuracy), (7, -12), textcoords="offset points", color=INK
        )
    axes.set_xscale("log")
    axes.set_xlim(0.3, 75)
    axes.set_ylim(76.5, 84.9)
    ticks = (0.5, 1, 2, 5, 10, 20, 50)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _label(axes, "The published variants", "MACs of one image, G", "top-1 accuracy, %")


def _alone(axes: Any) -> None:
    factors = [1 + i / STEPS for i in range(STEPS + 1)]
    for name, color, scaled, power in (
        ("depth", DEPTH, lambda f: Coefficients(1.0, f, 224, 0.2), 1),
        ("width", WIDTH, lambda f: Coefficients(f, 1.0, 224, 0.2), 2),
        ("resolution", RESOLUTION, lambda f: Coefficients(1.0, 1.0, round(224 * f), 0.2), 2),
    ):
        axes.plot(factors, _relative(scaled, factors), color=color, label=f"{name} alone")
        axes.plot(factors, [f**power for f in factors], "--", color=color, linewidth=1, alpha=0.7)
    axes.legend(frameon=False)
    _label(axes, "One dimension of B0 alone", "factor on that dimension", "MACs, times B0's")


def _together(axes: Any, alpha: float, beta: float, gamma: float) -> None:
    phis = [4 * i / STEPS for i in range(STEPS + 1)]
    for name, color, factors in (
        (f"depth alone, {alpha:g}^phi", DEPTH, (alpha, 1.0, 1.0)),
        (f"width alone, {beta:g}^phi", WIDTH, (1.0, beta, 1.0)),
        (f"resolution alone, {gamma:g}^phi", RESOLUTION, (1.0, 1.0, gamma)),
        ("all three together", TOGETHER, (alpha, beta, gamma)),
    ):
        a, b, g = factors
        axes.plot(phis, _relative(partial(compound, alpha=a, beta=b, gamma=g), phis), color=color, label=name)
        axes.plot(phis, [product(a, b, g) ** phi for phi in phis], "--", color=color, linewidth=1, alpha=0.7)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    growth = product(alpha, beta, gamma)
    _label(axes, f"Compound: alpha · beta² · gamma² = {growth:.2f}", "phi", "MACs, times B0's")


def _relative(scaled: Callable[[float], Coefficients], values: list[float]) -> list[float]:
    base = cost(COEFFICIENTS["b0"]).macs
    return [cost(scaled(value)).macs / base for value in values]


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    require("matplotlib", "plot").use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=size, dpi=110, facecolor="white")


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, weight="bold")
    axes.set_xlabel(x, color=FAINT)
    axes.set_ylabel(y, color=FAINT)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"the picture {path} can't be written: {error}") from error
    finally:
        plt.close(figure)
