"""`meiqa doctor`: what is installed and what is missing."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from meiqa.commands.options import EXIT_FAILURES, add_engine, add_format, engine_of

if TYPE_CHECKING:
    from meiqa.commands.options import Commands


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    _add_doctor(commands)


def _doctor(options: argparse.Namespace) -> int:
    from meiqa.doctor import examine, report_text
    from meiqa.formats import json_text

    report = examine(lambda: engine_of(options), options.memory, verify=options.verify)
    as_json = options.format == "json"
    sys.stdout.write((json_text(report, indent=2) if as_json else report_text(report)) + "\n")
    return EXIT_FAILURES if report["missing"] else 0


def _add_doctor(commands: Commands) -> None:
    command = commands.add_parser("doctor", help="say what is installed and what is missing")
    add_format(command, "text", "json")
    add_engine(command)
    command.set_defaults(run=_doctor)
