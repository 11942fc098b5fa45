"""The `meiqa` command.

Exit codes: 0 done; 1 some photos could not be assessed, or something essential is missing;
2 wrong usage, or a package, memory or device that cannot be used; 70 an unexpected error;
130 interrupted; 141 the reader of the output went away.

Nothing heavy is imported before a command needs it, so that `meiqa --help` is immediate.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

import meiqa
from meiqa.commands import (
    camera,
    checking,
    evaluating,
    judging,
    measuring,
    memories,
    packages,
    serving,
    sets,
)
from meiqa.commands.options import EXIT_FAILURES, say
from meiqa.errors import ImageError, MeiqaError, UsageError, one_line

__all__ = ["main"]

_EXIT_UNUSABLE = 2
_EXIT_UNEXPECTED = 70
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; errors become one line on stderr."""
    _accept_any_file_name(sys.stdout, sys.stderr)
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except MeiqaError as error:
        say(f"error: {error}")
        return EXIT_FAILURES if _concerns_the_photo(error) else _EXIT_UNUSABLE
    except BrokenPipeError:
        _drop_output()
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        say("interrupted")
        return _EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("MEIQA_DEBUG"):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")
        say(f"error: unexpected {reason}; MEIQA_DEBUG=1 shows where it happened")
        return _EXIT_UNEXPECTED


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(argv)
    except SystemExit:  # argparse has printed the help or the version
        return 0
    with warnings.catch_warnings():
        # Photos with odd metadata are common, and what matters of them becomes an error.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        code: int = options.run(options)
    return code


def _concerns_the_photo(error: MeiqaError) -> bool:
    return isinstance(error, ImageError)


def _accept_any_file_name(*streams: TextIO) -> None:
    """Let names that the terminal's encoding lacks be printed with escapes."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Point stdout at nothing, or Python would complain about the closed pipe while it exits."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Version(argparse.Action):
    """Prints the version, and looks it up only then: that takes longer than parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"meiqa {meiqa.__version__}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="meiqa", description="Score the quality of photographs: 1.00 to 5.00.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for room in (
        *(judging, sets, serving, camera, evaluating),
        *(packages, memories, measuring, checking),
    ):
        room.add_commands(commands)
    return parser
