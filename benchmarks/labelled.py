"""What benchmarks on photographs with human scores share: options, table, engine, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from meiqa.engine.engine import Engine
from meiqa.errors import UsageError
from meiqa.labels import LabelTable
from meiqa.locations import embedded_assets

__all__ = ["engine_of", "labelled_parser", "labels_of", "other_table", "print_report"]


def labelled_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that judges the photographs of a label table."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("labels", help="a label table")
    parser.add_argument("--images", required=True, help="where its images are")
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int, help="photos, spread over the table")
    parser.add_argument("--package", default=str(embedded_assets() / "package"))
    parser.add_argument("--memory", default=str(embedded_assets() / "memory"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--k", type=int, help="neighbours to compare with, if not the package's")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser


def labels_of(given: argparse.Namespace) -> LabelTable:
    """Read the photographs that are judged."""
    return LabelTable.read(given.labels, split=given.split).spread(given.limit)


def other_table(path: str | None, split: str | None, labels: LabelTable) -> LabelTable | None:
    """Read photographs to learn from.

    Raises:
        UsageError: one of them is to be judged.
    """
    if path is None:
        return None
    table = LabelTable.read(path, split=split)
    shared = set(table.files) & set(labels.files)
    if shared:
        raise UsageError(
            f"{path} holds photos that are to be judged",
            seen=f"{len(shared)}, {min(shared)} among them",
            hint="choose other rows with --split and --train-split",
        )
    return table


def engine_of(given: argparse.Namespace) -> Engine:
    """Open the engine that is named."""
    engine = Engine.open(given.package, given.memory, threads=given.threads, learn=False)
    if given.k is not None:
        engine.scorer.retrieval = replace(engine.scorer.retrieval, k=given.k)
    return engine


def print_report(
    report: dict[str, Any], given: argparse.Namespace, text: Callable[[dict[str, Any]], str]
) -> None:
    """Print a report as JSON, or as text."""
    as_json = given.format == "json"
    sys.stdout.write((json.dumps(report, indent=2) if as_json else text(report)) + "\n")
