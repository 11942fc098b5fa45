"""Pictures as the "visual tokens" of a model that keeps its own to itself.

A server answers questions about pictures, and shows nobody its visual tokens. What takes their
place, in memory and between the stages, is the picture itself, in tiles of a few pixels: a token is
the pixels of a tile around mid-grey, and one element more that is always the largest. So the int8
scale with which a memory stores tokens is 1, and the pixels come back as they were.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.vlm import Floats, VisualTokens

__all__ = ["picture_of", "tile_side", "tile_width", "tiles_of"]

_MIDDLE, _REACH = 128, 127
_LARGEST_SIDE = 8


def tile_side(cell_pixels: int) -> int:
    """The largest side of a tile, up to 8 pixels, that divides a model's cells.

    >>> tile_side(28), tile_side(32)
    (7, 8)
    """
    return max(side for side in range(1, _LARGEST_SIDE + 1) if cell_pixels % side == 0)


def tile_width(side: int) -> int:
    """Elements of a token: three colours of each pixel, and the largest."""
    return 3 * side * side + 1


def tiles_of(pixels: NDArray[np.uint8], side: int) -> VisualTokens:
    """A picture (H, W, 3), both multiples of `side`, as tokens (H · W / side², 3 · side² + 1).

    Black becomes the darkest grey but one, for all values to lie as far from the middle as 127.
    """
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    around = np.maximum(pixels, 1).astype(np.float32) - _MIDDLE
    tiles = around.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    values = np.pad(tiles, ((0, 0), (0, 1)), constant_values=_REACH)
    return VisualTokens(values, (rows, columns))


def picture_of(tokens: VisualTokens) -> NDArray[np.uint8]:
    """The picture (H, W, 3) that `tiles_of` made the tokens of, black apart."""
    rows, columns = tokens.grid
    values: Floats = np.rint(tokens.values[:, :-1]) + _MIDDLE
    side = round((values.shape[1] / 3) ** 0.5)
    tiles = values.clip(0, 255).astype(np.uint8).reshape(rows, columns, side, side, 3)
    return np.ascontiguousarray(tiles.swapaxes(1, 2).reshape(rows * side, columns * side, 3))
