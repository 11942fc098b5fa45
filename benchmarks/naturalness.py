"""BRISQUE and NIQE: quality told from the statistics of natural scenes, without a model of ours.

Both normalise the luminance by its local mean and deviation and fit generalised Gaussians to the
result and to the products of neighbours. BRISQUE (A. Mittal, A. Moorthy, A. Bovik, IEEE TIP 21(12),
2012) feeds the parameters to a support vector regressor trained on human scores; NIQE (A. Mittal,
R. Soundararajan, A. Bovik, IEEE SPL 20(3), 2013) measures how far their distribution over blocks
lies from that of pristine photographs. The published model files are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from scipy.ndimage import correlate1d
from scipy.special import gamma

from meiqa.errors import ImageTooSmall, UsageError

Floats = NDArray[np.float64]

BRISQUE_MODEL = "brisque_allmodel.txt"
BRISQUE_RANGES = "brisque_allrange.txt"
NIQE_STATISTICS = "niqe_nss_parameters.mat"
_LUMA = np.array([0.298936, 0.587043, 0.114021])
_WINDOW_RADIUS, _WINDOW_SIGMA = 3, 7.0 / 6.0
_SHAPES = np.arange(0.2, 10.0005, 0.001)
_SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))
"""Rows and columns to the neighbour in each of the four directions."""
_RATIOS = gamma(1 / _SHAPES) * gamma(3 / _SHAPES) / gamma(2 / _SHAPES) ** 2
"""Of the second moment to the squared first absolute one, by shape."""
_FEATURES = 36
_BLOCK = 96


@dataclass(frozen=True, eq=False)
class Brisque:
    """The published regressor; scores are lower the better, mostly 0-100.

    Attributes:
        lows, highs: (36,) ranges that features are scaled from to -1..1.
        vectors: (V, 36) support vectors; weights: (V,).
        gamma: of the radial kernel; rho: subtracted from the sum.
    """

    lows: Floats
    highs: Floats
    vectors: Floats
    weights: Floats
    gamma: float
    rho: float

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the libsvm model and the ranges of its features; see `_parsed`."""
        head, vectors = _parsed(folder / BRISQUE_MODEL, _libsvm_model)
        lows, highs = _parsed(folder / BRISQUE_RANGES, _libsvm_ranges).T
        kernel, rho = float(head["gamma"]), float(head["rho"])
        return cls(lows, highs, vectors[:, 1:], vectors[:, 0], kernel, rho)

    def score(self, pixels: NDArray[np.uint8]) -> float:
        """Score a photo, uint8 (H, W, 3)."""
        grey = luminance(pixels)
        features = np.concatenate(
            [_brisque_features(_normalised(plane, "constant")) for plane in (grey, _halved(grey))]
        )
        scaled = 2.0 * (features - self.lows) / (self.highs - self.lows) - 1.0
        distances = np.sum((self.vectors - scaled) ** 2, axis=1)
        return float(self.weights @ np.exp(-self.gamma * distances) - self.rho)


