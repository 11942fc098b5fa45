"""Graded response: one ability becomes five ordered grade probabilities with a single mode.

Samejima's graded response model as AGQG (arXiv 2512.22780) uses it for image quality, with
difficulties in arithmetic progression. NumPy is enough: a row takes microseconds, and a process
that scores one photo has nothing to compile.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEAST_STEP = math.log(3.0)
"""Least discrimination times step with which five grades have one mode at every ability.

Let v = a (theta - b_1) and x = exp(a d). The inner grades rise up to the one that the ability lies
in and fall behind it, whatever x is, so only an end can add a mode: the first grade, if it exceeds
the second while the second is less than the third. P1 > P2 is 2 sigmoid(-v) > sigmoid(ad - v), or
exp(v) (1 - 2/x) < 1. P2 < P3 is v > ad, or exp(v) > x. Both hold for some v unless x - 2 >= 1.
The last grade mirrors the first, and both ends can't win at once: P1 > P2 >= P3 and
P3 <= P4 < P5 would need an ability below and above the middle grade.
"""


def grade_probabilities(
    ability: ArrayLike, discrimination: float, first: float, step: float
) -> Floats:
    """Give the probabilities of grades 1 to 5 at each ability.

    P(grade >= k + 1) = sigmoid(a (theta - b_k)) with b_k = b_1 + (k - 1) d, k = 1..4 (AGQG,
    arXiv 2512.22780). Differences of neighbouring sigmoids are taken as products, so that small
    probabilities keep all their digits.

    Args:
        ability: theta, ``(B,)``.
        discrimination: a, above 0.
        first: difficulty b_1 of a grade above the lowest.
        step: d, with ``discrimination * step`` at least `LEAST_STEP`, so that each row rises to
            one grade and falls behind it.

    Returns:
        ``(B, 5)``, each row with the sum 1.

    Raises:
        ValueError: the shape is another, or a number is outside what is allowed above.

    Example:
        >>> grade_probabilities([0.0], 2.0, -1.5, 1.0).round(2).tolist()
        [[0.05, 0.22, 0.46, 0.22, 0.05]]
    """
    gap = _checked(discrimination, first, step)
    abilities = np.asarray(ability, np.float64)
    if abilities.ndim != 1 or not np.isfinite(abilities).all():
        raise ValueError(f"ability must be (B,) and finite, not of shape {abilities.shape}")
    # Beyond these differences a sigmoid is 0 or 1 in float64, and products can't overflow.
    above = np.clip(discrimination * (abilities - first), -1e6, 1e6)[:, None] - gap * np.arange(4)
    reached, missed = _sigmoid(above), _sigmoid(-above)
    made = np.empty((len(abilities), 5))
    made[:, 0], made[:, 4] = missed[:, 0], reached[:, 3]
    # sigmoid(u) - sigmoid(u - g) = sigmoid(u) sigmoid(g - u) (1 - exp(-g))
    made[:, 1:4] = reached[:, :3] * missed[:, 1:] * -math.expm1(-gap)
    return made


def grade_log_probabilities(above_first: Floats, gap: float) -> Floats:
    """Give the logarithms ``(B, 5)`` of `grade_probabilities`, finite where those are 0.

    Args:
        above_first: a (theta - b_1), ``(B,)``.
        gap: a d, above 0; what is fitted may pass through values below `LEAST_STEP`.
    """
    above = above_first[:, None] - gap * np.arange(4)
    reached, missed = -np.logaddexp(0.0, -above), -np.logaddexp(0.0, above)
    made = np.empty((len(above_first), 5))
    made[:, 0], made[:, 4] = missed[:, 0], reached[:, 3]
    made[:, 1:4] = reached[:, :3] + missed[:, 1:] + math.log(-math.expm1(-gap))
    return made


def grade_moments(probabilities: ArrayLike) -> tuple[Floats, Floats]:
    """Give expectation and variance, ``(B,)`` each, of grades 1 to 5 under ``(B, 5)``.

    Raises:
        ValueError: the shape is another.

    Example:
        >>> [float(moment[0]) for moment in grade_moments([[0.0, 0.5, 0.5, 0.0, 0.0]])]
        [2.5, 0.25]
    """
    rows = _rows(probabilities)
    # Around the middle grade, and the variance around the mean: nothing large is subtracted.
    expectation = rows @ np.arange(-2.0, 3.0)
    away = np.arange(-2.0, 3.0) - expectation[:, None]
    return 3.0 + expectation, np.sum(rows * away * away, axis=1)


def multimodal(probabilities: ArrayLike, depth: float = 1e-12) -> NDArray[np.bool_]:
    """Say of each row ``(B, 5)`` whether a grade lies more than ``depth`` below both sides.

    Raises:
        ValueError: the shape is another.

    Example:
        >>> multimodal([[0.3, 0.1, 0.2, 0.2, 0.2], [0.1, 0.2, 0.4, 0.2, 0.1]]).tolist()
        [True, False]
    """
    rows = _rows(probabilities)
    before = np.maximum.accumulate(rows, axis=1)
    behind = np.maximum.accumulate(rows[:, ::-1], axis=1)[:, ::-1]
    found: NDArray[np.bool_] = np.any(np.minimum(before, behind) - rows > depth, axis=1)
    return found


def soft_grades(scores: ArrayLike) -> Floats:
    """Share mean opinion scores ``(N,)`` on 1-5 between the two grades around each: ``(N, 5)``.

    Of all shares with that mean, these vary least.

    Example:
        >>> soft_grades([3.0, 4.25]).tolist()
        [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.75, 0.25]]
    """
    inside = np.clip(np.asarray(scores, np.float64), 1.0, 5.0)
    shares: Floats = np.maximum(0.0, 1.0 - np.abs(inside[:, None] - np.arange(1.0, 6.0)))
    return shares


def _sigmoid(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))
    made: Floats = np.where(x >= 0.0, 1.0, small) / (1.0 + small)
    return made


def _rows(probabilities: ArrayLike) -> Floats:
    rows = np.asarray(probabilities, np.float64)
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise ValueError(f"probabilities must be (B, 5), not {rows.shape}")
    return rows


def _checked(discrimination: float, first: float, step: float) -> float:
    """Refuse parameters that aren't a unimodal model's; a d."""
    gap = discrimination * step
    if not (discrimination > 0.0 and step > 0.0 and math.isfinite(first) and math.isfinite(gap)):
        raise ValueError(
            f"discrimination and step must be above 0, and all finite: {discrimination}, {step}, "
            f"{first}"
        )
    # A product that was fitted at the bound may be rounded below it.
    if gap < LEAST_STEP * (1.0 - 1e-12):
        raise ValueError(
            f"discrimination times step must be at least ln 3 = {LEAST_STEP:.6f}, not {gap:.6f}: "
            "below that some abilities give two modes"
        )
    return gap
