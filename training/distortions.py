"""The 25 distortion types of KADID-10k, at five levels each.

The parameters of the levels are the published ones of KADID-10k (H. Lin, V. Hosu,
D. Saupe, QoMEX 2019). The operations are our own, so KADID's mean human score of a
type and level is a prior for the images made here, not a measurement of them.
"""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage
from scipy.interpolate import PchipInterpolator

from meiqa.engine.measures import LUMA

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_Operation = Callable[[Floats, float, np.random.Generator], Floats]

LEVELS = 5
_LUMA = np.array(LUMA, np.float32)
_PATCH = 16
_BLOCK = 32
_IMAGE_NAME = re.compile(r"_(\d{2})_(\d{2})\.png$")

# sRGB (IEC 61966-2-1) to XYZ over the D65 white, so that white is (1, 1, 1).
_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375],
     [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
_RGB_TO_XYZ /= _RGB_TO_XYZ.sum(axis=1, keepdims=True)
_XYZ_TO_RGB = np.linalg.inv(_RGB_TO_XYZ)
# Rows: lightness in [0, 1], then CIE a and b over 100, from the cube-rooted XYZ.
_ROOTS_TO_LAB = np.array([[0.0, 1.16, 0.0], [5.0, -5.0, 0.0], [0.0, 2.0, -2.0]])
_LAB_OFFSET = np.array([-0.16, 0.0, 0.0], np.float32)
_LAB_TO_ROOTS = np.linalg.inv(_ROOTS_TO_LAB)
_CODES = np.arange(256) / 255.0
_LINEAR_OF_CODE = np.where(
    _CODES <= 0.04045, _CODES / 12.92, ((_CODES + 0.055) / 1.055) ** 2.4
).astype(np.float32)
# Indexed by the square root of linear light, which spends its entries on the darks.
_ROOT_STEPS = 4095
_LIGHT = np.linspace(0.0, 1.0, _ROOT_STEPS + 1) ** 2
_SRGB_OF_ROOT = np.where(
    _LIGHT <= 0.0031308, _LIGHT * 12.92, 1.055 * _LIGHT ** (1 / 2.4) - 0.055
).astype(np.float32)
_RGB_TO_YCBCR = np.array(
    [LUMA,
     [-0.168736, -0.331264, 0.5],
     [0.5, -0.418688, -0.081312]]
)  # fmt: skip
_YCBCR_TO_RGB = np.linalg.inv(_RGB_TO_YCBCR).astype(np.float32)


@dataclass(frozen=True)
class DistortionKind:
    """One distortion type: KADID's number, its name in texts, its five amounts."""

    number: int
    name: str
    amounts: tuple[float, float, float, float, float]
    operation: _Operation = field(repr=False, compare=False)


def distort(pixels: Bytes, number: int, level: int, rng: np.random.Generator) -> Bytes:
    """Distort an image by one type at one level.

    Args:
        pixels: sRGB image, uint8 (H, W, 3); it is left as it was.
        number: type, 1 to 25 as in `KINDS`, 26 to 32 as in `TONES`.
        level: 1 to 5. Types 18 and 25 go from one sign of the change to the other,
            with the untouched image at level 3; the rest grow stronger.
        rng: source of all randomness: the same state gives the same image.

    Returns:
        A new uint8 (H, W, 3) image.

    Raises:
        ValueError: on another dtype or shape, an empty image, or an unknown number
            or level.

    Example:
        >>> grey = np.full((8, 8, 3), 128, np.uint8)
        >>> distort(grey, 16, 3, np.random.default_rng(0)).mean() > 128
        np.True_
    """
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"pixels must be a non-empty (H, W, 3), got {pixels.shape}")
    kinds = (*KINDS, *TONES)
    if not 1 <= number <= len(kinds):
        raise ValueError(f"number must be 1 to {len(kinds)}, got {number}")
    if not 1 <= level <= LEVELS:
        raise ValueError(f"level must be 1 to {LEVELS}, got {level}")
    kind = kinds[number - 1]
    image = _from_bytes(pixels)
    return _to_bytes(kind.operation(image, kind.amounts[level - 1], rng))


