"""Telling whether two photos are near-duplicates, from the visual tokens that are stored anyway.

Neither kind of key can tell. Photos that are good or bad in the same way are described in the same
words, and their mean visual tokens point the same way: of the 1,024 embedded anchors, half have a
mean token within a cosine of 0.993 of another photograph's. A copy saved as JPEG of quality 50
comes to 0.975 of its original, and so is further away than strangers are. What two photos of one
scene share is where in the picture the tokens differ from their mean.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.cases import FloatArray
from meiqa.memory.encoding import unit_rows

__all__ = ["NEAR_DUPLICATE", "layout"]

NEAR_DUPLICATE = 0.97
"""Cosine of layouts above which photos are near-duplicates.

Of the pairs of embedded anchors, the seven above it show the same scene twice, and the first that
does not has 0.955. Copies at JPEG quality 90 have 0.995 (median), trimmed ones 0.95: what is caught
is the same picture again, not another shot of the same thing.
"""

_SIDE = 4
_EVEN = 1e-5


def layout(tokens: FloatArray, grid: tuple[int, int]) -> FloatArray:
    """Describe where a photo's tokens differ from their mean: a unit vector (16 · D,).

    The grid is averaged to 4 × 4 fields, so that photos of other sizes compare, and the mean is
    taken off. Of a photo that is the same all over, as one of a single cell is, nothing is left: a
    zero vector, which is like no other.

    Args:
        tokens: Visual tokens (T, D), row by row; a case may have none.
        grid: Rows and columns of cells, T in all.
    """
    if not len(tokens):
        return np.zeros(_SIDE * _SIDE * tokens.shape[1], np.float32)
    fields = _shares_of_grid(grid) @ tokens
    centred = fields - fields.mean(axis=0)
    # Rounding leaves something of fields that are all the same; it points nowhere.
    if np.abs(centred).max() <= _EVEN * np.abs(tokens).max():
        centred = np.zeros_like(centred)
    unit: FloatArray = unit_rows(centred.reshape(1, -1))[0]
    return unit


@lru_cache(maxsize=256)
def _shares_of_grid(grid: tuple[int, int]) -> FloatArray:
    """What each cell contributes to each field (16, T); rows add up to 1."""
    rows, columns = grid
    shares: FloatArray = np.kron(_shares(rows), _shares(columns)).astype(np.float32)
    return shares


def _shares(cells: int) -> NDArray[np.float64]:
    """What each cell of a line contributes to each field (4, cells); rows add up to 1."""
    edges = np.linspace(0.0, cells, _SIDE + 1)
    begins, ends = edges[:-1, None], edges[1:, None]
    numbers = np.arange(cells)
    covered = np.minimum(ends, numbers + 1) - np.maximum(begins, numbers)
    shares: NDArray[np.float64] = np.maximum(covered, 0.0) * (_SIDE / cells)
    return shares
