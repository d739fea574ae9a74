"""Weights of other libraries' EfficientNets in our models, and ours in theirs.

timm (efficientnet_* and tf_*), torchvision, lukemelas (efficientnet_pytorch) and Hugging Face (transformers) hold the
same tensors in the same order under other names. Names are mapped one by one; nothing is copied before all agree.

load(efficientnet_b0(family="tf"), "efficientnet-b0-355c32eb.pth")
convert(model, model.state_dict(), to="timm")
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastmbconv.efficientnet import FAMILIES, EfficientNet
from fastmbconv.scaling import COEFFICIENTS, Coefficients, plan

Scheme = Literal["fastmbconv", "timm", "torchvision", "lukemelas", "huggingface"]
Source = Mapping[str, Any] | str | os.PathLike[str]

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "model.", "_orig_mod.")


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

_CLASSIFIER = 2  # entries: weight and bias
_BLOCK_KEY = re.compile(r"(stages\.(\d+)\.(\d+)\.)(.+)\.(\w+)")


class CheckpointError(ValueError):
    """A checkpoint does not fit a model; the message names the first mismatch. The model is as it was."""


class UnknownNamesError(CheckpointError):
    """It has the names of no known library."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `load` did.

    Args:
        scheme: whose names the checkpoint has.
        loaded: our names of the entries that were copied.
        kept: our names of the entries that the model kept, because the checkpoint has none for them.
        unused: the checkpoint's names of the entries that the model has no place for.
    """

    scheme: Scheme | Literal["position"]
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.loaded)} entries from {self.scheme}, {len(self.kept)} kept, {len(self.unused)} unused"


def load(
    model: EfficientNet, source: Source, *, scheme: Scheme | Literal["position"] | None = None, strict: bool = True
) -> Report:
    """Copy a checkpoint's weights and statistics into a model of ours.

    Args:
        source: a state dict, or the path of one (`torch.load` with weights_only, or .safetensors). It may lie in a dict
            under "state_dict", "model_state_dict" or "model", and its names may start with "module.", "model." or
            "_orig_mod.".
        scheme: whose names the checkpoint has; default: found out from the names. "position" ignores them, for a
            library that is not known here: the number of entries, and in this order each one's shape and last part of
            the name, must agree.
        strict: every entry needs its counterpart. If False, entries without one are kept or left out and reported, and
            so is a classifier for another number of classes; all other shapes must agree all the same.

    A BN's missing num_batches_tracked (old checkpoints) counts as no mismatch, nor does the head or a stage that a
    model with features_only or without classes lacks. A model of the other numeric family than the checkpoint's library
    loads with a warning: its outputs differ.

    Raises:
        CheckpointError: naming the first entry that is missing, has another shape, or has no place. Nothing is copied.
        TypeError: if model is not an `EfficientNet`, or source holds something else than tensors.
        ValueError: for an unknown scheme, or a model on the meta device.
    """
    if not isinstance(model, EfficientNet):
        raise TypeError(f"model is a {type(model).__name__}: allowed is fastmbconv.efficientnet.EfficientNet")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("model is on the meta device and has no memory to load into: call model.to_empty(device=...)")
    if scheme is not None and scheme not in (*SCHEMES, "position"):
        raise ValueError(f"scheme is {scheme!r}: allowed are {', '.join(SCHEMES)}, position, None")
    entries = read(source)
    if scheme == "position":
        found = _by_position(model, entries)
        unused: list[str] = []
    else:
        scheme, entries = _recognised(model, entries, (scheme,) if scheme else SCHEMES)
        found, unused = _matched(model, scheme, entries, strict)
        _warn_of_numerics(model, scheme)
    kept = tuple(key for key in model.state_dict() if key not in found)
    model.load_state_dict(found, strict=False)
    return Report(scheme, tuple(found), kept, tuple(unused))


def convert(model: EfficientNet, source: Source, to: Scheme) -> dict[str, Tensor]:
    """Rename a state dict of any of the libraries into another's names, in their common order.

    Args:
        model: ours, of the same variant (it may be on the meta device): it says which stage a block is in.
        source: as in `load`.
        to: "fastmbconv", "timm", "torchvision", "lukemelas" or "huggingface".

    Raises:
        CheckpointError: as `load`, strictly.
        ValueError: for an unknown `to`, or a Lite model and torchvision or Hugging Face, which have none.
    """
    if to not in _SCHEMES:
        raise ValueError(f"to is {to!r}: allowed are {', '.join(SCHEMES)}")
    if model.coefficients.lite and to in ("torchvision", "huggingface"):
        raise ValueError(f"to is {to!r}: it has no EfficientNet-Lite")
    scheme, theirs = _recognised(model, read(source), SCHEMES)
    found, _ = _matched(model, scheme, theirs, strict=True)
    return dict(zip(_translated(found, to), found.values(), strict=True))


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose names a checkpoint has, and which model it fits; num_classes is 0 where it has no classifier."""

    scheme: Scheme
    variant: str
    num_classes: int
    in_chans: int

    def model(self, **options: Any) -> EfficientNet:
        """A model of ours with random weights that takes this checkpoint."""
        return EfficientNet(COEFFICIENTS[self.variant], num_classes=self.num_classes, in_chans=self.in_chans, **options)


