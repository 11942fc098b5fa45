"""`meiqa cull`: of near-identical shots, the best is told."""

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
    engine_of,
    report_failures,
)

if TYPE_CHECKING:
    from meiqa.commands.options import Commands


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    command = commands.add_parser("cull", help="group near-identical shots, and mark the best")
    command.add_argument("paths", nargs="+", metavar="PATH", help="a directory, or a photo")
    command.add_argument(
        "--alike",
        type=float,
        metavar="C",
        help="mean likeness of what they show from which on photos belong together (default: 0.55;"
        " up to 1; higher: more and smaller groups)",
    )
    add_format(command, "text", "json", "csv")
    add_html(command)
    add_effort(command)
    add_exclude_above(command)
    add_engine(command)
    add_remote(command)
    command.set_defaults(run=_cull)


def _cull(options: argparse.Namespace) -> int:
    from meiqa.engine.culling import ALIKE, require_cosine
    from meiqa.formats import write_culling
    from meiqa.progress import Progress
    from meiqa.report import open_report
    from meiqa.types import Culling

    alike = ALIKE if options.alike is None else options.alike
    require_cosine(alike)
    photos, failures = photos_of(options.paths)
    photos = list(dict.fromkeys(photos))  # no shot is to be its own rival
    attempted = len(photos) + len(failures)
    culling = Culling((), ())
    with ExitStack() as stack:
        report = stack.enter_context(open_report(options.html)) if options.html else None
        if photos:
            engine = stack.enter_context(engine_of(options))
            with Progress(len(photos), sys.stderr) as progress:
                culling = engine.cull(
                    photos,
                    budget=budget_of(options),
                    k=options.k,
                    alike=alike,
                    on_photo=progress.advance,
                )
        failures += culling.failures
        culling = Culling(culling.groups, tuple(failures))
        write_culling(culling, options.format, sys.stdout)
        if report is not None:
            report.write_culling(culling)
    return report_failures([failure.to_dict() for failure in failures], attempted)
