"""Near-identical shots come together, and the best of them comes first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from meiqa.engine.culling import culled, grouped
from meiqa.engine.manifest import UNCALIBRATED
from meiqa.engine.pipeline import Engine
from meiqa.engine.ranking import Contestant
from meiqa.engine.views import REACH, SIDE, likenesses, view_of
from meiqa.errors import UsageError
from tests.engine.samples import PHOTOS, Picture, picture

NOISE = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 3))
"""Three views that have nothing in common, at any offset."""


def mixed(*rows: Sequence[float]) -> list[np.ndarray]:
    """Views whose likenesses are about the cosines of the rows."""
    return [
        (30 * sum(x * noise for x, noise in zip(row, NOISE, strict=False))).astype(np.float32)
        for row in rows
    ]


def at(*degrees: float) -> list[np.ndarray]:
    angles = np.radians(degrees)
    return mixed(*np.stack([np.cos(angles), np.sin(angles)], 1).tolist())


def directions(count: int, seed: int) -> list[np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(count, 3))
    return mixed(*(rows / np.linalg.norm(rows, axis=1, keepdims=True)).tolist())


def names(count: int) -> list[str]:
    return [f"d{number}" for number in range(count)]


def test_alike_ones_come_together_in_the_order_of_their_first() -> None:
    views = at(90, 0, 5, 180, 92, 3)
    assert grouped(views, names(6), 0.95) == [[0, 4], [1, 2, 5], [3]]


def test_a_drifting_burst_is_not_held_together_by_its_neighbours() -> None:
    """Each is within 10 degrees of the next, and the ends are 90 apart."""
    groups = grouped(at(*range(0, 100, 10)), names(10), 0.95)
    assert len(groups) > 1
    for group in groups:
        assert max(group) - min(group) == len(group) - 1
        assert len(group) <= 5


def test_order_does_not_matter() -> None:
    views, digests = directions(60, 3), names(60)
    groups = {frozenset(group) for group in grouped(views, digests, 0.9)}
    order = np.random.default_rng(3).permutation(60).tolist()
    again = grouped([views[i] for i in order], [digests[i] for i in order], 0.9)
    assert {frozenset(order[i] for i in group) for group in again} == groups


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    views = directions(50, 4)
    whole = grouped(views, names(50), 0.9)
    monkeypatch.setattr("meiqa.engine.culling._BLOCK", 7)
    assert grouped(views, names(50), 0.9) == whole
    assert len(whole) < 50


def test_pictures_without_anything_are_alike_only_if_they_are_the_same() -> None:
    nothing = [view_of(np.full((90, 70, 3), level, np.uint8)) for level in (0, 255, 0)]
    assert grouped(nothing, ["black", "white", "black"], 0.9) == [[0, 2], [1]]


def test_likeness_is_the_slow_and_obvious_one() -> None:
    """Every part of one beside the middle of the other."""
    ones, others = directions(3, 5), directions(4, 6)

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))

    def best(one: np.ndarray, other: np.ndarray) -> float:
        size = SIDE - 2 * REACH
        middle = one[REACH:-REACH, REACH:-REACH]
        starts = range(2 * REACH + 1)
        parts = [other[r : r + size, c : c + size] for r in starts for c in starts]
        return max(cosine(middle, part) for part in parts)

    expected = [[max(best(a, b), best(b, a)) for b in others] for a in ones]
    np.testing.assert_allclose(likenesses(ones, others), expected, atol=1e-5)


def test_a_moved_or_darker_view_is_the_same() -> None:
    photo = picture(3, (480, 480))
    moved, darker = np.roll(photo, (20, -30), (0, 1)), photo // 2
    views = [view_of(each) for each in (photo, moved, darker, picture(4, (480, 480)))]
    found = likenesses(views[:1], views)[0]
    assert found[0] == pytest.approx(1)
    assert found[1] > 0.8
    assert found[2] > 0.98
    assert found[3] < 0.4


def test_nothing_to_group() -> None:
    assert grouped([], [], 0.9) == []


class Eyes:
    """Prefers the larger quality in a photo's tokens, whatever the photo scored alone."""

    def preferences(
        self, first: Contestant, others: Sequence[Contestant], temperature: float
    ) -> np.ndarray:
        gaps = [float(first.tokens.mean() - other.tokens.mean()) for other in others]
        return 1 / (1 + np.exp(-6 * np.array(gaps)))


def shot(path: str, quality: float, alone: float, view: int) -> Contestant:
    tokens = np.full((16, 4), quality, np.float32)
    (shown,) = at(view)
    return Contestant(path, path, tokens, (4, 4), alone, alone, (), f"seen {path}", shown)


def test_the_best_is_found_by_comparing_and_not_by_scores_alone() -> None:
    photos = [
        shot("blurred", 1.0, 3.1, view=1),
        shot("other", 3.0, 3.0, view=90),
        shot("sharp", 4.0, 3.0, view=4),
        shot("shaken", 2.0, 2.9, view=7),
    ]
    first, second = culled(photos, Eyes(), UNCALIBRATED, 0.95)
    assert [photo.path for photo in first] == ["sharp", "shaken", "blurred"]
    assert [photo.place for photo in first] == [1, 2, 3]
    assert [photo.path for photo in second] == ["other"]
    assert first[0].likeness == 1.0
    assert all(0.95 < photo.likeness <= 1.0 + 1e-6 for photo in first)
    assert first[0].summary == "seen sharp"
    assert first[2].alone == 3.1


def shots_of(photo: Picture) -> list[Picture]:
    shaken = gaussian_filter(photo, (2, 2, 0))
    return [photo, np.roll(photo, 2, axis=1), shaken]


def test_an_engine_culls_and_lists_what_it_cannot_judge(engine: Engine) -> None:
    scenes = [picture(seed) for seed in (11, 12)]
    photos = [shot for scene in scenes for shot in shots_of(scene)]
    seen: list[None] = []
    culling = engine.cull([*photos, b"no photo"], k=2, on_photo=lambda: seen.append(None))
    assert [len(group) for group in culling.groups] == [3, 3]
    assert [failure.path for failure in culling.failures] == ["<bytes>"]
    assert len(seen) == 7
    for group in culling.groups:
        assert [photo.place for photo in group] == list(range(1, len(group) + 1))
        assert all(a.score >= b.score - 1e-9 for a, b in itertools.pairwise(group))


def test_copies_are_one_group(engine: Engine) -> None:
    culling = engine.cull([PHOTOS[0], PHOTOS[1], PHOTOS[0]], k=2, alike=1.0)
    assert sorted(map(len, culling.groups)) == [1, 2]


@pytest.mark.parametrize("alike", [0.0, -0.5, 1.5, float("nan")])
def test_likeness_is_a_cosine(engine: Engine, alike: float) -> None:
    with pytest.raises(UsageError, match="cosine"):
        engine.cull([], alike=alike)
