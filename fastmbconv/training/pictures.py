"""Reading one picture, whatever its mode, and saying what is wrong with one that can't be read."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
WHITE = (255, 255, 255)
# Of TIFF: a sample's bits, whether 0 is white, its type, and the ends of its values.
BITS, PHOTOMETRIC, SAMPLE_FORMAT, WHITE_IS_ZERO, SIGNED = 258, 262, 339, 0, 2
ENDS = ((340, 341), (280, 281))
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class PictureError(Exception):
    """A picture can't be used; the message says why."""


def open_picture(path: str | Path) -> Image.Image:
    """An RGB picture, turned as its EXIF data says.

    Grayscale, CMYK, CIELAB and palettes become RGB, transparency becomes white, of several frames the first one counts.
    Which value is white is what the file says.

    Raises:
        PictureError: if it is missing, no regular file, broken, cut off, too large for Pillow, less than 2 pixels wide
            or high, or doesn't say which value is white.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:  # opening a pipe would wait for ever
            raise PictureError(f"{KINDS.get(kind, 'something else')}, no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about EXIF data and palettes
            # By a file, not by its name: files that Pillow maps into memory it turns wrongly.
            with open(path, "rb") as file, Image.open(file) as image:
                raw = _raw_mode(image)
                image.load()
                picture = to_rgb(ImageOps.exif_transpose(image), image, raw)
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError("not a picture that Pillow knows") from error
    except FileNotFoundError as error:
        raise PictureError("there is no such file") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise PictureError(f"{type(error).__name__}: {error}") from error
    if min(picture.size) < 2:
        width, height = picture.size
        raise PictureError(f"{width} x {height} pixels: nothing to see")
    return picture


def to_rgb(image: Any, source: Any = None, raw: str = "") -> Image.Image:
    """Any of Pillow's modes as RGB.

    Args:
        source: the image as it was opened, which knows its file's format and tags.
        raw: how the file stores its pixels, in Pillow's words.

    Raises:
        PictureError: if nothing says which value is white, or which pixels are transparent.
    """
    source = image if source is None else source
    tags = getattr(source, "tag_v2", {})
    if image.mode.startswith(("I", "F")) or (image.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED):
        return Image.fromarray(_grey(image, source.format, tags)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    transparent = image.info.get("transparency")
    if raw.startswith(("L;2", "L;4")) and isinstance(transparent, int):  # which Pillow leaves as the file has it
        image.info["transparency"] = transparent * (85 if raw.startswith("L;2") else 17)
    if raw.startswith("RGB;16") and transparent is not None:
        raise PictureError("16 bits per colour, of which one is transparent: store it with an alpha channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or transparent is not None:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, WHITE)
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def _raw_mode(image: Any) -> str:
    """How the file stores its pixels; loading forgets it."""
    arguments = image.tile[0][3] if image.tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _grey(image: Any, file_format: str | None, tags: Any) -> np.ndarray:
    """Values of more than 8 bits, or with signs, as 8 bits from black to white."""
    values = np.asarray(image)
    bits, sample = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0]
    if image.mode == "F":
        low, high = _float_ends(values, tags)
    elif image.mode.startswith("I;16"):
        low, high = 0.0, 2.0**bits - 1
    elif image.mode == "I" and file_format in ("PNG", "PPM"):
        low, high = 0.0, 65535.0
    else:
        if sample == SIGNED and image.mode == "L":
            values = values.view(np.int8)
        elif file_format == "TIFF" and sample != SIGNED:
            values = values.view(np.uint32)
        low, high = _integer_ends(tags, signed=sample == SIGNED or file_format != "TIFF", bits=bits)
    shares = (values.astype(np.float64).clip(low, high) - low) / (high - low)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        shares = 1 - shares
    grey = (shares * 255).round().astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _float_ends(values: np.ndarray, tags: Any) -> tuple[float, float]:
    if lost := int((~np.isfinite(values)).sum()):
        raise PictureError(f"{lost} of its {values.size} values are NaN or infinite")
    low, high = _tagged(tags, *ENDS[0])
    if low is not None and high is not None and low < high:
        return low, high
    least, most = float(values.min()), float(values.max())
    if least < 0 or most > 1:
        raise PictureError(
            f"floating-point values from {least:g} to {most:g}, and nothing in the file says which one is white: "
            "expected 0 to 1; store it in 8 or 16 bits"
        )
    return 0.0, 1.0


def _integer_ends(tags: Any, signed: bool, bits: int) -> tuple[float, float]:
    for names in ENDS:
        low, high = _tagged(tags, *names)
        low = 0.0 if low is None and not signed else low
        if low is not None and high is not None and low < high:
            return low, high
    kind = f"{'signed ' * signed}whole numbers of {bits} bits" if tags else "whole numbers of 32 bits"
    raise PictureError(f"{kind}, and nothing in the file says which one is white: store it in 8 or 16 bits, unsigned")


def _tagged(tags: Any, low: int, high: int) -> tuple[float | None, float | None]:
    """The ends that a TIFF names, over all its channels."""
    ends = [tags.get(low), tags.get(high)]
    several = [each if isinstance(each, tuple) else (each,) for each in ends]
    least, most = ([float(value) for value in each if isinstance(value, (int, float))] for each in several)
    return min(least, default=None), max(most, default=None)
