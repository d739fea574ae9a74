"""Our own MBConv: it can run both ways, so swapping it only turns its `fused` on or off."""

from __future__ import annotations

from torch import nn

from fastmbconv.block import Block
from fastmbconv.mbconv import MBConv


def mbconv(module: nn.Module) -> Block | str:
    assert isinstance(module, MBConv)
    return module.replaced_reason() or module.describe()


BLOCKS = {"fastmbconv.mbconv.MBConv": mbconv}
