"""`fastmbconv scale`: a scaled EfficientNet's stages and what they cost, without building it.

`fastmbconv scale --phi 3` takes the formula, depth alpha ** phi, width beta ** phi, resolution 224 * gamma ** phi;
`fastmbconv scale --variant b4` the published table; --table puts both side by side, and --plot draws them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmbconv.cli.extras import CommandError

if TYPE_CHECKING:
    from fastmbconv.scaling import Coefficients

SMALLEST = 32  # the network halves its images five times
FACTORS = ("alpha", "beta", "gamma")
PUBLISHED = tuple(f"b{number}" for number in range(8))


def add_to(commands: Any) -> None:
    parser = commands.add_parser("scale", help="a scaled EfficientNet: its stages, parameters, MACs, activations")
    parser.description = __doc__
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--phi", type=float, help="any real number; 0 is B0")
    which.add_argument("--variant", help="a published one: b0 to b8, l2, lite0 to lite4")
    for name, what, value in zip(FACTORS, ("depth", "width", "resolution"), (1.2, 1.1, 1.15), strict=True):
        parser.add_argument(f"--{name}", type=float, help=f"{what} is {name} ** phi (default: {value})")
    parser.add_argument("--resolution", type=int, help="side of the images in pixels (default: the network's own)")
    parser.add_argument("--classes", type=int, default=1000, help="0 for no classifier (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="the published B0 to B7 beside the formula's")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against MACs, and MACs by dimension")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    _check(options)
    from fastmbconv.scaling import ALPHA, BETA, GAMMA

    given = (options.alpha, options.beta, options.gamma)
    factors = [default if value is None else value for value, default in zip(given, (ALPHA, BETA, GAMMA), strict=True)]
    parts = []
    if options.phi is not None or options.variant is not None:
        try:
            parts.append(_configuration(options, factors))
        except OverflowError as error:
            raise CommandError(f"--phi is {options.phi}: too large to be counted") from error
    if options.table:
        parts.append(_table(factors))
    print("\n\n".join(parts), end="\n" if parts else "")
    if options.plot:
        from fastmbconv.cli.scale_plot import draw_scaling

        _named(draw_scaling, options.plot, *factors)
        print(f"Picture: {options.plot}")
    return 0


def _check(options: argparse.Namespace) -> None:
    from fastmbconv.scaling import COEFFICIENTS

    if options.phi is None and options.variant is None and not options.table and options.plot is None:
        raise CommandError("nothing to do: give --phi PHI, --variant NAME, --table or --plot FILE")
    if options.variant is not None:
        options.variant = options.variant.lower().removeprefix("efficientnet").lstrip("_-")
        if options.variant not in COEFFICIENTS:
            raise CommandError(f"--variant is {options.variant!r}: allowed are {', '.join(COEFFICIENTS)}")
        if named := [name for name in FACTORS if getattr(options, name) is not None]:
            raise CommandError(f"--{named[0]} goes with --phi: --variant takes the published table")
    if options.resolution is not None and options.resolution < SMALLEST:
        raise CommandError(f"--resolution is {options.resolution}: allowed are {SMALLEST} and more")
    if options.classes < 0:
        raise CommandError(f"--classes is {options.classes}: allowed are 0 and more")
    if options.plot is not None and not options.plot.parent.is_dir():
        raise CommandError(f"--plot is {options.plot}: {options.plot.parent} is not a folder")


def _named(function: Any, *arguments: Any) -> Any:
    """Call it; its errors name the argument, which is the option's name."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise CommandError(f"--{error}") from error


