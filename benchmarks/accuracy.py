"""Agreement with human scores: read a label table, score its photos, compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meiqa.benchmarks.metrics import (
    distinct,
    effective_bins,
    reliability,
    summarise,
    tie_rate,
    tied_pairs,
)
from meiqa.errors import UsageError
from meiqa.labels import LabelTable
from meiqa.types import Assessment, Budget, Failure

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

__all__ = ["Judged", "evaluate", "judge", "photos_of"]

Floats = NDArray[np.float64]


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

    @property
    def deviations(self) -> Floats:
        """(N,) standard deviations of the fused scores."""
        return np.array([one.std for one in self.assessments])

    def report(self) -> dict[str, Any]:
        """Give the figures of `evaluate`."""
        intervals = np.array([one.ci95 for one in self.assessments])
        covered = (intervals[:, 0] <= self.human) & (self.human <= intervals[:, 1])
        return {
            "n": len(self.assessments),
            "k": max(compared(one) for one in self.assessments),
            "mos_range": list(self.mos_range),
            "human": {
                "effective_bins": effective_bins(self.human),
                "distinct": distinct(self.human),
                "tie_rate": tie_rate(self.human),
            },
            "initial": summarise(self.initial, self.human),
            "fused": summarise(self.fused, self.human),
            "tied_pairs": tied_pairs(self.initial, self.fused, self.human),
            "coverage95": float(np.mean(covered)),
            "reliability": reliability(self.fused, self.deviations, self.human),
            "seconds_per_image": self.seconds_per_image,
            "failures": [failure.to_dict() for failure in self.failures],
        }


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
        JSON-ready: n, k (the most comparisons of any photo), mos_range, human (how finely people
        tell the photos apart), initial and fused (the metrics of `summarise`), tied_pairs (what
        fusion makes of photos whose initial scores are equal), coverage95 (the share of human
        scores within the 95 % interval), reliability (the same for other intervals),
        seconds_per_image (wall time, failures included) and failures.

    Raises:
        UsageError: the directory is missing, or fewer than two photos could be scored.
    """
    labels = labels.spread(limit)
    return judge(engine, labels, images_dir, k=k, budget=budget, on_result=on_result).report()


def judge(
    engine: Engine,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    k: int | None = None,
    budget: Budget | None = None,
    on_result: Callable[[Assessment | Failure], None] = lambda _: None,
) -> Judged:
    """Score the photos of a table, without learning; arguments and errors are `evaluate`'s."""
    photos = [str(photo) for photo in photos_of(labels, images_dir)]
    started = time.perf_counter()
    results: list[Assessment | Failure] = []
    for result in engine.score_many(photos, budget=budget, k=k, learn=False):
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