def kadid_scores(table_path: str | Path) -> Floats:
    """Average KADID-10k's human scores by type and level.

    Args:
        table_path: CSV with the columns `dis_img_path` (`.../I01_<type>_<level>.png`)
            and `score` (1 worst to 5 best).

    Returns:
        Mean scores, float32 (25, 5); row i is type i + 1.

    Raises:
        ValueError: when a path is not of KADID-10k or a type and level has no score.
    """
    totals = np.zeros((len(KINDS), LEVELS))
    counts = np.zeros((len(KINDS), LEVELS), np.int64)
    with Path(table_path).open(newline="") as table:
        for row in csv.DictReader(table):
            match = _IMAGE_NAME.search(row["dis_img_path"])
            number, level = map(int, match.groups()) if match else (0, 0)
            if not (1 <= number <= len(KINDS) and 1 <= level <= LEVELS):
                raise ValueError(f"not a KADID-10k image: {row['dis_img_path']!r}")
            totals[number - 1, level - 1] += float(row["score"])
            counts[number - 1, level - 1] += 1
    if not counts.all():
        number, level = np.argwhere(counts == 0)[0] + 1
        raise ValueError(f"{table_path}: no score for type {number}, level {level}")
    return (totals / counts).astype(np.float32)


def _to_bytes(image: Floats) -> Bytes:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _from_bytes(pixels: Bytes) -> Floats:
    return pixels.astype(np.float32) / np.float32(255)


def _rgb_to_lab(image: Floats) -> Floats:
    linear = _LINEAR_OF_CODE[_to_bytes(image)]
    xyz = linear @ _RGB_TO_XYZ.T.astype(np.float32)
    roots = np.where(xyz > 0.008856, np.cbrt(xyz), np.float32(7.787) * xyz + np.float32(16 / 116))
    return roots @ _ROOTS_TO_LAB.T.astype(np.float32) + _LAB_OFFSET


def _lab_to_rgb(lab: Floats) -> Floats:
    roots = (lab - _LAB_OFFSET) @ _LAB_TO_ROOTS.T.astype(np.float32)
    xyz = np.where(roots > 0.206893, roots * roots * roots, (roots - 16 / 116) / 7.787).astype(
        np.float32
    )
    linear = np.clip(xyz @ _XYZ_TO_RGB.T.astype(np.float32), 0, 1)
    return _srgb(linear)


def _blur(image: Floats, sigma: float) -> Floats:
    """Blur a plane or the channels of an image, edges repeated."""
    blurred: Floats = ndimage.gaussian_filter(
        image, sigma, mode="nearest", truncate=3.0, axes=(0, 1)
    )
    return blurred


def _box(image: Floats, size: int) -> Floats:
    mean: Floats = ndimage.uniform_filter(image, size, mode="nearest", axes=(0, 1))
    return mean


def _convolve(image: Floats, kernel: NDArray[np.float64]) -> Floats:
    """Convolve each channel with an odd square kernel summing to 1, edges repeated."""
    radius = len(kernel) // 2
    height, width = image.shape[:2]
    padded = np.pad(image.transpose(2, 0, 1), ((0, 0), (radius,) * 2, (radius,) * 2), "edge")
    size = [fft.next_fast_len(n, real=True) for n in padded.shape[1:]]
    spectrum = fft.rfft2(padded, size) * fft.rfft2(kernel.astype(np.float32), size)
    # The first 2 * radius rows and columns are the wrapped ones.
    valid = fft.irfft2(spectrum, size)[:, 2 * radius :, 2 * radius :]
    result: Floats = valid[:, :height, :width].transpose(1, 2, 0)
    return result


def _noise(shape: tuple[int, ...], variance: float, rng: np.random.Generator) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(variance**0.5)


def _gaussian_blur(image: Floats, sigma: float, rng: np.random.Generator) -> Floats:
    return _blur(image, sigma)


def _lens_blur(image: Floats, radius: float, rng: np.random.Generator) -> Floats:
    reach = int(np.ceil(radius))
    offsets = np.arange(-reach, reach + 1)
    distance = np.hypot(offsets[:, None], offsets)
    disk = np.clip(radius + 0.5 - distance, 0, 1)
    return _convolve(image, disk / disk.sum())


