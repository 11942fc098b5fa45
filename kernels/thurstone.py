"""Thurstone Case V scaling of one photo against neighbours whose scores are known."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numpy.typing import ArrayLike, NDArray

from meiqa.kernels.hazards import hazards_nb

__all__ = ["thurstone_map"]

_MAX_STEPS = 200
# Newton squares the error: after a step this small, in sigmas, the next would be below rounding,
# and the curvature where the step began is that where it ends, to eight digits.
_LAST_STEP = 1e-8
_EPSILON = float(np.finfo(np.float64).eps)
# Inside these limits of sigma and lam the bracket closes within _MAX_STEPS, whatever the answers.
_SMALLEST, _LARGEST = 1e-9, 1e9
# Starting threads costs more than it saves on fewer photos than this.
_PARALLEL_FROM = 512
# Photos that a thread takes at a time.
_BLOCK = 64


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _derivatives_nb(
    score: float,
    known: NDArray[np.float64],
    inverse_widths: NDArray[np.float64],
    preferences: NDArray[np.float64],
    count: int,
) -> tuple[float, float]:
    """Return the cross-entropy's first and second derivative at ``score``.

    Sums may be reordered and products fused, or LLVM could not compute several at once.
    """
    slope = 0.0
    curvature = 0.0
    for j in range(count):
        per_width, preference = inverse_widths[j], preferences[j]
        won, won_bend, lost, lost_bend = hazards_nb((score - known[j]) * per_width)
        slope += ((1.0 - preference) * lost - preference * won) * per_width
        bend = (1.0 - preference) * lost_bend + preference * won_bend
        curvature += bend * (per_width * per_width)
    return slope, curvature


@njit(cache=True, nogil=True, error_model="numpy")
def _minimum_nb(
    prior: float,
    known: NDArray[np.float64],
    inverse_widths: NDArray[np.float64],
    preferences: NDArray[np.float64],
    count: int,
    sigma: float,
    lam: float,
) -> tuple[float, float]:
    """Return one photo's score and std by Newton's method, kept inside a shrinking bracket."""
    score = prior
    slope, curvature = _derivatives_nb(score, known, inverse_widths, preferences, count)
    # The slope never falls, so lam (s - prior)^2 has balanced it within this distance.
    reach = abs(slope) / (2.0 * lam)
    low = prior - reach if slope > 0.0 else prior
    high = prior if slope > 0.0 else prior + reach
    curvature += 2.0 * lam
    step = 2.0 * reach
    for _ in range(_MAX_STEPS):
        if slope > 0.0:
            high = score
        elif slope < 0.0:
            low = score
        following = score - slope / curvature
        if not low <= following <= high or abs(following - score) > 0.5 * step:
            following = low + 0.5 * (high - low)
        step = abs(following - score)
        score = following
        if step <= max(_LAST_STEP * sigma, 2.0 * _EPSILON * abs(score)):
            break
        slope, curvature = _derivatives_nb(score, known, inverse_widths, preferences, count)
        slope += 2.0 * lam * (score - prior)
        curvature += 2.0 * lam
    return score, 1.0 / math.sqrt(curvature)


@njit(cache=True, nogil=True, error_model="numpy")
def _thurstone_few_nb(
    prior: NDArray[np.float64],
    neighbour_scores: NDArray[np.float64],
    neighbour_stds: NDArray[np.float64],
    preferences: NDArray[np.float64],
    sigma: float,
    lam: float,
    score: NDArray[np.float64],
    std: NDArray[np.float64],
) -> None:
    """Solve photos one after the other; what was asked of each is packed side by side first."""
    k = preferences.shape[1]
    known, inverse_widths, answers = np.empty(k), np.empty(k), np.empty(k)
    for i in range(prior.shape[0]):
        count = 0
        for j in range(k):
            if math.isnan(preferences[i, j]):
                continue
            spread = neighbour_stds[i, j]
            known[count] = neighbour_scores[i, j]
            inverse_widths[count] = 1.0 / math.sqrt(sigma * sigma + spread * spread)
            answers[count] = preferences[i, j]
            count += 1
        score[i], std[i] = _minimum_nb(prior[i], known, inverse_widths, answers, count, sigma, lam)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _thurstone_many_nb(
    prior: NDArray[np.float64],
    neighbour_scores: NDArray[np.float64],
    neighbour_stds: NDArray[np.float64],
    preferences: NDArray[np.float64],
    sigma: float,
    lam: float,
    score: NDArray[np.float64],
    std: NDArray[np.float64],
) -> None:
    """Solve blocks of photos side by side."""
    photos = prior.shape[0]
    for block in prange((photos + _BLOCK - 1) // _BLOCK):
        part = slice(block * _BLOCK, min((block + 1) * _BLOCK, photos))
        _thurstone_few_nb(
            prior[part],
            neighbour_scores[part],
            neighbour_stds[part],
            preferences[part],
            sigma,
            lam,
            score[part],
            std[part],
        )


@njit(cache=True, nogil=True, error_model="numpy")
def _in_range_nb(
    neighbour_scores: NDArray[np.float64],
    neighbour_stds: NDArray[np.float64],
    preferences: NDArray[np.float64],
) -> tuple[bool, bool, bool]:
    """Say of preferences, scores and stds whether all are allowed where a preference is given.

    One pass: masks and copies of what was asked take as long in NumPy as solving does.
    """
    answers = scores = spreads = True
    for i in range(preferences.shape[0]):
        for j in range(preferences.shape[1]):
            preference, spread = preferences[i, j], neighbour_stds[i, j]
            unasked = math.isnan(preference)
            answers &= unasked | ((preference >= 0.0) & (preference <= 1.0))
            scores &= unasked | (abs(neighbour_scores[i, j]) < math.inf)
            spreads &= unasked | ((spread >= 0.0) & (spread < math.inf))
    return answers, scores, spreads


def thurstone_map(
    prior: ArrayLike,
    neighbour_scores: ArrayLike,
    neighbour_stds: ArrayLike,
    preferences: ArrayLike,
    sigma: float,
    lam: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find the most probable score of each photo, given how it compares with its neighbours.

    Minimises Σ_j CE(y_j, Φ((s - s_j) / √(σ² + std_j²))) + λ(s - prior)², the exact form of
    ME-IQA's fusion (arXiv 2603.20785) under Thurstone's Case V. The loss is strictly convex, so
    the answer is unique; each photo is solved alone, whatever else is in the batch.

    Args:
        prior: initial scores, ``(B,)``.
        neighbour_scores: known scores s_j, ``(B, K)``; K may be 0.
        neighbour_stds: their standard deviations, ``(B, K)``, not negative.
        preferences: probability y_j in 0–1 that the photo looks better than neighbour j,
            ``(B, K)``. NaN where it was not asked: that neighbour is ignored, whatever its score.
        sigma: spread of one comparison on the scale of the scores, in 1e-9 to 1e9.
        lam: weight of the prior, in 1e-9 to 1e9.

    Returns:
        Scores ``(B,)`` and standard deviations ``(B,)``: one over the root of the loss's second
        derivative at the score. With nothing asked, the prior and ``1 / sqrt(2 * lam)``.

    Raises:
        ValueError: shapes disagree, or a value is outside what is allowed above.

    Example:
        >>> score, std = thurstone_map([3.0], [[2.0, 4.0]], [[0.1, 0.1]], [[0.9, 0.7]], 1.0, 0.1)
        >>> bool(score[0] > 3.0), bool(std[0] < 1.0)
        (True, True)
    """
    if not (_SMALLEST <= sigma <= _LARGEST and _SMALLEST <= lam <= _LARGEST):
        raise ValueError(
            f"sigma and lam must be in {_SMALLEST:g} to {_LARGEST:g}, not {sigma} and {lam}"
        )
    priors = np.ascontiguousarray(prior, dtype=np.float64)
    known = np.ascontiguousarray(neighbour_scores, dtype=np.float64)
    spreads = np.ascontiguousarray(neighbour_stds, dtype=np.float64)
    answers = np.ascontiguousarray(preferences, dtype=np.float64)
    _check_shapes(priors, known, spreads, answers)
    _check_values(priors, known, spreads, answers)
    score, std = np.empty_like(priors), np.empty_like(priors)
    solve = _thurstone_many_nb if len(priors) >= _PARALLEL_FROM else _thurstone_few_nb
    solve(priors, known, spreads, answers, float(sigma), float(lam), score, std)
    return score, std


