"""Which of the things in a checkpoint are the weights, and what they are called without what wraps them.

timm, torchvision's references, Lightning, Hugging Face's Trainer, DDP, FSDP, torch.compile and AveragedModel put
weights below other names, and a moving average (EMA) beside the raw ones. Where there are several, one is taken only
if the library that wrote them takes that one too; else the error lists what was found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmbconv.sources.facts import Facts, facts_of, is_run
from fastmbconv.sources.reading import CheckpointError, Standin, Stored, attributes_of, name_of, read_stored

# The stem's convolution, as each library calls it: what comes before is a prefix.
STEMS = (
    "stem.conv.weight",
    "conv_stem.weight",
    "features.0.0.weight",
    "_conv_stem.weight",
    "efficientnet.embeddings.convolution.weight",
    "embeddings.convolution.weight",
)
RAW = ("state_dict", "model_state_dict", "model")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "average")  # timm takes the first two first
DEPTH = 3  # of mappings in mappings
PREFIXES = ("module.", "model.")
_AVERAGE = re.compile(r"(^|_)(ema|average|averaged|swa)(_|$)")
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop")
_WRAPPER = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


class NoWeightsError(CheckpointError, TypeError):
    """A source holds no state dict, or several that nothing chooses from; the message lists what there is."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint's weights, and what its source says of them.

    Args:
        entries: tensors by their library's names, without prefixes.
        part: where in the source they lay: "" at its top, "state_dict_ema", or a prefix of names that ends in a dot.
        aside: names of what lay beside the weights, under other prefixes or no tensors.
        facts: what the source says.
        notes: what was chosen, a sentence each.
        run: all that a checkpoint of `fastmbconv train` holds, else None.
    """

    entries: dict[str, Tensor]
    part: str
    aside: tuple[str, ...]
    facts: Facts
    notes: tuple[str, ...]
    run: Mapping[str, Any] | None = None


def read_contents(source: Mapping[str, Any] | str | os.PathLike[str], part: str | None = None) -> Contents:
    """The weights in a state dict, a checkpoint that holds one, a file, or a folder.

    Args:
        part: which ones, where there are several: the name of what holds them, or the prefix of their names.

    Raises:
        CheckpointError: for a file that can't be read, or sources that disagree; `NoWeightsError` (a TypeError too) if
            there are no weights, or several that nothing chooses from.
    """
    stored = Stored(source) if not isinstance(source, str | os.PathLike) else read_stored(source)
    what = "source" if stored.path is None else str(stored.path)
    parts = dict(_parts(stored.content, "", DEPTH))
    if not parts:
        raise NoWeightsError(f"{what} holds {_listed(stored.content)}: expected a state dict that is not empty")
    choice = _choose(parts, part, what)
    weights = parts[choice.name]
    entries, lead, aside = _unwrap(weights, choice.prefix, what)
    notes = [*stored.notes, *filter(None, [choice.note])]
    if lead not in ("", *PREFIXES, "module.model.", "model.module."):
        notes.append(f"entries below {lead!r} are taken")
    if aside:
        more = f" and {len(aside) - 3} more" if len(aside) > 3 else ""
        notes.append(f"left aside: {', '.join(aside[:3])}{more}")
    run = stored.content if is_run(stored.content) else None
    return Contents(entries, choice.name or lead, tuple(aside), facts_of(stored, weights), tuple(notes), run)


class _Choice(NamedTuple):
    """Where the weights are, the prefix of their names if one was asked for, and a sentence if there was a choice."""

    name: str
    prefix: str | None = None
    note: str | None = None


def _parts(value: Any, path: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with tensors, by its place; optimizers and the like are left out."""
    if not isinstance(value, Mapping):
        return
    if any(isinstance(each, Tensor) and isinstance(name, str) for name, each in value.items()):
        yield path, value
    for name, each in value.items():
        if depth and isinstance(name, str) and isinstance(each, Mapping) and not _NO_WEIGHTS.search(name.lower()):
            yield from _parts(each, f"{path}/{name}" if path else name, depth - 1)


