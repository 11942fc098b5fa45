"""The joint solution against its naive twin, and what must hold of any answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.kernels import joint
from meiqa.kernels.joint import thurstone_joint
from meiqa.kernels.thurstone import thurstone_map
from tests import naive

SIGMA = 0.6
Problem = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def problem(count: int, comparisons: int, anchors: int = 0, seed: int = 0) -> Problem:
    """Random photos, the first of them anchors; pairs may be asked twice, answers be certain."""
    rng = np.random.default_rng([seed, count, comparisons, anchors])
    prior = rng.uniform(1, 5, count).round(1)
    weights = rng.uniform(0.02, 2.0, count)
    stds = np.full(count, np.nan)
    stds[:anchors] = rng.choice([0.0, 0.1, 0.4], anchors)
    first = rng.integers(0, count, comparisons)
    second = (first + rng.integers(1, max(count, 2), comparisons)) % count
    preferences = rng.uniform(0, 1, comparisons)
    preferences[rng.uniform(size=comparisons) < 0.1] = 1.0
    preferences[rng.uniform(size=comparisons) < 0.1] = 0.0
    return prior, weights, stds, np.stack([first, second], axis=1), preferences


@pytest.mark.parametrize(
    ("count", "comparisons", "anchors"),
    [(1, 0, 0), (2, 1, 0), (3, 7, 1), (7, 3, 0), (7, 97, 3), (97, 400, 0), (97, 400, 30)],
)
def test_agrees_with_the_naive_twin(count: int, comparisons: int, anchors: int) -> None:
    given_ = problem(count, comparisons, anchors)
    score, std = thurstone_joint(*given_, SIGMA)
    expected_score, expected_std = naive.thurstone_joint(*given_, SIGMA)
    np.testing.assert_allclose(score, expected_score, rtol=0, atol=1e-9)
    np.testing.assert_allclose(std, expected_std, rtol=1e-6)


def test_one_free_photo_among_anchors_is_the_single_solution() -> None:
    rng = np.random.default_rng(3)
    known, spreads = rng.uniform(1, 5, 32), rng.choice([0.0, 0.1, 0.4], 32)
    answers = rng.uniform(0, 1, 32)
    one, one_std = thurstone_map([3.0], known[None], spreads[None], answers[None], SIGMA, 0.05)
    score, std = thurstone_joint(
        np.append(3.0, known),
        np.full(33, 0.05),
        np.append(np.nan, spreads),
        np.stack([np.zeros(32, int), np.arange(1, 33)], axis=1),
        answers,
        SIGMA,
    )
    assert score[0] == pytest.approx(one[0], abs=1e-12)
    assert std[0] == pytest.approx(one_std[0], rel=1e-7)
    np.testing.assert_array_equal(score[1:], known)
    np.testing.assert_array_equal(std[1:], spreads)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 12),
    comparisons=st.integers(0, 40),
    anchors=st.integers(0, 3),
    seed=st.integers(0, 1000),
    sigma=st.floats(0.05, 3),
)
def test_any_problem(count: int, comparisons: int, anchors: int, seed: int, sigma: float) -> None:
    """The gradient vanishes; order doesn't matter; a shift of everything shifts the scores."""
    prior, weights, stds, pairs, answers = problem(
        count, comparisons, min(anchors, count - 1), seed
    )
    score, std = thurstone_joint(prior, weights, stds, pairs, answers, sigma)
    for i in np.flatnonzero(np.isnan(stds)):
        assert slope_of(score, i, (prior, weights, stds, pairs, answers), sigma) == pytest.approx(
            0, abs=1e-7 / sigma**2
        )
    rng = np.random.default_rng(seed)
    items, asked = rng.permutation(count), rng.permutation(comparisons)
    places = np.argsort(items)
    flipped = rng.uniform(size=comparisons) < 0.5
    turned = np.where(flipped[:, None], places[pairs][:, ::-1], places[pairs])[asked]
    mirrored = np.where(flipped, 1 - answers, answers)[asked]
    again = thurstone_joint(prior[items], weights[items], stds[items], turned, mirrored, sigma)
    np.testing.assert_allclose(again[0], score[items], rtol=0, atol=1e-8)
    np.testing.assert_allclose(again[1], std[items], rtol=1e-6)
    shifted, _ = thurstone_joint(prior + 2.5, weights, stds, pairs, answers, sigma)
    np.testing.assert_allclose(shifted, score + 2.5, rtol=0, atol=1e-8)


