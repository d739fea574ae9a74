"""The model of a run: which EfficientNet, what is frozen, fused or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastmbconv
from fastmbconv import dispatch
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.scaling import COEFFICIENTS, Coefficients, compound
from fastmbconv.swap.explain import rows
from fastmbconv.training.config import Config
from fastmbconv.training.errors import TrainingError


def coefficients(config: Config) -> Coefficients:
    """The variant, or the compound formula, with the options' own width, depth and resolution.

    Raises:
        TrainingError: for an unknown variant, or numbers that make no network.
    """
    short = config.model.removeprefix("efficientnet_")
    if short not in COEFFICIENTS:
        names = ", ".join(f"efficientnet_{name}" for name in COEFFICIENTS)
        raise TrainingError(f"--model is {config.model!r}: allowed are {names}")
    changes: dict[str, Any] = {
        name: value for name in ("width", "depth", "resolution") if (value := getattr(config, name)) is not None
    }
    try:
        base = COEFFICIENTS[short] if config.phi is None else compound(config.phi)
        return replace(base, **changes)
    except ValueError as error:
        raise TrainingError(f"--{error}") from error


def build(config: Config, classes: int) -> EfficientNet:
    """On the CPU, with new weights, and frozen parameters frozen; not yet fused."""
    of = coefficients(config)
    torch.manual_seed(config.seed)
    family: Any = config.family
    model = EfficientNet(
        of, num_classes=classes, family=family, eps=config.eps, dropout=config.dropout, drop_path=config.drop_path
    )
    for module in frozen(model, config):
        module.requires_grad_(False)
    model.set_grad_checkpointing(config.checkpointing)
    return model


def frozen(model: EfficientNet, config: Config) -> list[nn.Module]:
    """The modules whose parameters and statistics stay as they are."""
    parts: list[nn.Module] = []
    if config.freeze:
        parts = [model.stem, *list(model.stages)[: config.freeze]]
        if config.freeze > len(model.stages):
            parts.append(model.head)
    if config.freeze_bn:
        parts += [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return parts


def train_mode(model: EfficientNet, config: Config) -> None:
    """Training mode, but frozen parts keep their statistics."""
    model.train()
    for module in frozen(model, config):
        for each in module.modules():
            if isinstance(each, _BatchNorm):
                each.eval()


def prepare(model: EfficientNet, config: Config, device: torch.device) -> EfficientNet:
    """On its device, in its memory format, fused or not: our models are, unless told otherwise."""
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    memory: Any = config.memory
    return fastmbconv.fuse(model, memory=memory) if config.fused else fastmbconv.unfuse(model)


def graphed(network: EfficientNet, example: Tensor) -> nn.Module:
    """The network's forward and backward as CUDA graphs, in the modes and the autocast that are set now.

    Raises:
        TrainingError: without a GPU, or if the step can't be captured.
    """
    try:
        return fastmbconv.graph(network, example)  # type: ignore[return-value]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"--graph is set, on {example.device}: {reason}; run without it (--no-graph)") from error


def precision(config: Config, device: torch.device) -> torch.dtype | None:
    """What a run's autocast computes in; None: as it is."""
    default = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp or default]


def path_taken(model: nn.Module, device: torch.device) -> str:
    """A sentence on what runs the blocks."""
    blocks = rows(model, {})
    fused = sum(row.path == "fused" for row in blocks)
    if not fused:
        return f"eager PyTorch for all {len(blocks)} blocks"
    kernels = device.type == "cuda" or (dispatch.interpreted() and dispatch.get_backend() == "triton")
    return (
        f"Triton kernels for {fused} of {len(blocks)} blocks"
        if kernels
        else f"eager PyTorch for all {len(blocks)} blocks (the kernels need a GPU)"
    )
