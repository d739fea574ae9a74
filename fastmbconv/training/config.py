"""The configuration of a run: one flat table, which the command line, config.toml and checkpoints share."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fastmbconv.training.errors import TrainingError


def option(default: Any, group: str, text: str, **more: Any) -> Any:
    """A field with what the command line says about it.

    more: `choices`; `low` and `high`, the ends of what is allowed; `below`, an end that is not; `fixed`, for what a
    resumed run can't change, or a value that it can't change to or from.
    """
    return field(default=default, metadata={"group": group, "help": text, **more})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The defaults are the paper's recipe; None means: follows from the others.

    Raises:
        TrainingError: for a value out of its range, naming the option and what is allowed.
    """

    data: str = option("", "data", "a folder of pictures, or a named set", fixed=True)
    output: str = option("runs/train", "run", "folder for checkpoints, curves and the configuration")

    model: str = option("efficientnet_b0", "model", "a variant of fastmbconv.efficientnet", fixed=True)
    phi: float | None = option(
        None, "model", "compound scaling of B0 by any real number, instead of a variant", fixed=True
    )
    width: float | None = option(None, "model", "factor on B0's channels (default: the variant's)", fixed=True)
    depth: float | None = option(None, "model", "factor on B0's repeats (default: the variant's)", fixed=True)
    family: str | None = option(None, "model", "padding and BN constants", choices=("torch", "tf"), fixed=True)
    eps: float | None = option(None, "model", "BatchNorm's (default: the family's)", low=1e-12, below=1.0, fixed=True)
    dropout: float | None = option(None, "model", "before the classifier (default: the variant's)", low=0.0, below=1.0)
    drop_path: float = option(0.2, "model", "stochastic depth of the last block", low=0.0, below=1.0)
    weights: str | None = option(
        None,
        "model",
        "start from this checkpoint: ours, timm's, torchvision's, lukemelas' or Hugging Face's",
        fixed=True,
    )
    weights_part: str | None = option(
        None, "model", "which of several sets of weights in it, by name: state_dict, state_dict_ema, ...", fixed=True
    )
    freeze: int = option(
        0, "model", "freeze stem and the first N of 7 stages; 8: all but the classifier", low=0, high=8
    )
    freeze_bn: bool = option(False, "model", "freeze every BatchNorm: statistics, weights and biases")

    resolution: int | None = option(None, "data", "side of the pictures (default: the variant's)", low=32, fixed=True)
    val_fraction: float = option(
        0.2, "data", "part held out where there is no val folder", low=0.0, below=1.0, fixed=True
    )
    layout: str | None = option(
        None,
        "data",
        "whether folders called train and val are a split or classes (default: by what is in them)",
        choices=("split", "classes"),
        fixed=True,
    )
    duplicates: str = option(
        "error",
        "data",
        "a file with two classes, or trained on and held out; ignore: contents aren't compared",
        choices=("error", "warn", "ignore"),
        fixed="ignore",  # it splits copies
    )
    workers: int = option(2, "data", "processes that read pictures; 0: none", low=0)
    interpolation: str = option("bicubic", "data", "of resizing", choices=("bicubic", "bilinear", "nearest"))
    crop: float | None = option(
        None, "data", "part of a picture's short side that evaluation sees (default: the variant's)", low=0.1, high=1.0
    )
    normalize: str | None = option(
        None, "data", "imagenet: its mean and deviation; half: to [-1, 1], Lite's", choices=("imagenet", "half")
    )
    augment: str = option("autoaugment", "data", "policy", choices=("autoaugment", "randaugment", "none"))
    min_scale: float = option(0.08, "data", "smallest part of a picture that a random crop takes", low=0.01, high=1.0)
    flip: float = option(0.5, "data", "probability of a horizontal flip", low=0.0, high=1.0)
    erase: float = option(0.0, "data", "probability of random erasing", low=0.0, high=1.0)
    mixup: float = option(0.0, "data", "MixUp's alpha; 0: off", low=0.0)
    cutmix: float = option(0.0, "data", "CutMix's alpha; 0: off", low=0.0)

    epochs: int = option(350, "recipe", "passes over the data", low=1)
    batch_size: int | None = option(
        None,
        "recipe",
        "pictures per optimizer step, over all processes (default: 64, or all there are)",
        low=1,
        fixed=True,
    )
    accumulate: int = option(1, "recipe", "forward passes that a step is cut into, to save memory", low=1)
    optimizer: str = option(
        "rmsprop", "recipe", "rmsprop is TensorFlow's", choices=("rmsprop", "adamw", "sgd"), fixed=True
    )
    lr: float | None = option(
        None, "recipe", "peak rate (default per 256 pictures: rmsprop 0.016, adamw 0.001, sgd 0.125)", low=0.0
    )
    schedule: str | None = option(
        None, "recipe", "default: step for rmsprop, cosine for the others", choices=("step", "cosine")
    )
    decay_rate: float = option(0.97, "recipe", "step: factor on the rate", low=0.0, high=1.0)
    decay_epochs: float = option(2.4, "recipe", "step: epochs from one factor to the next", low=0.01)
    warmup_epochs: float = option(5.0, "recipe", "the rate grows linearly from 0", low=0.0)
    momentum: float = option(0.9, "recipe", "of rmsprop and sgd", low=0.0, below=1.0)
    weight_decay: float = option(1e-5, "recipe", "not on BatchNorms and biases", low=0.0)
    label_smoothing: float = option(0.1, "recipe", "part of the target given to all classes", low=0.0, below=1.0)
    clip_grad: float | None = option(None, "recipe", "largest norm of the gradients", low=0.0)
    ema: float = option(
        0.9999,
        "recipe",
        "decay of the weights' moving average, which is evaluated; 0: off",
        low=0.0,
        below=1.0,
        fixed=True,
    )

    seed: int = option(0, "run", "of weights, split, order and augmentation", low=0, fixed=True)
    device: str | None = option(None, "run", "cuda, cpu, ... (default: a GPU if there is one)")
    amp: str | None = option(
        None, "run", "mixed precision (default: bf16 on a GPU that has it)", choices=("none", "bf16", "fp16")
    )
    channels_last: bool = option(True, "run", "memory format; faster on CPUs too")
    fused: bool = option(True, "run", "run the blocks fused where kernels run; --eager: never")
    memory: str = option("fast", "run", "plan of the fused blocks", choices=("fast", "lean"))
    checkpointing: bool = option(False, "run", "keep only each block's input, and run it again in the backward")
    graph: bool = option(False, "run", "replay forward and backward as CUDA graphs: fewer launches in small batches")
    sync_bn: bool = option(False, "run", "BatchNorm over the pictures of all processes")
    save_minutes: float = option(10.0, "run", "write a checkpoint this often inside an epoch", low=0.0)
    tensorboard: bool = option(True, "run", "write scalars for TensorBoard")

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each, getattr(self, each.name))
        if self.phi is not None and self.model != "efficientnet_b0":
            raise TrainingError(f"--phi is {self.phi} and --model is {self.model}: phi scales B0; give one of the two")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise TrainingError(
                f"--warmup-epochs is {self.warmup_epochs:g} and --epochs is {self.epochs}: the warm-up must be shorter"
            )
        if self.graph and self.checkpointing:
            raise TrainingError(
                "--graph and --checkpointing are both set: a block that runs again asks for the random state, which a "
                "captured step can't; --memory lean saves memory with --graph"
            )


