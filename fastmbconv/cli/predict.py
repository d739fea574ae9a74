"""`fastmbconv predict IMAGE...`: the likeliest classes of pictures, with a model that `fastmbconv train` left.

Prints names and probabilities, and draws the pictures with them. --checkpoint also takes the weights of timm,
torchvision, lukemelas or Hugging Face. What a file or folder says of itself is believed; what is assumed is told.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastmbconv.cli.extras import CommandError, require, require_vision

DRAWN = 24
MODEL_OPTIONS = ("model", "family", "eps", "normalize", "resolution", "crop", "interpolation")


def add_to(commands: Any) -> None:
    parser = commands.add_parser("predict", help="the likeliest classes of pictures, printed and drawn")
    parser.description = __doc__
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="a picture, or a folder of pictures")
    add_model_options(parser)
    parser.add_argument("--top", type=int, default=5, help="classes to name (default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, default=Path("predictions.png"), help="what to draw (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `eval` and `predict` ask of a model."""
    parser.add_argument(
        "--checkpoint", default="runs/train", help="a run's folder, or a checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--part", help="which of several sets of weights in it, by name: state_dict, state_dict_ema, ..."
    )
    parser.add_argument("--model", help="which model's checkpoint it is (default: found out)")
    parser.add_argument("--family", choices=("torch", "tf"), help="padding and BN constants, where nothing says them")
    parser.add_argument("--eps", type=float, help="BatchNorm's, where nothing says it (default: the family's)")
    parser.add_argument("--normalize", choices=("imagenet", "half"), help="of pictures, where nothing says it")
    parser.add_argument("--resolution", type=int, help="side of the pictures (default: the source's, or the variant's)")
    parser.add_argument("--crop", type=float, help="part of the short side that the model sees (default: the source's)")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear", "nearest"), help="of resizing")
    parser.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
    parser.add_argument("--eager", action="store_true", help="never run fused blocks")


def restored(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The trained model with what it knows, the module that runs on the device, and the device."""
    for module in ("rich", "matplotlib", "PIL"):
        require(module, "train")
    require_vision("torchvision", "train")
    require_vision("timm", "train")
    import torch

    import fastmbconv
    from fastmbconv.training.config import Config
    from fastmbconv.training.distributed import device_named
    from fastmbconv.training.names import say
    from fastmbconv.training.restore import restore

    given = {name: value for name in MODEL_OPTIONS if (value := getattr(options, name)) is not None}
    Config(**given)  # names what is out of its range
    device = device_named(options.device)
    trained = restore(options.checkpoint, given, options.part)
    for note in trained.notes:
        say(note, sys.stderr)
    model = trained.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return trained, fastmbconv.unfuse(model) if options.eager else fastmbconv.fuse(model), device


def run(options: argparse.Namespace) -> int:
    if options.top < 1:
        raise CommandError(f"--top is {options.top}: allowed are 1 and more")
    from fastmbconv.training.errors import TrainingError

    try:
        return _predict(options)
    except TrainingError as error:
        raise CommandError(str(error)) from error


def _predict(options: argparse.Namespace) -> int:
    trained, model, device = restored(options)
    from fastmbconv.training.data import pictures_of
    from fastmbconv.training.names import say
    from fastmbconv.training.predict import draw, predict

    notes: list[str] = []
    paths = pictures_of(options.images, notes)
    for note in notes:
        say(note, sys.stderr)
    if not paths:
        raise CommandError(f"IMAGE is {options.images[0]}: it holds no picture")
    guesses, broken = predict(trained, model, paths, options.top, device)
    if trained.doubt is not None and guesses:
        say(_compare_families(trained, guesses[0], device), sys.stderr)
    for path, reason in broken.items():
        say(f"skipped {path}: {reason}", sys.stderr)
    if not guesses:
        raise CommandError(f"none of the {len(paths)} pictures can be read")
    if options.json:
        keys = ("class", "name", "probability")
        rows = [
            {
                "image": str(guess.path),
                "classes": [
                    dict(zip(keys, each, strict=True))
                    for each in zip(guess.classes, guess.names, guess.probabilities, strict=True)
                ],
            }
            for guess in guesses
        ]
        print(json.dumps(rows, indent=1))
    else:
        for guess in guesses:
            named = zip(guess.names, guess.probabilities, strict=True)
            say(f"{guess.path}: {', '.join(f'{name} {share:.1%}' for name, share in named)}")
    for note in draw(options.picture, guesses[:DRAWN]):
        say(note, sys.stderr)
    more = f" (the first {DRAWN} of {len(guesses)})" if len(guesses) > DRAWN else ""
    say(f"picture: {options.picture}{more}", sys.stderr)
    return 1 if broken else 0


def _compare_families(trained: Any, guess: Any, device: Any) -> str:
    """What the same weights say in the other family: who knows the picture knows which family they are of."""
    import torch

    from fastmbconv.training.predict import predict

    other = trained.doubt().to(device).to(memory_format=torch.channels_last)
    ((theirs,), _) = predict(trained, other, [guess.path], 1, device)
    here, there = trained.config.family, other.family
    return (
        f"--checkpoint: {guess.path} in family {here} is {guess.names[0]} ({guess.probabilities[0]:.1%}), in family "
        f"{there} {theirs.names[0]} ({theirs.probabilities[0]:.1%}); nothing was decided by it, --family does"
    )
