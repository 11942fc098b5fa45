"""The Thurstone kernel against its naive twin, and what must hold of any answer."""

from __future__ import annotations

import mpmath
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.kernels.hazards import hazards_nb
from meiqa.kernels.thurstone import thurstone_map
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


@numba.njit
def hazards_of(z: float) -> tuple[float, float, float, float]:
    return hazards_nb(z)


def test_hazards_are_exact_in_both_tails() -> None:
    for z in [*np.linspace(-12, 12, 97), -5.0, -4.999999, -37.0, -1e3, -1e8, 30.0]:
        with mpmath.workdps(60):
            at = mpmath.mpf(float(z))
            hazard = mpmath.npdf(at) / (mpmath.erfc(-at / mpmath.sqrt(2)) / 2)
            bend = hazard * (at + hazard)
        computed = hazards_of(float(z))
        mirrored = hazards_of(-float(z))
        assert computed[:2] == pytest.approx(mirrored[2:], rel=1e-15)
        assert computed[0] == pytest.approx(float(hazard), rel=1e-12)
        assert computed[1] == pytest.approx(float(bend), rel=1e-12)


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


@pytest.mark.parametrize("threads", [1, 2, 3, None])
def test_threads_change_nothing(threads: int | None) -> None:
    batch = photos(1000, 9)
    shared = np.array(thurstone_map(*batch, SIGMA, LAM, threads=threads))
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
