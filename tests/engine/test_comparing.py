"""Pictures are compared in both orders, over prefixes that are read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.comparing import Comparer, PrefixCache, held_bytes
from meiqa.engine.estimates import preferences_of
from meiqa.engine.model import Prefix, VisualTokens
from meiqa.memory import Case
from meiqa.testing import FakeModel
from tests.engine.samples import seen, toned


class Biased(FakeModel):
    """A model that favours what is shown first."""

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        return super().prefer_first(firsts, seconds) + 0.7


def case(quality: float, size: tuple[int, int] = (64, 96)) -> Case:
    tokens = seen(FakeModel(), toned(quality, size=size))
    key = np.ones(2, np.float32)
    return Case(f"{quality}", "anchor", f"{quality}", 3.0, 0.1, "", key, tokens.values, tokens.grid)


def comparer() -> Comparer:
    return Comparer(Biased(), PrefixCache())


@pytest.fixture
def photo() -> Prefix:
    model = FakeModel()
    return model.prefill([seen(model, toned(3.0))])[0]


def test_both_orders_are_asked_and_the_second_is_turned(photo: Prefix) -> None:
    cases = [case(quality) for quality in (1.5, 3.0, 4.5)]
    logits, _ = comparer().ask(photo, cases, both_orders=True)
    assert logits[:, 0] == pytest.approx([3.7, 0.7, -2.3], abs=0.1)
    assert logits[:, 1] == pytest.approx([2.3, -0.7, -3.7], abs=0.1)


@pytest.mark.parametrize(
    ("size", "parts"),
    [((64, 96), [3, 3, 2]), ((32, 96), [3, 3, 2]), ((128, 96), [1] * 8)],
    ids=["as large as the photo", "smaller", "larger"],
)
def test_prefixes_beyond_the_memory_are_read_in_parts(
    size: tuple[int, int], parts: list[int], photo: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case(1.0 + 0.5 * number, size) for number in range(8)]
    wanted, _ = comparer().ask(photo, cases, both_orders=True)
    asked = Comparer(Biased(), PrefixCache(0, 3 * held_bytes(photo)))
    read: list[int] = []
    prefill = Biased.prefill

    def noted(self: Biased, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        read.append(len(pictures))
        return prefill(self, pictures)

    monkeypatch.setattr(Biased, "prefill", noted)
    np.testing.assert_array_equal(asked.ask(photo, cases, both_orders=True)[0], wanted)
    assert read == parts


def test_one_order_leaves_the_other_unasked(photo: Prefix) -> None:
    cases = [case(1.0 + 0.5 * number) for number in range(8)]
    asked = comparer()
    logits, reused = asked.ask(photo, cases, both_orders=False)
    assert np.isnan(logits[:, 1]).all()
    assert (np.diff(logits[:, 0]) < 0).all()
    assert reused == 8 * photo.opening.length
    assert asked.prefixes.state()["neighbours"].misses == 0


def test_nobody_is_compared_with_nobody(photo: Prefix) -> None:
    assert comparer().ask(photo, [], both_orders=True)[0].shape == (0, 2)


def test_prefixes_of_neighbours_are_kept_and_counted(photo: Prefix) -> None:
    asked, cases = comparer(), [case(2.0), case(4.0)]
    tokens = sum(len(each.tokens) for each in cases)
    first, second = (asked.ask(photo, cases, both_orders=True) for _ in range(2))
    assert (first[1], second[1]) == (2 * photo.opening.length, 2 * photo.opening.length + tokens)
    np.testing.assert_array_equal(first[0], second[0])


def test_the_bias_for_the_first_cancels_between_photos_of_a_set() -> None:
    good, bad, same = case(4.0), case(2.0), case(4.0)
    forth = preferences_of(comparer().between(good, [bad, same]), 1.0)
    back = preferences_of(comparer().between(bad, [good]), 1.0)
    assert forth[0] == pytest.approx(1 - back[0])
    assert forth[0] > 0.9
    assert forth[1] == pytest.approx(0.5)


def test_a_photo_of_a_set_is_read_once() -> None:
    asked = comparer()
    asked.between(case(4.0), [case(2.0)])
    asked.between(case(2.0), [case(4.0)])
    state = asked.prefixes.state()["neighbours"]
    assert (state.misses, state.hits) == (2, 2)
