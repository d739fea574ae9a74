"""Which colours a picture has, whatever its mode: what the file says, or a refusal, never a guess."""

import io
import os
import struct

import numpy as np
import pytest
from libraries import library
from rare_pictures import FLOAT, LONG, SHORT, SIGNED_LONG, png, tiff

Image = library("PIL.Image")

from fastmbconv.training.pictures import PictureError, open_picture, to_rgb  # noqa: E402

RED = Image.new("RGB", (2, 2), (255, 0, 0))
WHITE, BLACK, MIDDLE = (255,) * 3, (0,) * 3, (128,) * 3


def pack(form, *values):
    return struct.pack(form, *values)


def saved(image, name, **more):
    file = io.BytesIO()
    image.save(file, name, **more)
    return file.getvalue()


def grey(kind, *values):
    return Image.fromarray(np.resize(np.array(values, kind), (2, 2)))


FILES = {
    "TIFF, 16 bits": (saved(grey("u2", 32768), "TIFF"), MIDDLE),
    "TIFF, 16 bits, dark": (saved(grey("u2", 257), "TIFF"), (1,) * 3),
    "TIFF, 16 bits, big-endian": (tiff(pack(">H", 32768), (16,), order=">"), MIDDLE),
    "TIFF, 16 bits, 0 is white": (tiff(pack("<H", 0), (16,), photometric=0), WHITE),
    "TIFF, 12 bits": (tiff(b"\xff\xff\xff", (12,)), WHITE),
    "TIFF, 16 bits, statistics": (tiff(pack("<H", 1000), (16,), t281=(SHORT, [1000])), (4,) * 3),
    "TIFF, signed 16 bits": (tiff(pack("<h", 100), (16,), sample_format=2), "signed whole numbers of 16 bits"),
    "TIFF, signed 16 bits, its ends": (
        tiff(pack("<h", 0), (16,), sample_format=2, t340=(SIGNED_LONG, [-1000]), t341=(SIGNED_LONG, [1000])),
        MIDDLE,
    ),
    "TIFF, signed 16 bits, one end": (
        tiff(pack("<h", 0), (16,), sample_format=2, t341=(SIGNED_LONG, [1000])),
        "nothing in the file says which one is white: store it in 8 or 16 bits",
    ),
    "TIFF, signed 8 bits": (tiff(pack("b", -1), (8,), sample_format=2), "signed whole numbers of 8 bits"),
    "TIFF, signed 8 bits, its ends": (
        tiff(pack("b", -128), (8,), sample_format=2, t340=(8, [-128]), t341=(8, [127])),
        BLACK,
    ),
    "TIFF, 32 bits": (tiff(pack("<I", 255), (32,)), "whole numbers of 32 bits, and nothing in the file says"),
    "TIFF, 32 bits, its end": (tiff(pack("<I", 500), (32,), t341=(LONG, [1000])), MIDDLE),
    "TIFF, 32 bits, the highest": (tiff(pack("<I", 2**32 - 1), (32,), t341=(LONG, [2**32 - 1])), WHITE),
    "TIFF, 32 bits, MaxSampleValue": (tiff(pack("<I", 500), (32,), t281=(SHORT, [1000])), MIDDLE),
    "TIFF, signed 32 bits": (saved(grey("i4", 255), "TIFF"), "signed whole numbers of 32 bits"),
    "TIFF, signed 32 bits, big-endian": (
        tiff(pack(">i", 0), (32,), sample_format=2, order=">", t340=(SIGNED_LONG, [-9]), t341=(SIGNED_LONG, [9])),
        MIDDLE,
    ),
    "TIFF, floats up to 1": (saved(grey("f4", 0.5), "TIFF"), MIDDLE),
    "TIFF, dark floats": (saved(grey("f4", 0.1), "TIFF"), (26,) * 3),
    "TIFF, floats, 0 is white": (tiff(pack("<f", 0.25), (32,), photometric=0, sample_format=3), (191,) * 3),
    "TIFF, floats above 1": (saved(grey("f4", -2, 300), "TIFF"), "from -2 to 300, .*expected 0 to 1"),
    "TIFF, floats, their ends": (
        tiff(pack("<f", 150), (32,), sample_format=3, t340=(FLOAT, [100.0]), t341=(FLOAT, [200.0])),
        MIDDLE,
    ),
    "TIFF, floats, NaN": (saved(grey("f4", 0, np.nan), "TIFF"), "2 of its 4 values are NaN or infinite"),
    "TIFF, floats, infinite": (saved(grey("f4", 0, 1, 1, np.inf), "TIFF"), "1 of its 4 values are NaN or infinite"),
    "TIFF, 4 bits, 0 is white": (tiff(b"\x00", (4,), photometric=0), WHITE),
    "TIFF, CIELAB": (tiff(pack("Bbb", 136, 80, 70), (8, 8, 8), photometric=8), (250, 3, 3)),
    "TIFF, CIELAB, white": (tiff(pack("Bbb", 255, 0, 0), (8, 8, 8), photometric=8), WHITE),
    "TIFF, YCbCr": (tiff(bytes([76, 85, 255]), (8, 8, 8), photometric=6), (254, 0, 0)),
    "TIFF, RGB, 16 bits": (tiff(pack("<3H", 65535, 32768, 0), (16, 16, 16), photometric=2), (255, 128, 0)),
    "TIFF, CMYK, 16 bits": (tiff(pack("<4H", 0, 65535, 65535, 0), (16,) * 4, photometric=5), (255, 0, 0)),
    "TIFF, RGB and something": (tiff(bytes([9, 8, 7, 0]), (8,) * 4, photometric=2, t338=(SHORT, [0])), (9, 8, 7)),
    "TIFF, RGB, clear": (tiff(bytes([9, 8, 7, 0]), (8,) * 4, photometric=2, t338=(SHORT, [2])), WHITE),
    "TIFF, RGB, premultiplied": (tiff(bytes([0, 0, 0, 127]), (8,) * 4, photometric=2, t338=(SHORT, [1])), MIDDLE),
    "TIFF, grey, premultiplied": (tiff(bytes([0, 127]), (8, 8), t338=(SHORT, [1])), MIDDLE),
    "TIFF, grey, clear": (tiff(bytes([0, 0]), (8, 8), t338=(SHORT, [2])), WHITE),
    "PNG, 16 bits": (saved(grey("u2", 257), "PNG"), (1,) * 3),
    "PNG, 16 bits, clear": (png(2, 2, 16, 0, b"\x03\x01" * 2, b"\x03\x01"), WHITE),
    "PNG, 16 bits, another is clear": (png(2, 2, 16, 0, b"\x03\x02" * 2, b"\x03\x01"), (3,) * 3),
    "PNG, 4 bits, clear": (png(2, 2, 4, 0, b"\x33", b"\0\x03"), WHITE),
    "PNG, 2 bits, clear": (png(4, 2, 2, 0, b"\x55", b"\0\x01"), WHITE),
    "PNG, 2 bits, another is clear": (png(4, 2, 2, 0, b"\x55", b"\0\x02"), (85,) * 3),
    "PNG, 1 bit, clear": (png(8, 2, 1, 0, b"\0", b"\0\0"), WHITE),
    "PNG, 8 bits, clear": (png(2, 2, 8, 0, b"\x03\x03", b"\0\x03"), WHITE),
    "PNG, RGB, clear": (png(2, 2, 8, 2, b"\x03\0\0" * 2, b"\0\x03\0\0\0\0"), WHITE),
    "PNG, RGB of 16 bits, clear": (png(2, 2, 16, 2, b"\x03\1\0\0\0\0" * 2, b"\3\1\0\0\0\0"), "with an alpha channel"),
    "PNG, palette, clear": (saved(RED.convert("P"), "PNG", transparency=RED.convert("P").getpixel((0, 0))), WHITE),
    "PGM, 10 bits": (b"P5 2 2 1023\n" + pack(">4H", *[512] * 4), MIDDLE),
    "PGM, 16 bits": (b"P5 2 2 65535\n" + pack(">4H", *[32768] * 4), MIDDLE),
    "PFM": (b"Pf\n2 2\n-1.0\n" + pack("<4f", *[0.5] * 4), MIDDLE),
    "PFM above 1": (b"Pf\n2 2\n-1.0\n" + pack("<4f", *[2.0] * 4), "from 2 to 2"),
    "JPEG 2000, 16 bits": (saved(grey("u2", 32768), "JPEG2000"), MIDDLE),
}


