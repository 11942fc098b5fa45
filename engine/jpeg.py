"""How strongly a photo was compressed as JPEG, by its file's table or by what one left in pixels.

Quality is that of the Independent JPEG Group, 1-100: a factor for the example luminance table of
ITU-T T.81, annex K. Pixels that were a JPEG once have, in blocks of 8 x 8, DCT coefficients near
multiples of the table's steps: Z. Fan, R. de Queiroz, IEEE Trans. Image Process. 12(2), 2003.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.measures import LUMA
from meiqa.types import JpegQuality

Floats = NDArray[np.float32]
Steps = NDArray[np.int64]
Place = tuple[int, int]
"""Row and column of the first whole block."""

BLOCK = 8
LARGEST_STEP, BIN, BINS = 255, 0.5, 512
"""Coefficients are counted in so many bins of this width, and larger ones not at all."""
TELLING = 3
"""The first bin that tells something: smaller coefficients are many without a JPEG."""
ROUNDING, ASTRAY = 0.4, 0.02
"""Deviation of coefficients from multiples, by whole levels of luma and of colours, and the share
of those that are anywhere."""
COARSE, FEW = 8, 100
"""Frequencies that the grid of blocks is looked for with, and how many coefficients of a grid are
too few for their mean to count in full."""
SURE, LEAST_MEAN = 20.0, 0.03
"""Log-likelihood from which on a step is believed, and its mean over coefficients from which on
there was a JPEG: without one it is below 0, of quality 99 above 0.04."""

_EXAMPLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
).ravel()


def _standard_tables() -> Steps:
    """Luminance tables (100, 64), row by row, of the qualities from 100 down."""
    quality = np.arange(100, 0, -1)[:, None]
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    tables: Steps = np.clip((_EXAMPLE * percent + 50) // 100, 1, 255)
    return tables


STANDARD = _standard_tables()


def _basis() -> Floats:
    """Give the DCT of a block (64, 63), pixels by frequencies, the lowest first, the mean not."""
    at = np.arange(BLOCK)
    waves = np.cos(np.pi * (2 * at + 1) * at[:, None] / 16) * np.where(at, 0.5, 8**-0.5)[:, None]
    return np.kron(waves, waves)[_ORDER].T.astype(np.float32)


_ORDER = np.argsort(np.add.outer(np.arange(BLOCK), np.arange(BLOCK)).ravel(), kind="stable")[1:]
"""Frequencies of a table, row by row, by the sum of both; without the mean."""
_BASIS = _basis()


def quality_by_table(table: Sequence[int]) -> JpegQuality:
    """Give the quality of a luminance table (64,), row by row; of another: nearest by its sum."""
    nearest = int(np.abs(STANDARD.sum(1) - sum(table)).argmin())
    standard = np.array_equal(STANDARD[nearest], table)
    return JpegQuality(100 - nearest, "standard table" if standard else "other table")


def quality_by_pixels(cuts: Iterable[NDArray[np.uint8]], corner: Place) -> JpegQuality | None:
    """Estimate the quality of the JPEG that pixels were; None where they show none.

    Args:
        cuts: of one photo, (H, W, 3), as far from each other as whole blocks.
        corner: the first block of each, if blocks begin in the corner of the photo.
    """
    planes = [luma_unclipped(cut) for cut in cuts]
    half = planes[0][: max(len(planes[0]) // 2, 2 * BLOCK)]
    cropped = max(
        product(range(BLOCK), range(BLOCK)),
        key=lambda first: evidence_of_steps([half], first, COARSE)[1],
    )
    found = (evidence_of_steps(planes, first) for first in {corner, cropped})
    evidence, mean = max(found, key=lambda each: each[1])
    sure = evidence.max(1) > SURE
    if mean < LEAST_MEAN or not sure.any():
        return None
    steps = evidence[sure].argmax(1) + 1
    apart = np.abs(np.log(steps / STANDARD[:, _ORDER[sure]])).sum(1)
    return JpegQuality(100 - int(apart.argmin()), "pixels")


def luma_unclipped(cut: NDArray[np.uint8]) -> Floats:
    """Give luma (H, W), NaN where a colour is clipped: blocks with such a pixel tell nothing."""
    luma: Floats = cut.astype(np.float32) @ np.array(LUMA, np.float32)
    luma[((cut == 0) | (cut == 255)).any(2)] = np.nan
    return luma


def evidence_of_steps(
    planes: Iterable[Floats], first: Place, frequencies: int = 63
) -> tuple[Floats, float]:
    """Tell how much likelier the coefficients of luma are with each step than without.

    Args:
        planes: of luma, each with its first whole block at the same place.
        frequencies: the lowest so many of 63 are looked at.

    Returns:
        Logarithms (frequencies, 255), summed over blocks, and the mean of the likeliest steps',
        for each coefficient that tells something: the grid of blocks has few, and they agree.
    """
    counts = np.zeros(frequencies * BINS, np.int64)
    (top, left), places = first, BINS * np.arange(frequencies)
    for plane in planes:
        rows, columns = (plane.shape[0] - top) // BLOCK, (plane.shape[1] - left) // BLOCK
        inner = plane[top : top + BLOCK * rows, left : left + BLOCK * columns]
        parts = inner.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
        blocks = parts.reshape(rows, columns, BLOCK**2)
        sizes = np.rint(np.abs(blocks @ _BASIS[:, :frequencies]) / BIN)
        counts += np.bincount((sizes + places)[sizes < BINS].astype(np.intp), minlength=len(counts))
    histograms = counts.reshape(frequencies, BINS).astype(np.float32)
    # Here and above many small products, since BLAS calls other threads for large ones and lets
    # them spin, which costs several times what these take.
    evidence: Floats = (histograms[:, None] @ _likelihoods())[:, 0]
    telling = histograms[:, TELLING:].sum()
    return evidence, float(evidence.max(1).sum() / (telling + FEW))


@lru_cache(maxsize=1)
def _likelihoods() -> Floats:
    """Logarithms (BINS, 255) of how much likelier a coefficient is with a step than without.

    Without, it is anywhere between two multiples; with it, near one of them.
    """
    sizes, steps = BIN * np.arange(BINS)[:, None], np.arange(1, LARGEST_STEP + 1)
    off = np.abs(sizes - steps * np.rint(sizes / steps))
    # Of steps as small as the deviation, multiples further away count as well.
    near = sum(np.exp(-0.5 * ((off + turn * steps) / ROUNDING) ** 2) for turn in (-2, -1, 0, 1, 2))
    density = steps * near / (ROUNDING * np.sqrt(2 * np.pi))
    told = np.log((1 - ASTRAY) * density + ASTRAY) * (np.arange(BINS) >= TELLING)[:, None]
    likelihoods: Floats = told.astype(np.float32)
    return likelihoods
