"""Distortion patterns: a codebook over the visual tokens that judges with or without a reference.

After MQAF (arXiv 2602.18000; docs/reference-mode.md has what is the paper's): what a photo's tokens
match in a trained codebook gives a score without a reference; how far that differs from what the
reference's match gives one with it; a learned gate weighs the two. The nearest patterns name the
distortion. Patterns are compared token by token, so a reference is resized to the very pixels that
the tower sees of the photo, and refused if its sides are in another proportion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.calibration import PatternCalibration
from meiqa.engine.estimates import mapped, softmax
from meiqa.engine.images import Pixels, fitted, resized
from meiqa.engine.manifest import ImageProcessing, PatternGraph
from meiqa.engine.model import Floats, VisualTokens
from meiqa.engine.runtime.decoder import GraphSession, require_finite
from meiqa.errors import ImageError, UsageError
from meiqa.types import Distortion

NAMED_ABOVE = 0.4
"""A distortion is listed when it is at least so probable, so at most two are; less sure ones are
too often not there (`benchmarks.reference` counts them)."""
LITTLE = 2.0
"""Damage below this strength, and of no kind that is sure enough to be listed, is hardly there."""
STRONGEST = 5.0
"""The scale of strength: KADID-10k's levels, 0 where there is nothing."""
TOP = 5.0
LARGEST_DIFFERENCE = 0.01
"""Of the logarithms of two aspect ratios."""
OPAQUE = 0.7
"""How much of the photo the map hides where the distortion is strongest."""
_COLOURS = np.array([[255, 235, 90], [250, 140, 30], [200, 20, 30]], np.float32)
"""Of the map: weak, middling, strong."""


@dataclass(frozen=True, eq=False)
class PatternScore:
    """What the patterns say of a photo.

    Attributes:
        score, std: the hybrid score with a reference, that of the patterns alone without one, and
            its deviation from people's.
        weight: the gate, the share of `full_reference` beside `no_reference`.
        probabilities: (N,) of the package's kinds of distortion, the first being none.
        distortions: those listed, the likeliest first; strength: of damage of any kind, 0-5.
        map: (h, w) how strongly each visual token of the photo is distorted, 0-1.
    """

    score: float
    std: float
    no_reference: float
    full_reference: float | None
    weight: float
    probabilities: NDArray[np.float64]
    distortions: tuple[Distortion, ...]
    strength: float
    map: Floats

    @property
    def sees_little(self) -> bool:
        """Whether there is hardly any damage, as far as the patterns see."""
        return not self.distortions and self.strength < LITTLE

    def over(self, height: int, width: int) -> Floats:
        """Give the map at a photo's own size, linear between the middles of the tokens."""
        rows, columns = (
            np.clip((np.arange(size) + 0.5) * tokens / size - 0.5, 0, tokens - 1)
            for size, tokens in zip((height, width), self.map.shape, strict=True)
        )
        return interpolated(interpolated(self.map, rows).T, columns).T.astype(np.float32)


