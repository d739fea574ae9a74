"""Our own MBConv: it can run both ways, so swapping it only turns its `fused` on or off."""

from __future__ import annotations

from torch import nn

from fastmbconv.block import Block
from fastmbconv.ends import ConvBNAct
from fastmbconv.mbconv import MBConv
from fastmbconv.swap.parts import Kinds
from fastmbconv.swap.places import Pool, Site

KINDS = Kinds(convs=frozenset({"fastmbconv.mbconv.Conv2d"}))


def mbconv(module: nn.Module) -> Block | str:
    assert isinstance(module, MBConv)
    return module.replaced_reason() or module.describe()


BLOCKS = {"fastmbconv.mbconv.MBConv": mbconv}


def end(module: ConvBNAct) -> Site:
    """Its own forward chooses the path; a 1x1 convolution is the head, which its model pools."""
    head = module.conv.kernel_size == (1, 1)
    layers = {"conv": module.conv, "bn": module.bn, "act": module.act}
    pool = Pool(module) if head else None
    return Site("head" if head else "stem", module.conv, module.bn, module.act, layers, KINDS, pool)
