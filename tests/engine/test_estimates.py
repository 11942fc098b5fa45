"""Estimates of one score are folded into one: nothing changes nothing, and more is surer."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from meiqa.engine.calibration import UNCALIBRATED, Calibration
from meiqa.engine.estimates import (
    Comparisons,
    Doubt,
    Estimate,
    Evidence,
    Posterior,
    before_comparisons,
    combine_correlated,
    fold,
    preferences_of,
    quality_word,
)
from meiqa.errors import UsageError
from tests.naive import thurstone_map

SCORES = np.array([1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5])
STDS = np.full(7, 0.25)


def answers(asked: int) -> np.ndarray:
    """Answers for a photo of about 3.2, the first `asked` of them given."""
    preferences = np.array([0.97, 0.9, 0.8, 0.6, 0.35, 0.15, 0.05])
    preferences[asked:] = np.nan
    return preferences


def compared(
    preferences: np.ndarray,
    prior: tuple[float, float] = (3.0, 0.6),
    calibration: Calibration = UNCALIBRATED,
) -> Posterior:
    """What follows from a first estimate and comparisons with the first neighbours."""
    count = len(preferences)
    comparisons = Comparisons(SCORES[:count], STDS[:count], preferences, calibration)
    return fold([Estimate("prior", *prior), comparisons])


def test_without_answers_the_first_estimate_stands() -> None:
    assert compared(answers(0), (2.37, 0.61)) == Posterior(2.37, 0.61)
    assert compared(np.zeros(0), (2.37, 0.61)) == Posterior(2.37, 0.61)


def test_answers_that_are_missing_are_as_if_not_there() -> None:
    some, only = compared(answers(3), (2.0, 0.6)), compared(answers(3)[:3], (2.0, 0.6))
    assert (some.score, some.std) == pytest.approx((only.score, only.std), abs=1e-9)


def test_the_std_shrinks_with_every_answer() -> None:
    stds = [compared(answers(n)).std for n in range(1, 8)]
    assert all(later < earlier for earlier, later in itertools.pairwise(stds))


def test_better_answers_give_a_better_score() -> None:
    assert compared(answers(7) - 0.04).score < compared(answers(7) + 0.02).score


def test_the_score_is_the_naive_optimum() -> None:
    made = compared(answers(5), (2.2, 0.6))
    wanted, std = thurstone_map(
        np.array([2.2]),
        SCORES[None],
        STDS[None],
        answers(5)[None],
        UNCALIBRATED.sigma,
        UNCALIBRATED.lam,
    )
    assert made.score == pytest.approx(wanted[0], abs=1e-6)
    assert made.std == pytest.approx(std[0], rel=1e-4)


def test_the_std_is_mapped_to_the_observed_one() -> None:
    plain = compared(answers(7))
    mapped = compared(answers(7), calibration=replace(UNCALIBRATED, std_scale=2.0, std_floor=0.3))
    assert mapped.score == plain.score
    assert mapped.std == pytest.approx(np.sqrt(4 * plain.std**2 + 0.09))


@pytest.mark.parametrize("prior", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_score_and_interval_stay_on_the_scale(prior: float, preference: float) -> None:
    posterior = compared(np.full(7, preference), (prior, 0.6))
    low, high = posterior.ci95
    assert 1.0 <= low <= posterior.score <= high <= 5.0


def test_the_interval_is_the_normal_one_inside_the_scale() -> None:
    assert Posterior(3.0, 0.5).ci95 == pytest.approx((3 - 0.98, 3 + 0.98), abs=1e-3)
    assert Posterior(1.1, 1.0).ci95[0] == 1.0
    assert Posterior(4.9, 1.0).ci95[1] == 5.0


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("one", "other"), [(0.5, 0.5), (0.4, 0.8), (1.0, 0.3)])
def test_two_estimates_are_combined_with_the_smallest_variance(
    one: float, other: float, correlation: float
) -> None:
    shares = np.linspace(0, 1, 2001)
    variances = (
        (1 - shares) ** 2 * one**2
        + shares**2 * other**2
        + 2 * shares * (1 - shares) * correlation * one * other
    )
    best = int(np.argmin(variances))
    both = combine_correlated(Posterior(2.0, one), Posterior(4.0, other), correlation)
    assert both.std == pytest.approx(np.sqrt(variances[best]), abs=1e-6)
    assert both.score == pytest.approx(2.0 + 2.0 * shares[best], abs=2e-3)
    assert both.std <= min(one, other) + 1e-12
    folded = fold([Estimate("a", 2.0, one), Estimate("b", 4.0, other, correlation)])
    assert folded == both


def test_two_that_err_exactly_alike_count_as_the_first() -> None:
    first = Posterior(2.0, 0.5)
    assert combine_correlated(first, Posterior(4.0, 0.5), 1.0) == first
    assert combine_correlated(first, Posterior(4.0, 0.9), 1.0) == first


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_that_was_fitted_weighs_scores_and_deviations(share: float) -> None:
    """Errors of answers to one question go together, so their deviations add up."""
    both = fold([Estimate("rating", 2.0, 0.8), Estimate("grade", 4.0, 0.4, share=share)])
    assert both.score == pytest.approx(2.0 + 2.0 * share)
    assert both.std == pytest.approx(0.8 - 0.4 * share)


def test_estimates_are_folded_in_their_order_and_one_more_is_one_more_entry() -> None:
    estimates: list[Evidence] = [
        Estimate("rating", 2.0, 0.6),
        Estimate("grade", 3.0, 0.6, share=0.5),
        Estimate("regression", 4.0, 0.5, correlation=0.5),
        Comparisons(SCORES, STDS, answers(7), UNCALIBRATED),
        Estimate("reference", 1.5, 0.3, correlation=0.2),
    ]
    posterior = fold(estimates[:1])
    for count in range(2, 6):
        posterior = estimates[count - 1].combined(posterior)
        assert fold(estimates[:count]) == posterior
    assert before_comparisons(estimates[:4]) == fold(estimates[:3])


def test_there_is_no_score_without_an_estimate_and_none_of_comparisons_alone() -> None:
    with pytest.raises(UsageError, match="at least one estimate"):
        fold([])
    with pytest.raises(UsageError, match="start from another estimate"):
        fold([Comparisons(SCORES, STDS, answers(7), UNCALIBRATED)])
    with pytest.raises(UsageError, match="a score to be of"):
        fold([Doubt(1.0)])


def test_a_doubt_widens_what_came_before_it_and_moves_no_score() -> None:
    rating, later = Estimate("rating", 3.0, 0.5), Estimate("reference", 4.0, 0.5, share=0.5)
    assert fold([rating, Doubt(1.6)]) == Posterior(3.0, 0.8)
    assert fold([rating, Doubt(1.6), later]) == Posterior(3.5, pytest.approx(0.65))


def test_logits_of_two_orders_are_one_preference() -> None:
    logits = np.array([[1.0, -1.0], [2.0, np.nan], [np.nan, np.nan], [800.0, 800.0], [3.0, 1.0]])
    found = preferences_of(logits, temperature=2.0)
    one = 1 / (1 + np.exp(-np.array([1.0, 1.5, 0.5])))
    assert found == pytest.approx([0.5, one[0], np.nan, 1.0, (one[1] + one[2]) / 2], nan_ok=True)
    assert preferences_of(np.zeros((0, 2)), 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("score", "word"),
    [
        (1.0, "bad"),
        (1.7999, "bad"),
        (1.8, "poor"),
        (2.6, "fair"),
        (3.3999, "fair"),
        (3.4, "good"),
        (4.2, "excellent"),
        (5.0, "excellent"),
        (math.inf, "excellent"),
    ],
)
def test_quality_word(score: float, word: str) -> None:
    assert quality_word(score) == word


def test_nan_has_no_word() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quality_word(math.nan)


def ordered(std: float, scores: np.ndarray, stds: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Neighbours of a photo that is believed to be at 3, so surely if nothing was asked."""
    calibration = replace(UNCALIBRATED, sigma=0.6, lam=0.5 / std**2)
    return Comparisons(scores, stds, asked, calibration).most_informative(3.0)


