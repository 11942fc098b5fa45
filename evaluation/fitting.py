"""Maps fitted to people's scores: a logistic, an honest deviation, and the graded response."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, least_squares, minimize

from meiqa.engine.calibration import GradedHead, Logistic
from meiqa.engine.estimates import centred_levels
from meiqa.kernels.graded import (
    LEAST_STEP,
    grade_log_probabilities,
    grade_moments,
    grade_probabilities,
    soft_grades,
)

Floats = NDArray[np.float64]

RIDGE = 1e-5
"""Weight of the squared coefficients, of standardised levels, against the mean log-likelihood: it
keeps them finite where levels and grades go perfectly together, and else changes nothing."""


def matched_logistic(raw: Floats, human: Floats) -> Logistic:
    """Fit the five-parameter logistic under which N raw scores are distributed like N human ones.

    The least raw score is carried to the least human one, the next to the next, as well as the
    function can (least squares). Predicting each photograph's own score instead would pull all
    scores towards the middle, and few would be called excellent or bad. Increasing, as b1 b2 >= 0
    and b4 >= 0 are kept.
    """
    ordered, wanted = np.sort(raw), np.sort(human)

    def residuals(b: Floats) -> Floats:
        return np.asarray(Logistic(*b)(ordered) - wanted)

    start = [1.0, 1.0, float(np.mean(raw)), 0.5, float(np.mean(human) - 0.5 * np.mean(raw))]
    bounds = ([0, 0, 1, 0, -5], [8, 8, 5, 2, 5])
    fit = least_squares(residuals, start, bounds=bounds)
    return Logistic(*(float(b) for b in fit.x))


def fitted_deviation(errors: Floats, stds: Floats) -> tuple[float, float]:
    """Fit scale and floor of the deviation under which the errors are most likely."""

    def surprise(logs: Floats) -> float:
        variance = np.exp(2 * logs[0]) * stds**2 + np.exp(2 * logs[1])
        return float(np.mean(np.log(variance) + errors**2 / variance))

    spread = root_mean_square(errors)
    found = minimize(
        surprise,
        np.log(np.array([0.5 * spread / float(np.mean(stds)), 0.5 * spread])),
        method="Nelder-Mead",
    )
    scale, floor = np.exp(found.x)
    return float(scale), float(floor)


def root_mean_square(errors: Floats) -> float:
    """Give the square root of the mean square."""
    return float(np.sqrt(np.mean(errors**2)))


@dataclass(frozen=True)
class Response:
    """A graded response on top of five levels: ability = weights . centred levels + offset.

    Over the photographs it was fitted on, the ability has mean 0 and deviation 1.
    """

    weights: tuple[float, ...]
    offset: float
    discrimination: float
    first: float
    step: float

    def probabilities(self, levels: Floats) -> Floats:
        """Give grade probabilities (N, 5) of centred levels (N, 5)."""
        abilities = levels @ np.array(self.weights) + self.offset
        return grade_probabilities(abilities, self.discrimination, self.first, self.step)


def fitted_response(levels: Floats, grades: Floats) -> Response:
    """Fit a graded response by maximum likelihood.

    With a (theta - b_1) = w . levels + c and a d = g the log-likelihood is concave in (w, c, g), so
    there is one optimum, whatever the start; g stays at `LEAST_STEP` or above.

    Args:
        levels: centred levels (N, 5): log-probabilities of grade words, logits, or image-text
            similarities, each less the mean of its row.
        grades: (N, 5) votes, or shares as of `soft_grades`; a row counts by its sum.

    Raises:
        ValueError: shapes disagree, or no grade has a vote.
    """
    if levels.ndim != 2 or levels.shape[1] != 5 or grades.shape != levels.shape:
        raise ValueError(f"levels and grades must be (N, 5), not {levels.shape}, {grades.shape}")
    if not (np.isfinite(levels).all() and (grades >= 0.0).all() and 0.0 < grades.sum() < np.inf):
        raise ValueError("levels must be finite and grades votes or shares, not all 0")
    centre, spread = levels.mean(axis=0), levels.std(axis=0)
    scale = np.where(spread > 0.0, spread, 1.0)
    features = (levels - centre) / scale
    shares = grades / grades.sum()

    def loss(parameters: Floats) -> tuple[float, Floats]:
        weights, above, gap = parameters[:5], parameters[5], float(parameters[6])
        value, by_above, by_gap = surprise(features @ weights + above, gap, shares)
        slope = np.concatenate(
            [features.T @ by_above + 2 * RIDGE * weights, [by_above.sum(), by_gap]]
        )
        return value + RIDGE * float(weights @ weights), slope

    found = minimize(
        loss,
        np.array([-0.2, -0.1, 0.0, 0.1, 0.2, 3.0, 2.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(np.array([-np.inf] * 6 + [LEAST_STEP]), np.inf),
        options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9},
    ).x
    # In its own units: ability (mean 0, deviation 1 where it was fitted) and a, b_1, d.
    raw = features @ found[:5]
    discrimination, mean = max(float(raw.std()), 1e-6), float(raw.mean())
    slopes = found[:5] / scale / discrimination
    return Response(
        # Centred levels add up to 0, so a constant in the weights would tell nothing.
        weights=tuple(float(slope) for slope in slopes - slopes.mean()),
        offset=float(-slopes @ centre) - mean / discrimination,
        discrimination=discrimination,
        first=-(float(found[5]) + mean) / discrimination,
        step=float(found[6]) / discrimination,
    )


def surprise(above: Floats, gap: float, shares: Floats) -> tuple[float, Floats, float]:
    """Give the negative log-likelihood of shares (N, 5), its slopes by `above` (N,) and the gap."""
    logs = grade_log_probabilities(above, gap)
    thresholds = above[:, None] - gap * np.arange(4)
    reached = 0.5 * (1.0 + np.tanh(0.5 * thresholds))
    upper, lower = shares[:, 1:], shares[:, :4]
    # Grade k + 1 has reached threshold k, the grade below has missed it.
    by_threshold = lower * reached - upper * (1.0 - reached)
    by_gap = -float(np.sum(by_threshold @ np.arange(4.0)))
    # The inner grades' factor 1 - exp(-gap).
    by_gap -= float(shares[:, 1:4].sum() / np.expm1(gap))
    return -float(np.sum(shares * logs)), by_threshold.sum(axis=1), by_gap


def fitted_head(words: Floats, human: Floats, grades: Floats | None = None) -> GradedHead:
    """Fit the graded response of N photographs, and how its score and variance go with people's.

    Args:
        words: (N, 5) probabilities of the grade words.
        human: (N,) human scores on 1-5.
        grades: (N, 5) votes; `soft_grades` of the human scores without them.
    """
    levels = centred_levels(words)
    response = fitted_response(levels, soft_grades(human) if grades is None else grades)
    expectation, variance = grade_moments(response.probabilities(levels))
    score = matched_logistic(expectation, human)
    errors = np.asarray(score(expectation)) - human
    std_scale, std_floor = fitted_deviation(errors, np.sqrt(variance))
    return GradedHead(**asdict(response), score=score, std_scale=std_scale, std_floor=std_floor)