def _choose(parts: Mapping[str, Mapping[str, Any]], part: str | None, what: str) -> _Choice:
    if part is not None:
        return _named(parts, part, what)
    most = max(map(len, parts.values()))
    # An average that lost its stem is a damaged one, and no reason to take the raw weights instead.
    known = [name for name, each in parts.items() if _prefixes(each) or (_is_average(name) and 2 * len(each) > most)]
    known = known or _usual(parts)
    if len(known) == 1:
        return _Choice(known[0])
    averages = [name for name in known if _is_average(name)]
    raw = [name for name in known if not _is_average(name)]
    first = next((name for name in AVERAGES if name in averages), averages[0] if len(averages) == 1 else None)
    if first is not None and len(raw) <= 1:
        others = [name for name in known if name != first]
        told = f"{first!r} is taken, the moving average; part={others[0]!r} takes the other weights"
        return _Choice(first, note=told)
    if not averages and sorted(known) == ["current_model_state", "state_dict"]:  # Lightning's WeightAveraging
        told = "'state_dict' is taken, the average; part='current_model_state' takes the raw weights"
        return _Choice("state_dict", note=told)
    raise NoWeightsError(f"{what} holds several sets of weights, {', '.join(map(repr, known))}: name one as part")


def _is_average(name: str) -> bool:
    return any(_AVERAGE.search(part.lower()) for part in name.split("/"))


def _usual(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where weights usually are, if no name in them is known."""
    usual = [name for name in (*RAW, "") if name in parts]
    return usual[:1] or list(parts)


def _named(parts: Mapping[str, Mapping[str, Any]], part: str, what: str) -> _Choice:
    if part in parts:
        return _Choice(part)
    prefix = part if part.endswith(".") else f"{part}."
    found = [name for name, each in parts.items() if prefix in _prefixes(each)]
    if len(found) != 1:
        leads = sorted({lead for each in parts.values() for lead in _prefixes(each) if lead})
        there = [*filter(None, parts), *leads]
        raise NoWeightsError(f"part is {part!r}: {what} has {', '.join(map(repr, there)) or 'one set of weights only'}")
    return _Choice(found[0], prefix)


def _prefixes(weights: Mapping[str, Any]) -> set[str]:
    """What stands before the names of a known library, once for each network."""
    found = set()
    for name in weights:
        if isinstance(name, str):
            plain = _WRAPPER.sub("", name)
            stem = next((stem for stem in STEMS if plain == stem or plain.endswith(f".{stem}")), None)
            if stem is not None:
                found.add(plain.removesuffix(stem))
    return found


def _unwrap(weights: Mapping[str, Any], prefix: str | None, what: str) -> tuple[dict[str, Tensor], str, list[str]]:
    """Entries without wrappers and prefix, the prefix, and the names of what isn't among them."""
    prefixes = _prefixes(weights)
    if prefix is None and len(prefixes) > 1:
        raise NoWeightsError(
            f"{what} holds several networks, below {', '.join(map(repr, sorted(prefixes)))}: name one as part"
        )
    named: dict[str, Any] = {}
    aside = []
    for name, value in weights.items():
        plain = _WRAPPER.sub("", name) if isinstance(name, str) else name
        if not isinstance(value, Tensor) or not isinstance(name, str):
            aside.append(f"{name} ({name_of(value)})")
        elif plain in named:
            raise CheckpointError(f"{what} has {plain} twice, the second time as {name}")
        else:
            named[plain] = value
    named.pop("n_averaged", None)  # AveragedModel's
    if aside and not prefixes:
        raise NoWeightsError(f"{what} holds {_listed(weights)}: expected tensors")
    lead = prefix if prefix is not None else next(iter(prefixes), _common_prefix(named))
    entries = {name.removeprefix(lead): value for name, value in named.items() if name.startswith(lead)}
    _check_tensors(entries, what)
    return entries, lead, [*(name for name in named if not name.startswith(lead)), *aside]


def _common_prefix(named: Mapping[str, Any]) -> str:
    """What wrappers put before names that are of no known library."""
    lead = ""
    while each := next((p for p in PREFIXES if named and all(k.startswith(lead + p) for k in named)), None):
        lead += each
    return lead


def _check_tensors(entries: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in entries.items():
        if is_traceable_wrapper_subclass(tensor):
            raise CheckpointError(f"{what}: {name} is a {type(tensor).__name__}: store the full state dict")
        if tensor.is_quantized or tensor.layout != torch.strided:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise CheckpointError(f"{what}: {name} is {kind}: expected plain values")


def _listed(value: Any) -> str:
    """What there is instead of weights, in words."""
    if isinstance(value, Standin):
        advice = "; store model.state_dict()" if "_modules" in attributes_of(value) else ""
        return f"a {name_of(value)}, more than tensors{advice}"
    if not isinstance(value, Mapping):
        return f"a {name_of(value)}"
    if not value:
        return "an empty dict"
    shown: Sequence[str] = [f"{name} ({name_of(each)})" for name, each in list(value.items())[:6]]
    whole = any("_modules" in attributes_of(each) for each in value.values())
    return f"{', '.join(shown)}{', ...' if len(value) > 6 else ''}{'; store model.state_dict()' if whole else ''}"
