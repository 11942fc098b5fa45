"""A set of photos is put in order by comparing its photos with each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from meiqa.engine.manifest import UNCALIBRATED
from meiqa.engine.pipeline import Engine
from meiqa.engine.ranking import Contestant, Verdict, order_of, ranked, solved
from meiqa.errors import UsageError
from meiqa.types import Neighbour
from tests.engine.samples import PHOTOS


def entrant(name: str, prior: float, *neighbours: Neighbour) -> Contestant:
    tokens = np.zeros((1, 4), np.float32)
    return Contestant(name, name, tokens, (1, 1), prior, prior, neighbours)


class Eyes:
    """Sees the quality that stands in a photo's name, and notes who was compared."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def preferences(
        self, first: Contestant, others: Sequence[Contestant], temperature: float
    ) -> np.ndarray:
        self.pairs += [(first.path, other.path) for other in others]
        gaps = np.array([float(first.path) - float(other.path) for other in others])
        return 1 / (1 + np.exp(-4 * gaps))


def test_comparisons_mend_the_order() -> None:
    """Two photos were taken for each other alone; compared, they change places."""
    photos = [entrant("4.0", 4.0), entrant("3.5", 2.9), entrant("2.5", 3.1), entrant("1", 1.0)]
    eyes = Eyes()
    places = ranked(photos, eyes, UNCALIBRATED, rivals=2)
    assert [place.path for place in places] == ["4.0", "3.5", "2.5", "1"]
    assert [place.rank for place in places] == [1, 2, 3, 4]
    assert [place.places for place in places] == [0, 1, -1, 0]
    assert [place.compared for place in places] == [1, 2, 2, 1]
    assert eyes.pairs == [("4.0", "2.5"), ("2.5", "3.5"), ("3.5", "1")]
    assert all(later.score <= earlier.score for earlier, later in itertools.pairwise(places))


def test_comparing_narrows_the_scores() -> None:
    photos = [entrant(f"{score:.1f}", score) for score in np.linspace(1, 5, 9)]
    alone = {place.path: place.std for place in ranked(photos, Eyes(), UNCALIBRATED, rivals=0)}
    for place in ranked(photos, Eyes(), UNCALIBRATED, rivals=4):
        assert place.std < alone[place.path]


def test_a_remembered_photo_that_two_were_compared_with_holds_both() -> None:
    anchor = Neighbour("a", "anchor", 3.0, 0.1, 0.9)
    unasked = Neighbour("b", "anchor", 1.0, 0.1, None)
    photos = [entrant("x", 3.0, anchor, unasked), entrant("y", 3.0, anchor)]
    scores, stds = solved(photos, [Verdict(0, 1, 0.5)], UNCALIBRATED)
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0] > 3.0
    assert stds[0] < 1 / np.sqrt(2 * UNCALIBRATED.lam)


def test_equal_scores_keep_their_order() -> None:
    assert order_of([2.0, 3.0, 2.0, 3.0]) == [1, 3, 0, 2]


def test_an_engine_ranks_photos_and_lists_what_it_cannot_judge(engine: Engine) -> None:
    ranking = engine.rank([*PHOTOS[:4], b"no photo"], k=4)
    assert [photo.rank for photo in ranking.photos] == [1, 2, 3, 4]
    assert {photo.compared for photo in ranking.photos} <= {2, 3, 4}
    assert [failure.path for failure in ranking.failures] == ["<bytes>"]
    alone = [engine.score(photo, k=4, learn=False).score for photo in PHOTOS[:4]]
    assert sorted(photo.alone for photo in ranking.photos) == pytest.approx(sorted(alone), abs=1e-3)


def test_the_order_given_does_not_matter(engine: Engine) -> None:
    scores = [photo.score for photo in engine.rank(PHOTOS[:4], k=4).photos]
    again = [photo.score for photo in engine.rank(PHOTOS[:4][::-1], k=4).photos]
    assert scores == pytest.approx(again, abs=1e-3)


def test_nothing_to_rank(engine: Engine) -> None:
    assert engine.rank([]).photos == ()


@pytest.mark.parametrize("rivals", [-2, 3])
def test_there_are_as_many_rivals_before_as_behind(engine: Engine, rivals: int) -> None:
    with pytest.raises(UsageError, match="rivals"):
        engine.rank([], rivals=rivals)
