"""What is fitted on values whose distribution is known, and chosen where it is known what pays."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.calibration import DEGRADATION, UNCALIBRATED
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError
from meiqa.evaluation import calibration
from meiqa.evaluation.calibration import (
    Compared,
    Judged,
    calibrate_package,
    fitted_calibration,
    fitted_grade_share,
    fitted_memory_share,
    fitted_temperature,
)
from meiqa.evaluation.fitting import matched_logistic
from meiqa.evaluation.metrics import js_divergence
from meiqa.kernels.graded import soft_grades
from meiqa.labels import LabelTable
from tests.engine.samples import picture

Floats = NDArray[np.float64]


@pytest.mark.parametrize("shrunk", [0.3, 0.6, 1.0])
def test_mapped_scores_are_distributed_like_peoples(shrunk: float) -> None:
    random = np.random.default_rng(7)
    human = np.clip(random.normal(2.9, 0.8, 2000), 1, 5)
    noisy = 0.7 * (human - 2.9) + random.normal(0, 0.5, len(human))
    raw = 3.2 + shrunk * noisy
    mapped = matched_logistic(raw, human)(raw)
    assert mapped.std() == pytest.approx(human.std(), rel=0.05)
    assert mapped.mean() == pytest.approx(human.mean(), abs=0.05)
    assert js_divergence(mapped, human) < 0.05


def test_the_order_of_scores_stays() -> None:
    random = np.random.default_rng(8)
    raw, human = random.uniform(1, 5, 300), random.uniform(1, 5, 300)
    mapped = matched_logistic(raw, human)(np.sort(raw))
    assert (np.diff(mapped) >= 0).all()
    assert len(np.unique(mapped)) > 290


def test_few_distinct_scores_stay_few() -> None:
    raw = np.repeat([2.0, 3.0, 4.0], 50)
    human = np.linspace(1.2, 4.8, 150)
    mapped = np.unique(matched_logistic(raw, human)(raw))
    assert mapped == pytest.approx([1.8, 3.0, 4.2], abs=0.02)


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_preferences_are_as_sure_as_people_are_agreed(scale: float) -> None:
    """Logits are `scale` times the true log-odds of people's order, in both orders of asking."""
    random = np.random.default_rng(9)
    odds = random.normal(0, 2, (400, 8))
    better = random.uniform(size=odds.shape) < 1.0 / (1.0 + np.exp(-odds))
    compared = Compared(
        logits=scale * np.stack([odds, odds], axis=2),
        scores=np.where(better, 2.0, 4.0),
        stds=np.full(odds.shape, 0.2),
    )
    assert fitted_temperature(np.full(400, 3.0), compared) == pytest.approx(scale, rel=0.1)


def test_equal_scores_say_nothing_of_the_temperature() -> None:
    random = np.random.default_rng(10)
    odds = random.normal(0, 2, (300, 4))
    scores = np.where(random.uniform(size=odds.shape) < 1.0 / (1.0 + np.exp(-odds)), 2.0, 4.0)
    people = np.full(300, 3.0)

    def compared(logits: Floats, neighbours: Floats) -> Compared:
        stds = np.full(neighbours.shape, 0.2)
        return Compared(np.stack([logits, logits], axis=2), neighbours, stds)

    sure = np.concatenate([odds, np.full((300, 4), 50.0)], axis=1)
    tied = np.concatenate([scores, np.full((300, 4), 3.0)], axis=1)
    absent = np.concatenate([odds, np.full((300, 4), np.nan)], axis=1)
    expected = fitted_temperature(people, compared(odds, scores))
    assert fitted_temperature(people, compared(sure, tied)) == expected
    absentees = np.concatenate([scores, np.full((300, 4), 2.0)], axis=1)
    assert fitted_temperature(people, compared(absent, absentees)) == expected


def judged(*, rating: float, comparisons: float, biased: bool = False) -> Judged:
    """Make 400 photos, of which a rating, a grade and comparisons tell as much as is said.

    Args:
        rating: deviation of the printed rating's error; the grade's is 0.6.
        comparisons: how much the logits follow the difference of quality.
        biased: whether whoever is shown first is preferred, so that one order misleads.
    """
    random = np.random.default_rng(11)
    human = random.uniform(1.2, 4.8, 400)
    compared = {}
    for k in (4, 8, 16, 32):
        neighbours = random.uniform(1, 5, (400, k))
        noise = random.normal(0, 1, (400, k))
        ahead = comparisons * (human[:, None] - neighbours) + noise
        bias = random.normal(0, 3, (400, 1)) if biased else 0.0
        logits = np.stack([ahead + bias, ahead - bias], axis=2)
        compared[k] = Compared(logits, neighbours, np.full((400, k), 0.1))
    return Judged(
        human=human,
        text=human + random.normal(0, rating, 400),
        words=soft_grades(human + random.normal(0, 0.6, 400)),
        memory=np.full(400, np.nan),
        doubts=np.ones(400),
        compared={5: compared},
    )


def test_comparisons_that_say_nothing_are_not_asked() -> None:
    calibration, report = fitted_calibration(judged(rating=0.3, comparisons=0.0), UNCALIBRATED)
    assert calibration.neighbours == 0
    assert calibration.degradation[-1] == "text"
    assert report["neighbours"]["5"].keys() == {"0", "4", "8", "16", "32"}
    assert abs(report["costs"]["comparisons"]) < 0.02
    assert report["costs"]["text"] > 0.1


