"""The command `fastmbconv`, with one file for each subcommand, which imports late."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn

from fastmbconv._version import __version__
from fastmbconv.cli.extras import CommandError

COMMANDS = ("demo", "explain", "train", "eval", "predict", "scale", "convert", "check", "tune", "info")
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar: one subcommand per module in COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="fastmbconv", description="EfficientNet's MBConv block, fused forward and backward in Triton."
    )
    parser.add_argument("--version", action="version", version=f"fastmbconv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        import_module(f"fastmbconv.cli.{command}").add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 1: it ran and found a fault; 2: it could not run, and stderr says why.

    130: Ctrl-C.
    """
    try:
        with _interruptible_imports():
            options = build_parser().parse_args(arguments)
            return options.run(options)
    except CommandError as error:
        print(f"fastmbconv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastmbconv: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Ctrl-C ends the process while a library is imported; elsewhere it is the exception that Python makes of it.

    There the exception may be lost (a bare `except`, a callback from C) or come out as another one.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:  # somebody else's, or ignored
        yield
        return
    try:
        signal.signal(signal.SIGINT, _on_interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _on_interrupt:
            signal.signal(signal.SIGINT, usual)


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end() -> NoReturn:
    with suppress(Exception):  # a buffer that is being written to
        sys.stdout.flush()
    with suppress(Exception):
        sys.stderr.write("fastmbconv: interrupted\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED)
