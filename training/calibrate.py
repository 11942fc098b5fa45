"""Fit the calibration of a package on its anchors, each judged against the others.

    python -m meiqa.training.calibrate LABELS.csv --images DIR --package PACKAGE --memory MEMORY

The anchors were kept out of the model's training, and an anchor never meets itself, so they stand
in for photographs that users bring. Fitted are the logistics of both score heads, the temperature
of the comparisons (by the likelihood of people's order), sigma and lambda (by the error of the
score), and how the posterior's deviation relates to the error seen.
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
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from meiqa.engine.caches import ByteLru
from meiqa.engine.comparing import Comparer, all_in_order, preferences_of
from meiqa.engine.fusing import Observation, joined
from meiqa.engine.grading import expected_grade, graded_response
from meiqa.engine.images import load_pixels
from meiqa.engine.judging import ANCHOR_CACHE_BYTES, fitted_to
from meiqa.engine.local import LocalVlm
from meiqa.engine.manifest import Calibration, ScoreHead
from meiqa.engine.package import EnginePackage
from meiqa.engine.remote import RemoteSettings, connected
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.scoring import weighted
from meiqa.engine.vlm import Prefix, Vlm
from meiqa.errors import PackageCorrupted, UsageError
from meiqa.export.commands import run_command
from meiqa.kernels.thurstone import thurstone_map
from meiqa.labels import LabelTable
from meiqa.memory import MemoryBank, RetrievalPolicy, layout, retrieval_key
from meiqa.training.data import name_hash
from meiqa.training.graded import fitted_head
from meiqa.training.mapping import fitted_deviation, matched_logistic, root_mean_square

Floats = NDArray[np.float64]
Observations = tuple[Floats, Floats]
"""Scores (N,) and their deviations from people's (N,)."""

TEMPERATURES = (0.01, 100.0)
"""Between these a temperature is sought."""
SIGMAS = (0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.5)
LAMBDAS = (0.01, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 30.0, 60.0, 100.0, 300.0)
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
        words: (N, 5) probabilities of the grade words; no graded response is fitted without them.
    """

    human: Floats
    text: Floats
    levels: Floats
    memory: Floats
    logits: Floats
    scores: Floats
    stds: Floats
    words: Floats | None = None


def judge_anchors(
    package: EnginePackage,
    bank: MemoryBank,
    labels: LabelTable,
    images: Path,
    limit: int,
    vlm: Vlm | None = None,
) -> Judged:
    """Score, retrieve for and compare some anchors, chosen by name, each without itself.

    The model is the package's on the CPU, unless another `vlm` is given.
    """
    calibration = package.manifest.calibration
    if vlm is None:
        vlm = LocalVlm(package, *open_sessions(package, "cpu", None))
    comparer = Comparer(vlm, package.digest, ByteLru[Prefix](ANCHOR_CACHE_BYTES))
    snapshot = bank.snapshot()
    recalled = snapshot.scores_left_out()
    rows = sorted(zip(labels.files, labels.scores_1_to_5(), strict=True), key=by_hash)[:limit]
    columns: dict[str, list[Any]] = {name: [] for name in Judged.__dataclass_fields__}
    for index, (file, score) in enumerate(rows, 1):
        pixels = load_pixels(images / file)
        prefix = vlm.read([vlm.encode(fitted_to(pixels, vlm.image))])[0]
        description = vlm.describe(prefix, package.manifest.prompt.summary_tokens)
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
        columns["words"].append(vlm.grade(prefix))
        columns["levels"].append(expected_grade(columns["words"][-1]))
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


def fitted_temperature(judged: Judged) -> float:
    """The temperature under which people's order of photo and neighbour is the likeliest.

    The fused score would be a poor judge of it: where comparisons weigh little it hardly depends on
    them, and they would be told to users as surer than they are.
    """
    differs = judged.human[:, None] != judged.scores
    logits = judged.logits[differs]
    better = (judged.human[:, None] > judged.scores)[differs]
    towards_people = np.where(better[:, None], logits, -logits)

    def surprise(log_temperature: float) -> float:
        chances = preferences_of(towards_people, float(np.exp(log_temperature)))
        return -float(np.log(np.maximum(chances, np.finfo(float).tiny)).mean())

    bounds = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(surprise, bounds=bounds, method="bounded").x))


def fitted_fusion(judged: Judged, prior: Floats, temperature: float) -> tuple[float, float]:
    """Sigma and lambda with the smallest squared error.

    Errors are those of scores spread as wide as people's: otherwise comparisons would be credited
    with pulling scores to the middle.
    """

    def squared_error(parameters: tuple[float, float]) -> float:
        scores = fused_scores(judged, prior, temperature, *parameters)[0]
        wide = (scores - scores.mean()) * (judged.human.std() / max(float(scores.std()), 1e-9))
        return root_mean_square(wide + judged.human.mean() - judged.human)

    return min(itertools.product(SIGMAS, LAMBDAS), key=squared_error)


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
        graded=base.graded if judged.words is None else fitted_head(judged.words, judged.human),
    )
    return fitted, by_text, by_grade


def by_graded_response(judged: Judged, base: Calibration) -> Observations:
    """What the graded response says of the anchors."""
    if base.graded is None or judged.words is None:
        raise UsageError("the score head is the graded response, and there is none")
    gradings = [graded_response(words, base.graded) for words in judged.words]
    return np.array([g.score for g in gradings]), np.array([g.std for g in gradings])


def fitted_memory(
    judged: Judged, base: Calibration, observed: Observations
) -> tuple[Calibration, Floats]:
    """How far observations and the memory's regression err alike, and both of them joined."""
    opinions, own_stds = observed
    if np.isnan(judged.memory).any():
        return base, opinions
    own, recalled = opinions - judged.human, judged.memory - judged.human
    correlation = float(np.clip(np.corrcoef(own, recalled)[0, 1], 0.0, 1.0))
    recalled_std = root_mean_square(recalled)
    pairs = (
        (Observation(float(score), float(std)), Observation(float(memory), recalled_std))
        for score, std, memory in zip(
            opinions, own_stds, np.clip(judged.memory, 1.0, 5.0), strict=True
        )
    )
    prior = np.array([joined(*pair, correlation).score for pair in pairs])
    return replace(base, memory_correlation=correlation), prior


