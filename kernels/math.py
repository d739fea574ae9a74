"""Scalar functions shared by the kernels: activations with their derivatives, storage rounding, matrix products."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def at_least(v, low):
    # Left to itself a GPU's max returns the operand that is a number: NaN would come out as `low`.
    return tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(v, high):
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def first_row(b_v, ROWS: tl.constexpr):
    """[C] of [ROWS, C]; where all rows are equal it is what tl.max gives, and NaN too."""
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == 0, b_v, 0.0), 0)


@triton.jit
def tanh(v):
    # One MUFU; its error, 2^-11, stays below bf16's rounding.
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)


@triton.jit
def halved(v, ACT: tl.constexpr, FAST: tl.constexpr):
    """What `activate_halved` takes for v: v / 2 where silu(v) = h + h * tanh(h) saves its exponential and division."""
    return v * 0.5 if ACT == "silu" and FAST else v


@triton.jit
def activate_halved(h, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(v) of h = halved(v), so that the half can be folded into an affine map before it."""
    if ACT == "silu":
        return h * tanh(h) + h if FAST else h / (1.0 + tl.exp(-h))
    elif ACT == "relu":
        return at_least(h, 0.0)
    elif ACT == "relu6":
        return at_most(at_least(h, 0.0), 6.0)
    else:
        return h


@triton.jit
def activate_grad_halved(h, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(v) and act'(v) of h = halved(v); as in PyTorch 0 at a kink, and 1 for NaN but in silu."""
    if ACT == "silu":
        if FAST:
            t = tanh(h)
            s = t * 0.5 + 0.5
            a = h * t + h
        else:
            s = 1.0 / (1.0 + tl.exp(-h))
            a = h * s
        return a, s + a * (1.0 - s)
    elif ACT == "relu":
        return at_least(h, 0.0), tl.where(h <= 0.0, 0.0, 1.0).to(h.dtype)
    elif ACT == "relu6":
        return at_most(at_least(h, 0.0), 6.0), tl.where((h <= 0.0) | (h >= 6.0), 0.0, 1.0).to(h.dtype)
    else:
        return h, tl.full(h.shape, 1.0, h.dtype)


@triton.jit
def activate(v, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(v)."""
    return activate_halved(halved(v, ACT, FAST), ACT, FAST)


@triton.jit
def activate_grad(v, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(v) and act'(v)."""
    return activate_grad_halved(halved(v, ACT, FAST), ACT, FAST)


@triton.jit
def stored(v, DTYPE: tl.constexpr):
    """v rounded to nearest even for a store in DTYPE (the interpreter's own cast to bf16 truncates)."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        wide = v.to(tl.float32)
        bits = wide.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(wide == wide, rounded, bits | 0x400000) & -65536  # the bits of a NaN would round to -0 or inf
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return v.to(DTYPE)


@triton.jit
def dot(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b with operands rounded to DTYPE, accumulated in acc's dtype."""
    a, b = stored(a, DTYPE), stored(b, DTYPE)
    if INTERPRETED:  # its bf16 product is wrong; operands are exact in acc's dtype
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def sum_rows(b_v):
    """[C]: the sum over the rows, a power of two of them, of [ROWS, C]; by pairs in the interpreter too.

    Compiled, tl.sum is a tree. Interpreted, it adds one row after the other: of 2048 in fp32 three digits are lost.
    """
    if INTERPRETED:
        while b_v.shape[0] > 1:
            b_v = tl.sum(tl.reshape(b_v, (2, b_v.shape[0] // 2, b_v.shape[1])), 0)
    return tl.sum(b_v, 0)