def _motion_blur(image: Floats, length: float, rng: np.random.Generator) -> Floats:
    angle = rng.uniform(0, np.pi)
    along = np.linspace(-(length - 1) / 2, (length - 1) / 2, 8 * int(length))
    reach = int(np.ceil(length / 2)) + 1
    cells = np.arange(-reach, reach + 1)
    rows = np.clip(1 - np.abs(cells[:, None] - along * np.sin(angle)), 0, 1)
    columns = np.clip(1 - np.abs(cells[:, None] - along * np.cos(angle)), 0, 1)
    line = rows @ columns.T
    return _convolve(image, line / line.sum())


def _colour_diffusion(image: Floats, sigma: float, rng: np.random.Generator) -> Floats:
    lab = _rgb_to_lab(image)
    lab[..., 1:] = _blur(lab[..., 1:], sigma)
    return _lab_to_rgb(lab)


def _colour_shift(image: Floats, distance: float, rng: np.random.Generator) -> Floats:
    """Move the green channel, blended in where the image has edges."""
    edges = _blur(_gradient(image @ _LUMA), 4)
    edges -= edges.min()
    mask = np.clip((edges / max(float(edges.max()), 1e-6) - 0.1) / 0.9, 0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    height, width = mask.shape
    rows = np.arange(height) + round(distance * np.sin(angle))
    columns = np.arange(width) + round(distance * np.cos(angle))
    green = image[..., 1]
    moved = green[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)]
    result = image.copy()
    result[..., 1] += mask * (moved - green)
    return result


def _gradient(plane: Floats) -> Floats:
    magnitude: Floats = np.hypot(
        ndimage.sobel(plane, 0, mode="nearest"), ndimage.sobel(plane, 1, mode="nearest")
    )
    return magnitude


def _colour_quantisation(image: Floats, colours: float, rng: np.random.Generator) -> Floats:
    picture = Image.fromarray(_to_bytes(image))
    # A palette of a quarter of the pixels halves the time; the error grows by about a tenth.
    sample = Image.fromarray(_to_bytes(image[::2, ::2]))
    palette = sample.quantize(int(colours), method=Image.Quantize.MEDIANCUT)
    indexed = picture.quantize(palette=palette, dither=Image.Dither.NONE)
    return _from_bytes(np.asarray(indexed.convert("RGB")))


def _low_saturation(image: Floats, scale: float, rng: np.random.Generator) -> Floats:
    # Scaling S at constant H and V moves each channel towards V = max(R, G, B).
    value = image.max(axis=2, keepdims=True)
    scaled: Floats = value - np.float32(scale) * (value - image)
    return scaled


def _high_saturation(image: Floats, scale: float, rng: np.random.Generator) -> Floats:
    lab = _rgb_to_lab(image)
    lab[..., 1:] *= np.float32(scale)
    return _lab_to_rgb(lab)


def _jpeg2000(image: Floats, ratio: float, rng: np.random.Generator) -> Floats:
    smallest = min(image.shape[:2])
    return _recode(
        image,
        "JPEG2000",
        quality_mode="rates",
        quality_layers=[ratio],
        irreversible=True,
        num_resolutions=min(6, smallest.bit_length()),
    )


def _jpeg(image: Floats, quality: float, rng: np.random.Generator) -> Floats:
    return _recode(image, "JPEG", quality=int(quality))


def _recode(image: Floats, codec: str, **options: object) -> Floats:
    stream = io.BytesIO()
    Image.fromarray(_to_bytes(image)).save(stream, codec, **options)
    with Image.open(stream) as decoded:
        return _from_bytes(np.asarray(decoded.convert("RGB")))


def _white_noise(image: Floats, variance: float, rng: np.random.Generator) -> Floats:
    return image + _noise(image.shape, variance, rng)


def _colour_noise(image: Floats, variance: float, rng: np.random.Generator) -> Floats:
    return image + _noise(image.shape, variance, rng) @ _YCBCR_TO_RGB.T


def _impulse_noise(image: Floats, density: float, rng: np.random.Generator) -> Floats:
    draw = rng.random(image.shape, dtype=np.float32)
    result = np.where(draw < density / 2, np.float32(0), image)
    return np.where(draw > 1 - density / 2, np.float32(1), result)


