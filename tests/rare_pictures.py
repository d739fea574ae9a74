"""Pictures that Pillow reads and can't write: PNG and TIFF files, byte by byte."""

import struct
import zlib

LETTERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f"}
SHORT, LONG, SIGNED_LONG, FLOAT = 3, 4, 9, 11


def png(width, height, depth, colour_type, row, transparent):
    """Equal rows of packed samples, and a transparent colour."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * height)
    parts = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixel, bits, photometric=1, sample_format=1, order="<", **tags):
    """2 x 2 equal pixels; more tags as t340=(type, values)."""
    content = pixel * 4
    if bits == (12,):
        content = pixel * 2
    table = {256: (SHORT, [2]), 257: (SHORT, [2]), 258: (SHORT, bits), 259: (SHORT, [1]), 262: (SHORT, [photometric])}
    table |= {273: (LONG, [8]), 277: (SHORT, [len(bits)]), 278: (SHORT, [2]), 279: (LONG, [len(content)])}
    table |= {339: (SHORT, [sample_format] * len(bits))} | {int(name[1:]): value for name, value in tags.items()}
    place = 8 + len(content)
    beyond, rows, rest = place + 2 + 12 * len(table) + 4, b"", b""
    for tag, (kind, values) in sorted(table.items()):
        packed = struct.pack(f"{order}{len(values)}{LETTERS[kind]}", *values)
        if len(packed) > 4:
            packed, rest = struct.pack(order + "I", beyond + len(rest)), rest + packed
        rows += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", place)
    return start + content + struct.pack(order + "H", len(table)) + rows + b"\0\0\0\0" + rest
