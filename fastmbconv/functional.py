"""The fused ops as functions: they check their arguments, follow autocast, and choose between the kernels and eager.

Images are [N, C, H, W] in any memory format; the kernels work in channels_last and return channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmbconv import ahead, biases, call, checks, dispatch, reference
from fastmbconv.block import Activation, BatchNorm, Block, DenseBlock, Memory, Padding, SqueezeExcite, Start
from fastmbconv.call import Settings, Tensors
from fastmbconv.prepared import Prepared, find_prepared

__all__ = ["BatchNorm", "Block", "SqueezeExcite", "Start", "depthwise_bn_act", "mbconv", "squeeze_excite"]


def mbconv(
    x: Tensor,
    block: Block,
    *,
    eager: Callable[[Tensor], Tensor] | None = None,
    memory: Memory = "fast",
) -> Tensor:
    """One MBConv block, fused where `dispatch.supports` says so, else `eager(x)`.

    Args:
        x: [N, C_in, H, W], fp32, fp16 or bf16, in any memory format.
        block: the weights and settings; BatchNorms that are training move their running statistics in place.
        eager: what to run instead where no kernel does; default `reference.mbconv`.
        memory: "lean" keeps no expanded tensor for the backward, which computes it again: 1.33 instead of 2.33 of them.
            "fast" keeps it, but for shapes where `fastmbconv tune` found "lean" to be faster on this GPU.

    Returns:
        [N, C_out, H', W'], channels_last where the kernels ran.

    Raises:
        ValueError: a shape, dtype, device or setting that no path takes, named, before anything is changed; with the
            backend set to "triton", also whatever the kernels don't support.
        RuntimeError: inside a torch.func transform or forward-mode AD with the backend set to "triton"; elsewhere eager
            runs there.
    """
    checks.check_memory(memory)
    if eager is None:
        checks.check_block(x, block)
    compute = compute_dtype(x)

    def prepare() -> Prepared | None:
        if not use_kernels(dispatch.supports(block, x), x):
            return None
        if eager is not None:
            checks.check_block(x, block)
        return prepare_mbconv(x, block, memory, compute)

    ready = find_prepared(x, block, memory, compute, prepare)
    if ready is None:
        return reference.mbconv(x, block) if eager is None else eager(x)
    step = choose_step(ready, x)
    ahead.block_called(x, block, memory, step, ready)
    return run_mbconv(x, block, ready, step)


def run_mbconv(x: Tensor, block: Block, ready: Prepared, step: ahead.Step) -> Tensor:
    """A block's call by the kernels, what stands in front of it included."""
    start = block.start
    if start is None:
        return run_prepared(x, x, block, ready, step)
    u = depthwise_bn_act(x, start.weight, start.bn, start.stride, start.padding, "none")
    return run_prepared(x, u, block, ready, step, x if block.residual and not ready.wide else None)


def prepare_mbconv(x: Tensor, block: Block, memory: Memory, compute: torch.dtype) -> Prepared:
    """A block that the kernels take, for images like x."""
    from fastmbconv.fused import mbconv

    lean = keeps_nothing(x, block, memory, compute)
    adds_input = block.residual and block.start is None and compute == x.dtype
    return Prepared(x, block, mbconv.describe(block, adds_input, lean), compute)


def choose_step(ready: Prepared, *images: Tensor) -> ahead.Step:
    """Whether a call keeps what a backward needs."""
    return "infer" if ready.fixed and not needs_grad(*images, *ready.weights, *ready.others) else "train"


def run_prepared(
    x: Tensor, u: Tensor, block: Block | DenseBlock, ready: Prepared, step: ahead.Step, shortcut: Tensor | None = None
) -> Tensor:
    """A block's call by the kernels, on `u`: x, or what the block's first convolution made of it."""
    computed, called = in_dtype(u, ready.compute), ready.call
    if ready.biased:
        called = (biases.shifted(ready.weights, ready.biased), *called[1:])
    if step == "infer":
        y = run_inference(computed, shortcut, *called)
    else:
        keep = draw_keep(x, block, ready.compute)
        if ready.counts:
            torch._foreach_add_(ready.counts, 1)
        _mark_moved(ready.moving)
        y = run_fused(computed, shortcut, keep, *called)
        if ready.biased:
            biases.move_means(ready.biased.values())
    # As in eager under autocast: the branch is computed in autocast's dtype, a wider shortcut is added in its own.
    return x + y if ready.wide else y


def run_fused(
    x: Tensor,
    shortcut: Tensor | None,
    keep: Tensor | None,
    weights: Tensors,
    statistics: Tensors,
    settings: Settings,
    signature: int = 0,
) -> Tensor:
    """[N, C, H, W] of a part, with gradients."""
    from fastmbconv.autograd import Fused

    last = x.contiguous(memory_format=torch.channels_last)  # known to autograd: what is saved leads back to x
    added = None if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
    return Fused.apply(settings, signature, statistics, last, added, keep, *weights)


def run_inference(
    x: Tensor, shortcut: Tensor | None, weights: Any, statistics: Tensors, settings: Settings, signature: int = 0
) -> Tensor:
    """The same with running statistics, without gradients."""
    from fastmbconv import ops

    last = x.contiguous(memory_format=torch.channels_last)
    added = None if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
    return ops.infer(settings, last, added, weights, statistics, signature)


