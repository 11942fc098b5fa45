"""Maps of scores, fitted on values whose distribution is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.benchmarks.metrics import js_divergence
from meiqa.training.calibrate import Judged, fitted_temperature
from meiqa.training.mapping import matched_logistic


@pytest.mark.parametrize("shrunk", [0.3, 0.6, 1.0])
def test_mapped_scores_are_distributed_like_peoples(shrunk: float) -> None:
    random = np.random.default_rng(7)
    human = np.clip(random.normal(2.9, 0.8, 2000), 1, 5)
    noisy = 0.7 * (human - 2.9) + random.normal(0, 0.5, len(human))
    raw = 3.2 + shrunk * noisy
    mapped = matched_logistic(raw, human)(raw)
    assert mapped.std() == pytest.approx(human.std(), rel=0.05)
    assert mapped.mean() == pytest.approx(human.mean(), abs=0.05)
    assert js_divergence(mapped, human) < 0.05


def test_the_order_of_scores_stays() -> None:
    random = np.random.default_rng(8)
    raw, human = random.uniform(1, 5, 300), random.uniform(1, 5, 300)
    mapped = matched_logistic(raw, human)(np.sort(raw))
    assert (np.diff(mapped) >= 0).all()
    assert len(np.unique(mapped)) > 290


def test_few_distinct_scores_stay_few() -> None:
    raw = np.repeat([2.0, 3.0, 4.0], 50)
    human = np.linspace(1.2, 4.8, 150)
    mapped = np.unique(matched_logistic(raw, human)(raw))
    assert mapped == pytest.approx([1.8, 3.0, 4.2], abs=0.02)


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_preferences_are_as_sure_as_people_are_agreed(scale: float) -> None:
    """Logits are `scale` times the true log-odds of people's order, in both orders of asking."""
    random = np.random.default_rng(9)
    odds = random.normal(0, 2, (400, 8))
    better = random.uniform(size=odds.shape) < 1.0 / (1.0 + np.exp(-odds))
    some = np.full(400, 3.0)
    judged = Judged(
        human=some,
        text=some,
        levels=some,
        memory=some,
        logits=scale * np.stack([odds, odds], axis=2),
        scores=np.where(better, 2.0, 4.0),
        stds=np.full(odds.shape, 0.2),
    )
    assert fitted_temperature(judged) == pytest.approx(scale, rel=0.1)


def test_equal_scores_say_nothing_of_the_temperature() -> None:
    random = np.random.default_rng(10)
    odds = random.normal(0, 2, (300, 4))
    scores = np.where(random.uniform(size=odds.shape) < 1.0 / (1.0 + np.exp(-odds)), 2.0, 4.0)
    some = np.full(300, 3.0)

    def judged(logits: NDArray[np.float64], neighbours: NDArray[np.float64]) -> Judged:
        stds = np.full(neighbours.shape, 0.2)
        return Judged(some, some, some, some, np.stack([logits, logits], axis=2), neighbours, stds)

    sure = np.concatenate([odds, np.full((300, 4), 50.0)], axis=1)
    tied = np.concatenate([scores, np.full((300, 4), 3.0)], axis=1)
    assert fitted_temperature(judged(sure, tied)) == fitted_temperature(judged(odds, scores))
