"""A trained model back from a file: ours with all that it knows, or another library's with what the user says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastmbconv.checkpoints import CheckpointError, Contents, Identity, identify
from fastmbconv.checkpoints import load as load_into
from fastmbconv.efficientnet import FAMILIES, EfficientNet
from fastmbconv.scaling import COEFFICIENTS
from fastmbconv.training.config import Config, flag, from_dict
from fastmbconv.training.errors import TrainingError
from fastmbconv.training.folders import same_looks
from fastmbconv.training.loader import Look, look
from fastmbconv.training.model import build, coefficients
from fastmbconv.training.weights import load_weights, notes_of, open_weights, settle_look, settle_numerics

IMAGENET = 1000
OPTION = "--checkpoint"


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, on the CPU and not fused, with its classes' names and how it wants its pictures.

    notes: what was chosen or assumed, a sentence each. doubt: makes the model of the other numeric family with the same
    weights, where nothing says which one they are of.
    """

    model: EfficientNet
    classes: tuple[str, ...]
    look: Look
    config: Config
    source: str
    notes: tuple[str, ...] = ()
    doubt: Callable[[], EfficientNet] | None = None


def restore(source: str, given: Mapping[str, Any], part: str | None = None) -> Trained:
    """The best model of a run's folder, a checkpoint of ours, or another library's checkpoint.

    Args:
        given: the options that the user gave, of `Config`'s names; what they don't say is taken from the source.
        part: which of several sets of weights.

    Raises:
        TrainingError: if nothing is there, it can't be read, or an option contradicts what it says.
    """
    contents = open_weights(source, part, OPTION)
    return _ours(source, contents, given) if contents.run is not None else _theirs(source, contents, given)


def _ours(source: str, contents: Contents, given: Mapping[str, Any]) -> Trained:
    run = contents.run
    assert run is not None
    values = from_dict(run["config"], source)
    config = Config(**{**values, "weights": None, "checkpointing": False})
    for name, value in given.items():
        if name in ("model", "family", "eps", "normalize") and value != (stored := _stored(name, config, run)):
            raise TrainingError(f"{flag(name)} is {value}, and the run of {source} has {stored}: leave it out")
    model = build(config, len(run["classes"]))
    try:
        load_into(model, contents)
    except CheckpointError as error:
        raise TrainingError(f"{OPTION} is {source}: {error}") from error
    if set(run["look"]) != set(Look._fields):
        raise TrainingError(f"{OPTION} is {source}: it doesn't say how its pictures looked ({', '.join(Look._fields)})")
    own = Look(**run["look"])
    chosen = own._replace(**{name: value for name, value in given.items() if name in own._fields})
    notes = tuple(notes_of(contents, OPTION))
    return Trained(model.eval(), tuple(run["classes"]), chosen, config, source, notes)


def _stored(name: str, config: Config, run: Mapping[str, Any]) -> Any:
    if name == "normalize":
        return run["look"]["normalize"]
    if name == "eps":
        return config.eps or FAMILIES[_stored("family", config, run)].eps
    if name == "family":
        return config.family or ("tf" if coefficients(config).lite else "torch")
    return getattr(config, name)


def _theirs(source: str, contents: Contents, given: Mapping[str, Any]) -> Trained:
    identity = _identify(source, contents, given.get("model"))
    numeric = {name: given[name] for name in ("family", "eps") if name in given}
    config = Config(model=f"efficientnet_{identity.variant}", amp="none", **numeric)
    config, notes, known = settle_numerics(config, contents, coefficients(config), OPTION)
    classes, told = _class_names(contents, identity.num_classes)
    model = build(config, identity.num_classes)
    odd = [note for note in load_weights(model, contents, source, OPTION, classes) if "the classifier" not in note]
    own = look(config, model.resolution, model.coefficients.lite)
    chosen, assumed = settle_look(own, given, contents, OPTION)
    what = f"{OPTION}: {identity.scheme}'s efficientnet_{identity.variant}, {identity.num_classes} classes"
    every = (what, *notes_of(contents, OPTION), *notes, *told, *assumed, *odd)

    def other_family() -> EfficientNet:
        other = build(replace(config, family=_other(config.family)), identity.num_classes)
        load_weights(other, contents, source, OPTION, classes)
        return other.eval()

    return Trained(model.eval(), classes, chosen, config, source, every, None if known else other_family)


def _other(family: str | None) -> str:
    return "torch" if family == "tf" else "tf"


def _identify(source: str, contents: Contents, model: str | None) -> Identity:
    try:
        identity = identify(contents)
    except CheckpointError as error:
        raise TrainingError(f"{OPTION} is {source}: {error}") from error
    if model is not None and coefficients(Config(model=model)) != COEFFICIENTS[identity.variant]:
        raise TrainingError(f"--model is {model}, and {source} has the entries of efficientnet_{identity.variant}")
    if identity.num_classes == 0:
        raise TrainingError(f"{OPTION} is {source}: it has no classifier, and so no classes to name")
    if identity.in_chans != 3:
        raise TrainingError(f"{OPTION} is {source}: its model sees {identity.in_chans} channels, and pictures have 3")
    return identity


def _class_names(contents: Contents, count: int) -> tuple[tuple[str, ...], list[str]]:
    """The classes' names, and sentences on where they are from.

    Raises:
        TrainingError: if the source names another number of classes than the classifier has.
    """
    said = contents.facts.get("classes")
    if said is not None and len(said.value) != count:
        raise TrainingError(f"{said.source} names {len(said.value)} classes, and the classifier has {count}")
    if said is not None:
        return tuple(said.value), [f"{OPTION}: the classes' names are {said.source}'s"]
    if count == IMAGENET:
        return imagenet_names(), [f"{OPTION}: its 1000 classes are taken to be ImageNet's, in their usual order"]
    return tuple(f"class {index}" for index in range(count)), [f"{OPTION}: nothing names its {count} classes"]


def imagenet_names() -> tuple[str, ...]:
    """ImageNet's 1,000 class names, without their synonyms where they tell the classes apart."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    whole = [info.index_to_description(index) for index in range(IMAGENET)]
    first = [name.split(",")[0] for name in whole]
    names = [long if first.count(short) > 1 else short for short, long in zip(first, whole, strict=True)]
    return tuple(
        f"{name} ({info.index_to_label_name(index)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    )


def _are_imagenet(classes: Sequence[str]) -> bool:
    """Whether folders are called by ImageNet's WordNet ids, whose order is that of its classes."""
    if len(classes) != IMAGENET:
        return False
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return list(classes) == [info.index_to_label_name(index) for index in range(IMAGENET)]


def same_classes(trained: Trained, classes: Sequence[str], data: str) -> None:
    """Whether pictures can be judged by this model.

    Raises:
        TrainingError: if their folders are other classes than the model's.
    """
    if tuple(classes) == trained.classes or (_are_imagenet(classes) and trained.classes == imagenet_names()):
        return
    missing, more = sorted(set(trained.classes) - set(classes)), sorted(set(classes) - set(trained.classes))
    told = [f"it lacks {', '.join(missing[:5])}"] * bool(missing)
    told += [f"the model doesn't know {', '.join(more[:5])}"] * bool(more)
    if not told:
        told = ["the names are the same, in another order: the model's is not that of sorted folders"]
    elif sorted(map(same_looks, classes)) == sorted(map(same_looks, trained.classes)):
        told.append("only case or Unicode's normal form differs, so rename those folders")
    raise TrainingError(
        f"DATA is {data}: its class folders are not the model's {len(trained.classes)} classes ({'; '.join(told)})"
    )