@dataclass(frozen=True, eq=False)
class Niqe:
    """The published statistics of pristine photographs; scores are lower the better.

    Attributes:
        mean: (36,) of the features of their blocks; covariance: (36, 36).
    """

    mean: Floats
    covariance: Floats

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the published statistics; see `_parsed`."""
        return cls(*_parsed(folder / NIQE_STATISTICS, _pristine_statistics))

    def score(self, pixels: NDArray[np.uint8]) -> float:
        """Score a photo, uint8 (H, W, 3).

        Raises:
            ImageTooSmall: it holds fewer than two blocks of 96 x 96 pixels.
        """
        grey = luminance(pixels)
        rows, columns = (side // _BLOCK for side in grey.shape)
        if rows * columns < 2:
            raise ImageTooSmall(
                "NIQE needs two blocks of 96 x 96 pixels", seen=f"{grey.shape[1]} x {grey.shape[0]}"
            )
        whole = grey[: rows * _BLOCK, : columns * _BLOCK]
        scales = []
        for plane, side in ((whole, _BLOCK), (_halved(whole), _BLOCK // 2)):
            blocks = _normalised(plane, "nearest").reshape(rows, side, columns, side)
            scales.append(
                [_niqe_features(block) for row in blocks for block in row.transpose(1, 0, 2)]
            )
        features = np.concatenate(scales, axis=1)
        away = features.mean(axis=0) - self.mean
        spread = (np.cov(features, rowvar=False) + self.covariance) / 2.0
        return float(np.sqrt(away @ np.linalg.pinv(spread) @ away))


def luminance(pixels: NDArray[np.uint8]) -> Floats:
    """Grey of an RGB photo (H, W, 3) on 0-255, float64 (H, W), rounded as 8-bit images are."""
    grey: Floats = np.rint(pixels @ _LUMA)
    return grey


def _halved(plane: Floats) -> Floats:
    """Half the size, by a bicubic kernel stretched against aliasing."""
    picture = Image.fromarray(plane.astype(np.float32))
    size = -(-picture.width // 2), -(-picture.height // 2)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float64)


def _normalised(plane: Floats, edges: str) -> Floats:
    """Luminance less its local mean, over its local deviation plus one."""
    offsets = np.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1)
    window = np.exp(-(offsets**2) / (2.0 * _WINDOW_SIGMA**2))
    window /= window.sum()

    def local(values: Floats) -> Floats:
        along: Floats = correlate1d(values, window, axis=0, mode=edges)
        return np.asarray(correlate1d(along, window, axis=1, mode=edges))

    mean = local(plane)
    deviation = np.sqrt(np.abs(local(plane * plane) - mean * mean))
    normalised: Floats = (plane - mean) / (deviation + 1.0)
    return normalised


def _brisque_features(plane: Floats) -> Floats:
    """(18,): shape and variance, then four of each product of neighbours."""
    features = list(_symmetric(plane))
    for shape, left, right in _of_products(plane):
        features += [shape, _mean_of(shape, left, right), left**2, right**2]
    return np.array(features)


def _niqe_features(block: Floats) -> Floats:
    """(18,): shape and width, then four of each product of neighbours."""
    shape, left, right = _asymmetric(block)
    features = [shape, _width_of(shape) * (left + right) / 2.0]
    for shape, left, right in _of_products(block):
        width = _width_of(shape)
        features += [shape, _mean_of(shape, left, right), width * left, width * right]
    return np.array(features)


def _of_products(plane: Floats) -> list[tuple[float, float, float]]:
    """Fit the products with the neighbours in four directions; the edges wrap."""
    return [_asymmetric(plane * np.roll(plane, shift, axis=(0, 1))) for shift in _SHIFTS]


def _symmetric(values: Floats) -> tuple[float, float]:
    """Shape and variance of the generalised Gaussian with the same moments."""
    variance = float(np.mean(values**2))
    ratio = variance / max(float(np.mean(np.abs(values))) ** 2, 1e-12)
    return float(_SHAPES[np.argmin(np.abs(_RATIOS - ratio))]), variance


def _asymmetric(values: Floats) -> tuple[float, float, float]:
    """Shape, left and right deviation of the asymmetric generalised Gaussian.

    A side without values has the deviation 0; a flat plane has the shape of a Gaussian's ratio 0.
    """
    sides = values[values < 0], values[values > 0]
    left, right = (float(np.sqrt(np.mean(side**2))) if side.size else 0.0 for side in sides)
    ratio = left / max(right, 1e-12)
    moment = float(np.mean(np.abs(values))) ** 2 / max(float(np.mean(values**2)), 1e-12)
    wanted = moment * (ratio**3 + 1.0) * (ratio + 1.0) / (ratio**2 + 1.0) ** 2
    return float(_SHAPES[np.argmin(np.abs(1.0 / _RATIOS - wanted))]), left, right


def _width_of(shape: float) -> float:
    return float(np.sqrt(gamma(1 / shape) / gamma(3 / shape)))


def _mean_of(shape: float, left: float, right: float) -> float:
    return (right - left) * _width_of(shape) * float(gamma(2 / shape) / gamma(1 / shape))


Read = TypeVar("Read")


def _parsed(path: Path, parse: Callable[[Path], Read]) -> Read:
    """Read a model file; UsageError says which one is missing or not of this kind."""
    try:
        return parse(path)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}",
            allowed=f"{BRISQUE_MODEL}, {BRISQUE_RANGES} and {NIQE_STATISTICS} as published",
            hint="give their directory with --models DIR",
        ) from error
    except (KeyError, ValueError, MatReadError) as error:
        raise UsageError(f"{path} is not a model file of this kind", seen=error) from error


def _libsvm_model(path: Path) -> tuple[dict[str, str], Floats]:
    """Head and support vectors (V, 1 + 36), the weight first, of a libsvm regressor."""
    head_text, _, body = path.read_text(encoding="ascii").partition("\nSV\n")
    head = dict(line.split(" ", 1) for line in head_text.splitlines())
    if head["svm_type"] not in ("epsilon_svr", "nu_svr") or head["kernel_type"] != "rbf":
        raise ValueError(f"{head['svm_type']} with kernel {head['kernel_type']}")
    rows = body.strip().splitlines()
    vectors = np.zeros((len(rows), 1 + _FEATURES))
    for row, line in zip(vectors, rows, strict=True):
        weight, *entries = line.split()
        row[0] = float(weight)
        for entry in entries:
            feature, _, value = entry.partition(":")
            row[int(feature)] = float(value)
    if len(rows) != int(head["total_sv"]):
        raise ValueError(f"{len(rows)} of {head['total_sv']} support vectors")
    return head, vectors


def _libsvm_ranges(path: Path) -> Floats:
    """Lowest and highest value (36, 2) of each feature, which -1 to 1 stand for."""
    kind, target, *lines = path.read_text(encoding="ascii").splitlines()
    if (kind.strip(), target.split()) != ("x", ["-1", "1"]):
        raise ValueError(f"{kind} {target}")
    ranges = np.array([line.split() for line in lines if line.strip()], np.float64)
    if not np.array_equal(ranges[:, 0], np.arange(1, _FEATURES + 1)):
        raise ValueError(f"{len(ranges)} features")
    return ranges[:, 1:]


def _pristine_statistics(path: Path) -> tuple[Floats, Floats]:
    """Mean (36,) and covariance (36, 36)."""
    with path.open("rb") as file:
        stored = loadmat(file)
    mean = np.asarray(stored["mu_prisparam"], np.float64).reshape(_FEATURES)
    return mean, np.asarray(stored["cov_prisparam"], np.float64).reshape(_FEATURES, _FEATURES)
