"""How a photo holds up at 100 %: sharpness, motion, noise and JPEG quality, in full-size cuts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import compress
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
SMALLEST_DETAILED = 4 * CELL
"""Side in pixels of the smallest photo that has a cut with room for frequencies."""
OCTAVES = 3

ROUNDING = 1 / 12
"""Variance, in grey levels squared, of what whole levels leave out; of much blur it hides most."""
LEAST_ENERGY = 1e-3
"""Added to energies of gradients, in grey levels squared, where there may be none."""
LEAST_TEXTURE = 0.2
"""Share of the most textured cut's energy, two octaves on, that a cut is judged from on."""
BLUR_VARIANCE = 2.4
"""Of blur, in square pixels, that halves the excess of fine gradients; see `sharpness_of`."""
SOFTNESS = 2.0
"""Pixels of motion that a photo is taken for whose finest gradients have 1/e of the energy of the
next: motion of a pixel looks like nothing else."""
LENGTHS = (0, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40)
"""Motions that are tried, in pixels."""
RINGS, SECTORS = 9, 12
"""Of frequency and of direction, into which the power of a cut is divided."""
RING_SAMPLES, SECTOR_SAMPLES = 16, 12
LEAST_LEFT, SPREAD = 0.01, 2.0
"""Share of power that motion is taken to leave at least; squared misfit of one likelihood in e."""

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
    lumas = [cut(place) for place in textured]
    energies = np.stack([gradient_energies(luma, variance) for luma in lumas])
    steepness = energies[:, 0] / (energies[:, 2] + LEAST_ENERGY)
    # A cut mostly of noise tells nothing, and of edges neither does one of little texture; if all
    # are so, the first is taken, which is the most textured.
    heard = energies[:, 0] > variance
    told = heard & (energies[:, 2] > LEAST_TEXTURE * energies[:, 2].max())
    sharpest = int((steepness * told).argmax())
    row, column = textured[sharpest]
    jpeg = quality_by_table(luminance_table) if luminance_table else None
    if luminance_table is not None and not luminance_table:
        corner = -row % BLOCK, -column % BLOCK
        jpeg = quality_by_pixels(map(colours, textured[:COMPRESSED]), corner)
    motion = 0.0
    if heard.any():
        powers = [log_powers(luma, variance) for luma in compress(lumas, heard)]
        finest, next_to_it, _ = energies[heard].sum(0)
        shortest = SOFTNESS * np.log(next_to_it / finest)
        motion = float(np.hypot(motion_of(np.mean(powers, 0), side), shortest))
    return Detail(
        sharpness=sharpness_of(float(steepness[sharpest])),
        motion=motion,
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


def gradient_energies(luma: NDArray[Any], variance: float) -> NDArray[Any]:
    """Mean squared gradients (OCTAVES,) of a cut, each of it at half the size of the one before.

    What white noise of a variance adds to them is taken off, as far as anything is left.
    """
    energies = np.empty(OCTAVES)
    for octave in range(OCTAVES):
        falling, rising = luma[1:, 1:] - luma[:-1, :-1], luma[:-1, 1:] - luma[1:, :-1]
        energies[octave] = (np.square(falling).mean() + np.square(rising).mean()) / 2
        luma = (luma[::2, ::2] + luma[1::2, ::2] + luma[::2, 1::2] + luma[1::2, 1::2]) / 4
    added: NDArray[Any] = 2 * variance / 4.0 ** np.arange(OCTAVES)
    energies -= np.minimum(added, 0.9 * energies)
    return energies


def sharpness_of(steepness: float) -> float:
    """Estimate one over the width of edges by gradients: their energy over that two octaves on.

    Blur of variance b leaves energy as 1 / (b + c) where the spectrum falls with the square of the
    frequency, as photographs' do, c being the octave's own; an edge is as wide as a step of its
    slope, which is sqrt(2 pi b).
    """
    variance = BLUR_VARIANCE / max(16 * steepness - 1, 1e-3)
    return float(min(1.0, 1 / np.sqrt(2 * np.pi * variance)))


def motion_of(powers: NDArray[Any], side: int) -> float:
    """Estimate the length of motion in pixels, by what it took of the power of each direction.

    An even motion by L takes all but sinc²(L f) of the power at f cycles a pixel along its way.
    What is left after that is undone should be a spectrum that depends on frequency and direction
    alone, not on both together, so the length and way that leave least of the latter are the
    likeliest; all of them are averaged by likelihood.

    Args:
        powers: (RINGS, SECTORS), logarithmic.
        side: of the cuts they are of, in pixels.
    """
    unlike = powers - motion_losses(side)
    for axis in (-2, -1):
        unlike = unlike - unlike.mean(axis, keepdims=True)
    squares = np.square(unlike).sum((-2, -1))
    likelihoods = np.exp((squares.min() - squares) / SPREAD)
    return float(np.expm1(likelihoods.sum(0) @ np.log1p(LENGTHS) / likelihoods.sum()))


@cache
def polar_grid(side: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Frequencies across and down, in cycles a pixel, each (RINGS, SECTORS, samples).

    Rings are wider the farther out, from four periods a cut on; sectors span half a turn.
    """
    rings = (np.arange(RINGS * RING_SAMPLES) + 0.5) / (RINGS * RING_SAMPLES)
    radius = 0.5 * (side / 8) ** (rings - 1)
    angle = np.pi * (np.arange(SECTORS * SECTOR_SAMPLES) + 0.5) / (SECTORS * SECTOR_SAMPLES)
    grid = np.stack([np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle))])
    grid = grid.reshape(2, RINGS, RING_SAMPLES, SECTORS, SECTOR_SAMPLES).swapaxes(2, 3)
    across, down = grid.reshape(2, RINGS, SECTORS, -1)
    return across, down


def log_powers(cut: NDArray[Any], variance: float) -> NDArray[Any]:
    """Logarithmic power (RINGS, SECTORS) of a cut beyond white noise of a variance."""
    side = len(cut)
    window = np.hanning(side + 2)[1:-1].astype(cut.dtype)
    windowed = (cut - cut.mean()) * window[:, None] * window
    spectrum = np.fft.rfft2(windowed)
    across, down = (np.rint(side * each).astype(np.intp) for each in polar_grid(side))
    # The half that a real transform leaves out mirrors the other through the middle.
    turned = across < 0
    found = spectrum[np.where(turned, -down, down) % side, np.abs(across)]
    power = (np.square(found.real) + np.square(found.imag)).mean(-1)
    power /= np.square(window).sum(dtype=np.float64) ** 2
    powers: NDArray[Any] = np.log(np.maximum(power - variance, variance / 2))
    return powers


@cache
def motion_losses(side: int) -> NDArray[Any]:
    """Logarithm of what motion leaves: (SECTORS, lengths, RINGS, SECTORS), by way and length."""
    across, _ = polar_grid(side)
    left = np.sinc(np.array(LENGTHS)[:, None, None, None] * across) ** 2
    losses = np.log(left.mean(-1) + LEAST_LEFT)
    return np.stack([np.roll(losses, way, -1) for way in range(SECTORS)])
