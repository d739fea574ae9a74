"""What the libraries call the modules of an EfficientNet: the same tensors, in the same order, under other names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["fastmbconv", "timm", "torchvision", "lukemelas", "huggingface"]


@dataclass(frozen=True, slots=True)
class _Names:
    """One library's names for our modules; `block` takes s (stage), s1 (stage + 1), i (block in stage), n (block)."""

    outer: Mapping[str, str]
    block: str
    inner: Mapping[str, str]
    inner_without_expansion: Mapping[str, str]


_LUKEMELAS = {
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "depthwise_conv": "_depthwise_conv",
    "depthwise_bn": "_bn1",
    "se.reduce": "_se_reduce",
    "se.expand": "_se_expand",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}
_HUGGINGFACE = {
    "expand_conv": "expansion.expand_conv",
    "expand_bn": "expansion.expand_bn",
    "depthwise_conv": "depthwise_conv.depthwise_conv",
    "depthwise_bn": "depthwise_conv.depthwise_norm",
    "se.reduce": "squeeze_excite.reduce",
    "se.expand": "squeeze_excite.expand",
    "project_conv": "projection.project_conv",
    "project_bn": "projection.project_bn",
}
_SCHEMES: dict[Scheme, _Names] = {
    "fastmbconv": _Names(
        outer={name: name for name in ("stem.conv", "stem.bn", "head.conv", "head.bn", "classifier")},
        block="stages.{s}.{i}.",
        inner={name: name for name in _LUKEMELAS},
        inner_without_expansion={name: name for name in _LUKEMELAS},
    ),
    "timm": _Names(
        outer={
            "stem.conv": "conv_stem",
            "stem.bn": "bn1",
            "head.conv": "conv_head",
            "head.bn": "bn2",
            "classifier": "classifier",
        },
        block="blocks.{s}.{i}.",
        inner={
            "expand_conv": "conv_pw",
            "expand_bn": "bn1",
            "depthwise_conv": "conv_dw",
            "depthwise_bn": "bn2",
            "se.reduce": "se.conv_reduce",
            "se.expand": "se.conv_expand",
            "project_conv": "conv_pwl",
            "project_bn": "bn3",
        },
        inner_without_expansion={
            "depthwise_conv": "conv_dw",
            "depthwise_bn": "bn1",
            "se.reduce": "se.conv_reduce",
            "se.expand": "se.conv_expand",
            "project_conv": "conv_pw",
            "project_bn": "bn2",
        },
    ),
    "torchvision": _Names(
        outer={
            "stem.conv": "features.0.0",
            "stem.bn": "features.0.1",
            "head.conv": "features.8.0",
            "head.bn": "features.8.1",
            "classifier": "classifier.1",
        },
        block="features.{s1}.{i}.block.",
        inner={
            "expand_conv": "0.0",
            "expand_bn": "0.1",
            "depthwise_conv": "1.0",
            "depthwise_bn": "1.1",
            "se.reduce": "2.fc1",
            "se.expand": "2.fc2",
            "project_conv": "3.0",
            "project_bn": "3.1",
        },
        inner_without_expansion={
            "depthwise_conv": "0.0",
            "depthwise_bn": "0.1",
            "se.reduce": "1.fc1",
            "se.expand": "1.fc2",
            "project_conv": "2.0",
            "project_bn": "2.1",
        },
    ),
    "lukemelas": _Names(
        outer={
            "stem.conv": "_conv_stem",
            "stem.bn": "_bn0",
            "head.conv": "_conv_head",
            "head.bn": "_bn1",
            "classifier": "_fc",
        },
        block="_blocks.{n}.",
        inner=_LUKEMELAS,
        inner_without_expansion=_LUKEMELAS,
    ),
    "huggingface": _Names(
        outer={
            "stem.conv": "efficientnet.embeddings.convolution",
            "stem.bn": "efficientnet.embeddings.batchnorm",
            "head.conv": "efficientnet.encoder.top_conv",
            "head.bn": "efficientnet.encoder.top_bn",
            "classifier": "classifier",
        },
        block="efficientnet.encoder.blocks.{n}.",
        inner=_HUGGINGFACE,
        inner_without_expansion=_HUGGINGFACE,
    ),
}
SCHEMES: tuple[Scheme, ...] = tuple(_SCHEMES)
BLOCK_KEY = re.compile(r"(stages\.(\d+)\.(\d+)\.)(.+)\.(\w+)")


def translate(keys: Iterable[str], scheme: Scheme) -> list[str]:
    """Our keys, in our order, as this library calls them."""
    keys, names = list(keys), _SCHEMES[scheme]
    blocks: dict[str, int] = {}
    expanded = {match[1] for key in keys if (match := BLOCK_KEY.fullmatch(key)) and match[4] == "expand_conv"}
    out = []
    for key in keys:
        if match := BLOCK_KEY.fullmatch(key):
            block, stage, i, module, leaf = match.groups()
            n = blocks.setdefault(block, len(blocks))
            inner = names.inner if block in expanded else names.inner_without_expansion
            out.append(f"{names.block.format(s=stage, s1=int(stage) + 1, i=i, n=n)}{inner[module]}.{leaf}")
        else:
            module, _, leaf = key.rpartition(".")
            out.append(f"{names.outer[module]}.{leaf}")
    return out
