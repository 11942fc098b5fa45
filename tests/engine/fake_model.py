"""A model without files, whose scores follow from the pixels, and a clock that is turned by it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.calibration import UNCALIBRATED, Calibration, ScoreHead
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.model import (
    NEVER,
    Description,
    Draft,
    Floats,
    GenerationStats,
    Prefix,
    StopRule,
    VisualTokens,
)
from meiqa.engine.runtime.decoder import KeyValues
from meiqa.types import quality_word

FAKE_TEXT = "This photo looks {} to a model that has not seen it, and that says so in twenty words."
"""What a `FakeModel` writes."""
FAKE_CALIBRATION = replace(UNCALIBRATED, neighbours=8)


@dataclass
class FakeClock:
    """Seconds that pass only when they are told to, to be injected where a clock is taken.

    >>> clock = FakeClock()
    >>> clock.advance(250.0)
    >>> clock()
    0.25
    """

    seconds: float = 0.0

    def __call__(self) -> float:
        """Give the seconds that have passed."""
        return self.seconds

    def advance(self, ms: float) -> None:
        """Let milliseconds pass."""
        self.seconds += 1e-3 * ms


def mean_brightness(pixels: NDArray[np.uint8]) -> float:
    """Score pixels from 1 for black to 5 for white.

    >>> mean_brightness(np.full((2, 2, 3), 255, np.uint8))
    5.0
    """
    return 1.0 + 4.0 * float(pixels.mean()) / 255.0


class FakeModel:
    """A model that scores by a function of the pixels, in the role of `meiqa.engine.model.Model`.

    What it prints and grades is that score; its text follows from it; it prefers the photo of the
    higher score, the more clearly the further they are apart. Scores are kept in visual tokens, so
    remembered photos have theirs too, to about 0.01.

    Args:
        score: pixels (H, W, 3) → 1-5.
        calibration, head: as in a package.
        clock: that advances with what is asked of it.
        ms: what that takes: "encode", "prefill" and "grade" a picture, "token" of a text, and
            "pair" of pictures; nothing where it is not named.

    Attributes:
        ms: see above, and may be changed.
        calls: how many of each it was asked for, by the same names.

    >>> model = FakeModel()
    >>> (prefix,) = model.prefill([model.encode(np.full((16, 16, 3), 255, np.uint8))])
    >>> model.describe(prefix, 8).text
    'This photo looks excellent to a model that'
    """

    digest = hashlib.sha256(b"fake model").hexdigest()
    image = ImageProcessing(8, 2, 16 * 16, 128 * 128, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    token_pixels = 16
    widths = 2, 5
    summary_tokens = 24

    def __init__(
        self,
        score: Callable[[NDArray[np.uint8]], float] = mean_brightness,
        *,
        calibration: Calibration = FAKE_CALIBRATION,
        head: ScoreHead = "text",
        clock: FakeClock | None = None,
        ms: Mapping[str, float] | None = None,
    ) -> None:
        self.calibration, self.head = calibration, head
        self.calls: dict[str, int] = {}
        self.ms = dict(ms or {})
        self._score, self._clock = score, clock

    def _spend(self, what: str, count: int = 1) -> None:
        self.calls[what] = self.calls.get(what, 0) + count
        if self._clock is not None:
            self._clock.advance(count * self.ms.get(what, 0.0))

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """Keep the score, and the mean colour of each cell, so that pictures can be told apart."""
        self._spend("encode")
        cell = self.token_pixels
        rows, columns = pixels.shape[0] // cell, pixels.shape[1] // cell
        cells = pixels.reshape(rows, cell, columns, cell, 3).mean(axis=(1, 3)) / 127.5 - 1.0
        values = np.ones((rows * columns, self.widths[1]), np.float32)
        values[:, 1] = (self._score(pixels) - 3.0) / 2.0
        values[:, 2:] = cells.reshape(-1, 3)
        return VisualTokens(values, (rows, columns))

    def prefill(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Read pictures; a prefix is one number for each token."""
        self._spend("prefill", len(pictures))
        prefixes = []
        for picture in pictures:
            length = len(picture.values)
            opening = KeyValues(np.zeros((1, 2, 1, length, 1), np.float32), length)
            prefixes.append(Prefix(picture, opening, opening, length))
        return prefixes

    def describe(
        self,
        prefix: Prefix,
        max_tokens: int,
        drafts: Sequence[Draft] = (),
        stop: StopRule = NEVER,
    ) -> Description:
        """Write a text, a token a word, and print the score."""
        score = score_in(prefix.tokens)
        words = FAKE_TEXT.format(quality_word(score)).split()
        written: list[str] = []
        for word in words[:max_tokens]:
            if stop.reached:
                break
            self._spend("token")
            written.append(word)
        count, complete = len(written), len(written) == len(words)
        key = _key_of(score) if written else None
        stats = GenerationStats(count, complete, calls=count)
        return Description(" ".join(written), key, round(score, 2), stats=stats)

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        """Give probabilities whose expectation is the score."""
        self._spend("grade")
        apart = np.abs(np.arange(1.0, 6.0) - score_in(prefix.tokens))
        return np.maximum(1.0 - apart, 0.0)

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        """Give logits that grow with the difference of the scores."""
        self._spend("pair", len(seconds))
        each = list(firsts) * len(seconds) if len(firsts) == 1 else firsts
        gaps = [
            score_in(one.tokens) - score_in(other) for one, other in zip(each, seconds, strict=True)
        ]
        return 2.0 * np.array(gaps, np.float64)

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Write the same text of another score."""
        text = FAKE_TEXT.format(quality_word(score))
        count = len(text.split())
        self._spend("token", count)
        return Description(text, _key_of(score), stats=GenerationStats(count, calls=count))

    def unwritten_key(self, tokens: VisualTokens) -> Floats:
        """Give the key that a description would have."""
        return _key_of(score_in(tokens))

    def close(self) -> None:
        """Let go of nothing."""


def score_in(tokens: VisualTokens) -> float:
    """Read the score that a `FakeModel` keeps in its visual tokens."""
    return min(5.0, max(1.0, 3.0 + 2.0 * float(tokens.values[0, 1])))


def _key_of(score: float) -> Floats:
    """Directions (2,) that are near where scores are."""
    angle = (score - 1.0) * math.pi / 8.0
    return np.array([math.cos(angle), math.sin(angle)], np.float32)