def kind(name: str) -> type:
    """The type of an option's value, None aside."""
    hint = get_type_hints(Config)[name]
    if get_origin(hint) is UnionType:
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    return hint


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def to_dict(config: Config) -> dict[str, Any]:
    """All options but those that are None."""
    return {name: value for name, value in asdict(config).items() if value is not None}


def from_dict(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check names and types of options that came from a file.

    Raises:
        TrainingError: for an unknown name or a value of another type.
    """
    known = {each.name for each in fields(Config)}
    out = {}
    for name, value in values.items():
        if name not in known:
            raise TrainingError(f"{source} has {name!r}: that is no option; `fastmbconv train --help` lists them")
        wanted = kind(name)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise TrainingError(f"{source} has {name} = {value!r}: allowed is a {wanted.__name__}")
        out[name] = value
    return out


def read_toml(path: str | Path) -> dict[str, Any]:
    """Options from a file that `write_toml` or a user wrote.

    Raises:
        TrainingError: if it can't be read, or holds something else than options.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"--config is {path}: it can't be read ({error})") from error
    return from_dict(values, str(path))


def toml(config: Config) -> str:
    """A configuration as TOML. Write it with errors="surrogateescape": a path need not be UTF-8."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in to_dict(config).items())


def _toml_value(value: Any) -> str:
    """JSON's strings and booleans are TOML's, but for DEL and for characters that JSON writes as two."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def resumed(stored: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A resumed run's options, and a note for each one that differs from the stored run's.

    Raises:
        TrainingError: for a changed option that the stored weights, split or order depend on.
    """
    notes = []
    defaults = {each.name: each.default for each in fields(Config) if each.default is not MISSING}
    for each in fields(Config):
        if each.name not in given or each.name in ("output", "data"):
            continue
        before, now = stored.get(each.name, defaults[each.name]), given[each.name]
        if before != now and each.metadata.get("fixed") in (True, before, now):
            raise TrainingError(
                f"{flag(each.name)} is {now} and the run to resume has {before}: leave it out, or choose another "
                "--output"
            )
        if before != now and each.name not in ("workers", "save_minutes", "tensorboard"):
            notes.append(f"{flag(each.name)} {before} -> {now}")
    return {**stored, **given}, notes


def _check(each: Field[Any], value: Any) -> None:
    if value is None:
        return
    about = each.metadata
    name = flag(each.name)
    if "choices" in about and value not in about["choices"]:
        raise TrainingError(f"{name} is {value!r}: allowed are {', '.join(about['choices'])}")
    low, high, below = about.get("low"), about.get("high"), about.get("below")
    if low is not None and not value >= low:
        raise TrainingError(f"{name} is {value}: allowed are {low:g} and more")
    if high is not None and not value <= high:
        raise TrainingError(f"{name} is {value}: allowed are {low:g} to {high:g}")
    if below is not None and not value < below:
        raise TrainingError(f"{name} is {value}: allowed are {low:g} and more, below {below:g}")
