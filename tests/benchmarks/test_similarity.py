"""SSIM and MS-SSIM against scikit-image and what they must be."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.similarity import (
    multi_scale_ssim,
    psnr,
    similarities,
    ssim,
    structure_and_luminance,
)
from tests.engine.samples import picture

PHOTO = picture(3, (192, 224))


def noisy(strength: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, strength, PHOTO.shape)
    return np.clip(PHOTO + noise, 0, 255).astype(np.uint8)


def test_one_scale_is_scikit_images_ssim() -> None:
    one, two = (pixels.mean(axis=2).astype(np.float32) for pixels in (PHOTO, noisy(20)))
    assert structure_and_luminance(one, two)[1] == pytest.approx(ssim(one, two), abs=1e-4)


def test_a_photo_is_most_similar_to_itself() -> None:
    found = similarities(PHOTO, PHOTO.copy())
    assert found["psnr"] == 100.0
    assert found["ssim"] == pytest.approx(1.0)
    assert found["ms_ssim"] == pytest.approx(1.0)


def test_more_noise_is_less_similar() -> None:
    rows = [similarities(noisy(strength), PHOTO) for strength in (5, 20, 60)]
    for metric in ("psnr", "ssim", "ms_ssim"):
        values = [row[metric] for row in rows]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("side", [11, 23, 97, 180])
def test_small_planes_are_compared_at_fewer_scales(side: int) -> None:
    plane = np.random.default_rng(side).uniform(0, 255, (side, side + 3)).astype(np.float32)
    assert multi_scale_ssim(plane, plane) == pytest.approx(1.0)
    assert 0.0 <= multi_scale_ssim(plane, 255 - plane) < 0.2


def test_psnr_is_the_logarithm_of_the_squared_error() -> None:
    shifted = np.clip(PHOTO.astype(int) + 1, 0, 255).astype(np.uint8)
    error = np.mean((PHOTO.astype(float) - shifted) ** 2)
    assert psnr(shifted, PHOTO) == pytest.approx(10 * np.log10(255**2 / error))
