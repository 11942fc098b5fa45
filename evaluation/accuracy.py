"""Agreement with human scores: photos of a label table are scored and compared with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.engine import Engine
from meiqa.engine.images import ImageSource
from meiqa.engine.scoring import Scorer
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import Column, quantiles_ms, run_on, table_text
from meiqa.evaluation.metrics import (
    deviation_agreement,
    fineness,
    reliability,
    srcc,
    srcc_ci95,
    summarise,
    tied_pairs,
)
from meiqa.labels import LabelTable
from meiqa.types import Assessment, Budget, Failure

Floats = NDArray[np.float64]
OnResult = Callable[[Assessment | Failure], None]


class ManyScorer(Protocol):
    """An engine, or several of them elsewhere."""

    def score_many(
        self,
        images: Iterable[ImageSource],
        *,
        budget: Budget | None,
        k: int | None,
        learn: bool,
        detail: bool,
    ) -> Iterator[Assessment | Failure]:
        """See `Engine.score_many`."""


@dataclass(frozen=True, eq=False)
class Judged:
    """Photos with what people and the engine say of them.

    Attributes:
        assessments: of the N photos that could be scored.
        human: (N,) their human scores on 1-5.
        mos_range: ends of the scale that the human scores were given on.
        failures: the photos that could not be scored.
        seconds_per_image: wall time, failures included.
    """

    assessments: tuple[Assessment, ...]
    human: Floats
    mos_range: tuple[float, float]
    failures: tuple[Failure, ...]
    seconds_per_image: float

    @property
    def initial(self) -> Floats:
        """(N,) scores before any comparison."""
        return np.array([one.initial_score for one in self.assessments])

    @property
    def fused(self) -> Floats:
        """(N,) scores."""
        return np.array([one.score for one in self.assessments])

    def report(self) -> dict[str, Any]:
        """Sum up.

        Returns:
            JSON-ready: n, k (the most comparisons of any photo), mos_range, human (how finely
            people tell the photos apart), initial and fused (the metrics of `summarise`, and
            srcc_ci95), tied_pairs (what fusion makes of photos whose initial scores are equal),
            coverage95 (the share of human scores within the 95 % interval), reliability (the same
            for other intervals), deviation (how it goes with the error), seconds_per_image and
            failures.
        """
        deviations = np.array([one.std for one in self.assessments])
        stages = {"initial": self.initial, "fused": self.fused}
        return {
            "n": len(self.assessments),
            "k": max(compared(one) for one in self.assessments),
            "mos_range": list(self.mos_range),
            "human": fineness(self.human),
            **{name: self._agreement(scores) for name, scores in stages.items()},
            "tied_pairs": tied_pairs(self.initial, self.fused, self.human),
            "coverage95": coverage([one.ci95 for one in self.assessments], self.human),
            "reliability": reliability(self.fused, deviations, self.human),
            "deviation": deviation_agreement(self.fused, deviations, self.human),
            "seconds_per_image": self.seconds_per_image,
            "failures": [failure.to_dict() for failure in self.failures],
        }

    def _agreement(self, scores: Floats) -> dict[str, Any]:
        interval = list(srcc_ci95(scores, self.human))
        return {**summarise(scores, self.human), "srcc_ci95": interval}


def judge(
    engine: ManyScorer,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    k: int | None = None,
    budget: Budget | None = None,
    on_result: OnResult = lambda _: None,
) -> Judged:
    """Score the photos of a table, without learning.

    Args:
        engine: What scores.
        labels: The photos, relative to ``images_dir``, and their human scores.
        images_dir: Where the photos are.
        k: Neighbours to compare with; None leaves it to the engine.
        budget: What each photo may cost.
        on_result: Called after each photo.

    Raises:
        UsageError: the directory is missing, or fewer than two photos could be scored.
    """
    photos = [str(photo) for photo in photos_of(labels, images_dir)]
    started = time.perf_counter()
    results: list[Assessment | Failure] = []
    for result in engine.score_many(photos, budget=budget, k=k, learn=False, detail=False):
        results.append(result)
        on_result(result)
    seconds = time.perf_counter() - started
    failures = tuple(result for result in results if isinstance(result, Failure))
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
    return Judged(
        assessments=tuple(assessment for assessment, _ in scored),
        human=np.array([score for _, score in scored]),
        mos_range=labels.mos_range,
        failures=failures,
        seconds_per_image=seconds / len(results),
    )


def sweep_budgets(
    engine: Engine,
    labels: LabelTable,
    images_dir: str | Path,
    budgets_ms: Sequence[float],
    *,
    on_result: OnResult = lambda _: None,
) -> dict[str, Any]:
    """Judge the photos of a table without a limit, and then under each limit.

    Every run begins with empty caches and measures its costs anew, so that no photo was read
    before; nor are neighbours' prefixes kept from another run.

    Args:
        engine: What scores.
        labels: The photos, relative to ``images_dir``, and their human scores.
        images_dir: Where the photos are.
        budgets_ms: The limits for each photo.
        on_result: Called after each photo of each run.

    Returns:
        JSON-ready: rows, the first without a limit, of budget_ms, srcc, gain (above the initial
        score that is found without a limit), gain_kept (its share of the gain without a limit,
        None where there is none), the mean number of neighbours compared with, written (the share
        of photos that something was written about), the times of `quantiles_ms`, late (the share
        that took longer than the limit); machine and versions.

    Raises:
        UsageError: there is no such directory, or fewer than two photos could be scored.
    """
    s = engine.scorer

    def run(budget: Budget) -> Judged:
        fresh = Engine(Scorer(s.model, s.memory, s.retrieval, patterns=s.patterns))
        return judge(fresh, labels, images_dir, budget=budget, on_result=on_result)

    unbounded = run(Budget())
    base = srcc(unbounded.initial, unbounded.human)
    whole = srcc(unbounded.fused, unbounded.human) - base
    judged = [(None, unbounded), *((ms, run(Budget(ms=ms))) for ms in budgets_ms)]
    return {
        "rows": [_row(ms, one, base, whole) for ms, one in judged],
        **run_on("numpy", "onnxruntime"),
    }


def _row(budget_ms: float | None, judged: Judged, base: float, whole: float) -> dict[str, Any]:
    reached = srcc(judged.fused, judged.human)
    times_ms = [one.timings_ms["total"] for one in judged.assessments]
    return {
        "budget_ms": budget_ms,
        "srcc": reached,
        "gain": reached - base,
        "gain_kept": (reached - base) / whole if whole > 0 else None,
        "neighbours": float(np.mean([compared(one) for one in judged.assessments])),
        "written": float(np.mean([one.summary is not None for one in judged.assessments])),
        **quantiles_ms(times_ms),
        "late": None if budget_ms is None else float(np.mean(np.array(times_ms) > budget_ms)),
    }


def budgets_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `sweep_budgets` as a table."""
    named = [
        {**row, "budget": "none" if row["budget_ms"] is None else f"{row['budget_ms']:g} ms"}
        for row in report["rows"]
    ]
    columns = (
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
    return "Budgets\n\n" + table_text(named, columns)


def photos_of(labels: LabelTable, images_dir: str | Path) -> list[Path]:
    """Give the photos' paths.

    Raises:
        UsageError: there is no such directory.
    """
    if not Path(images_dir).is_dir():
        raise UsageError(f"{images_dir}: no such directory", hint="give it with --images DIR")
    return [Path(images_dir, file) for file in labels.files]


def compared(assessment: Assessment) -> int:
    """Count the neighbours that a photo was compared with."""
    return sum(neighbour.preference is not None for neighbour in assessment.neighbours)


def coverage(intervals: Sequence[tuple[float, float]], human: Floats) -> float:
    """Give the share of human scores (N,) within their intervals."""
    ends = np.array(intervals)
    return float(np.mean((ends[:, 0] <= human) & (human <= ends[:, 1])))
