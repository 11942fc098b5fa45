"""Both Thurstone solutions against their naive twin, and what must hold of any answer."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.kernels import thurstone
from meiqa.kernels._thurstone import inverse_mills_ratios
from meiqa.kernels.thurstone import thurstone_joint, thurstone_map
from tests import naive

SIGMA, LAM = 0.6, 0.05


def photos(count: int, k: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random photos with ties among neighbours, a fifth of the questions not asked."""
    rng = np.random.default_rng(seed)
    prior = rng.uniform(1, 5, count)
    scores = rng.uniform(1, 5, (count, k)).round(1)
    stds = rng.choice([0.0, 0.1, 0.4], (count, k))
    preferences = rng.uniform(0, 1, (count, k))
    preferences[rng.uniform(size=(count, k)) < 0.1] = 1.0
    preferences[rng.uniform(size=(count, k)) < 0.1] = 0.0
    preferences[rng.uniform(size=(count, k)) < 0.2] = np.nan
    return prior, scores, stds, preferences


@pytest.mark.parametrize("count", [1, 3, 7, 97])
@pytest.mark.parametrize("k", [0, 1, 7, 8, 9, 32])
def test_agrees_with_the_naive_twin(count: int, k: int) -> None:
    batch = photos(count, k, seed=count)
    score, std = thurstone_map(*batch, SIGMA, LAM)
    expected_score, expected_std = naive.thurstone_map(*batch, SIGMA, LAM)
    np.testing.assert_allclose(score, expected_score, rtol=0, atol=1e-10)
    np.testing.assert_allclose(std, expected_std, rtol=1e-6)


def test_inverse_mills_ratios_are_exact_in_both_tails() -> None:
    for z in [*np.linspace(-12, 12, 97), -5.0, -4.999999, -37.0, -1e3, -1e8, 30.0]:
        with mpmath.workdps(60):
            at = mpmath.mpf(float(z))
            ratio = mpmath.npdf(at) / (mpmath.erfc(-at / mpmath.sqrt(2)) / 2)
            fall = ratio * (at + ratio)
        computed = inverse_mills_ratios(float(z))
        mirrored = inverse_mills_ratios(-float(z))
        assert computed[:2] == pytest.approx(mirrored[2:], rel=1e-15)
        assert computed[0] == pytest.approx(float(ratio), rel=1e-12)
        assert computed[1] == pytest.approx(float(fall), rel=1e-12)


def test_slope_is_zero_at_the_score() -> None:
    batch = photos(97, 32)
    score, _ = thurstone_map(*batch, SIGMA, LAM)
    for i, row in enumerate(zip(*batch, strict=True)):
        assert naive.thurstone_slope(score[i], *row, SIGMA, LAM) == pytest.approx(0, abs=1e-11)


def test_no_score_nearby_has_a_lower_loss() -> None:
    batch = photos(7, 32)
    score, _ = thurstone_map(*batch, SIGMA, LAM)
    for i, row in enumerate(zip(*batch, strict=True)):
        best = naive.thurstone_loss(score[i], *row, SIGMA, LAM)
        for offset in (-1.0, -1e-3, 1e-3, 1.0):
            assert naive.thurstone_loss(score[i] + offset, *row, SIGMA, LAM) > best


@pytest.mark.parametrize("k", [0, 1, 32])
def test_nothing_asked_leaves_the_prior(k: int) -> None:
    prior = np.array([1.0, 3.25, 5.0])
    nothing = np.full((3, k), np.nan)
    score, std = thurstone_map(prior, nothing, nothing, nothing, SIGMA, LAM)
    np.testing.assert_array_equal(score, prior)
    np.testing.assert_allclose(std, 1 / np.sqrt(2 * LAM), rtol=1e-15)


def test_an_empty_batch_has_an_empty_answer() -> None:
    score, std = thurstone_map([], np.empty((0, 4)), np.empty((0, 4)), np.empty((0, 4)), 1, 1)
    assert score.shape == std.shape == (0,)


def test_unasked_neighbours_change_nothing() -> None:
    prior, scores, stds, preferences = photos(7, 8)
    wider = [np.pad(part, ((0, 0), (0, 3))) for part in (scores, stds, preferences)]
    wider[0][:, 8:] = np.inf
    wider[2][:, 8:] = np.nan
    narrow = thurstone_map(prior, scores, stds, preferences, SIGMA, LAM)
    np.testing.assert_array_equal(narrow, thurstone_map(prior, *wider, SIGMA, LAM))


