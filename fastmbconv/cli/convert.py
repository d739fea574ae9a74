"""`fastmbconv convert SRC DST --to LIBRARY`: an EfficientNet's weights under another library's names.

Nothing but names changes. Before DST is written, our model with SRC's weights runs beside the models of both libraries,
where they are installed, on random input in float64, and the largest difference is printed.

The libraries come in two numeric families: torch (timm's efficientnet_*, torchvision) pads symmetrically, tf (timm's
tf_efficientnet_*, lukemelas, transformers) as TensorFlow does, with another BN eps. Weights of one lose accuracy in the
other, so that is refused. The names in timm's and in our files are the same in both families: a file name with tf_,
what lies in or beside the file, or --family says which.
torchvision's b5 to b7 are of family torch with tf's BN eps, 1e-3 (and momentum 0.01): timm's and our models take it as
bn_eps=1e-3 and eps=1e-3, and --eps 1e-3 takes such weights back to torchvision.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmbconv.cli.extras import CommandError, require
from fastmbconv.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from fastmbconv.checkpoints import Contents, Identity
    from fastmbconv.cli.peers import Numerics

LIBRARIES = {
    "fastmbconv": "fastmbconv",
    "timm": "timm",
    "torchvision": "torchvision",
    "lukemelas": "lukemelas",
    "transformers": "huggingface",
}
SUFFIXES = (".pt", ".pth", ".safetensors")


class Plan(NamedTuple):
    """Between which libraries, for which model, with which numerics, and why these."""

    source: str
    target: str
    identity: Identity
    numerics: Numerics
    reason: str


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "convert", help="rename a checkpoint's entries for another library", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", type=Path, help="a checkpoint, or a folder as Hugging Face writes it")
    parser.add_argument("target", metavar="DST", type=Path, help=f"the file to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--from", dest="origin", choices=LIBRARIES, help="whose names SRC has (default: found out)")
    parser.add_argument("--to", choices=LIBRARIES, required=True, help="whose names DST shall have")
    parser.add_argument("--part", help="which of several sets of weights in SRC, by name: state_dict, ...")
    parser.add_argument("--model", help="b0 to b8, l2, lite0 to lite4; tf_... for family tf (default: found out)")
    parser.add_argument("--family", choices=("torch", "tf"), help="numeric family of SRC's weights")
    parser.add_argument(
        "--eps", type=float, help="BN eps of SRC's weights (default: the library's or the family's own)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    _check_paths(options)
    if options.eps is not None and not 0 < options.eps < 1:
        raise CommandError(f"--eps is {options.eps:g}: allowed are 0 < eps < 1")
    from fastmbconv import checkpoints
    from fastmbconv.cli import peers

    contents = _contents(options.source, options.part)
    plan, content = _plan(options, contents), contents.entries
    import torch

    with torch.device("meta"):
        model = plan.identity.model()
    try:
        renamed = checkpoints.convert(model, content, LIBRARIES[plan.target])  # type: ignore[arg-type]
    except ValueError as error:
        raise CommandError(f"SRC is {options.source}: {error}") from error
    print(f"{options.source}: {plan.source}'s efficientnet {plan.identity.variant}, {len(content)} entries")
    for note in contents.notes:
        print(note.replace("part=", "--part "))
    print(f"family {plan.numerics.family}, BN eps {plan.numerics.eps:g}: {plan.reason}")
    if not _agrees(plan, content, renamed):
        print(f"fastmbconv: {options.target} is not written: the outputs differ")
        return 1
    _write(options.target, renamed)
    print(f"{options.target}: {plan.target}'s names, {len(renamed)} entries")
    if (made := peers.recipe(plan.target, plan.identity, plan.numerics)) is not None:
        print(f"a model with the same numerics: {made}")
    return 0


def _check_paths(options: argparse.Namespace) -> None:
    source, target = options.source, options.target
    if not source.exists():
        raise CommandError(f"SRC is {source}: there is no such file")
    if target.suffix not in SUFFIXES:
        raise CommandError(f"DST is {target}: allowed are names that end in {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise CommandError(f"DST is {target}: {target.parent} is not a folder")
    if target.exists() and (target.is_dir() or target.samefile(source)):
        raise CommandError(f"DST is {target}: it is {'a folder' if target.is_dir() else 'SRC itself'}")
    if target.exists() and not options.force:
        raise CommandError(f"DST is {target}: it exists; --force overwrites it")
    if ".safetensors" in (source.suffix, target.suffix):
        require("safetensors", "train")


def _contents(path: Path, part: str | None) -> Contents:
    from fastmbconv.checkpoints import CheckpointError, read_contents

    try:
        return read_contents(path, part)
    except CheckpointError as error:
        raise CommandError(f"SRC is {str(error).replace('name one as part', 'name one with --part')}") from error


def _plan(options: argparse.Namespace, contents: Contents) -> Plan:
    from fastmbconv import checkpoints
    from fastmbconv.cli import peers
    from fastmbconv.scaling import COEFFICIENTS

    wanted, tf = None, None
    if options.model is not None:
        tf = options.model.startswith("tf_")
        wanted = options.model.removeprefix("tf_").removeprefix("efficientnet").lstrip("_-").lower()
        if wanted not in COEFFICIENTS:
            raise CommandError(f"--model is {options.model!r}: allowed are {', '.join(COEFFICIENTS)}, also with tf_")
        if tf and options.family == "torch":
            raise CommandError(f"--model is {options.model!r} and --family torch: tf_ says family tf; give one of them")
    try:
        identity = checkpoints.identify(contents)
        family, _ = checkpoints.numerics(contents, COEFFICIENTS[identity.variant])
    except ValueError as error:
        raise CommandError(f"SRC is {options.source}: {error}") from error
    source = next(name for name, scheme in LIBRARIES.items() if scheme == identity.scheme)
    if options.origin not in (None, source):
        raise CommandError(f"--from is {options.origin}: SRC has the names of {source}")
    if wanted not in (None, identity.variant):
        raise CommandError(f"--model is {options.model}: SRC fits efficientnet {identity.variant}")
    chosen = {"family": options.family or ("tf" if tf else None), "eps": options.eps}
    if source in peers.FREE:  # the others' names say both, and an option that doesn't fit is refused
        for name, fact in (("family", family), ("eps", contents.facts.get("eps"))):
            if fact is not None and chosen[name] not in (None, fact.value):
                raise CommandError(
                    f"--{name} is {chosen[name]}, and {fact.source} says {fact.value}: leave it out, or correct SRC"
                )
            chosen[name] = chosen[name] if fact is None else fact.value
    said = family.source if family is not None and options.family is None and not tf else None
    numerics, reason = peers.numerics(source, options.to, identity, chosen["family"], chosen["eps"], said)
    return Plan(source, options.to, identity, numerics, reason)


def _agrees(plan: Plan, content: dict[str, Tensor], renamed: dict[str, Tensor]) -> bool:
    """Compare our model with both libraries' own, and print the largest differences."""
    from fastmbconv import parity
    from fastmbconv.cli import peers

    x, agrees = peers.images(plan.identity), True
    ours = peers.outputs("fastmbconv", plan.identity, plan.numerics, content, x)
    for file, library, entries in (("SRC", plan.source, content), ("DST", plan.target, renamed)):
        try:
            theirs = peers.outputs(library, plan.identity, plan.numerics, entries, x)
        except CommandError as error:
            print(f"{file} in {library}'s own model: not compared, {error}")
            continue
        largest, within = float((theirs - ours).abs().max()), parity.relative_error(theirs, ours)
        fine = within <= parity.ATOL[x.dtype]
        verdict = "agrees" if fine else f"DIFFERS, allowed is {parity.ATOL[x.dtype]:.0e} of the norm"
        print(f"{file} in {library}'s own model, against ours: largest difference {largest:.1e} in float64, {verdict}")
        agrees &= fine
    return agrees


def _write(path: Path, entries: dict[str, Tensor]) -> None:
    """Put the entries into their file, whole or not at all."""
    import torch

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in entries.items()}
    try:
        with replacing(path) as part:
            if path.suffix == ".safetensors":
                part.write_bytes(require("safetensors.torch", "train").save(tensors, metadata={"format": "pt"}))
            else:
                with part.open("wb") as file:
                    torch.save(tensors, file)
    except OSError as error:
        raise CommandError(f"DST is {path}: it can't be written: {error}") from error
