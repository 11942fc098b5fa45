"""What a photo shows, however well: so that shots of one thing are told to belong together.

The layout of visual tokens (`meiqa.memory.likeness`) tells copies of a picture; but these tokens
say how good a picture is, so a sharp and a blurred shot of one scene are nearly as far apart in it
as strangers are. A small thumbnail is the same of both. What is light above and dark below is so in
many pictures; so of the thumbnail only what differs from its surroundings is kept. It is compared
at every offset that a hand may cause. `benchmarks/shots.py` measures each of these steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["likenesses", "view_of"]

Floats = NDArray[np.float32]

SIDE = 32
"""Pixels of a thumbnail's side, whatever the photo's proportions."""
SURROUNDINGS = 3.0
"""Deviation, in these pixels, of the Gaussian mean that is taken off."""
REACH = 2
"""Pixels by which two views may be shifted against each other: a sixteenth of the side."""
_WINDOW = SIDE - 2 * REACH
_OFFSETS = [(row, column) for row in range(2 * REACH + 1) for column in range(2 * REACH + 1)]
_EVEN = 20.0
"""Length of a part of which nothing can be told: rounding to 8 bits alone has 14."""


def view_of(pixels: NDArray[np.uint8]) -> Floats:
    """What a photo (H, W, 3) shows: (32, 32, 3), around zero."""
    from scipy.ndimage import gaussian_filter

    # Coarsely at first, which is fast: the cells of the thumbnail are large.
    image = Image.fromarray(pixels)
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0))
    thumbnail = small.astype(np.float32)
    view: Floats = thumbnail - gaussian_filter(thumbnail, (SURROUNDINGS, SURROUNDINGS, 0))
    return view


def likenesses(ones: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """How alike the views (32, 32, 3) of n and m photos are, (n, m), up to 1.

    The cosine of the middle of one with every part of the other that is as large, and the reverse;
    the best counts. Contrast does not matter. A part that is the same all over is like nothing.
    """
    return np.maximum(_best(ones, others), _best(others, ones).T)


def _best(ones: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """The best cosine (n, m) of the middles of ones with the parts of others."""
    middles = _parts(ones, (REACH, REACH))
    best = np.full((len(ones), len(others)), -1.0, np.float32)
    for offset in _OFFSETS:
        np.maximum(best, middles @ _parts(others, offset).T, out=best)
    return best


def _parts(views: Sequence[Floats], offset: tuple[int, int]) -> Floats:
    """Parts of views at an offset, as unit vectors (n, 2352)."""
    row, column = offset
    parts = np.stack([view[row : row + _WINDOW, column : column + _WINDOW] for view in views])
    vectors = parts.reshape(len(views), -1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.where(lengths > _EVEN, vectors / np.maximum(lengths, _EVEN), 0.0)
    return units.astype(np.float32)
