"""What a model's five grade words say of a photo: by the expectation, or by a graded response."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meiqa.engine.manifest import Calibration, GradedHead, ScoreHead
from meiqa.errors import UsageError
from meiqa.kernels.graded import grade_moments, grade_probabilities

Floats = NDArray[np.float64]

GRADES = np.arange(1.0, 6.0)
LEAST_PROBABILITY = 1e-9
"""A grade word less likely than this counts as this likely: a remote model may not name it."""


@dataclass(frozen=True, eq=False)
class Grading:
    """What the grade words say.

    Attributes:
        score: on 1-5, spread as people's scores are; std: its deviation from people's.
        grades: (5,) probabilities of grades 1 to 5.
    """

    score: float
    std: float
    grades: Floats


def grading_of(words: Floats, calibration: Calibration, head: ScoreHead) -> Grading:
    """Judge a photo by the probabilities (5,) of its grade words.

    Raises:
        UsageError: the graded response is asked for, and none was fitted.
    """
    if head == "grm":
        if calibration.graded is None:
            raise UsageError("the package has no graded response")
        return graded_response(words, calibration.graded)
    return Grading(float(calibration.levels(expected_grade(words))), calibration.levels_std, words)


def graded_response(words: Floats, head: GradedHead) -> Grading:
    """Judge by the graded response: its probabilities have one mode and a variance."""
    ability = centred_levels(words[None]) @ np.array(head.weights) + head.offset
    grades = grade_probabilities(ability, head.discrimination, head.first, head.step)
    expectation, variance = grade_moments(grades)
    std = math.hypot(head.std_scale * math.sqrt(variance[0]), head.std_floor)
    return Grading(float(head.score(expectation[0])), std, grades[0])


def centred_levels(words: ArrayLike) -> Floats:
    """Log-probabilities (B, 5) of grade words, each row around 0.

    The five logits, or the similarities of an image with five texts, give the same once they are
    centred.

    >>> centred_levels([[0.2, 0.2, 0.2, 0.2, 0.2]]).tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    logs: Floats = np.log(np.maximum(np.asarray(words, np.float64), LEAST_PROBABILITY))
    centred: Floats = logs - logs.mean(axis=1, keepdims=True)
    return centred


def expected_grade(probabilities: Floats) -> float:
    """Expectation of grades 1 to 5 under their probabilities (5,)."""
    return float(probabilities @ GRADES)
