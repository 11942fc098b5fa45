"""Fit the calibration of a model on its anchors, each judged against the others.

The anchors were kept out of the model's training, and an anchor never meets itself, so they stand
in for photographs that users bring. Fitted are the logistics of all score heads, the temperature
of the comparisons (by the likelihood of people's order), sigma and lambda (by the error of the
score), and how the posterior's deviation relates to the error seen. Measured are the number of
neighbours that pays, and what a tight budget gives up first.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from meiqa.engine.calibration import Calibration, ScoreHead
from meiqa.engine.estimates import (
    HIGHEST,
    LOWEST,
    expected_grade,
    graded_response,
    preferences_of,
)
from meiqa.engine.images import load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Model
from meiqa.engine.package import EnginePackage
from meiqa.engine.remote import RemoteModel
from meiqa.engine.scoring import Scored
from meiqa.errors import PackageCorrupted, UsageError
from meiqa.evaluation.fitting import (
    fitted_deviation,
    fitted_head,
    matched_logistic,
    root_mean_square,
)
from meiqa.evaluation.metrics import srcc
from meiqa.evaluation.recording import AskedOnce, Recorder
from meiqa.evaluation.scenes import fitted_scene
from meiqa.kernels.thurstone import thurstone_map
from meiqa.labels import LabelTable
from meiqa.memory import MemoryBank, RetrievalPolicy

Floats = NDArray[np.float64]
Observations = tuple[Floats, Floats]
"""Scores (N,) and their deviations from people's (N,)."""

NEIGHBOURS = (4, 8, 16, 32)
"""Numbers of neighbours that are tried, beside none."""
STRATA = (1, 5)
"""Bins over the anchors' scores that are tried: neighbours that are most alike, and such that span
the scale."""
TEMPERATURES = (0.01, 100.0)
"""Between these a temperature is sought."""
SIGMAS = (0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.5)
LAMBDAS = (0.01, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 30.0, 60.0, 100.0, 300.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
MEMORY_SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(11))
HARDLY_MORE = 1.005
"""Times the least error that is given for a smaller share of the memory's regression, or for a
greater one of the grade."""
FEWEST_ANCHORS = 100
REFLECTED_SHARE = 0.05
"""Share of photos whose score moves enough to be reflected on."""
LARGEST_GATE = 0.75
"""The gate of ME-IQA, for models whose scores move that much."""
FOLDS, DRAWS = 5, 500
"""Of the cross-validation, and of the bootstrap, that the number of neighbours is chosen by."""


@dataclass(frozen=True, eq=False)
class Compared:
    """Comparisons of N photos with K neighbours each.

    Attributes:
        logits: (N, K, 2); scores, stds: (N, K) of the neighbours. Where a photo has fewer, the
            logits are NaN.
    """

    logits: Floats
    scores: Floats
    stds: Floats

    @classmethod
    def empty(cls, photos: int, k: int) -> Compared:
        """Make room for comparisons of so many photos."""
        return cls(np.full((photos, k, 2), np.nan), *np.zeros((2, photos, k)))

    def note(self, photo: int, scored: Scored) -> None:
        """Fill in what a photo's comparisons said."""
        found = len(scored.neighbours)
        self.logits[photo, :found] = scored.logits
        self.scores[photo, :found] = [case.score for case in scored.neighbours]
        self.stds[photo, :found] = [case.std for case in scored.neighbours]

    def of(self, chosen: NDArray[np.bool_]) -> Compared:
        """Give those of some photos."""
        return Compared(self.logits[chosen], self.scores[chosen], self.stds[chosen])

    def one_order(self) -> Compared:
        """Give the same with the photo shown first alone."""
        return replace(self, logits=self.logits * [1.0, np.nan])


@dataclass(frozen=True, eq=False)
class Judged:
    """What the model says of N anchors and of their neighbours.

    Attributes:
        human: (N,) human scores.
        text: (N,) ratings as they were printed; NaN where none could be read.
        words: (N, 5) probabilities of the grade words.
        memory: (N,) what the memory's regression says without having seen the photo; NaN where it
            has none. doubts: (N,) factor of the deviation.
        compared: comparisons by the bins that neighbours were retrieved from, and by their number.
    """

    human: Floats
    text: Floats
    words: Floats
    memory: Floats
    doubts: Floats
    compared: dict[int, dict[int, Compared]]


