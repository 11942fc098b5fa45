"""A photo's score: what the model says, what is remembered, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.calibration import NEUTRAL_GRADED, Logistic
from meiqa.engine.detail import measure_detail
from meiqa.engine.engine import Engine
from meiqa.engine.estimates import (
    Comparisons,
    Estimate,
    before_comparisons,
    combine_correlated,
    fold,
)
from meiqa.engine.images import load_pixels
from meiqa.engine.model import (
    Description,
    Draft,
    Floats,
    GenerationStats,
    Prefix,
    StopRule,
    VisualTokens,
)
from meiqa.engine.patterns import PatternScore
from meiqa.engine.scoring import Prediction, Scored, ScoreRequest
from meiqa.memory import token_features
from meiqa.testing import FAKE_CALIBRATION, FakeClock, FakeModel
from meiqa.types import Budget, Distortion
from tests.engine.samples import ANCHORS, K, fake_anchors, fake_engine, toned

KEY = np.ones(2, np.float32)
PHOTO = toned(3.2, 77)


class Scripted(FakeModel):
    """A model that says what it is told to, whatever it sees."""

    def __init__(
        self,
        rating: float | None,
        grades: Sequence[float],
        *,
        complete: bool = True,
        asked: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        stats, unreadable = GenerationStats(7, complete), asked and rating is None
        self.said = Description("soft and dark", KEY, rating, unreadable, stats)
        self.grades = np.array(grades, np.float64)

    def describe(
        self, prefix: Prefix, max_tokens: int, drafts: Sequence[Draft] = (), stop: StopRule = None
    ) -> Description:
        return self.said

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        return self.grades


@pytest.fixture
def anchors(remembered: Path) -> Path:
    return remembered


def predicted(model: FakeModel, anchors: Path, tokens: int = 96) -> Prediction:
    scorer = fake_engine(model, anchors).scorer
    prefix, _ = scorer.prefill(load_pixels(PHOTO))
    return scorer.predict(prefix, tokens)


def scored(engine: Engine, request: ScoreRequest) -> Scored:
    decoded = load_pixels(request.image)
    return engine.scorer.score(lambda: decoded, request, engine.memory.snapshot())


# What the model says


def test_the_printed_rating_is_the_initial_score(anchors: Path) -> None:
    found = predicted(Scripted(3.27, [1, 0, 0, 0, 0]), anchors)
    assert [each.name for each in found.estimates] == ["rating", "grade"]
    assert found.estimates[0].score == 3.27
    assert fold(found.estimates).score == pytest.approx((3.27 + 1.0) / 2)
    assert found.description is not None
    assert (found.description.text, found.stats.tokens) == ("soft and dark", 7)


def test_an_unreadable_rating_falls_back_to_the_grade_word_and_says_so(anchors: Path) -> None:
    model = Scripted(None, [0, 0, 0.5, 0.5, 0])
    found = predicted(model, anchors)
    assert [(each.name, each.score) for each in found.estimates] == [("grade", 3.5)]
    result = fake_engine(model, anchors).score(PHOTO)
    assert "rating unreadable: scored by grade word" in result.degraded
    assert (result.initial_score, result.summary) == (3.5, "soft and dark")
    read = fake_engine(Scripted(2.5, [0, 0, 0.5, 0.5, 0]), anchors).score(PHOTO)
    assert not any("unreadable" in note for note in read.degraded)
    assert read.initial_score == 2.5


def test_a_family_without_a_printed_rating_is_scored_by_grade_word_alone(anchors: Path) -> None:
    calibration = replace(FAKE_CALIBRATION, levels_std=0.4, text_std=0.8, grade_share=0.75)
    model = Scripted(None, [0, 0, 0.5, 0.5, 0], asked=False, calibration=calibration)
    found = predicted(model, anchors)
    posterior = fold(found.estimates)
    assert (posterior.score, posterior.std) == (3.5, 0.4)
    assert not any(
        "unreadable" in note for note in fake_engine(model, anchors).score(PHOTO).degraded
    )


def test_without_a_description_nothing_is_unreadable(anchors: Path) -> None:
    found = predicted(Scripted(None, [0, 1, 0, 0, 0]), anchors, tokens=0)
    assert fold(found.estimates).score == 2.0
    assert found.description is None
    assert found.stats == GenerationStats()


@pytest.mark.parametrize("head", ["levels", "grm"])
def test_another_head_scores_by_the_grade_words_whatever_is_printed(
    anchors: Path, head: Any
) -> None:
    calibration = replace(FAKE_CALIBRATION, graded=NEUTRAL_GRADED)
    for rating in (1.0, None):
        model = Scripted(rating, [0, 0, 0, 1, 0], calibration=calibration, head=head)
        result = fake_engine(model, anchors).score(PHOTO, k=0)
        assert result.score == result.initial_score > 3.5
        assert result.summary == "soft and dark"
        assert not any("unreadable" in note for note in result.degraded)


def test_the_calibration_maps_and_weighs_rating_and_grade(anchors: Path) -> None:
    calibration = replace(
        FAKE_CALIBRATION,
        levels=Logistic(0.0, 1.0, 3.0, 0.5, 1.0),
        text=Logistic(0.0, 1.0, 3.0, 0.25, 1.0),
        levels_std=0.4,
        text_std=0.8,
        grade_share=0.75,
    )
    model = Scripted(4.8, [0, 0, 0, 1, 0], calibration=calibration)
    found = fold(predicted(model, anchors).estimates)
    assert found.score == pytest.approx(0.25 * 2.2 + 0.75 * 3.0)
    assert found.std == pytest.approx(0.25 * 0.8 + 0.75 * 0.4)
    result = fake_engine(model, anchors).score(PHOTO, k=0)
    assert result.initial_score == pytest.approx(2.2)
    assert (result.score, result.std) == pytest.approx((found.score, found.std))
    assert not any("not calibrated" in note for note in result.degraded)


@pytest.mark.parametrize(("printed", "score"), [(77.0, 5.0), (0.0, 1.0)])
def test_a_rating_off_the_scale_is_kept_on_it(anchors: Path, printed: float, score: float) -> None:
    assert predicted(Scripted(printed, [0.2] * 5), anchors).estimates[0].score == score


def test_a_cut_description_is_marked(anchors: Path) -> None:
    result = fake_engine(Scripted(3.0, [0, 0, 1, 0, 0], complete=False), anchors).score(PHOTO)
    assert "summary cut at the token limit" in result.degraded


def test_a_package_that_was_never_calibrated_says_so(anchors: Path) -> None:
    result = fake_engine(FakeModel(), anchors).score(PHOTO)
    assert (
        "package not calibrated: score and deviation are not fitted to people's" in result.degraded
    )


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [(499, 500, ("small: judged as the 500 x 499 pixels it has",)), (500, 500, ())],
)
def test_a_small_photo_is_said_to_be_small(
    anchors: Path, height: int, width: int, said: tuple[str, ...]
) -> None:
    engine, photo = fake_engine(FakeModel(), anchors), np.full((height, width, 3), 90, np.uint8)
    notes = engine.score(photo).degraded
    assert tuple(note for note in notes if note.startswith("small")) == said
    assert not any("small" in note for note in engine.rank([photo, photo]).degraded)


def test_detail_stands_beside_the_score_and_can_be_left_out(anchors: Path) -> None:
    engine = fake_engine(FakeModel(), anchors)
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    found, without = engine.score(photo), engine.score(photo, detail=False)
    assert found.detail == measure_detail(photo)
    assert without.detail is None
    assert found.score == without.score


# What is remembered


def test_without_neighbours_the_models_own_score_stands(anchors: Path) -> None:
    calibration = replace(FAKE_CALIBRATION, grade_share=0.0, text_std=0.37)
    result = fake_engine(FakeModel(calibration=calibration), anchors).score(PHOTO, k=0)
    assert result.neighbours == ()
    assert result.score == result.initial_score
    assert result.std == 0.37
    assert result.reflection is None


def test_each_estimate_is_one_entry_and_the_score_is_their_fold(tmp_path: Path) -> None:
    """A memory of sixty knows a regression, too."""
    engine = fake_engine(FakeModel(), fake_anchors(tmp_path / "many", 60))
    found, regression = scored(engine, ScoreRequest(PHOTO)), engine.memory.snapshot().regression
    assert regression is not None
    names = [each.name for each in found.estimates]
    assert names == ["rating", "grade", "regression", "comparisons", "doubt"]
    assert found.posterior == fold(found.estimates)
    recalled = found.estimate("regression")
    assert recalled is not None
    assert recalled.score == regression.score(token_features(found.prefix.tokens.values))
    assert (recalled.std, recalled.correlation) == (regression.std, 0.5)
    own = fold(found.prediction.estimates)
    assert before_comparisons(found.estimates) == combine_correlated(
        own, fold([Estimate("regression", recalled.score, recalled.std)]), 0.5
    )
    assessment = found.assessment(engine.memory.snapshot())
    assert assessment.memory_score == recalled.score
    assert assessment.score == found.posterior.score


def test_a_few_anchors_make_no_regression(anchors: Path) -> None:
    engine = fake_engine(FakeModel(), anchors)
    assert scored(engine, ScoreRequest(PHOTO)).estimate("regression") is None
    assert engine.score(PHOTO).memory_score is None


def test_every_neighbour_is_compared_with_once_in_both_orders(anchors: Path) -> None:
    model = FakeModel()
    found = scored(fake_engine(model, anchors), ScoreRequest(PHOTO, k=ANCHORS))
    assert found.logits.shape == (ANCHORS, 2)
    assert not np.isnan(found.logits).any()
    assert model.calls["pair"] == found.counters["comparisons"] == 2 * ANCHORS
    # The better the neighbour, the less likely is it that the photo looks better.
    worst_first = np.argsort([case.score for case in found.neighbours])
    assert (np.diff(found.preferences[worst_first]) < 0).all()


def test_a_precision_asks_the_most_informative_first(anchors: Path) -> None:
    engine = fake_engine(FakeModel(), anchors)
    found = scored(engine, ScoreRequest(PHOTO, Budget(std=0.45), k=ANCHORS))
    asked = set(np.flatnonzero(~np.isnan(found.preferences)).tolist())
    prior, calibration = before_comparisons(found.estimates), engine.model.calibration
    scores, stds = np.array([(case.score, case.std) for case in found.neighbours]).T
    unasked = Comparisons(scores, stds, np.full(ANCHORS, np.nan), calibration)
    ordered = unasked.most_informative(prior.score)
    assert asked == {*ordered[:8].tolist()}
    assert found.posterior.std <= 0.45


def test_neighbours_are_as_many_as_is_said(anchors: Path) -> None:
    engine = fake_engine(FakeModel(), anchors)
    assert len(engine.score(PHOTO).neighbours) == K
    assert len(engine.score(PHOTO, k=5).neighbours) == 5
    assert len(engine.score(PHOTO, k=1000).neighbours) == ANCHORS


class Keyless(FakeModel):
    """A model of a package whose keys can't be guessed."""

    def unwritten_key(self, tokens: VisualTokens) -> Floats:
        return np.zeros(2, np.float32)


