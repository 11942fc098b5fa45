"""Comparisons of a photo with its neighbours, in waves, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.caches import ByteLru, ContentKey
from meiqa.engine.vlm import ROWS_BY_THEMSELVES, ROWS_PER_CALL, Prefix, VisualTokens, Vlm
from meiqa.memory import Case

WAVE = ROWS_PER_CALL
"""Neighbours asked about before the budget is looked at again."""


class Pictured(Protocol):
    """What can be compared: a remembered case, or another photo of the same set."""

    @property
    def image_digest(self) -> str:
        """Digest of the pixels."""
        ...

    @property
    def tokens(self) -> NDArray[np.float32]:
        """Visual tokens (T, D)."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        ...


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Answers of "does the photo look better?" for K neighbours.

    Attributes:
        logits: (K, 2) logit of "the photo looks better" with the photo shown first and with it
            shown second; NaN where it was not asked.
        preferences: (K,) the same as one probability, NaN where it was not asked.
        asked: neighbours asked about; reused_tokens: prefix tokens that were not read again.
    """

    logits: NDArray[np.float64]
    preferences: NDArray[np.float64]
    asked: int
    reused_tokens: int


@dataclass
class Comparer:
    """Asks one photo's comparisons; anchors' prefixes are kept between photos.

    Attributes:
        vlm: who answers.
        package_digest: part of the cache keys.
        anchor_prefixes: prefixes of remembered photos.
    """

    vlm: Vlm
    package_digest: str
    anchor_prefixes: ByteLru[Prefix] = field(repr=False)

    def compare(
        self,
        photo: Prefix,
        neighbours: Sequence[Case],
        *,
        both_orders: bool,
        temperature: float,
        next_wave: Callable[[NDArray[np.float64]], NDArray[np.intp]],
    ) -> Verdicts:
        """Ask about neighbours, a wave at a time.

        Args:
            next_wave: given the preferences so far, (K,) with NaN where nothing was asked, says
                whom to ask about next, none to stop.
        """
        logits = np.full((len(neighbours), 2), np.nan)
        asked = reused = 0
        while len(wave := next_wave(preferences_of(logits, temperature))):
            cases = [neighbours[index] for index in wave]
            logits[wave], saved = self._ask(photo, cases, both_orders)
            asked += len(wave)
            reused += saved
        return Verdicts(logits, preferences_of(logits, temperature), asked, reused)

    def preferences(
        self, first: Pictured, others: Sequence[Pictured], temperature: float
    ) -> NDArray[np.float64]:
        """Probability (n,) that one looks better than each of the others, asked in both orders."""
        (prefix,), _ = self._prefixes([first], [VisualTokens(first.tokens, first.grid)])
        logits, _ = self._ask(prefix, others, both_orders=True)
        return preferences_of(logits, temperature)

    def _ask(
        self, photo: Prefix, cases: Sequence[Pictured], both_orders: bool
    ) -> tuple[NDArray[np.float64], int]:
        """Logits (n, 2) of one wave and the prefix tokens that were not read again."""
        pictures = [VisualTokens(case.tokens, case.grid) for case in cases]
        logits = np.full((len(cases), 2), np.nan)
        logits[:, 0] = self.vlm.prefer_first([photo], pictures)
        reused = photo.length * len(cases)
        if both_orders:
            firsts, kept = self._prefixes(cases, pictures)
            logits[:, 1] = -self.vlm.prefer_first(firsts, [photo.tokens] * len(cases))
            reused += kept
        return logits, reused

    def _prefixes(
        self, cases: Sequence[Pictured], pictures: Sequence[VisualTokens]
    ) -> tuple[list[Prefix], int]:
        """The cases' prefixes, read only where they are not kept, and the tokens kept."""
        keys = [ContentKey(c.image_digest, c.grid, self.package_digest) for c in cases]
        found = [self.anchor_prefixes.get(key) for key in keys]
        kept = sum(prefix.length for prefix in found if prefix is not None)
        missing = [index for index, prefix in enumerate(found) if prefix is None]
        read = self.vlm.read([pictures[index] for index in missing])
        for index, prefix in zip(missing, read, strict=True):
            found[index] = prefix
            self.anchor_prefixes.put(keys[index], prefix)
        return [prefix for prefix in found if prefix is not None], kept


def all_in_order(preferences: NDArray[np.float64]) -> NDArray[np.intp]:
    """The next wave where everybody is asked about, as they come: as many as a call takes."""
    return np.flatnonzero(np.isnan(preferences))[:ROWS_BY_THEMSELVES]


def preferences_of(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Probability (K,) that the photo looks better, from logits (K, 2).

    The mean of the two orders where both were asked, which cancels a bias for either place.
    """
    asked = ~np.isnan(logits)
    chances = np.where(asked, sigmoid(np.where(asked, logits, 0.0) / temperature), 0.0)
    answers = asked.sum(axis=1)
    return np.where(answers > 0, chances.sum(axis=1) / np.maximum(answers, 1), np.nan)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function, without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))
