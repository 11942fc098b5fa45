"""What two shots of one scene say of each other is fitted on damage that anybody sees."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr

from meiqa.evaluation.scenes import DAMAGES, fitted_verdict, two_shots


@pytest.mark.parametrize("number", range(2 * len(DAMAGES)))
def test_of_two_shots_the_second_is_damaged_more(number: int) -> None:
    photo = np.random.default_rng(0).integers(40, 200, (96, 128, 3), np.uint8)
    for sound, worse in (two_shots(photo, number), two_shots(photo, number)):
        assert sound.shape == worse.shape == (93, 124, 3)
        assert sound.dtype == worse.dtype == np.uint8
        assert not np.array_equal(sound, worse)


def test_evidence_is_weighed_by_how_well_it_tells() -> None:
    """Verdicts are ten times too loud, and the scores alone tell little."""
    rng = np.random.default_rng(1)
    truth = rng.normal(0.0, 1.0, 4000)
    right = np.sign(truth + 1e-9)
    verdicts = 10 * (right * (truth * right + rng.normal(0, 0.3, 4000)))
    gaps = right * (0.1 * truth * right + rng.normal(0, 1.0, 4000))
    found = fitted_verdict(np.stack([verdicts, verdicts], 1) * right[:, None], gaps * right)
    assert found.temperature > 1.0
    loud = fitted_verdict(np.stack([verdicts, verdicts], 1) * right[:, None] / 10, gaps * right)
    assert loud.temperature == pytest.approx(found.temperature / 10, rel=0.05)
    assert found.gap > 2.0


def test_sigma_is_the_scale_on_which_gaps_and_preferences_agree() -> None:
    gaps = np.linspace(0.02, 0.5, 200)
    chances = ndtr(gaps / 0.25)
    logits = np.log(chances / (1 - chances))
    found = fitted_verdict(np.stack([logits, logits], 1), np.zeros(200) + gaps)
    preferences = found.preferences(np.stack([logits, logits], 1), gaps)
    assert (preferences > 0.5).all()
    assert 0.02 <= found.sigma <= 0.25
