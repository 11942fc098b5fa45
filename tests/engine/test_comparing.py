"""Whom to ask is decided wave by wave; photos of a set are compared like remembered ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.caches import ByteLru
from meiqa.engine.comparing import WAVE, Comparer, all_in_order
from meiqa.engine.vlm import Prefix, VisualTokens, Vlm
from meiqa.memory import Case


class Honest:
    """Sees the quality in the first visual token, and is biased towards what is shown first."""

    def read(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        return [Prefix(np.zeros((1, 2, 1, 3, 4), np.float32), each, 3) for each in pictures]

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        all_firsts = [*firsts] * (len(seconds) if len(firsts) == 1 else 1)
        gaps = [
            first.tokens.values[0, 0] - second.values[0, 0]
            for first, second in zip(all_firsts, seconds, strict=True)
        ]
        return np.array(gaps, np.float64) + 0.7


def case(quality: float) -> Case:
    tokens = np.full((1, 4), quality, np.float32)
    return Case(f"{quality}", "anchor", f"{quality}", 3.0, 0.1, "", tokens[0], tokens, (1, 1))


def comparer() -> Comparer:
    return Comparer(cast(Vlm, Honest()), "p", ByteLru(1 << 20))


PHOTO = Prefix(
    np.zeros((1, 2, 1, 3, 4), np.float32), VisualTokens(np.full((1, 4), 3.0, np.float32), (1, 1)), 3
)


def test_only_those_who_are_chosen_are_asked_about() -> None:
    cases = [case(1.0 + 0.5 * number) for number in range(8)]
    waves = iter([[6, 2], [0], []])
    seen: list[int] = []

    def next_wave(preferences: NDArray[np.float64]) -> NDArray[np.intp]:
        seen.append(int((~np.isnan(preferences)).sum()))
        return np.array(next(waves), np.intp)

    verdicts = comparer().compare(
        PHOTO, cases, both_orders=True, temperature=1.0, next_wave=next_wave
    )
    assert seen == [0, 2, 3]
    assert np.flatnonzero(~np.isnan(verdicts.preferences)).tolist() == [0, 2, 6]
    assert verdicts.asked == 3


def test_everybody_is_asked_once_in_waves() -> None:
    cases = [case(1.0 + 0.1 * number) for number in range(2 * WAVE + 3)]
    verdicts = comparer().compare(
        PHOTO, cases, both_orders=False, temperature=1.0, next_wave=all_in_order
    )
    assert verdicts.asked == len(cases)
    assert not np.isnan(verdicts.preferences).any()
    assert np.all(np.diff(verdicts.preferences) < 0)


def test_the_bias_for_the_first_cancels_between_photos_of_a_set() -> None:
    good, bad, same = case(4.0), case(2.0), case(4.0)
    forth = comparer().preferences(good, [bad, same], 1.0)
    back = comparer().preferences(bad, [good], 1.0)
    assert forth[0] == pytest.approx(1 - back[0])
    assert forth[1] == pytest.approx(0.5)


def test_a_photo_of_a_set_is_read_once() -> None:
    asked = comparer()
    asked.preferences(case(4.0), [case(2.0)], 1.0)
    asked.preferences(case(2.0), [case(4.0)], 1.0)
    state = asked.anchor_prefixes.state
    assert (state.misses, state.hits) == (2, 2)
