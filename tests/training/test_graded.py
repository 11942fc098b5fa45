"""The fit of the graded response, on photographs whose response is known."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.estimates import graded_response
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError
from meiqa.evaluation.fitting import Response, fitted_head, fitted_response, surprise
from meiqa.kernels.graded import LEAST_STEP, grade_moments, multimodal, soft_grades
from training import graded
from training.graded import cross_validated, votes_of

Floats = NDArray[np.float64]
TRUE = Response(
    weights=(-0.4, -0.25, 0.05, 0.15, 0.45), offset=0.2, discrimination=1.8, first=-1.6, step=1.1
)


def levels_of(photographs: int) -> Floats:
    levels = np.random.default_rng(1).normal(size=(photographs, 5)) * [2, 1, 1, 1.5, 2]
    return levels - levels.mean(axis=1, keepdims=True)


def voted(probabilities: Floats, observers: int) -> Floats:
    random = np.random.default_rng(2)
    return np.array([random.multinomial(observers, row) for row in probabilities], np.float64)


def test_known_parameters_are_found_from_votes() -> None:
    levels = levels_of(2000)
    found = fitted_response(levels, voted(TRUE.probabilities(levels), 30))
    # Abilities are known up to their unit; these are not.
    unit = found.discrimination / TRUE.discrimination
    assert found.discrimination * found.step == pytest.approx(1.8 * 1.1, rel=0.02)
    assert np.array(found.weights) * unit == pytest.approx(TRUE.weights, abs=0.01)
    errors = found.probabilities(levels) - TRUE.probabilities(levels)
    assert np.abs(errors).mean() < 0.005
    assert np.abs(errors).max() < 0.03
    abilities = levels @ np.array(found.weights) + found.offset
    assert (abilities.mean(), abilities.std()) == pytest.approx((0.0, 1.0), abs=1e-9)


def test_without_noise_they_are_found_exactly_but_for_the_ridge() -> None:
    levels = levels_of(500)
    found = fitted_response(levels, TRUE.probabilities(levels))
    assert found.probabilities(levels) == pytest.approx(TRUE.probabilities(levels), abs=0.001)


def test_a_mean_opinion_score_is_enough() -> None:
    levels = levels_of(1000)
    votes = voted(TRUE.probabilities(levels), 30)
    scores = votes @ np.arange(1, 6) / 30
    found = fitted_response(levels, soft_grades(scores))
    expectation, _ = grade_moments(found.probabilities(levels))
    assert np.corrcoef(expectation, scores)[0, 1] > 0.97
    assert np.sqrt(np.mean((expectation - scores) ** 2)) < 0.2


def test_votes_that_split_stop_at_the_bound() -> None:
    levels = levels_of(300)
    torn = np.tile([15.0, 0.0, 0.0, 0.0, 15.0], (300, 1))
    found = fitted_response(levels, torn)
    assert found.discrimination * found.step == pytest.approx(LEAST_STEP)
    assert not multimodal(found.probabilities(100 * levels)).any()


def test_levels_that_tell_everything_keep_coefficients_finite() -> None:
    grades = np.eye(5)[np.arange(200) % 5]
    levels = 10.0 * grades - 2.0
    found = fitted_response(levels, grades)
    assert np.abs(found.weights).max() < 100
    assert np.argmax(found.probabilities(levels), axis=1).tolist() == (np.arange(200) % 5).tolist()


def test_levels_that_tell_nothing_give_everyone_the_same() -> None:
    grades = np.eye(5)[np.arange(200) % 5]
    found = fitted_response(np.zeros((200, 5)), grades)
    probabilities = found.probabilities(np.zeros((3, 5)))
    assert np.isfinite(probabilities).all()
    assert grade_moments(probabilities)[0] == pytest.approx(3.0, abs=1e-3)


def test_the_slopes_are_those_of_the_loss() -> None:
    random = np.random.default_rng(3)
    above, shares = random.normal(size=7), random.dirichlet(np.ones(5), 7)
    value, by_above, by_gap = surprise(above, 1.7, shares)
    for at in range(7):
        moved = above.copy()
        moved[at] += 1e-6
        assert (surprise(moved, 1.7, shares)[0] - value) / 1e-6 == pytest.approx(
            by_above[at], abs=1e-5
        )
    assert (surprise(above, 1.7 + 1e-6, shares)[0] - value) / 1e-6 == pytest.approx(
        by_gap, abs=1e-5
    )


@pytest.mark.parametrize(
    ("levels", "grades"),
    [
        (np.zeros((3, 4)), np.ones((3, 4))),
        (np.zeros((3, 5)), np.ones((2, 5))),
        (np.zeros((3, 5)), np.zeros((3, 5))),
        (np.full((3, 5), np.nan), np.ones((3, 5))),
        (np.zeros((3, 5)), -np.ones((3, 5))),
    ],
)
def test_what_makes_no_sense_is_refused(levels: Floats, grades: Floats) -> None:
    with pytest.raises(ValueError, match="levels"):
        fitted_response(levels, grades)


def words_and_scores(photographs: int) -> tuple[Floats, Floats]:
    """A model whose words are more torn than its ability is unsure, and people."""
    random = np.random.default_rng(5)
    quality = random.normal(size=photographs)
    logits = np.outer(quality, [-2, -1, 0, 1, 2]) + random.normal(0, 0.7, (photographs, 5))
    words = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return words, np.clip(3.0 + 0.8 * quality + random.normal(0, 0.3, photographs), 1, 5)


def test_a_fitted_head_is_honest_about_its_deviation() -> None:
    words, human = words_and_scores(1000)
    head = fitted_head(words, human)
    gradings = [graded_response(row, head) for row in words]
    errors = np.array([one.score for one in gradings]) - human
    stds = np.array([one.std for one in gradings])
    assert np.mean(np.abs(errors) <= 1.96 * stds) == pytest.approx(0.95, abs=0.02)


def test_cross_validation_says_what_unseen_photographs_get() -> None:
    words, human = words_and_scores(400)
    reached = cross_validated(words, human, folds=4)
    assert reached["grm"]["multimodal"] == 0.0
    assert reached["levels"]["multimodal"] == np.mean(multimodal(words)) > 0.05
    for figures in reached.values():
        assert figures["srcc"] > 0.8
        assert figures["coverage95"] == pytest.approx(0.95, abs=0.04)


def test_votes_are_read_in_the_order_of_the_files(tmp_path: Path) -> None:
    table = tmp_path / "votes.csv"
    table.write_text("file,1,2,3,4,5\nb.jpg,0,0,1,2,3\na.jpg,4,0,0,0,0\n")
    assert votes_of(table, ["a.jpg", "b.jpg"]).tolist() == [[4, 0, 0, 0, 0], [0, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    "text",
    [
        "file,1,2,3\na.jpg,1,2,3\n",
        "file,1,2,3,4,5\nb.jpg,1,1,1,1,1\n",
        "file,1,2,3,4,5\na.jpg,1,x,1,1,1\n",
        "file,1,2,3,4,5\na.jpg,0,0,0,0,0\n",
        "file,1,2,3,4,5\na.jpg,1,-1,1,1,1\n",
    ],
)
def test_a_table_that_holds_no_votes_is_refused(tmp_path: Path, text: str) -> None:
    table = tmp_path / "votes.csv"
    table.write_text(text)
    with pytest.raises(UsageError, match=r"votes"):
        votes_of(table, ["a.jpg"])


def test_the_command_writes_the_head_into_the_manifest(
    package: EnginePackage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, human = words_and_scores(60)
    table = tmp_path / "labels.csv"
    rows = "".join(f"{at}.jpg,{score}\n" for at, score in enumerate(human))
    table.write_text(f"file,mos\n{rows}")
    copy = shutil.copytree(package.path, tmp_path / "package")
    monkeypatch.setattr(graded, "grade_words", lambda *_: words)
    monkeypatch.setattr(
        sys,
        "argv",
        ["graded", str(table), "--images", str(tmp_path), "--package", str(copy)],
    )
    graded.main()
    said = json.loads(capsys.readouterr().out)
    written = EnginePackage.open(copy).manifest.calibration
    assert said["photographs"] == 60
    assert written == replace(package.manifest.calibration, graded=fitted_head(words, human))
    assert said["graded"] == json.loads(json.dumps(asdict(written.graded)))
