"""What can be measured in a picture without anybody's opinion, and the sentence that tells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

LUMA = (0.299, 0.587, 0.114)
"""Share of each channel in luma (ITU-R BT.601)."""
LEAD = "The picture is"
"""How the sentence begins, by which a text that is being written is seen to reach it."""
BLOCK, FLATTEST = 16, 0.02
"""Side of the blocks that noise is looked for in, and the quantile of theirs that counts."""
FLATTEST_OF_NOISE = 0.836
"""What white noise of deviation 1 is in those: the flattest have less."""
STRIP = 64
"""Rows, a multiple of `BLOCK`, that are looked at at a time."""
LEAST_SIDE = 3
"""Pixels in which a Laplacian has an interior."""
DARKEST, BRIGHTEST = 12, 243
"""Tones beyond these are nearly clipped."""
BLACK, WHITE = 3, 252
"""Tones up to which, and from which on, nothing is drawn any more."""
SHRUNK = 4
"""Side of the squares of pixels that are averaged before colours are looked at."""
NEAREST_GREY, NEAR_GREY, NEGLIGIBLE = 0.01, 0.1, 0.02
"""Of a cast: shares of the picture that are nearest to grey, and a difference of log channels that
says nothing."""
CAST = 0.195
"""Cast from which it is named."""
CLIPPED, BLOCKED = 0.045, 0.1
"""Shares of white and of black from which they are named."""
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""What a cast is called, a sixth of the circle each."""

