"""What can be measured in a picture without anybody's opinion, and the words for it."""

from __future__ import annotations

import numpy as np

from meiqa.types import Detail

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
BLOCK, FLATTEST = 16, 0.02
"""Side of the blocks that noise is looked for in, and the quantile of theirs that counts."""
DARKEST, BRIGHTEST = 12, 243
"""Tones beyond these are nearly clipped."""

WORDS: dict[str, tuple[tuple[float, str], ...]] = {
    "sharpness": ((3.0, "very soft"), (4.8, "soft"), (6.3, "fairly sharp"), (np.inf, "sharp")),
    "noise": (
        (0.6, "no noise"),
        (2.2, "little noise"),
        (5.0, "some noise"),
        (np.inf, "strong noise"),
    ),
    "exposure": (
        (40.0, "very dark"),
        (75.0, "dark"),
        (150.0, "well exposed"),
        (190.0, "bright"),
        (np.inf, "very bright"),
    ),
    "contrast": (
        (25.0, "flat contrast"),
        (42.0, "mild contrast"),
        (65.0, "good contrast"),
        (np.inf, "strong contrast"),
    ),
    "colour": (
        (10.0, "almost no colour"),
        (25.0, "muted colours"),
        (55.0, "natural colours"),
        (np.inf, "vivid colours"),
    ),
    "blocking": ((1.35, "no blocking"), (1.8, "slight blocking"), (np.inf, "visible blocking")),
}
"""For each attribute the upper bounds of its words, in increasing order."""


def measure_attributes(pixels: np.ndarray) -> dict[str, float]:
    """Measure a picture.

    Args:
        pixels: uint8 (H, W, 3), sides of at least 16.

    Returns:
        sharpness: log of the variance of the Laplacian of luma;
        noise: Immerkaer's estimate of the deviation of white noise where the picture is flattest,
        in grey levels;
        exposure: mean luma; contrast: deviation of luma; colour: Hasler and Suesstrunk's
        colourfulness; blocking: luma steps on the 8-pixel lattice over those beside it.
    """
    rgb = pixels.astype(np.float32)
    luma = rgb @ LUMA
    return {
        "sharpness": float(np.log1p(laplacian(luma).var())),
        "noise": noise_deviation(luma),
        "exposure": float(luma.mean()),
        "contrast": float(luma.std()),
        "colour": colourfulness(rgb),
        "blocking": lattice_ratio(luma),
    }


def describe_attributes(attributes: dict[str, float]) -> dict[str, str]:
    """The word for each measured attribute."""
    return {
        name: next(word for bound, word in WORDS[name] if value < bound)
        for name, value in attributes.items()
    }


def laplacian(luma: np.ndarray) -> np.ndarray:
    """Four-neighbour Laplacian of the interior."""
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    response: np.ndarray = around - 4 * luma[1:-1, 1:-1]
    return response


def noise_deviation(luma: np.ndarray) -> float:
    """Deviation of white noise by Immerkaer's mask, in the flattest of the blocks.

    Leaves and pebbles answer the mask as noise does, and clipped tones have lost theirs: neither
    counts while there is anything else.
    """
    rows = luma[:-2] - 2 * luma[1:-1] + luma[2:]
    response = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    deviations = np.sqrt(block_means(response**2)) / 6
    tone = block_means(luma[1:-1, 1:-1])
    open_tones = (tone > DARKEST) & (tone < BRIGHTEST)
    counted = deviations[open_tones] if open_tones.any() else deviations
    return float(np.quantile(counted, FLATTEST))


def block_means(values: np.ndarray) -> np.ndarray:
    """Means (N,) of the whole blocks of an array (H, W)."""
    side = min(BLOCK, *values.shape)
    rows, columns = values.shape[0] // side, values.shape[1] // side
    whole = values[: rows * side, : columns * side]
    means: np.ndarray = whole.reshape(rows, side, columns, side).mean((1, 3)).ravel()
    return means


def colourfulness(rgb: np.ndarray) -> float:
    """Hasler and Suesstrunk (2003), equation 1."""
    red_green = rgb[..., 0] - rgb[..., 1]
    yellow_blue = 0.5 * (rgb[..., 0] + rgb[..., 1]) - rgb[..., 2]
    deviation = np.hypot(red_green.std(), yellow_blue.std())
    return float(deviation + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))


def lattice_ratio(luma: np.ndarray) -> float:
    """Mean step across columns and rows at multiples of 8, over the mean step elsewhere."""
    ratios = []
    for image in (luma, luma.T):
        steps = np.abs(np.diff(image, axis=1)).mean(0)
        on_lattice = np.arange(1, steps.size + 1) % 8 == 0
        ratios.append(steps[on_lattice].mean() / (steps[~on_lattice].mean() + 0.1))
    return float(max(ratios))


CUT, CELL = 256, 16
"""Sides in pixels of the cuts that a photo is looked at in, and of the cells they are chosen by."""
TEXTURED, FLAT = 12, 4
"""How many cuts show sharpness and motion, and how many noise."""
OCTAVES = 5
SMALLEST_DETAILED = CELL << (OCTAVES - 3)
"""Side in pixels of the smallest photo in whose cuts the coarsest octave still has differences."""

FLATTEST_OF_NOISE = 0.836
"""What `noise_deviation` gives for white noise of deviation 1: its flattest blocks have less."""
LEAST_ENERGY = 1e-3
"""Added to energies of gradients, in grey levels squared, where there may be none."""
LEAST_TEXTURE = 0.05
"""Share of the most textured cut's energy, two octaves on, that a cut is judged from on."""
BLUR_VARIANCE = 2.4
"""Of blur, in square pixels, that halves the excess of fine gradients; see `sharpness_of`."""
SOFTNESS_SHARE, ONE_PIXEL, DOUBLINGS, LONGEST_MOTION = 1.5, 1.78, 3.8, float(CUT)
"""See `motion_of`: motion doubles so often while what is seen of it grows by one."""

