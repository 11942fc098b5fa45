"""A reference beside a photo: read once, brought onto each photo's grid, refused where it can't be.

Photo and reference of one size go the same way to the tower. Of two sizes they must be of one
shape: sides in the same proportion, within 1 %; the reference is then resized to the very pixels
that the tower sees of the photo. Anything else is refused: a crop is not aligned with what it was
cut from, and patterns are compared cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.images import ImageSource, Pixels, load_pixels
from meiqa.engine.vlm import Floats, VisualTokens
from meiqa.errors import ImageError, OutputUnwritable

LARGEST_DIFFERENCE = 0.01
"""Of the logarithms of two aspect ratios."""
OPAQUE = 0.7
"""How much of the photo the map hides where the distortion is strongest."""
_COLOURS = np.array([[255, 235, 90], [250, 140, 30], [200, 20, 30]], np.float32)
"""Of the map: weak, middling, strong."""

Fit = Callable[[Pixels], NDArray[np.uint8]]
Encode = Callable[[NDArray[np.uint8]], VisualTokens]


@dataclass(frozen=True, eq=False)
class ReferencePhoto:
    """A reference, with its visual tokens on the grids of the photos it was compared with.

    Attributes:
        pixels: as it was decoded.
    """

    pixels: Pixels
    _fit: Fit
    _encode: Encode
    _tokens: dict[tuple[int, ...], VisualTokens] = field(default_factory=dict)

    @classmethod
    def load(cls, source: ImageSource, fit: Fit, encode: Encode) -> ReferencePhoto:
        """Decode a reference.

        Args:
            source: path, encoded bytes, Pillow image or uint8 array.
            fit: a photo → the pixels that the tower sees of it.
            encode: these pixels → visual tokens.

        Raises:
            ImageError: it can't be decoded.
        """
        return cls(load_pixels(source), fit, encode)

    def is_same(self, photo: Pixels) -> bool:
        """Whether it is the photo, pixel for pixel."""
        return photo.digest == self.pixels.digest

    def tokens_beside(self, photo: Pixels) -> VisualTokens:
        """Its tokens on a photo's grid.

        Raises:
            ImageError: it is of another shape than the photo.
        """
        require_same_shape(photo, self.pixels)
        size = self._fit(photo).shape
        known = self._tokens.get(size)
        if known is None:
            same = photo.array.shape == self.pixels.array.shape
            seen = self._fit(self.pixels) if same else resized(self.pixels.array, size)
            known = self._tokens[size] = self._encode(seen)
        return known


def require_same_shape(photo: Pixels, reference: Pixels) -> None:
    """Refuse a reference whose sides are in another proportion than the photo's.

    Raises:
        ImageError: they are.
    """
    (height, width), (rows, columns) = (p.array.shape[:2] for p in (photo, reference))
    if abs(math.log(width * rows / (height * columns))) > LARGEST_DIFFERENCE:
        raise ImageError(
            f"{photo.name}: the reference {reference.name} is of another shape",
            seen=f"{width} x {height} beside {columns} x {rows} pixels",
            allowed="sides in the same proportion, within 1 %",
            hint="crop or pad the reference to what the photo shows",
        )


def resized(pixels: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pixels at another size (H, W, …), as `fit_to_grid` resizes."""
    target = size[1], size[0]
    image = Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.array(image)


def painted(pixels: NDArray[np.uint8], strengths: Floats) -> NDArray[np.uint8]:
    """A photo (H, W, 3) with a map of distortion (H, W), 0-1, laid over it."""
    place = np.clip(strengths, 0.0, 1.0) * (len(_COLOURS) - 1)
    below = np.minimum(place.astype(np.intp), len(_COLOURS) - 2)
    share = (place - below)[..., None]
    colours = (1 - share) * _COLOURS[below] + share * _COLOURS[below + 1]
    cover = OPAQUE * np.clip(strengths, 0.0, 1.0)[..., None]
    laid: NDArray[np.uint8] = np.rint((1 - cover) * pixels + cover * colours).astype(np.uint8)
    return laid


def write_map(path: str | Path, pixels: NDArray[np.uint8], strengths: Floats) -> None:
    """Write a photo with its map as PNG.

    Raises:
        OutputUnwritable: the file can't be written.
    """
    try:
        Image.fromarray(painted(pixels, strengths)).save(path, "PNG")
    except OSError as error:
        raise OutputUnwritable(f"{path} can't be written", seen=error.strerror or error) from error
