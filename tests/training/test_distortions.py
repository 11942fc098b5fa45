"""The KADID-10k distortions: shapes, seeds, order of the levels, errors."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from training.distortions import (
    KINDS,
    LEVELS,
    TONE_SCORES,
    TONES,
    Bytes,
    damage_scores,
    distort,
    kadid_scores,
)

NUMBERS = [kind.number for kind in (*KINDS, *TONES)]
TWO_SIDED = {18, 25}


def _photo_like(height: int, width: int) -> Bytes:
    """Smooth colour gradients, sharp edges and fine texture."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = np.stack([np.sin(x / 23), np.sin((x + y) / 31), np.cos(y / 17)], axis=2)
    squares = ((x // 24 + y // 24) % 2)[..., None] * 40
    texture = rng.normal(0, 6, (height, width, 1))
    pixels = 110 + 50 * waves + squares + texture
    clipped: Bytes = np.clip(pixels, 0, 255).astype(np.uint8)
    return clipped


def _distance(number: int, level: int, pixels: Bytes) -> float:
    out = distort(pixels, number, level, np.random.default_rng(3))
    return float(np.abs(out.astype(float) - pixels).mean())


def test_kinds_are_numbered_in_kadid_order() -> None:
    assert list(range(1, 33)) == NUMBERS
    assert len(KINDS) == 25
    assert len({kind.name for kind in (*KINDS, *TONES)}) == 32


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
@pytest.mark.parametrize("number", NUMBERS)
def test_same_seed_same_image_and_input_untouched(number: int, level: int) -> None:
    pixels = _photo_like(97, 61)
    before = pixels.copy()
    first = distort(pixels, number, level, np.random.default_rng(11))
    second = distort(pixels, number, level, np.random.default_rng(11))
    assert first.shape == pixels.shape
    assert first.dtype == np.uint8
    assert not np.shares_memory(first, pixels)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (33, 5)])
@pytest.mark.parametrize("number", NUMBERS)
def test_tiny_and_read_only_images(number: int, shape: tuple[int, int]) -> None:
    pixels = _photo_like(*shape)
    pixels.flags.writeable = False
    for level in range(1, LEVELS + 1):
        out = distort(pixels, number, level, np.random.default_rng(0))
        assert out.shape == pixels.shape


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8, 10, 19, 20, 21, 24])
def test_flat_grey_images_stay_flat(number: int, value: int) -> None:
    pixels = np.full((40, 56, 3), value, np.uint8)
    for level in range(1, LEVELS + 1):
        out = distort(pixels, number, level, np.random.default_rng(0))
        np.testing.assert_allclose(out.astype(int), value, atol=3)


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("number", NUMBERS)
def test_flat_images_are_accepted(number: int, value: int) -> None:
    pixels = np.full((40, 56, 3), value, np.uint8)
    for level in range(1, LEVELS + 1):
        out = distort(pixels, number, level, np.random.default_rng(0))
        assert out.shape == pixels.shape


@pytest.mark.parametrize("number", [n for n in NUMBERS if n not in TWO_SIDED])
def test_distance_grows_with_the_level(number: int) -> None:
    pixels = _photo_like(160, 192)
    distances = [_distance(number, level, pixels) for level in range(1, LEVELS + 1)]
    assert distances[4] > 1.2 * distances[0] + 0.1
    assert all(b >= 0.9 * a for a, b in pairwise(distances))


@pytest.mark.parametrize("number", sorted(TWO_SIDED))
def test_two_sided_kinds_leave_the_image_at_level_3(number: int) -> None:
    pixels = _photo_like(97, 61)
    assert _distance(number, 3, pixels) == 0
    assert _distance(number, 1, pixels) > _distance(number, 2, pixels) > 0
    assert _distance(number, 5, pixels) > _distance(number, 4, pixels) > 0


def test_every_colour_survives_the_trip_through_lab() -> None:
    """High saturation at level 1 scales chroma by 1."""
    pixels = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = distort(pixels, 8, 1, np.random.default_rng(0))
    np.testing.assert_allclose(out.astype(int), pixels, atol=1)


def test_white_noise_has_the_stated_variance() -> None:
    pixels = np.full((128, 128, 3), 128, np.uint8)
    out = distort(pixels, 11, 5, np.random.default_rng(0)) / 255
    assert out.var() == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize(
    ("pixels", "number", "level", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), 1, 1, "uint8"),
        (np.zeros((8, 8), np.uint8), 1, 1, r"\(H, W, 3\)"),
        (np.zeros((8, 8, 4), np.uint8), 1, 1, r"\(H, W, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), 1, 1, "non-empty"),
        (np.zeros((8, 8, 3), np.uint8), 0, 1, "number must be 1 to 32"),
        (np.zeros((8, 8, 3), np.uint8), 33, 1, "number must be 1 to 32"),
        (np.zeros((8, 8, 3), np.uint8), 1, 0, "level must be 1 to 5"),
        (np.zeros((8, 8, 3), np.uint8), 1, 6, "level must be 1 to 5"),
    ],
)
def test_bad_arguments(pixels: Bytes, number: int, level: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distort(pixels, number, level, np.random.default_rng(0))


def _write_table(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["dis_img_path,dis_type,ref_img_path,score", *rows]))
    return path


def _rows(image: str, score: float) -> list[str]:
    return [
        f"KADID-10k/images/{image}_{number:02d}_{level:02d}.png,X,r.png,{score + level}"
        for number in range(1, len(KINDS) + 1)
        for level in range(1, LEVELS + 1)
    ]


def test_scores_are_means_by_type_and_level(tmp_path: Path) -> None:
    table = _write_table(tmp_path / "t.txt", _rows("I01", 0) + _rows("I02", 1))
    scores = kadid_scores(table)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.tile(np.arange(1, 6) + 0.5, (25, 1)))


def test_scores_need_every_type_and_level(tmp_path: Path) -> None:
    table = _write_table(tmp_path / "t.txt", _rows("I01", 0)[:-1])
    with pytest.raises(ValueError, match="no score for type 25, level 5"):
        kadid_scores(table)


@pytest.mark.parametrize("name", ["I01.png", "I01_26_01.png", "I01_01_06.png"])
def test_scores_refuse_other_images(tmp_path: Path, name: str) -> None:
    table = _write_table(tmp_path / "t.txt", [f"{name},X,r.png,3"])
    with pytest.raises(ValueError, match="not a KADID-10k image"):
        kadid_scores(table)


def test_grey_is_a_style_when_the_original_is_not_beside_it(tmp_path: Path) -> None:
    table = tmp_path / "KADID-10k.txt"
    rows = [
        f"images/I01_{number:02}_{level:02}.png,{4.5 - 0.5 * level}"
        for number in range(1, 26)
        for level in range(1, 6)
    ]
    table.write_text("\n".join(["dis_img_path,score", *rows]))
    scores = damage_scores(table)
    assert scores.shape == (32, LEVELS)
    assert (scores[[0, 24]] == kadid_scores(table)[[0, 24]]).all()
    assert scores[6, 3] > 4
    assert (scores[25:] == TONE_SCORES).all()
    assert (np.diff(TONE_SCORES, axis=1) < 0).all()