def slope_of(score: np.ndarray, item: int, given_: Problem, sigma: float) -> float:
    """The loss's derivative by one score, from the slope of a single photo's loss."""
    prior, weights, stds, pairs, answers = given_
    mine = (pairs == item).any(axis=1)
    others = np.where(pairs[mine, 0] == item, pairs[mine, 1], pairs[mine, 0])
    chances = np.where(pairs[mine, 0] == item, answers[mine], 1 - answers[mine])
    spreads = np.where(np.isnan(stds[others]), 0.0, stds[others])
    return naive.thurstone_slope(
        score[item], prior[item], score[others], spreads, chances, sigma, weights[item]
    )


def test_separated_photos_stay_finite() -> None:
    """Everybody always beats the next: only the priors hold them together."""
    chain = np.stack([np.arange(49), np.arange(1, 50)], axis=1)
    score, std = thurstone_joint(
        np.full(50, 3.0), np.full(50, 1e-4), np.full(50, np.nan), chain, np.ones(49), 0.1
    )
    assert np.all(np.diff(score) < 0)
    assert np.isfinite(std).all()
    assert score.mean() == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("anchors", [0, 20])
def test_many_photos_have_nearly_the_exact_deviations(
    anchors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, _, stds, pairs, answers = problem(200, 800, anchors)
    weights = np.full(200, 0.5)
    score, exact = thurstone_joint(prior, weights, stds, pairs, answers, SIGMA)
    monkeypatch.setattr(joint, "EXACT_UP_TO", 0)
    same, near = thurstone_joint(prior, weights, stds, pairs, answers, SIGMA)
    np.testing.assert_array_equal(same, score)
    ratio = near[anchors:] / exact[anchors:]
    assert ratio.max() <= 1 + 1e-9
    assert ratio.min() > 0.9
    assert ratio.mean() > 0.97


def test_deviations_on_a_tree_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    child = np.arange(1, 60)
    pairs = np.stack([child, (child * rng.uniform(0, 1, 59)).astype(int)], axis=1)
    pairs = np.concatenate([pairs, pairs[:7]])  # some are asked twice, which makes no loop
    given_ = (rng.uniform(1, 5, 60), np.full(60, 0.05), np.full(60, np.nan), pairs)
    answers = rng.uniform(0, 1, len(pairs))
    _, exact = thurstone_joint(*given_, answers, SIGMA)
    monkeypatch.setattr(joint, "EXACT_UP_TO", 0)
    _, near = thurstone_joint(*given_, answers, SIGMA)
    np.testing.assert_allclose(near, exact, rtol=1e-9)


def test_only_anchors_are_returned_as_they_are() -> None:
    score, std = thurstone_joint([2.0, 3.0], [1, 1], [0.1, 0.2], [[0, 1]], [0.7], SIGMA)
    assert (score.tolist(), std.tolist()) == ([2.0, 3.0], [0.1, 0.2])


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        (0, np.nan, "prior"),
        (0, np.inf, "prior"),
        (1, 0.0, "weights"),
        (1, np.nan, "weights"),
        (2, -0.1, "known_stds"),
        (2, np.inf, "known_stds"),
        (3, 3, "items 0 to 2"),
        (3, -1, "items 0 to 2"),
        (3, 1, "two different"),
        (4, np.nan, "preferences"),
        (4, 1.5, "preferences"),
    ],
)
def test_impossible_values_are_refused(part: int, value: float, said: str) -> None:
    given_ = [
        np.array([3.0, 2.0, 4.0]),
        np.full(3, 0.5),
        np.array([np.nan, np.nan, 0.1]),
        np.array([[0, 1], [1, 2]]),
        np.array([0.5, 0.5]),
    ]
    given_[part].flat[0] = value
    with pytest.raises(ValueError, match=said):
        thurstone_joint(*given_, SIGMA)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_sigma_must_be_positive(wrong: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        thurstone_joint(*problem(3, 4), wrong)


def test_shapes_must_agree() -> None:
    prior, weights, stds, pairs, answers = problem(3, 4)
    with pytest.raises(ValueError, match="share one shape"):
        thurstone_joint(prior, weights[:2], stds, pairs, answers, SIGMA)
    with pytest.raises(ValueError, match="as pairs are"):
        thurstone_joint(prior, weights, stds, pairs, answers[:3], SIGMA)
