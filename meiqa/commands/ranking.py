"""`meiqa rank`: a set of photos is put in order."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from meiqa.commands.judging import photos_of
from meiqa.commands.options import (
    add_effort,
    add_engine,
    add_exclude_above,
    add_format,
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
    add_effort(command)
    add_exclude_above(command)
    add_engine(command)
    command.set_defaults(run=_rank)


def _rank(options: argparse.Namespace) -> int:
    from meiqa.formats import write_ranking
    from meiqa.progress import Progress
    from meiqa.types import Ranking

    photos, failures = photos_of(options.paths)
    attempted = len(photos) + len(failures)
    ranking = Ranking((), ())
    if photos:
        with engine_of(options) as engine, Progress(len(photos), sys.stderr) as progress:
            ranking = engine.rank(
                photos,
                budget=budget_of(options),
                k=options.k,
                rivals=options.rivals,
                on_photo=progress.advance,
            )
    failures += ranking.failures
    write_ranking(Ranking(ranking.photos, tuple(failures)), options.format, sys.stdout)
    return report_failures([failure.to_dict() for failure in failures], attempted)
