"""Weights of other libraries' EfficientNets in our models, and ours in theirs.

timm (efficientnet_* and tf_*), torchvision, lukemelas (efficientnet_pytorch) and Hugging Face (transformers) hold the
same tensors in the same order under other names. Names are mapped one by one; nothing is copied before all agree.

load(efficientnet_b0(family="tf"), "efficientnet-b0-355c32eb.pth")
convert(model, model.state_dict(), to="timm")
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fastmbconv.efficientnet import FAMILIES, EfficientNet
from fastmbconv.scaling import COEFFICIENTS, Coefficients, plan
from fastmbconv.sources.contents import Contents, NoWeightsError, read_contents
from fastmbconv.sources.facts import Fact, Facts
from fastmbconv.sources.names import SCHEMES, Scheme, translate
from fastmbconv.sources.reading import CheckpointError

__all__ = [
    "SCHEMES", "CheckpointError", "Contents", "Identity", "NoWeightsError", "Report", "Scheme", "Source",
    "UnknownNamesError", "convert", "identify", "load", "numerics", "own_numerics", "read", "read_contents",
    "told_numerics",
]  # fmt: skip

Source = Mapping[str, Any] | str | os.PathLike[str] | Contents

ONE_FAMILY: dict[str, str] = {"torchvision": "torch", "lukemelas": "tf", "huggingface": "tf"}  # the others have both
WIDE_EPS = ("b5", "b6", "b7")  # torchvision's run family tf's BN eps
_CLASSIFIER = 2  # entries: weight and bias


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
        part: where in the source the weights lay: "" at its top, "state_dict_ema", or the prefix of their names.
        notes: what was chosen or assumed, a sentence each.
    """

    scheme: Scheme | Literal["position"]
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    part: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} entries from {self.scheme}, {len(self.kept)} kept, {len(self.unused)} unused"
        return "; ".join((counts, *self.notes))


def load(
    model: EfficientNet,
    source: Source,
    *,
    scheme: Scheme | Literal["position"] | None = None,
    strict: bool = True,
    part: str | None = None,
) -> Report:
    """Copy a checkpoint's weights and statistics into a model of ours.

    Args:
        source: a state dict, or a checkpoint that holds one as timm, torchvision's references, Lightning or `fastmbconv
            train` write it; or the path of a file with one (torch's format, restricted to tensors and plain values, or
            safetensors), or of a folder as Hugging Face and timm write it. Prefixes of DDP, FSDP, torch.compile and
            of the module that holds the network are taken off.
        scheme: whose names the checkpoint has; default: found out from the names. "position" ignores them, for a
            library that is not known here: the number of entries, and in this order each one's shape and last part of
            the name, must agree.
        strict: every entry needs its counterpart. If False, entries without one are kept or left out and reported, and
            so is a classifier for another number of classes; all other shapes must agree all the same.
        part: which weights, where the source holds several: the name of what holds them ("state_dict_ema"), or the
            prefix of their names ("teacher"). Default: a moving average before the raw ones, as timm loads them.

    A BN's missing num_batches_tracked (old checkpoints) counts as no mismatch, nor does the head or a stage that a
    model with features_only or without classes lacks.

    Warns:
        UserWarning: if the source says another numeric family or BN eps than the model's (its name, what lies beside
            the weights, or names that only one family has), and if nothing says which: a model made with
            family="torch" or family="tf" is told which, and there is no such warning. Also for values that are not
            finite.

    Raises:
        CheckpointError: for a file that can't be read; for two sources that disagree; for the first entry that is
            missing, has another shape, is no floating-point tensor, or has no place. Nothing is copied.
        NoWeightsError: (a CheckpointError and TypeError) if the source holds no weights, or several sets of them.
        TypeError: if model is not an `EfficientNet`.
        ValueError: for an unknown scheme, or a model on the meta device.
    """
    if not isinstance(model, EfficientNet):
        raise TypeError(f"model is a {type(model).__name__}: allowed is fastmbconv.efficientnet.EfficientNet")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("model is on the meta device and has no memory to load into: call model.to_empty(device=...)")
    if scheme is not None and scheme not in (*SCHEMES, "position"):
        raise ValueError(f"scheme is {scheme!r}: allowed are {', '.join(SCHEMES)}, position, None")
    if part is not None and isinstance(source, Contents):
        raise ValueError(f"part is {part!r}, and source was read already: expected read_contents(..., part={part!r})")
    contents = source if isinstance(source, Contents) else read_contents(source, part)
    entries = contents.entries
    if scheme == "position":
        found = _by_position(model, entries)
        unused: list[str] = []
    else:
        scheme, entries = _recognised(model.coefficients, entries, (scheme,) if scheme else SCHEMES)
        found, unused = _matched(model, scheme, entries, strict)
    _check_facts(model, contents.facts, found)
    notes = [*contents.notes, *_told_of_numerics(model, scheme, contents.facts), *_told_of_values(found)]
    kept = tuple(key for key in model.state_dict() if key not in found)
    model.load_state_dict(found, strict=False)
    return Report(scheme, tuple(found), kept, (*unused, *contents.aside), contents.part, tuple(notes))


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
    if to not in SCHEMES:
        raise ValueError(f"to is {to!r}: allowed are {', '.join(SCHEMES)}")
    if model.coefficients.lite and to in ("torchvision", "huggingface"):
        raise ValueError(f"to is {to!r}: it has no EfficientNet-Lite")
    scheme, theirs = _recognised(model.coefficients, read(source), SCHEMES)
    found, _ = _matched(model, scheme, theirs, strict=True)
    return dict(zip(translate(found, to), found.values(), strict=True))


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
        NoWeightsError: as `load`.
    """
    contents = source if isinstance(source, Contents) else read_contents(source)
    entries, mismatch = contents.entries, ""
    present = sum(not name.endswith("num_batches_tracked") for name in entries)
    gaps = {variant: abs(_size(coefficients) - present) for variant, coefficients in COEFFICIENTS.items()}
    nearest = sorted(gaps, key=gaps.__getitem__)
    for variant in [name for name in nearest if gaps[name] <= _CLASSIFIER] or nearest[:1]:
        scheme, theirs = _recognised(COEFFICIENTS[variant], entries, SCHEMES)
        names = translate(["stem.conv.weight", "classifier.weight", "classifier.bias"], scheme)
        stem, weight, bias = map(theirs.get, names)
        if (weight is None) != (bias is None):
            raise CheckpointError(f"source has {names[1 + (weight is None)]}, and no {names[1 + (bias is None)]}")
        channels = 3 if stem is None or stem.ndim != 4 else stem.shape[1]
        identity = Identity(scheme, variant, 0 if bias is None else bias.numel(), channels)
        try:
            with torch.device("meta"):
                _matched(identity.model(), scheme, theirs, strict=True)
        except CheckpointError as error:
            mismatch = mismatch or f"{variant} comes nearest, but {error}"
        else:
            if (said := contents.facts.get("variant")) is not None and said.value != variant:
                raise CheckpointError(f"{said.source} says {said.value}, and the entries are those of {variant}")
            return identity
    raise CheckpointError(f"source fits none of {', '.join(COEFFICIENTS)}: {mismatch}")


def _size(coefficients: Coefficients) -> int:
    """Entries of a whole model, but for num_batches_tracked: 5 for a convolution with its BN."""
    excite = 0 if coefficients.lite else 4
    blocks = sum(s.repeats * ((10 if s.expand_ratio == 1 else 15) + excite) for s in plan(coefficients).stages)
    return 5 + blocks + 5 + _CLASSIFIER


def read(source: Source) -> dict[str, Tensor]:
    """A checkpoint's entries, without what they are wrapped in and without prefixes; raises as `load`."""
    return (source if isinstance(source, Contents) else read_contents(source)).entries