def depthwise_bn_act(
    x: Tensor, weight: Tensor, bn: BatchNorm, stride: int, padding: Padding, activation: Activation = "silu"
) -> Tensor:
    """act(BN(depthwise(x))): x is [N, C, H, W], weight [C, 1, K, K] (K 3 or 5, stride 1 or 2 in the kernels).

    Raises ValueError as `mbconv` does.
    """
    checks.check_depthwise(x, weight, bn, stride, padding)
    reason = (
        dispatch.call_reason(x)
        or dispatch.shape_reason(weight.shape[-1], stride, padding, activation)
        or dispatch.size_reason(x, x.shape[1])
        or dispatch.bias_reason(bn)
        or dispatch.layout_reason(weight, *call.affine(bn), bn.running_mean, bn.running_var)
    )
    if not use_kernels(reason, x):
        return reference.depthwise_bn_act(x, weight, bn, stride, padding, activation)
    from fastmbconv.fused.single import describe_depthwise

    weights, statistics, settings = describe_depthwise(weight, bn, stride, padding, activation)
    computed = in_dtype(x, compute_dtype(x))
    if not bn.batch_statistics and not needs_grad(x, *weights):
        return run_inference(computed, None, weights, statistics, settings)
    if bn.updates and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    _mark_moved(call.list_moved(settings, statistics))
    y = run_fused(computed, None, None, weights, statistics, settings)
    if bn.conv_bias is not None:
        biases.move_means((bn,))
    return y


def squeeze_excite(x: Tensor, se: SqueezeExcite) -> Tensor:
    """x * sigmoid(expand(act(reduce(mean of x over the image)))): x is [N, C, H, W]; Hu et al., 2018.

    Raises ValueError as `mbconv` does.
    """
    checks.check_squeeze_excite(x, se, x.shape[1] if x.dim() == 4 else -1)
    reason = (
        dispatch.call_reason(x)
        or dispatch.activation_reason(se.activation)
        or dispatch.squeeze_reason(se)
        or dispatch.layout_reason(*call.excite(se))
        or dispatch.size_reason(x, 1)
    )
    if not use_kernels(reason, x):
        return reference.squeeze_excite(x, se)
    from fastmbconv.fused.single import EXCITE

    settings = call.Settings(EXCITE.name, **call.excite_settings(se))
    # Eager's product keeps x's own dtype under autocast: only the gate's convolutions are narrowed.
    return run_fused(x, None, None, call.excite(se), (), settings)


def bn_act(x: Tensor, bn: BatchNorm, activation: Activation) -> Tensor:
    """act(BN(x)) with running statistics, without gradients, in one pass; x is [N, C, H, W]."""
    if (dispatch.call_reason(x) or dispatch.bias_reason(bn)) is not None or bn.batch_statistics:
        return reference.ACTIVATIONS[activation](reference.batch_norm(x, bn))
    from fastmbconv.fused.single import NORM, NormWeights

    weights = NormWeights(*biases.affine(bn))
    return run_inference(x, None, weights, call.statistics(bn), call.describe_single(NORM.name, bn, activation))


def pointwise_bn_act_pool(x: Tensor, weight: Tensor, bn: BatchNorm, activation: Activation) -> Tensor:
    """[N, O]: the image's mean of act(BN(pointwise(x))), as `bn_act`; x is [N, I, H, W], weight [O, I, 1, 1]."""
    if (dispatch.call_reason(x) or dispatch.bias_reason(bn)) is not None or bn.batch_statistics:
        return reference.ACTIVATIONS[activation](reference.batch_norm(F.conv2d(x, weight), bn)).mean((2, 3))
    from fastmbconv.fused.single import POOL, DepthwiseWeights

    weights = DepthwiseWeights(weight, *biases.affine(bn))
    return run_inference(x, None, weights, call.statistics(bn), call.describe_single(POOL.name, bn, activation))


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _mark_moved(statistics: list[Tensor]) -> None:
    """For autograd, which checks that nothing changed that was saved: kernels change these."""
    if statistics and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(statistics)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def use_kernels(reason: str | None, x: Tensor) -> bool:
    if reason is not None and dispatch.get_backend() == "triton" and x.numel() > 0:
        told = f"the backend is set to 'triton', and the kernels do not take this call: {reason}"
        if reason == dispatch.TRANSFORMED:
            raise RuntimeError(f"{told}; {dispatch.WAY_OUT}")
        raise ValueError(told)
    return reason is None


def compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    narrow = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrow else x.dtype


def keeps_nothing(x: Tensor, block: Block, memory: Memory, dtype: torch.dtype) -> bool:
    """Whether this call keeps no expanded tensor: asked for, or in training where a tuned table says that it's faster.

    torch.compile traces this, and tables are files: what it compiles does as `memory` says.
    """
    if block.bn1 is None or memory == "lean" or not block.bn1.batch_statistics or torch.compiler.is_compiling():
        return block.bn1 is not None and memory == "lean"
    from fastmbconv.kernels import tables

    hidden, shape = block.depthwise_weight.shape[0], block.behind_start(x.shape)
    return tables.lean_is_faster(x.device, dtype, shape, hidden, block.kernel_size, block.stride, block.activation)


def draw_keep(x: Tensor, block: Block | DenseBlock, dtype: torch.dtype) -> Tensor | None:
    """Each sample's stochastic-depth factor [N], drawn by the block's own function so that seeds keep their meaning."""
    if not block.residual or block.drop is None:
        return None
    ones = torch.ones(x.shape[0], 1, 1, 1, dtype=dtype, device=x.device)
    return block.drop(ones).reshape(-1).to(torch.float64 if dtype == torch.float64 else torch.float32)
