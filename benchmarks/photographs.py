"""Pictures to measure times on where no photographs are given: content does not change the work."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.images import IMAGE_SUFFIXES
from meiqa.errors import UsageError

__all__ = ["made_jpeg", "photographs_in"]


def made_jpeg(seed: int, size: tuple[int, int] = (768, 1024), quality: int = 85) -> bytes:
    """Draw clouds with grain and encode them as JPEG: (height, width) pixels, all from a seed."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (6, 8, 3)).astype(np.uint8)
    clouds = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    grain = random.normal(0, random.uniform(2, 20), (*size, 1))
    pixels: NDArray[np.uint8] = (np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def photographs_in(directory: Path | None, count: int, seed: int = 0) -> Iterator[Path | bytes]:
    """Give so many photographs of a directory, in order of their names, or made ones.

    Raises:
        UsageError: the directory holds fewer.
    """
    if directory is None:
        yield from (made_jpeg(seed + number) for number in range(count))
        return
    found = sorted(p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < count:
        raise UsageError(
            "there are too few photographs", seen=f"{len(found)} in {directory}", allowed=count
        )
    yield from found[:count]
