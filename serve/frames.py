"""What a frame of a camera tells without a model: how bright it is, and how far it moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Glance", "glance_at", "motion_between"]

_WIDTH, _HEIGHT = 32, 24
_BLOWN_OUT = 250.0


@dataclass(frozen=True, eq=False)
class Glance:
    """A frame, looked at from afar.

    Attributes:
        cells: (24, 32) mean grey of as many parts of the frame, 0-255.
        brightness: mean grey, 0-255.
        blown_out: share of the cells in which nothing but white is left, 0-1.
    """

    cells: NDArray[np.float32]
    brightness: float
    blown_out: float


def glance_at(pixels: NDArray[np.uint8]) -> Glance:
    """Look at a frame (H, W, 3)."""
    grey = Image.fromarray(pixels).convert("L").resize((_WIDTH, _HEIGHT), Image.Resampling.BOX)
    cells = np.asarray(grey, np.float32)
    return Glance(cells, float(cells.mean()), float((cells >= _BLOWN_OUT).mean()))


def motion_between(before: Glance, after: Glance) -> float:
    """How far the picture moved, in grey levels: the mean change of a cell.

    What all cells have in common is left out: a camera that sets its exposure does not move.
    """
    change = after.cells - before.cells
    return float(np.abs(change - np.median(change)).mean())
