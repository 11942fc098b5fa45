"""Photos are cut into tiles as transformers cuts them for LLaVA-OneVision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from meiqa.engine.images import fitted, tiles_of, token_grid
from meiqa.engine.manifest import ImageProcessing
from meiqa.errors import PackageCorrupted
from meiqa.export.families.llava_onevision import FAMILY
from tests.engine.samples import picture

HALF = (0.5, 0.5, 0.5)
SIDE, PATCH = 384, 14
PINPOINTS = [[SIDE * down, SIDE * across] for down in range(1, 7) for across in range(1, 7)]
CONFIG = {
    "vision_config": {"image_size": SIDE},
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": PINPOINTS,
}
PUBLISHED = ImageProcessing(
    PATCH, 1, 128 * 128, 1024 * 1024, HALF, HALF, False, *FAMILY.tiles(CONFIG)
)
SIZES = [(384, 384), (1, 1), (2000, 3000), (3000, 2000), (400, 1900), (1900, 400), (90, 61)]
SIZES += [(int(h), int(w)) for h, w in np.random.default_rng(0).integers(40, 4000, (40, 2))]


def allowed(image: ImageProcessing) -> list[tuple[int, int]]:
    """The canvases within the limit of the area."""
    canvases = [(r * image.tile_pixels, c * image.tile_pixels) for r, c in image.tilings]
    return [canvas for canvas in canvases if canvas[0] * canvas[1] <= image.max_pixels]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_canvas(size: tuple[int, int]) -> None:
    height, width = fitted(np.zeros((*size, 3), np.uint8), PUBLISHED).shape[:2]
    wanted = select_best_resolution(size, allowed(PUBLISHED))
    assert height == wanted[0] or width == wanted[1]
    assert max(height - wanted[0], width - wanted[1]) == 0
    tiles, order = tiles_of(np.zeros((height, width, 3), np.uint8), PUBLISHED)
    assert token_grid(size, PUBLISHED) == (1, len(order))
    assert len(tiles) == 1 + wanted[0] * wanted[1] // SIDE**2


@pytest.mark.parametrize("size", [(384, 768), (500, 700), (1100, 300), (640, 640)], ids=str)
def test_the_pixels_and_how_many_are_shown(size: tuple[int, int]) -> None:
    pixels = fitted(picture(0, size), PUBLISHED)
    tiles, order = tiles_of(pixels, PUBLISHED)
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(canvas) for canvas in allowed(PUBLISHED)],
        do_normalize=False,
        do_rescale=False,
    )
    wanted = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    along = SIDE // PATCH
    shown = wanted.transpose(0, 2, 3, 1)[:, : along * PATCH, : along * PATCH]
    np.testing.assert_array_equal(tiles, shown)
    assert token_grid(pixels.shape[:2], PUBLISHED) == (1, len(order))
    marks = order == len(tiles) * along**2
    lines = np.diff(np.flatnonzero(marks))
    assert len({*lines}) <= 1  # all lines are as long
    assert order[: along**2].tolist() == list(range(along**2))
    seen = order[~marks]
    assert len({*seen.tolist()}) == len(seen)
    assert marks[-1]


def test_one_tile_is_allowed_where_the_area_is_too_small_for_any() -> None:
    small = replace(PUBLISHED, max_pixels=200 * 200)
    tiles, _ = tiles_of(np.zeros((500, 700, 3), np.uint8), small)
    assert len(tiles) == 2


def test_tiles_without_tilings_are_refused() -> None:
    with pytest.raises(PackageCorrupted, match="does not say how photos are cut into tiles"):
        replace(PUBLISHED, tilings=())