def fitted_calibration(
    judged: Judged, base: Calibration, head: ScoreHead = "text"
) -> tuple[Calibration, dict[str, dict[str, float]]]:
    """The whole calibration, and what each score reaches on the anchors it was fitted on."""
    base, by_text, by_grade = fitted_heads(judged, base)

    def prior_with(share: float) -> Floats:
        return (1.0 - share) * by_text + share * by_grade

    share = min(SHARES, key=lambda s: root_mean_square(prior_with(s) - judged.human))
    base = replace(base, grade_share=share)
    if head == "grm":
        observed = by_graded_response(judged, base)
    else:
        of_words = share if head == "text" else 1.0
        std = weighted(base.text_std, base.levels_std, of_words)
        observed = prior_with(of_words), np.full(len(judged.human), std)
    base, prior = fitted_memory(judged, base, observed)
    temperature = fitted_temperature(judged)
    sigma, lam = fitted_fusion(judged, prior, temperature)
    scores, stds = fused_scores(judged, prior, temperature, sigma, lam)
    scale, floor = fitted_deviation(scores - judged.human, stds)
    initial = by_text if head == "text" else observed[0]
    moved = float(np.quantile(np.abs(scores - initial), 1.0 - REFLECTED_SHARE))
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
    if base.graded is not None:
        named["graded"] = by_graded_response(judged, base)[0]
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
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--package", type=Path, help="its manifest is rewritten")
    model.add_argument("--remote", metavar="URL", help="or a remote model: its memory's settings")
    parser.add_argument("--memory", type=Path, required=True, help="anchors made by this package")
    parser.add_argument("labels", type=Path, help="the label table that the memory was built from")
    parser.add_argument("--images", type=Path, required=True, help="where its images are")
    parser.add_argument("--limit", type=int, default=500, help="anchors to judge")
    arguments = parser.parse_args()
    vlm = None
    if arguments.remote is None:
        package = EnginePackage.open(arguments.package)
    else:
        vlm = connected(
            arguments.remote, RemoteSettings.of_memory(arguments.memory), arguments.memory
        )
        package = vlm.package
    base = package.manifest.calibration
    with MemoryBank.open(arguments.memory, "r", package_digest=package.digest) as bank:
        labels = LabelTable.read(arguments.labels)
        judged = judge_anchors(package, bank, labels, arguments.images, arguments.limit, vlm)
    if len(judged.human) < FEWEST_ANCHORS:
        raise UsageError(
            "too few anchors to fit a calibration on",
            seen=len(judged.human),
            allowed=f"{FEWEST_ANCHORS} or more",
        )
    calibration, reached = fitted_calibration(judged, base, package.manifest.score_head)
    package.with_calibration(calibration)
    print(json.dumps({"reached": reached, "calibration": asdict(calibration)}, indent=2))


if __name__ == "__main__":
    run_command(main)
