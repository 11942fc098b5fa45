"""What two shots of one scene say of each other is fitted on damage that anybody sees."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtri

from meiqa.evaluation.scenes import DAMAGES, fitted_verdict, two_shots

PHOTO = np.random.default_rng(0).integers(60, 190, (96, 128, 3), np.uint8)


def far(one: np.ndarray, other: np.ndarray) -> float:
    """How far the tones of two pictures are from each other, wherever they stand."""
    first, second = (np.quantile(each, np.linspace(0, 1, 65)) for each in (one, other))
    return float(np.abs(first - second).mean())


@pytest.mark.parametrize("number", range(2 * len(DAMAGES)))
def test_of_two_shots_the_second_is_damaged_more(number: int) -> None:
    sound, worse = two_shots(PHOTO, number)
    assert sound.shape == worse.shape == (93, 124, 3)
    assert sound.dtype == worse.dtype == np.uint8
    assert far(worse, PHOTO) > far(sound, PHOTO)
    untouched = any(
        np.array_equal(sound, PHOTO[top : top + 93, left : left + 124])
        for top in range(4)
        for left in range(5)
    )
    assert untouched == (number >= len(DAMAGES))
    again = two_shots(PHOTO, number)
    assert np.array_equal(sound, again[0])
    assert np.array_equal(worse, again[1])


def test_the_smallest_photo_that_is_judged_can_be_shot() -> None:
    for shot in two_shots(PHOTO[:16, :20], 4):
        assert min(shot.shape[:2]) == 16


def pairs(verdict_noise: float, gap_noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits and gaps of 4,000 pairs whose first is the better by 0 to 1, seen through noise."""
    rng = np.random.default_rng(1)
    truth = rng.uniform(0, 1, 4000)
    logits = truth[:, None] + rng.normal(0, verdict_noise, (4000, 1)).repeat(2, axis=1)
    return logits, truth + rng.normal(0, gap_noise, 4000)


def test_the_surer_evidence_weighs_more() -> None:
    by_verdict, by_gap = fitted_verdict(*pairs(0.3, 1.0)), fitted_verdict(*pairs(1.0, 0.3))
    assert by_verdict.temperature < 0.5 * by_verdict.gap
    assert by_gap.gap < 0.5 * by_gap.temperature
    logits, gaps = pairs(0.3, 1.0)
    assert fitted_verdict(10 * logits, gaps).temperature == pytest.approx(
        10 * by_verdict.temperature, rel=1e-3
    )


def test_what_is_always_right_is_not_taken_for_certain() -> None:
    """Pairs that evidence tells apart without a fault would be told ever surer."""
    found = fitted_verdict(np.full((50, 2), 2.0), np.full(50, 0.2))
    assert 0.9 < found.preferences(np.full((1, 2), 2.0), np.full(1, 0.2))[0] < 0.999
    assert found.sigma == pytest.approx(0.2 / ndtri(found.preferences(*one_pair())[0]), rel=1e-6)


def one_pair() -> tuple[np.ndarray, np.ndarray]:
    return np.full((1, 2), 2.0), np.full(1, 0.2)


def test_evidence_that_errs_hardly_counts() -> None:
    logits, gaps = pairs(0.3, 0.3)
    found = fitted_verdict(logits, -gaps)
    assert found.gap > 100 * found.temperature
