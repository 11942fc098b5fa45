"""`meiqa bench …`: measurements of parts, beside their rivals."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from meiqa.commands.options import add_format, offline_packages, positive_count

if TYPE_CHECKING:
    from meiqa.commands.options import Commands


def add_commands(commands: Commands) -> None:
    """Add `meiqa bench` with its own commands to the parser."""
    bench = commands.add_parser("bench", help="measure parts beside their rivals")
    subjects = bench.add_subparsers(metavar="SUBJECT", required=True)
    memory = subjects.add_parser("memory", help="searching among many keys")
    memory.add_argument(
        "--sizes",
        type=positive_count,
        nargs="+",
        default=[1_000, 10_000, 100_000],
        metavar="N",
        help="numbers of keys; a million takes most of an hour (default: 1000 10000 100000)",
    )
    memory.add_argument("--queries", type=positive_count, default=1_000, metavar="N")
    add_format(memory, "text", "json")
    memory.set_defaults(run=_memory)


def _memory(options: argparse.Namespace) -> int:
    with offline_packages("bench"):
        from meiqa.benchmarks.memory import bench_memory, table_text
        from meiqa.formats import json_text

        result = bench_memory(options.sizes, queries=options.queries)
    as_json = options.format == "json"
    sys.stdout.write((json_text(result, indent=2) if as_json else table_text(result)) + "\n")
    return 0
