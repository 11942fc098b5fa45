"""Estimates of a photo's score, and how they are folded into one.

Printed rating, grade words, the memory's regression, comparisons and a reference are estimates of
one number; a doubt says how sure of them to be. Each is an entry of a list; `fold` combines them
from first to last, so that a new kind of evidence is one more entry, and what one is worth shows
when it is left out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meiqa.engine.calibration import Calibration, GradedHead, Logistic, ScoreHead
from meiqa.engine.prompts import LEVEL_WORDS
from meiqa.errors import UsageError
from meiqa.kernels.graded import grade_moments, grade_probabilities
from meiqa.kernels.thurstone import thurstone_map
from meiqa.types import QualityWord

Floats = NDArray[np.float64]

LOWEST, HIGHEST = 1.0, 5.0
Z95 = 1.959964
"""Half-width of a normal 95 % interval, in deviations."""
GRADES = np.arange(1.0, 6.0)
_FALL = 1.0 - 2.0 / math.pi
"""φ²/(Φ(1 - Φ)) is close to (2/π) exp(-_FALL z²), since 4 Φ(1 - Φ) is to exp(-2z²/π)."""
_WORDS_BEGIN = (1.8, 2.6, 3.4, 4.2)
LEAST_PROBABILITY = 1e-9
"""A grade word less likely than this counts as this likely: a remote model may not name it."""


@dataclass(frozen=True)
class Posterior:
    """A score with its deviation from people's, on the 1-5 scale."""

    score: float
    std: float

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval, kept on the scale."""
        half = Z95 * self.std
        return max(LOWEST, self.score - half), min(HIGHEST, self.score + half)


@dataclass(frozen=True)
class Estimate:
    """A score on 1-5 from one source, with its deviation from people's.

    Attributes:
        correlation: of its errors with those of the estimates before it.
        share: its weight in the combination, where that was fitted; by default the one that gives
            the smallest variance.
    """

    name: str
    score: float
    std: float
    correlation: float = 0.0
    share: float | None = None

    def combined(self, before: Posterior | None) -> Posterior:
        """Combine with what the estimates before it say."""
        own = Posterior(self.score, self.std)
        if before is None:
            return own
        if self.share is None:
            return combine_correlated(before, own, self.correlation)
        # Errors of answers to one question go together: their deviations add up.
        return Posterior(
            weighted(before.score, self.score, self.share),
            weighted(before.std, self.std, self.share),
        )


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Preferences of the photo to K neighbours whose scores are known (Thurstone Case V).

    Attributes:
        scores, stds: of the neighbours, (K,).
        preferences: (K,) probability that the photo looks better, NaN where it was not asked.
        calibration: sigma, lambda and how the solution's deviation goes with the observed one.
    """

    scores: Floats
    stds: Floats
    preferences: Floats
    calibration: Calibration
    name: str = "comparisons"

    def combined(self, before: Posterior | None) -> Posterior:
        """Combine with what the estimates before it say; they stand if nothing was asked."""
        if before is None:
            raise UsageError("comparisons start from another estimate")
        if np.isnan(self.preferences).all():
            return before
        return calibrated(*self.solution(before.score), self.calibration)

    def solution(self, prior: float) -> tuple[float, float]:
        """Give score and deviation as they follow from a prior score and the preferences."""
        scores, stds = thurstone_map(
            np.array([prior]),
            self.scores[None],
            self.stds[None],
            self.preferences[None],
            self.calibration.sigma,
            self.calibration.lam,
        )
        return float(scores[0]), float(stds[0])

    def most_informative(self, prior: float) -> NDArray[np.intp]:
        """Order the neighbours not yet asked by how much their answers should shrink variance.

        An answer about neighbour j adds φ²/(Φ(1 - Φ)) / w_j² at z = (s - s_j)/w_j to the curvature
        of the loss, w_j² = σ² + std_j², if it turns out as the score predicts. Its expectation over
        the solution so far is compared, in closed form since it is nearly a Gaussian in z; the
        variance that is left falls with it.
        """
        score, std = self.solution(prior)
        unasked = np.flatnonzero(np.isnan(self.preferences))
        widths = np.hypot(self.calibration.sigma, self.stds[unasked])
        z = (score - self.scores[unasked]) / widths
        broadened = 1.0 + 2.0 * _FALL * (std / widths) ** 2
        information = np.exp(-_FALL * z * z / broadened) / (np.sqrt(broadened) * widths**2)
        return np.asarray(unasked[np.argsort(-information, kind="stable")])


@dataclass(frozen=True)
class Doubt:
    """How much farther than usual photographs like this one are misjudged, as a factor."""

    factor: float
    name: str = "doubt"

    def combined(self, before: Posterior | None) -> Posterior:
        """Widen or narrow the deviation of what the estimates before it say."""
        if before is None:
            raise UsageError("a doubt needs a score to be of")
        return replace(before, std=before.std * self.factor)


UNDOUBTED = Doubt(1.0)
Evidence: TypeAlias = Estimate | Comparisons | Doubt


