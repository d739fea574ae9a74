"""What a source of weights says of them: which model, numeric family, input. What two places say must agree.

A fact comes from a name (timm's `tf_efficientnet_b0_ap`), from what lies beside the weights in their file (a training
script's options, a run of ours, metadata), or from config.json and preprocessor_config.json beside the file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from fastmbconv.scaling import COEFFICIENTS, Coefficients
from fastmbconv.sources.reading import WHOLE, CheckpointError, Stored, attributes_of

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
RUN_FORMAT = 1  # `fastmbconv train` writes it into its checkpoints
RUN_PARTS = {"config": Mapping, "classes": list, "look": Mapping}
# timm: (tf_)efficientnet_b0(.tag or _tag); a tag that is part of the architecture makes it another network.
_TIMM = re.compile(r"(?:hf[-_]hub:)?(?:timm/)?(tf_)?efficientnet_(b\d|l2|lite\d)(?:[._-](.*))?")
_HYPHENS = re.compile(r"(?:google/)?(adv-)?efficientnet-(b\d|l2|lite\d)(?:[._-](.*))?")  # lukemelas, Hugging Face
_OTHER_NETWORKS = {"gn", "evos", "pruned", "cc", "blur", "g8", "g16"}
_RELEASE = re.compile(r"efficientnet_.*-[0-9a-f]{8}")  # what timm and torchvision publish ends in a hash
_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_NAMES = ("arch", "model_name", "model", "architecture", "backbone", "encoder_name")  # of options that name a model


class Fact(NamedTuple):
    """A value, and where it stands."""

    value: Any
    source: str


class Facts:
    """Facts by name: variant, family, eps, activation, num_classes, classes, mean_std, resolution, crop, interpolation.

    named_family is what a model's name means in timm, where tf_ stands before the names of one family: other libraries
    have such names in the other family. named_mean_std is what a model of that name was published with.

    Those that make another network out of the same weights may be told twice only if both say the same.
    """

    NUMBERS: ClassVar = {"eps": (1e-12, 1.0), "num_classes": (0, 10**9), "resolution": (1, 10**5), "crop": (0.1, 1.0)}
    DECISIVE: ClassVar = ("variant", "family", "named_family", "eps", "activation", "num_classes", "mean_std")

    def __init__(self) -> None:
        self._found: dict[str, Fact] = {}

    def add(self, name: str, value: Any, source: str) -> None:
        """Put a fact down, None for nothing.

        Raises:
            CheckpointError: naming both sources, if another one says something else; for a value that is none.
        """
        if value is None:
            return
        if not self.fits(name, value):
            low, high = self.NUMBERS.get(name, (0, 0))
            expected = f"a number from {low:g} to {high:g}" if name in self.NUMBERS else "a name"
            raise CheckpointError(f"{source} says {name} {value!r}: expected {expected}")
        before = self._found.setdefault(name, Fact(value, source))
        if name in self.DECISIVE and before.value != value:
            raise CheckpointError(
                f"{before.source} says {_told(name, before.value)}, and {source} says {_told(name, value)}: correct "
                "the one that is wrong, or give the weights alone"
            )

    def fits(self, name: str, value: Any) -> bool:
        """Whether this is a value of such a fact."""
        if name in self.NUMBERS:
            low, high = self.NUMBERS[name]
            return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return name in ("classes", "mean_std", "named_mean_std") or isinstance(value, str)

    def get(self, name: str) -> Fact | None:
        return self._found.get(name)

    def value(self, name: str) -> Any:
        """The fact's value, None where there is none."""
        found = self._found.get(name)
        return None if found is None else found.value


def _told(name: str, value: Any) -> str:
    name = name.removeprefix("named_").replace("_", " ")
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def facts_of(stored: Stored, weights: Mapping[str, Any]) -> Facts:
    """Everything that a source says of the weights that were taken from it.

    Raises:
        CheckpointError: if two places disagree.
    """
    facts = Facts()
    for each in getattr(weights, "_metadata", {}).values():
        if isinstance(each, Mapping) and "family" in each:
            facts.add("family", each["family"], "the state dict")
            facts.add("eps", each.get("eps"), "the state dict")
    content = stored.content if isinstance(stored.content, Mapping) else {}
    if is_run(content):
        _add_run(facts, content)
    else:
        _add_options(facts, content, "the checkpoint")
        for name in ("args", "hyper_parameters", "opt", "cfg", "config", "pretrained_cfg"):
            options = _as_mapping(content.get(name))
            _add_pretrained_cfg(facts, options, f"the checkpoint's {name!r}", sure=name == "pretrained_cfg")
    _add_metadata(facts, stored.metadata)
    _add_configs(facts, stored.configs)
    if stored.path is not None:
        # Every hub calls its files alike: there the folder has the model's name.
        named = stored.path.parent if stored.path.name in WHOLE else stored.path
        _add_file_name(facts, named.name)
    return facts


def is_run(content: Any) -> bool:
    """Whether `fastmbconv train` wrote this."""
    return isinstance(content, Mapping) and content.get("format") == RUN_FORMAT and "look" in content


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else attributes_of(value)


def _add_run(facts: Facts, content: Mapping[str, Any]) -> None:
    for name, kind in RUN_PARTS.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(f"a checkpoint of `fastmbconv train` is damaged: it has no {name}")
    config = content["config"]
    short = str(config.get("model", "efficientnet_b0")).removeprefix("efficientnet_")
    family = config.get("family") or ("tf" if short.startswith("lite") else "torch")
    facts.add("family", family, "the run's configuration")
    facts.add("eps", config.get("eps"), "the run's configuration")
    if not any(config.get(name) is not None for name in ("phi", "width", "depth")):
        facts.add("variant", short, "the run's configuration")
    facts.add("classes", tuple(content["classes"]), "the run")


