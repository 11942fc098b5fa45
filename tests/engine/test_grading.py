"""What the grade words say, through each head."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from meiqa.engine.grading import centred_levels, graded_response, grading_of
from meiqa.engine.manifest import (
    IDENTITY,
    NEUTRAL_GRADED,
    UNCALIBRATED,
    Calibration,
    GradedHead,
    Logistic,
    check_score_head,
)
from meiqa.errors import PackageCorrupted, UsageError
from meiqa.kernels.graded import grade_moments, multimodal

TORN = np.array([0.35, 0.05, 0.1, 0.2, 0.3])


def test_without_a_graded_response_the_words_stand() -> None:
    calibration = replace(UNCALIBRATED, levels_std=0.4)
    for head in ("text", "levels"):
        found = grading_of(TORN, calibration, check_score_head(head))
        assert (found.score, found.std) == (pytest.approx(TORN @ np.arange(1, 6)), 0.4)
        assert (found.grades == TORN).all()


def test_a_graded_response_has_one_mode_and_a_variance() -> None:
    calibration = replace(UNCALIBRATED, graded=NEUTRAL_GRADED)
    found = grading_of(TORN, calibration, "grm")
    assert multimodal([TORN])[0]
    assert not multimodal([found.grades])[0]
    expectation, variance = grade_moments([found.grades])
    assert found.score == pytest.approx(expectation[0])
    assert found.std == pytest.approx(variance[0] ** 0.5)


def test_score_and_deviation_are_mapped() -> None:
    score = Logistic(b1=0.0, b2=1.0, b3=3.0, b4=0.5, b5=1.0)
    head = replace(NEUTRAL_GRADED, score=score, std_scale=0.5, std_floor=0.3)
    before, after = graded_response(TORN, NEUTRAL_GRADED), graded_response(TORN, head)
    assert after.score == pytest.approx(0.5 * before.score + 1.0)
    assert after.std == pytest.approx(np.hypot(0.5 * before.std, 0.3))
    assert (after.grades == before.grades).all()


def test_better_words_are_a_better_score() -> None:
    worse, better = np.array([0.5, 0.3, 0.1, 0.05, 0.05]), np.array([0.05, 0.05, 0.1, 0.3, 0.5])
    scores = [graded_response(words, NEUTRAL_GRADED).score for words in (worse, better)]
    assert scores[0] < 3.0 < scores[1]


def test_logits_similarities_and_probabilities_say_the_same() -> None:
    logits = np.random.default_rng(0).normal(size=(7, 5))
    words = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert centred_levels(words) == pytest.approx(logits - logits.mean(axis=1, keepdims=True))


def test_a_word_that_is_not_named_has_a_finite_level() -> None:
    found = graded_response(np.array([0.0, 0.0, 0.0, 0.0, 1.0]), NEUTRAL_GRADED)
    assert np.isfinite(found.grades).all()
    assert found.score > 4.0


def test_a_head_that_was_not_fitted_is_refused() -> None:
    with pytest.raises(UsageError, match="no graded response"):
        grading_of(TORN, UNCALIBRATED, "grm")


def test_a_head_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="text, levels, grm"):
        check_score_head("softmax")


def test_the_manifest_keeps_the_graded_response() -> None:
    head = replace(NEUTRAL_GRADED, weights=(-0.3, -0.2, 0.1, 0.1, 0.3), score=IDENTITY)
    written = json.loads(json.dumps(asdict(replace(UNCALIBRATED, graded=head))))
    assert Calibration.from_dict(written) == replace(UNCALIBRATED, graded=head)


def test_a_calibration_from_before_has_none() -> None:
    written = asdict(UNCALIBRATED)
    del written["graded"]
    assert Calibration.from_dict(written).graded is None


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [0.0, 1.0]},
        {"weights": [0.0, 0.0, 0.0, 0.0, "x"]},
        {"step": 0.4},
        {"discrimination": -2.0, "step": -1.0},
        {"offset": float("nan")},
        {"std_scale": -1.0},
        {"more": 1},
    ],
)
def test_a_damaged_graded_response_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(PackageCorrupted):
        GradedHead.from_dict({**json.loads(json.dumps(asdict(NEUTRAL_GRADED))), **change})