def _recognised(
    coefficients: Coefficients, entries: dict[str, Tensor], schemes: Iterable[Scheme]
) -> tuple[Scheme, dict[str, Tensor]]:
    """The library that most names belong to; Hugging Face's base model gets its prefix back."""
    with_prefix = {k if k.startswith("classifier.") else f"efficientnet.{k}": v for k, v in entries.items()}
    keys = _all_keys(coefficients)
    hits, best = 0, None
    for scheme in schemes:
        names = set(translate(keys, scheme))
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
    return {key: _numbers(name, value, ours[key]) for key, (name, value) in zip(ours, entries.items(), strict=True)}


@cache
def _all_keys(coefficients: Coefficients) -> tuple[str, ...]:
    """The keys of this variant with its head and all its stages."""
    with torch.device("meta"):
        return tuple(EfficientNet(coefficients, num_classes=1).state_dict())


def _matched(
    model: EfficientNet, scheme: Scheme, theirs: dict[str, Tensor], strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Our names -> their tensors, and those of their names that the model has no place for."""
    keys = _all_keys(model.coefficients)
    names = dict(zip(keys, translate(keys, scheme), strict=True))
    ours = model.state_dict()
    found: dict[str, Tensor] = {}
    partial = False
    for key, tensor in ours.items():
        name = names[key]
        if name not in theirs:
            if strict and not key.endswith(".num_batches_tracked"):
                raise CheckpointError(f"{key} has no counterpart: the checkpoint ({scheme}) lacks {name}")
        elif theirs[name].shape == tensor.shape:
            found[key] = _numbers(name, theirs[name], tensor)
        elif key.startswith("classifier.") and not strict:
            partial = True
        else:
            raise CheckpointError(_shape_message(key, tensor, name, theirs[name], scheme))
    # A classifier is taken as a whole: the bias of one and the weight of another would be no classifier.
    if partial or 0 < sum(key.startswith("classifier.") for key in found) < _CLASSIFIER:
        found = {k: v for k, v in found.items() if not k.startswith("classifier.")}
    places = set(names.values())
    if strict and (extra := next((name for name in theirs if name not in places), None)):
        raise CheckpointError(f"{extra} in the checkpoint ({scheme}) has no counterpart in the model")
    taken = {names[key] for key in found}
    return found, [name for name in theirs if name not in taken]


def _numbers(name: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """Their tensor, if its values mean what ours do: whole numbers in the place of weights are quantised ones."""
    if theirs.is_meta and not ours.is_meta:
        raise CheckpointError(f"{name} in the checkpoint is on the meta device, and has no values")
    if theirs.is_complex() or (ours.is_floating_point() and not theirs.is_floating_point()):
        raise CheckpointError(f"{name} in the checkpoint is {theirs.dtype}: expected floating-point numbers")
    return theirs


def _shape_message(key: str, ours: Tensor, name: str, theirs: Tensor, scheme: str) -> str:
    message = f"{key} is {list(ours.shape)}, and {name} in the checkpoint ({scheme}) is {list(theirs.shape)}"
    if key.startswith("classifier.") and theirs.ndim == ours.ndim:
        message += (
            f": load into a model with num_classes={theirs.shape[0]} and call reset_classifier({ours.shape[0]}), "
            "or keep the model's own classifier with strict=False"
        )
    elif key == "stem.conv.weight" and theirs.ndim == 4 and ours.shape[0] == theirs.shape[0]:
        message += f": the model was made with in_chans={ours.shape[1]}"
    return message


def numerics(source: Source, coefficients: Coefficients) -> tuple[Fact | None, Fact | None]:
    """The numeric family and the BN eps of a checkpoint of a model with these coefficients; see `told_numerics`.

    Raises:
        CheckpointError: as `load`, for a source that can't be read, or has the names of no known library.
    """
    contents = source if isinstance(source, Contents) else read_contents(source)
    scheme, _ = _recognised(coefficients, contents.entries, SCHEMES)
    return told_numerics(scheme, coefficients, contents.facts)


def own_numerics(scheme: str, coefficients: Coefficients) -> tuple[str, float]:
    """(family, BN eps) of the models of a library that has one family."""
    family = ONE_FAMILY[scheme]
    wide = scheme == "torchvision" and coefficients in (COEFFICIENTS[name] for name in WIDE_EPS)
    return family, 1e-3 if wide else FAMILIES[family].eps


def told_numerics(scheme: str, coefficients: Coefficients, facts: Facts) -> tuple[Fact | None, Fact | None]:
    """The numeric family and the BN eps of weights, None where neither their names nor their source tell them.

    Raises:
        CheckpointError: if the source says one family, and only the other one has such names.
    """
    if scheme in ONE_FAMILY:
        own, own_eps = own_numerics(scheme, coefficients)
        facts.add("family", own, f"a {scheme} checkpoint")
        if facts.get("eps") is None:
            facts.add("eps", own_eps, f"a {scheme} checkpoint")
    elif (named := facts.get("named_family")) is not None:
        facts.add("family", named.value, named.source)
    family, eps = facts.get("family"), facts.get("eps")
    if eps is None and family is not None:
        eps = Fact(FAMILIES[family.value].eps, family.source)
    return family, eps


def _told_of_numerics(model: EfficientNet, scheme: str, facts: Facts) -> list[str]:
    """Warn, and return the sentence, if the outputs will or may differ from those of the weights' own model."""
    family, eps = told_numerics(scheme, model.coefficients, facts)
    if family is not None and eps is not None:
        if (family.value, eps.value) == (model.family, model.eps):
            return []
        told = (
            f"{family.source} says family={family.value!r}, eps={eps.value:g}; this model has family={model.family!r}, "
            f"eps={model.eps:g}, and gives other outputs"
        )
    elif model.family_told:
        return []
    else:
        told = (
            f"family={model.family!r}, eps={model.eps:g} is assumed: nothing says which family these weights are of "
            "(timm's efficientnet_* and tf_efficientnet_* have the same names); make the model with family='tf' or "
            "family='torch' if you know"
        )
    warnings.warn(told, stacklevel=3)
    return [told]


def _told_of_values(found: Mapping[str, Tensor]) -> list[str]:
    name = next((key for key, value in found.items() if value.is_floating_point() and not value.isfinite().all()), None)
    if name is None:
        return []
    told = f"{name} has values that are not finite: a run that diverged, or was stored in too narrow a dtype"
    warnings.warn(told, stacklevel=3)
    return [told]


def _check_facts(model: EfficientNet, facts: Facts, found: Mapping[str, Tensor]) -> None:
    """CheckpointError where the source says something else than the model is, or than its own entries are."""
    variant = next((name for name, of in COEFFICIENTS.items() if of == model.coefficients), None)
    rows = found["classifier.bias"].shape[0] if "classifier.bias" in found else None
    here = {
        "variant": variant,
        "activation": "relu6" if model.coefficients.lite else "silu",
        "num_classes": rows,
    }
    for name, value in here.items():
        said = facts.get(name)
        if said is not None and value is not None and said.value != value:
            raise CheckpointError(
                f"{said.source} says {name.replace('_', ' ')} {said.value}, and the model has {value}"
            )
