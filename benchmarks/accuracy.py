"""Agreement with human scores: read a label table, score its photos, compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meiqa.benchmarks.metrics import summarise
from meiqa.errors import UsageError
from meiqa.labels import LabelTable
from meiqa.types import Assessment, Budget, Failure

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

__all__ = ["evaluate"]


def evaluate(
    engine: Engine,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    limit: int | None = None,
    k: int | None = None,
    budget: Budget | None = None,
    on_result: Callable[[Assessment | Failure], None] = lambda _: None,
) -> dict[str, Any]:
    """Score the photos of a table, without learning, and compare with their human scores.

    Args:
        engine: What scores.
        labels: The photos, relative to ``images_dir``, and their human scores.
        images_dir: Where the photos are.
        limit: Score only so many, spread over the table.
        k: Neighbours to compare with; None leaves it to the engine.
        budget: What each photo may cost.
        on_result: Called after each photo.

    Returns:
        JSON-ready: n, k (the most comparisons of any photo), mos_range, initial and fused (the
        metrics of `summarise`), coverage95 (the share of human scores within the 95 % interval),
        seconds_per_image (wall time, failures included) and failures.

    Raises:
        UsageError: the directory is missing, or fewer than two photos could be scored.
    """
    if not Path(images_dir).is_dir():
        raise UsageError(f"{images_dir}: no such directory", hint="give it with --images DIR")
    labels = labels.spread(limit)
    photos = [str(Path(images_dir, file)) for file in labels.files]
    started = time.perf_counter()
    results: list[Assessment | Failure] = []
    for result in engine.score_many(photos, budget=budget, k=k, learn=False):
        results.append(result)
        on_result(result)
    seconds = time.perf_counter() - started
    return _report(results, labels, seconds)


def _report(
    results: Sequence[Assessment | Failure], labels: LabelTable, seconds: float
) -> dict[str, Any]:
    failures = [result for result in results if isinstance(result, Failure)]
    scored = [
        (result, score)
        for result, score in zip(results, labels.scores_1_to_5(), strict=True)
        if isinstance(result, Assessment)
    ]
    if len(scored) < 2:
        first = f"; the first failure: {failures[0].error}" if failures else ""
        raise UsageError(
            f"{len(scored)} of {len(results)} photos could be scored{first}",
            allowed="at least 2",
        )
    human = np.array([score for _, score in scored])
    intervals = np.array([assessment.ci95 for assessment, _ in scored])
    return {
        "n": len(scored),
        "k": max(_compared(assessment) for assessment, _ in scored),
        "mos_range": list(labels.mos_range),
        "initial": summarise(np.array([one.initial_score for one, _ in scored]), human),
        "fused": summarise(np.array([one.score for one, _ in scored]), human),
        "coverage95": float(np.mean((intervals[:, 0] <= human) & (human <= intervals[:, 1]))),
        "seconds_per_image": seconds / len(results),
        "failures": [failure.to_dict() for failure in failures],
    }


def _compared(assessment: Assessment) -> int:
    return sum(neighbour.preference is not None for neighbour in assessment.neighbours)
