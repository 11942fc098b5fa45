"""The first opinion: what the model says of a photo before any comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.drafting import Draft
from meiqa.engine.fusing import Observation, joined
from meiqa.engine.grading import grading_of
from meiqa.engine.manifest import Calibration, ScoreHead
from meiqa.engine.vlm import NO_EFFORT, Effort, Floats, Prefix, Vlm
from meiqa.memory import Regression, token_features


@dataclass(frozen=True, eq=False)
class Opinion:
    """The model's own score and description.

    Attributes:
        score: the initial score on 1-5: the printed rating, or the grade where none was printed or
            the score head is another.
        prior: the score that fusion starts from: rating and grade, weighted, and what the memory's
            regression says, where there is one.
        prior_std: its deviation from people's.
        summary: the description, None when none was written.
        key: retrieval key (D,), None when nothing was written.
        shortened: the description was cut at the plan's limit.
        unreadable: a rating was asked for, and none could be read.
        written_tokens: tokens written.
        grades: (5,) probabilities of grades 1 to 5, as the score head sees them.
        effort: what it took to write them.
        memory_score: what the memory's regression says of the visual tokens, None without one.
    """

    score: float
    prior: float
    prior_std: float
    summary: str | None
    key: Floats | None
    shortened: bool
    unreadable: bool
    written_tokens: int
    grades: NDArray[np.float64]
    effort: Effort = NO_EFFORT
    memory_score: float | None = None


def first_opinion(
    vlm: Vlm,
    prefix: Prefix,
    calibration: Calibration,
    summary_tokens: int,
    drafts: Sequence[Draft] = (),
    enough: Callable[[], bool] = lambda: False,
    head: ScoreHead = "text",
) -> Opinion:
    """Ask the model for a grade word and, unless `summary_tokens` is 0, description and rating.

    Drafts, the likeliest first, are guesses at the description; it ends when `enough` says so. With
    a head other than "text" the grade words alone are the score, whatever is printed.
    """
    grading = grading_of(vlm.grade(prefix), calibration, head)
    grade, grades = grading.score, grading.grades
    if summary_tokens == 0:
        return Opinion(grade, grade, grading.std, None, None, False, False, 0, grades)
    described = vlm.describe(prefix, summary_tokens, drafts, enough)
    if described.rating is None or head != "text":
        rating, grade_share = grade, 1.0
    else:
        rating, grade_share = float(calibration.text(described.rating)), calibration.grade_share
    return Opinion(
        score=rating,
        prior=weighted(rating, grade, grade_share),
        prior_std=weighted(calibration.text_std, grading.std, grade_share),
        summary=described.text,
        key=described.key,
        shortened=not described.complete,
        unreadable=described.unreadable and head == "text",
        written_tokens=described.tokens,
        grades=grades,
        effort=described.effort,
    )


def informed(
    opinion: Opinion, regression: Regression | None, tokens: Floats, calibration: Calibration
) -> Opinion:
    """An opinion with the memory's regression on visual tokens (T, D) joined to its prior."""
    if regression is None:
        return opinion
    recalled = Observation(regression.score(token_features(tokens)), regression.std)
    prior = joined(
        Observation(opinion.prior, opinion.prior_std), recalled, calibration.memory_correlation
    )
    return replace(opinion, prior=prior.score, prior_std=prior.std, memory_score=recalled.score)


def weighted(of_rating: float, of_grade: float, grade_share: float) -> float:
    """What holds for rating and grade together, the grade counting `grade_share`."""
    return (1.0 - grade_share) * of_rating + grade_share * of_grade
