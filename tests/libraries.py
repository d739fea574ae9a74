"""Libraries that tests compare with; a test skips, and says which one, where it is not there."""

import importlib

import pytest
import torch

_declared = []


def library(name):
    """The imported library, or a skip that names it."""
    if name in ("timm", "torchvision", "transformers", "segmentation_models_pytorch"):
        _declare_vision_ops()
    return pytest.importorskip(name, reason=f"{name} is not installed")


def _declare_vision_ops():
    """torchvision's compiled operators don't load beside a CPU build of torch; its Python code wants their names."""
    if _declared:
        return
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        ops = torch.library.Library("torchvision", "DEF")
        ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(ops)
