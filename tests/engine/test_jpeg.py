"""The quality of a JPEG: exact by its file, and by what it left in the pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.detail import measure_detail
from meiqa.engine.images import ImageSource, load_pixels
from meiqa.types import JpegQuality
from tests.engine.test_detail import blurred, noisy, scene

Picture = NDArray[np.uint8]
PHOTO = noisy(blurred(scene(300, 420), 0.7), 2)


def saved(picture: Picture, format: str = "JPEG", **options: Any) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def told(source: ImageSource) -> JpegQuality | None:
    photo = load_pixels(source)
    detail = measure_detail(photo.array, photo.luminance_table)
    assert detail is not None
    return detail.jpeg


def decoded(file: bytes) -> Picture:
    return load_pixels(file).array


@pytest.mark.parametrize("quality", range(1, 101))
def test_a_file_with_standard_tables_tells_it_exactly(quality: int) -> None:
    assert told(saved(PHOTO[:64, :64], quality=quality)) == JpegQuality(quality, "standard table")


def test_another_table_is_said_to_be_one_and_the_nearest_is_given() -> None:
    tables = [[2 * each for each in range(1, 65)]] * 2
    found = told(saved(PHOTO, qtables=tables))
    assert found is not None
    assert found.source == "other table"
    assert 40 < found.quality < 50  # its sum, 4160, is between theirs


@pytest.mark.parametrize("quality", [10, 40, 75, 90, 97])
@pytest.mark.parametrize("first", [(0, 0), (3, 5)])
def test_pixels_tell_it_wherever_the_picture_was_cut(quality: int, first: tuple[int, int]) -> None:
    top, left = first
    cut = decoded(saved(PHOTO, quality=quality, subsampling=0))[top:, left:]
    assert told(saved(cut, "PNG")) == JpegQuality(quality, "pixels")


def test_a_clipped_part_does_not_spoil_it() -> None:
    burnt = PHOTO.copy()
    burnt[:, 200:, 0] = 255
    assert told(saved(decoded(saved(burnt, quality=60)), "PNG")) == JpegQuality(60, "pixels")


def test_what_was_no_jpeg_tells_none() -> None:
    assert told(saved(PHOTO, "PNG")) is None
    assert told(saved(np.full((200, 200, 3), 90, np.uint8), "PNG")) is None
    assert told(saved(np.zeros((200, 200, 3), np.uint8), "PNG")) is None


def test_an_open_picture_is_told_by_its_pixels_and_an_array_not_at_all() -> None:
    """It may have been changed since it was opened; and a camera gives many arrays a second."""
    file = saved(PHOTO, quality=80)
    with Image.open(io.BytesIO(file)) as image:
        assert told(image) == JpegQuality(80, "pixels")
    assert told(decoded(file)) is None
