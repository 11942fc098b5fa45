"""Fusion of the first opinion with the comparisons: Thurstone Case V, maximum a posteriori."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meiqa.engine.manifest import Calibration
from meiqa.kernels.thurstone import thurstone_map
from meiqa.memory import Case

Z95 = 1.959964
"""Half-width of a normal 95 % interval, in deviations."""


@dataclass(frozen=True)
class Observation:
    """What one judge says: a score on 1-5, and its deviation from people's."""

    score: float
    std: float


def joined(first: Observation, second: Observation, correlation: float) -> Observation:
    """Two observations of one photo as one, with the smallest variance that shares can give.

    Args:
        correlation: of their errors, 0-1 (Bates and Granger 1969). One that errs so much more, and
            so alike, that it could only do harm gets no share.

    >>> joined(Observation(3.0, 0.5), Observation(4.0, 0.5), 0.5)
    Observation(score=3.5, std=0.4330127018922193)
    """
    shared = correlation * first.std * second.std
    apart = first.std**2 + second.std**2 - 2 * shared
    share = 0.0 if apart <= 0.0 else min(1.0, max(0.0, (first.std**2 - shared) / apart))
    variance = (
        (1 - share) ** 2 * first.std**2
        + share**2 * second.std**2
        + 2 * share * (1 - share) * shared
    )
    score = (1 - share) * first.score + share * second.score
    return Observation(score, math.sqrt(variance))


@dataclass(frozen=True)
class Posterior:
    """A score with its deviation, on the 1-5 scale."""

    score: float
    std: float

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval, kept on the scale."""
        half = Z95 * self.std
        return max(1.0, self.score - half), min(5.0, self.score + half)


def fuse(
    prior: float,
    prior_std: float,
    neighbours: Sequence[Case],
    preferences: np.ndarray,
    calibration: Calibration,
) -> Posterior:
    """Posterior of one photo.

    Args:
        prior, prior_std: the score to start from and its deviation.
        neighbours: K remembered cases.
        preferences: (K,) probability that the photo looks better, NaN where it was not asked.
        calibration: sigma, lam and the mapping of the deviation.

    Returns:
        The prior as it is when nothing was asked.
    """
    if np.isnan(preferences).all():
        return Posterior(prior, prior_std)
    return calibrated(*solution(prior, neighbours, preferences, calibration), calibration)


def solution(
    prior: float,
    neighbours: Sequence[Case],
    preferences: np.ndarray,
    calibration: Calibration,
) -> tuple[float, float]:
    """Score and deviation as they follow from the comparisons, on the neighbours' own scale."""
    scores, stds = thurstone_map(
        np.array([prior]),
        np.array([[case.score for case in neighbours]]),
        np.array([[case.std for case in neighbours]]),
        np.asarray(preferences, np.float64)[None],
        calibration.sigma,
        calibration.lam,
    )
    return float(scores[0]), float(stds[0])


def calibrated(score: float, std: float, calibration: Calibration) -> Posterior:
    """A solution of the comparisons as people's scores and deviations from them go."""
    return Posterior(min(5.0, max(1.0, score)), observed_std(std, calibration))


def observed_std(posterior_std: float, calibration: Calibration) -> float:
    """The deviation from people's scores that was observed at a posterior's deviation."""
    return math.hypot(calibration.std_scale * posterior_std, calibration.std_floor)
