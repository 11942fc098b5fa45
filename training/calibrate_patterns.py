"""The patterns' calibration, fitted on unseen photographs under every distortion.

    python -m training.calibrate_patterns --work WORK --patterns FILE
    python -m training.calibrate_patterns … --data DATA --package PACKAGE --memory MEMORY

The first fits what follows from tokens alone. The second scores some of the photographs with the
whole engine as well, to see how far its errors go with those of the patterns; the package must have
the patterns by then, and gets them again with the calibration.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar, nnls

from meiqa.engine.calibration import IDENTITY, Logistic, PatternCalibration
from meiqa.engine.engine import Engine
from meiqa.engine.estimates import Z95
from meiqa.engine.images import load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError
from meiqa.export.patterns import TrainedPatterns
from training.commands import run_command
from training.data import name_hash, pristine_names
from training.distortions import TWO_SIDED, distort, kadid_scores
from training.pattern_pairs import read_views
from training.patterns import Judged, judged, save_patterns, views_of

Floats = NDArray[np.float64]
LEAST_STD = 0.1
SCORED = 12
"""Versions of each photograph that the engine scores."""


def fitted(found: Judged, before: PatternCalibration) -> PatternCalibration:
    """Fit everything but the correlation."""
    hybrid = line(np.concatenate([found.hybrid, found.degraded]), np.tile(found.wanted, (2, 1)))
    alone = line(found.alone, found.wanted)
    trusted, doubted = deviations(found, hybrid)
    return replace(
        before,
        hybrid=hybrid,
        alone=alone,
        alone_std=deviation(alone(found.alone) - found.wanted),
        trusted_std=trusted,
        doubted_std=doubted,
        temperature=temperature(found),
    )


def line(scores: Floats, wanted: Floats) -> Logistic:
    """The straight line of least squares, as a logistic without its curve.

    The patterns are trained on the scale itself, and a curve would follow these types and levels.
    """
    slope, offset = np.polyfit(scores.ravel(), wanted.ravel(), 1)
    return replace(IDENTITY, b4=float(slope), b5=float(offset))


def deviation(errors: Floats) -> float:
    """Root of the mean square, not too little."""
    return max(LEAST_STD, float(np.sqrt(np.mean(errors**2))))


def deviations(found: Judged, hybrid: Logistic) -> tuple[float, float]:
    """Deviations at weights 1 and 0: the squared errors' least squares over weight and its rest."""
    weights = np.concatenate([found.weight, found.degraded_weight]).ravel()
    errors = np.concatenate([hybrid(s) - found.wanted for s in (found.hybrid, found.degraded)])
    shares = np.stack([weights, 1 - weights], axis=1)
    variances, _ = nnls(shares, errors.ravel() ** 2)
    trusted, doubted = (max(LEAST_STD, float(np.sqrt(v))) for v in variances)
    return trusted, max(trusted, doubted)


def temperature(found: Judged) -> float:
    """What the logits of the kinds are divided by, by likelihood."""
    logits = found.kinds.reshape(-1, found.kinds.shape[-1])
    true = found.true_kinds.ravel()

    def loss(log_temperature: float) -> float:
        spread = logits / np.exp(log_temperature)
        spread = spread - spread.max(axis=1, keepdims=True)
        chosen = spread[np.arange(len(true)), true]
        return float(np.mean(np.log(np.exp(spread).sum(axis=1)) - chosen))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def held(found: Judged, part: NDArray[np.intp]) -> Judged:
    """Some of the photographs."""
    names = {field.name for field in fields(found)} - {"cell_ranks"}
    return replace(found, **{name: getattr(found, name)[part] for name in names})


