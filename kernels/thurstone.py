"""Thurstone Case V scaling of photos, each alone, against neighbours whose scores are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meiqa.kernels import _thurstone
from meiqa.kernels.cores import usable_cores

__all__ = ["thurstone_map"]

# Inside these limits of sigma and lam the bracket closes, whatever the answers.
_SMALLEST, _LARGEST = 1e-9, 1e9
# Starting threads costs more than it saves on fewer photos than this.
_PARALLEL_FROM = 512
_ALLOWED = {
    1: "preferences must be in 0-1, or NaN where not asked",
    2: "neighbour_scores must be finite where a preference is given",
    3: "neighbour_stds must be finite and not negative where asked",
}


def thurstone_map(
    prior: ArrayLike,
    neighbour_scores: ArrayLike,
    neighbour_stds: ArrayLike,
    preferences: ArrayLike,
    sigma: float,
    lam: float,
    *,
    threads: int | None = None,
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
        threads: among which many photos are shared; by default those of this process.

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
    shared_by = (threads or usable_cores()) if len(priors) >= _PARALLEL_FROM else 1
    _thurstone.thurstone_map(
        priors, known, spreads, answers, float(sigma), float(lam), shared_by, score, std
    )
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
    wrong = _thurstone.which_is_out_of_range(neighbour_scores, neighbour_stds, preferences)
    if wrong:
        raise ValueError(_ALLOWED[wrong])