Place = tuple[int, int]
"""Row and column of the corner of a cut."""


def measure_detail(pixels: np.ndarray) -> Detail | None:
    """Measure sharpness, motion and noise at full size, in a few cuts of a photo.

    Args:
        pixels: uint8 (H, W, 3); None is given below `SMALLEST_DETAILED` on a side.
    """
    side = min(CUT, *(each // (2 * CELL) * 2 * CELL for each in pixels.shape[:2]))
    if side < SMALLEST_DETAILED:
        return None
    textured, flat = chosen_places(pixels, side)

    def cut(place: Place) -> np.ndarray:
        row, column = place
        rgb = pixels[row : row + side, column : column + side]
        luma: np.ndarray = rgb.astype(np.float32) @ LUMA
        return luma

    noise = noise_deviation(np.hstack([cut(place) for place in flat])) / FLATTEST_OF_NOISE
    tensors = np.stack([gradient_tensors(cut(place), noise) for place in textured])
    energies = tensors.trace(axis1=2, axis2=3)
    steepness = energies[:, 0] / (energies[:, 2] + LEAST_ENERGY)
    # A cut of little texture, or mostly of noise, tells nothing of edges; if all are, the first is
    # taken, which is the most textured.
    told = (energies[:, 2] > LEAST_TEXTURE * energies[:, 2].max()) & (energies[:, 0] > noise**2)
    sharpest = int((steepness * told).argmax())
    row, column = textured[sharpest]
    return Detail(
        sharpness=sharpness_of(float(steepness[sharpest])),
        motion=motion_of(tensors.sum(0)),
        noise=noise,
        place=(column, row, side, side),
    )


def chosen_places(pixels: np.ndarray, side: int) -> tuple[list[Place], list[Place]]:
    """Choose the cuts of a photo: the most textured, central before others, and the flattest.

    Texture is looked for in cells so large that damage changes little of it. Flat cuts are of open
    tones, if there are any.
    """
    rows, columns = (each // CELL for each in pixels.shape[:2])
    # Every fourth row of green: a twelfth of the photo says enough of its cells.
    green = pixels[: rows * CELL : 4, : columns * CELL, 1]
    tones = green.reshape(rows, CELL // 4, columns, CELL).mean((1, 3), dtype=np.float32)
    steps = np.zeros_like(tones)
    steps[:, 1:] += np.abs(np.diff(tones, axis=1))
    steps[1:] += np.abs(np.diff(tones, axis=0))
    half = side // CELL // 2
    texture, tone = (overlapping_means(values, half) for values in (steps, tones))
    down, across = (
        np.linspace(-1, 1, count) if count > 1 else np.zeros(1) for count in texture.shape
    )
    central = np.exp(-(down[:, None] ** 2) - across**2)
    open_tones = (tone > DARKEST) & (tone < BRIGHTEST)
    chosen = (
        apart(-texture * central, TEXTURED),
        apart(np.where(open_tones, texture, texture + 255), FLAT),
    )
    step = half * CELL
    textured, flat = ([(row * step, column * step) for row, column in each] for each in chosen)
    return textured, flat


def overlapping_means(values: np.ndarray, half: int) -> np.ndarray:
    """Means of squares of twice `half` that lie half over each other."""
    rows, columns = (each // half for each in values.shape)
    whole = values[: rows * half, : columns * half]
    blocks = whole.reshape(rows, half, columns, half).mean((1, 3))
    means: np.ndarray = (blocks[1:, 1:] + blocks[1:, :-1] + blocks[:-1, 1:] + blocks[:-1, :-1]) / 4
    return means


def apart(values: np.ndarray, count: int) -> list[Place]:
    """Choose the least of values, at most so many, of which no two are next to each other."""
    chosen: list[Place] = []
    for index in values.argsort(axis=None, kind="stable"):
        row, column = divmod(int(index), values.shape[1])
        if all(max(abs(row - r), abs(column - c)) > 1 for r, c in chosen):
            chosen.append((row, column))
            if len(chosen) == count:
                break
    return chosen


def gradient_tensors(luma: np.ndarray, noise: float) -> np.ndarray:
    """Structure tensors (OCTAVES, 2, 2) of a cut, each of it at half the size of the one before.

    What white noise of a deviation adds to them is taken off, as far as anything is left.
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
        noise**2 / 4.0 ** np.arange(OCTAVES), 0.9 * np.linalg.eigvalsh(tensors)[:, 0]
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


def motion_of(tensors: np.ndarray) -> float:
    """Estimate the length of motion in pixels, by what the finest octave lacks in one direction.

    Motion takes fine gradients along its way and leaves those across it: the ratios of finest to
    coarsest tensor then differ by direction. The softness of the softest direction counts beside
    that, since motion of a few pixels looks like nothing else; it has an end where the two finest
    octaves are smooth, so that blur of any radius is read as no more than a short motion.
    """
    least, most = ratios_by_direction(tensors[0], tensors[-1])
    softness = -np.log(ratios_by_direction(tensors[0], tensors[1])[0])
    seen = np.log(most / least) + SOFTNESS_SHARE * softness
    return float(min(LONGEST_MOTION, 2 ** (DOUBLINGS * (seen - ONE_PIXEL))))


def ratios_by_direction(fine: np.ndarray, coarse: np.ndarray) -> tuple[float, float]:
    """Give the least and the greatest ratio of two tensors in any direction."""
    least = LEAST_ENERGY * np.eye(2)
    ratios = np.linalg.eigvals(np.linalg.solve(coarse + least, fine + least)).real
    return float(ratios.min()), float(ratios.max())