def _configuration(options: argparse.Namespace, factors: Sequence[float]) -> str:
    from fastmbconv.scaling import COEFFICIENTS, compound, cost

    if options.variant is not None:
        coefficients, of = COEFFICIENTS[options.variant], f"EfficientNet-{options.variant.upper()}"
        how = f'fastmbconv.efficientnet.efficientnet("{options.variant}")'
    else:
        coefficients, of = _named(compound, options.phi, *factors), f"EfficientNet, phi {options.phi:g}"
        arguments = [f"{options.phi!r}"]
        arguments += [f"{name}={value!r}" for name in FACTORS if (value := getattr(options, name)) is not None]
        how = f"fastmbconv.efficientnet.EfficientNet.scaled({', '.join(arguments)})"
        if coefficients.resolution < SMALLEST and options.resolution is None:
            raise CommandError(
                f"--phi is {options.phi:g}: the resolution is then {coefficients.resolution}, allowed are {SMALLEST} "
                "and more; give --resolution, or a larger phi"
            )
    resolution = options.resolution or coefficients.resolution
    found = cost(coefficients, resolution, options.classes)
    lines = [of, "", *_factors(coefficients, options.phi, factors)]
    if resolution != coefficients.resolution:
        lines.append(f"here       {resolution} px")
    lines += [f"dropout    {coefficients.dropout:.3g}", ""]
    head = ("", "operator", "repeats", "channels", "output", "parameters", "MACs, M", "activations, M")
    rows = [
        (
            row.name,
            row.operator,
            f"{row.repeats}",
            f"{row.channels}",
            f"{row.size[0]} x {row.size[1]}",
            f"{row.parameters:,}",
            _millions(row.macs),
            _millions(row.activations),
        )
        for row in found.rows
    ]
    blocks = sum(row.repeats for row in found.rows if row.name.startswith("stage"))
    total = (f"{found.parameters:,}", _millions(found.macs), _millions(found.activations))
    rows.append(("in all", "", f"{blocks}", "", "", *total))
    lines += [*_columns(head, rows), ""]
    base = cost(COEFFICIENTS["b0"])
    more = f"MACs: {found.macs / base.macs:.4g} times B0's"
    if options.phi is not None and options.resolution is None:
        growth = _growth(factors)
        more += f"; alpha * beta**2 * gamma**2 = {growth:.4g}, and to the power of phi {growth**options.phi:.4g}"
    return "\n".join([*lines, more, f"build it: {how}"])


def _factors(coefficients: Coefficients, phi: float | None, factors: Sequence[float]) -> list[str]:
    alpha, beta, gamma = (f"{factor:g} ** {phi:g}" if phi is not None else "published" for factor in factors)
    return [
        f"depth      {coefficients.depth:.4g} ({alpha})",
        f"width      {coefficients.width:.4g} ({beta})",
        f"resolution {coefficients.resolution} px ({'224 * ' if phi is not None else ''}{gamma})",
    ]


def _table(factors: Sequence[float]) -> str:
    from fastmbconv.scaling import COEFFICIENTS, compound, cost

    each = ("depth", "width", "pixels", "parameters", "GMACs")
    head = ("", *each, "phi by depth", "width", "pixels", "MACs", "| phi", *each)
    base, growth = cost(COEFFICIENTS["b0"]), _growth(factors)
    rows = []
    for phi, variant in enumerate(PUBLISHED):
        ours, theirs = _named(compound, phi, *factors), COEFFICIENTS[variant]
        scales = (theirs.depth, theirs.width, theirs.resolution / 224, cost(theirs).macs / base.macs)
        implied = [_log(value, of) for value, of in zip(scales, (*factors, growth), strict=True)]
        rows.append((variant.upper(), *_summary(theirs), *implied, f"| {phi}", *_summary(ours)))
    alpha, beta, gamma = factors
    return "\n".join(
        [
            f"The published variants, and the formula with alpha {alpha:g}, beta {beta:g}, gamma {gamma:g} "
            f"(alpha * beta**2 * gamma**2 = {growth:.4g})",
            "",
            *_columns(head, rows),
            "",
            "The published ones follow no whole phi: `phi by ...` is the one that gives their depth, width, pixels or",
            "MACs. MACs are counted layer by layer; the formula costs more than its power, because repeats round up.",
        ]
    )


def _summary(coefficients: Coefficients) -> tuple[str, ...]:
    from fastmbconv.scaling import cost

    found = cost(coefficients)
    return (
        f"{coefficients.depth:.3f}",
        f"{coefficients.width:.3f}",
        f"{coefficients.resolution}",
        f"{found.parameters:,}",
        f"{found.macs / 1e9:.3f}",
    )


def _growth(factors: Sequence[float]) -> float:
    from fastmbconv.search import product

    return product(*factors)


def _log(value: float, base: float) -> str:
    return f"{math.log(value, base):.2f}" if base > 1 else "-"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    left = 2 if head[1] == "operator" else 1
    return [
        "  ".join(
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
