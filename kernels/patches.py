"""Pixels to the normalised patches that the vision graph takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meiqa.kernels._native import write_patches


def pixels_to_patches(
    pixels: NDArray[np.uint8],
    patch: int,
    merge: int,
    mean: Sequence[float] | NDArray[np.floating],
    std: Sequence[float] | NDArray[np.floating],
    temporal: int = 1,
) -> NDArray[np.float32]:
    """Cut an image into normalised patches, in the order in which they are merged.

    Args:
        pixels: RGB bytes, C-contiguous, ``(H, W, 3)``; H and W are multiples of
            ``patch * merge``.
        patch: side of a patch, in pixels.
        merge: side of the window that becomes one visual token, in patches.
        mean: per-channel mean of ``pixels / 255``, ``(3,)``.
        std: per-channel deviation of ``pixels / 255``, ``(3,)``, above zero.
        temporal: how often each channel's plane is repeated, for towers built for video.

    Returns:
        ``(H / patch * W / patch, 3 * temporal * patch * patch)``. Rows run over
        (window row, window column, row in window, column in window), columns over
        (channel, time, y, x). A value is ``(pixel / 255 - mean) / std``.

    Raises:
        TypeError: ``pixels`` is not a uint8 array.
        ValueError: a shape, a layout or a size does not fit.

    Example:
        >>> import numpy as np
        >>> image = np.zeros((28, 56, 3), dtype=np.uint8)
        >>> pixels_to_patches(image, 14, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).shape
        (8, 588)
    """
    rows, columns = _patch_grid(pixels, patch, merge)
    if temporal < 1:
        raise ValueError(f"temporal must be at least 1, not {temporal}")
    channel_mean, channel_std = _per_channel("mean", mean), _per_channel("std", std)
    if not np.all(channel_std > 0):
        raise ValueError(f"std must be above zero, not {channel_std.tolist()}")
    patches = np.empty((rows * columns, 3 * temporal * patch * patch), dtype=np.float32)
    write_patches(pixels, patch, merge, temporal, channel_mean, channel_std, patches)
    return patches


def _patch_grid(pixels: NDArray[np.uint8], patch: int, merge: int) -> tuple[int, int]:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise TypeError(f"pixels must be a uint8 array, not {getattr(pixels, 'dtype', pixels)}")
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be (H, W, 3), not {pixels.shape}")
    if not pixels.flags.c_contiguous:
        raise ValueError("pixels must be C-contiguous")
    if patch < 1 or merge < 1:
        raise ValueError(f"patch and merge must be at least 1, not {patch} and {merge}")
    height, width = pixels.shape[:2]
    window = patch * merge
    if height == 0 or width == 0 or height % window or width % window:
        raise ValueError(
            f"height and width must be positive multiples of patch * merge = {window}, "
            f"not {height} and {width}"
        )
    return height // patch, width // patch


def _per_channel(name: str, values: Sequence[float] | NDArray[np.floating]) -> NDArray[np.float64]:
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.shape != (3,) or not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be three finite numbers, not {values}")
    return array
