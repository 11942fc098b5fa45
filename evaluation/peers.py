"""Other ways to judge the same photographs: sharpness, BRISQUE, NIQE, and a plain regressor.

Nothing is fitted to the photographs that are judged: correlations are those of raw values. BRISQUE
and NIQE, which are lower the better, are negated for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import laplace

from meiqa.engine.images import Pixels, fit_to_grid, load_pixels
from meiqa.engine.model import Model
from meiqa.errors import ImageTooSmall, UsageError
from meiqa.evaluation.accuracy import photos_of
from meiqa.evaluation.measuring import Column, table_text
from meiqa.evaluation.metrics import krcc, plcc, srcc
from meiqa.evaluation.naturalness import Brisque, Niqe, luminance
from meiqa.labels import LabelTable
from meiqa.memory import FEWEST_PHOTOS, Regression, token_features

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Peer:
    """Another judge.

    Attributes:
        name: as the table shows it.
        score: of a photo; higher is better.
    """

    name: str
    score: Callable[[Pixels], float]


def published_peers(models: Path | None) -> list[Peer]:
    """Give sharpness, and BRISQUE and NIQE where there is a directory with their model files.

    Raises:
        UsageError: a model file is missing or damaged.
    """
    peers = [Peer("Laplacian sharpness", sharpness)]
    if models is not None:
        brisque, niqe = Brisque.read(models), Niqe.read(models)
        peers.append(Peer("BRISQUE", lambda pixels: -brisque.score(pixels.array)))
        peers.append(Peer("NIQE", lambda pixels: -niqe.score(pixels.array)))
    return peers


def sharpness(pixels: Pixels) -> float:
    """Take the logarithm of the variance of the Laplacian of the luminance."""
    return math.log1p(float(np.var(laplace(luminance(pixels.array)))))


def regressor_peer(
    model: Model,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    on_photo: Callable[[], None] = lambda: None,
) -> Peer:
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
    for photo in photos_of(labels, images_dir):
        features.append(features_of(load_pixels(photo)))
        on_photo()
    regression, _ = Regression.fit(np.array(features), np.array(labels.scores_1_to_5()))
    return Peer("ridge on visual tokens", lambda pixels: regression.score(features_of(pixels)))


def judge_peers(
    peers: Sequence[Peer],
    photos: Sequence[str],
    human: Scores,
    *,
    on_photo: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Let peers judge photos that are known to be readable.

    Args:
        peers: Who judges.
        photos: Paths of N photos; human: (N,) scores.
        on_photo: Called after each photo.

    Returns:
        A row for each peer: name, n (the photos that were not too small for it), srcc, plcc and
        krcc on those, and ms_per_image without decoding.
    """
    scores = np.full((len(peers), len(photos)), np.nan)
    seconds = np.zeros(len(peers))
    for at, photo in enumerate(photos):
        pixels = load_pixels(photo)
        for row, peer in enumerate(peers):
            started = time.perf_counter()
            with suppress(ImageTooSmall):
                scores[row, at] = peer.score(pixels)
            seconds[row] += time.perf_counter() - started
        on_photo()
    return [
        _row(peer.name, predicted, human, 1e3 * spent / len(photos))
        for peer, predicted, spent in zip(peers, scores, seconds.tolist(), strict=True)
    ]


def _row(name: str, scores: Scores, human: Scores, ms_per_image: float) -> dict[str, Any]:
    known = ~np.isnan(scores)
    row: dict[str, Any] = {"name": name, "n": int(known.sum())}
    if row["n"] >= 2:
        for metric, measure in (("srcc", srcc), ("plcc", plcc), ("krcc", krcc)):
            row[metric] = measure(scores[known], human[known])
    return {**row, "ms_per_image": ms_per_image}


def peers_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the rows of `judge_peers` as a table."""
    columns = (
        Column("name", "judge"),
        Column("n", "photos", "d"),
        Column("srcc", "SRCC", ".4f"),
        Column("plcc", "PLCC", ".4f"),
        Column("krcc", "KRCC", ".4f"),
        Column("ms_per_image", "ms a photo", ".1f"),
    )
    return "Peers on the same photographs\n\n" + table_text(rows, columns)
