"""Names that people chose, of classes and files: printed as they are, cut so that they stay apart."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO


def printable(text: str, encoding: str | None = None) -> str:
    """One line that any terminal takes: what is no character, or not in the encoding, is escaped."""
    safe = "".join(escaped(each) if unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") else each for each in text)
    encoding = encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines, whatever the names in them."""
    file = file or sys.stdout
    print("\n".join(printable(line, file.encoding) for line in text.split("\n")), file=file)


def escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Names of at most `width` characters that look different: cut at their ends, else in the middle, else numbered."""
    whole = [printable(name) for name in names]
    out = [_cut(name, width) for name in whole]
    for tail in (lambda index: whole[index][width // 2 + 1 - width :], str):
        again = _looks_twice(out)
        out = [_cut(whole[i], width, tail(i)) if again[i] else label for i, label in enumerate(out)]
    return out


def _cut(name: str, width: int, tail: str = "") -> str:
    if len(name) <= width and (not tail or name.endswith(tail)):
        return name
    return f"{name[: width - 1 - len(tail)]}…{tail}"


def _looks_twice(labels: Sequence[str]) -> list[bool]:
    looks = [unicodedata.normalize("NFC", label) for label in labels]
    return [looks.count(look) > 1 for look in looks]