def calibrate_package(
    model: str | Path,
    memory: Path,
    labels: LabelTable,
    images: Path,
    limit: int = 500,
    memory_share: float | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fit a model's calibration on its anchors, and write it where the model has its own.

    Args:
        model: directory of the package, whose manifest is rewritten, or the URL of a remote
            model, whose settings beside the memory are.
        memory: anchors made by this model.
        labels: the table that the memory was built from; images: where its images are.
        limit: anchors to judge, chosen by name; on_progress: called after each, and after each of
            the `SCENES` that are shot twice.
        memory_share: the share (0-1) of the memory's regression; None fits it.

    Returns:
        JSON-ready: reached (SRCC and RMSE of each score on the anchors), neighbours (the held-out
        error by bins and number), costs (how much greater it is without each part), scenes (how
        often the sound one of two shots is found) and calibration.

    Raises:
        UsageError: there are too few anchors to fit a calibration on.
        PackageError, StoreError, ImageError.
    """
    opened: LocalModel | RemoteModel
    if isinstance(model, str):
        opened = RemoteModel.connect(model, memory)
    else:
        opened = LocalModel.open(EnginePackage.open(model))
    rows = sorted(zip(labels.files, labels.scores_1_to_5(), strict=True), key=by_hash)[:limit]
    with (
        closing(opened),
        MemoryBank.open(memory, "r", package_digest=opened.digest) as bank,
    ):
        anchors = min(len(rows), bank.snapshot().count_anchors)
        if anchors < FEWEST_ANCHORS:
            raise UsageError(
                "too few anchors to fit a calibration on",
                seen=anchors,
                allowed=f"{FEWEST_ANCHORS} or more",
            )
        judged = judge_anchors(opened, bank, rows, images, on_progress)
        base = opened.calibration
        fitted, report = fitted_calibration(judged, base, opened.head, memory_share)
        # What two shots score alone is said by what was just fitted.
        opened.calibration = fitted
        files = [file for file, _ in rows]
        scene, report["scenes"] = fitted_scene(opened, bank, files, images, on_progress)
        fitted = replace(fitted, scene=scene)
    if isinstance(opened, RemoteModel):
        opened.calibrate(fitted)
    else:
        opened.package.rewritten(calibration=fitted)
    return {**report, "calibration": asdict(fitted)}


def by_hash(row: tuple[str, float]) -> str:
    """Give a place in an order that has nothing to do with scores."""
    return hashlib.sha256(row[0].encode()).hexdigest()


def judge_anchors(
    model: Model,
    bank: MemoryBank,
    rows: Sequence[tuple[str, float]],
    images: Path,
    on_progress: Callable[[], None],
) -> Judged:
    """Score some anchors, files and human scores, each beside all choices of neighbours."""
    recorder = Recorder(AskedOnce(model), bank)
    recalled = bank.snapshot().scores_left_out()
    text, words, memory, doubts = [], [], [], []
    tables = {bins: {k: Compared.empty(len(rows), k) for k in NEIGHBOURS} for bins in STRATA}
    for at, (file, _) in enumerate(rows):
        pixels = load_pixels(images / file)
        for bins, k in itertools.product(STRATA, NEIGHBOURS):
            scored = recorder.recorded(pixels, RetrievalPolicy(k=k, bins=bins))
            tables[bins][k].note(at, scored)
        description = scored.prediction.description
        if description is None or description.key is None:
            raise PackageCorrupted("the model writes nothing about an anchor", seen=file)
        text.append(np.nan if description.rating is None else description.rating)
        words.append(scored.prediction.words)
        memory.append(recalled.get(pixels.digest, np.nan))
        doubts.append(scored.doubt.factor)
        on_progress()
    return Judged(
        human=np.array([score for _, score in rows]),
        text=np.array(text),
        words=np.array(words),
        memory=np.array(memory),
        doubts=np.array(doubts),
        compared=tables,
    )


def fused_scores(
    compared: Compared, prior: Floats, temperature: float, sigma: float, lam: float
) -> Observations:
    """Give posterior scores, kept on the scale, and deviations under given parameters."""
    n, k, _ = compared.logits.shape
    preferences = preferences_of(compared.logits.reshape(n * k, 2), temperature).reshape(n, k)
    scores, stds = thurstone_map(prior, compared.scores, compared.stds, preferences, sigma, lam)
    return np.clip(scores, LOWEST, HIGHEST), stds


def fitted_temperature(human: Floats, compared: Compared) -> float:
    """Fit the temperature under which people's order of photo and neighbour is the likeliest.

    The fused score would be a poor judge of it: where comparisons weigh little it hardly depends on
    them, and they would be told to users as surer than they are.
    """
    counts = (human[:, None] != compared.scores) & ~np.isnan(compared.logits).all(axis=2)
    logits = compared.logits[counts]
    better = (human[:, None] > compared.scores)[counts]
    towards_people = np.where(better[:, None], logits, -logits)

    def surprise(log_temperature: float) -> float:
        chances = preferences_of(towards_people, float(np.exp(log_temperature)))
        return -float(np.log(np.maximum(chances, np.finfo(float).tiny)).mean())

    bounds = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(surprise, bounds=bounds, method="bounded").x))


def fitted_fusion(
    human: Floats, compared: Compared, prior: Floats, temperature: float
) -> tuple[float, float]:
    """Fit sigma and lambda: those with the smallest squared error of widened scores."""

    def error(parameters: tuple[float, float]) -> float:
        scores = fused_scores(compared, prior, temperature, *parameters)[0]
        return root_mean_square(widened(scores, human) - human)

    return min(itertools.product(SIGMAS, LAMBDAS), key=error)


def widened(scores: Floats, human: Floats) -> Floats:
    """Spread scores as wide as people's.

    Otherwise comparisons would be credited with pulling scores to the middle.
    """
    factor = human.std() / max(float(scores.std()), 1e-9)
    wide: Floats = (scores - scores.mean()) * factor + human.mean()
    return wide


def held_out_scores(human: Floats, compared: Compared, prior: Floats) -> Floats:
    """Fuse each fold of N photos with temperature, sigma and lambda fitted on the others."""
    scores = np.empty_like(prior)
    for fold in range(FOLDS):
        held = np.arange(len(human)) % FOLDS == fold
        known = human[~held], compared.of(~held)
        temperature = fitted_temperature(*known)
        fusion = fitted_fusion(*known, prior[~held], temperature)
        scores[held] = fused_scores(compared.of(held), prior[held], temperature, *fusion)[0]
    return scores


@dataclass(frozen=True)
class Error:
    """Root mean square error of scores spread as wide as people's, and the bootstrap's error."""

    rmse: float
    standard_error: float

    @classmethod
    def of(cls, scores: Floats, human: Floats) -> Error:
        """Compare scores (N,) with human ones."""
        squares = (widened(scores, human) - human) ** 2
        drawn = np.random.default_rng(0).integers(len(human), size=(DRAWS, len(human)))
        spread = np.sqrt(squares[drawn].mean(axis=1)).std()
        return cls(float(np.sqrt(squares.mean())), float(spread))


def held_out_errors(human: Floats, tables: dict[int, Compared], prior: Floats) -> dict[int, Error]:
    """Give the error by the number of neighbours, 0 for the score before comparisons."""
    errors = {0: Error.of(np.clip(prior, LOWEST, HIGHEST), human)}
    for k, compared in tables.items():
        errors[k] = Error.of(held_out_scores(human, compared, prior), human)
    return errors


def fitted_bins(tried: dict[int, dict[int, Error]]) -> int:
    """Choose the bins with the least error of any number of neighbours; of equal ones the most."""

    def least(bins: int) -> float:
        return min(error.rmse for k, error in tried[bins].items() if k)

    return min(sorted(tried, reverse=True), key=least)


def fitted_neighbours(errors: dict[int, Error]) -> int:
    """Choose the fewest neighbours whose error is within one standard error of the least."""
    best = min(errors.values(), key=lambda error: error.rmse)
    allowed = best.rmse + best.standard_error
    return min(k for k, error in errors.items() if error.rmse <= allowed)


def fitted_degradation(
    errors: dict[int, Error], one_order: Error, unwritten: Error
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Order what a tight budget gives up: what brings least goes first.

    Half of the neighbours and one of the two orders save the same time, so these are compared.
    A description is worth something to people whatever its rating brings: it goes before the
    comparisons only if they bring more than one standard error, and more than the rating does.

    Args:
        errors: by the number of neighbours, 0 for the score before comparisons.
        one_order: with the most neighbours, the photo shown first alone.
        unwritten: before comparisons where nothing is written.

    Returns:
        The order, and by how much the error is greater without each part.
    """
    most = max(errors)
    costs = {
        "text": unwritten.rmse - errors[0].rmse,
        "neighbours": errors[most // 2].rmse - errors[most].rmse,
        "orders": one_order.rmse - errors[most].rmse,
        "comparisons": errors[0].rmse - errors[most].rmse,
    }
    order = sorted(("neighbours", "orders"), key=costs.__getitem__)
    text_first = costs["comparisons"] > max(errors[most].standard_error, costs["text"])
    order.insert(0 if text_first else len(order), "text")
    return tuple(order), costs


def with_memory(judged: Judged, share: float, own: Floats) -> Floats:
    """Combine the model's own scores with those of the memory's regression, where there is one."""
    if np.isnan(judged.memory).any():
        return own
    return (1.0 - share) * own + share * np.clip(judged.memory, LOWEST, HIGHEST)


def fitted_grade_share(human: Floats, mixed: Callable[[float], Floats]) -> float:
    """Choose the greatest share of the grade, beside the rating, that costs hardly more.

    A grade takes one pass, a rating a whole text: without it a score is the same, written or not.
    """
    errors = {share: root_mean_square(mixed(share) - human) for share in SHARES}
    allowed = HARDLY_MORE * min(errors.values())
    return max(share for share, error in errors.items() if error <= allowed)


def fitted_memory_share(judged: Judged, own: Floats) -> float:
    """Choose the least share of the memory's regression that costs hardly more than the best.

    The regression has seen nothing but photographs that people scored. Damage, and what is no
    picture, is what the model itself was taught.
    """
    human = judged.human
    errors = {
        share: root_mean_square(widened(with_memory(judged, share, own), human) - human)
        for share in MEMORY_SHARES
    }
    allowed = HARDLY_MORE * min(errors.values())
    return min(share for share, error in errors.items() if error <= allowed)


@dataclass(frozen=True, eq=False)
class Priors:
    """Scores (N,) before comparisons.

    Attributes:
        text, levels, graded: of the printed rating, of the grade words and of their graded
            response, mapped.
        initial: what is told as the initial score.
        combined: what comparisons start from; unwritten: the same where nothing is written.
    """

    text: Floats
    levels: Floats
    graded: Floats
    initial: Floats
    combined: Floats
    unwritten: Floats


def fitted_priors(
    judged: Judged, base: Calibration, head: ScoreHead, share: float | None
) -> tuple[Calibration, Priors]:
    """Fit the heads, the grade's share and, where none is given, the memory's regression's."""
    human = judged.human
    raw = np.array([expected_grade(words) for words in judged.words])
    of_levels, of_text = matched_logistic(raw, human), base.text
    levels = np.asarray(of_levels(raw))
    text, readable = levels.copy(), ~np.isnan(judged.text)
    if readable.any():
        of_text = matched_logistic(judged.text[readable], human[readable])
        text[readable] = of_text(judged.text[readable])
    response = fitted_head(judged.words, human)
    graded = np.array([graded_response(words, response).score for words in judged.words])

    def mixed(share: float) -> Floats:
        return (1.0 - share) * text + share * levels

    base = replace(
        base,
        text=of_text,
        levels=of_levels,
        text_std=root_mean_square(text - human),
        levels_std=root_mean_square(levels - human),
        graded=response,
        grade_share=fitted_grade_share(human, mixed),
    )
    alone = graded if head == "grm" else levels
    observed = mixed(base.grade_share) if head == "text" else alone
    unknown = bool(np.isnan(judged.memory).any())
    if share and unknown:
        raise UsageError("the memory has no regression", seen=f"a share of {share:g}", allowed="0")
    if share is None and not unknown:
        share = fitted_memory_share(judged, observed)
    if share is not None:
        base = replace(base, memory_share=share)
    combined, unwritten = (with_memory(judged, share or 0.0, each) for each in (observed, alone))
    initial = text if head == "text" else observed
    return base, Priors(text, levels, graded, initial, combined, unwritten)


def fitted_calibration(
    judged: Judged,
    base: Calibration,
    head: ScoreHead = "text",
    memory_share: float | None = None,
) -> tuple[Calibration, dict[str, Any]]:
    """Fit the whole calibration; the report is that of `calibrate_package`."""
    human = judged.human
    base, priors = fitted_priors(judged, base, head, memory_share)
    prior = priors.combined
    tried = {
        bins: held_out_errors(human, tables, prior) for bins, tables in judged.compared.items()
    }
    bins = fitted_bins(tried)
    errors, tables = tried[bins], judged.compared[bins]
    most = tables[max(tables)]
    one_order = Error.of(held_out_scores(human, most.one_order(), prior), human)
    order, costs = fitted_degradation(errors, one_order, Error.of(priors.unwritten, human))
    neighbours = fitted_neighbours(errors)
    # Who asks for comparisons where none pay gets them as well as they can be.
    compared = tables[neighbours] if neighbours else most
    temperature = fitted_temperature(human, compared)
    sigma, lam = fitted_fusion(human, compared, prior, temperature)
    scores, stds = fused_scores(compared, prior, temperature, sigma, lam)
    scale, floor = fitted_deviation((scores - human) / judged.doubts, stds)
    moved = float(np.quantile(np.abs(scores - priors.initial), 1.0 - REFLECTED_SHARE))
    calibration = replace(
        base,
        temperature=temperature,
        sigma=sigma,
        lam=lam,
        std_scale=scale,
        std_floor=floor,
        reflect_above=min(LARGEST_GATE, moved),
        neighbours=neighbours,
        bins=bins,
        degradation=order,
    )
    named = {"text": priors.text, "levels": priors.levels, "graded": priors.graded}
    named |= {"prior": prior, "fused": scores}
    if not np.isnan(judged.memory).any():
        named["memory"] = judged.memory
    reached = {
        name: {"srcc": srcc(each, human), "rmse": root_mean_square(each - human)}
        for name, each in named.items()
    }
    by_number = {
        str(bins): {str(k): asdict(error) for k, error in found.items()}
        for bins, found in tried.items()
    }
    return calibration, {"reached": reached, "neighbours": by_number, "costs": costs}
