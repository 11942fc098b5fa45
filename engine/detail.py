"""How a photo holds up at 100 %: sharpness, motion, noise and JPEG quality, in full-size cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.jpeg import BLOCK, quality_by_pixels, quality_by_table
from meiqa.engine.measures import BRIGHTEST, DARKEST, LUMA, noise_deviation
from meiqa.types import Detail

CUT, CELL = 256, 16
"""Sides in pixels of the cuts that a photo is looked at in, and of the cells they are chosen by."""
TEXTURED, FLAT, COMPRESSED = 12, 4, 3
"""How many cuts show sharpness and motion, how many noise, and how many an earlier JPEG."""
OCTAVES = 5
SMALLEST_DETAILED = CELL << (OCTAVES - 3)
"""Side in pixels of the smallest photo in whose cuts the coarsest octave still has differences."""

ROUNDING = 1 / 12
"""Variance, in grey levels squared, of what whole levels leave out; of much blur it hides most."""
LEAST_ENERGY = 1e-3
"""Added to energies of gradients, in grey levels squared, where there may be none."""
LEAST_TEXTURE = 0.2
"""Share of the most textured cut's energy, two octaves on, that a cut is judged from on."""
BLUR_VARIANCE = 2.4
"""Of blur, in square pixels, that halves the excess of fine gradients; see `sharpness_of`."""
SOFTNESS_SHARE, ONE_PIXEL, DOUBLINGS, LONGEST_MOTION = 3.0, 3.2, 2.5, CUT / 4
"""See `motion_of`: motion doubles so often while what is seen of it grows by one, at first."""

Place = tuple[int, int]
"""Row and column of the corner of a cut."""


