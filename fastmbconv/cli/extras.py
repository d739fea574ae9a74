"""Imports that only a pip extra brings, and the error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class CommandError(Exception):
    """A command can't run; the message is all that its user needs."""


def require(module: str, extra: str) -> Any:
    """Import a module that `pip install fastmbconv[extra]` brings, or say so."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(f"this needs {error.name}: pip install 'fastmbconv[{extra}]'") from error


def require_timm(extra: str) -> ModuleType:
    """timm, also beside a torchvision that was built for another torch."""
    return require_vision("timm", extra)


def require_vision(module: str, extra: str) -> Any:
    """torchvision, or a library that imports it, also beside a torchvision that was built for another torch.

    A torchvision with CUDA libraries fails to import beside a CPU build of torch, because its compiled operators are
    not registered. Nothing here calls them, so declaring them is enough.
    """
    try:
        return require(module, extra)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise CommandError(f"{module} can't be imported: {error}") from error
    _declare_torchvision_operators()
    return require(module, extra)


def _declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


_kept: list[Any] = []  # a torch.library.Library takes its operators with it when it is collected
