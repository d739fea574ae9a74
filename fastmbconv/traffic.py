"""Memory traffic of an MBConv block, eager and fused: a count of the tensors that each pass reads and writes.

It is a model, not a measurement: every pass is taken to move its tensors to and from memory once; caches are ignored,
and so is whatever is as small as a weight or a vector per channel. A convolution is taken to add its bias as it writes.
Tensors, each as a number of elements:
* x: the block's input, behind the depthwise convolution in front of it, if there is one;
* u1: the expansion's output (x itself in a block without expansion);
* u2: the depthwise conv's output; u3: the projection's output, as large as the block's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fastmbconv.block import Block, DenseBlock, pads


def keeps_project_weight(pixels: int, out: int) -> bool:
    """Whether the projection's weight stays in shared memory on the way back: as in kernels/project_backward.py."""
    return pixels >= 512 and out <= 64


def multiplies_by_library(rows: int, reduce: int, out: int, vectors: int) -> bool:
    """Whether a 1x1 convolution forward is the library's, with `vectors` before it: as in kernels/pointwise.py."""
    return (reduce > 384 or reduce * vectors > 432) and out > 128 and rows * reduce * out >= 1 << 31


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of a block's tensors, which of its optional parts it has, and in which form its kernels run in bf16.

    `start` is the input of what stands in front of the block, 0 without that; `acts`: whether there is an activation
    behind each of the three BatchNorms, `norm3` whether the last is there. `inside`: the depthwise walk computes
    the expansion itself where no gradient is needed. `project_resident`: the projection's weight stays in shared memory
    on the way back. `expand_slices`: passes over slices of dv1 that the expansion's backward takes; 0: it goes by the
    library's products. `expand_library`, `project_library`: so does the product forward, with a pass for what comes
    before it and one for its moments.
    """

    x: int
    u1: int
    u2: int
    u3: int
    expand: bool
    se: bool
    residual: bool
    start: int
    acts: tuple[bool, bool, bool]
    norm3: bool
    inside: bool
    project_resident: bool
    expand_slices: int
    expand_library: bool
    project_library: bool

    @classmethod
    def of(cls, block: Block, shape: tuple[int, int, int, int]) -> Sizes:
        """Sizes of a block for an input of shape [N, C, H, W]."""
        if shape[1] != block.in_channels:
            raise ValueError(f"shape is {tuple(shape)}: this block takes {block.in_channels} channels")
        n, c, h, w = block.behind_start(shape)
        first, second, third = (activation != "none" for activation in block.activations)
        out_h, out_w = (
            (size + sum(pads(size, block.kernel_size, block.stride, block.padding)) - block.kernel_size) // block.stride
            + 1
            for size in (h, w)
        )
        hidden, out = block.depthwise_weight.shape[0], block.project_weight.shape[0]
        return cls(
            x=n * c * h * w,
            u1=n * hidden * h * w,
            u2=n * hidden * out_h * out_w,
            u3=n * out * out_h * out_w,
            expand=block.expand_weight is not None,
            se=block.se is not None,
            residual=block.residual,
            start=0 if block.start is None else prod(shape),
            acts=(first, second, third),
            norm3=block.bn3 is not None,
            inside=block.expand_weight is not None and block.kernel_size == 3 and c <= 64 and n >= 16,
            project_resident=keeps_project_weight(out_h * out_w, out),
            expand_slices=0 if c > 64 else -(-hidden // (512 if c <= 16 else 256 if c <= 32 else 128)),
            expand_library=multiplies_by_library(n * h * w, c, hidden, 0),
            project_library=multiplies_by_library(n * out_h * out_w, hidden, out, 2 + (block.se is not None)),
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Elements read and written by one block; times the element's size, that is bytes."""

    eager_inference: int
    eager_inference_folded: int
    eager_training_forward: int
    eager_training: int
    fused_inference: int
    fused_training: int


