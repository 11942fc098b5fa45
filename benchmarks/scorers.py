"""Other ways to judge the same photographs: sharpness, BRISQUE, NIQE, NIMA, and a plain regressor.

    python -m benchmarks.scorers LABELS.csv --images DIR --models PEERS --votes NIMA.hdf5 \\
        --regressor-from TABLE.csv

PEERS holds the published model files of BRISQUE and NIQE, NIMA.hdf5 those of MobileNet as it was
trained on people's votes on AVA. Nothing is fitted to the photographs that
are judged: correlations are those of raw values. BRISQUE and NIQE, which are lower the better, are
negated for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import laplace

from benchmarks.labelled import engine_of, labelled_parser, labels_of, other_table, print_report
from benchmarks.naturalness import Brisque, Niqe, luminance
from meiqa.engine.images import Pixels, fit_to_grid, load_pixels
from meiqa.engine.model import Model
from meiqa.errors import ImageTooSmall, UsageError
from meiqa.evaluation.accuracy import judge, photos_of
from meiqa.evaluation.measuring import Column, table_text
from meiqa.evaluation.metrics import krcc, plcc, srcc
from meiqa.labels import LabelTable
from meiqa.memory import FEWEST_PHOTOS, Regression, token_features
from meiqa.progress import Progress

__all__ = ["judge_by", "main", "published_scorers", "ridge", "scorers_text", "sharpness"]

Scores = NDArray[np.float64]
OtherScorer = Callable[[Pixels], float]
"""Scores a photo; higher is better."""


def published_scorers(models: Path | None) -> dict[str, OtherScorer]:
    """Give sharpness, and BRISQUE and NIQE where there is a directory with their model files.

    Raises:
        UsageError: a model file is missing or damaged.
    """
    scorers: dict[str, OtherScorer] = {"Laplacian sharpness": sharpness}
    if models is not None:
        brisque, niqe = Brisque.read(models), Niqe.read(models)
        scorers |= {"BRISQUE": lambda pixels: -brisque.score(pixels.array)}
        scorers |= {"NIQE": lambda pixels: -niqe.score(pixels.array)}
    return scorers


def sharpness(pixels: Pixels) -> float:
    """Take the logarithm of the variance of the Laplacian of the luminance."""
    return math.log1p(float(np.var(laplace(luminance(pixels.array)))))


def ridge(
    model: Model, labels: LabelTable, images: str, on_photo: Callable[[], None] = lambda: None
) -> OtherScorer:
    """Fit ridge regression from visual tokens to the human scores of a table.

    Its time is that of the vision tower.

    Raises:
        ImageError: a photo cannot be judged.
        UsageError: there is no such directory, or the table is too short.
    """
    if len(labels) < FEWEST_PHOTOS:
        raise UsageError(
            "too few photos to fit a regressor to", seen=len(labels), allowed=f"{FEWEST_PHOTOS} up"
        )

    def features_of(pixels: Pixels) -> NDArray[np.float32]:
        return token_features(model.encode(fit_to_grid(pixels, model.image)).values)

    features = []
    for photo in photos_of(labels, images):
        features.append(features_of(load_pixels(photo)))
        on_photo()
    regression, _ = Regression.fit(np.array(features), np.array(labels.scores_1_to_5()))
    return lambda pixels: regression.score(features_of(pixels))


def judge_by(
    scorers: Mapping[str, OtherScorer],
    photos: Sequence[str],
    human: Scores,
    on_photo: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Let scorers judge photos that are known to be readable.

    Args:
        scorers: Who judges, by name.
        photos: Paths of N photos; human: (N,) scores.
        on_photo: Called after each photo.

    Returns:
        A row for each scorer: name, n (the photos that were not too small for it), srcc, plcc and
        krcc on those, and ms_per_image without decoding.
    """
    scores = {name: np.full(len(photos), np.nan) for name in scorers}
    seconds = dict.fromkeys(scorers, 0.0)
    for at, photo in enumerate(photos):
        pixels = load_pixels(photo)
        for name, scorer in scorers.items():
            started = time.perf_counter()
            with suppress(ImageTooSmall):
                scores[name][at] = scorer(pixels)
            seconds[name] += time.perf_counter() - started
        on_photo()
    rows = []
    for name, predicted in scores.items():
        known = ~np.isnan(predicted)
        row: dict[str, Any] = {"name": name, "n": int(known.sum())}
        if row["n"] >= 2:
            row |= agreement(predicted[known], human[known])
        rows.append({**row, "ms_per_image": 1e3 * seconds[name] / len(photos)})
    return rows


def agreement(predicted: Scores, human: Scores) -> dict[str, float]:
    """Give the three correlations."""
    return {each.__name__: each(predicted, human) for each in (srcc, plcc, krcc)}


def scorers_text(report: Mapping[str, Any]) -> str:
    """Lay out the report: this engine's rows, then those of the others."""
    n, fused_ms = report["n"], 1e3 * report["seconds_per_image"]
    own = [
        {"name": "meiqa, initial", "n": n, **report["initial"]},
        {"name": "meiqa, fused", "n": n, **report["fused"], "ms_per_image": fused_ms},
    ]
    columns = (
        Column("name", "judge"),
        Column("n", "photos", "d"),
        Column("srcc", "SRCC", ".4f"),
        Column("plcc", "PLCC", ".4f"),
        Column("krcc", "KRCC", ".4f"),
        Column("ms_per_image", "ms a photo", ".1f"),
    )
    return table_text([*own, *report["scorers"]], columns)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge the photographs by the engine and by others, and print a table, or JSON."""
    parser = labelled_parser("scorers", __doc__)
    parser.add_argument("--models", type=Path, help="published BRISQUE and NIQE models")
    parser.add_argument("--votes", type=Path, help="published weights of NIMA's MobileNet")
    parser.add_argument("--regressor-from", help="a table to fit a regressor on visual tokens to")
    parser.add_argument("--train-split", help="only the rows of this split of --regressor-from")
    given = parser.parse_args(arguments)
    labels, scorers = labels_of(given), published_scorers(given.models)
    if given.votes is not None:
        from benchmarks.nima import nima  # which needs PyTorch

        scorers["NIMA"] = nima(given.votes)
    training = other_table(given.regressor_from, given.train_split, labels)
    with engine_of(given) as engine:
        with Progress(len(labels)) as progress:
            judged = judge(engine, labels, given.images, on_result=progress.advance)
        if training is not None:
            with Progress(len(training)) as progress:
                scorers["ridge on visual tokens"] = ridge(
                    engine.model, training, given.images, progress.advance
                )
        photos = [assessment.path for assessment in judged.assessments]
        with Progress(len(photos)) as progress:
            rows = judge_by(scorers, photos, judged.human, progress.advance)
    print_report({**judged.report(), "scorers": rows}, given, scorers_text)


if __name__ == "__main__":
    main()
