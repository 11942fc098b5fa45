"""What visual tokens alone tell of a score: a ridge regression fitted to the anchors.

A memory of photographs with human scores holds more than neighbours: it shows how the features that
the vision tower makes of such photographs go with what people think of them. The regression is
fitted when a generation of anchors is written, so a memory of one's own photographs brings its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.cases import FloatArray

__all__ = ["FEWEST_PHOTOS", "MOST_PHOTOS", "Regression", "Sample", "token_features"]

Floats = NDArray[np.float64]

PENALTIES = tuple(float(penalty) for penalty in np.logspace(-2, 5, 29))
MOST_STRETCH = 2.0
"""Features that tell nothing give scores that hardly differ; these are not blown up."""
FEWEST_PHOTOS = 50
MOST_PHOTOS = 4096
"""More photographs tell little more, and a fit takes time that grows with their number."""


def token_features(tokens: FloatArray) -> FloatArray:
    """Mean and deviation (2 D,) of visual tokens (T, D).

    >>> token_features(np.float32([[0, 2], [2, 2]])).tolist()
    [1.0, 2.0, 1.0, 0.0]
    """
    wide = tokens.astype(np.float64)
    return np.concatenate([wide.mean(axis=0), wide.std(axis=0)]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Regression:
    """A linear map from the features of a photo to its score.

    Attributes:
        weights: (F,); offset: what features of zeros score.
        std: deviation of the score of a photo from people's, as seen on photographs left out.
    """

    weights: Floats
    offset: float
    std: float

    @classmethod
    def fit(cls, features: FloatArray, scores: Floats) -> tuple[Self, Floats]:
        """Fit features (N, F) to scores (N,), N of `FEWEST_PHOTOS` or more.

        The penalty is the one with the smallest error of each photo left out (in closed form, from
        the leverages). A penalty pulls scores to the middle; they are then spread as wide around
        their mean as people's are, but at most `MOST_STRETCH` times as wide as they were.

        Returns:
            The regression, and the score (N,) that it would give each photo without having seen it.
        """
        wide = features.astype(np.float64)
        centre, spread = wide.mean(axis=0), wide.std(axis=0)
        scale = np.where(spread > 0.0, spread, 1.0)
        mean = float(scores.mean())
        left, singular, right = np.linalg.svd((wide - centre) / scale, full_matrices=False)
        seen = left.T @ (scores - mean)

        def left_out_with(penalty: float) -> Floats:
            shrunk = singular**2 / (singular**2 + penalty)
            residuals = scores - mean - left @ (shrunk * seen)
            leverage = 1.0 / len(scores) + np.sum(left**2 * shrunk, axis=1)
            left_out: Floats = scores - residuals / np.maximum(1.0 - leverage, 1e-9)
            return left_out

        def error_with(penalty: float) -> float:
            return float(np.mean((left_out_with(penalty) - scores) ** 2))

        penalty = min(PENALTIES, key=error_with)
        narrow = left_out_with(penalty)
        stretch = min(MOST_STRETCH, float(scores.std() / max(narrow.std(), 1e-9)))
        weights = right.T @ (singular / (singular**2 + penalty) * seen) / scale * stretch
        left_out = mean + stretch * (narrow - mean)
        std = float(np.sqrt(np.mean((left_out - scores) ** 2)))
        return cls(weights, mean - float(centre @ weights), std), left_out

    def score(self, features: FloatArray) -> float:
        """Score a photo by its features (F,), kept on 1-5."""
        return min(5.0, max(1.0, self.offset + float(features @ self.weights)))

    @property
    def array(self) -> Floats:
        """As it is stored (F + 2,): weights, offset, deviation."""
        return np.array([*self.weights, self.offset, self.std])

    @classmethod
    def of_array(cls, stored: Floats) -> Self:
        """What `array` gave."""
        return cls(np.array(stored[:-2]), float(stored[-2]), float(stored[-1]))


class Sample:
    """Every n-th of the photos shown to it, n such that at most `MOST_PHOTOS` are kept."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, FloatArray, float]] = []
        self._step = 1
        self._shown = 0

    def show(self, name: str, tokens: FloatArray, score: float) -> None:
        """Show visual tokens (T, D) of a photo with its score; one without tokens tells nothing."""
        if not len(tokens):
            return
        if self._shown % self._step == 0:
            self._kept.append((name, token_features(tokens), score))
        self._shown += 1
        if len(self._kept) > MOST_PHOTOS:
            self._kept = self._kept[::2]
            self._step *= 2

    def fitted(self) -> tuple[Regression, dict[str, float]] | None:
        """The regression on what was kept, and what it would say of each photo left out, by name.

        None if too little was shown, or people's scores were all one.
        """
        scores = np.array([score for _, _, score in self._kept])
        if len(scores) < FEWEST_PHOTOS or np.ptp(scores) == 0.0:
            return None
        features = np.array([features for _, features, _ in self._kept])
        regression, left_out = Regression.fit(features, scores)
        names = (name for name, _, _ in self._kept)
        return regression, dict(zip(names, left_out.tolist(), strict=True))
