"""The fused ops as functions: they check their arguments, follow autocast, and choose between the kernels and eager.

Images are [N, C, H, W] in any memory format; the kernels work in channels_last and return channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmbconv import ahead, checks, dispatch, reference
from fastmbconv.block import Activation, BatchNorm, Block, DenseBlock, Memory, Padding, SqueezeExcite, pads

if TYPE_CHECKING:
    from fastmbconv.autograd import BatchNormSetting, DepthwiseSetting

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
    if not _use_kernels(dispatch.supports(block, x), x):
        return reference.mbconv(x, block) if eager is None else eager(x)
    if eager is not None:
        checks.check_block(x, block)
    compute = _compute_dtype(x)
    bns = (block.bn1, block.bn2, block.bn3)
    if _infers(block, bns, x, block.expand_weight, block.depthwise_weight, block.project_weight):
        ahead.block_called(x, block, memory, _infer_ahead)
        return _mbconv_inference(x, block, compute)
    from fastmbconv.autograd import MBConvFunction

    # As in eager under autocast: the branch is computed in autocast's dtype, a wider shortcut is added in its own.
    wide = block.residual and compute != x.dtype
    ahead.block_called(x, block, memory, _train_ahead)
    with torch.autocast(x.device.type, enabled=False):
        keep = _keep(x, block, compute)
        for bn in bns:
            _count_batch(bn)
        y = MBConvFunction.apply(*_arguments(x, block, memory, compute, keep)).permute(0, 3, 1, 2)
        return x + y if wide else y


def _arguments(x: Tensor, block: Block, memory: Memory, compute: torch.dtype, keep: Tensor | None) -> tuple[Any, ...]:
    """What MBConvFunction takes."""
    bns, se = (block.bn1, block.bn2, block.bn3), block.se
    return (
        _channels_last(x.to(compute)), block.expand_weight, *_affine(block.bn1), block.depthwise_weight,
        *_affine(block.bn2), *_excite(se),
        block.project_weight, *_affine(block.bn3), keep,
        block.activation, "none" if se is None else se.activation, block.residual and compute == x.dtype,
        _lean(x, block, memory, compute),
        _geometry(x, block.depthwise_weight, block.stride, block.padding),
        *(None if bn is None else _setting(bn) for bn in bns),
        *(tensor for bn in bns for tensor in _running(bn)),
    )  # fmt: skip


def _train_ahead(x: Tensor, block: Block, memory: Memory) -> Tensor:
    """A training step of a call that has not begun, for its launches: no seed is drawn, no batch counted."""
    drops = block.residual and block.drop is not None
    keep = x.new_empty(x.shape[0], dtype=torch.float32) if drops else None
    return ahead.train(_arguments(x, block, memory, _compute_dtype(x), keep))


def _infer_ahead(x: Tensor, block: Block, memory: Memory) -> Tensor:
    """The same without gradients."""
    return _mbconv_inference(x, block, _compute_dtype(x))


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
        or dispatch.layout_reason(weight, *_frozen(bn)[:4])
    )
    if not _use_kernels(reason, x):
        return reference.depthwise_bn_act(x, weight, bn, stride, padding, activation)
    compute = _compute_dtype(x)
    if not bn.batch_statistics and not _needs_grad(x, weight, *_affine(bn)):
        from fastmbconv import inference_ops

        with torch.autocast(x.device.type, enabled=False):
            y = inference_ops.depthwise_bn_act_inference(
                _nhwc(x, compute), weight, *_frozen(bn), activation, *_geometry(x, weight, stride, padding)
            )
        return y.permute(0, 3, 1, 2)
    from fastmbconv.autograd import DepthwiseBNActFunction

    with torch.autocast(x.device.type, enabled=False):
        _count_batch(bn)
        return DepthwiseBNActFunction.apply(
            _channels_last(x.to(compute)), weight, *_affine(bn), activation, _geometry(x, weight, stride, padding),
            _setting(bn), *_running(bn),
        ).permute(0, 3, 1, 2)  # fmt: skip


def squeeze_excite(x: Tensor, se: SqueezeExcite) -> Tensor:
    """x * sigmoid(expand(act(reduce(mean of x over the image)))): x is [N, C, H, W]; Hu et al., 2018.

    Raises ValueError as `mbconv` does.
    """
    checks.check_squeeze_excite(x, se, x.shape[1] if x.dim() == 4 else -1)
    reason = (
        dispatch.call_reason(x)
        or dispatch.activation_reason(se.activation)
        or dispatch.squeeze_reason(se)
        or dispatch.layout_reason(*_excite(se))
        or dispatch.size_reason(x, 1)
    )
    if not _use_kernels(reason, x):
        return reference.squeeze_excite(x, se)
    from fastmbconv.autograd import SqueezeExciteFunction

    with torch.autocast(x.device.type, enabled=False):
        # Eager's product keeps x's own dtype under autocast: only the gate's convolutions are narrowed.
        return SqueezeExciteFunction.apply(_channels_last(x), *_excite(se), se.activation).permute(0, 3, 1, 2)


def bn_act(x: Tensor, bn: BatchNorm, activation: Activation) -> Tensor:
    """act(BN(x)) with running statistics, without gradients, in one pass; x is [N, C, H, W]."""
    if dispatch.call_reason(x) is not None or bn.batch_statistics:
        return reference.ACTIVATIONS[activation](reference.batch_norm(x, bn))
    from fastmbconv import inference_ops

    return inference_ops.bn_act_inference(_nhwc(x, x.dtype), *_frozen(bn), activation).permute(0, 3, 1, 2)


def pointwise_bn_act_pool(x: Tensor, weight: Tensor, bn: BatchNorm, activation: Activation) -> Tensor:
    """[N, O]: the image's mean of act(BN(pointwise(x))), as `bn_act`; x is [N, I, H, W], weight [O, I, 1, 1]."""
    if dispatch.call_reason(x) is not None or bn.batch_statistics:
        return reference.ACTIVATIONS[activation](reference.batch_norm(F.conv2d(x, weight), bn)).mean((2, 3))
    from fastmbconv import inference_ops

    with torch.autocast(x.device.type, enabled=False):
        return inference_ops.pointwise_pool(_nhwc(x, _compute_dtype(x)), weight, *_frozen(bn), activation)


