"""`fastmbconv eval [DATA]`: top-1, top-5, loss and confusion matrix of a model that `fastmbconv train` left.

DATA is as in `train`; without it, the run's own held-out pictures. A run's mixed precision is its evaluation's too.
--checkpoint also takes the weights of timm, torchvision, lukemelas or Hugging Face; what is assumed of them is told.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmbconv.cli.extras import CommandError
from fastmbconv.cli.predict import add_model_options, restored


def add_to(commands: Any) -> None:
    from fastmbconv.training.config import Config, flag

    parser = commands.add_parser("eval", help="accuracy, loss and confusion matrix of a trained model")
    parser.description = __doc__
    parser.add_argument("data", metavar="DATA", nargs="?", help="a folder of pictures, mnist5k, or digits")
    add_model_options(parser)
    parser.add_argument(
        "--split",
        choices=("val", "train"),
        default="val",
        help="the pictures held out, or those trained on (default: %(default)s)",
    )
    for name in ("layout", "duplicates"):
        about = Config.__dataclass_fields__[name].metadata
        parser.add_argument(flag(name), choices=about["choices"], help=f"of DATA: {about['help']}")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, default=Path("confusion.png"), help="the confusion matrix (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name, low in (("batch_size", 1), ("workers", 0)):
        if getattr(options, name) < low:
            raise CommandError(f"--{name.replace('_', '-')} is {getattr(options, name)}: allowed are {low} and more")
    from fastmbconv.training.errors import TrainingError

    try:
        return _evaluate(options)
    except TrainingError as error:
        raise CommandError(str(error)) from error


def _evaluate(options: argparse.Namespace) -> int:
    trained, model, device = restored(options)
    import torch

    from fastmbconv.training.data import open_data
    from fastmbconv.training.distributed import World
    from fastmbconv.training.evaluate import evaluate
    from fastmbconv.training.loader import Pictures, eval_transform, loader, shard
    from fastmbconv.training.model import precision
    from fastmbconv.training.names import say
    from fastmbconv.training.report import draw_confusion
    from fastmbconv.training.restore import same_classes

    config = _data_of(options, trained.config)
    train, val = open_data(config)
    samples = train if options.split == "train" else val
    for note in samples.notes:
        say(note, sys.stderr)
    same_classes(trained, samples.classes, config.data)
    batches = loader(
        Pictures(samples, eval_transform(trained.look), replace=False),
        shard(len(samples), options.batch_size, 0, 1),
        options.workers,
        device.type == "cuda",
    )
    amp = precision(config, device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, amp, enabled=amp is not None)

    result = evaluate(model, batches, len(trained.classes), World(device), autocast)
    for name, reason in result.broken.items():
        say(f"skipped {name}: {reason}", sys.stderr)
    for note in draw_confusion(options.picture, result.confusion, trained.classes):
        say(note, sys.stderr)
    computed = str(amp or torch.float32).removeprefix("torch.")
    row = {
        "precision": computed,
        "pictures": result.count,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
    }
    if options.json:
        print(json.dumps({**row, "confusion": result.confusion.tolist(), "skipped": result.broken}))
    else:
        say(
            f"{trained.source}: {result.count} pictures, top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
            f"loss {result.loss:.4f}, in {computed}\npicture: {options.picture}"
        )
    return 0


def _data_of(options: argparse.Namespace, config: Any) -> Any:
    """The run's configuration with DATA; how the run's own data are read, other data don't follow."""
    from fastmbconv.training.config import Config, resumed, to_dict

    given = {name: getattr(options, name) for name in ("layout", "duplicates") if getattr(options, name) is not None}
    own = not options.data or options.data == config.data or Path(options.data).resolve() == Path(config.data).resolve()
    if own:
        resumed(to_dict(config), given)  # refuses what would hold others out
    else:
        given = {"layout": Config.layout, "duplicates": Config.duplicates, **given}
    return replace(config, **{**given, "data": options.data or config.data})