WORDS: dict[str, tuple[tuple[float, str], ...]] = {
    "sharpness": ((3.0, "very soft"), (4.8, "soft"), (6.3, "fairly sharp"), (np.inf, "sharp")),
    "exposure": (
        (40.0, "very dark"),
        (68.0, "dark"),
        (222.0, "well exposed"),
        (240.0, "bright"),
        (np.inf, "very bright"),
    ),
    "noise": (
        (0.6 / FLATTEST_OF_NOISE, "no noise"),
        (3.0 / FLATTEST_OF_NOISE, "little noise"),
        (6.0 / FLATTEST_OF_NOISE, "some noise"),
        (np.inf, "strong noise"),
    ),
    "contrast": (
        (110.0, "flat contrast"),
        (150.0, "mild contrast"),
        (225.0, "good contrast"),
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


def measure_attributes(pixels: NDArray[np.uint8]) -> dict[str, float]:
    """Measure a picture.

    Args:
        pixels: uint8 (H, W, 3); sides below 3 are measured as if they were that.

    Returns:
        sharpness: log of the variance of the Laplacian of luma, in which noise counts as well;
        noise: Immerkaer's estimate of the deviation of white noise where the picture is flattest,
        in grey levels;
        exposure: mean of the mean luma and its 95th percentile, so that a night with a lit window
        is darker than one without; clipped, blocked: shares that are white and black;
        contrast: luma's range without the outer hundredths; colour: Hasler and Suesstrunk's
        colourfulness; cast: how far light and greys lean to one colour, in log channels, and hue:
        to which, in degrees from red; blocking: luma steps on the 8-pixel lattice over those
        beside it.
    """
    image = Image.fromarray(pixels)
    if min(image.size) < LEAST_SIDE:
        width, height = (max(side, LEAST_SIDE) for side in image.size)
        image = image.resize((width, height), Image.Resampling.NEAREST)
    grey = image.convert("L")
    luma = np.asarray(grey, np.float32)
    shares = np.cumsum(grey.histogram()) / luma.size
    lowest, light, highest = np.searchsorted(shares, (0.01, 0.95, 0.99))
    rgb = np.asarray(image.reduce(SHRUNK), np.float32)
    cast, hue = colour_cast(np.ascontiguousarray(rgb.reshape(-1, 3).T))
    return {
        "sharpness": float(np.log1p(laplacian_variance(luma))),
        "exposure": float(luma.mean() + light) / 2,
        "clipped": float(1 - shares[WHITE - 1]),
        "blocked": float(shares[BLACK]),
        "noise": noise_deviation(luma),
        "contrast": float(highest - lowest),
        "colour": colourfulness(rgb),
        "cast": cast,
        "hue": hue,
        "blocking": lattice_ratio(luma),
    }


def describe_attributes(attributes: Mapping[str, float]) -> dict[str, str]:
    """Give the word for each measured attribute; for clipped tones and a cast only if seen."""
    words = {
        name: next(word for bound, word in bounds if attributes[name] < bound)
        for name, bounds in WORDS.items()
    }
    if attributes["clipped"] >= CLIPPED:
        words["clipped"] = "clipped highlights"
    if attributes["blocked"] >= BLOCKED:
        words["blocked"] = "blocked shadows"
    if attributes["cast"] >= CAST:
        words["cast"] = f"a {HUES[round(attributes['hue'] / 60) % 6]} cast"
    return words


def measured_sentence(attributes: Mapping[str, float]) -> str:
    """Tell what was measured, in one sentence that begins with `LEAD`."""
    words = describe_attributes(attributes)
    told = ("clipped", "blocked", "noise", "contrast", "colour", "cast")
    seen = ", ".join(words[name] for name in told if name in words)
    return (
        f"{LEAD} {words['sharpness']} and {words['exposure']}, with {seen} and {words['blocking']}."
    )


def verdict_sentence(word: str) -> str:
    """Give what follows the sentence where a score is known."""
    return f" Overall {word} quality."


def laplacian(luma: Floats) -> Floats:
    """Four-neighbour Laplacian of the interior."""
    around = luma[:-2, 1:-1] + luma[2:, 1:-1]
    around += luma[1:-1, :-2]
    around += luma[1:-1, 2:]
    around -= 4 * luma[1:-1, 1:-1]
    return around


def laplacian_variance(luma: Floats) -> float:
    """Variance of the Laplacian, whose mean is nothing."""
    squares = sum(float(np.square(laplacian(strip)).sum()) for strip in strips_of(luma))
    return float(squares / ((luma.shape[0] - 2) * (luma.shape[1] - 2)))


def noise_deviation(luma: Floats) -> float:
    """Deviation of white noise by Immerkaer's mask, in the flattest of the blocks.

    Leaves and pebbles answer the mask as noise does, and clipped tones have lost theirs: neither
    counts while there is anything else.
    """
    strips = list(strips_of(luma))
    energies = np.concatenate([block_means(np.square(immerkaer(strip))) for strip in strips])
    tone = np.concatenate([block_means(strip[1:-1, 1:-1]) for strip in strips])
    open_tones = (tone > DARKEST) & (tone < BRIGHTEST)
    counted = energies[open_tones] if open_tones.any() else energies
    return float(np.sqrt(quantile(counted, FLATTEST))) / 6 / FLATTEST_OF_NOISE


def quantile(values: Floats, share: float) -> float:
    """Give the value that a share of all is no greater than; NumPy's own loads masked arrays."""
    place = int(share * (values.size - 1))
    return float(np.partition(values, place)[place])


def immerkaer(luma: Floats) -> Floats:
    """Answer of the mask that smooth shades and straight edges leave at nothing."""
    rows = luma[:-2] + luma[2:]
    rows -= 2 * luma[1:-1]
    response = rows[:, :-2] + rows[:, 2:]
    response -= 2 * rows[:, 1:-1]
    return response


def strips_of(luma: Floats) -> Iterator[Floats]:
    """Cut a picture into strips that stay in a processor's cache, with a row more on each side."""
    for top in range(0, luma.shape[0] - 2, STRIP):
        yield luma[top : top + STRIP + 2]


def block_means(values: Floats) -> Floats:
    """Means (N,) of the whole blocks of an array (H, W); of all of it if it is smaller."""
    height, width = (min(BLOCK, extent) for extent in values.shape)
    rows, columns = values.shape[0] // height, values.shape[1] // width
    whole = values[: rows * height, : columns * width]
    bands = whole.reshape(rows, height, -1).sum(1)
    means: Floats = bands.reshape(rows, columns, width).sum(2).ravel() / (height * width)
    return means


def colour_cast(rgb: Floats) -> tuple[float, float]:
    """Tell how far a picture leans to one colour, and its hue in degrees.

    A blue sky alone is no cast: besides the light (shades of grey, Finlayson and Trezzi 2004) what
    is nearest to grey must be coloured, so the two are joined by their geometric mean; the less it
    counts, the more the picture's own colours leave no grey in it.

    Args:
        rgb: (3, N) channels.
    """
    luma = rgb.mean(0)
    lit = rgb[:, (luma > 2 * DARKEST) & (luma < BRIGHTEST)]
    logs = np.log(np.maximum(lit if lit.size else rgb, 1))
    chroma = np.linalg.norm(logs - logs.mean(0), axis=0)
    squares = np.square(rgb)  # the sixth power, without the slow general one
    red, green, blue = light = np.log((squares * squares * squares).mean(1) + 1) / 6
    nearest, near = (quantile(chroma, share) for share in (NEAREST_GREY, NEAR_GREY))
    leans = (nearest + NEGLIGIBLE) * (np.linalg.norm(light - light.mean()) + NEGLIGIBLE)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    return float(np.sqrt(leans) * np.exp(-near)), float(hue)


def colourfulness(rgb: Floats) -> float:
    """Hasler and Suesstrunk (2003), equation 1."""
    red_green = rgb[..., 0] - rgb[..., 1]
    yellow_blue = 0.5 * (rgb[..., 0] + rgb[..., 1]) - rgb[..., 2]
    deviation = np.hypot(red_green.std(), yellow_blue.std())
    return float(deviation + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))


def lattice_ratio(luma: Floats) -> float:
    """Mean step across columns and rows at multiples of 8, over the mean step elsewhere."""
    strips = list(strips_of(luma))
    across = np.sum([np.abs(np.diff(strip[1:-1], axis=1)).sum(0) for strip in strips], 0)
    down = [np.abs(np.diff(strip[:-1], axis=0)).mean(1) for strip in strips]
    return max(map(_lattice_ratio, (across / (luma.shape[0] - 2), np.concatenate(down))))


def _lattice_ratio(steps: Floats) -> float:
    on_lattice = np.arange(1, steps.size + 1) % 8 == 0
    if not on_lattice.any():
        return 1.0
    return float(steps[on_lattice].mean() / (steps[~on_lattice].mean() + 0.1))
