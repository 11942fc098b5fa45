"""A plain rival on the same features: ridge regression from visual tokens to human scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from meiqa.benchmarks.accuracy import photos_of
from meiqa.engine.images import load_pixels
from meiqa.engine.pipeline import fitted_to
from meiqa.engine.vlm import Vlm
from meiqa.errors import UsageError
from meiqa.labels import LabelTable

__all__ = ["PENALTIES", "Ridge", "fitted_ridge", "token_features"]

Floats = NDArray[np.float64]

PENALTIES = tuple(float(penalty) for penalty in np.logspace(-2, 5, 29))
FEWEST_PHOTOS = 10


@dataclass(frozen=True, eq=False)
class Ridge:
    """A linear map of standardised features.

    Attributes:
        centre, scale: (F,) of the features.
        weights: (F,); offset: what the mean photo scores.
        penalty: chosen for the smallest error of each training photo left out.
    """

    centre: Floats
    scale: Floats
    weights: Floats
    offset: float
    penalty: float

    @classmethod
    def fit(cls, features: Floats, scores: Floats) -> Self:
        """Fit features (N, F) to scores (N,), leaving out each photo in turn for the penalty."""
        centre, spread = features.mean(axis=0), features.std(axis=0)
        scale = np.where(spread > 0.0, spread, 1.0)
        offset = float(scores.mean())
        left, singular, right = np.linalg.svd((features - centre) / scale, full_matrices=False)
        seen = left.T @ (scores - offset)

        def error_left_out(penalty: float) -> float:
            shrunk = singular**2 / (singular**2 + penalty)
            residuals = scores - offset - left @ (shrunk * seen)
            leverage = 1.0 / len(scores) + np.sum(left**2 * shrunk, axis=1)
            return float(np.mean((residuals / np.maximum(1.0 - leverage, 1e-9)) ** 2))

        penalty = min(PENALTIES, key=error_left_out)
        weights = right.T @ (singular / (singular**2 + penalty) * seen)
        return cls(centre, scale, weights, offset, penalty)

    def score(self, features: Floats) -> float:
        """Score one photo's features (F,), kept on 1-5."""
        raw = self.offset + float((features - self.centre) / self.scale @ self.weights)
        return min(5.0, max(1.0, raw))


def token_features(vlm: Vlm, pixels: NDArray[np.uint8]) -> Floats:
    """Mean and deviation (2 D,) of the visual tokens of pixels on the tower's grid."""
    tokens = vlm.encode(pixels).values.astype(np.float64)
    return np.concatenate([tokens.mean(axis=0), tokens.std(axis=0)])


def fitted_ridge(
    vlm: Vlm,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    on_photo: Callable[[], None] = lambda: None,
) -> Ridge:
    """Fit a regressor to the photos of a table.

    Raises:
        ImageError: a photo cannot be judged.
        UsageError: there is no such directory, or the table is too short.
    """
    if len(labels) < FEWEST_PHOTOS:
        raise UsageError(
            "too few photos to fit a regressor to", seen=len(labels), allowed=f"{FEWEST_PHOTOS} up"
        )
    features = []
    for photo in photos_of(labels, images_dir):
        features.append(token_features(vlm, fitted_to(load_pixels(photo), vlm.image)))
        on_photo()
    return Ridge.fit(np.array(features), np.array(labels.scores_1_to_5()))