@pytest.mark.parametrize("name", FILES)
def test_values_are_what_the_file_says(name, tmp_path):
    content, wanted = FILES[name]
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    if isinstance(wanted, str):
        with pytest.raises(PictureError, match=wanted):
            open_picture(path)
        return
    picture = open_picture(path)
    assert picture.mode == "RGB" and np.abs(np.asarray(picture).astype(int) - wanted).max() <= 1


WHITES = {"1": 1, "CMYK": (0, 0, 0, 0), "HSV": (0, 0, 255), "LAB": (255, 128, 128), "YCbCr": (255, 128, 128), "F": 1.0}
WHITES |= {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "I": "nothing in the file says"}


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow_has_a_white(mode):
    wanted = WHITES.get(mode, 255 if len(Image.getmodebands(mode) * "x") == 1 else (255,) * Image.getmodebands(mode))
    if isinstance(wanted, str):
        with pytest.raises(PictureError, match=wanted):
            to_rgb(Image.new(mode, (2, 2)))
        return
    image = Image.new("RGB", (2, 2), WHITE).convert("P").convert(mode) if mode in ("P", "PA") else None
    assert min(to_rgb(image or Image.new(mode, (2, 2), wanted)).getpixel((0, 0))) >= 254


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_turned_picture_keeps_its_values(name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2570
    Image.fromarray(values).save(tmp_path / name, exif=exif)
    picture = np.asarray(open_picture(tmp_path / name))[..., 0]
    assert np.array_equal(picture, np.rot90(values // 257, -1))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing", "itself"])
def test_only_files_are_opened(kind, tmp_path):
    path = tmp_path / "a.png"
    told = {"pipe": "a named pipe", "device": "a device", "folder": "a folder", "nothing": "there is no such file"}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": os.devnull, "nothing": "gone.png", "itself": "a.png"}[kind])
    with pytest.raises(PictureError, match=told.get(kind, "symbolic links")):
        open_picture(path)
