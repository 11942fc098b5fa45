"""Distortion patterns: a codebook over the visual tokens that judges with or without a reference.

After MQAF (arXiv 2602.18000): what a photo's cells match in a trained codebook gives a score
without a reference; how far that differs from what the reference's cells match gives one with it; a
learned gate weighs the two. The patterns that are nearest name the distortion.
docs/reference-mode.md has what is the paper's and what is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.fusing import Observation, Posterior, joined
from meiqa.engine.manifest import PatternCalibration, PatternGraph
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.base import GraphSession, require_finite
from meiqa.engine.vlm import Floats, VisualTokens
from meiqa.errors import UsageError
from meiqa.types import Distortion

NAMED_ABOVE = 0.25
"""A distortion is listed when it is at least so probable."""
MOST_NAMED = 3
STRONGEST = 5.0
"""The scale of strength: KADID-10k's levels, 0 where there is nothing."""
TOP = 5.0


@dataclass(frozen=True, eq=False)
class PatternOpinion:
    """What the patterns say of a photo.

    Attributes:
        score, std: the hybrid score with a reference, that of the patterns alone without one, and
            its deviation from people's.
        no_reference, full_reference: the two scores that the gate weighs; the second is None
            without a reference.
        weight: the gate, the share of `full_reference`; 0 without one.
        distortions: the likeliest first.
        map: (h, w) how strongly each cell of the photo is distorted, 0-1.
    """

    score: float
    std: float
    no_reference: float
    full_reference: float | None
    weight: float
    distortions: tuple[Distortion, ...]
    map: Floats

    def over(self, height: int, width: int) -> Floats:
        """The map at a photo's own size (height, width): each pixel between the nearest cells."""
        rows, columns = (
            np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
            for size, cells in zip((height, width), self.map.shape, strict=True)
        )
        along = interpolated(self.map, rows)
        wide: Floats = interpolated(along.T, columns).T.astype(np.float32)
        return wide


class PatternJudge:
    """The patterns of a package, run by a graph session."""

    def __init__(self, patterns: PatternGraph, session: GraphSession) -> None:
        self._patterns, self._session = patterns, session

    @property
    def calibration(self) -> PatternCalibration:
        """How its scores go with people's."""
        return self._patterns.calibration

    def judge(self, photo: VisualTokens, reference: VisualTokens | None = None) -> PatternOpinion:
        """Judge a photo: with a reference, of the same grid, if there is one; alone otherwise.

        Raises:
            AnswerNotFinite: what the graph gives is not a number.
        """
        beside = photo if reference is None else reference
        made = self._session.run({"tokens": photo.values, "reference": beside.values})
        for values in made.values():
            require_finite(values)
        alone = self._alone(photo, made)
        return alone if reference is None else self._beside(alone, made)

    def identical(self, photo: VisualTokens) -> PatternOpinion:
        """Judge a photo that is its reference, pixel for pixel: the top of the scale."""
        alone = self.judge(photo)
        return replace(
            alone,
            score=TOP,
            std=self.calibration.trusted_std,
            full_reference=TOP,
            weight=1.0,
            distortions=(),
            map=np.zeros_like(alone.map),
        )

    def _alone(self, photo: VisualTokens, made: dict[str, Floats]) -> PatternOpinion:
        score = float(self.calibration.alone(float(made["scores"][0])))
        return PatternOpinion(
            score=score,
            std=self.calibration.alone_std,
            no_reference=score,
            full_reference=None,
            weight=0.0,
            distortions=self._named(made["kinds"], float(made["strength"][0])),
            map=on_map(made["cells"], photo.grid),
        )

    def _beside(self, alone: PatternOpinion, made: dict[str, Floats]) -> PatternOpinion:
        c = self.calibration
        no_reference, full_reference, weight = map(float, made["scores"])
        hybrid = weight * full_reference + (1.0 - weight) * no_reference
        return replace(
            alone,
            score=float(c.hybrid(hybrid)),
            std=math.sqrt(weight * c.trusted_std**2 + (1.0 - weight) * c.doubted_std**2),
            full_reference=min(TOP, max(1.0, full_reference)),
            weight=weight,
            map=on_map(made["changes"], alone.map.shape),
        )

    def likeliest(self, photo: VisualTokens) -> int:
        """Which of the package's kinds a photo's distortion is most likely of; 0 for none."""
        made = self._session.run({"tokens": photo.values, "reference": photo.values})
        return int(made["kinds"].argmax())

    def _named(self, logits: Floats, strength: float) -> tuple[Distortion, ...]:
        """The likeliest distortions; the first of the kinds stands for none."""
        spread = logits.astype(np.float64) / self.calibration.temperature
        weights = np.exp(spread - spread.max())
        probabilities = weights / weights.sum()
        likeliest = [int(i) for i in np.argsort(-probabilities, kind="stable") if i > 0]
        level = float(np.clip(strength, 0.0, STRONGEST))
        return tuple(
            Distortion(self._patterns.kinds[i], level, float(probabilities[i]))
            for i in likeliest[:MOST_NAMED]
            if probabilities[i] >= NAMED_ABOVE
        )


def opened_patterns(
    package: EnginePackage, device: str, threads: int | None, *, verify: bool = True
) -> PatternJudge | None:
    """The patterns of a package on a device; None where it has none.

    Raises:
        DeviceUnavailable: the device is not there, or has no engine for them.
        PackageCorrupted: the graph can't be loaded.
    """
    patterns = package.manifest.patterns
    if patterns is None:
        return None
    session: GraphSession
    if device == "tensorrt":
        from meiqa.engine.runtime.tensorrt import open_tensorrt_patterns

        session = open_tensorrt_patterns(package, verify=verify)
    else:
        from meiqa.engine.runtime.onnx import OnnxSession

        session = OnnxSession(package.path, patterns.graph, device, threads)
    return PatternJudge(patterns, session)


def required(patterns: PatternJudge | None, package: EnginePackage) -> PatternJudge:
    """The patterns of a package, refused in one line where it has none.

    Raises:
        UsageError: it has none.
    """
    if patterns is None:
        raise UsageError(
            "this engine package has no distortion patterns, so it can't use a reference",
            seen=package.path,
            hint="python -m meiqa.export.patterns adds those that were trained for its tower",
        )
    return patterns


def with_reference(
    posterior: Posterior, opinion: PatternOpinion, correlation: float, *, identical: bool
) -> Posterior:
    """A photo's posterior with the hybrid score as one more observation of it.

    The patterns' deviation is the one observed, as the posterior's is, so they are joined after the
    comparisons. A photo that is its reference has the top of the scale, whatever it looks like.
    """
    if identical:
        return Posterior(TOP, opinion.std)
    both = joined(
        Observation(posterior.score, posterior.std),
        Observation(opinion.score, opinion.std),
        correlation,
    )
    return Posterior(both.score, both.std)


def on_map(strengths: Floats, grid: tuple[int, ...]) -> Floats:
    """Strengths of cells (T,) as shares (h, w) of the strongest."""
    shares: Floats = np.clip(strengths.reshape(grid) / np.float32(STRONGEST), 0.0, 1.0)
    return shares


def interpolated(values: Floats, at: NDArray[np.float64]) -> Floats:
    """Rows of (n, m) at places between them, linearly."""
    below = np.floor(at).astype(np.intp)
    above = np.minimum(below + 1, len(values) - 1)
    share = (at - below).astype(np.float32)[:, None]
    between: Floats = (1 - share) * values[below] + share * values[above]
    return between
