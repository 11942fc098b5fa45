"""The demonstration: real photographs, clean and degraded, and what meiqa makes of them."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from PIL import Image, ImageFilter

from meiqa.errors import UsageError
from meiqa.formats import comparison_phrase, telling_comparisons, total_ms
from meiqa.types import Assessment, Budget

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

__all__ = ["demo_photos", "show"]

# These lie in scikit-image's wheel; its others are fetched from the network on first use.
_FILES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
_WIDTH = 110
_HEADER = f"{'photo':<26}{'initial':>8}   {'score':<14}{'word':<11}{'ms':>6}"


def demo_photos() -> list[tuple[str, Image.Image]]:
    """Give names and photographs: each one clean, then under each degradation.

    Raises:
        UsageError: scikit-image, which carries the photographs, is not installed.
    """
    folder = _photo_folder()
    degradations: dict[str, Callable[[Image.Image], Image.Image]] = {
        "clean": lambda photo: photo,
        "blurred": _blurred,
        "JPEG quality 8": _compressed,
        "noisy": _noisy,
        "dark": _darkened,
    }
    photos = []
    for file in _FILES:
        with Image.open(folder / file) as image:
            photo = image.convert("RGB")
        photos += [
            (f"{Path(file).stem}, {name}", degrade(photo)) for name, degrade in degradations.items()
        ]
    return photos


def show(
    engine: Engine,
    photos: Sequence[tuple[str, Image.Image]],
    budget: Budget | None,
    k: int | None,
    stream: TextIO,
) -> None:
    """Score the photos one after the other, learning from each, and print a row for each."""
    stream.write(f"{_HEADER}\n{'-' * _WIDTH}\n")
    reflections = 0
    for name, photo in photos:
        assessment = engine.score(photo, budget=budget, k=k)
        reflections += assessment.reflection is not None
        stream.write(_row(name, assessment) + "\n")
        stream.flush()
    stream.write(f"{'-' * _WIDTH}\n{len(photos)} photos, {reflections} reflections written\n")


def _row(name: str, assessment: Assessment) -> str:
    score = f"{assessment.score:.2f} ± {assessment.std:.2f}"
    figures = (
        f"{name:<26}{assessment.initial_score:8.2f}   {score:<14}{assessment.word:<11}"
        f"{total_ms(assessment.timings_ms):6.0f}"
    )
    telling = ", ".join(comparison_phrase(one) for one in telling_comparisons(assessment))
    paragraphs = [assessment.summary or "(no summary)", telling or "(no comparisons)"]
    indent = "    "
    details = [
        textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
        for text in paragraphs
    ]
    return "\n".join([figures, *details])


def _photo_folder() -> Path:
    """Find scikit-image's data without importing it: only the files are needed."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if folder is None or not all((folder / file).is_file() for file in _FILES):
        raise UsageError(
            "scikit-image, whose photographs the demo scores, is not installed",
            hint="pip install scikit-image",
        )
    return folder


def _blurred(photo: Image.Image) -> Image.Image:
    return photo.filter(ImageFilter.GaussianBlur(3))


def _compressed(photo: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=8)
    return Image.open(buffer)


def _noisy(photo: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 30, (photo.height, photo.width, 3))
    return Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))


def _darkened(photo: Image.Image) -> Image.Image:
    return photo.point(lambda value: value * 0.25)
