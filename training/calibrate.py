"""Fit the calibration of a package on its anchors, each judged against the others.

    python -m meiqa.training.calibrate LABELS.csv --images DIR --package PACKAGE --memory MEMORY

The anchors were kept out of the model's training, and an anchor never meets itself, so they stand
in for photographs that users bring. Fitted are the logistics of both score heads, sigma, lambda and
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
from scipy.stats import spearmanr

from meiqa.engine.caches import ByteLru
from meiqa.engine.comparing import Comparer, all_in_order, preferences_of
from meiqa.engine.fusing import Observation, joined
from meiqa.engine.images import load_pixels
from meiqa.engine.package import Calibration, EnginePackage
from meiqa.engine.pipeline import ANCHOR_CACHE_BYTES, fitted_to
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.scoring import expected_grade, weighted
from meiqa.engine.vlm import LocalVlm, Prefix
from meiqa.errors import PackageCorrupted, UsageError
from meiqa.export.commands import run_command
from meiqa.kernels.thurstone import thurstone_map
from meiqa.labels import LabelTable
from meiqa.memory import MemoryBank, RetrievalPolicy, layout, retrieval_key
from meiqa.training.data import name_hash
from meiqa.training.mapping import fitted_deviation, matched_logistic, root_mean_square

Floats = NDArray[np.float64]

TEMPERATURES = (0.35, 0.5, 0.7, 1.0, 1.4)
SIGMAS = (0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.5)
LAMBDAS = (0.01, 0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 30.0, 100.0)
"""In increasing order."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST_ANCHORS = 100
REFLECTED_SHARE = 0.05
"""Share of photos whose score moves enough to be reflected on."""
LARGEST_GATE = 0.75
"""The gate of ME-IQA, for models whose scores move that much."""


@dataclass(frozen=True, eq=False)
class Judged:
    """What the model says of N anchors and of their K neighbours.

    Attributes:
        human: (N,) human scores.
        text, levels: (N,) raw score of each head; text is NaN where no rating could be read.
        memory: (N,) what the memory's regression says without having seen the photo; NaN where it
            has none.
        logits: (N, K, 2) of the comparisons; scores, stds: (N, K) of the neighbours.
    """

    human: Floats
    text: Floats
    levels: Floats
    memory: Floats
    logits: Floats
    scores: Floats
    stds: Floats


def judge_anchors(
    package: EnginePackage, bank: MemoryBank, labels: LabelTable, images: Path, limit: int
) -> Judged:
    """Score, retrieve for and compare some anchors, chosen by name, each without itself."""
    calibration = package.manifest.calibration
    vlm = LocalVlm(package, *open_sessions(package, "cpu", None))
    comparer = Comparer(vlm, package.digest, ByteLru[Prefix](ANCHOR_CACHE_BYTES))
    snapshot = bank.snapshot()
    recalled = snapshot.scores_left_out()
    rows = sorted(zip(labels.files, labels.scores_1_to_5(), strict=True), key=by_hash)[:limit]
    columns: dict[str, list[Any]] = {name: [] for name in Judged.__dataclass_fields__}
    for index, (file, score) in enumerate(rows, 1):
        pixels = load_pixels(images / file)
        prefix = vlm.read([vlm.encode(fitted_to(pixels, vlm.image))])[0]
        description = vlm.describe(prefix, vlm.prompts.family.summary_tokens)
        if description.key is None:
            raise PackageCorrupted("the model writes nothing about an anchor", seen=file)
        neighbours = snapshot.retrieve(
            retrieval_key(bank.key_kind, description.key, prefix.tokens.values),
            RetrievalPolicy(k=calibration.neighbours, bins=calibration.bins),
            exclude_digest=pixels.digest,
            layout=layout(prefix.tokens.values, prefix.tokens.grid),
        )
        verdicts = comparer.compare(
            prefix, neighbours, both_orders=True, temperature=1.0, next_wave=all_in_order
        )
        columns["human"].append(score)
        columns["text"].append(np.nan if description.rating is None else description.rating)
        columns["levels"].append(expected_grade(vlm.grade(prefix)))
        columns["memory"].append(recalled.get(pixels.digest, np.nan))
        columns["logits"].append(verdicts.logits)
        columns["scores"].append([case.score for case in neighbours])
        columns["stds"].append([case.std for case in neighbours])
        if index % 50 == 0:
            print(f"{index} of {len(rows)} anchors judged", flush=True)
    return Judged(**{name: np.array(values, np.float64) for name, values in columns.items()})


def by_hash(row: tuple[str, float]) -> str:
    """A place in an order that has nothing to do with scores."""
    return name_hash(row[0])


def fused_scores(
    judged: Judged, prior: Floats, temperature: float, sigma: float, lam: float
) -> tuple[Floats, Floats]:
    """Posterior scores, kept on the scale, and deviations (N,) under given parameters."""
    n, k, _ = judged.logits.shape
    preferences = preferences_of(judged.logits.reshape(n * k, 2), temperature).reshape(n, k)
    scores, stds = thurstone_map(prior, judged.scores, judged.stds, preferences, sigma, lam)
    return np.clip(scores, 1.0, 5.0), stds


