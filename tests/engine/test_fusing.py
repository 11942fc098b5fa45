"""Fusion: nothing asked changes nothing, and every answer makes the score surer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from meiqa.engine.fusing import Observation, Posterior, fuse, joined
from meiqa.engine.manifest import UNCALIBRATED
from meiqa.memory import Case
from tests.memory.samples import make_case
from tests.naive import thurstone_map

SCORES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)


def cases() -> list[Case]:
    return [make_case(f"n{score}", "anchor", score=score) for score in SCORES]


def answers(asked: int) -> np.ndarray:
    """Answers for a photo of about 3.2, the first `asked` of them given."""
    preferences = np.array([0.97, 0.9, 0.8, 0.6, 0.35, 0.15, 0.05])
    preferences[asked:] = np.nan
    return preferences


@pytest.mark.parametrize("asked", [0])
def test_without_answers_the_first_opinion_stands(asked: int) -> None:
    assert fuse(2.37, 0.61, cases(), answers(asked), UNCALIBRATED) == Posterior(2.37, 0.61)
    assert fuse(2.37, 0.61, [], np.zeros(0), UNCALIBRATED) == Posterior(2.37, 0.61)


def test_answers_that_are_missing_are_as_if_not_there() -> None:
    some = fuse(2.0, 0.6, cases(), answers(3), UNCALIBRATED)
    only = fuse(2.0, 0.6, cases()[:3], answers(3)[:3], UNCALIBRATED)
    assert (some.score, some.std) == pytest.approx((only.score, only.std), abs=1e-9)


def test_the_std_shrinks_with_every_answer() -> None:
    stds = [fuse(3.0, 0.6, cases(), answers(n), UNCALIBRATED).std for n in range(1, 8)]
    assert all(later < earlier for earlier, later in itertools.pairwise(stds))


def test_better_answers_give_a_better_score() -> None:
    low = fuse(3.0, 0.6, cases(), answers(7) - 0.04, UNCALIBRATED)
    high = fuse(3.0, 0.6, cases(), answers(7) + 0.02, UNCALIBRATED)
    assert low.score < high.score


def test_the_score_is_the_naive_optimum() -> None:
    made = fuse(2.2, 0.6, cases(), answers(5), UNCALIBRATED)
    wanted, std = thurstone_map(
        np.array([2.2]),
        np.array([SCORES]),
        np.full((1, 7), 0.25),
        answers(5)[None],
        UNCALIBRATED.sigma,
        UNCALIBRATED.lam,
    )
    assert made.score == pytest.approx(wanted[0], abs=1e-6)
    assert made.std == pytest.approx(std[0], rel=1e-4)


def test_the_std_is_mapped_to_the_observed_one() -> None:
    plain = fuse(3.0, 0.6, cases(), answers(7), UNCALIBRATED)
    mapped = fuse(
        3.0, 0.6, cases(), answers(7), replace(UNCALIBRATED, std_scale=2.0, std_floor=0.3)
    )
    assert mapped.score == plain.score
    assert mapped.std == pytest.approx(np.sqrt(4 * plain.std**2 + 0.09))


@pytest.mark.parametrize("prior", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_score_and_interval_stay_on_the_scale(prior: float, preference: float) -> None:
    posterior = fuse(prior, 0.6, cases(), np.full(7, preference), UNCALIBRATED)
    low, high = posterior.ci95
    assert 1.0 <= low <= posterior.score <= high <= 5.0


def test_the_interval_is_the_normal_one_inside_the_scale() -> None:
    assert Posterior(3.0, 0.5).ci95 == pytest.approx((3 - 0.98, 3 + 0.98), abs=1e-3)
    assert Posterior(1.1, 1.0).ci95[0] == 1.0
    assert Posterior(4.9, 1.0).ci95[1] == 5.0


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("one", "other"), [(0.5, 0.5), (0.4, 0.8), (1.0, 0.3)])
def test_two_observations_are_joined_with_the_smallest_variance(
    one: float, other: float, correlation: float
) -> None:
    first, second = Observation(2.0, one), Observation(4.0, other)
    shares = np.linspace(0, 1, 2001)
    variances = (
        (1 - shares) ** 2 * one**2
        + shares**2 * other**2
        + 2 * shares * (1 - shares) * correlation * one * other
    )
    best = int(np.argmin(variances))
    both = joined(first, second, correlation)
    assert both.std == pytest.approx(np.sqrt(variances[best]), abs=1e-6)
    assert both.score == pytest.approx(2.0 + 2.0 * shares[best], abs=2e-3)
    assert both.std <= min(one, other) + 1e-12


def test_two_that_err_exactly_alike_count_as_the_first() -> None:
    first = Observation(2.0, 0.5)
    assert joined(first, Observation(4.0, 0.5), 1.0) == first
    assert joined(first, Observation(4.0, 0.9), 1.0) == first
