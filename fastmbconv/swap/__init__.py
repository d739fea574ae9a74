"""Swap fused blocks into models that people already have, and out again.

A fused model shares everything with the one that it was: module objects, parameters, buffers, hooks, state-dict keys.
Storing a whole fused model (not its state dict) names fastmbconv in the file: `unfuse` first if others shall load it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fastmbconv import ahead
from fastmbconv.block import Block, Memory
from fastmbconv.checks import check_memory, check_model
from fastmbconv.ends import ConvBNAct
from fastmbconv.swap.ends import fuse_ends
from fastmbconv.swap.explain import Explanation, Row, explain
from fastmbconv.swap.fused import FusedBlock, fusible, swap_in, swap_out
from fastmbconv.swap.runs import Run, runs_of, shell_of, swap_in_runs
from fastmbconv.swap.written import Found, Ways, find

__all__ = ["Explanation", "Row", "explain", "fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)


def fuse(
    model: Model,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    memory: Memory = "fast",
    verify: bool = True,
) -> Model:
    """Make a model's MBConv blocks run fused, in place, and return it.

    Known by their classes are blocks of fastmbconv, timm (InvertedResidual, DepthwiseSeparableConv, EdgeResidual,
    UniversalInvertedResidual, ConvBnAct), torchvision (MBConv, FusedMBConv, InvertedResidual), efficientnet_pytorch and
    segmentation_models_pytorch (MBConvBlock), and transformers (EfficientNetBlock, AlignVisionBlock). Of other modules,
    and of runs of children in an nn.Sequential, torch.fx traces the forward; what computes an MBConv block in one mode
    or both is fused, once it has proved in float64 to have the block's output, gradients and running statistics. A
    block that can't be fused stays as it is, and `explain` says why. Fusing twice is fusing once, with the later
    `memory`. Without a filter stems, heads and other convolutions with BatchNorm and activation outside of the blocks
    go through kernels too, in eval mode where no gradient is wanted: BatchNorm and activation in one pass. They are
    timm's BatchNormAct2d, and any module that is no more than these three; our own head takes its pool along.

    Args:
        model: any module; a block itself too.
        filter_fn: called as filter_fn(block, fully_qualified_name) for each block that can be fused; false leaves it.
            A run of a Sequential's children comes as a Sequential of its own, called "name[begin:end]".
        memory: "lean" keeps no expanded tensor for the backward, which computes it again: less memory, more work.
            "fast" is the faster plan: "lean" too, at shapes where `fastmbconv tune` found it so on this GPU.
        verify: whether a block that no adapter knows is proved; that takes some hundredths of a second each.

    Raises:
        ValueError: for another `memory` than "fast" and "lean".
        TypeError: for a model that is no nn.Module, or a filter_fn that can't be called.
    """
    check_model(model)
    check_memory(memory)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is a {type(filter_fn).__name__}: allowed is a function (module, name) -> bool")
    chosen: Callable[[nn.Module, str], bool] = (lambda *_: True) if filter_fn is None else filter_fn
    blocks: list[tuple[nn.Module, Any]] = []
    holders: list[nn.Module] = []
    for name, module in list(model.named_modules()):
        if runs_of(module):
            holders.append(module)
        block = fusible(module)
        if block is not None and not isinstance(block, str) and _ways_of(module) is None and chosen(module, name):
            swap_in(module, memory)
            blocks.append((module, block))
    written = find(model, verify=verify, again=True)
    blocks += [(module, fusible(module)) for module in _fuse_written(written, holders, chosen, memory)]
    before: Block | None = None
    for module, block in blocks:
        if before is not None:
            ahead.follows(before.depthwise_weight, _described(weakref.ref(module), memory))
        before = block if isinstance(block, Block) else None
    if filter_fn is None:
        fuse_ends(model, written)
    return model


def _fuse_written(
    written: list[Found], holders: list[nn.Module], chosen: Callable[[nn.Module, str], bool], memory: Memory
) -> list[nn.Module]:
    """Swap in what is found by structure, and return it; what was one before and is one no more is swapped out.

    `holders` are Sequentials that call runs of their children fused.
    """
    blocks: list[nn.Module] = []
    runs: dict[nn.Module, list[Run]] = {holder: [] for holder in holders}
    for found in written:
        if isinstance(found.ways, str):
            if _ways_of(found.module) is not None:
                swap_out(found.module)
        elif chosen(found.module, found.name):
            if found.holder is None:
                swap_in(found.module, memory, found.ways)
                blocks.append(found.module)
            else:
                end = found.begin + len(list(found.module.children()))
                runs.setdefault(found.holder, []).append(Run(found.begin, end, found.ways, memory))
    for holder, inside in runs.items():
        if inside:
            swap_in_runs(holder, tuple(inside))
            blocks += [shell_of(holder, run) for run in inside]
        else:
            swap_out(holder)
    return blocks


def _ways_of(module: nn.Module) -> Ways | None:
    """What a fused module that was found by structure computes."""
    return type(module).ways if isinstance(module, FusedBlock) else None


def _described(module: weakref.ref[nn.Module], memory: Memory) -> ahead.Next:
    """A block as data when somebody asks, None once it is gone or no MBConv block."""

    def describe() -> tuple[Block, Memory] | None:
        alive = module()
        block = None if alive is None else fusible(alive)
        return (block, memory) if isinstance(block, Block) else None

    return describe


def unfuse(model: Model) -> Model:
    """Undo `fuse`, in place, and return the model: every block has its own class again and runs as it did.

    Raises:
        TypeError: for a model that is no nn.Module.
        RuntimeError: for a block whose class somebody else changed after `fuse`.
    """
    check_model(model)
    for module in model.modules():
        swap_out(module)
        if isinstance(module, ConvBNAct):
            module.fused = False
    return model
