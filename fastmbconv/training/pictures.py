"""Reading one picture, whatever its mode, and saying what is wrong with one that can't be read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
WHITE = (255, 255, 255)


class PictureError(Exception):
    """A picture can't be used; the message says why."""


def open_picture(path: str | Path) -> Image.Image:
    """An RGB picture, turned as its EXIF data says.

    Grayscale (8 and 16 bits), CMYK and palettes become RGB, transparency becomes white, of several frames the first
    one counts.

    Raises:
        PictureError: if it is missing, broken, cut off, too large for Pillow, or less than 2 pixels wide or high.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about EXIF data and palettes
            with Image.open(path) as image:
                image.load()
                picture = to_rgb(ImageOps.exif_transpose(image))
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


def to_rgb(image: Any) -> Image.Image:
    """Any of Pillow's modes as RGB."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-12)
        return Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, WHITE)
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")
