"""Which fonts draw the names that people chose, and what is drawn where none does."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import matplotlib
from matplotlib import font_manager

from fastmbconv.training.names import escaped, printable, shorten

SANS = "DejaVu Sans"  # comes with Matplotlib
# They have a glyph for everything, a box, or glyphs in other places than Unicode's.
NO_LETTERS = (
    "Last Resort",
    "STIXSize",
    "STIXNonUnicode",
    "Adobe Blank",
    "cmb",
    "cmex",
    "cmmi",
    "cmr",
    "cmss",
    "cmsy",
    "cmtt",
)
HELPERS = {"CJK": "Noto Sans CJK", "HIRAGANA": "Noto Sans CJK", "KATAKANA": "Noto Sans CJK", "HANGUL": "Noto Sans CJK"}


class Lettering:
    """What installed fonts can draw."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.families = [SANS]
        self.missing = {each for text in texts for each in printable(text)} - set(map(chr, _characters(SANS)))
        candidates = _families() if self.missing else []
        while self.missing and candidates:
            gains = {name: {each for each in self.missing if ord(each) in _characters(name)} for name in candidates}
            best = max(candidates, key=lambda name: len(gains[name]))
            if not gains[best]:
                break
            self.families.append(best)
            self.missing -= gains[best]

    def draws(self, text: str) -> bool:
        return not self.missing.intersection(printable(text))

    def escape(self, text: str) -> str:
        """The text with escapes for what has no glyph."""
        return "".join(escaped(each) if each in self.missing else each for each in printable(text))

    def labels(self, names: Sequence[str], width: int, numbers: Iterable[int] | None = None) -> list[str]:
        """Names as they are drawn, or `class NUMBER` where a glyph is missing."""
        numbers = range(len(names)) if numbers is None else numbers
        short = shorten(names, width)
        return [
            label if self.draws(name) else f"class {number}"
            for label, name, number in zip(short, names, numbers, strict=True)
        ]

    def notes(self) -> list[str]:
        """What is missing, and which fonts would help."""
        if not self.missing:
            return []
        shown = " ".join(f"U+{ord(each):04X}" for each in sorted(self.missing)[:5])
        more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
        fonts = ", ".join(sorted({_helper(each) for each in self.missing}))
        return [
            f"no installed font draws {shown}{more}: such classes are drawn by their number, from 0, in the order of "
            f"their names; a font that has them, as {fonts}, would help"
        ]


@contextmanager
def lettering(texts: Iterable[str]) -> Iterator[Lettering]:
    """Within it, Matplotlib draws these texts as they are, `$` too, in fonts that have their characters."""
    with _quiet():
        letters = Lettering(texts)
        with matplotlib.rc_context({"font.family": letters.families, "text.parse_math": False}):
            yield letters


@contextmanager
def _quiet() -> Iterator[None]:
    """Matplotlib logs each font that has no bold."""
    logger = logging.getLogger("matplotlib.font_manager")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _families() -> list[str]:
    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return sorted(name for name in names if name != SANS and not name.startswith(NO_LETTERS))


@cache
def _characters(family: str) -> frozenset[int]:
    """What a family has in regular and in bold."""
    both = []
    for weight in ("normal", "bold"):
        try:
            wanted = font_manager.FontProperties(family=[family], weight=weight)
            font = font_manager.get_font(font_manager.findfont(wanted, fallback_to_default=False))
            characters = set(font.get_charmap())
            font.load_char(max(characters, default=0))  # fonts of bitmaps have characters and can't be drawn
        except (OSError, RuntimeError, ValueError):
            return frozenset()
        both.append(characters)
    return frozenset(both[0] & both[1])


def _helper(character: str) -> str:
    kind = unicodedata.name(character, "").split(" ")[0]
    if kind in HELPERS:
        return HELPERS[kind]
    if ord(character) >= 0x1F000 and unicodedata.category(character) in ("So", "Sk"):
        return "Noto Emoji"
    return "Noto Sans"