def identify(source: Source) -> Identity:
    """Find out, from names and shapes, which variant's checkpoint this is and which library's names it has.

    Args:
        source: as in `load`.

    Raises:
        CheckpointError: if it fits no variant; the message says which comes nearest, and what doesn't fit.
        TypeError: if source holds something else than tensors.
    """
    entries, mismatch = read(source), ""
    present = sum(not name.endswith("num_batches_tracked") for name in entries)
    gaps = {variant: abs(_size(coefficients) - present) for variant, coefficients in COEFFICIENTS.items()}
    nearest = sorted(gaps, key=gaps.__getitem__)
    for variant in [name for name in nearest if gaps[name] <= _CLASSIFIER] or nearest[:1]:
        with torch.device("meta"):
            model = EfficientNet(COEFFICIENTS[variant])
        scheme, theirs = _recognised(model, entries, SCHEMES)
        stem, bias = (theirs.get(name) for name in _translated(["stem.conv.weight", "classifier.bias"], scheme))
        channels = 3 if stem is None or stem.ndim != 4 else stem.shape[1]
        identity = Identity(scheme, variant, 0 if bias is None else len(bias), channels)
        try:
            with torch.device("meta"):
                _matched(identity.model(), scheme, theirs, strict=True)
        except CheckpointError as error:
            mismatch = mismatch or f"{variant} comes nearest, but {error}"
        else:
            return identity
    raise CheckpointError(f"source fits none of {', '.join(COEFFICIENTS)}: {mismatch}")


def _size(coefficients: Coefficients) -> int:
    """Entries of a whole model, but for num_batches_tracked: 5 for a convolution with its BN."""
    excite = 0 if coefficients.lite else 4
    blocks = sum(s.repeats * ((10 if s.expand_ratio == 1 else 15) + excite) for s in plan(coefficients).stages)
    return 5 + blocks + 5 + _CLASSIFIER


def read(source: Source) -> dict[str, Tensor]:
    """A checkpoint's entries, without what they are wrapped in and without the prefixes; see `load`.

    Raises:
        TypeError: if source holds something else than tensors.
    """
    content: Any = source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise TypeError(f"source holds a {type(content).__name__}: allowed is a state dict that is not empty")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"source[{name!r}] is a {type(value).__name__}: allowed are tensors")
    entries = dict(content)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in entries)), None):
        entries = {k.removeprefix(prefix): v for k, v in entries.items()}
    return entries


def _translated(keys: Iterable[str], scheme: Scheme) -> list[str]:
    """Our keys, in our order, as this library calls them."""
    keys, names = list(keys), _SCHEMES[scheme]
    blocks: dict[str, int] = {}
    expanded = {match[1] for key in keys if (match := _BLOCK_KEY.fullmatch(key)) and match[4] == "expand_conv"}
    out = []
    for key in keys:
        if match := _BLOCK_KEY.fullmatch(key):
            block, stage, i, module, leaf = match.groups()
            n = blocks.setdefault(block, len(blocks))
            inner = names.inner if block in expanded else names.inner_without_expansion
            out.append(f"{names.block.format(s=stage, s1=int(stage) + 1, i=i, n=n)}{inner[module]}.{leaf}")
        else:
            module, _, leaf = key.rpartition(".")
            out.append(f"{names.outer[module]}.{leaf}")
    return out


