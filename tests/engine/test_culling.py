"""Near-identical shots come together, and the best of them comes first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from meiqa.engine.culling import culled, grouped
from meiqa.engine.package import UNCALIBRATED
from meiqa.engine.pipeline import Engine
from meiqa.engine.ranking import Contestant
from meiqa.errors import UsageError
from tests.engine.samples import PHOTOS, Picture, picture


def units(*rows: Sequence[float]) -> list[np.ndarray]:
    vectors = np.array(rows, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return list(vectors / np.where(lengths > 0, lengths, 1))


def at(*degrees: float) -> list[np.ndarray]:
    angles = np.radians(degrees)
    return units(*np.stack([np.cos(angles), np.sin(angles)], 1).tolist())


def names(count: int) -> list[str]:
    return [f"d{number}" for number in range(count)]


def test_alike_ones_come_together_in_the_order_of_their_first() -> None:
    layouts = at(90, 0, 5, 180, 92, 3)
    assert grouped(layouts, names(6), 0.95) == [[0, 4], [1, 2, 5], [3]]


def test_a_drifting_burst_is_not_held_together_by_its_neighbours() -> None:
    """Each is within 10 degrees of the next, and the ends are 90 apart."""
    groups = grouped(at(*range(0, 100, 10)), names(10), 0.95)
    assert len(groups) > 1
    for group in groups:
        assert max(group) - min(group) == len(group) - 1
        assert len(group) <= 5


def test_order_does_not_matter() -> None:
    random = np.random.default_rng(3)
    layouts = units(*random.normal(size=(60, 3)).tolist())
    digests = names(60)
    groups = {frozenset(group) for group in grouped(layouts, digests, 0.9)}
    order = random.permutation(60).tolist()
    again = grouped([layouts[i] for i in order], [digests[i] for i in order], 0.9)
    assert {frozenset(order[i] for i in group) for group in again} == groups


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = units(*np.random.default_rng(4).normal(size=(50, 3)).tolist())
    whole = grouped(layouts, names(50), 0.9)
    monkeypatch.setattr("meiqa.engine.culling._BLOCK", 7)
    assert grouped(layouts, names(50), 0.9) == whole
    assert len(whole) < 50


def test_pictures_without_layout_are_alike_only_if_they_are_the_same() -> None:
    nothing = [np.zeros(2, np.float32)] * 3
    assert grouped(nothing, ["black", "white", "black"], 0.9) == [[0, 2], [1]]


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
    random = np.random.default_rng(view)
    tokens = random.normal(size=(16, 4)).astype(np.float32)
    tokens += np.float32(quality - tokens.mean())
    return Contestant(path, f"{path}{quality}", tokens, (4, 4), alone, alone, (), f"seen {path}")


def test_the_best_is_found_by_comparing_and_not_by_scores_alone() -> None:
    photos = [
        shot("blurred", 1.0, 3.1, view=1),
        shot("other", 3.0, 3.0, view=2),
        shot("sharp", 4.0, 3.0, view=1),
        shot("shaken", 2.0, 2.9, view=1),
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
    assert sum(map(len, culling.groups)) == 6
    assert [failure.path for failure in culling.failures] == ["<bytes>"]
    assert len(seen) == 7
    for group in culling.groups:
        assert [photo.place for photo in group] == list(range(1, len(group) + 1))
        assert all(a.score >= b.score - 1e-9 for a, b in zip(group, group[1:], strict=False))


def test_copies_are_one_group(engine: Engine) -> None:
    culling = engine.cull([PHOTOS[0], PHOTOS[1], PHOTOS[0]], k=2, alike=1.0)
    assert sorted(map(len, culling.groups)) == [1, 2]


@pytest.mark.parametrize("alike", [0.0, -0.5, 1.5, float("nan")])
def test_likeness_is_a_cosine(engine: Engine, alike: float) -> None:
    with pytest.raises(UsageError, match="cosine"):
        engine.cull([], alike=alike)
