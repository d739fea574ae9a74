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
def constant(VALUE: tl.constexpr, like):
    """VALUE with all the digits of another's type: a number that stands alone is fp32."""
    return tl.full((), VALUE, like.dtype)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def hard_sigmoid(v):
    """clamp(v + 3, 0, 6) / 6."""
    return at_most(at_least(v + 3.0, 0.0), 6.0) * constant(1 / 6, v)


@triton.jit
def gelu_slope(v, FAST: tl.constexpr):
    """Of gelu(v) = v * s(v): s, and v * s'(v) with s' the normal density.

    In fp32 by the exponential that the density takes too: s of a negative v is t (c1 + t (c2 + ...)) exp(-v^2 / 2) with
    t = 1 / (1 + c |v|), 1 less that of a positive one, to 1e-7 (Abramowitz and Stegun, 7.1.26). `FAST` as in silu:
    (1 + tanh(v (c1 + c2 v^2 + c3 v^4))) / 2 is s to 2e-5, by a fit up to |v| = 5, and v^2 counts as 30 at most.
    """
    e = tl.exp(-0.5 * v * v)
    if v.dtype == tl.float64:
        s = 0.5 + 0.5 * tl.erf(v * constant(0.7071067811865476, v))
    elif FAST:
        w = at_most(v * v, 30.0)
        s = tanh(v * (w * (w * -0.00031603932 + 0.036799287) + 0.79771718)) * 0.5 + 0.5
    else:
        t = 1.0 / (1.0 + 0.231641888 * tl.abs(v))
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.7265760135 + t * 0.5307027145)))) * e
        s = tl.where(v < 0.0, tail, 1.0 - tail)
    return s, v * e * constant(0.3989422804014327, v)


@triton.jit
def gelu_tanh_slope(v):
    """The same of gelu by tanh, where s = (1 + tanh(z)) / 2 = sigmoid(2 z); in fp32 too large a v * v is NaN, as eager.

    No `FAST` one: s (1 - s) of an approximate s times v^3 is wrong by more than bf16's rounding where v is large.
    """
    scale, cubic = constant(1.5957691216057308, v), constant(0.044715, v)
    s = sigmoid(scale * v * (1.0 + cubic * v * v))
    return s, v * s * (1.0 - s) * scale * (1.0 + 3.0 * cubic * v * v)


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
    elif ACT == "hardswish":
        return h * hard_sigmoid(h)
    elif ACT == "gelu":
        return h * gelu_slope(h, FAST)[0]
    elif ACT == "gelu_tanh":
        if FAST:
            return h * (tanh(h * (h * h * 0.0356774081 + 0.7978845608)) * 0.5 + 0.5)
        return h * gelu_tanh_slope(h)[0]
    else:
        return h


@triton.jit
def activate_grad_halved(h, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(v) and act'(v) of h = halved(v); as in PyTorch at a kink, and 1 for NaN in relu and relu6."""
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
    elif ACT == "hardswish":
        inside = h * constant(1 / 3, h) + 0.5
        return h * hard_sigmoid(h), tl.where(h <= -3.0, 0.0, tl.where(h >= 3.0, 1.0, inside))
    elif ACT == "gelu":
        s, more = gelu_slope(h, FAST)
        return h * s, s + more
    elif ACT == "gelu_tanh":
        s, more = gelu_tanh_slope(h)
        return h * s, s + more
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
def gate_of(q, GATE: tl.constexpr):
    """Squeeze-and-excitation's gate."""
    return hard_sigmoid(q) if GATE == "hardsigmoid" else sigmoid(q)


@triton.jit
def gate_slope(g, GATE: tl.constexpr):
    """Its derivative from its value: NaN where that is, and a hard one's 0 at both ends."""
    if GATE == "hardsigmoid":
        return tl.where((g > 0.0) & (g < 1.0), constant(1 / 6, g), g * 0.0)
    else:
        return g * (1.0 - g)


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