def _multiplicative_noise(image: Floats, variance: float, rng: np.random.Generator) -> Floats:
    return image * (1 + _noise(image.shape, variance, rng))


def _denoising_smear(image: Floats, variance: float, rng: np.random.Generator) -> Floats:
    """Add noise, then smooth luma by a guided filter and colour by a box.

    KADID removed it with a network; a guided filter (K. He et al., TPAMI 2013,
    eqs. 5, 6 and 8) likewise keeps strong edges and smears texture.
    """
    noisy = np.clip(image + _noise(image.shape, variance, rng), 0, 1)
    luma = noisy @ _LUMA
    guide = _blur(luma, 0.5 + 2.5 * variance**0.5)
    size = 7
    mean = _box(guide, size)
    spread: Floats = np.maximum(_box(guide * guide, size) - mean * mean, 0)
    slope: Floats = (spread / (spread + variance / 20)).astype(np.float32)
    smooth = _box(slope, size) * guide + _box((1 - slope) * mean, size)
    return smooth[..., None] + _box(noisy - luma[..., None], 5)


def _brightening(image: Floats, amount: float, rng: np.random.Generator) -> Floats:
    return _bend_lightness(image, amount / 2)


def _darkening(image: Floats, amount: float, rng: np.random.Generator) -> Floats:
    return _bend_lightness(image, -amount / 2)


def _bend_lightness(image: Floats, rise: float) -> Floats:
    """Map lightness by the parabola through (0, 0), (0.5, 0.5 + rise) and (1, 1)."""
    lab = _rgb_to_lab(image)
    light = lab[..., 0]
    lab[..., 0] = np.clip(light + 4 * rise * light * (1 - light), 0, 1)
    return _lab_to_rgb(lab)


def _mean_shift(image: Floats, amount: float, rng: np.random.Generator) -> Floats:
    return image + np.float32(amount)


def _jitter(image: Floats, sigma: float, rng: np.random.Generator) -> Floats:
    """Scatter pixels by five passes of normal offsets, summed into one warp."""
    height, width = image.shape[:2]
    places = _noise((2, height, width), 5 * sigma**2, rng)
    places[0] += np.arange(height, dtype=np.float32)[:, None]
    places[1] += np.arange(width, dtype=np.float32)
    channels = [
        ndimage.map_coordinates(image[..., c], places, order=1, mode="nearest") for c in range(3)
    ]
    return np.stack(channels, axis=2)


def _patch_displacement(image: Floats, count: float, rng: np.random.Generator) -> Floats:
    """Copy patches over the places one patch away, in random directions."""
    limits = np.maximum(np.array(image.shape[:2]) - _PATCH, 0)
    sources = rng.integers(0, limits + 1, (int(count), 2))
    angles = rng.uniform(0, 2 * np.pi, int(count))
    steps = np.rint(_PATCH * np.stack([np.sin(angles), np.cos(angles)], axis=1))
    targets = np.clip(sources + steps.astype(np.int64), 0, limits)
    result = image.copy()
    for (y, x), (to_y, to_x) in zip(sources, targets, strict=True):
        patch = image[y : y + _PATCH, x : x + _PATCH]
        result[to_y : to_y + _PATCH, to_x : to_x + _PATCH] = patch
    return result


def _pixelation(image: Floats, strength: float, rng: np.random.Generator) -> Floats:
    scale = 0.95 - strength**0.6
    rows, columns = (_coarse_indices(n, scale) for n in image.shape[:2])
    coarse: Floats = image[rows[:, None], columns]
    return coarse


def _coarse_indices(length: int, scale: float) -> NDArray[np.int64]:
    """Indices of a nearest-neighbour shrink by `scale` and stretch back."""
    cells = max(1, int(np.ceil(length * scale)))
    cell = (2 * np.arange(length) + 1) * cells // (2 * length)
    return (2 * cell + 1) * length // (2 * cells)


def _coarse_quantisation(image: Floats, levels: float, rng: np.random.Generator) -> Floats:
    steps = np.float32(levels - 1)
    coarse: Floats = np.rint(image * steps) / steps
    return coarse