class PatternScorer:
    """The patterns of a package, run by a graph session."""

    def __init__(self, patterns: PatternGraph, session: GraphSession) -> None:
        self._patterns, self._session = patterns, session

    @property
    def calibration(self) -> PatternCalibration:
        return self._patterns.calibration

    @property
    def kinds(self) -> tuple[str, ...]:
        return self._patterns.kinds

    def judge(self, photo: VisualTokens, reference: VisualTokens | None = None) -> PatternScore:
        """Judge a photo: with a reference, of the same grid, if there is one; alone otherwise."""
        c, beside = self.calibration, photo if reference is None else reference
        made = self._session.run({"tokens": photo.values, "reference": beside.values})
        for values in made.values():
            require_finite(values)
        no_reference, full_reference, weight = map(float, made["scores"])
        own = mapped(c.alone, no_reference)
        strength = float(np.clip(made["strength"][0], 0.0, STRONGEST))
        probabilities = softmax(made["kinds"].astype(np.float64) / c.temperature)
        alone = PatternScore(
            score=own,
            std=c.alone_std,
            no_reference=own,
            full_reference=None,
            weight=0.0,
            probabilities=probabilities,
            distortions=self._named(probabilities, strength),
            strength=strength,
            map=_on_map(made["cells"], photo.grid),
        )
        if reference is None:
            return alone
        return replace(
            alone,
            score=mapped(c.hybrid, weight * full_reference + (1.0 - weight) * no_reference),
            std=math.sqrt(weight * c.trusted_std**2 + (1.0 - weight) * c.doubted_std**2),
            full_reference=min(TOP, max(1.0, full_reference)),
            weight=weight,
            map=_on_map(made["changes"], photo.grid),
        )

    def identical(self, photo: VisualTokens) -> PatternScore:
        """Judge a photo that is its reference, pixel for pixel: the top of the scale."""
        alone = self.judge(photo)
        return replace(
            alone,
            score=TOP,
            std=self.calibration.trusted_std,
            full_reference=TOP,
            weight=1.0,
            probabilities=np.eye(len(self.kinds))[0],
            distortions=(),
            strength=0.0,
            map=np.zeros_like(alone.map),
        )

    def seen(
        self, pixels: Pixels, tokens: VisualTokens, reference: ReferencePhoto | None
    ) -> PatternScore:
        """Judge a photo with a reference, which may be the photo itself, or without one."""
        if reference is None:
            return self.judge(tokens)
        if reference.is_same(pixels):
            return self.identical(tokens)
        return self.judge(tokens, reference.tokens_beside(pixels))

    def _named(self, probabilities: NDArray[np.float64], strength: float) -> tuple[Distortion, ...]:
        """List the likeliest distortions; the first of the kinds stands for none."""
        likeliest = [int(i) for i in np.argsort(-probabilities, kind="stable") if i > 0]
        return tuple(
            Distortion(self.kinds[i], strength, float(probabilities[i]))
            for i in likeliest
            if probabilities[i] >= NAMED_ABOVE
        )


def required(patterns: PatternScorer | None) -> PatternScorer:
    if patterns is None:
        raise UsageError(
            "this engine package has no distortion patterns, so it can't use a reference",
            hint="meiqa export --patterns adds those that were trained for its tower",
        )
    return patterns


@dataclass(frozen=True, eq=False)
class ReferencePhoto:
    """A reference, with its visual tokens at the sizes of the photos it was compared with."""

    pixels: Pixels
    image: ImageProcessing
    encode: Callable[[NDArray[np.uint8]], VisualTokens]
    _tokens: dict[tuple[int, ...], VisualTokens] = field(default_factory=dict)

    def is_same(self, photo: Pixels) -> bool:
        return photo.digest == self.pixels.digest

    def tokens_beside(self, photo: Pixels) -> VisualTokens:
        """Give its tokens on a photo's grid; ImageError for one of another proportion."""
        (height, width), (rows, columns) = (p.array.shape[:2] for p in (photo, self.pixels))
        if abs(math.log(width * rows / (height * columns))) > LARGEST_DIFFERENCE:
            raise ImageError(
                f"{photo.name}: the reference {self.pixels.name} is of another shape",
                seen=f"{width} x {height} beside {columns} x {rows} pixels",
                allowed="sides in the same proportion, within 1 %",
                hint="crop or pad the reference to what the photo shows",
            )
        if (height, width) not in self._tokens:
            alike = fitted(resized(self.pixels.array, height, width), self.image)
            self._tokens[height, width] = self.encode(alike)
        return self._tokens[height, width]


def painted(pixels: NDArray[np.uint8], strengths: Floats) -> NDArray[np.uint8]:
    """Lay a map of distortion (H, W), 0-1, over a photo (H, W, 3)."""
    shares = np.clip(strengths, 0.0, 1.0)
    colours = interpolated(_COLOURS, shares.ravel() * (len(_COLOURS) - 1))
    cover = OPAQUE * shares[..., None]
    laid = (1 - cover) * pixels + cover * colours.reshape(pixels.shape)
    rounded: NDArray[np.uint8] = np.rint(laid).astype(np.uint8)
    return rounded


def _on_map(strengths: Floats, grid: tuple[int, ...]) -> Floats:
    """Give strengths of tokens (T,) as shares (h, w) of the strongest."""
    shares: Floats = np.clip(strengths.reshape(grid) / np.float32(STRONGEST), 0.0, 1.0)
    return shares


def interpolated(values: Floats, at: NDArray[np.floating]) -> Floats:
    """Give rows of (n, m) at places between them, linearly."""
    below = np.floor(at).astype(np.intp)
    above = np.minimum(below + 1, len(values) - 1)
    share = (at - below).astype(np.float32)[:, None]
    return np.asarray((1 - share) * values[below] + share * values[above])
