"""`meiqa bench …`: measurements of parts, beside their rivals."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from meiqa.commands import timing
from meiqa.commands.options import (
    add_engine,
    add_format,
    count,
    engine_of,
    offline_packages,
    positive_count,
)

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
    memory.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="keeps indexes and memories, and goes on with those it has",
    )
    add_format(memory, "text", "json")
    memory.set_defaults(run=_memory)
    drafting = subjects.add_parser("drafting", help="writing with drafts from the memory")
    drafting.add_argument(
        "--images", type=Path, metavar="DIR", help="photographs (default: those of `meiqa demo`)"
    )
    drafting.add_argument("--rounds", type=positive_count, default=5, metavar="N")
    drafting.add_argument("--threads", type=positive_count, metavar="N")
    add_format(drafting, "text", "json")
    drafting.set_defaults(run=_drafting)
    compare = subjects.add_parser("compare", help="the comparisons of one photo")
    compare.add_argument(
        "--checkpoint",
        metavar="CKPT",
        help="folder with a decoder of Qwen2.5-VL's architecture; by default a random one",
    )
    compare.add_argument("--rounds", type=positive_count, default=20, metavar="N")
    compare.add_argument("--threads", type=positive_count, metavar="N")
    add_format(compare, "text", "json")
    compare.set_defaults(run=_compare)
    ladder = subjects.add_parser("ladder", help="does the score fall under more distortion")
    ladder.add_argument("--images", required=True, metavar="DIR", help="pristine photographs")
    ladder.add_argument(
        "--index",
        metavar="CSV",
        help="with file, width and height: only those that training keeps unseen",
    )
    ladder.add_argument("--limit", type=positive_count, metavar="N", help="the first N photographs")
    ladder.add_argument("--k", type=count, metavar="N", help="how many neighbours to compare with")
    add_format(ladder, "text", "json")
    add_engine(ladder, memory="the embedded anchors alone")
    ladder.set_defaults(run=_ladder)
    timing.add_subjects(subjects)


def _memory(options: argparse.Namespace) -> int:
    with offline_packages("bench"):
        from meiqa.benchmarks.memory import bench_memory, table_text
        from meiqa.formats import json_text

        result = bench_memory(options.sizes, queries=options.queries, directory=options.directory)
    as_json = options.format == "json"
    sys.stdout.write((json_text(result, indent=2) if as_json else table_text(result)) + "\n")
    return 0


def _drafting(options: argparse.Namespace) -> int:
    from meiqa.benchmarks.drafting import bench_drafting, table_text
    from meiqa.formats import json_text

    result = bench_drafting(options.images, rounds=options.rounds, threads=options.threads)
    as_json = options.format == "json"
    sys.stdout.write((json_text(result, indent=2) if as_json else table_text(result)) + "\n")
    return 0


def _compare(options: argparse.Namespace) -> int:
    with offline_packages("export"):
        from meiqa.benchmarks.compare import bench_compare, table_text
        from meiqa.formats import json_text

        given = None if options.checkpoint is None else Path(options.checkpoint)
        result = bench_compare(given, rounds=options.rounds, threads=options.threads)
    as_json = options.format == "json"
    sys.stdout.write((json_text(result, indent=2) if as_json else table_text(result)) + "\n")
    return 0


def _ladder(options: argparse.Namespace) -> int:
    from meiqa.benchmarks.ladder import (
        IMAGES_A_PHOTOGRAPH,
        bench_ladder,
        ladder_text,
        photographs_of,
    )
    from meiqa.formats import json_text
    from meiqa.locations import embedded_assets
    from meiqa.progress import Progress

    if options.memory is None:
        options.memory = str(embedded_assets() / "memory")
    photographs = photographs_of(options.images, options.index)[: options.limit]
    images = IMAGES_A_PHOTOGRAPH * len(photographs)
    with engine_of(options) as engine, Progress(images, sys.stderr) as progress:
        report = bench_ladder(engine, photographs, k=options.k, on_image=progress.advance)
    as_json = options.format == "json"
    sys.stdout.write((json_text(report, indent=2) if as_json else ladder_text(report)) + "\n")
    return 0