def _colour_blocks(image: Floats, count: float, rng: np.random.Generator) -> Floats:
    limits = np.maximum(np.array(image.shape[:2]) - _BLOCK, 0)
    result = image.copy()
    for y, x in rng.integers(0, limits + 1, (int(count), 2)):
        result[y : y + _BLOCK, x : x + _BLOCK] = rng.random(3, dtype=np.float32)
    return result


def _oversharpening(image: Floats, amount: float, rng: np.random.Generator) -> Floats:
    luma = image @ _LUMA
    return image + np.float32(amount) * (luma - _blur(luma, 2))[..., None]


def _contrast_change(image: Floats, amount: float, rng: np.random.Generator) -> Floats:
    """Bend the tones into an S, or with a negative amount towards mid-grey."""
    bend = amount / 4
    curve = PchipInterpolator([0, 0.25, 0.75, 1], [0, 0.25 - bend, 0.75 + bend, 1])
    tones: Floats = curve(_CODES).astype(np.float32)
    return tones[_to_bytes(image)]


def _relit(image: Floats, factor: float, rng: np.random.Generator) -> Floats:
    """Multiply the light, as another exposure does."""
    return _srgb(np.clip(_LINEAR_OF_CODE[_to_bytes(image)] * np.float32(factor), 0, 1))


def _srgb(linear: Floats) -> Floats:
    codes: Floats = _SRGB_OF_ROOT[np.rint(np.sqrt(linear) * _ROOT_STEPS).astype(np.int32)]
    return codes


def _flat_contrast(image: Floats, share: float, rng: np.random.Generator) -> Floats:
    """Draw the tones together around the photograph's mean."""
    mean = np.float32((image @ _LUMA).mean())
    flat: Floats = mean + np.float32(share) * (image - mean)
    return flat


def _haze(image: Floats, share: float, rng: np.random.Generator) -> Floats:
    """Lay a bright, nearly grey veil over what is left of the photograph."""
    veil = (rng.uniform(0.7, 0.95) + rng.uniform(-0.03, 0.03, 3)).astype(np.float32)
    veiled: Floats = veil + np.float32(share) * (image - veil)
    return veiled


def _colour_cast(image: Floats, strength: float, rng: np.random.Generator) -> Floats:
    """Strengthen a random colour and weaken its opposite."""
    angles = rng.uniform(0, 2 * np.pi) + np.arange(3) * (2 * np.pi / 3)
    gains = 1 + strength * np.cos(angles)
    cast: Floats = image * gains.astype(np.float32)
    return cast


def _fading_colour(image: Floats, share: float, rng: np.random.Generator) -> Floats:
    luma: Floats = (image @ _LUMA)[..., None]
    faded: Floats = luma + np.float32(share) * (image - luma)
    return faded


_SPREADS = (1, 3, 6, 8, 12)
KINDS: tuple[DistortionKind, ...] = (
    DistortionKind(1, "gaussian blur", (0.1, 0.5, 1, 2, 5), _gaussian_blur),
    DistortionKind(2, "lens blur", (1, 2, 4, 6, 8), _lens_blur),
    DistortionKind(3, "motion blur", (1, 2, 4, 6, 10), _motion_blur),
    DistortionKind(4, "colour diffusion", _SPREADS, _colour_diffusion),
    DistortionKind(5, "colour shift", _SPREADS, _colour_shift),
    DistortionKind(6, "colour quantisation", (64, 48, 32, 16, 8), _colour_quantisation),
    DistortionKind(7, "low saturation", (0.4, 0.2, 0.1, 0, -0.4), _low_saturation),
    DistortionKind(8, "high saturation", (1, 2, 3, 6, 9), _high_saturation),
    DistortionKind(9, "JPEG 2000 compression", (16, 32, 45, 120, 400), _jpeg2000),
    DistortionKind(10, "JPEG compression", (43, 36, 24, 7, 4), _jpeg),
    DistortionKind(11, "white noise", (0.001, 0.002, 0.003, 0.005, 0.01), _white_noise),
    DistortionKind(12, "colour noise", (0.0001, 0.0005, 0.001, 0.002, 0.003), _colour_noise),
    DistortionKind(13, "impulse noise", (0.001, 0.005, 0.01, 0.02, 0.03), _impulse_noise),
    DistortionKind(
        14,
        "multiplicative noise",
        (0.001, 0.005, 0.01, 0.02, 0.05),
        _multiplicative_noise,
    ),
    DistortionKind(15, "denoising smear", (0.01, 0.03, 0.05, 0.1, 0.15), _denoising_smear),
    DistortionKind(16, "brightening", (0.1, 0.2, 0.4, 0.7, 1.1), _brightening),
    DistortionKind(17, "darkening", (0.05, 0.1, 0.2, 0.4, 0.8), _darkening),
    DistortionKind(18, "mean shift", (0.15, 0.08, 0, -0.08, -0.15), _mean_shift),
    DistortionKind(19, "jitter", (0.05, 0.1, 0.2, 0.5, 1), _jitter),
    DistortionKind(20, "patch displacement", (20, 40, 60, 80, 100), _patch_displacement),
    DistortionKind(21, "pixelation", (0.01, 0.05, 0.1, 0.2, 0.5), _pixelation),
    DistortionKind(22, "coarse quantisation", (20, 16, 13, 10, 7), _coarse_quantisation),
    DistortionKind(23, "colour blocks", (2, 4, 6, 8, 10), _colour_blocks),
    DistortionKind(24, "oversharpening", (1, 2, 3, 6, 12), _oversharpening),
    DistortionKind(25, "contrast change", (0.3, 0.15, 0, -0.4, -0.6), _contrast_change),
)

