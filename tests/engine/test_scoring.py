"""The first opinion: the printed rating, or the grade word where it can't be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.drafting import Draft
from meiqa.engine.grading import expected_grade
from meiqa.engine.manifest import UNCALIBRATED, Logistic
from meiqa.engine.scoring import first_opinion, informed
from meiqa.engine.vlm import Description, Prefix, VisualTokens, Vlm
from meiqa.memory import Regression

PREFIX = Prefix(
    np.zeros((1, 2, 1, 3, 4), np.float32), VisualTokens(np.zeros((1, 4), np.float32), (1, 1)), 3
)
KEY = np.ones(4, np.float32)


class Scripted:
    """The part of a model that gives opinions; it says what it is told to."""

    def __init__(
        self, rating: float | None, grades: Sequence[float], complete: bool, asked: bool
    ) -> None:
        self._rating = rating
        self._unreadable = asked and rating is None
        self._grades = np.array(grades)
        self._complete = complete

    def describe(
        self,
        prefix: Prefix,
        max_tokens: int,
        drafts: Sequence[Draft] = (),
        enough: Callable[[], bool] = lambda: False,
    ) -> Description:
        return Description(
            "soft and dark", KEY, self._rating, self._unreadable, self._complete, tokens=7
        )

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        return self._grades


def scripted(
    rating: float | None, grades: Sequence[float], *, complete: bool = True, asked: bool = True
) -> Vlm:
    return cast(Vlm, Scripted(rating, grades, complete, asked))


def test_the_printed_rating_is_the_score() -> None:
    opinion = first_opinion(scripted(3.27, [1, 0, 0, 0, 0]), PREFIX, UNCALIBRATED, 96)
    assert opinion.score == 3.27
    assert opinion.prior == pytest.approx((3.27 + 1.0) / 2)
    assert (opinion.summary, opinion.written_tokens) == ("soft and dark", 7)
    assert not opinion.unreadable
    assert not opinion.shortened


def test_an_unreadable_rating_falls_back_to_the_grade_word_and_says_so() -> None:
    opinion = first_opinion(scripted(None, [0, 0, 0.5, 0.5, 0]), PREFIX, UNCALIBRATED, 96)
    assert (opinion.score, opinion.prior) == (3.5, 3.5)
    assert opinion.unreadable
    assert opinion.summary == "soft and dark"
    assert opinion.key is KEY


def test_a_family_without_a_printed_rating_is_scored_by_grade_word_alone() -> None:
    calibration = replace(UNCALIBRATED, levels_std=0.4, text_std=0.8, grade_share=0.75)
    vlm = scripted(None, [0, 0, 0.5, 0.5, 0], asked=False)
    opinion = first_opinion(vlm, PREFIX, calibration, 96)
    assert (opinion.score, opinion.prior, opinion.prior_std) == (3.5, 3.5, 0.4)
    assert not opinion.unreadable
    assert opinion.summary == "soft and dark"


def test_without_a_description_nothing_is_unreadable() -> None:
    opinion = first_opinion(scripted(None, [0, 1, 0, 0, 0]), PREFIX, UNCALIBRATED, 0)
    assert (opinion.score, opinion.prior) == (2.0, 2.0)
    assert not opinion.unreadable
    assert (opinion.summary, opinion.key, opinion.written_tokens) == (None, None, 0)


def test_the_calibration_maps_and_weighs_rating_and_grade() -> None:
    calibration = replace(
        UNCALIBRATED,
        levels=Logistic(0.0, 1.0, 3.0, 0.5, 1.0),
        text=Logistic(0.0, 1.0, 3.0, 0.25, 1.0),
        levels_std=0.4,
        text_std=0.8,
        grade_share=0.75,
    )
    opinion = first_opinion(scripted(4.8, [0, 0, 0, 1, 0]), PREFIX, calibration, 96)
    assert opinion.score == pytest.approx(2.2)
    assert opinion.prior == pytest.approx(0.25 * 2.2 + 0.75 * 3.0)
    assert opinion.prior_std == pytest.approx(0.25 * 0.8 + 0.75 * 0.4)


@pytest.mark.parametrize(("printed", "score"), [(77.0, 5.0), (0.0, 1.0)])
def test_a_rating_off_the_scale_is_kept_on_it(printed: float, score: float) -> None:
    assert first_opinion(scripted(printed, [1] * 5), PREFIX, UNCALIBRATED, 96).score == score


def test_what_the_memory_says_is_joined_to_the_prior() -> None:
    calibration = replace(
        UNCALIBRATED, levels_std=0.5, text_std=0.5, grade_share=0.0, memory_correlation=0.0
    )
    opinion = first_opinion(scripted(2.0, [1] * 5), PREFIX, calibration, 96)
    tokens = np.float32([[1, 3], [3, 3]])  # means 2 and 3, deviations 1 and 0
    regression = Regression(np.array([0.5, 1.0, -1.0, 7.0]), 1.0, 0.5)
    both = informed(opinion, regression, tokens, calibration)
    assert both.memory_score == pytest.approx(4.0)
    assert both.prior == pytest.approx(3.0)
    assert both.prior_std == pytest.approx(0.5 / np.sqrt(2))
    assert both.score == opinion.score
    assert informed(opinion, None, tokens, calibration) is opinion


def test_a_cut_description_is_marked() -> None:
    vlm = scripted(3.0, [0, 0, 1, 0, 0], complete=False)
    assert first_opinion(vlm, PREFIX, UNCALIBRATED, 16).shortened


def test_the_expected_grade() -> None:
    assert expected_grade(np.array([0.1, 0.2, 0.4, 0.2, 0.1])) == pytest.approx(3.0)
    assert expected_grade(np.array([0, 0, 0, 0, 1.0])) == 5.0
