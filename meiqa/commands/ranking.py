"""`meiqa rank`: a set of photos is put in order."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

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


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    command = commands.add_parser("rank", help="put photos in order, best first")
    command.add_argument("paths", nargs="+", metavar="PATH", help="a directory, or a photo")
    command.add_argument(
        "--rivals",
        type=count,
        default=4,
        metavar="N",
        help="photos of the set that each is compared with, an even number (default: 4)",
    )
    add_format(command, "text", "json", "csv")
    add_html(command)
    add_effort(command)
    add_exclude_above(command)
    add_engine(command)
    add_remote(command)
    command.set_defaults(run=_rank)


def _rank(options: argparse.Namespace) -> int:
    from meiqa.formats import write_ranking
    from meiqa.progress import Progress
    from meiqa.report import open_report
    from meiqa.types import Ranking

    photos, failures = photos_of(options.paths)
    attempted = len(photos) + len(failures)
    ranking = Ranking((), ())
    with ExitStack() as stack:
        report = stack.enter_context(open_report(options.html)) if options.html else None
        if photos:
            engine = stack.enter_context(engine_of(options))
            with Progress(len(photos), sys.stderr) as progress:
                ranking = engine.rank(
                    photos,
                    budget=budget_of(options),
                    k=options.k,
                    rivals=options.rivals,
                    on_photo=progress.advance,
                )
        failures += ranking.failures
        ranking = Ranking(ranking.photos, tuple(failures))
        write_ranking(ranking, options.format, sys.stdout)
        if report is not None:
            report.write_ranking(ranking)
    return report_failures([failure.to_dict() for failure in failures], attempted)
