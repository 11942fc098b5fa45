"""What commands have in common: their options, the engine they open, how they report."""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meiqa.errors import UsageError, one_line
from meiqa.types import Budget

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_FAILURES = 1
"""Some photos could not be assessed, or something essential is missing."""


def open_engine(
    package: str | None,
    memory: str | None,
    *,
    device: str,
    threads: int | None,
    verify: bool,
    learn: bool,
    **policies: Any,
) -> Engine:
    """Open the engine of a command; the one place where the command line meets the engine."""
    with uncollected():
        from meiqa.engine.pipeline import Engine

        return Engine.open(
            package,
            memory,
            device=device,
            threads=threads,
            verify=verify,
            learn=learn,
            **policies,
        )


@contextmanager
def uncollected() -> Iterator[None]:
    """Exempt what is imported and opened here from garbage collection: a command needs it all.

    Looking through it while it is made and when the process ends takes a sixth of a cold score.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collecting:
            gc.enable()


def engine_of(options: argparse.Namespace, *, learn: bool = False) -> Engine:
    optional = ("admission", "exclude_above", "head", "remote", "model", "keep_pictures")
    policies = {name: getattr(options, name, None) for name in optional}
    return open_engine(
        options.package,
        options.memory,
        device=options.device,
        threads=options.threads,
        verify=options.verify,
        learn=learn,
        **{name: value for name, value in policies.items() if value is not None},
    )


def budget_of(options: argparse.Namespace) -> Budget | None:
    return None if options.budget_ms is None else Budget(ms=options.budget_ms)


@contextmanager
def offline_packages(extra: str) -> Iterator[None]:
    """Say how to install what the engine itself does without."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            "this command needs packages that are not installed",
            seen=f"no {error.name}",
            hint=f"pip install 'meiqa[{extra}]'",
        ) from error


def report_failures(failures: Sequence[Mapping[str, Any]], attempted: int) -> int:
    for failure in failures:
        path, error = one_line(failure["path"]), failure["error"]
        say(f"error: {error}" if path in error else f"error: {path}: {error}")
    if failures and attempted > 1:
        say(f"{len(failures)} of {attempted} inputs could not be assessed")
    return EXIT_FAILURES if failures else 0


def say(line: str) -> None:
    sys.stderr.write(f"meiqa: {line}\n")


def add_format(command: argparse.ArgumentParser, *formats: str) -> None:
    command.add_argument("--format", choices=formats, default=formats[0])


def add_html(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--html",
        type=file_to_write,
        metavar="FILE",
        help="write a page with thumbnails, scores and intervals, too",
    )


def add_effort(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget-ms",
        type=milliseconds,
        metavar="N",
        help="time for each photo (default: no limit)",
    )
    command.add_argument("--k", type=count, metavar="N", help="how many neighbours to compare with")


def add_engine(command: argparse.ArgumentParser, *, memory: str = "the user's own") -> None:
    command.add_argument("--package", metavar="DIR", help="engine package (default: the embedded)")
    command.add_argument("--memory", metavar="DIR", help=f"memory (default: {memory})")
    command.add_argument("--device", choices=("cpu", "cuda", "tensorrt"), default="cpu")
    command.add_argument("--threads", type=positive_count, metavar="N")
    add_no_verify(command)


def add_remote(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--remote",
        metavar="URL",
        help="a model behind an OpenAI-compatible server in place of a package; photos are sent"
        " there, and --memory was made with it (docs/remote.md)",
    )
    command.add_argument(
        "--model", metavar="NAME", help="what that server calls the model (default: the memory's)"
    )


def add_exclude_above(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--exclude-above",
        type=float,
        metavar="C",
        help="no neighbours whose layout has a cosine above C with the photo's: near-duplicates"
        " (default: 0.97; 1: only the photo itself)",
    )


def add_head(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--head",
        choices=("text", "levels", "grm"),
        help="what makes the first score: the printed rating with the grade words, the expectation"
        " over these words, or their graded response (default: the package's)",
    )


def add_no_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not check digests on opening"
    )


def milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of milliseconds")
    return value


def count(text: str) -> int:
    return whole_number(text, lowest=0)


def positive_count(text: str) -> int:
    return whole_number(text, lowest=1)


def port_number(text: str) -> int:
    return whole_number(text, lowest=0, highest=65_535)


def whole_number(text: str, *, lowest: int, highest: int | None = None) -> int:
    upwards = "up" if highest is None else f"to {highest}"
    complaint = f"{text!r} is not a whole number from {lowest} {upwards}"
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(complaint) from None
    if value < lowest or (highest is not None and value > highest):
        raise argparse.ArgumentTypeError(complaint)
    return value


def file_to_write(text: str) -> str:
    """Refuse a file that could not be made only after all the work."""
    if not (directory := Path(text).parent).is_dir():
        raise argparse.ArgumentTypeError(f"the directory {directory} does not exist: make it")
    return text