def _recognised(
    model: EfficientNet, entries: dict[str, Tensor], schemes: Iterable[Scheme]
) -> tuple[Scheme, dict[str, Tensor]]:
    """The library that most names belong to; Hugging Face's base model gets its prefix back."""
    with_prefix = {k if k.startswith("classifier.") else f"efficientnet.{k}": v for k, v in entries.items()}
    keys = _all_keys(model)
    hits, best = 0, None
    for scheme in schemes:
        names = set(_translated(keys, scheme))
        for candidate in (entries, with_prefix) if scheme == "huggingface" else (entries,):
            count = sum(name in names for name in candidate)
            if count > hits:
                hits, best = count, (scheme, candidate)
    if best is None:
        first = ", ".join(list(entries)[:3])
        raise UnknownNamesError(
            f"source has names of no known library ({first}, ...): known are {', '.join(SCHEMES)}, "
            'and scheme="position" loads by order'
        )
    return best


def _by_position(model: EfficientNet, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = model.state_dict()
    for (key, tensor), (name, other) in zip(ours.items(), entries.items(), strict=False):
        if tensor.shape != other.shape or key.rpartition(".")[2] != name.rpartition(".")[2]:
            raise CheckpointError(
                f"{key} is {list(tensor.shape)}, and at its position the checkpoint has {name}, {list(other.shape)}"
            )
    if len(ours) != len(entries):
        raise CheckpointError(f"the model has {len(ours)} entries, the checkpoint {len(entries)}")
    return dict(zip(ours, entries.values(), strict=True))


def _all_keys(model: EfficientNet) -> list[str]:
    """The keys of this variant with its head and all its stages."""
    with torch.device("meta"):
        return list(EfficientNet(model.coefficients, num_classes=1).state_dict())


def _matched(
    model: EfficientNet, scheme: Scheme, theirs: dict[str, Tensor], strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Our names -> their tensors, and those of their names that the model has no place for."""
    keys = _all_keys(model)
    names = dict(zip(keys, _translated(keys, scheme), strict=True))
    ours = model.state_dict()
    found: dict[str, Tensor] = {}
    skipped: set[str] = set()
    for key, tensor in ours.items():
        name = names[key]
        if name not in theirs:
            if strict and not key.endswith(".num_batches_tracked"):
                raise CheckpointError(f"{key} has no counterpart: the checkpoint ({scheme}) lacks {name}")
        elif theirs[name].shape == tensor.shape:
            found[key] = theirs[name]
        elif key.startswith("classifier.") and not strict:
            skipped.add(key)
        else:
            raise CheckpointError(_shape_message(key, tensor, name, theirs[name], scheme))
    # A classifier is taken as a whole: the bias of one and the weight of another would be no classifier.
    if skipped:
        found = {k: v for k, v in found.items() if not k.startswith("classifier.")}
    places = set(names.values())
    if strict and (extra := next((name for name in theirs if name not in places), None)):
        raise CheckpointError(f"{extra} in the checkpoint ({scheme}) has no counterpart in the model")
    taken = {names[key] for key in found}
    return found, [name for name in theirs if name not in taken]


def _shape_message(key: str, ours: Tensor, name: str, theirs: Tensor, scheme: str) -> str:
    message = f"{key} is {list(ours.shape)}, and {name} in the checkpoint ({scheme}) is {list(theirs.shape)}"
    if key.startswith("classifier."):
        message += (
            f": load into a model with num_classes={theirs.shape[0]} and call reset_classifier({ours.shape[0]}), "
            "or keep the model's own classifier with strict=False"
        )
    elif key == "stem.conv.weight" and theirs.ndim == 4 and ours.shape[0] == theirs.shape[0]:
        message += f": the model was made with in_chans={ours.shape[1]}"
    return message


def _warn_of_numerics(model: EfficientNet, scheme: Scheme) -> None:
    """Warn if the outputs will differ from those of the library; timm's names are the same in both families."""
    if scheme in ("fastmbconv", "timm"):
        return
    family = "torch" if scheme == "torchvision" else "tf"
    eps = FAMILIES[family].eps
    if scheme == "torchvision" and model.coefficients in (COEFFICIENTS[v] for v in ("b5", "b6", "b7")):
        eps = 1e-3
    if model.family != family or model.eps != eps:
        warnings.warn(
            f"a {scheme} checkpoint belongs to family={family!r}, eps={eps}; this model has family={model.family!r}, "
            f"eps={model.eps}, and gives other outputs",
            stacklevel=3,
        )
