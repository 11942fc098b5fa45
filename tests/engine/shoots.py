"""What a camera brings home: shots made by program, with the EXIF that it would write."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin
from scipy.ndimage import gaussian_filter

from meiqa.engine.images import NamedBytes

Levels = NDArray[np.float64]
SECOND = 0.02
"""How long a shutter is open, in the middle of a bracket."""


def scene(seed: int, size: tuple[int, int] = (240, 360)) -> Levels:
    """Patches of all sizes, coarse ones strongest, as levels (H, W, 3) that repeat nowhere."""
    random, total = np.random.default_rng(seed), np.zeros((*size, 3))
    for cells, strength in ((4, 60), (10, 45), (28, 35), (90, 30)):
        grid = random.uniform(-1, 1, (cells, cells * size[1] // size[0], 3)).astype(np.float32)
        layers = (Image.fromarray(grid[:, :, each]) for each in range(3))
        total += strength * np.stack([each.resize(size[::-1]) for each in layers], 2)
    return np.asarray(total + 110)


def exposed(levels: Levels, ev: float) -> Levels:
    """The same with so much more light, until it clips."""
    return np.asarray(255 * (np.clip(levels, 0, 255) / 255 * 2 ** (ev / 2.2)).clip(0, 1))


def shot(
    levels: Levels, at: float, seconds: float = SECOND, name: str = "a.jpg", **tags: Any
) -> bytes:
    """A JPEG from a camera, `at` seconds past noon."""
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Camera"
    told = exif.get_ifd(ExifTags.IFD.Exif)
    whole, part = divmod(round(100 * at), 100)
    told[ExifTags.Base.DateTimeOriginal] = f"2026:05:01 12:{whole // 60:02d}:{whole % 60:02d}"
    told[ExifTags.Base.SubsecTimeOriginal] = f"{part:02d}"
    told[ExifTags.Base.ExposureTime] = TiffImagePlugin.IFDRational(round(1e6 * seconds), 10**6)
    told[ExifTags.Base.FNumber] = TiffImagePlugin.IFDRational(28, 10)
    told[ExifTags.Base.ISOSpeedRatings] = 200
    for tag, value in tags.items():
        told[ExifTags.Base[tag]] = value
    file = io.BytesIO()
    noise = np.random.default_rng(round(1000 * at)).normal(0, 1.5, levels.shape)
    pixels = Image.fromarray((levels + noise).clip(0, 255).astype(np.uint8))
    pixels.save(file, "JPEG", quality=93, exif=exif)
    return NamedBytes(file.getvalue(), name)


def bracket(levels: Levels, evs: Sequence[float], at: float = 0.0, hand: int = 4) -> list[bytes]:
    """Exposures from a hand that moves a little."""
    moves = np.random.default_rng(len(evs)).integers(-hand, hand + 1, (len(evs), 2))
    return [
        shot(exposed(np.roll(levels, move, (0, 1)), ev), at + 0.4 * number, SECOND * 2**ev)
        for number, (ev, move) in enumerate(zip(evs, moves.tolist(), strict=True))
    ]


def stack(levels: Levels, count: int, at: float = 0.0) -> list[bytes]:
    """Frames whose focus goes from the left to the right."""
    blurred = np.stack([gaussian_filter(levels, (s, s, 0)) for s in np.linspace(0, 4, 9)])
    height, width = levels.shape[:2]
    columns = np.arange(width)
    shots = []
    for number, focus in enumerate(np.linspace(0.1, 0.9, count)):
        step = np.rint(8 * np.abs(columns / width - focus)).astype(int)
        shots.append(shot(blurred[step[None], np.arange(height)[:, None], columns], at + number))
    return shots


def panorama(count: int, overlap: float = 0.35, at: float = 0.0, seed: int = 3) -> list[bytes]:
    """Parts of a long view from left to right, none of them level."""
    width = 360
    step = round(width * (1 - overlap))
    whole = scene(seed, (260, width + step * (count - 1)))
    tops = np.random.default_rng(seed).integers(0, 20, count).tolist()
    parts = (whole[top : top + 240, step * n : step * n + width] for n, top in enumerate(tops))
    return [shot(part, at + 1.2 * number) for number, part in enumerate(parts)]


def burst(levels: Levels, count: int, apart_s: float, subject: Levels | None = None) -> list[bytes]:
    """Shots of one view, in which a subject goes from the left to the right."""
    shots = []
    for number in range(count):
        view = levels.copy()
        if subject is not None:
            high, wide = subject.shape[:2]
            left = round(number * (levels.shape[1] - wide) / (count - 1))
            view[80 : 80 + high, left : left + wide] = subject
        shots.append(shot(view, apart_s * number))
    return shots