def _mbconv_inference(x: Tensor, block: Block, compute: torch.dtype) -> Tensor:
    from fastmbconv import inference_ops

    wide = block.residual and compute != x.dtype
    se = block.se
    with torch.autocast(x.device.type, enabled=False):
        y = inference_ops.mbconv_inference(
            _nhwc(x, compute), block.expand_weight, *_frozen(block.bn1), block.depthwise_weight, *_frozen(block.bn2),
            *_excite(se),
            block.project_weight, *_frozen(block.bn3), block.activation, "none" if se is None else se.activation,
            block.residual and not wide, *_geometry(x, block.depthwise_weight, block.stride, block.padding),
        ).permute(0, 3, 1, 2)  # fmt: skip
        return x + y if wide else y


def _infers(block: Block | DenseBlock, bns: tuple[BatchNorm | None, ...], *tensors: Tensor | None) -> bool:
    """True where every BatchNorm is a fixed affine map, and neither they nor `tensors` nor the gate want a gradient."""
    if (block.residual and block.drop is not None) or any(bn is not None and bn.batch_statistics for bn in bns):
        return False
    return not _needs_grad(*tensors, *_excite(block.se), *(tensor for bn in bns for tensor in _affine(bn)))


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _nhwc(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).permute(0, 2, 3, 1).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    """What a Function takes: a copy that autograd knows, so that what is saved of it leads back to x."""
    return x.contiguous(memory_format=torch.channels_last)


def _frozen(bn: BatchNorm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
    return (None, None, None, None, 0.0) if bn is None else (*_affine(bn), bn.running_mean, bn.running_var, bn.eps)


def _use_kernels(reason: str | None, x: Tensor) -> bool:
    if reason is not None and dispatch.get_backend() == "triton" and x.numel() > 0:
        told = f"the backend is set to 'triton', and the kernels do not take this call: {reason}"
        if reason == dispatch.TRANSFORMED:
            raise RuntimeError(f"{told}; {dispatch.WAY_OUT}")
        raise ValueError(told)
    return reason is None


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    narrow = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrow else x.dtype


def _lean(x: Tensor, block: Block, memory: Memory, dtype: torch.dtype) -> bool:
    """Whether this call keeps no expanded tensor: asked for, or in training where a tuned table says that it's faster.

    torch.compile traces this, and tables are files: what it compiles does as `memory` says.
    """
    if block.bn1 is None or memory == "lean" or not block.bn1.batch_statistics or torch.compiler.is_compiling():
        return block.bn1 is not None and memory == "lean"
    from fastmbconv.kernels import tables

    hidden = block.depthwise_weight.shape[0]
    return tables.lean_is_faster(x.device, dtype, x.shape, hidden, block.kernel_size, block.stride, block.activation)


def _keep(x: Tensor, block: Block | DenseBlock, dtype: torch.dtype) -> Tensor | None:
    """Each sample's stochastic-depth factor [N], drawn by the block's own function so that seeds keep their meaning."""
    if not block.residual or block.drop is None:
        return None
    ones = torch.ones(x.shape[0], 1, 1, 1, dtype=dtype, device=x.device)
    return block.drop(ones).reshape(-1).to(torch.float64 if dtype == torch.float64 else torch.float32)


def _count_batch(bn: BatchNorm | None) -> None:
    if bn is not None and bn.updates and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)


def _affine(bn: BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if bn is None else (bn.weight, bn.bias)


def _excite(se: SqueezeExcite | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if se is None else (se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias)


def _running(bn: BatchNorm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if bn is None else (bn.running_mean, bn.running_var, bn.num_batches_tracked)


def _setting(bn: BatchNorm) -> BatchNormSetting:
    from fastmbconv.autograd import BatchNormSetting

    group = None if bn.shared is None else bn.shared.group_name
    return BatchNormSetting(bn.eps, bn.momentum, bn.batch_statistics, bn.updates, group)


def _geometry(x: Tensor, weight: Tensor, stride: int, padding: Padding) -> DepthwiseSetting:
    from fastmbconv.autograd import DepthwiseSetting

    (top, bottom), (left, right) = (pads(size, weight.shape[-1], stride, padding) for size in x.shape[2:])
    height, width = (
        checks.output_size(size, sum(pad), weight.shape[-1], stride)
        for size, pad in zip(x.shape[2:], ((top, bottom), (left, right)), strict=True)
    )
    return DepthwiseSetting(stride, top, left, height, width)
