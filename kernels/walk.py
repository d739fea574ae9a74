"""What the column walks of depthwise.py and depthwise_inference.py share: their steps, loads, tiles and sums."""

import triton
import triton.language as tl

from .math import dot


@triton.constexpr_function
def first_step(pad, stride, columns):
    """The first of the walk's steps that sees more than padding, or finishes a column; `columns` are in flight."""
    return min(pad // stride, columns - 1)


@triton.jit
def load_taps(w_ptr, o_c, m_c, K: tl.constexpr, ACC: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr):
    """The K * K taps of a block of channels, each [NB, BC] with equal rows."""
    taps = ()
    for i in tl.static_range(K * K):
        b_tap = tl.load(w_ptr + o_c * (K * K) + i, mask=m_c, other=0.0).to(ACC)
        taps = taps + (tl.broadcast_to(b_tap[None, :], (NB, BC)),)
    return taps


@triton.jit
def load_column(p, column, row, m, HEIGHT, WIDTH: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """ROWS tiles of one column from `row` on, each from the nearest place inside the image."""
    column = tl.minimum(tl.maximum(column, 0), WIDTH - 1) * C
    tiles = ()
    for i in tl.static_range(ROWS):
        place = tl.minimum(tl.maximum(row + i, 0), HEIGHT - 1) * (WIDTH * C)
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


@triton.jit
def accumulated(
    acc, b_v, b_w, row: tl.constexpr, column: tl.constexpr, K: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """The sums of R * J outputs after input pixel (row, column) of a step; slot r * J is of row r's oldest column."""
    updated = ()
    for r in tl.static_range(R):
        for slot in tl.static_range(J):
            if (row - r * S >= 0) and (row - r * S < K) and ((J - 1 - slot) * S + column < K):
                b_tap = b_w[(row - r * S) * K + (J - 1 - slot) * S + column]
                updated = updated + (tl.fma(b_v, b_tap, acc[r * J + slot]),)
            else:
                updated = updated + (acc[r * J + slot],)
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
