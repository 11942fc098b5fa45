"""Maps of scores, fitted on values whose distribution is known."""

from __future__ import annotations

import numpy as np
import pytest

from meiqa.benchmarks.metrics import js_divergence
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