def measure_detail(
    pixels: NDArray[np.uint8], luminance_table: Sequence[int] | None = None
) -> Detail | None:
    """Measure sharpness, motion and noise at full size, in a few cuts of a photo.

    Args:
        pixels: uint8 (H, W, 3); None is given below `SMALLEST_DETAILED` on a side.
        luminance_table: see `Pixels`; the pixels tell the JPEG's quality where it is empty.
    """
    side = min(CUT, *(each // (2 * CELL) * 2 * CELL for each in pixels.shape[:2]))
    if side < SMALLEST_DETAILED:
        return None
    textured, flat = chosen_places(pixels, side)

    def colours(place: Place) -> NDArray[np.uint8]:
        row, column = place
        return pixels[row : row + side, column : column + side]

    def cut(place: Place) -> NDArray[Any]:
        luma: NDArray[Any] = colours(place).astype(np.float32) @ np.array(LUMA, np.float32)
        return luma

    noise = noise_deviation(np.hstack([cut(place) for place in flat]))
    variance = noise**2 + ROUNDING
    tensors = np.stack([gradient_tensors(cut(place), variance) for place in textured])
    energies = tensors.trace(axis1=2, axis2=3)
    steepness = energies[:, 0] / (energies[:, 2] + LEAST_ENERGY)
    # A cut of little texture, or mostly of noise, tells nothing of edges; if all are, the first is
    # taken, which is the most textured.
    told = (energies[:, 2] > LEAST_TEXTURE * energies[:, 2].max()) & (energies[:, 0] > variance)
    sharpest = int((steepness * told).argmax())
    row, column = textured[sharpest]
    jpeg = quality_by_table(luminance_table) if luminance_table else None
    if luminance_table is not None and not luminance_table:
        corner = -row % BLOCK, -column % BLOCK
        jpeg = quality_by_pixels(map(colours, textured[:COMPRESSED]), corner)
    return Detail(
        sharpness=sharpness_of(float(steepness[sharpest])),
        motion=motion_of(tensors.sum(0)),
        noise=noise,
        place=(column, row, side, side),
        jpeg=jpeg,
    )


def chosen_places(pixels: NDArray[np.uint8], side: int) -> tuple[list[Place], list[Place]]:
    """Choose the cuts of a photo: the most textured, central before others, and the flattest.

    They come from one lattice, and texture is looked for in large cells, so that damage changes
    little of the choice. Flat cuts are of open tones, if there are any.
    """
    rows, columns = (each // side for each in pixels.shape[:2])
    top, left = ((each % side) // 2 for each in pixels.shape[:2])
    # Every fourth row of green: a twelfth of the photo says enough of its cells.
    green = pixels[top : top + rows * side : 4, left : left + columns * side, 1]
    cells = side // CELL
    tones = green.reshape(rows * cells, CELL // 4, columns * cells, CELL)
    tones = tones.mean((1, 3), dtype=np.float32)
    steps = np.zeros_like(tones)
    steps[:, 1:] += np.abs(np.diff(tones, axis=1))
    steps[1:] += np.abs(np.diff(tones, axis=0))
    texture, tone = (
        values.reshape(rows, cells, columns, cells).mean((1, 3)) for values in (steps, tones)
    )
    down, across = ((np.arange(count) + 0.5) / count * 2 - 1 for count in texture.shape)
    central = np.exp(-(down[:, None] ** 2) - across**2)
    closed = (tone <= DARKEST) | (tone >= BRIGHTEST)

    def least(values: NDArray[Any], count: int) -> list[Place]:
        order = values.argsort(axis=None, kind="stable")[:count]
        found = (divmod(int(index), columns) for index in order)
        return [(top + side * row, left + side * column) for row, column in found]

    return least(-texture * central, TEXTURED), least(texture + 255 * closed, FLAT)


def gradient_tensors(luma: NDArray[Any], variance: float) -> NDArray[Any]:
    """Structure tensors (OCTAVES, 2, 2) of a cut, each of it at half the size of the one before.

    What white noise of a variance adds to them is taken off, as far as anything is left.
    """
    tensors = np.empty((OCTAVES, 2, 2))
    for octave in range(OCTAVES):
        falling, rising = luma[1:, 1:] - luma[:-1, :-1], luma[:-1, 1:] - luma[1:, :-1]
        across, down = (falling + rising).ravel() / 2, (falling - rising).ravel() / 2
        mixed = across @ down
        tensors[octave] = [[across @ across, mixed], [mixed, down @ down]]
        tensors[octave] /= across.size
        luma = (luma[::2, ::2] + luma[1::2, ::2] + luma[::2, 1::2] + luma[1::2, 1::2]) / 4
    added = np.minimum(
        variance / 4.0 ** np.arange(OCTAVES), 0.9 * np.linalg.eigvalsh(tensors)[:, 0]
    )
    tensors -= added[:, None, None] * np.eye(2)
    return tensors


def sharpness_of(steepness: float) -> float:
    """Estimate one over the width of edges by gradients: their energy over that two octaves on.

    Blur of variance b leaves energy as 1 / (b + c) where the spectrum falls with the square of the
    frequency, as photographs' do, c being the octave's own; an edge is as wide as a step of its
    slope, which is sqrt(2 pi b).
    """
    variance = BLUR_VARIANCE / max(16 * steepness - 1, 1e-3)
    return float(min(1.0, 1 / np.sqrt(2 * np.pi * variance)))


def motion_of(tensors: NDArray[Any]) -> float:
    """Estimate the length of motion in pixels, by what the finest octave lacks in one direction.

    Motion takes fine gradients along its way and leaves those across it: the ratios of finest to
    coarsest tensor then differ by direction. The softness of the softest direction counts beside
    that, since motion of a few pixels looks like nothing else; it has an end where the two finest
    octaves are smooth, so that blur of any radius is read as no more than a short motion.
    """
    least, most = ratios_by_direction(tensors[0], tensors[-1])
    softness = -np.log(ratios_by_direction(tensors[0], tensors[1])[0])
    seen = np.log(most / least) + SOFTNESS_SHARE * softness
    length = 2 ** (DOUBLINGS * (seen - ONE_PIXEL))
    return float(length / (1 + length / LONGEST_MOTION))  # a cut shows none that is longer


def ratios_by_direction(fine: NDArray[Any], coarse: NDArray[Any]) -> tuple[float, float]:
    """Give the least and the greatest ratio of two tensors in any direction."""
    least = LEAST_ENERGY * np.eye(2)
    ratios = np.linalg.eigvals(np.linalg.solve(coarse + least, fine + least)).real
    return float(ratios.min()), float(ratios.max())