def test_comparisons_that_tell_much_are_asked_and_outlast_the_text() -> None:
    calibration, report = fitted_calibration(judged(rating=0.5, comparisons=3.0), UNCALIBRATED)
    assert calibration.neighbours > 0
    assert calibration.degradation[0] == "text"
    assert report["costs"]["comparisons"] > report["costs"]["text"]
    assert report["reached"]["fused"]["rmse"] < report["reached"]["prior"]["rmse"] - 0.05


@pytest.mark.parametrize("telling", [1, 5])
def test_neighbours_come_from_where_comparing_tells_more(telling: int) -> None:
    silent, much = (judged(rating=0.5, comparisons=each) for each in (0.0, 3.0))
    tables = {bins: (much if bins == telling else silent).compared[5] for bins in (1, 5)}
    calibration, report = fitted_calibration(replace(much, compared=tables), UNCALIBRATED)
    assert calibration.bins == telling
    assert report["neighbours"].keys() == {"1", "5"}


def test_the_memory_gets_the_share_that_is_asked_for() -> None:
    known = replace(
        judged(rating=0.5, comparisons=0.5), memory=judged(rating=0.1, comparisons=0).text
    )
    for share in (0.0, 0.3):
        assert fitted_calibration(known, UNCALIBRATED, memory_share=share)[0].memory_share == share


def test_a_memory_without_a_regression_gets_no_share() -> None:
    unknown = judged(rating=0.5, comparisons=0.5)
    with pytest.raises(UsageError, match="no regression"):
        fitted_calibration(unknown, UNCALIBRATED, memory_share=0.3)
    assert fitted_calibration(unknown, UNCALIBRATED, memory_share=0.0)[0].memory_share == 0.0


def test_a_rating_that_brings_more_than_comparisons_outlasts_them() -> None:
    calibration, _ = fitted_calibration(judged(rating=0.15, comparisons=1.0), UNCALIBRATED)
    assert calibration.degradation[-1] == "text"


def test_an_order_that_corrects_the_other_outlasts_half_of_the_neighbours() -> None:
    found = judged(rating=1.0, comparisons=3.0, biased=True)
    calibration, report = fitted_calibration(found, UNCALIBRATED)
    assert report["costs"]["orders"] > report["costs"]["neighbours"]
    assert calibration.degradation == DEGRADATION


@pytest.mark.parametrize(
    ("own", "recalled", "allowed"),
    [(0.2, 1.0, (0.0, 0.1)), (1.0, 0.1, (0.9, 1.0)), (0.4, 0.38, (0.2, 0.6))],
)
def test_the_memory_gets_no_more_than_it_surely_earns(
    own: float, recalled: float, allowed: tuple[float, float]
) -> None:
    """Errors of the model and of the memory's regression have these deviations."""
    random = np.random.default_rng(3)
    human = random.uniform(1.5, 4.5, 400)
    own_scores, memory = (human + random.normal(0, std, 400) for std in (own, recalled))
    known = replace(judged(rating=0.5, comparisons=0.5), human=human, memory=memory)
    assert allowed[0] <= fitted_memory_share(known, own_scores) <= allowed[1]


@pytest.mark.parametrize(("rating", "allowed"), [(0.599, {1.0}), (0.1, {0.0, 0.25})])
def test_the_grade_does_without_the_rating_where_it_can(rating: float, allowed: set[float]) -> None:
    """The grade's error is that of the least: a rating that knows no more gets nothing."""
    human = judged(rating=0.5, comparisons=0.5).human
    random = np.random.default_rng(5)
    grade, noise = (random.normal(0, 0.6, 400) for _ in range(2))
    said = grade if rating > 0.5 else noise * rating
    shares = fitted_grade_share(human, lambda share: human + share * grade + (1 - share) * said)
    assert shares in allowed


def test_fitting_can_be_repeated() -> None:
    found = judged(rating=0.4, comparisons=1.0)
    assert fitted_calibration(found, UNCALIBRATED) == fitted_calibration(found, UNCALIBRATED)


@pytest.mark.parametrize(("rows", "limit"), [(24, 500), (300, 50), (300, 500)])
def test_too_few_anchors_are_refused_before_any_is_judged(
    package: EnginePackage, anchors: Path, tmp_path: Path, rows: int, limit: int
) -> None:
    """There are 24 anchors, whatever the table says; no photograph is looked for."""
    files, scores = zip(*((f"{row}.png", row / 400) for row in range(rows)), strict=True)
    labels = LabelTable(files, scores, (0.0, 1.0))
    with pytest.raises(UsageError, match="too few anchors") as caught:
        calibrate_package(package.path, anchors, labels, tmp_path / "none", limit)
    assert caught.value.seen == 24


def test_a_package_is_calibrated_where_it_lies(
    package: EnginePackage, anchors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "FEWEST_ANCHORS", 12)
    copy = Path(shutil.copytree(package.path, tmp_path / "package"))
    files = tuple(f"{at}.png" for at in range(12))
    for at, file in enumerate(files):
        Image.fromarray(picture(at, (64, 96))).save(tmp_path / file)
    labels = LabelTable(files, tuple(np.linspace(1.2, 4.8, 12)), (1.0, 5.0))
    seen: list[None] = []
    report = calibrate_package(
        copy, anchors, labels, tmp_path, on_progress=lambda: seen.append(None)
    )
    assert len(seen) == 12 + 12  # each is judged, and then shot twice
    assert report["scenes"]["pairs"] == 12
    assert {"levels", "graded", "prior", "fused"} <= report["reached"].keys()
    written = EnginePackage.open(copy)
    assert written.digest == package.digest
    assert asdict(written.manifest.calibration) == report["calibration"]
    assert written.manifest.calibration.scene is not None
    assert written.manifest.calibration != package.manifest.calibration
