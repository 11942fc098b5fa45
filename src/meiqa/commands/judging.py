"""`meiqa score`, `compare` and `demo`: photos are judged."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from meiqa.commands.folders import add_output, refuse_unusable_output, score_to_file
from meiqa.commands.options import (
    add_effort,
    add_engine,
    add_exclude_above,
    add_format,
    add_head,
    add_remote,
    budget_of,
    engine_of,
    report_failures,
)
from meiqa.commands.references import (
    add_reference,
    refuse_unusable_reference,
    write_distortion_map,
)
from meiqa.errors import DecodeError
from meiqa.types import Assessment, Failure

if TYPE_CHECKING:
    from meiqa.commands.options import Commands
    from meiqa.engine.pipeline import Engine


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    _add_score(commands)
    _add_compare(commands)
    _add_demo(commands)


def _score(options: argparse.Namespace) -> int:
    from meiqa.formats import result_writer

    refuse_unusable_output(options)
    photos, failures = photos_of(options.paths)
    refuse_unusable_reference(options, photos)
    if options.output is not None:
        return score_to_file(options, photos, failures)
    attempted = len(photos) + len(failures)
    with ExitStack() as stack:
        engine = stack.enter_context(engine_of(options, learn=options.learn)) if photos else None
        writer = stack.enter_context(result_writer(options.format, sys.stdout))
        for failure in failures:
            writer.write(failure)
        if engine is not None:
            failures += _score_photos(engine, photos, options, writer.write)
            if options.map is not None and not failures:
                write_distortion_map(engine, photos[0], options)
    return report_failures([failure.to_dict() for failure in failures], attempted)


def _score_photos(
    engine: Engine,
    photos: Sequence[str],
    options: argparse.Namespace,
    write: Callable[[Assessment | Failure], None],
) -> list[Failure]:
    from meiqa.progress import Progress

    failures = []
    results = engine.score_many(
        photos,
        reference=options.reference,
        budget=budget_of(options),
        k=options.k,
        learn=options.learn,
    )
    with Progress(len(photos), sys.stderr) as progress:
        for result in results:
            progress.clear()
            write(result)
            progress.advance()
            if isinstance(result, Failure):
                failures.append(result)
    return failures


def photos_of(paths: Sequence[str]) -> tuple[list[str], list[Failure]]:
    """Replace each directory by the photos in and below it, in order of their paths."""
    photos: list[str] = []
    failures: list[Failure] = []
    for path in paths:
        if not os.path.isdir(path):
            photos.append(path)
            continue
        unreadable: list[Failure] = []
        found = _photos_below(path, unreadable)
        if not found and not unreadable:
            error = DecodeError(f"{path} holds no photos", hint="give a directory with images")
            unreadable.append(Failure(path, error))
        photos += found
        failures += unreadable
    return photos, failures


def _photos_below(directory: str, unreadable: list[Failure]) -> list[str]:
    from meiqa.engine.images import IMAGE_SUFFIXES

    def note(error: OSError) -> None:
        name = str(error.filename)
        unreadable.append(Failure(name, DecodeError(f"{name}: {error.strerror}")))

    return sorted(
        os.path.join(folder, file)
        for folder, _, files in os.walk(directory, onerror=note)
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")
    )


def _compare(options: argparse.Namespace) -> int:
    from meiqa.formats import write_comparison

    with engine_of(options) as engine:
        write_comparison(engine.compare(options.first, options.second), options.format, sys.stdout)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    from meiqa.demo import demo_photos, show

    photos = demo_photos()
    with ExitStack() as stack:
        if options.memory is None:  # the user's own memory is not for demonstrations
            options.memory = stack.enter_context(TemporaryDirectory(prefix="meiqa-demo-"))
        engine = stack.enter_context(engine_of(options, learn=True))
        show(engine, photos, budget_of(options), options.k, sys.stdout)
    return 0


def _add_score(commands: Commands) -> None:
    command = commands.add_parser("score", help="score photos")
    command.add_argument("paths", nargs="+", metavar="PATH", help="a photo, or a directory")
    add_format(command, "text", "json", "jsonl", "csv")
    add_output(command)
    add_effort(command)
    command.add_argument(
        "--no-learn", dest="learn", action="store_false", help="leave the memory as it is"
    )
    command.add_argument(
        "--admission",
        choices=("gated", "all"),
        help="remember photos that were reflected on (gated, the default), or all",
    )
    add_exclude_above(command)
    add_reference(command)
    add_head(command)
    add_engine(command)
    add_remote(command)
    command.add_argument(
        "--keep-pictures",
        action="store_const",
        const=True,
        help="with --remote: learn, for which the pictures of learned photos are kept, scaled down",
    )
    command.set_defaults(run=_score)


def _add_compare(commands: Commands) -> None:
    command = commands.add_parser("compare", help="tell which of two photos looks better")
    command.add_argument("first", metavar="A")
    command.add_argument("second", metavar="B")
    add_format(command, "text", "json", "jsonl", "csv")
    add_engine(command)
    add_remote(command)
    command.set_defaults(run=_compare)


def _add_demo(commands: Commands) -> None:
    command = commands.add_parser(
        "demo",
        help="score scikit-image's photographs, clean and degraded, with a memory of its own",
    )
    add_effort(command)
    add_engine(command, memory="a temporary one")
    command.set_defaults(run=_demo)
