"""The command `fastmbconv`, with one file for each subcommand, which imports late."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastmbconv._version import __version__
from fastmbconv.cli import check, convert, demo, eval, explain, info, predict, scale, train, tune
from fastmbconv.cli.extras import CommandError

COMMANDS = (demo, explain, train, eval, predict, scale, convert, check, tune, info)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar: one subcommand per module in COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="fastmbconv", description="EfficientNet's MBConv block, fused forward and backward in Triton."
    )
    parser.add_argument("--version", action="version", version=f"fastmbconv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 1: it ran and found a fault; 2: it could not run, and stderr says why."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"fastmbconv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastmbconv: interrupted", file=sys.stderr)
        return 130
