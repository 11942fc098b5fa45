"""What a time limit for each photo costs in agreement with people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meiqa.benchmarks.accuracy import Judged, compared, judge
from meiqa.benchmarks.machine import machine, versions
from meiqa.benchmarks.metrics import srcc
from meiqa.benchmarks.recording import Parts
from meiqa.benchmarks.tables import Column, table_text
from meiqa.labels import LabelTable
from meiqa.types import Assessment, Budget, Failure

__all__ = ["budgets_text", "sweep_budgets"]


def sweep_budgets(
    parts: Parts,
    labels: LabelTable,
    images_dir: str | Path,
    budgets_ms: Sequence[float],
    *,
    on_result: Callable[[Assessment | Failure], None] = lambda _: None,
) -> dict[str, Any]:
    """Judge the photos of a table without a limit, and then under each.

    Every run has an engine of its own, whose caches are empty and whose costs are measured anew,
    so that no photo was read before; nor are neighbours' prefixes kept from another run.

    Args:
        parts: What judges.
        labels: The photos, relative to ``images_dir``, and their human scores.
        images_dir: Where the photos are.
        budgets_ms: The limits for each photo.
        on_result: Called after each photo of each run.

    Returns:
        JSON-ready: rows, the first without a limit, of budget_ms, srcc, gain (above the initial
        score that is found without a limit), gain_kept (its share of the gain without a limit,
        None where there is none), the mean number of neighbours compared with, written (the share
        of photos that something was written about), p50_ms, p95_ms, p99_ms, late (the share that
        took longer than the limit); machine and versions.

    Raises:
        UsageError: there is no such directory, or fewer than two photos could be scored.
    """

    def run(budget: Budget) -> Judged:
        engine = parts.engine()
        return judge(engine, labels, images_dir, budget=budget, on_result=on_result)

    unbounded = run(Budget())
    base = srcc(unbounded.initial, unbounded.human)
    whole = srcc(unbounded.fused, unbounded.human) - base
    judged = [(None, unbounded), *((ms, run(Budget(ms=ms))) for ms in budgets_ms)]
    return {
        "rows": [_row(ms, one, base, whole) for ms, one in judged],
        "machine": machine(),
        "versions": versions("numpy", "onnxruntime"),
    }


def _row(budget_ms: float | None, judged: Judged, base: float, whole: float) -> dict[str, Any]:
    reached = srcc(judged.fused, judged.human)
    times_ms = np.array([one.timings_ms["total"] for one in judged.assessments])
    p50, p95, p99 = (float(ms) for ms in np.percentile(times_ms, (50, 95, 99)))
    return {
        "budget_ms": budget_ms,
        "srcc": reached,
        "gain": reached - base,
        "gain_kept": (reached - base) / whole if whole > 0 else None,
        "neighbours": float(np.mean([compared(one) for one in judged.assessments])),
        "written": float(np.mean([one.summary is not None for one in judged.assessments])),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "late": None if budget_ms is None else float(np.mean(times_ms > budget_ms)),
    }


def budgets_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `sweep_budgets` as a table."""
    named = [
        {**row, "budget": "none" if row["budget_ms"] is None else f"{row['budget_ms']:g} ms"}
        for row in report["rows"]
    ]
    return "Budgets\n\n" + table_text(named, _COLUMNS)


_COLUMNS = (
    Column("budget", "budget"),
    Column("srcc", "SRCC", ".4f"),
    Column("gain", "gain", "+.4f"),
    Column("gain_kept", "of the gain", ".0%"),
    Column("neighbours", "compared", ".1f"),
    Column("written", "written", ".0%"),
    Column("p50_ms", "p50 ms", ".0f"),
    Column("p95_ms", "p95 ms", ".0f"),
    Column("p99_ms", "p99 ms", ".0f"),
    Column("late", "late", ".1%"),
)
