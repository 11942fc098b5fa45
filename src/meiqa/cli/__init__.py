"""The `meiqa` command.

Exit codes: 0 done; 1 some photos could not be assessed, or something essential is missing;
2 wrong usage, or a package, memory, device or output that cannot be used; 70 an unexpected error;
130 interrupted; 141 the reader of the output went away.

A command's module is imported when it is called, so that `meiqa --help` is immediate.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

import click

import meiqa
from meiqa.errors import ImageError, MeiqaError, UsageError, one_line

COMMANDS = {
    "score": ("score", "score photos"),
    "bulk": ("bulk", "score many photos into tables, on all cores or on a cluster"),
    "rank": ("rank", "put photos in order, best first"),
    "cull": ("rank", "group near-identical shots, and mark the best"),
    "compare": ("rank", "tell which of two photos looks better"),
    "ask": ("score", "tell how probable options are as a reply about a photo"),
    "serve": ("serve", "judge photos over HTTP"),
    "api-key": ("serve", "make a key for `meiqa serve --api-key-file`"),
    "camera": ("camera", "judge a camera while it runs, in a terminal"),
    "demo": ("score", "score scikit-image's photographs, clean and degraded"),
    "eval": ("eval", "measure the agreement with human scores"),
    "calibrate": ("eval", "fit the calibration of a model on its anchors"),
    "bench": ("eval", "measure speed on this machine"),
    "export": ("package", "turn a checkpoint into an engine package"),
    "build": ("package", "compile a package's graphs with TensorRT"),
    "inspect": ("package", "print what is inside an engine package"),
    "memory": ("memory", "build and tend a memory"),
    "hub": ("memory", "let memories learn from each other by a PostgreSQL database"),
    "doctor": ("doctor", "say what is installed and what is missing"),
}
"""The module of each command, and the line that lists it."""

_EXIT_PHOTO = 1
_EXIT_UNUSABLE = 2
_EXIT_UNEXPECTED = 70
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141
_NO_ROOM = {errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}


class LazyGroup(click.Group):
    """The commands of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"meiqa.cli.{COMMANDS[cmd_name][0]}")
        found: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; suggest others where there is none of that name."""
        if args[0] not in COMMANDS:
            from difflib import get_close_matches  # which few runs need

            if near := get_close_matches(args[0], COMMANDS, n=1):
                ctx.fail(f"No such command '{args[0]}'. Did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    """Look the version up only now: that takes longer than parsing."""
    if asked:
        click.echo(f"meiqa {meiqa.__version__}")
        ctx.exit()


root = LazyGroup(
    "meiqa",
    help="Score the quality of photographs: 1.00 to 5.00.",
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="print the version",
        )
    ],
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; errors become one line on stderr."""
    _mend_streams()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except click.UsageError as error:
        return _failed(_usage_error(error))
    except MeiqaError as error:
        return _failed(error)
    except BrokenPipeError:
        _drop_output()
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        sys.stderr.write("meiqa: interrupted\n")
        return _EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
            _drop_output()  # every other file's errors name it
            return _failed(UsageError("standard output can't be written", seen=error.strerror))
        if os.environ.get("MEIQA_DEBUG"):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")
        _failed(MeiqaError(f"unexpected {reason}", hint="MEIQA_DEBUG=1 shows where it happened"))
        return _EXIT_UNEXPECTED


def _run(argv: Sequence[str]) -> int:
    with warnings.catch_warnings():
        # Photos with odd metadata are common, and what matters of them becomes an error.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            with root.make_context("meiqa", list(argv)) as context:
                code: int | None = root.invoke(context)
                return code or 0
        except click.exceptions.Exit as done:  # click has printed the help or the version
            return done.exit_code


def _failed(error: MeiqaError) -> int:
    sys.stderr.write(f"meiqa: error: {error}\n")
    return _EXIT_PHOTO if isinstance(error, ImageError) else _EXIT_UNUSABLE


def _usage_error(error: click.UsageError) -> UsageError:
    """Say in one line what click says in several."""
    message, allowed = error.format_message(), None
    if isinstance(error, click.BadParameter) and (param := error.param) is not None:
        name = param.opts[0] if isinstance(param, click.Option) else str(param.metavar)
        missing = isinstance(error, click.MissingParameter)
        message = f"{name} is missing" if missing else f"{name}: {error.message}"
        if isinstance(kind := param.type, click.IntRange):
            most = "up" if kind.max is None else f"to {kind.max}"
            allowed = f"a whole number from {kind.min} {most}"
    path = error.ctx.command_path if error.ctx else "meiqa"
    return UsageError(message.removesuffix("."), allowed=allowed, hint=f"see `{path} --help`")


def _mend_streams() -> None:
    """Take the place of streams that are closed, whose numbers the next files would get.

    What is written to a closed stdout is to fail, what is written to stderr to vanish. Names that
    a terminal's encoding lacks are printed with escapes.
    """
    for name, how in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(os.open(os.devnull, how), mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Point stdout at nothing, or Python would complain about what it holds while it exits."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
