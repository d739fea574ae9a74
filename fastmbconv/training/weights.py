"""Weights that a run starts from or a command is given: what their source says is believed, the rest is told."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastmbconv.checkpoints import CheckpointError, Contents, UnknownNamesError, load, numerics, read_contents
from fastmbconv.efficientnet import FAMILIES, EfficientNet
from fastmbconv.scaling import Coefficients
from fastmbconv.sources.facts import Fact
from fastmbconv.training.config import Config, flag
from fastmbconv.training.errors import TrainingError
from fastmbconv.training.loader import CONSTANTS, Look
from fastmbconv.training.model import coefficients

CLASSIFIERS = ("classifier", "_fc.")  # what their names have, in one library or another


def open_weights(source: str, part: str | None, option: str) -> Contents:
    """The weights of a file or folder.

    Raises:
        TrainingError: naming the option, for whatever `read_contents` refuses.
    """
    try:
        return read_contents(source, part)
    except CheckpointError as error:
        raise TrainingError(f"{option}: {_with_flag(str(error), option)}") from error


def _with_flag(told: str, option: str) -> str:
    """The same sentence with the option instead of Python's argument `part`."""
    flag = "--weights-part" if option == "--weights" else "--part"
    return re.sub(r"\bpart=", f"{flag} ", told.replace("name one as part", f"name one with {flag}"))


def notes_of(contents: Contents, option: str) -> list[str]:
    """What was chosen in the file or folder, for the command line."""
    return [f"{option}: {_with_flag(note, option)}" for note in contents.notes]


def settle_weights(config: Config) -> tuple[Config, Contents, list[str]]:
    """What `--weights` names, the configuration with what it says of family, eps and normalisation, and sentences.

    Raises:
        TrainingError: if it can't be read, or an option says something else than it does.
    """
    assert config.weights is not None
    contents = open_weights(config.weights, config.weights_part, "--weights")
    config, notes, _ = settle_numerics(config, contents, coefficients(config), "--weights")
    said, told = normalisation(contents)
    if said is not None and config.normalize is None:
        config = replace(config, normalize=said)
        notes.append(f"--weights: pictures are normalised as its source says: {said}")
    elif said is not None and config.normalize != said:
        notes.append(f"--weights: --normalize is {config.normalize}, and the source normalised by {said}")
    return config, contents, [*notes_of(contents, "--weights"), *notes, *([f"--weights: {told}"] if told else [])]


def settle_numerics(
    config: Config, contents: Contents, of: Coefficients, option: str
) -> tuple[Config, list[str], bool]:
    """The configuration with the weights' numeric family and BN eps, sentences about them, and whether they are known.

    Raises:
        TrainingError: if an option says something else than the source does, or two sources disagree.
    """
    try:
        family, eps = numerics(contents, of)
    except CheckpointError as error:
        raise TrainingError(f"{option}: {error}; {_advice(error, option)}") from error
    _agree(config, "family", family)
    _agree(config, "eps", contents.facts.get("eps"))
    if family is not None and eps is not None:
        value = config.eps or eps.value
        settled = replace(config, family=family.value, eps=None if FAMILIES[family.value].eps == value else value)
        return settled, [f"{option}: family {family.value}, BN eps {value:g}: {family.source} says so"], True
    if config.family is not None:
        return config, [], True
    assumed = "tf" if of.lite else "torch"
    other = "torch" if of.lite else "tf"
    padding = {"torch": "symmetric padding", "tf": "TensorFlow's padding"}
    told = (
        f"{option}: family {assumed} ({padding[assumed]}, BN eps {config.eps or FAMILIES[assumed].eps:g}) is assumed: "
        f"names and source don't tell it from family {other}; --family {other} if the weights are timm's "
        f"{'efficientnet_lite*' if of.lite else 'tf_*'}, --family {assumed} if you know that they are not"
    )
    return replace(config, family=assumed), [told], False


def _agree(config: Config, name: str, fact: Fact | None) -> None:
    told = getattr(config, name)
    if fact is not None and told is not None and told != fact.value:
        raise TrainingError(
            f"{flag(name)} is {told}, and {fact.source} says {fact.value}: leave the option out, or correct the source"
        )


