"""Fit the graded response of a package: five grade words to ordered grades with a variance.

    python -m training.graded LABELS.csv --images DIR --package PACKAGE

The model is asked for the grade of each photograph, which takes no writing and no memory; the head
is fitted by maximum likelihood and written into the manifest's calibration. What is printed was
measured by cross-validation. `meiqa calibrate` fits it along with everything else.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.estimates import GRADES, graded_response
from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError
from meiqa.evaluation.fitting import fitted_head, matched_logistic, root_mean_square
from meiqa.evaluation.metrics import srcc
from meiqa.kernels.graded import multimodal
from meiqa.labels import LabelTable
from training.commands import run_command

Floats = NDArray[np.float64]

FEWEST_PHOTOS = 50
FOLDS = 10
VOTES = ("1", "2", "3", "4", "5")
"""Columns of a table of votes."""


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
    model = LocalModel.open(package)
    words = np.empty((len(files), 5))
    for index, file in enumerate(files):
        pixels = fit_to_grid(load_pixels(images / file), model.image)
        words[index] = model.grade(model.prefill([model.encode(pixels)])[0])
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
    parser = argparse.ArgumentParser(prog="python -m training.graded")
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
    package.rewritten(calibration=replace(package.manifest.calibration, graded=head))
    report: dict[str, Any] = {"photographs": len(labels), "cross_validated": reached}
    print(json.dumps({**report, "graded": asdict(head)}, indent=2))


if __name__ == "__main__":
    run_command(main)
