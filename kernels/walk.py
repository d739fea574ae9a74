"""What the column walks of depthwise.py and depthwise_inference.py share: their strips, steps, loads, tiles and sums.

A strip is R rows of outputs, or of inputs going back. One strip, or two at stride 1, walk inward: what lies outside the
image lies before their first row, for the second walks upside down, its taps too. It is neither loaded nor multiplied.

    14 rows, two strips of 7, k5:   strip 0    0  1  2  3  4  5  6  (7  8)     a step loads a strip's rows, and
                                    strip 1   13 12 11 10  9  8  7  (6  5)     the two next to them of the other's
"""

import triton
import triton.language as tl

from .math import dot


@triton.constexpr_function
def first_step(pad, stride, columns):
    """The first of the walk's steps that sees more than padding, or finishes a column; `columns` are in flight."""
    return min(pad // stride, columns - 1)


def rows_to_load(first: int, count: int, height: int, inward: bool) -> tuple[int, int]:
    """(first, count) of the rows that a strip loads to see `count` from `first` on, relative to its own first row."""
    return (max(first, 0), min(first + count, height) - max(first, 0)) if inward else (first, count)


def walks_inward(strips: int, kernel_size: int, stride: int, pad: int, height: int, out_height: int) -> bool:
    """Whether no strip sees anything outside the image but before its first row."""
    return strips == 1 or (strips == 2 and stride == 1 and 2 * pad == kernel_size - 1 and height == out_height)


@triton.jit
def image_row(strip, r, HEIGHT, SPAN: tl.constexpr, INWARD: tl.constexpr):
    """The image's row that is row r of a strip; strips are SPAN rows apart."""
    return strip * (HEIGHT - 1) + r * (1 - 2 * strip) if INWARD else strip * SPAN + r


@triton.jit
def tap_place(i, strip, K: tl.constexpr, INWARD: tl.constexpr):
    """Where a strip's tap i is in memory: upside down, the rows of taps are."""
    return i + strip * ((K - 1 - i // K * 2) * K) if INWARD else i


@triton.jit
def load_taps(
    w_ptr, o_c, m_c, strip, K: tl.constexpr, ACC: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, INWARD: tl.constexpr
):
    """The K * K taps of a block of channels, each [NB, BC] with equal rows."""
    taps = ()
    for i in tl.static_range(K * K):
        b_tap = tl.load(w_ptr + o_c * (K * K) + tap_place(i, strip, K, INWARD), mask=m_c, other=0.0).to(ACC)
        taps = taps + (tl.broadcast_to(b_tap[None, :], (NB, BC)),)
    return taps


@triton.jit
def load_column(
    p, column, strip, first, m, HEIGHT, WIDTH: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    INWARD: tl.constexpr,
):  # fmt: skip
    """ROWS tiles of one column from a strip's row `first` on, each from the nearest place inside the image."""
    column = tl.minimum(tl.maximum(column, 0), WIDTH - 1) * C
    tiles = ()
    for i in tl.static_range(ROWS):
        row = image_row(strip, first + i, HEIGHT, SPAN, INWARD)
        place = (row if INWARD else tl.minimum(tl.maximum(row, 0), HEIGHT - 1)) * (WIDTH * C)
        tiles = tiles + (tl.load(p + (place + column), mask=m, other=0.0),)
    return tiles


@triton.jit
def tile_mask(o_n, o_c, N, C, EVEN: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr):
    """Images and channels that exist; constant where the tiles divide both."""
    if EVEN:
        return tl.full((NB, BC), True, tl.int1)
    else:
        return (o_n < N)[:, None] & (o_c < C)[None, :]


@triton.jit
def load_expand(we_ptr, o_c, m_c, CI: tl.constexpr, BI: tl.constexpr):
    """The expand convolution's weight for a block of channels, as [BI, BC]."""
    o_i = tl.arange(0, BI)
    return tl.load(we_ptr + o_c[None, :] * CI + o_i[:, None], mask=(o_i < CI)[:, None] & m_c[None, :], other=0.0)


@triton.jit
def expanded(
    b_x, b_we, NB: tl.constexpr, BC: tl.constexpr, EXPAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """A tile of u1: the loaded one, or computed from the block's input x [NB, BI]."""
    if EXPAND:
        return dot(b_x, b_we, tl.zeros((NB, BC), ACC), b_x.dtype, PRECISION)
    else:
        return b_x.to(ACC)


@triton.constexpr_function
def tap_of(slot, row, column, kernel_size, stride, columns):
    """The tap by which input pixel (row, column) of a step adds to the sum in `slot`; -1 if none."""
    i, j = row - slot // columns * stride, (columns - 1 - slot % columns) * stride + column
    return i * kernel_size + j if 0 <= i < kernel_size and j < kernel_size else -1


@triton.jit
def accumulated(
    acc, b_v, b_w, row: tl.constexpr, column: tl.constexpr, K: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """The sums of R * J outputs after input pixel (row, column) of a step; slot r * J is of row r's oldest column."""
    updated = ()
    for slot in tl.static_range(R * J):
        if tap_of(slot, row, column, K, S, J) >= 0:
            updated = updated + (tl.fma(b_v, b_w[tap_of(slot, row, column, K, S, J)], acc[slot]),)
        else:
            updated = updated + (acc[slot],)
    return updated


@triton.jit
def shifted(acc, b_start, J: tl.constexpr, R: tl.constexpr):
    """The sums with the oldest column of each row left out and a new one begun at `b_start`."""
    slots = ()
    for r in tl.static_range(R):
        for slot in tl.static_range(1, J):
            slots = slots + (acc[r * J + slot],)
        slots = slots + (b_start,)
    return slots
