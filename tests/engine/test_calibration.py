"""What is fitted, what may be fitted, and what the grade words say through each head."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from meiqa.engine.calibration import (
    IDENTITY,
    NEUTRAL_GRADED,
    UNCALIBRATED,
    Calibration,
    GradedHead,
    Logistic,
    check_score_head,
)
from meiqa.engine.estimates import centred_levels, graded_response, grading_of, mapped
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


def test_the_ends_of_what_is_allowed_are_allowed() -> None:
    for share in (0, 1.0):
        replace(UNCALIBRATED, grade_share=share, std_floor=0.0, reflect_above=0, neighbours=0)


def test_a_calibration_survives_json() -> None:
    values = json.loads(json.dumps(UNCALIBRATED, default=vars))
    assert Calibration.from_dict(values) == UNCALIBRATED


@pytest.mark.parametrize("raw", [1.0, 2.7, 3.3, 4.9])
def test_the_logistic_is_the_formula(raw: float) -> None:
    b1, b2, b3, b4, b5 = 1.2, 1.7, 3.1, 0.5, 1.4
    wanted = b1 * (0.5 - 1 / (1 + np.exp(b2 * (raw - b3)))) + b4 * raw + b5
    assert 1 < wanted < 5
    logistic = Logistic(b1, b2, b3, b4, b5)
    assert float(logistic(raw)) == mapped(logistic, raw) == pytest.approx(wanted, abs=1e-12)


def test_the_logistic_stays_on_the_scale() -> None:
    steep = Logistic(9.0, 1e3, 3.0, 0.0, 3.0)
    assert steep(np.array([-1e6, 1e6])).tolist() == [1.0, 5.0]
    assert [mapped(steep, -1e6), mapped(steep, 1e6)] == [1.0, 5.0]
    assert IDENTITY(np.array([0.0, 2.5, 77.0])).tolist() == [1.0, 2.5, 5.0]


def test_a_calibration_from_before_gives_up_the_text_first() -> None:
    written = asdict(UNCALIBRATED)
    del written["degradation"]
    assert Calibration.from_dict(written).degradation == ("text", "neighbours", "orders")


def test_an_order_of_degradation_is_kept() -> None:
    order = ("orders", "neighbours", "text")
    written = json.loads(json.dumps(asdict(replace(UNCALIBRATED, degradation=order))))
    assert Calibration.from_dict(written).degradation == order


@pytest.mark.parametrize(
    "order",
    [[], ["text"], ["text", "text", "orders"], ["text", "neighbours", "orders", "k"], "text", 3],
)
def test_an_order_that_is_none_is_refused(order: object) -> None:
    with pytest.raises(PackageCorrupted, match=r"degradation.*text, neighbours, orders"):
        Calibration.from_dict({**asdict(UNCALIBRATED), "degradation": order})


def test_what_was_only_chosen_is_not_fitted() -> None:
    chosen = {"neighbours": 0, "bins": 3, "degradation": ("orders", "neighbours", "text")}
    for neutral in (UNCALIBRATED, replace(UNCALIBRATED, graded=NEUTRAL_GRADED)):
        assert not neutral.is_fitted
        assert not replace(neutral, **chosen).is_fitted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fitted",
    [
        {"text": Logistic(1.0, 1.0, 3.0, 0.5, 1.0)},
        {"lam": 3.0},
        {"graded": replace(NEUTRAL_GRADED, offset=0.1)},
    ],
)
def test_whatever_was_fitted_is_told(fitted: dict[str, Any]) -> None:
    assert replace(UNCALIBRATED, **fitted).is_fitted
