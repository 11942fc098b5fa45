"""The first opinion: what the model says of a photo before any comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.package import Calibration
from meiqa.engine.vlm import Description, Floats, Prefix, Vlm

GRADES = np.arange(1.0, 6.0)


@dataclass(frozen=True, eq=False)
class Opinion:
    """The model's own score and description.

    Attributes:
        raw: the score on the model's own scale; head: "text" or "levels", where it came from.
        score, std: the score mapped to 1-5 and its deviation from people's.
        summary: the description, None when none was written.
        key: retrieval key (D,), None when nothing was written.
        shortened: the description was cut at the plan's limit.
        unreadable: a rating was asked for and what was printed is not a number.
        written_tokens: tokens written.
    """

    raw: float
    head: str
    score: float
    std: float
    summary: str | None
    key: Floats | None
    shortened: bool
    unreadable: bool
    written_tokens: int


def first_opinion(
    vlm: Vlm, prefix: Prefix, calibration: Calibration, summary_tokens: int
) -> Opinion:
    """Ask the model for its description and score.

    Args:
        summary_tokens: limit of the description; 0 asks for a grade word only.
    """
    if summary_tokens == 0:
        return graded_opinion(vlm, prefix, calibration, None)
    description = vlm.describe(prefix, summary_tokens)
    if calibration.score_head == "levels" or description.rating is None:
        return graded_opinion(vlm, prefix, calibration, description)
    return Opinion(
        raw=description.rating,
        head="text",
        score=float(calibration.text(description.rating)),
        std=calibration.text_std,
        summary=description.text,
        key=description.key,
        shortened=not description.complete,
        unreadable=False,
        written_tokens=description.tokens,
    )


def graded_opinion(
    vlm: Vlm,
    prefix: Prefix,
    calibration: Calibration,
    description: Description | None,
) -> Opinion:
    """The opinion whose score is the expectation over the grade words."""
    raw = expected_grade(vlm.grade(prefix))
    return Opinion(
        raw=raw,
        head="levels",
        score=float(calibration.levels(raw)),
        std=calibration.levels_std,
        summary=description.text if description else None,
        key=description.key if description else None,
        shortened=description is not None and not description.complete,
        unreadable=description is not None and description.rating is None,
        written_tokens=description.tokens if description else 0,
    )


def expected_grade(probabilities: NDArray[np.float64]) -> float:
    """Expectation of grades 1 to 5 under their probabilities (5,)."""
    return float(probabilities @ GRADES)