def test_the_nearest_in_score_tell_most_when_all_are_known_alike() -> None:
    scores = np.array([1.0, 2.9, 4.5, 3.3, 2.0])
    stds, unasked = np.full(5, 0.2), np.full(5, np.nan)
    assert ordered(0.3, scores, stds, unasked)[:3].tolist() == [1, 3, 4]


def test_a_neighbour_whose_own_score_is_vague_tells_less() -> None:
    scores, stds, unasked = np.array([3.0, 3.3]), np.array([2.0, 0.1]), np.full(2, np.nan)
    assert ordered(0.3, scores, stds, unasked).tolist() == [1, 0]


def test_who_was_asked_is_not_asked_again() -> None:
    preferences = np.array([np.nan, 0.5, np.nan])
    scores, stds = np.array([1.0, 3.0, 5.0]), np.full(3, 0.2)
    assert set(ordered(0.3, scores, stds, preferences).tolist()) == {0, 2}
    assert ordered(0.3, scores, stds, np.full(3, 0.5)).tolist() == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), std=st.floats(0.1, 1.5))
def test_the_chosen_shrink_the_variance_most(seed: int, std: float) -> None:
    """No neighbour that was passed over is expected to add clearly more to the curvature."""
    random = np.random.default_rng(seed)
    scores, stds = random.uniform(1, 5, 12), random.uniform(0, 0.5, 12)
    believed = 3.0 + std * random.standard_normal(4000)
    widths = np.hypot(0.6, stds)
    z = (believed[:, None] - scores) / widths
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    added = (density**2 / np.maximum(ndtr(z) * ndtr(-z), 1e-300) / widths**2).mean(axis=0)
    chosen = ordered(std, scores, stds, np.full(12, np.nan))
    assert added[chosen[4:]].max() <= 1.35 * added[chosen[:4]].min()
