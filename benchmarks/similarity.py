"""PSNR, SSIM and MS-SSIM: what a photo is compared with its reference by, without a model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from meiqa.engine.measures import LUMA

__all__ = ["METRICS", "multi_scale_ssim", "psnr", "similarities", "ssim"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, the finest first (Z. Wang, E. Simoncelli, A. Bovik, Asilomar 2003)."""
SIGMA, TRUNCATED = 1.5, 3.5
"""The 11 x 11 Gaussian window of SSIM, as scikit-image has it."""
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
IDENTICAL_DB = 100.0
METRICS = ("psnr", "ssim", "ms_ssim")
_LUMA = np.array(LUMA, np.float32)


def similarities(photo: Bytes, reference: Bytes) -> dict[str, float]:
    """All three, of two photos (H, W, 3) of one size."""
    one, two = (pixels.astype(np.float32) @ _LUMA for pixels in (photo, reference))
    return {
        "psnr": psnr(photo, reference),
        "ssim": ssim(one, two),
        "ms_ssim": multi_scale_ssim(one, two),
    }


def psnr(photo: Bytes, reference: Bytes) -> float:
    """Peak signal-to-noise ratio in dB over all channels; 100 where nothing differs."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(photo, reference):
        return IDENTICAL_DB
    ratio = peak_signal_noise_ratio(reference, photo, data_range=255)  # type: ignore[no-untyped-call]
    return float(ratio)


def ssim(photo: Floats, reference: Floats) -> float:
    """Structural similarity of two planes 0-255, by scikit-image with SSIM's own window."""
    from skimage.metrics import structural_similarity

    found = structural_similarity(  # type: ignore[no-untyped-call]
        reference,
        photo,
        data_range=255,
        gaussian_weights=True,
        sigma=SIGMA,
        use_sample_covariance=False,
    )
    return float(found)


def multi_scale_ssim(photo: Floats, reference: Floats) -> float:
    """SSIM's structure at five scales and its luminance at the coarsest, of two planes 0-255.

    Planes too small for five scales are compared at fewer, whose weights then add up to 1.
    """
    scales = [(photo, reference)]
    while len(scales) < len(WEIGHTS) and min(scales[-1][0].shape) >= 2 * _window():
        scales.append(tuple(halved(plane) for plane in scales[-1]))  # type: ignore[arg-type]
    weights = np.array(WEIGHTS[: len(scales)]) / sum(WEIGHTS[: len(scales)])
    parts = [structure_and_luminance(*planes) for planes in scales]
    structures = np.array([max(structure, 0.0) for structure, _ in parts])
    # At the coarsest scale luminance and structure are averaged together, as in SSIM itself.
    structures[-1] = max(parts[-1][1], 0.0)
    return float(np.prod(structures**weights))


def structure_and_luminance(one: Floats, two: Floats) -> tuple[float, float]:
    """Mean of contrast times structure, and of SSIM, away from the border."""
    blurred = [_blurred(plane) for plane in (one, two, one * one, two * two, one * two)]
    mean1, mean2, square1, square2, product = blurred
    variances = square1 - mean1 * mean1 + square2 - mean2 * mean2
    structure = (2 * (product - mean1 * mean2) + C2) / (variances + C2)
    luminance = (2 * mean1 * mean2 + C1) / (mean1 * mean1 + mean2 * mean2 + C1)
    edge = _window() // 2
    inside = np.s_[edge:-edge, edge:-edge]
    return float(structure[inside].mean()), float((structure * luminance)[inside].mean())


def halved(plane: Floats) -> Floats:
    """Means of 2 x 2; an odd row or column at the end is left out."""
    height, width = (side // 2 * 2 for side in plane.shape)
    even = plane[:height, :width]
    quarters = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    mean: Floats = quarters / np.float32(4)
    return mean


def _blurred(plane: Floats) -> NDArray[np.float64]:
    blurred: NDArray[np.float64] = ndimage.gaussian_filter(
        plane.astype(np.float64), SIGMA, truncate=TRUNCATED
    )
    return blurred


def _window() -> int:
    return 2 * int(TRUNCATED * SIGMA + 0.5) + 1
