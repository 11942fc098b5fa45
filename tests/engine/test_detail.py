"""What is seen at full size: the order of damage, the place, and pictures that show nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from meiqa.engine.detail import SMALLEST_DETAILED, measure_detail
from meiqa.engine.reasons import LEAST_MOTION
from meiqa.serve.guidance import SHORT_MOTION
from meiqa.types import Detail

Picture = NDArray[np.uint8]


def scene(height: int, width: int, seed: int = 0) -> Picture:
    """Discs of all sizes and tones under a flat sky."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (width, height), (150, 150, 150))
    draw = ImageDraw.Draw(picture)
    for _ in range(height * width // 300):
        x, y, radius = (
            rng.integers(width),
            rng.integers(height // 3, height),
            20 * rng.random() ** 3,
        )
        tone = tuple(map(int, rng.integers(20, 235, 3)))
        draw.ellipse((x - radius, y - radius, x + radius + 1, y + radius + 1), fill=tone)
    return np.array(picture)


def blurred(picture: Picture, radius: float) -> Picture:
    return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def shaken(picture: Picture, length: int, axis: int) -> Picture:
    shifted = [np.roll(picture, step, axis).astype(np.float32) for step in range(length)]
    return np.mean(shifted, 0).round().astype(np.uint8)


def noisy(picture: Picture, deviation: float) -> Picture:
    noise = np.random.default_rng(1).normal(0, deviation, picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


def seen(picture: Picture) -> Detail:
    detail = measure_detail(picture)
    assert detail is not None
    return detail


def test_sharpness_falls_with_defocus_and_gives_the_width_of_edges() -> None:
    picture = scene(800, 1000)
    sharp = [seen(blurred(picture, radius)).sharpness for radius in (0, 1, 2, 3, 4.5, 6)]
    assert all(one > other for one, other in pairwise(sharp))
    assert 1 / sharp[3] == pytest.approx(3 * np.sqrt(2 * np.pi), rel=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_motion_grows_with_its_length_in_any_direction(axis: int) -> None:
    picture = scene(800, 1000)
    motion = [seen(shaken(picture, length, axis)).motion for length in (1, 4, 8, 16, 24)]
    assert all(one < other for one, other in pairwise(motion))
    assert motion[0] < 2 < 8 < motion[-1]


def test_defocus_is_not_taken_for_a_long_motion() -> None:
    """Neither by a cull nor by a camera, where edges run every way."""
    picture = scene(800, 1000)
    motion = max(seen(blurred(picture, radius)).motion for radius in (1, 2, 2.5, 3, 4, 6))
    assert motion < min(LEAST_MOTION, SHORT_MOTION)


def test_noise_is_measured_in_grey_levels_of_luma() -> None:
    picture = scene(800, 1000)
    clean, *levels = [seen(noisy(picture, deviation)).noise for deviation in (0, 3, 6, 12, 24)]
    assert clean < 0.5
    luma = np.sqrt(0.299**2 + 0.587**2 + 0.114**2)
    assert levels == pytest.approx([deviation * luma for deviation in (3, 6, 12, 24)], rel=0.2)


def test_a_little_noise_is_not_taken_for_sharpness() -> None:
    picture = blurred(scene(800, 1000), 2)
    assert seen(noisy(picture, 4)).sharpness == pytest.approx(seen(picture).sharpness, rel=0.15)


def test_a_shallow_focus_is_judged_where_it_lies() -> None:
    picture = scene(1024, 1280)
    shallow = blurred(picture, 6)
    shallow[512:832, 512:832] = picture[512:832, 512:832]
    detail, whole = seen(shallow), seen(picture)
    assert detail.sharpness > 0.8 * whole.sharpness
    x, y, width, height = detail.place
    assert 384 <= x <= 640
    assert 384 <= y <= 640
    assert (width, height) == (256, 256)


@pytest.mark.parametrize("tone", [0, 128, 255])
def test_a_picture_of_one_tone_shows_nothing(tone: int) -> None:
    detail = seen(np.full((300, 400, 3), tone, np.uint8))
    assert detail.sharpness < 0.01
    assert detail.motion < 0.1
    assert detail.noise == 0


@pytest.mark.parametrize("shape", [(64, 64), (64, 2000), (97, 131), (513, 255)])
def test_a_cut_lies_within_any_photo(shape: tuple[int, int]) -> None:
    x, y, width, height = seen(scene(*shape)).place
    assert 0 <= x
    assert x + width <= shape[1]
    assert 0 <= y
    assert y + height <= shape[0]


def test_a_thumbnail_has_no_detail() -> None:
    assert measure_detail(np.zeros((SMALLEST_DETAILED - 1, 500, 3), np.uint8)) is None
