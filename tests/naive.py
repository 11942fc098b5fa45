"""The slow, obvious twin of every kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr, ndtri

Floats = NDArray[np.float64]


def pixels_to_patches(
    pixels: NDArray[np.uint8],
    patch: int,
    merge: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    temporal: int = 1,
) -> NDArray[np.float32]:
    """Cut patches by slicing, one window after the other."""
    image = (pixels / 255.0 - np.array(mean)) / np.array(std)
    rows = []
    for window_y in range(0, pixels.shape[0], patch * merge):
        for window_x in range(0, pixels.shape[1], patch * merge):
            for y in range(window_y, window_y + patch * merge, patch):
                for x in range(window_x, window_x + patch * merge, patch):
                    planes = image[y : y + patch, x : x + patch].transpose(2, 0, 1)
                    rows.append(np.repeat(planes[:, None], temporal, axis=1).ravel())
    return np.array(rows, dtype=np.float32)


def thurstone_loss(
    score: float,
    prior: float,
    neighbour_scores: Floats,
    neighbour_stds: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
) -> float:
    """Return the loss that the kernel minimises, for one photo, ``(K,)`` neighbours."""
    loss = lam * (score - prior) ** 2
    for known, spread, preference in zip(
        neighbour_scores, neighbour_stds, preferences, strict=True
    ):
        if np.isnan(preference):
            continue
        z = (score - known) / np.sqrt(sigma**2 + spread**2)
        loss -= preference * log_ndtr(z) + (1.0 - preference) * log_ndtr(-z)
    return float(loss)


def thurstone_slope(
    score: float,
    prior: float,
    neighbour_scores: Floats,
    neighbour_stds: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
) -> float:
    """Return the loss's derivative, for one photo, ``(K,)`` neighbours."""
    slope = 2.0 * lam * (score - prior)
    for known, spread, preference in zip(
        neighbour_scores, neighbour_stds, preferences, strict=True
    ):
        if np.isnan(preference):
            continue
        width = np.sqrt(sigma**2 + spread**2)
        z = (score - known) / width
        slope += ((1.0 - preference) * hazard(-z) - preference * hazard(z)) / width
    return float(slope)


def hazard(z: float) -> float:
    """Return φ(z)/Φ(z)."""
    return float(np.sqrt(2.0 / np.pi) / erfcx(-z / np.sqrt(2.0)))


def thurstone_map(
    prior: Floats,
    neighbour_scores: Floats,
    neighbour_stds: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
) -> tuple[Floats, Floats]:
    """Find each photo's root of the slope by Brent's method, the curvature by differences."""
    scores, stds = [], []
    for i in range(len(prior)):
        rest = (prior[i], neighbour_scores[i], neighbour_stds[i], preferences[i], sigma, lam)
        reach = 1.0
        while thurstone_slope(prior[i] - reach, *rest) > 0.0:
            reach *= 2.0
        while thurstone_slope(prior[i] + reach, *rest) < 0.0:
            reach *= 2.0
        low, high = prior[i] - reach, prior[i] + reach
        score = brentq(thurstone_slope, low, high, args=rest, xtol=1e-14, rtol=1e-14)
        h = 1e-4 * sigma
        rise = thurstone_slope(score + h, *rest) - thurstone_slope(score - h, *rest)
        scores.append(score)
        stds.append(1.0 / np.sqrt(rise / (2.0 * h)))
    return np.array(scores), np.array(stds)


def thurstone_closed_form(
    prior: Floats,
    neighbour_scores: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
    clip: float = 0.01,
) -> Floats:
    """Average each photo's probit pseudo-observations s_j + σΦ⁻¹(y_j) with its prior.

    ME-IQA's closed form; y is clipped, because Φ⁻¹ diverges at 0 and 1.
    """
    asked = ~np.isnan(preferences)
    clipped = np.clip(np.where(asked, preferences, 0.5), clip, 1.0 - clip)
    observations = np.where(asked, neighbour_scores + sigma * ndtri(clipped), 0.0)
    fused: Floats = (observations.sum(axis=1) + lam * prior) / (asked.sum(axis=1) + lam)
    return fused
