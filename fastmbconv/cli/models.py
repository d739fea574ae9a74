"""Models by the command line's name for them, with random weights; nothing is downloaded.

A name is one of fastmbconv.efficientnet's, or LIBRARY:MODEL; smp:ENCODER is a Unet with that encoder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from fastmbconv.cli.extras import CommandError, require_vision

if TYPE_CHECKING:
    from torch import nn

HELP = "a model of fastmbconv.efficientnet, or LIBRARY:MODEL from timm, torchvision, lukemelas, transformers or smp"


class Model(NamedTuple):
    """A model and the side in pixels of the images that it is meant for."""

    module: nn.Module
    resolution: int


def load(name: str) -> Model:
    """A model by name, on torch's current default device.

    Raises:
        CommandError: for an unknown library or model, and for a library that is not installed.
    """
    library, colon, model = name.partition(":")
    if not colon:
        library, model = "", name
    if library not in LIBRARIES:
        raise CommandError(f"MODEL is {name!r}: {library!r} is no library; allowed are {', '.join(LIBRARIES)[2:]}")
    return LIBRARIES[library](model)


def _ours(name: str) -> Model:
    scaling = importlib.import_module("fastmbconv.scaling")
    efficientnet = importlib.import_module("fastmbconv.efficientnet")
    known = [f"efficientnet_{each}" for each in scaling.COEFFICIENTS]
    if name not in known:
        raise CommandError(f"MODEL is {name!r}: allowed are LIBRARY:MODEL ({_libraries()}) and {', '.join(known)}")
    return Model(getattr(efficientnet, name)(), scaling.COEFFICIENTS[name.removeprefix("efficientnet_")].resolution)


def _timm(name: str) -> Model:
    timm = require_vision("timm", "demo")
    try:
        module = timm.create_model(name)
    except RuntimeError as error:
        if name.partition(".")[0] in timm.list_models():
            raise CommandError(f"MODEL is 'timm:{name}': {error}") from error
        raise _unknown("timm", name, timm.list_models()) from error
    return Model(module, module.pretrained_cfg.get("input_size", (3, 224, 224))[-1])


def _torchvision(name: str) -> Model:
    models = require_vision("torchvision", "train").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    presets = [weights.transforms() for weights in models.get_model_weights(name)]
    sides = [preset.crop_size[-1] for preset in presets if hasattr(preset, "crop_size")]
    return Model(models.get_model(name, weights=None), max(sides, default=224))


def _lukemelas(name: str) -> Model:
    library = require_vision("efficientnet_pytorch", "test")
    known = [each for each in library.VALID_MODELS if each != "efficientnet-l2"]
    if name not in known:
        raise _unknown("lukemelas", name, known)
    return Model(library.EfficientNet.from_name(name), library.EfficientNet.get_image_size(name))


def _transformers(name: str) -> Model:
    scaling = importlib.import_module("fastmbconv.scaling")
    known = [f"efficientnet-b{number}" for number in range(8)]
    library = require_vision("transformers", "test")
    if find_spec("torchvision") is not None:
        require_vision("torchvision", "train")  # transformers imports it late, and tells no reason where that fails
    if name not in known:
        raise _unknown("transformers", name, known)
    of = scaling.COEFFICIENTS[name.removeprefix("efficientnet-")]
    config = library.EfficientNetConfig(
        width_coefficient=of.width,
        depth_coefficient=of.depth,
        image_size=of.resolution,
        hidden_dim=scaling.round_filters(scaling.HEAD_CHANNELS, of.width),
    )
    return Model(library.EfficientNetForImageClassification(config), of.resolution)


def _smp(name: str) -> Model:
    library = require_vision("segmentation_models_pytorch", "test")
    if name not in library.encoders.get_encoder_names() and not name.startswith("tu-"):
        raise _unknown("smp", name, library.encoders.get_encoder_names())
    return Model(library.Unet(name, encoder_weights=None), 224)


LIBRARIES: dict[str, Callable[[str], Model]] = {
    "": _ours,
    "timm": _timm,
    "torchvision": _torchvision,
    "lukemelas": _lukemelas,
    "transformers": _transformers,
    "smp": _smp,
}


def _libraries() -> str:
    return ", ".join(filter(None, LIBRARIES))


def _unknown(library: str, name: str, known: list[str]) -> CommandError:
    near = get_close_matches(name, known, 5, 0.5) or [each for each in known if "efficientnet" in each][:5]
    return CommandError(f"MODEL is '{library}:{name}': {library} has no such model; near it: {', '.join(near)}")
