"""The native patch cutter against its naive twin."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from meiqa.kernels.patches import pixels_to_patches
from tests import naive

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("patch", [1, 3, 7, 14])
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize("windows", [(1, 1), (3, 1), (1, 3), (2, 7)])
def test_agrees_with_the_naive_twin(
    patch: int, merge: int, temporal: int, windows: tuple[int, int]
) -> None:
    pixels = image(windows[0] * patch * merge, windows[1] * patch * merge)
    patches = pixels_to_patches(pixels, patch, merge, MEAN, STD, temporal)
    expected = naive.pixels_to_patches(pixels, patch, merge, MEAN, STD, temporal)
    assert patches.dtype == np.float32
    assert patches.shape == (windows[0] * windows[1] * merge**2, 3 * temporal * patch**2)
    np.testing.assert_array_equal(patches, expected)


def test_every_byte_value_is_normalised_in_double() -> None:
    pixels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    patches = pixels_to_patches(pixels, 1, 1, MEAN, STD)
    expected = (np.arange(256)[:, None] / 255.0 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_array_equal(patches, expected.astype(np.float32))


def test_window_order_and_layout_by_hand() -> None:
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    pixels[..., 0] = [[0, 1, 2, 3], [4, 5, 6, 7]]
    patches = pixels_to_patches(pixels, 1, 2, (0, 0, 0), (1 / 255, 1, 1))
    np.testing.assert_allclose(patches[:, 0], [0, 1, 4, 5, 2, 3, 6, 7], rtol=1e-6)


def test_threads_share_nothing() -> None:
    images = [image(56, 84, seed) for seed in range(4)]
    results: dict[int, np.ndarray] = {}

    def cut(index: int) -> None:
        results[index] = pixels_to_patches(images[index], 14, 2, MEAN, STD)

    threads = [threading.Thread(target=cut, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, pixels in enumerate(images):
        np.testing.assert_array_equal(
            results[index], naive.pixels_to_patches(pixels, 14, 2, MEAN, STD)
        )


@pytest.mark.parametrize("shape", [(0, 28, 3), (28, 0, 3), (27, 28, 3), (28, 30, 3)])
def test_sizes_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of patch"):
        pixels_to_patches(np.zeros(shape, np.uint8), 14, 2, MEAN, STD)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 4), (1, 28, 28, 3)])
def test_shapes_that_are_not_rgb_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        pixels_to_patches(np.zeros(shape, np.uint8), 14, 2, MEAN, STD)


def test_a_view_with_strides_is_refused() -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        pixels_to_patches(image(28, 56)[:, ::-1], 14, 2, MEAN, STD)


def test_a_read_only_image_is_fine() -> None:
    pixels = image(28, 28)
    pixels.flags.writeable = False
    assert pixels_to_patches(pixels, 14, 2, MEAN, STD).shape == (4, 588)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        pixels_to_patches(np.zeros((28, 28, 3), np.float32), 14, 2, MEAN, STD)


@pytest.mark.parametrize(
    ("mean", "std", "temporal", "patch"),
    [
        ((0.5, 0.5), STD, 1, 14),
        ((0.5, 0.5, np.nan), STD, 1, 14),
        (MEAN, (0.5, 0.0, 0.5), 1, 14),
        (MEAN, (0.5, np.inf, 0.5), 1, 14),
        (MEAN, STD, 0, 14),
        (MEAN, STD, 1, 0),
    ],
)
def test_impossible_settings_are_refused(
    mean: tuple[float, ...], std: tuple[float, ...], temporal: int, patch: int
) -> None:
    with pytest.raises(ValueError, match="must be"):
        pixels_to_patches(image(28, 28), patch, 2, mean, std, temporal)
