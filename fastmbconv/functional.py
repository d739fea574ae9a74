"""The fused ops as functions: they check their arguments, follow autocast, and choose between the kernels and eager.

Images are [N, C, H, W] in any memory format; the kernels work in channels_last and return channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmbconv import ahead, call, checks, dispatch, reference
from fastmbconv.block import Activation, BatchNorm, Block, DenseBlock, Memory, Padding, SqueezeExcite
from fastmbconv.call import Settings, Tensors

__all__ = ["BatchNorm", "Block", "SqueezeExcite", "depthwise_bn_act", "mbconv", "squeeze_excite"]


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
    if not use_kernels(dispatch.supports(block, x), x):
        return reference.mbconv(x, block) if eager is None else eager(x)
    if eager is not None:
        checks.check_block(x, block)
    bns = (block.bn1, block.bn2, block.bn3)
    if infers(block, bns, x, block.expand_weight, block.depthwise_weight, block.project_weight):
        ahead.block_called(x, block, memory, "infer")
        return infer_mbconv(x, block)
    from fastmbconv.fused import mbconv

    ahead.block_called(x, block, memory, "train")
    compute = compute_dtype(x)
    wide = block.residual and compute != x.dtype
    with torch.autocast(x.device.type, enabled=False):
        keep = draw_keep(x, block, compute)
        count_batch(*bns)
        lean = keeps_nothing(x, block, memory, compute)
        weights, statistics, settings = mbconv.describe(block, block.residual and not wide, lean)
        return run_fused(settings, x, x.to(compute), None, keep, weights, statistics, wide)


def infer_mbconv(x: Tensor, block: Block) -> Tensor:
    """`mbconv` with running statistics and without gradients."""
    from fastmbconv.fused import mbconv

    compute = compute_dtype(x)
    wide = block.residual and compute != x.dtype
    with torch.autocast(x.device.type, enabled=False):
        weights, statistics, settings = mbconv.describe(block, block.residual and not wide, False)
        return run_inference(settings, x, x.to(compute), None, weights, statistics, wide)


def run_fused(
    settings: Settings,
    x: Tensor,
    computed: Tensor,
    shortcut: Tensor | None,
    keep: Tensor | None,
    weights: Tensors,
    statistics: Tensors,
    wide: bool,
) -> Tensor:
    """[N, C, H, W] of a part, with gradients. `computed` is x in the dtype that the kernels compute in.

    With `wide` x is added in its own, wider dtype, as eager does under autocast.
    """
    from fastmbconv.autograd import Fused

    last = computed.contiguous(memory_format=torch.channels_last)  # known to autograd: what is saved leads back to x
    y = Fused.apply(settings, last, shortcut, keep, *weights, *statistics).permute(0, 3, 1, 2)
    return x + y if wide else y


def run_inference(
    settings: Settings,
    x: Tensor,
    computed: Tensor,
    shortcut: Tensor | None,
    weights: Any,
    statistics: Tensors,
    wide: bool = False,
) -> Tensor:
    """The same with running statistics, without gradients."""
    from fastmbconv import ops

    added = None if shortcut is None else _nhwc(shortcut)
    y = ops.infer(settings, _nhwc(computed), added, weights, statistics)
    y = y.permute(0, 3, 1, 2) if y.dim() == 4 else y
    return x + y if wide else y


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
        or dispatch.layout_reason(weight, *call.affine(bn), bn.running_mean, bn.running_var)
    )
    if not use_kernels(reason, x):
        return reference.depthwise_bn_act(x, weight, bn, stride, padding, activation)
    from fastmbconv.fused.single import DEPTHWISE, DepthwiseWeights

    weights = DepthwiseWeights(weight, *call.affine(bn))
    settings = call.single(DEPTHWISE.name, bn, activation)._replace(stride=stride, padding=padding)
    compute = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if not bn.batch_statistics and not needs_grad(x, *weights):
            return run_inference(settings, x, x.to(compute), None, weights, call.statistics(bn))
        count_batch(bn)
        return run_fused(settings, x, x.to(compute), None, None, weights, call.statistics(bn), False)


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

    settings = call.Settings(EXCITE.name, "none", se_activation=se.activation)
    with torch.autocast(x.device.type, enabled=False):
        # Eager's product keeps x's own dtype under autocast: only the gate's convolutions are narrowed.
        return run_fused(settings, x, x, None, None, call.excite(se), (), False)


def bn_act(x: Tensor, bn: BatchNorm, activation: Activation) -> Tensor:
    """act(BN(x)) with running statistics, without gradients, in one pass; x is [N, C, H, W]."""
    if dispatch.call_reason(x) is not None or bn.batch_statistics:
        return reference.ACTIVATIONS[activation](reference.batch_norm(x, bn))
    from fastmbconv.fused.single import NORM, NormWeights

    weights = NormWeights(*call.affine(bn))
    return run_inference(call.single(NORM.name, bn, activation), x, x, None, weights, call.statistics(bn))


def pointwise_bn_act_pool(x: Tensor, weight: Tensor, bn: BatchNorm, activation: Activation) -> Tensor:
    """[N, O]: the image's mean of act(BN(pointwise(x))), as `bn_act`; x is [N, I, H, W], weight [O, I, 1, 1]."""
    if dispatch.call_reason(x) is not None or bn.batch_statistics:
        return reference.ACTIVATIONS[activation](reference.batch_norm(F.conv2d(x, weight), bn)).mean((2, 3))
    from fastmbconv.fused.single import POOL, DepthwiseWeights

    weights = DepthwiseWeights(weight, *call.affine(bn))
    with torch.autocast(x.device.type, enabled=False):
        return run_inference(call.single(POOL.name, bn, activation), x, x, None, weights, call.statistics(bn))


def infers(block: Block | DenseBlock, bns: tuple[BatchNorm | None, ...], *tensors: Tensor | None) -> bool:
    """True where every BatchNorm is a fixed affine map, and neither they nor `tensors` nor the gate want a gradient."""
    if (block.residual and block.drop is not None) or any(bn is not None and bn.batch_statistics for bn in bns):
        return False
    return not needs_grad(*tensors, *call.excite(block.se), *(tensor for bn in bns for tensor in call.affine(bn)))


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


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

    hidden = block.depthwise_weight.shape[0]
    return tables.lean_is_faster(x.device, dtype, x.shape, hidden, block.kernel_size, block.stride, block.activation)


def draw_keep(x: Tensor, block: Block | DenseBlock, dtype: torch.dtype) -> Tensor | None:
    """Each sample's stochastic-depth factor [N], drawn by the block's own function so that seeds keep their meaning."""
    if not block.residual or block.drop is None:
        return None
    ones = torch.ones(x.shape[0], 1, 1, 1, dtype=dtype, device=x.device)
    return block.drop(ones).reshape(-1).to(torch.float64 if dtype == torch.float64 else torch.float32)


def count_batch(*bns: BatchNorm | None) -> None:
    """Count this call in BatchNorms that move their running statistics."""
    counts = [bn.num_batches_tracked for bn in bns if bn is not None and bn.updates]
    for count in counts:
        if count is not None:
            count.add_(1)