def count(sizes: Sizes) -> Traffic:
    """Traffic of one forward (inference) and of one forward and backward (training), eager and fused."""
    eager_forward, batch_statistics = _eager_forward(sizes), _eager_batch_statistics(sizes)
    return Traffic(
        eager_inference=eager_forward,
        eager_inference_folded=eager_forward - 2 * batch_statistics,  # what a BatchNorm reads once more, there
        eager_training_forward=eager_forward + batch_statistics,
        eager_training=eager_forward + batch_statistics + _eager_backward(sizes),
        fused_inference=_fused_inference(sizes),
        fused_training=_fused_forward(sizes) + _fused_backward(sizes),
    )


def count_dense(block: DenseBlock, shape: tuple[int, int, int, int]) -> tuple[int, Traffic]:
    """(elements of u, traffic) of a Fused-MBConv block: u is its dense convolution's output, v its projection's."""
    n, c, h, w = shape
    if c != block.in_channels:
        raise ValueError(f"shape is {tuple(shape)}: this block takes {block.in_channels} channels")
    out_h, out_w = (
        (size + sum(pads(size, block.kernel_size, block.stride, block.padding)) - block.kernel_size) // block.stride + 1
        for size in (h, w)
    )
    x, u = n * c * h * w, n * block.weight.shape[0] * out_h * out_w
    v = 0 if block.project_weight is None else n * block.out_channels * out_h * out_w
    se, last = block.se is not None, v or u
    # conv, BN, act; SE: mean and product; project and its BN; the residual
    last_act = v if block.project_activation != "none" else 0
    eager = x + u + 4 * u + se * 3 * u + bool(v) * (u + 3 * v) + 2 * last_act + block.residual * 3 * x
    eager_backward = 3 * last_act + (
        bool(v) * (5 * v + 2 * (u + v)) + se * 10 * u + 3 * u + 5 * u + 2 * (u + x) + block.residual * 3 * x
    )
    # conv; pool; project, or BN and act alone; the residual
    inference = x + u + se * u + u + last + block.residual * x
    # the statistics; where there is a projection its BN is a pass of its own
    library = multiplies_by_library(n * out_h * out_w, block.weight.shape[0], block.out_channels, 2 + se)
    fused = inference + u + bool(v) * (2 * v + library * (2 * u + v))
    # the last BN's sums; its du, then the projection's sums and du, or du alone; conv; the branch's and the residual's
    resident = keeps_project_weight(out_h * out_w, block.out_channels)
    rest = 5 * v + (3 if resident else 8) * u if v else 3 * u
    fused_backward = 2 * last + rest + 2 * (u + x) + block.residual * 3 * x
    forward, folded = eager + u + v, eager - 2 * (u + v)
    return u, Traffic(eager, folded, forward, forward + eager_backward, inference, fused + fused_backward)


def count_end(x: int, u: int, pooled: bool) -> tuple[int, int]:
    """(eager, fused) of a stem or a head in a forward without gradients: convolution, BN, act, and the head's pool.

    Args:
        x, u: elements of the convolution's input and output.
        pooled: the pool is joined with the head. Where it isn't, it costs the same both ways, and is not counted.
    """
    eager = x + u + 2 * u + 2 * u
    return (eager + u, x) if pooled else (eager, x + u + 2 * u)


def _eager_forward(s: Sizes) -> int:
    passes = [
        s.u1 + s.u2,  # depthwise
        2 * s.u2,  # BN2
        s.u2 + s.u3,  # project
        2 * s.norm3 * s.u3,  # BN3
        2 * _activated(s),
    ]
    if s.start:
        passes += [s.start + s.x, 2 * s.x]  # depthwise, its BN
    if s.expand:
        passes += [s.x + s.u1, 2 * s.u1]  # expand, BN1
    if s.se:
        passes += [s.u2, 2 * s.u2]  # mean, multiply
    if s.residual:
        passes += [3 * s.x]
    return sum(passes)


