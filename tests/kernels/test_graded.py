"""The graded response: probabilities beside the slow twin, and one mode wherever the ability is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.kernels.graded import (
    LEAST_STEP,
    grade_log_probabilities,
    grade_moments,
    grade_probabilities,
    multimodal,
    soft_grades,
)
from tests import naive

ABILITIES = st.floats(-1e9, 1e9) | st.floats(-20, 20)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 97])
@pytest.mark.parametrize(("a", "first", "step"), [(1.0, -1.5, 1.2), (3.0, 0.7, 0.4), (40, 2.0, 9)])
def test_probabilities_are_the_twins(count: int, a: float, first: float, step: float) -> None:
    abilities = np.random.default_rng(count).normal(0, 3, count)
    made = grade_probabilities(abilities, a, first, step)
    assert made.shape == (count, 5)
    assert made.sum(axis=1) == pytest.approx(1.0, abs=1e-14)
    for row, ability in zip(made, abilities, strict=True):
        assert row == pytest.approx(naive.grade_probabilities(ability, a, first, step), abs=1e-14)


def test_a_row_is_the_same_in_any_company() -> None:
    abilities = np.random.default_rng(0).normal(0, 3, 97)
    together = grade_probabilities(abilities, 2.0, -1.0, 0.8)
    for at in (0, 50, 96):
        assert (grade_probabilities(abilities[at : at + 1], 2.0, -1.0, 0.8) == together[at]).all()


@settings(deadline=None)
@given(
    ability=ABILITIES,
    first=st.floats(-50, 50),
    discrimination=st.floats(1e-3, 1e3),
    gap=st.floats(LEAST_STEP, 1e3),
)
def test_no_ability_gives_two_modes(
    ability: float, first: float, discrimination: float, gap: float
) -> None:
    (row,) = grade_probabilities([ability], discrimination, first, gap / discrimination)
    assert (row >= 0.0).all()
    assert row.sum() == pytest.approx(1.0, abs=1e-12)
    assert not multimodal([row])[0]


def test_the_bound_is_tight() -> None:
    """Just below ln 3 some ability has two modes; at 0.96, where both ends win together, many."""
    abilities = np.linspace(-6, 6, 200_001)

    def share(gap: float) -> float:
        return float(np.mean(multimodal(np.exp(grade_log_probabilities(abilities, gap)))))

    assert share(LEAST_STEP) == 0.0
    assert share(LEAST_STEP - 1e-3) > 0.0
    assert share(2 * math.log((1 + math.sqrt(5)) / 2)) > 0.05


def test_parameters_that_could_give_two_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="ln 3"):
        grade_probabilities([0.0], 1.0, 0.0, 1.09)


@pytest.mark.parametrize(
    ("ability", "parameters"),
    [
        ([np.nan], (2.0, 0.0, 1.0)),
        ([np.inf], (2.0, 0.0, 1.0)),
        ([[0.0]], (2.0, 0.0, 1.0)),
        ([0.0], (-2.0, 0.0, -1.0)),
        ([0.0], (2.0, np.nan, 1.0)),
        ([0.0], (2.0, 0.0, np.inf)),
    ],
)
def test_what_makes_no_sense_is_refused(
    ability: list[float], parameters: tuple[float, float, float]
) -> None:
    with pytest.raises(ValueError, match=r"finite|above 0"):
        grade_probabilities(ability, *parameters)


def test_small_probabilities_keep_their_digits() -> None:
    (row,) = grade_probabilities([-40.0], 1.0, 0.0, 2.0)
    expected = [-40.0 - 2.0 * k + (math.log1p(-math.exp(-2.0)) if k < 3 else 0) for k in range(4)]
    assert np.log(row[1:]) == pytest.approx(expected, rel=1e-12)
    assert np.log(row) == pytest.approx(
        grade_log_probabilities(np.array([-40.0]), 2.0)[0], rel=1e-12
    )


def test_logarithms_stay_finite() -> None:
    logs = grade_log_probabilities(np.array([-1e5, 1e5]), 2.0)
    assert np.isfinite(logs).all()
    assert logs.argmax(axis=1).tolist() == [0, 4]


def test_moments_are_those_of_the_grades() -> None:
    rows = np.random.default_rng(3).dirichlet(np.ones(5), 97)
    expectation, variance = grade_moments(rows)
    grades = np.arange(1, 6)
    assert expectation == pytest.approx(rows @ grades)
    assert variance == pytest.approx(rows @ grades**2 - (rows @ grades) ** 2)


@settings(deadline=None)
@given(low=st.floats(-30, 30), above=st.floats(1e-3, 30), gap=st.floats(LEAST_STEP, 30))
def test_a_higher_ability_is_a_higher_expectation(low: float, above: float, gap: float) -> None:
    expectation, _ = grade_moments(grade_probabilities([low, low + above], 1.0, 0.0, gap))
    assert expectation[1] >= expectation[0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=5, max_size=5).filter(any))
def test_modes_are_counted_as_by_hand(votes: list[int]) -> None:
    row = np.array(votes, np.float64) / sum(votes)
    assert multimodal([row])[0] == (naive.modes(row) > 1)


def test_a_shallow_dip_counts_only_if_it_is_asked_for() -> None:
    row = [0.1, 0.3, 0.295, 0.3, 0.005]
    assert multimodal([row]).tolist() == [True]
    assert multimodal([row], depth=0.01).tolist() == [False]


def test_other_numbers_of_grades_are_refused() -> None:
    for takes_grades in (multimodal, grade_moments):
        with pytest.raises(ValueError, match=r"\(B, 5\)"):
            takes_grades([[0.5, 0.5]])


def test_soft_grades_have_the_mean_of_the_scores() -> None:
    scores = np.random.default_rng(4).uniform(1, 5, 97)
    shares = soft_grades(scores)
    assert grade_moments(shares)[0] == pytest.approx(scores)
    assert (np.count_nonzero(shares, axis=1) <= 2).all()
    assert soft_grades([0.2, 5.7]).tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
