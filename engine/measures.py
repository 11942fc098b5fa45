"""What can be measured in a picture without anybody's opinion, and the words for it."""

from __future__ import annotations

import numpy as np

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
