"""Fit the graded response of a package: five grade words to ordered grades with a variance.

    python -m meiqa.training.graded LABELS.csv --images DIR --package PACKAGE

The model is asked for the grade of each photograph, which takes no writing and no memory; the head
is fitted by maximum likelihood and written into the manifest's calibration. What is printed was
measured by cross-validation. `meiqa.training.calibrate` fits it along with everything else.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize

from meiqa.benchmarks.metrics import srcc
from meiqa.engine.grading import GRADES, centred_levels, graded_response
from meiqa.engine.images import load_pixels
from meiqa.engine.judging import fitted_to
from meiqa.engine.local import LocalVlm
from meiqa.engine.manifest import GradedHead
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.errors import UsageError
from meiqa.export.commands import run_command
from meiqa.kernels.graded import (
    LEAST_STEP,
    grade_log_probabilities,
    grade_moments,
    grade_probabilities,
    multimodal,
    soft_grades,
)
from meiqa.labels import LabelTable
from meiqa.training.mapping import fitted_deviation, matched_logistic, root_mean_square

Floats = NDArray[np.float64]

FEWEST_PHOTOS = 50
FOLDS = 10
RIDGE = 1e-5
"""Weight of the squared coefficients, of standardised levels, against the mean log-likelihood: it
keeps them finite where levels and grades go perfectly together, and else changes nothing."""
VOTES = ("1", "2", "3", "4", "5")
"""Columns of a table of votes."""


@dataclass(frozen=True)
class Response:
    """A graded response on top of five levels: ability = weights . centred levels + offset.

    Over the photographs it was fitted on, the ability has mean 0 and deviation 1.
    """

    weights: tuple[float, ...]
    offset: float
    discrimination: float
    first: float
    step: float

    def ability(self, levels: Floats) -> Floats:
        """Abilities (N,) of centred levels (N, 5)."""
        abilities: Floats = levels @ np.array(self.weights) + self.offset
        return abilities

    def probabilities(self, levels: Floats) -> Floats:
        """Grade probabilities (N, 5) of centred levels (N, 5)."""
        return grade_probabilities(self.ability(levels), self.discrimination, self.first, self.step)


def fitted_response(levels: Floats, grades: Floats) -> Response:
    """Fit a graded response by maximum likelihood.

    With a (theta - b_1) = w . levels + c and a d = g the log-likelihood is concave in (w, c, g), so
    there is one optimum, whatever the start; g stays at `LEAST_STEP` or above.

    Args:
        levels: centred levels (N, 5): log-probabilities of grade words, logits, or image-text
            similarities, each less the mean of its row.
        grades: (N, 5) votes, or shares as of `soft_grades`; a row counts by its sum.

    Raises:
        ValueError: shapes disagree, or no grade has a vote.
    """
    if levels.ndim != 2 or levels.shape[1] != 5 or grades.shape != levels.shape:
        raise ValueError(f"levels and grades must be (N, 5), not {levels.shape}, {grades.shape}")
    if not (np.isfinite(levels).all() and (grades >= 0.0).all() and 0.0 < grades.sum() < np.inf):
        raise ValueError("levels must be finite and grades votes or shares, not all 0")
    centre, spread = levels.mean(axis=0), levels.std(axis=0)
    scale = np.where(spread > 0.0, spread, 1.0)
    features = (levels - centre) / scale
    shares = grades / grades.sum()

    def loss(parameters: Floats) -> tuple[float, Floats]:
        weights, above, gap = parameters[:5], parameters[5], float(parameters[6])
        value, by_above, by_gap = surprise(features @ weights + above, gap, shares)
        slope = np.concatenate(
            [features.T @ by_above + 2 * RIDGE * weights, [by_above.sum(), by_gap]]
        )
        return value + RIDGE * float(weights @ weights), slope

    start = np.array([-0.2, -0.1, 0.0, 0.1, 0.2, 3.0, 2.0])
    limits = Bounds(np.array([-np.inf] * 6 + [LEAST_STEP]), np.inf)
    found = minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=limits,
        options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9},
    ).x
    raw = features @ found[:5]
    return standardised(found[:5] / scale, centre, float(found[5]), float(found[6]), raw)


def standardised(
    weights: Floats, centre: Floats, above: float, gap: float, raw: Floats
) -> Response:
    """A response in its own units: ability (mean 0, deviation 1 where it was fitted) and a, b_1, d.

    Args:
        weights, centre, above, gap: a (theta - b_1) = weights . (levels - centre) + above; a d.
        raw: (N,) of weights . (levels - centre).
    """
    discrimination = max(float(raw.std()), 1e-6)
    mean = float(raw.mean())
    slopes = weights / discrimination
    return Response(
        # Centred levels add up to 0, so a constant in the weights would tell nothing.
        weights=tuple(float(slope) for slope in slopes - slopes.mean()),
        offset=float(-slopes @ centre) - mean / discrimination,
        discrimination=discrimination,
        first=-(above + mean) / discrimination,
        step=gap / discrimination,
    )


def surprise(above: Floats, gap: float, shares: Floats) -> tuple[float, Floats, float]:
    """Negative log-likelihood of shares (N, 5), and its slopes by `above` (N,) and by the gap."""
    logs = grade_log_probabilities(above, gap)
    thresholds = above[:, None] - gap * np.arange(4)
    reached = 0.5 * (1.0 + np.tanh(0.5 * thresholds))
    upper, lower = shares[:, 1:], shares[:, :4]
    # Grade k + 1 has reached threshold k, the grade below has missed it.
    by_threshold = lower * reached - upper * (1.0 - reached)
    by_gap = -float(np.sum(by_threshold @ np.arange(4.0)))
    # The inner grades' factor 1 - exp(-gap).
    by_gap -= float(shares[:, 1:4].sum() / np.expm1(gap))
    return -float(np.sum(shares * logs)), by_threshold.sum(axis=1), by_gap


def fitted_head(words: Floats, human: Floats, grades: Floats | None = None) -> GradedHead:
    """Fit the graded response of N photographs, and how its score and variance go with people's.

    Args:
        words: (N, 5) probabilities of the grade words.
        human: (N,) human scores on 1-5.
        grades: (N, 5) votes; `soft_grades` of the human scores without them.
    """
    levels = centred_levels(words)
    response = fitted_response(levels, soft_grades(human) if grades is None else grades)
    expectation, variance = grade_moments(response.probabilities(levels))
    score = matched_logistic(expectation, human)
    errors = np.asarray(score(expectation)) - human
    std_scale, std_floor = fitted_deviation(errors, np.sqrt(variance))
    return GradedHead(**asdict(response), score=score, std_scale=std_scale, std_floor=std_floor)


def cross_validated(
    words: Floats, human: Floats, grades: Floats | None = None, folds: int = FOLDS
) -> dict[str, dict[str, float]]:
    """What heads reach on photographs that they were not fitted on, each fold in its turn.

    Returns:
        For the expectation over the words ("levels") and their graded response ("grm"): srcc, rmse
        and coverage95 (share of the human scores within 1.96 deviations) of the score; surprise,
        the mean negative log-likelihood of the human scores under scores and deviations; and
        multimodal, the share of photographs whose grades have more than one mode.
    """
    found = {head: np.empty((len(human), 7)) for head in ("levels", "grm")}
    raw = words @ GRADES
    for fold in range(folds):
        held = np.arange(len(human)) % folds == fold
        head = fitted_head(words[~held], human[~held], None if grades is None else grades[~held])
        levels = matched_logistic(raw[~held], human[~held])
        usual = root_mean_square(np.asarray(levels(raw[~held])) - human[~held])
        for at in np.flatnonzero(held):
            grading = graded_response(words[at], head)
            found["grm"][at] = [grading.score, grading.std, *grading.grades]
            found["levels"][at] = [float(levels(raw[at])), usual, *words[at]]
    return {head: held_out_figures(rows, human) for head, rows in found.items()}


def held_out_figures(rows: Floats, human: Floats) -> dict[str, float]:
    """Figures of rows (N, 7): score, deviation and grades."""
    errors, stds = rows[:, 0] - human, rows[:, 1]
    return {
        "srcc": srcc(rows[:, 0], human),
        "rmse": root_mean_square(errors),
        "coverage95": float(np.mean(np.abs(errors) <= 1.96 * stds)),
        "surprise": float(np.mean(np.log(stds) + 0.5 * (errors / stds) ** 2)),
        "multimodal": float(np.mean(multimodal(rows[:, 2:]))),
    }


def grade_words(package: EnginePackage, files: Sequence[str], images: Path) -> Floats:
    """Probabilities (N, 5) of the grade words for photographs."""
    vlm = LocalVlm(package, *open_sessions(package, "cpu", None))
    words = np.empty((len(files), 5))
    for index, file in enumerate(files):
        pixels = fitted_to(load_pixels(images / file), vlm.image)
        words[index] = vlm.grade(vlm.read([vlm.encode(pixels)])[0])
        if (index + 1) % 100 == 0:
            print(f"{index + 1} of {len(files)} photographs graded", flush=True)
    return words


def votes_of(path: Path, files: Sequence[str]) -> Floats:
    """Votes (N, 5) from a table with the columns file, 1, 2, 3, 4 and 5.

    Raises:
        UsageError: it lacks a column or a file, or a cell is no number of votes.
    """
    try:
        with path.open(newline="") as table:
            rows = {
                row["file"]: [float(row[name]) for name in VOTES] for row in csv.DictReader(table)
            }
        votes = np.array([rows[file] for file in files])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} does not hold the votes of every photograph",
            seen=error,
            allowed="a CSV file with the columns file, 1, 2, 3, 4, 5",
        ) from error
    if not (np.isfinite(votes).all() and (votes >= 0).all() and votes.any(axis=1).all()):
        raise UsageError(f"{path} holds what are no votes", allowed="0 or more, not all 0 in a row")
    return votes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.training.graded")
    parser.add_argument("--package", type=Path, required=True, help="its manifest is rewritten")
    parser.add_argument("labels", type=Path, help="a label table")
    parser.add_argument("--images", type=Path, required=True, help="where its images are")
    parser.add_argument("--split", help="only the rows of this split")
    parser.add_argument("--limit", type=int, help="only so many, spread over the table")
    parser.add_argument(
        "--votes", type=Path, help="CSV: file, 1, 2, 3, 4, 5 (default: soft grades)"
    )
    arguments = parser.parse_args()
    package = EnginePackage.open(arguments.package)
    labels = LabelTable.read(arguments.labels, split=arguments.split).spread(arguments.limit)
    if len(labels) < FEWEST_PHOTOS:
        raise UsageError(
            "too few photographs to fit a graded response on",
            seen=len(labels),
            allowed=f"{FEWEST_PHOTOS} or more",
        )
    votes = None if arguments.votes is None else votes_of(arguments.votes, labels.files)
    words = grade_words(package, labels.files, arguments.images)
    human = np.array(labels.scores_1_to_5())
    reached = cross_validated(words, human, votes)
    head = fitted_head(words, human, votes)
    package.with_calibration(replace(package.manifest.calibration, graded=head))
    report: dict[str, Any] = {"photographs": len(labels), "cross_validated": reached}
    print(json.dumps({**report, "graded": asdict(head)}, indent=2))


if __name__ == "__main__":
    run_command(main)
