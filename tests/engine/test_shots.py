"""Near-identical shots come together, whatever order they are given in."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import squareform

from meiqa.engine.shots import REACH, SIDE, average_linkage, grouped, likenesses, view_of
from tests.engine.samples import SIZES, picture
from tests.engine.views import at, directions


def names(count: int) -> list[str]:
    return [f"d{number}" for number in range(count)]


@pytest.mark.parametrize("size", [*SIZES, (32, 32), (33, 31), (16, 500)])
def test_a_view_is_what_differs_from_its_surroundings(size: tuple[int, int]) -> None:
    """The thumbnail without its Gaussian mean, as SciPy takes it."""
    photo = picture(8, size)
    # Of a picture of the thumbnail's own size nothing is resized.
    small = photo if size == (SIDE, SIDE) else thumbnail(photo)
    wanted = small - gaussian_filter(small.astype(np.float64), (3.0, 3.0, 0), mode="reflect")
    np.testing.assert_allclose(view_of(photo), wanted, atol=1e-3)


def thumbnail(photo: np.ndarray) -> np.ndarray:
    image = Image.fromarray(photo)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("seed", range(4))
def test_average_linkage_is_scipys(count: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(count, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    for limit in (0.0, 0.3, 0.8, 1.5, 3.0, 10.0):
        groups = average_linkage(distances, limit)
        assert sorted(index for group in groups for index in group) == list(range(count))
        assert all(group == sorted(group) for group in groups)
        assert {frozenset(group) for group in groups} == scipys_groups(distances, limit)


def scipys_groups(distances: np.ndarray, limit: float) -> set[frozenset[int]]:
    if len(distances) == 1:
        return {frozenset({0})}
    made = linkage(squareform(distances, checks=False), method="average")
    labels = fcluster(made, limit, criterion="distance")
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels)}


def test_average_linkage_leaves_its_matrix_alone() -> None:
    distances = np.float32([[0, 1, 9], [1, 0, 9], [9, 9, 0]])
    assert average_linkage(distances, 2.0) == [[0, 1], [2]]
    assert (distances == [[0, 1, 9], [1, 0, 9], [9, 9, 0]]).all()


def test_nobody_is_linked_to_nobody() -> None:
    assert average_linkage(np.zeros((0, 0)), 1.0) == []


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
    views, digests = directions(30, 3), names(30)
    groups = {frozenset(group) for group in grouped(views, digests, 0.9)}
    order = np.random.default_rng(3).permutation(30).tolist()
    again = grouped([views[i] for i in order], [digests[i] for i in order], 0.9)
    assert {frozenset(order[i] for i in group) for group in again} == groups


@pytest.mark.parametrize("block", [7, 29])
def test_blocks_change_nothing(block: int) -> None:
    views = directions(30, 4)
    whole = grouped(views, names(30), 0.9)
    assert grouped(views, names(30), 0.9, block) == whole
    assert len(whole) < 30


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
