"""A plain rival on the same features: ridge regression from visual tokens to human scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.benchmarks.accuracy import photos_of
from meiqa.engine.images import load_pixels
from meiqa.engine.judging import fitted_to
from meiqa.engine.vlm import Vlm
from meiqa.errors import UsageError
from meiqa.labels import LabelTable
from meiqa.memory import FEWEST_PHOTOS, Regression, token_features

__all__ = ["features_of", "fitted_regressor"]


def features_of(vlm: Vlm, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features (F,) of the visual tokens of pixels on the tower's grid."""
    return token_features(vlm.encode(pixels).values)


def fitted_regressor(
    vlm: Vlm,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    on_photo: Callable[[], None] = lambda: None,
) -> Regression:
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
        features.append(features_of(vlm, fitted_to(load_pixels(photo), vlm.image)))
        on_photo()
    return Regression.fit(np.array(features), np.array(labels.scores_1_to_5()))[0]
