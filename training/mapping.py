"""Maps fitted to people's scores: a logistic from raw scores, and deviations that are honest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from meiqa.engine.manifest import Logistic

Floats = NDArray[np.float64]


def matched_logistic(raw: Floats, human: Floats) -> Logistic:
    """Five-parameter logistic under which N raw scores are distributed like N human ones.

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
    """Scale and floor of the deviation under which the errors are most likely."""

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
    """Square root of the mean square."""
    return float(np.sqrt(np.mean(errors**2)))