def test_a_photo_is_scored_alike_in_any_batch_and_on_any_threads() -> None:
    batch = photos(197, 32)
    together = np.array(thurstone_map(*batch, SIGMA, LAM))
    alone = [thurstone_map(*(part[i : i + 1] for part in batch), SIGMA, LAM) for i in range(197)]
    backwards = thurstone_map(*(part[::-1] for part in batch), SIGMA, LAM)
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=1))
    np.testing.assert_array_equal(together, np.array(backwards)[:, ::-1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thurstone, "usable_cores", lambda: threads)
    batch = photos(1000, 9)
    shared = np.array(thurstone_map(*batch, SIGMA, LAM))
    alone = [thurstone_map(*(part[i : i + 1] for part in batch), SIGMA, LAM) for i in range(1000)]
    np.testing.assert_array_equal(shared, np.concatenate(alone, axis=1))


@pytest.mark.parametrize("sigma", [1e-9, 1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("lam", [1e-9, 1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("answer", [0.0, 1e-300, 0.5, 1.0])
def test_unanimous_answers_stay_finite_and_on_their_side(
    sigma: float, lam: float, answer: float
) -> None:
    known, spreads = np.array([[2.0, 4.0, 4.0]]), np.zeros((1, 3))
    score, std = thurstone_map([3.0], known, spreads, np.full((1, 3), answer), sigma, lam)
    row = (3.0, known[0], spreads[0], np.full(3, answer), sigma, lam)
    allowed = 1e-9 * sigma + 1e-12
    assert naive.thurstone_slope(score[0] - allowed, *row) <= 0.0
    assert naive.thurstone_slope(score[0] + allowed, *row) >= 0.0
    assert 0.0 < std[0] <= 1 / np.sqrt(2 * lam) * (1 + 1e-12)
    assert (score[0] - 3.0) * (answer - 0.5) >= 0.0


def test_winning_raises_the_score_and_asking_narrows_it() -> None:
    known, spreads = np.full((5, 4), 3.0), np.full((5, 4), 0.2)
    answers = np.repeat(np.linspace(0, 1, 5)[:, None], 4, axis=1)
    score, std = thurstone_map(np.full(5, 3.0), known, spreads, answers, SIGMA, LAM)
    assert np.all(np.diff(score) > 0)
    assert score[2] == pytest.approx(3.0, abs=1e-12)
    assert np.all(std < 1 / np.sqrt(2 * LAM))


def test_agrees_with_the_closed_form_where_answers_are_moderate() -> None:
    prior, scores = np.array([3.0]), np.array([[2.8, 3.0, 3.1]])
    preferences = np.array([[0.55, 0.5, 0.47]])
    exact, _ = thurstone_map(prior, scores, np.zeros((1, 3)), preferences, 1.0, 1e-6)
    pseudo = naive.thurstone_closed_form(prior, scores, preferences, 1.0, 1e-6)
    assert exact[0] == pytest.approx(pseudo[0], abs=5e-3)


def test_saturates_where_the_closed_form_runs_away() -> None:
    """Winning surely against a far worse photo is no news; pseudo-observations take it for some."""
    prior, scores, preferences = np.array([4.5]), np.array([[1.0]]), np.array([[0.99]])
    exact, _ = thurstone_map(prior, scores, np.zeros((1, 1)), preferences, 0.5, 0.01)
    pseudo = naive.thurstone_closed_form(prior, scores, preferences, 0.5, 0.01)
    assert abs(exact[0] - 4.5) < abs(pseudo[0] - 4.5)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (0, np.inf),
        (0, np.nan),
        (1, np.inf),
        (1, np.nan),
        (2, np.inf),
        (2, np.nan),
        (2, -0.1),
        (3, np.inf),
        (3, -np.inf),
        (3, 1.5),
        (3, -1e-9),
    ],
)
def test_impossible_values_are_refused(part: int, value: float) -> None:
    batch = [np.array([3.0]), np.full((1, 2), 3.0), np.full((1, 2), 0.1), np.full((1, 2), 0.5)]
    batch[part].flat[0] = value
    with pytest.raises(ValueError, match=r"must be"):
        thurstone_map(*batch, SIGMA, LAM)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_sigma_and_lam_must_be_positive(wrong: float) -> None:
    batch = photos(3, 2)
    with pytest.raises(ValueError, match="sigma and lam"):
        thurstone_map(*batch, wrong, LAM)
    with pytest.raises(ValueError, match="sigma and lam"):
        thurstone_map(*batch, SIGMA, wrong)


def test_shapes_must_agree() -> None:
    prior, scores, stds, preferences = photos(3, 2)
    with pytest.raises(ValueError, match=r"\(B,\)"):
        thurstone_map(prior[:2], scores, stds, preferences, SIGMA, LAM)
    with pytest.raises(ValueError, match="share one shape"):
        thurstone_map(prior, scores[:, :1], stds, preferences, SIGMA, LAM)


@settings(max_examples=60, deadline=None)
@given(
    prior=st.floats(1, 5),
    rows=st.lists(
        st.tuples(st.floats(1, 5), st.floats(0, 2), st.floats(0, 1)), min_size=1, max_size=8
    ),
    sigma=st.floats(0.05, 3),
    lam=st.floats(1e-4, 10),
)
def test_any_answers_give_the_minimum(
    prior: float, rows: list[tuple[float, float, float]], sigma: float, lam: float
) -> None:
    scores, stds, preferences = (np.array([column]) for column in zip(*rows, strict=True))
    score, std = thurstone_map([prior], scores, stds, preferences, sigma, lam)
    row = (prior, scores[0], stds[0], preferences[0], sigma, lam)
    assert naive.thurstone_slope(score[0] - 1e-8, *row) <= 0.0
    assert naive.thurstone_slope(score[0] + 1e-8, *row) >= 0.0
    assert 0.0 < std[0] <= 1 / np.sqrt(2 * lam) * (1 + 1e-12)


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
    [
        *((1, 0, 0), (2, 1, 0), (3, 7, 1), (7, 3, 0), (7, 97, 3), (97, 400, 0), (97, 400, 30)),
        *((96, 3200, 0), (201, 900, 20)),
    ],
)
def test_the_joint_solution_agrees_with_the_naive_twin(
    count: int, comparisons: int, anchors: int
) -> None:
    given_ = problem(count, comparisons, anchors)
    score, std = thurstone_joint(*given_, SIGMA)
    expected_score, expected_std = naive.thurstone_joint(*given_, SIGMA)
    np.testing.assert_allclose(score, expected_score, rtol=0, atol=1e-9)
    np.testing.assert_allclose(std, expected_std, rtol=1e-6)
    np.testing.assert_array_equal(thurstone_joint(*given_, SIGMA), (score, std))


@pytest.mark.parametrize(
    ("count", "comparisons", "anchors"), [(2, 1, 0), (7, 97, 3), (97, 400, 30)]
)
def test_each_comparison_may_have_its_own_spread_and_count(
    count: int, comparisons: int, anchors: int
) -> None:
    given_, rng = problem(count, comparisons, anchors), np.random.default_rng(8)
    sigma, counts = rng.uniform(0.1, 2.0, comparisons), rng.uniform(0.1, 30.0, comparisons)
    score, std = thurstone_joint(*given_, sigma, counts=counts)
    expected_score, expected_std = naive.thurstone_joint(*given_, sigma, counts)
    np.testing.assert_allclose(score, expected_score, rtol=0, atol=1e-9)
    np.testing.assert_allclose(std, expected_std, rtol=1e-6)


def test_a_comparison_that_counts_twice_is_two() -> None:
    prior, weights, stds, pairs, answers = problem(7, 20, 1)
    twice = thurstone_joint(prior, weights, stds, pairs, answers, SIGMA, counts=2.0)
    both = np.repeat(pairs, 2, axis=0), np.repeat(answers, 2)
    np.testing.assert_allclose(
        twice, thurstone_joint(prior, weights, stds, *both, SIGMA), atol=1e-9
    )


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
def test_any_joint_problem(
    count: int, comparisons: int, anchors: int, seed: int, sigma: float
) -> None:
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
def test_many_photos_have_nearly_the_exact_deviations(anchors: int) -> None:
    prior, _, stds, pairs, answers = problem(200, 800, anchors)
    weights = np.full(200, 0.5)
    score, exact = thurstone_joint(prior, weights, stds, pairs, answers, SIGMA)
    same, near = thurstone_joint(prior, weights, stds, pairs, answers, SIGMA, exact_up_to=0)
    np.testing.assert_array_equal(same, score)
    ratio = near[anchors:] / exact[anchors:]
    assert ratio.max() <= 1 + 1e-9
    assert ratio.min() > 0.9
    assert ratio.mean() > 0.97


def test_deviations_on_a_tree_are_exact() -> None:
    rng = np.random.default_rng(5)
    child = np.arange(1, 60)
    pairs = np.stack([child, (child * rng.uniform(0, 1, 59)).astype(int)], axis=1)
    pairs = np.concatenate([pairs, pairs[:7]])  # some are asked twice, which makes no loop
    given_ = (rng.uniform(1, 5, 60), np.full(60, 0.05), np.full(60, np.nan), pairs)
    answers = rng.uniform(0, 1, len(pairs))
    _, exact = thurstone_joint(*given_, answers, SIGMA)
    _, near = thurstone_joint(*given_, answers, SIGMA, exact_up_to=0)
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
def test_impossible_values_are_refused_together(part: int, value: float, said: str) -> None:
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
def test_sigma_and_counts_must_be_positive_together(wrong: float) -> None:
    one_wrong = np.array([1.0, 1.0, wrong, 1.0])
    for sigma in (wrong, one_wrong):
        with pytest.raises(ValueError, match="sigma must be in"):
            thurstone_joint(*problem(3, 4), sigma)
    for counts in (wrong, one_wrong):
        with pytest.raises(ValueError, match="counts must be in"):
            thurstone_joint(*problem(3, 4), SIGMA, counts=counts)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1,)])
def test_sigma_and_counts_are_one_for_all_or_one_each(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sigma must be one for all"):
        thurstone_joint(*problem(3, 4), np.ones(shape))
    with pytest.raises(ValueError, match="counts must be one for all"):
        thurstone_joint(*problem(3, 4), SIGMA, counts=np.ones(shape))


def test_shapes_must_agree_together() -> None:
    prior, weights, stds, pairs, answers = problem(3, 4)
    with pytest.raises(ValueError, match="share one shape"):
        thurstone_joint(prior, weights[:2], stds, pairs, answers, SIGMA)
    with pytest.raises(ValueError, match="as pairs are"):
        thurstone_joint(prior, weights, stds, pairs, answers[:3], SIGMA)