@pytest.mark.parametrize("kind", [FakeModel, Keyless])
def test_without_a_key_the_choice_of_neighbours_says_so(
    anchors: Path, kind: type[FakeModel]
) -> None:
    clock = FakeClock()
    model = kind(clock=clock, ms={"token": 20.0, "pair": 1.0})
    result = fake_engine(model, anchors, clock).score(PHOTO, budget=Budget(ms=50))
    assert result.summary is None
    assert len(result.neighbours) == K
    assert any("no image key" in note for note in result.degraded) == (kind is Keyless)


# What becomes of it


@pytest.mark.parametrize(
    ("listed", "strength", "told"),
    [((), 1.0, False), ((), 3.0, True), ((Distortion("jitter", 1.0, 0.5),), 1.0, True)],
)
@pytest.mark.parametrize("measured", ["", "The picture is soft."])
def test_damage_that_no_pattern_sees_is_not_told(
    anchors: Path, listed: tuple[Distortion, ...], strength: float, told: bool, measured: str
) -> None:
    engine = fake_engine(FakeModel(), anchors)
    found = scored(engine, ScoreRequest(PHOTO))
    tokens = replace(found.prefix.tokens, measured=measured)
    seen = PatternScore(
        3.0, 0.5, 3.0, None, 0.0, np.ones(1), listed, strength, np.zeros((1, 1), np.float32)
    )
    text = "Strong lens blur. The picture is soft."
    found = replace(
        found, prefix=replace(found.prefix, tokens=tokens), patterns=seen, reflection=text
    )
    said = found.assessment(engine.memory.snapshot()).reflection
    assert said == (text if told or not measured else "The picture is soft.")
    silent = replace(found, reflection="The picture is soft.")
    said = silent.assessment(engine.memory.snapshot()).reflection
    assert (
        said == ("Barely visible jitter. " if listed and measured else "") + "The picture is soft."
    )