def checked(found: Judged, before: PatternCalibration) -> dict[str, float]:
    """Fit on every other photograph, and see on the rest how true deviations and shares are."""
    halves = np.arange(0, len(found.wanted), 2), np.arange(1, len(found.wanted), 2)
    inside, named = [], []
    for one, other in (halves, halves[::-1]):
        made, rest = fitted(held(found, one), before), held(found, other)
        for scores, weights in ((rest.hybrid, rest.weight), (rest.degraded, rest.degraded_weight)):
            variance = weights * made.trusted_std**2 + (1 - weights) * made.doubted_std**2
            within = np.abs(made.hybrid(scores) - rest.wanted) <= Z95 * np.sqrt(variance)
            inside.append(float(within.mean()))
        shares = probabilities(rest.kinds, made.temperature)
        right = rest.kinds.argmax(-1) == rest.true_kinds
        named.append(abs(float(shares.max(-1).mean() - right.mean())))
    return {
        "interval_coverage": float(np.mean(inside[::2])),
        "interval_coverage_degraded": float(np.mean(inside[1::2])),
        "naming_overconfidence": float(np.mean(named)),
    }


def probabilities(logits: Floats, divided_by: float) -> Floats:
    """Softmax over the last axis."""
    spread = logits / divided_by
    weights = np.exp(spread - spread.max(axis=-1, keepdims=True))
    shares: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return shares


def correlation(data: Path, package: Path, memory: Path) -> tuple[float, dict[str, float]]:
    """How far the engine's errors go with the hybrid score's, and what joining them brings."""
    scores = kadid_scores(data / "labels" / "KADID-10k.txt")
    own, beside, stds, wanted = [], [], [], []
    with Engine.open(package, memory, learn=False) as engine:
        for name in pristine_names(data, held_out=True):
            clean = load_pixels(data / "pristine" / "images" / name).array
            rng = np.random.default_rng(int(name_hash(name)[:16], 16))
            for _ in range(SCORED):
                kind, level = int(rng.integers(1, 26)), int(rng.integers(1, 6))
                if kind in TWO_SIDED and level == 3:
                    continue
                photo = distort(clean, kind, level, rng)
                found = engine.score(photo, reference=clean)
                assert found.reference is not None
                own.append(found.score - found.reference.moved)
                beside.append(found.reference.score)
                stds.append(found.std)
                wanted.append(float(scores[kind - 1, level - 1]))
    people = np.array(wanted)
    errors = np.array(own) - people, np.array(beside) - people
    found_correlation = float(np.clip(np.corrcoef(*errors)[0, 1], 0.0, 0.95))
    return found_correlation, {
        "engine_rmse": deviation(errors[0]),
        "patterns_rmse": deviation(errors[1]),
        "scored": len(people),
    }


def recalibrate(folder: Path, calibration: PatternCalibration, report: dict[str, Any]) -> None:
    """Give the patterns of a package another calibration; their graph stays."""
    package = EnginePackage.open(folder)
    patterns = package.manifest.patterns
    if patterns is None:
        raise UsageError(
            "the package has no patterns", hint="meiqa export --patterns FILE --out PACKAGE"
        )
    merged = {**patterns.report, "calibration": report}
    package.rewritten(patterns=replace(patterns, calibration=calibration, report=merged))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.calibrate_patterns", description=__doc__
    )
    parser.add_argument("--work", type=Path, required=True, help="written by pattern_pairs")
    parser.add_argument("--patterns", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--package", type=Path)
    parser.add_argument("--memory", type=Path)
    given = parser.parse_args()
    trained = TrainedPatterns.load(given.patterns)
    views = [view for stored in read_views(given.work, unseen=True) for view in views_of(stored)]
    found = judged(trained.module, views)
    calibration = fitted(found, trained.calibration)
    report: dict[str, Any] = {"held_out": checked(found, trained.calibration)}
    if given.package is not None:
        shared, report["beside_engine"] = correlation(given.data, given.package, given.memory)
        calibration = replace(calibration, correlation=shared)
    trained = replace(
        trained, calibration=calibration, report={**trained.report, "calibration": report}
    )
    save_patterns(trained, given.patterns)
    if given.package is not None:
        recalibrate(given.package, calibration, report)
    print(json.dumps({**report, "fitted": calibration.__dict__}, indent=2, default=vars))


if __name__ == "__main__":
    run_command(main)
