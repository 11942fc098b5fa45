"""Comparisons of a photo with its neighbours, in waves, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.caches import ByteLru, ContentKey
from meiqa.engine.vlm import ROWS_PER_CALL, Prefix, VisualTokens, Vlm
from meiqa.memory import Case

WAVE = ROWS_PER_CALL
"""Neighbours asked about before the budget is looked at again."""


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
        initial_score: float,
        neighbours: Sequence[Case],
        *,
        both_orders: bool,
        temperature: float,
        go_on: Callable[[NDArray[np.float64], int], bool],
    ) -> Verdicts:
        """Ask about the neighbours nearest in score first, a wave at a time.

        Near scores tell most: the answer there is the least certain beforehand.

        Args:
            go_on: given the preferences so far and the number of neighbours in the next wave,
                says whether it is worth its time.
        """
        distance = [abs(case.score - initial_score) for case in neighbours]
        order = np.argsort(distance, kind="stable")
        logits = np.full((len(neighbours), 2), np.nan)
        asked = reused = 0
        for start in range(0, len(order), WAVE):
            wave = order[start : start + WAVE]
            if not go_on(preferences_of(logits, temperature), len(wave)):
                break
            cases = [neighbours[index] for index in wave]
            logits[wave], saved = self._ask(photo, cases, both_orders)
            asked += len(wave)
            reused += saved
        return Verdicts(logits, preferences_of(logits, temperature), asked, reused)

    def _ask(
        self, photo: Prefix, cases: Sequence[Case], both_orders: bool
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
        self, cases: Sequence[Case], pictures: Sequence[VisualTokens]
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