TONES: tuple[DistortionKind, ...] = (
    DistortionKind(26, "flat contrast", (0.85, 0.7, 0.55, 0.42, 0.3), _flat_contrast),
    DistortionKind(27, "haze", (0.85, 0.7, 0.55, 0.42, 0.3), _haze),
    DistortionKind(28, "colour cast", (0.06, 0.12, 0.2, 0.3, 0.45), _colour_cast),
    DistortionKind(29, "underexposure", (0.5, 0.25, 0.12, 0.04, 0.012), _relit),
    DistortionKind(30, "overexposure", (1.4, 2, 3, 5, 10), _relit),
    DistortionKind(31, "fading colour", (0.75, 0.5, 0.25, 0.1, 0), _fading_colour),
    DistortionKind(32, "fine JPEG compression", (97, 92, 85, 75, 55), _jpeg),
)
"""Damage to tone and colour that KADID-10k lacks, and the JPEG qualities that cameras use."""
TONE_SCORES = np.array(
    [[4.45, 4.2, 3.95, 3.7, 3.4],
     [4.4, 4.1, 3.8, 3.5, 3.1],
     [4.5, 4.3, 4.0, 3.5, 2.9],
     [4.4, 3.7, 2.7, 1.9, 1.3],
     [4.4, 3.8, 2.9, 2.2, 1.5],
     [4.58, 4.52, 4.45, 4.38, 4.3],
     [4.58, 4.55, 4.48, 4.38, 4.15]],
    np.float32,
)  # fmt: skip
"""What is wanted of them on KADID-10k's scale, where an undistorted photograph has 4.6. These are
settings, not measurements: nobody was asked."""
EQUAL_TO_THE_EYE = 0.03
"""Levels whose wanted scores differ by less are no step."""
FADING_COLOUR, FINE_JPEG = TONES[-2].number, TONES[-1].number
TWO_SIDED = (18, 25)
"""Types whose middle level is the untouched picture."""
LOW_SATURATION = 7
UNSEEN_REFERENCE_SCORES = np.array([4.5, 4.42, 4.36, 4.3, 3.0], np.float32)
"""Low saturation without the coloured original beside it: grey is a style (KADID-10k's observers,
who see both, give 2.2), inverted colours are not."""


def is_untouched(number: int, level: int) -> bool:
    """Whether this level of a distortion leaves the picture as it is."""
    return number in TWO_SIDED and level == 3


def damage_scores(table_path: str | Path) -> Floats:
    """Scores (32, 5) of `KINDS` and `TONES` for a photograph seen by itself.

    Args:
        table_path: as for `kadid_scores`.
    """
    scores = kadid_scores(table_path)
    scores[LOW_SATURATION - 1] = UNSEEN_REFERENCE_SCORES
    return np.concatenate([scores, TONE_SCORES])
