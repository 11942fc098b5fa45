"""The order of a set of photos, from comparisons with remembered photos and among themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.comparing import Comparer
from meiqa.engine.fusing import calibrated
from meiqa.engine.manifest import Calibration
from meiqa.errors import UsageError
from meiqa.types import Neighbour, RankedPhoto

RIVALS = 4
"""Photos of the set that each is compared with: of near scores, whose order is least certain."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Contestant:
    """A photo of the set, assessed alone.

    Attributes:
        path: what messages call it.
        image_digest, tokens, grid: what it is compared by.
        prior: the score that fusion starts from.
        score: the fused score.
        neighbours: remembered photos that it was, or could have been, compared with.
        summary: what was written about it.
        view: what it shows (`meiqa.engine.views`), where that is asked for.
    """

    path: str
    image_digest: str
    tokens: NDArray[np.float32]
    grid: tuple[int, int]
    prior: float
    score: float
    neighbours: tuple[Neighbour, ...]
    summary: str | None = None
    view: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Verdict:
    """The probability that one photo of the set looks better than another; both by index."""

    better: int
    worse: int
    preference: float


def ranked(
    contestants: Sequence[Contestant],
    comparer: Comparer,
    calibration: Calibration,
    rivals: int = RIVALS,
) -> tuple[RankedPhoto, ...]:
    """Compare photos with those next to them in score, solve for all scores, and order them.

    Photos of equal score keep the order they were given in.
    """
    if not contestants:
        return ()
    alone = order_of([each.score for each in contestants])
    verdicts = list(asked_of(contestants, alone, comparer, calibration.temperature, rivals // 2))
    scores, stds = solved(contestants, verdicts, calibration)
    posteriors = [
        calibrated(score, std, calibration) for score, std in zip(scores, stds, strict=True)
    ]
    # By the solution and not by the mapped score, which may be cut off at the ends of the scale.
    together = order_of(scores)
    place_alone = {index: place for place, index in enumerate(alone, 1)}
    compared = np.bincount(
        [index for verdict in verdicts for index in (verdict.better, verdict.worse)],
        minlength=len(contestants),
    )
    return tuple(
        RankedPhoto(
            rank=place,
            path=contestants[index].path,
            score=posteriors[index].score,
            std=posteriors[index].std,
            alone=contestants[index].score,
            compared=int(compared[index]),
            places=place_alone[index] - place,
            summary=contestants[index].summary,
        )
        for place, index in enumerate(together, 1)
    )


def asked_of(
    contestants: Sequence[Contestant],
    order: Sequence[int],
    comparer: Comparer,
    temperature: float,
    behind: int,
) -> Iterator[Verdict]:
    """Compare each photo with so many that come next in the order."""
    for place, index in enumerate(order):
        following = order[place + 1 : place + 1 + behind]
        if not following:
            continue
        others = [contestants[other] for other in following]
        preferences = comparer.preferences(contestants[index], others, temperature)
        for other, preference in zip(following, preferences, strict=True):
            yield Verdict(index, other, float(preference))


def solved(
    contestants: Sequence[Contestant], verdicts: Sequence[Verdict], calibration: Calibration
) -> tuple[Floats, Floats]:
    """Scores and deviations (N,) that suit all comparisons best; see `thurstone_joint`.

    Each photo has its prior; a remembered photo that several were compared with is one item.
    """
    # Numba comes with it, whose import takes longer than scoring a photo.
    from meiqa.kernels.joint import thurstone_joint

    count = len(contestants)
    prior = [each.prior for each in contestants]
    stds = [np.nan] * count
    pairs = [(verdict.better, verdict.worse) for verdict in verdicts]
    preferences = [verdict.preference for verdict in verdicts]
    items: dict[tuple[str, str], int] = {}
    for index, each in enumerate(contestants):
        for neighbour in each.neighbours:
            if neighbour.preference is None:
                continue
            item = items.setdefault((neighbour.origin, neighbour.id), count + len(items))
            if item == len(prior):
                prior.append(neighbour.score)
                stds.append(neighbour.std)
            pairs.append((index, item))
            preferences.append(neighbour.preference)
    weights = np.full(len(prior), calibration.lam)
    scores, deviations = thurstone_joint(
        prior, weights, stds, np.array(pairs, np.int64), preferences, calibration.sigma
    )
    return scores[:count], deviations[:count]


def order_of(scores: Sequence[float] | Floats) -> list[int]:
    """Indices by falling score, equal scores as they come."""
    order: list[int] = np.argsort(-np.asarray(scores, np.float64), kind="stable").tolist()
    return order


def require_even(rivals: int) -> None:
    """Refuse a number of rivals of which there is no half.

    Raises:
        UsageError: it is odd or negative.
    """
    if rivals < 0 or rivals % 2:
        raise UsageError("rivals are before and behind a photo", seen=rivals, allowed="0, 2, 4, …")