def test_a_reflections_verdict_is_the_scores(anchors: Path) -> None:
    engine = fake_engine(FakeModel(), anchors)
    found = scored(engine, ScoreRequest(PHOTO))
    tokens = replace(found.prefix.tokens, measured="The picture is soft.")
    prefix = replace(found.prefix, tokens=tokens)
    for word in ("bad", "excellent"):
        reflected = replace(found, prefix=prefix, reflection=f"A blur. Overall {word} quality.")
        said = reflected.assessment(engine.memory.snapshot())
        assert said.reflection == f"A blur. Overall {said.word} quality."


def test_an_assessment_says_what_was_found_and_what_it_took(anchors: Path) -> None:
    engine = fake_engine(FakeModel(), anchors)
    found = scored(engine, ScoreRequest(PHOTO))
    said = found.assessment(engine.memory.snapshot())
    assert said.path == "<array>"
    assert (said.score, said.std, said.ci95) == (
        found.posterior.score,
        found.posterior.std,
        found.posterior.ci95,
    )
    assert [n.preference for n in said.neighbours] == found.preferences.tolist()
    assert [n.id for n in said.neighbours] == [case.id for case in found.neighbours]
    assert sum(said.grades.values()) == pytest.approx(1.0)
    assert 0 < said.percentile < 100
    steps = "decode detail read describe retrieve compare fuse patterns total"
    assert list(said.timings_ms) == steps.split()
    assert said.counters["visual_tokens"] == 24
    assert said.counters["written_tokens"] == said.counters["writing_calls"] == 19


def test_a_score_of_a_set_is_the_score_alone(anchors: Path) -> None:
    engine, photos = fake_engine(FakeModel(), anchors), [toned(2.0, 5), toned(4.0, 6)]
    alone = [engine.score(photo).score for photo in photos]
    ranking = engine.rank(photos)
    assert [photo.alone for photo in ranking.photos] == alone[::-1]
    unmet = engine.rank(photos, rivals=0)
    assert [photo.score for photo in unmet.photos] == pytest.approx(alone[::-1], abs=1e-6)