def _check_shapes(
    prior: NDArray[np.float64],
    neighbour_scores: NDArray[np.float64],
    neighbour_stds: NDArray[np.float64],
    preferences: NDArray[np.float64],
) -> None:
    if prior.ndim != 1 or preferences.ndim != 2 or preferences.shape[0] != prior.shape[0]:
        raise ValueError(
            f"prior must be (B,) and preferences (B, K), not {prior.shape} and {preferences.shape}"
        )
    if not neighbour_scores.shape == neighbour_stds.shape == preferences.shape:
        raise ValueError(
            "neighbour_scores, neighbour_stds and preferences must share one shape (B, K), not "
            f"{neighbour_scores.shape}, {neighbour_stds.shape} and {preferences.shape}"
        )


def _check_values(
    prior: NDArray[np.float64],
    neighbour_scores: NDArray[np.float64],
    neighbour_stds: NDArray[np.float64],
    preferences: NDArray[np.float64],
) -> None:
    if not np.isfinite(prior).all():
        raise ValueError("prior must be finite")
    answers, scores, spreads = _in_range_nb(neighbour_scores, neighbour_stds, preferences)
    if not answers:
        raise ValueError("preferences must be in 0-1, or NaN where not asked")
    if not scores:
        raise ValueError("neighbour_scores must be finite where a preference is given")
    if not spreads:
        raise ValueError("neighbour_stds must be finite and not negative where asked")
