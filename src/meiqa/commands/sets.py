"""`meiqa rank` and `meiqa cull`: photos of a set are compared with each other as well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO, TypeAlias, TypeVar

from meiqa.commands.judging import photos_of
from meiqa.commands.options import (
    add_effort,
    add_engine,
    add_exclude_above,
    add_format,
    add_html,
    add_remote,
    budget_of,
    count,
    engine_of,
    report_failures,
)

if TYPE_CHECKING:
    from meiqa.commands.options import Commands
    from meiqa.engine.pipeline import Engine
    from meiqa.formats import Format
    from meiqa.report import Report
    from meiqa.types import Culling, Failure, Ranking

Result = TypeVar("Result", "Culling", "Ranking")
Judge: TypeAlias = "Callable[[Engine, Sequence[str], Callable[[], None]], Result]"


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    rank = commands.add_parser("rank", help="put photos in order, best first")
    rank.add_argument(
        "--rivals",
        type=count,
        default=4,
        metavar="N",
        help="photos of the set that each is compared with, an even number (default: 4)",
    )
    cull = commands.add_parser("cull", help="group near-identical shots, and mark the best")
    cull.add_argument(
        "--alike",
        type=float,
        metavar="C",
        help="mean likeness of what they show from which on photos belong together (default: 0.55;"
        " up to 1; higher: more and smaller groups)",
    )
    for command, run in ((rank, _rank), (cull, _cull)):
        command.add_argument("paths", nargs="+", metavar="PATH", help="a directory, or a photo")
        add_format(command, "text", "json", "csv")
        add_html(command)
        add_effort(command)
        add_exclude_above(command)
        add_engine(command)
        add_remote(command)
        command.set_defaults(run=run)


def _rank(options: argparse.Namespace) -> int:
    from meiqa.formats import write_ranking
    from meiqa.report import Report
    from meiqa.types import Ranking

    def ranked(engine: Engine, photos: Sequence[str], on_photo: Callable[[], None]) -> Ranking:
        return engine.rank(
            photos,
            budget=budget_of(options),
            k=options.k,
            rivals=options.rivals,
            on_photo=on_photo,
        )

    return _run(options, Ranking((), ()), ranked, write_ranking, Report.write_ranking)


def _cull(options: argparse.Namespace) -> int:
    from meiqa.engine.culling import ALIKE, require_cosine
    from meiqa.formats import write_culling
    from meiqa.report import Report
    from meiqa.types import Culling

    alike = ALIKE if options.alike is None else options.alike
    require_cosine(alike)

    def culled(engine: Engine, photos: Sequence[str], on_photo: Callable[[], None]) -> Culling:
        return engine.cull(
            photos, budget=budget_of(options), k=options.k, alike=alike, on_photo=on_photo
        )

    return _run(options, Culling((), ()), culled, write_culling, Report.write_culling)


def _run(
    options: argparse.Namespace,
    nothing: Result,
    judge: Judge[Result],
    write: Callable[[Result, Format, TextIO], None],
    draw: Callable[[Report, Result], None],
) -> int:
    """Judge the photos that were named, each once, and report them."""
    from meiqa.report import open_report

    photos, failures = photos_of(options.paths)
    photos = list(dict.fromkeys(photos))  # no photo is to be its own rival
    with open_report(options.html) if options.html else nullcontext() as report:
        result = _judged(options, photos, failures, nothing, judge)
        write(result, options.format, sys.stdout)
        if report is not None:
            draw(report, result)
    reasons = [failure.to_dict() for failure in result.failures]
    return report_failures(reasons, len(photos) + len(failures))


def _judged(
    options: argparse.Namespace,
    photos: Sequence[str],
    failures: Sequence[Failure],
    nothing: Result,
    judge: Judge[Result],
) -> Result:
    """What the engine makes of a set, with the photos that could not even be found."""
    from meiqa.progress import Progress

    if not photos:
        return replace(nothing, failures=tuple(failures))
    with engine_of(options) as engine, Progress(len(photos), sys.stderr) as progress:
        found: Result = judge(engine, photos, progress.advance)
    return replace(found, failures=(*failures, *found.failures))
