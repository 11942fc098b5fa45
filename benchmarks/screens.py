"""Screen content and generated-looking pictures, made from photographs with Pillow alone.

Nobody has scored them, but what is done to them makes them worse for certain, so the order of each
one's own versions is known. The same photograph gives the same pictures in every run.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

__all__ = ["BLUR_RADII", "JPEG_QUALITIES", "KINDS", "Rung", "rungs"]

BLUR_RADII = (1.0, 2.0, 4.0)
JPEG_QUALITIES = (35, 15, 6)
"""From mild to strong."""

_WORDS = (
    *("Settings", "Export as", "Inbox (12)", "Revenue 2024", "Undo", "Layer 3", "100 %", "Share"),
    *("Terms of use", "Latency, ms", "Chapter 7", "Menu", "Sign in", "37.2 °C", "Save", "Route 9"),
)
_INKS = ((24, 28, 36), (250, 250, 250), (214, 46, 52), (28, 110, 214), (242, 190, 30))
_PAPERS = ((255, 255, 255), (246, 244, 238), (32, 34, 40), (228, 236, 246))


@dataclass(frozen=True, eq=False)
class Rung:
    """One version of a picture.

    Attributes:
        kind: what was made of the photograph, one of `KINDS`.
        ladder: "blur" or "jpeg"; level: 0 as it was made, then worse up to 3.
        pixels: (H, W, 3).
    """

    kind: str
    ladder: str
    level: int
    pixels: NDArray[np.uint8]


def rungs(photograph: NDArray[np.uint8], seed: int) -> Iterator[Rung]:
    """Make every kind of picture from a photograph (H, W, 3), each on both ladders."""
    for kind, make in KINDS.items():
        made = make(Image.fromarray(photograph), np.random.default_rng(seed))
        for ladder, worse in _LADDERS.items():
            for level, image in enumerate((made, *worse(made))):
                yield Rung(kind, ladder, level, np.asarray(image))


def as_photographed(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Leave it: what the other kinds are compared with."""
    return photograph


def captioned(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Write sharp text of several sizes on it, with and without a ground."""
    made = photograph.copy()
    draw = ImageDraw.Draw(made)
    for _ in range(14):
        font = _font(int(rng.integers(12, 40)))
        at = _place(made, rng)
        words = " ".join(str(word) for word in rng.choice(_WORDS, 2))
        if rng.random() < 0.5:
            draw.rectangle(draw.textbbox(at, words, font), fill=_one(_PAPERS[:2], rng))
            draw.text(at, words, _INKS[0], font)
        else:
            draw.text(at, words, _one(_INKS, rng), font)
    return made


def charted(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lay flat graphics on half of it: bars, discs and lines on a panel."""
    made = photograph.copy()
    draw = ImageDraw.Draw(made)
    wide, high = made.size
    left = 0 if rng.random() < 0.5 else wide // 2
    draw.rectangle((left, 0, left + wide // 2, high), fill=_one(_PAPERS, rng))
    step = wide // 18
    for bar in range(8):
        top = int(rng.integers(high // 3, high - min(20, high // 18)))
        x = left + (bar + 1) * step - step // 2
        draw.rectangle(
            (x, top, x + step // 2, high - min(12, high // 30)), fill=_one(_INKS[2:], rng)
        )
    for _ in range(3):
        x = left + int(rng.integers(min(20, wide // 16), wide // 2 - min(40, wide // 9)))
        y = int(rng.integers(min(10, high // 36), high // 3))
        radius = int(rng.integers(8, 24))
        draw.ellipse((x, y, x + radius, y + radius), fill=_one(_INKS[2:], rng))
    points = [
        (left + at * step, int(rng.integers(min(20, high // 18), high // 2))) for at in range(1, 9)
    ]
    draw.line(points, fill=_INKS[3], width=2)
    return made


def windowed(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Show it in the window of a program: bars, buttons, a list with text beside it."""
    wide, high = photograph.size
    paper = _one(_PAPERS, rng)
    ink = _INKS[1] if sum(paper) < 300 else _INKS[0]
    made = Image.new("RGB", (wide, high), paper)
    aside, above = wide // 3, 36
    made.paste(ImageOps.fit(photograph, (wide - aside, high - above)), (aside, above))
    draw = ImageDraw.Draw(made)
    font = _font(14)
    for at in range(4):
        x = 8 + at * (wide // 4)
        draw.rounded_rectangle((x, 6, x + wide // 5, 30), 6, fill=_one(_INKS[2:], rng))
        draw.text((x + 8, 9), str(rng.choice(_WORDS)), _INKS[1], font)
    for y in range(above + 8, high - 16, 22):
        draw.text((8, y), str(rng.choice(_WORDS)), ink, font)
        draw.line((0, y + 19, aside - 6, y + 19), fill=(150, 150, 150))
    return made


def painted(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Make it look generated: texture smoothed to flat areas, hard edges, strong colours."""
    smooth = photograph.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.ModeFilter(5))
    vivid = ImageEnhance.Color(ImageOps.posterize(smooth, 6)).enhance(1.4)
    return vivid.filter(ImageFilter.UnsharpMask(2, 120, 2))


KINDS: Mapping[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "photograph": as_photographed,
    "text": captioned,
    "graphics": charted,
    "window": windowed,
    "generated": painted,
}


def _blurred(image: Image.Image) -> Iterator[Image.Image]:
    return (image.filter(ImageFilter.GaussianBlur(radius)) for radius in BLUR_RADII)


def _compressed(image: Image.Image) -> Iterator[Image.Image]:
    for quality in JPEG_QUALITIES:
        held = io.BytesIO()
        image.save(held, "JPEG", quality=quality)
        yield Image.open(held).convert("RGB")


_LADDERS = {"blur": _blurred, "jpeg": _compressed}


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that no machine draws another."""
    return ImageFont.load_default(size)


def _place(image: Image.Image, rng: np.random.Generator) -> tuple[float, float]:
    wide, high = image.size
    return float(rng.integers(0, max(1, wide * 3 // 4))), float(rng.integers(0, high - 20))


def _one(
    colours: tuple[tuple[int, int, int], ...], rng: np.random.Generator
) -> tuple[int, int, int]:
    return colours[int(rng.integers(len(colours)))]
