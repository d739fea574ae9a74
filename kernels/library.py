"""Matrix products by torch's library, for images whose product is long enough to be worth a pass of its own.

Bitwise repeatable: cuBLAS is, for one architecture and version, where no two streams share a workspace, and torch gives
each pair of handle and stream its own, under a CUDA graph too (docs.nvidia.com/cuda/cublas, "Results Reproducibility").
Sums over pixels come in fp32, so that no partial result of theirs is rounded to 16 bits. float32 operands follow
torch's switch for matrix products, not the one for convolutions.
"""

import torch
from torch import Tensor

from .launching import writing
from .traffic import state
from .tuning import accumulator


def multiply(image: Tensor, matrix: Tensor, add: Tensor | None = None) -> Tensor:
    """[N, H, W, O]: each pixel of an image [N, H, W, I] times a matrix [I, O], in their dtype, plus an image."""
    product = image.new_empty(*image.shape[:3], matrix.shape[1])
    if add is not None:
        state("copy", (add,), (product,))
    state("mm", (image, matrix, None if add is None else product), (product,))
    if not writing():
        summand = None if add is None else add.flatten(0, 2)
        compute(image.flatten(0, 2), matrix, summand, product.flatten(0, 2))
    return product


def multiply_pixels(a: Tensor, b: Tensor) -> Tensor:
    """[A, B] as wide as sums are: the product of images [N, H, W, A] and [N, H, W, B], summed over their pixels."""
    product = a.new_empty(a.shape[3], b.shape[3], dtype=accumulator(a.dtype))
    state("mm", (a, b), (product,))
    if not writing():
        compute(a.flatten(0, 2).t(), b.flatten(0, 2), None, product)
    return product


def compute(a: Tensor, b: Tensor, add: Tensor | None, product: Tensor) -> None:
    """The product itself; with `out` given, autocast leaves the operands as they are."""
    if add is not None:
        torch.addmm(product.copy_(add), a, b, out=product)
    elif product.dtype == a.dtype:
        torch.mm(a, b, out=product)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, product.dtype, out=product)
    else:
        torch.mm(a.to(product.dtype), b.to(product.dtype), out=product)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1x1 convolution's weight [O, I, 1, 1] as a matrix [O, I] of this dtype."""
    matrix = weight.flatten(1)
    if matrix.dtype == dtype:
        return matrix
    copy = matrix.to(dtype)
    state("copy", (matrix,), (copy,))
    return copy