def fitted_fusion(judged: Judged, prior: Floats) -> tuple[float, float, float]:
    """Temperature, sigma and the smallest lambda that is not clearly worse than the best.

    For each lambda the pair with the smallest squared error is taken. Among the lambdas whose
    error exceeds the best by less than the standard error of the difference, the smallest wins:
    where the data can't tell, the comparisons are trusted rather than the prior. Errors are those
    of scores spread as wide as people's: otherwise comparisons would be credited with pulling
    scores to the middle.
    """

    def squared_errors(parameters: tuple[float, float, float]) -> Floats:
        scores = fused_scores(judged, prior, *parameters)[0]
        wide = (scores - scores.mean()) * (judged.human.std() / max(float(scores.std()), 1e-9))
        errors: Floats = (wide + judged.human.mean() - judged.human) ** 2
        return errors

    def best_with(lam: float) -> tuple[tuple[float, float, float], Floats]:
        tried = ((t, s, lam) for t, s in itertools.product(TEMPERATURES, SIGMAS))
        found = ((parameters, squared_errors(parameters)) for parameters in tried)
        return min(found, key=lambda pair: float(pair[1].mean()))

    fits = [best_with(lam) for lam in LAMBDAS]
    best = min((errors for _, errors in fits), key=lambda errors: float(errors.mean()))
    return next(
        parameters
        for parameters, errors in fits
        if np.mean(errors - best) <= np.std(errors - best) / np.sqrt(len(best))
    )


def fitted_heads(judged: Judged, base: Calibration) -> tuple[Calibration, Floats, Floats]:
    """Logistics and deviations of both heads, with their mapped scores (N,) each."""
    levels = matched_logistic(judged.levels, judged.human)
    by_grade = np.asarray(levels(judged.levels))
    readable = ~np.isnan(judged.text)
    by_text = by_grade.copy()
    text = base.text
    if readable.any():
        text = matched_logistic(judged.text[readable], judged.human[readable])
        by_text[readable] = text(judged.text[readable])
    fitted = replace(
        base,
        text=text,
        levels=levels,
        text_std=root_mean_square(by_text - judged.human),
        levels_std=root_mean_square(by_grade - judged.human),
    )
    return fitted, by_text, by_grade


def fitted_memory(
    judged: Judged, base: Calibration, opinions: Floats
) -> tuple[Calibration, Floats]:
    """How far opinions (N,) and the memory's regression err alike, and both of them joined."""
    if np.isnan(judged.memory).any():
        return base, opinions
    own, recalled = opinions - judged.human, judged.memory - judged.human
    correlation = float(np.clip(np.corrcoef(own, recalled)[0, 1], 0.0, 1.0))
    own_std = weighted(base.text_std, base.levels_std, base.grade_share)
    recalled_std = root_mean_square(recalled)
    pairs = (
        (Observation(float(score), own_std), Observation(float(memory), recalled_std))
        for score, memory in zip(opinions, np.clip(judged.memory, 1.0, 5.0), strict=True)
    )
    prior = np.array([joined(*pair, correlation).score for pair in pairs])
    return replace(base, memory_correlation=correlation), prior


def fitted_calibration(
    judged: Judged, base: Calibration
) -> tuple[Calibration, dict[str, dict[str, float]]]:
    """The whole calibration, and what each score reaches on the anchors it was fitted on."""
    base, by_text, by_grade = fitted_heads(judged, base)

    def prior_with(share: float) -> Floats:
        return (1.0 - share) * by_text + share * by_grade

    share = min(SHARES, key=lambda s: root_mean_square(prior_with(s) - judged.human))
    base = replace(base, grade_share=share)
    base, prior = fitted_memory(judged, base, prior_with(share))
    temperature, sigma, lam = fitted_fusion(judged, prior)
    scores, stds = fused_scores(judged, prior, temperature, sigma, lam)
    scale, floor = fitted_deviation(scores - judged.human, stds)
    moved = float(np.quantile(np.abs(scores - by_text), 1.0 - REFLECTED_SHARE))
    calibration = replace(
        base,
        temperature=temperature,
        sigma=sigma,
        lam=lam,
        std_scale=scale,
        std_floor=floor,
        reflect_above=min(LARGEST_GATE, moved),
    )
    named = {"text": by_text, "levels": by_grade, "prior": prior, "fused": scores}
    if not np.isnan(judged.memory).any():
        named["memory"] = judged.memory
    return calibration, {name: agreement(s, judged.human) for name, s in named.items()}


def agreement(scores: Floats, human: Floats) -> dict[str, float]:
    """Rank correlation and error."""
    return {
        "srcc": float(spearmanr(scores, human).statistic),
        "rmse": root_mean_square(scores - human),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.training.calibrate")
    parser.add_argument("--package", type=Path, required=True, help="its manifest is rewritten")
    parser.add_argument("--memory", type=Path, required=True, help="anchors made by this package")
    parser.add_argument("labels", type=Path, help="the label table that the memory was built from")
    parser.add_argument("--images", type=Path, required=True, help="where its images are")
    parser.add_argument("--limit", type=int, default=500, help="anchors to judge")
    arguments = parser.parse_args()
    package = EnginePackage.open(arguments.package)
    base = package.manifest.calibration
    with MemoryBank.open(arguments.memory, "r", package_digest=package.digest) as bank:
        labels = LabelTable.read(arguments.labels)
        judged = judge_anchors(package, bank, labels, arguments.images, arguments.limit)
    if len(judged.human) < FEWEST_ANCHORS:
        raise UsageError(
            "too few anchors to fit a calibration on",
            seen=len(judged.human),
            allowed=f"{FEWEST_ANCHORS} or more",
        )
    calibration, reached = fitted_calibration(judged, base)
    package.with_calibration(calibration)
    print(json.dumps({"reached": reached, "calibration": asdict(calibration)}, indent=2))


if __name__ == "__main__":
    run_command(main)