def _add_options(facts: Facts, options: Mapping[str, Any], source: str) -> None:
    """A training script's options: timm's and torchvision's `args`, Lightning's `hyper_parameters`."""
    for name in _NAMES:
        if isinstance(text := options.get(name), str):
            add_name(facts, text, f"{source} ({name} {text!r})")
    if isinstance(eps := options.get("bn_eps"), float):
        facts.add("eps", eps, f"{source} (bn_eps)")
    if (family := options.get("family")) in ("torch", "tf"):
        facts.add("family", family, source)


def _add_metadata(facts: Facts, metadata: Mapping[str, str]) -> None:
    _add_options(facts, metadata, "the file's metadata")
    try:
        eps = float(metadata["eps"]) if "eps" in metadata else None
        cfg = json.loads(metadata.get("pretrained_cfg", "{}"))
    except ValueError as error:
        raise CheckpointError(f"the file's metadata can't be read: {error}") from error
    facts.add("eps", eps, "the file's metadata")
    _add_pretrained_cfg(facts, cfg, "the file's metadata (pretrained_cfg)")


def _add_configs(facts: Facts, configs: Mapping[str, Mapping[str, Any]]) -> None:
    config, images = configs.get("config.json", {}), configs.get("preprocessor_config.json", {})
    if isinstance(text := config.get("architecture"), str):  # timm
        add_name(facts, text, f"config.json (architecture {text!r})")
        facts.add("num_classes", config.get("num_classes"), "config.json")
        names = config.get("label_names")
        facts.add("classes", tuple(map(str, names)) if isinstance(names, list) else None, "config.json")
        _add_pretrained_cfg(facts, config.get("pretrained_cfg", {}), "config.json (pretrained_cfg)")
    elif config.get("model_type") == "efficientnet":  # Hugging Face
        _add_hugging_face(facts, config)
    if images:
        source = "preprocessor_config.json"
        facts.add("mean_std", _mean_std(images.get("image_mean"), images.get("image_std")), source)
        side = images.get("size")
        facts.add("resolution", side.get("height") if isinstance(side, Mapping) else None, source)
        facts.add("interpolation", _INTERPOLATIONS.get(images.get("resample", -1)), source)


def _add_pretrained_cfg(facts: Facts, cfg: Any, source: str, sure: bool = True) -> None:
    """What timm calls a configuration, or the options of a training script, which may mean something else."""
    if not isinstance(cfg, Mapping):
        return
    facts.add("mean_std", _mean_std(cfg.get("mean"), cfg.get("std")), source)
    _add_options(facts, cfg, source)
    size = cfg.get("input_size")
    said = {
        "resolution": size[-1] if isinstance(size, list | tuple) and size else None,
        "crop": cfg.get("crop_pct"),
        "interpolation": cfg.get("interpolation") or None,
    }
    for name, value in said.items():
        if sure or facts.fits(name, value):
            facts.add(name, value, source)


def _add_hugging_face(facts: Facts, config: Mapping[str, Any]) -> None:
    source = "config.json"
    facts.add("family", "tf", f"{source} (model_type 'efficientnet')")
    facts.add("eps", config.get("batch_norm_eps"), source)
    facts.add("resolution", config.get("image_size"), source)
    activation = config.get("hidden_act")
    facts.add("activation", "silu" if activation == "swish" else activation, source)
    scale = config.get("width_coefficient"), config.get("depth_coefficient")
    facts.add("variant", next((name for name, of in COEFFICIENTS.items() if _scaled(of, scale)), None), source)
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or not all(str(key).isdecimal() for key in labels):
        return
    if not any(str(name).startswith("LABEL_") for name in labels.values()):
        facts.add("classes", tuple(str(labels[key]) for key in sorted(labels, key=int)), source)


def _scaled(of: Coefficients, scale: tuple[Any, Any]) -> bool:
    return (of.width, of.depth) == scale and not of.lite


def _mean_std(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if not all(
        isinstance(each, list | tuple) and all(isinstance(v, int | float) for v in each) for each in (mean, std)
    ):
        return None
    return tuple(map(float, mean)), tuple(map(float, std))


def add_name(facts: Facts, text: str, source: str) -> None:
    """What a model's name says: nothing, where it is no EfficientNet of ours."""
    if (match := _TIMM.fullmatch(text)) is not None:
        tf, variant, tag = match.groups()
        tags = set(re.split(r"[._-]", tag or ""))
        if tags & _OTHER_NETWORKS:
            return
        facts.add("named_family", "tf" if tf else "torch", source)
        facts.add("family", "tf" if tf else None, source)
        half = (tf and ("ap" in tags or variant.startswith("lite"))) or "ra4" in tags
    elif (match := _HYPHENS.fullmatch(text)) is not None:
        adversarial, variant, tag = match.groups()
        facts.add("family", "tf", source)
        half = adversarial or variant.startswith("lite")
    else:
        return
    facts.add("variant", variant, source)
    facts.add("named_mean_std", HALF if half else None, source)


def _add_file_name(facts: Facts, name: str) -> None:
    """A name that begins with tf_, or a published file's: anybody calls a file efficientnet_b0.pth."""
    stem = re.sub(r"(\.(pth|pt|bin|ckpt|tar|safetensors))+$", "", name)
    if stem.startswith("tf_") or _RELEASE.fullmatch(stem) or _HYPHENS.fullmatch(stem):
        add_name(facts, stem, f"the file's name, {name},")
        facts.add("family", "tf" if stem.startswith("tf_") else None, f"the file's name, {name},")