def load_weights(
    model: EfficientNet, contents: Contents, source: str, option: str, classes: Sequence[str]
) -> list[str]:
    """Load what fits; a classifier for other classes stays out. Returns sentences on what is odd or chosen.

    Raises:
        TrainingError: if they belong to another model.
    """
    before = copy.deepcopy(model.state_dict())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report's notes say the same
            report = load(model, contents, strict=False)
    except CheckpointError as error:
        raise TrainingError(f"{option} is {source}: {error}; {_advice(error, option)}") from error
    missing = [k for k in report.kept if not k.startswith("classifier.") and not k.endswith("num_batches_tracked")]
    aside = set(contents.aside)
    unused = [k for k in report.unused if k not in aside and not any(part in k for part in CLASSIFIERS)]
    if missing or unused:
        model.load_state_dict(before)
        first = f"it lacks {missing[0]}" if missing else f"{unused[0]} has no place"
        count = len(missing) + len(unused)
        raise TrainingError(
            f"{option} is {source}: a checkpoint of another model ({first}, {count} in all); {_advice(None, option)}"
        )
    told = [note for note in report.notes if note not in contents.notes]
    if "classifier.weight" not in report.loaded:
        told.append(f"the classifier is new: the checkpoint has none for {len(classes)} classes")
    elif (names := contents.facts.value("classes")) is None:
        told.append(f"the classifier is kept: its {len(classes)} classes are taken to be these, in this order")
    elif tuple(names) != tuple(classes):
        fresh = {name: value for name, value in before.items() if name.startswith("classifier.")}
        model.load_state_dict(fresh, strict=False)
        told.append("the classifier is new: the checkpoint's has other classes")
    return [f"{option}: {note}" for note in told]


def _advice(error: CheckpointError | None, option: str) -> str:
    if isinstance(error, UnknownNamesError):
        return f"that is checkpoints.load(model, source, scheme=...) in Python; then {option} its state dict"
    return "give the --model (--width, --depth, --phi) that it was trained with"


def _mean_std(contents: Contents) -> Fact | None:
    return contents.facts.get("mean_std") or contents.facts.get("named_mean_std")


def normalisation(contents: Contents) -> tuple[str | None, str | None]:
    """(what the source normalises pictures by, a sentence if that can't be done here)."""
    said = _mean_std(contents)
    if said is None:
        return None, None
    name = next((name for name, constants in CONSTANTS.items() if constants == said.value), None)
    if name is not None:
        return name, None
    return None, f"{said.source} normalises by mean and deviation {said.value}: allowed are {', '.join(CONSTANTS)}"


def settle_look(own: Look, given: Mapping[str, Any], contents: Contents, option: str) -> tuple[Look, list[str]]:
    """How pictures are brought to a model with these weights: by what was given, else by their source, else by `own`.

    Raises:
        TrainingError: if --normalize is not what the source says.
    """
    said, told = normalisation(contents)
    source = _mean_std(contents)
    if said is not None and source is not None and given.get("normalize", said) != said:
        raise TrainingError(
            f"--normalize is {given['normalize']}, and {source.source} says {said}: leave --normalize out, or correct "
            "the source"
        )
    known = {name: contents.facts.value(name) for name in ("resolution", "crop", "interpolation")} | {"normalize": said}
    if known["interpolation"] not in (None, "bicubic", "bilinear", "nearest"):
        known["interpolation"] = None  # timm's "random"
    values, assumed = {}, []
    for name, default in own._asdict().items():
        chosen = given.get(name)
        values[name] = default if (found := known[name] if chosen is None else chosen) is None else found
        if found is None:
            assumed.append(f"{name} {f'{default:.3f}' if isinstance(default, float) else default} ({flag(name)})")
    notes = [f"{option}: {told}"] if told else []
    if assumed:
        notes.append(f"{option}: assumed, as its source doesn't say it: {', '.join(assumed)}")
    return Look(**values), notes
