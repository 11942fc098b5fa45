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

from meiqa.benchmarks.metrics import krcc, plcc, srcc
from meiqa.benchmarks.naturalness import Brisque, Niqe, luminance
from meiqa.benchmarks.regressor import features_of
from meiqa.benchmarks.tables import Column, table_text
from meiqa.engine.images import load_pixels
from meiqa.engine.judging import fitted_to
from meiqa.engine.vlm import Vlm
from meiqa.errors import ImageTooSmall
from meiqa.memory import Regression

__all__ = ["Peer", "judge_peers", "peers_text", "published_peers", "regressor_peer", "sharpness"]

Pixels = NDArray[np.uint8]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Peer:
    """Another judge.

    Attributes:
        name: as the table shows it.
        score: of a photo, uint8 (H, W, 3); higher is better.
    """

    name: str
    score: Callable[[Pixels], float]


def sharpness(pixels: Pixels) -> float:
    """Logarithm of the variance of the Laplacian of the luminance."""
    return math.log1p(float(np.var(laplace(luminance(pixels)))))


def published_peers(models: Path | None) -> list[Peer]:
    """Give sharpness, and BRISQUE and NIQE where there is a directory with their model files.

    Raises:
        UsageError: a model file is missing or damaged.
    """
    peers = [Peer("Laplacian sharpness", sharpness)]
    if models is not None:
        brisque, niqe = Brisque.read(models), Niqe.read(models)
        peers.append(Peer("BRISQUE", lambda pixels: -brisque.score(pixels)))
        peers.append(Peer("NIQE", lambda pixels: -niqe.score(pixels)))
    return peers


def regressor_peer(vlm: Vlm, regressor: Regression) -> Peer:
    """A regressor on visual tokens; its time is that of the vision tower."""

    def score(pixels: Pixels) -> float:
        fitted = fitted_to(load_pixels(pixels), vlm.image)
        return regressor.score(features_of(vlm, fitted))

    return Peer("ridge on visual tokens", score)


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
        pixels = load_pixels(photo).array
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
    return "Peers on the same photographs\n\n" + table_text(rows, _COLUMNS)


_COLUMNS = (
    Column("name", "judge"),
    Column("n", "photos", "d"),
    Column("srcc", "SRCC", ".4f"),
    Column("plcc", "PLCC", ".4f"),
    Column("krcc", "KRCC", ".4f"),
    Column("ms_per_image", "ms a photo", ".1f"),
)