def fold(estimates: Iterable[Evidence]) -> Posterior:
    """Combine estimates, the first one first; UsageError without any, or if that compares.

    >>> fold([Estimate("rating", 3.0, 0.5), Estimate("grade", 4.0, 0.5, share=0.25)])
    Posterior(score=3.25, std=0.5)
    """
    posterior: Posterior | None = None
    for estimate in estimates:
        posterior = estimate.combined(posterior)
    if posterior is None:
        raise UsageError("a score needs at least one estimate")
    return posterior


def before_comparisons(estimates: Sequence[Evidence]) -> Posterior:
    """Fold what is known of a photo without any comparison."""
    return fold(each for each in estimates if isinstance(each, Estimate))


def combine_correlated(first: Posterior, second: Posterior, correlation: float) -> Posterior:
    """Combine two estimates of one score with the smallest variance that shares can give.

    Args:
        correlation: of their errors, 0-1 (Bates and Granger 1969). One that errs so much more, and
            so alike, that it could only do harm gets no share.

    >>> combine_correlated(Posterior(3.0, 0.5), Posterior(4.0, 0.5), 0.5)
    Posterior(score=3.5, std=0.4330127018922193)
    """
    shared = correlation * first.std * second.std
    apart = first.std**2 + second.std**2 - 2 * shared
    share = 0.0 if apart <= 0.0 else min(1.0, max(0.0, (first.std**2 - shared) / apart))
    variance = (
        (1 - share) ** 2 * first.std**2
        + share**2 * second.std**2
        + 2 * share * (1 - share) * shared
    )
    return Posterior(weighted(first.score, second.score, share), math.sqrt(variance))


def quality_word(score: float) -> QualityWord:
    """Name the fifth of the 1–5 scale that a score lies in.

    >>> quality_word(1.79), quality_word(1.8), quality_word(5.0)
    ('bad', 'poor', 'excellent')

    Raises:
        ValueError: the score is NaN.
    """
    if math.isnan(score):
        raise ValueError("a NaN score has no quality word")
    return LEVEL_WORDS[bisect_right(_WORDS_BEGIN, score)]


def weighted(first: float, second: float, share: float) -> float:
    return (1.0 - share) * first + share * second


def calibrated(score: float, std: float, calibration: Calibration) -> Posterior:
    """Map a solution of comparisons to people's scale, and its deviation to the observed one."""
    return Posterior(
        min(HIGHEST, max(LOWEST, score)),
        math.hypot(calibration.std_scale * std, calibration.std_floor),
    )


def preferences_of(logits: Floats, temperature: float) -> Floats:
    """Give the probability (K,) that the photo looks better, from logits (K, 2).

    The mean of the two orders where both were asked, which cancels a bias for either place; NaN
    where none was.
    """
    asked = ~np.isnan(logits)
    chances = np.where(asked, sigmoid(np.where(asked, logits, 0.0) / temperature), 0.0)
    answers = asked.sum(axis=1)
    return np.where(answers > 0, chances.sum(axis=1) / np.maximum(answers, 1), np.nan)


def softmax(logits: Floats) -> Floats:
    """Give the probabilities (n,) of answers by their logits (n,)."""
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def sigmoid(x: Floats) -> Floats:
    """Evaluate the logistic function, without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def mapped(logistic: Logistic, raw: float) -> float:
    """Map the model's own scale to 1-5, as the logistic itself maps many."""
    c, x = logistic, np.float64(raw)
    curve = c.b1 * (0.5 - 1.0 / (1.0 + np.exp(np.clip(c.b2 * (x - c.b3), -60, 60))))
    return float(np.clip(curve + c.b4 * x + c.b5, LOWEST, HIGHEST))


@dataclass(frozen=True, eq=False)
class Grading:
    """What the grade words say of a photo: score, its deviation, and (5,) grades' probabilities."""

    score: float
    std: float
    grades: Floats


def grading_of(words: Floats, calibration: Calibration, head: ScoreHead) -> Grading:
    """Judge a photo by the probabilities (5,) of its grade words; UsageError without the head."""
    if head == "grm":
        if calibration.graded is None:
            raise UsageError("the package has no graded response")
        return graded_response(words, calibration.graded)
    score = mapped(calibration.levels, expected_grade(words))
    return Grading(score, calibration.levels_std, words)


def graded_response(words: Floats, head: GradedHead) -> Grading:
    """Judge by the graded response: its probabilities have one mode and a variance."""
    ability = centred_levels(words[None]) @ np.array(head.weights) + head.offset
    grades = grade_probabilities(ability, head.discrimination, head.first, head.step)
    expectation, variance = grade_moments(grades)
    std = math.hypot(head.std_scale * math.sqrt(variance[0]), head.std_floor)
    return Grading(mapped(head.score, expectation[0]), std, grades[0])


def centred_levels(words: ArrayLike) -> Floats:
    """Take logarithms of the probabilities (B, 5) of grade words, each row around 0.

    >>> centred_levels([[0.2, 0.2, 0.2, 0.2, 0.2]]).tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    logs: Floats = np.log(np.maximum(np.asarray(words, np.float64), LEAST_PROBABILITY))
    return np.asarray(logs - logs.mean(axis=1, keepdims=True))


def expected_grade(probabilities: Floats) -> float:
    """Give the expectation of grades 1 to 5 under their probabilities (5,)."""
    return float(probabilities @ GRADES)
