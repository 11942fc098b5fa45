"""Fit the calibration of a package on its anchors, each judged against the others.

    python -m meiqa.training.calibrate --package PACKAGE --memory MEMORY --data DATA --limit 400

The anchors were kept out of the model's training, and an anchor never meets itself, so they stand
in for photographs that users bring. Fitted are the logistic of both score heads, sigma, lambda and
the temperature of the comparisons, and how the posterior's deviation relates to the error seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize
from scipy.stats import spearmanr

from meiqa.engine.caches import ByteLru
from meiqa.engine.comparing import Comparer, preferences_of
from meiqa.engine.package import Calibration, EnginePackage, Logistic
from meiqa.engine.pipeline import ANCHOR_CACHE_BYTES
from meiqa.engine.planning import FULL_SUMMARY_TOKENS
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.scoring import expected_grade
from meiqa.engine.vlm import LocalVlm, Prefix
from meiqa.kernels.thurstone import thurstone_map
from meiqa.memory import MemoryBank, RetrievalPolicy
from meiqa.training.build_memory import read_photograph
from meiqa.training.data import anchor_names, human_scored, name_hash

Floats = NDArray[np.float64]

TEMPERATURES = (0.7, 1.0, 1.4, 2.0, 2.8)
SIGMAS = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, eq=False)
class Judged:
    """What the model says of N anchors and of their K neighbours.

    Attributes:
        human: (N,) human scores.
        text, levels: (N,) raw score of each head; text is NaN where no rating could be read.
        logits: (N, K, 2) of the comparisons; scores, stds: (N, K) of the neighbours.
    """

    human: Floats
    text: Floats
    levels: Floats
    logits: Floats
    scores: Floats
    stds: Floats


def judge_anchors(package: EnginePackage, bank: MemoryBank, data: Path, limit: int) -> Judged:
    """Score, retrieve for and compare a spread of anchors, each without itself."""
    calibration = package.manifest.calibration
    vlm = LocalVlm(package, *open_sessions(package, "cpu", None))
    comparer = Comparer(vlm, package.digest, ByteLru[Prefix](ANCHOR_CACHE_BYTES))
    snapshot, names = bank.snapshot(), anchor_names(data)
    rows = [row for row in human_scored(data) if row["file"] in names]
    columns: dict[str, list[Any]] = {name: [] for name in Judged.__dataclass_fields__}
    for index, row in enumerate(sorted(rows, key=lambda r: name_hash(r["file"]))[:limit], 1):
        digest, prefix = read_photograph(vlm, data / "biq2021" / "images" / row["file"])
        description = vlm.describe(prefix, FULL_SUMMARY_TOKENS)
        neighbours = snapshot.retrieve(
            description.key,
            RetrievalPolicy(k=calibration.neighbours, bins=calibration.bins),
            exclude_digest=digest,
        )
        verdicts = comparer.compare(
            prefix, 3.0, neighbours, both_orders=True, temperature=1.0, go_on=lambda *_: True
        )
        columns["human"].append(1.0 + 4.0 * float(row["mos"]))
        columns["text"].append(np.nan if description.rating is None else description.rating)
        columns["levels"].append(expected_grade(vlm.grade(prefix)))
        columns["logits"].append(verdicts.logits)
        columns["scores"].append([case.score for case in neighbours])
        columns["stds"].append([case.std for case in neighbours])
        if index % 50 == 0:
            print(f"{index} of {limit} anchors judged", flush=True)
    return Judged(**{name: np.array(values, np.float64) for name, values in columns.items()})


def fitted_logistic(raw: Floats, human: Floats) -> Logistic:
    """Least-squares five-parameter logistic; increasing, as b1 b2 >= 0 and b4 >= 0 are kept."""

    def residuals(b: Floats) -> Floats:
        return np.asarray(Logistic(*b)(raw) - human)

    start = [1.0, 1.0, float(np.mean(raw)), 0.5, float(np.mean(human) - 0.5 * np.mean(raw))]
    bounds = ([0, 0, 1, 0, -5], [8, 8, 5, 2, 5])
    fit = least_squares(residuals, start, bounds=bounds)
    return Logistic(*(float(b) for b in fit.x))


def fused_scores(
    judged: Judged, prior: Floats, temperature: float, sigma: float, lam: float
) -> tuple[Floats, Floats]:
    """Posterior scores and deviations (N,) under given parameters."""
    n, k, _ = judged.logits.shape
    preferences = preferences_of(judged.logits.reshape(n * k, 2), temperature).reshape(n, k)
    return thurstone_map(prior, judged.scores, judged.stds, preferences, sigma, lam)


def fitted_fusion(judged: Judged, prior: Floats) -> tuple[float, float, float]:
    """Temperature, sigma and lambda with the smallest squared error."""

    def error(parameters: tuple[float, float, float]) -> float:
        scores, _ = fused_scores(judged, prior, *parameters)
        return float(np.mean((scores - judged.human) ** 2))

    return min(itertools.product(TEMPERATURES, SIGMAS, LAMBDAS), key=error)


def fitted_deviation(errors: Floats, stds: Floats) -> tuple[float, float]:
    """Scale and floor of the deviation under which the errors are most likely."""

    def surprise(logs: Floats) -> float:
        variance = np.exp(2 * logs[0]) * stds**2 + np.exp(2 * logs[1])
        return float(np.mean(np.log(variance) + errors**2 / variance))

    spread = float(np.sqrt(np.mean(errors**2)))
    found = minimize(
        surprise,
        np.log(np.array([0.5 * spread / float(np.mean(stds)), 0.5 * spread])),
        method="Nelder-Mead",
    )
    scale, floor = np.exp(found.x)
    return float(scale), float(floor)


def fitted_head(
    judged: Judged, head: str, base: Calibration
) -> tuple[Calibration, dict[str, float]]:
    """Calibration with one score head as the initial score, and what it reaches."""
    mapped = np.asarray(base.levels(judged.levels))
    if head == "text":
        readable = ~np.isnan(judged.text)
        mapped[readable] = base.text(judged.text[readable])
    temperature, sigma, lam = fitted_fusion(judged, mapped)
    scores, stds = fused_scores(judged, mapped, temperature, sigma, lam)
    scale, floor = fitted_deviation(scores - judged.human, stds)
    fitted = replace(
        base,
        score_head=head,
        temperature=temperature,
        sigma=sigma,
        lam=lam,
        std_scale=scale,
        std_floor=floor,
    )
    reached = {
        "initial_srcc": float(spearmanr(mapped, judged.human).statistic),
        "initial_rmse": float(np.sqrt(np.mean((mapped - judged.human) ** 2))),
        "fused_srcc": float(spearmanr(scores, judged.human).statistic),
        "fused_rmse": float(np.sqrt(np.mean((scores - judged.human) ** 2))),
        "moved_by_more_than_0.75": float(np.mean(np.abs(scores - mapped) > 0.75)),
    }
    return fitted, reached


def fitted_calibration(
    judged: Judged, base: Calibration
) -> tuple[Calibration, dict[str, dict[str, float]]]:
    """The calibration of the head whose fused scores are nearest to people's."""
    readable = ~np.isnan(judged.text)
    text = fitted_logistic(judged.text[readable], judged.human[readable])
    levels = fitted_logistic(judged.levels, judged.human)
    errors = (
        np.asarray(text(judged.text[readable])) - judged.human[readable],
        np.asarray(levels(judged.levels)) - judged.human,
    )
    base = replace(
        base,
        text=text,
        levels=levels,
        text_std=float(np.sqrt(np.mean(errors[0] ** 2))),
        levels_std=float(np.sqrt(np.mean(errors[1] ** 2))),
    )
    fits = {head: fitted_head(judged, head, base) for head in ("text", "levels")}
    best = min(fits, key=lambda head: fits[head][1]["fused_rmse"])
    return fits[best][0], {head: reached for head, (_, reached) in fits.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.training.calibrate")
    parser.add_argument("--package", type=Path, required=True, help="its manifest is rewritten")
    parser.add_argument("--memory", type=Path, required=True, help="anchors made by this package")
    parser.add_argument("--data", type=Path, required=True, help="folder with biq2021/")
    parser.add_argument("--limit", type=int, default=400, help="anchors to judge")
    arguments = parser.parse_args()
    package = EnginePackage.open(arguments.package)
    base = package.manifest.calibration
    with MemoryBank.open(arguments.memory, "r", package_digest=package.digest) as bank:
        judged = judge_anchors(package, bank, arguments.data, arguments.limit)
    calibration, reached = fitted_calibration(judged, base)
    package.with_calibration(calibration)
    print(json.dumps({"reached": reached, "calibration": asdict(calibration)}, indent=2))


if __name__ == "__main__":
    main()
