"""A trained model back from a file: ours with all that it knows, or another library's with what the user says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastmbconv.checkpoints import CheckpointError
from fastmbconv.checkpoints import load as load_into
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.training import checkpoint
from fastmbconv.training.config import Config, from_dict
from fastmbconv.training.errors import TrainingError
from fastmbconv.training.folders import same_looks
from fastmbconv.training.loader import Look, look
from fastmbconv.training.model import build, load_weights

IMAGENET = 1000


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, on the CPU and not fused, with its classes' names and how it wants its pictures."""

    model: EfficientNet
    classes: tuple[str, ...]
    look: Look
    config: Config
    source: str


def restore(source: str, config: Config, model_given: bool) -> Trained:
    """The best model of a run's folder, a checkpoint of ours, or another library's checkpoint of `config.model`.

    Raises:
        TrainingError: if nothing is there, it can't be read, or it needs to be told its model.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in (checkpoint.BEST, checkpoint.LAST) if (path / name).exists()]
        if not found:
            raise TrainingError(f"--checkpoint is {source}: it has neither {checkpoint.BEST} nor {checkpoint.LAST}")
        path = found[0]
    if not path.exists():
        raise TrainingError(
            f"--checkpoint is {source}: there is no such file; a run's folder or a checkpoint is allowed"
        )
    content = _content(path)
    if content is not None and content.get("format") == checkpoint.FORMAT:
        return _ours(path, content)
    if not model_given:
        raise TrainingError(f"--checkpoint is {source}: no run of `fastmbconv train` wrote it; name its --model")
    return _theirs(path, config)


def _content(path: Path) -> dict[str, Any] | None:
    if path.suffix == ".safetensors":
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises much: UnpicklingError, RuntimeError, EOFError, OSError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"--checkpoint is {path}: it can't be read ({reason})") from error
    return content if isinstance(content, dict) else None


def _ours(path: Path, content: Mapping[str, Any]) -> Trained:
    values = from_dict(content["config"], str(path))
    config = Config(**{**values, "weights": None, "checkpointing": False})
    model = build(config, len(content["classes"]))
    weights = content.get("state_dict") or content["model"]
    try:
        load_into(model, weights)
    except CheckpointError as error:
        raise TrainingError(f"--checkpoint is {path}: {error}") from error
    return Trained(model.eval(), tuple(content["classes"]), Look(**content["look"]), config, str(path))


def _theirs(path: Path, config: Config) -> Trained:
    model = build(config, IMAGENET)
    load_weights(model, str(path), "--checkpoint")
    pictures = look(config, model.resolution, model.coefficients.lite)
    return Trained(model.eval(), imagenet_names(), pictures, replace(config, amp="none"), str(path))


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
