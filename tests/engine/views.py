"""Views of photos that are as alike as they are told to be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meiqa.engine.shots import SIDE

NOISE = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 3))
"""Three views that have nothing in common, at any offset."""


def mixed(*rows: Sequence[float]) -> list[np.ndarray]:
    """Views whose likenesses are about the cosines of the rows."""
    return [
        (30 * sum(x * noise for x, noise in zip(row, NOISE, strict=False))).astype(np.float32)
        for row in rows
    ]


def at(*degrees: float) -> list[np.ndarray]:
    """Views whose likenesses are about the cosines of the angles between them."""
    angles = np.radians(degrees)
    return mixed(*np.stack([np.cos(angles), np.sin(angles)], 1).tolist())


def directions(count: int, seed: int) -> list[np.ndarray]:
    """Views of random directions."""
    rows = np.random.default_rng(seed).normal(size=(count, 3))
    return mixed(*(rows / np.linalg.norm(rows, axis=1, keepdims=True)).tolist())