def _activated(s: Sizes) -> int:
    """What goes through an activation."""
    first, second, third = s.acts
    return first * s.expand * s.u1 + second * s.u2 + third * s.u3


def _eager_batch_statistics(s: Sizes) -> int:
    return s.expand * s.u1 + s.u2 + s.norm3 * s.u3 + bool(s.start) * s.x


def _eager_backward(s: Sizes) -> int:
    passes = [
        5 * s.norm3 * s.u3,  # BN3: reduce reads two tensors; apply reads two and writes one
        2 * (s.u3 + s.u2),  # project: data and weight gradient
        3 * _activated(s),
        5 * s.u2,  # BN2
        2 * (s.u2 + s.u1),  # depthwise: data and weight gradient
    ]
    if s.se:
        passes += [2 * s.u2, 3 * s.u2, s.u2, s.u2, 3 * s.u2]  # g * s, g * x, its sum, the mean's gradient, their sum
    if s.expand:
        passes += [5 * s.u1, 2 * (s.u1 + s.x)]  # BN1, expand: data and weight gradient
    if s.start:
        passes += [5 * s.x, 2 * (s.x + s.start)]  # its BN, depthwise
    if s.residual:
        passes += [3 * s.x]
    return sum(passes)


def _fused_inference(s: Sizes) -> int:
    passes = [
        s.u2,  # depthwise, BN2, activation; the pool's sums are vectors
        s.u2 + s.u3 + s.residual * s.x,  # project with the gate on the way in, BN3, residual
    ]
    passes += [s.x] if s.inside else [s.u1]
    if s.expand and not s.inside:
        passes += [s.x + s.u1]  # expand, BN1, activation
    if s.start:
        passes += [s.start + s.x]  # depthwise, BN
    return sum(passes)


def _fused_forward(s: Sizes) -> int:
    passes = [
        s.u1 + s.u2,  # depthwise, with BN1 and the activation on the way in
        s.u2 + s.u3,  # project, with BN2, the activation and the gate on the way in
        2 * s.u3 + s.residual * s.x,  # BN3, residual
    ]
    if s.expand:
        passes += [s.x + s.u1 + s.expand_library * s.u1]
    if s.start:
        passes += [s.start + s.x, 2 * s.x]  # depthwise, BN
    if s.project_library:
        passes += [2 * s.u2 + s.u3]
    if s.se:
        passes += [s.u2]
    return sum(passes)


def _fused_backward(s: Sizes) -> int:
    passes = [
        2 * s.u3,  # BN3's reductions: dy, u3
        3 * s.u3,  # du3: dy, u3 -> du3
        s.u2 + 2 * s.u1,  # depthwise: du2, u1 -> dv1
    ]
    if s.project_resident:
        passes += [s.u3 + s.u2, s.u3 + 2 * s.u2]  # BN2's sums, the gate's gradient; du2 and dW: du3, u2 -> du2
    else:
        passes += [s.u3 + s.u2, 2 * s.u2, 4 * s.u2, s.u3 + s.u2]  # da3; the sums; da3, u2 -> du2, a3; dW
    slices = s.expand_slices
    if s.expand and slices:
        passes += [s.u1 + slices * 2 * s.x + (slices - 1) * s.x]  # dv1, x -> dx, of the slice before too, and dW
    elif s.expand:
        passes += [3 * s.u1, s.u1 + s.x, s.u1 + s.x]  # dv1, u1 -> du1; dx; dW
    if s.start:
        passes += [2 * s.x, 3 * s.x, s.x + 2 * s.start]  # BN's sums, its du, depthwise: du, x -> dx
    if s.residual and s.start:
        passes += [3 * s.x]  # autograd adds the shortcut's gradient
    elif s.residual:
        passes += [s.x if s.expand and slices else 3 * s.x if s.expand else s.x]  # a copy before the library adds to it
    return sum(passes)
