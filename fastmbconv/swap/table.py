"""The table that `explain` prints: a line for each block, then each reason once, then the sums."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmbconv.swap.explain import Row

GAP = "  "
UNITS = ("B", "kB", "MB", "GB", "TB")
HEADER = ("block", "class", "input", "channels", "kernel", "SE", "path", "passes", "saves")
DROPPED_FIRST = ("class", "SE", "input", "kernel", "saves", "passes", "channels")


def table(blocks: Sequence[Row], width: int, ends: Sequence[Row] = ()) -> str:
    """The rows as lines of up to `width` characters; `block` and `path` are always there; "/2" is a stride.

    `ends` are the stem's and the head's, before and behind the blocks.
    """
    if not blocks:
        return "no MBConv block found"
    stems = [row for row in ends if row.block == "stem"]
    rows = [*stems, *blocks, *(row for row in ends if row not in stems)]
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason))
    cells = [HEADER, *(_cells(row, reasons) for row in rows)]
    columns = {name: values for name, *values in zip(*cells, strict=True) if any(values)}
    widths = {name: max(map(len, (name, *values))) for name, values in columns.items()}
    for name in DROPPED_FIRST:
        if sum(widths.values()) + len(GAP) * (len(widths) - 1) <= width:
            break
        widths.pop(name, None)
    lines = [_line(list(widths), widths)]
    lines += [_line([columns[name][i] for name in widths], widths) for i in range(len(rows))]
    for number, reason in enumerate(reasons, 1):
        lines += textwrap.wrap(_reason(number, reason, blocks, ends), max(width, 40), subsequent_indent=" " * 4)
    lines += textwrap.wrap(_sums(blocks, ends), max(width, 40), subsequent_indent=" " * 4)
    return "\n".join(lines)


def _line(values: Iterable[str], widths: dict[str, int]) -> str:
    return GAP.join(map(str.ljust, values, widths.values())).rstrip()


def _cells(row: Row, reasons: list[str]) -> tuple[str, ...]:
    g, s = row.geometry, row.saving
    moved = None if s is None else s.bytes
    return (
        row.name or "(model)",
        row.block,
        "" if s is None or s.shape is None else "x".join(map(str, s.shape[1:])),
        "->".join(map(str, g.channels)) if g.channels else "?",
        "?"
        if g.kernel_size is None
        else f"{g.kernel_size}x{g.kernel_size}" + (f" /{g.stride}" if g.stride != 1 else ""),
        "yes" if g.squeeze_excite else "no",
        f"{row.path} [{reasons.index(row.reason) + 1}]" if row.reason else row.path,
        "" if s is None else f"{s.passes[0]:.1f} -> {s.passes[1]:.1f}",
        "" if moved is None else size(moved[0] - moved[1]),
    )


def _reason(number: int, reason: str, blocks: Sequence[Row], ends: Sequence[Row]) -> str:
    names, others = ([row.name or "(model)" for row in rows if row.reason == reason] for rows in (blocks, ends))
    listed = ", ".join(names if len(names) <= 4 else (*names[:3], f"... {names[-1]}"))
    counted = f"{len(names)} {'block' if len(names) == 1 else 'blocks'}: {listed}"
    return f"[{number}] {reason} ({'; '.join(filter(None, (counted if names else '', ', '.join(others))))})"


def _sums(blocks: Sequence[Row], ends: Sequence[Row]) -> str:
    """What the fused parts save together, and what those would that could be fused."""
    savings = [row.saving for row in blocks if row.saving is not None]
    if not savings:
        return ""
    call = "a training step" if savings[0].training else "a forward in eval mode"
    text = f"passes: over the block's expanded tensor in {call}, eager -> fused; a count, not a measurement."
    if any(row.saving is not None for row in ends):
        text = text.replace("tensor in", "tensor (stem, head: their convolution's output) in")
    for rows, path, verb in (
        (blocks, "fused", "Fused blocks move"),
        (blocks, "eager", "Eager blocks that could be fused would move"),
        (ends, "fused", "The fused stem and head move"),
        (ends, "eager", "The eager stem and head would move, fused,"),
    ):
        moved = [row.saving.bytes for row in rows if row.path == path and row.saving is not None]
        pairs = [pair for pair in moved if pair is not None]
        if pairs:
            eager, fused = (sum(side) for side in zip(*pairs, strict=True))
            text += f" {verb} {size(fused)} instead of {size(eager)}."
    return text


def size(count: float) -> str:
    """Bytes in three digits: "1.23 GB"."""
    unit = 0
    while count >= 999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {UNITS[unit]}"
