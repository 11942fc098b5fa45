"""Photos of a set are put in order by comparing them with each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from meiqa.engine import scoring, sets
from meiqa.engine.budget import Deadline, PairTime
from meiqa.engine.calibration import UNCALIBRATED, Calibration, SceneVerdict
from meiqa.engine.comparing import Comparer, Pictured, PrefixCache
from meiqa.engine.engine import Engine
from meiqa.engine.model import Prefix, VisualTokens
from meiqa.engine.reasons import Observation
from meiqa.engine.sets import (
    Candidate,
    Verdicts,
    culled,
    joint_scores,
    order_of,
    preference_of,
    ranked,
    solve,
)
from meiqa.errors import UsageError
from meiqa.testing import FakeModel
from meiqa.types import CulledPhoto, Detail, Neighbour, RankedPhoto
from tests.engine.samples import PHOTOS, Picture, fake_engine, picture, toned
from tests.engine.shoots import bracket, burst, scene
from tests.engine.views import at

ALWAYS = PairTime(Deadline())
SCENE = SceneVerdict(temperature=0.5, gap=0.2, sigma=0.2)


def candidate(name: str, prior: float, *neighbours: Neighbour, quality: float = 3.0) -> Candidate:
    """A photo that scored `prior` alone, and is of another quality when it is compared."""
    tokens = FakeModel(lambda pixels: quality).encode(np.zeros((32, 48, 3), np.uint8))
    return Candidate(name, name, tokens.values, tokens.grid, prior, prior, neighbours)


@dataclass(frozen=True)
class Eyes(Comparer):
    """A comparer that notes who was compared."""

    pairs: list[tuple[str, str]] = field(default_factory=list)

    def between(self, first: Pictured, others: Sequence[Pictured]) -> NDArray[np.float64]:
        self.pairs.extend((first.image_digest, other.image_digest) for other in others)
        return super().between(first, others)


def eyes(calibration: Calibration = UNCALIBRATED) -> Eyes:
    return Eyes(FakeModel(calibration=calibration), PrefixCache())


def in_order(photos: Sequence[Candidate], rivals: int) -> tuple[RankedPhoto, ...]:
    return ranked(photos, solve(photos, eyes(), rivals, ALWAYS))


def test_comparisons_mend_the_order() -> None:
    """Two photos were taken for each other alone; compared, they change places."""
    photos = [
        candidate("best", 4.0, quality=4.0),
        candidate("good", 2.9, quality=3.5),
        candidate("poor", 3.1, quality=2.5),
        candidate("bad", 1.0, quality=1.0),
    ]
    asked = eyes()
    solution = solve(photos, asked, 2, ALWAYS)
    places = ranked(photos, solution)
    assert [place.path for place in places] == ["best", "good", "poor", "bad"]
    assert [place.rank for place in places] == [1, 2, 3, 4]
    assert [place.places for place in places] == [0, 1, -1, 0]
    assert [place.compared for place in places] == [1, 2, 2, 1]
    assert asked.pairs == [("best", "poor"), ("poor", "good"), ("good", "bad")]
    assert all(later.score <= earlier.score for earlier, later in itertools.pairwise(places))
    assert (solution.left_out, solution.pairs) == (0, 3)


def test_comparing_narrows_the_scores() -> None:
    scores = np.linspace(1, 5, 9).tolist()
    photos = [candidate(f"{score:.1f}", score, quality=score) for score in scores]
    alone = {place.path: place.std for place in in_order(photos, rivals=0)}
    for place in in_order(photos, rivals=4):
        assert place.std < alone[place.path]


def test_a_remembered_photo_that_two_were_compared_with_holds_both() -> None:
    anchor = Neighbour("a", "anchor", 3.0, 0.1, 0.9)
    unasked = Neighbour("b", "anchor", 1.0, 0.1, None)
    photos = [candidate("x", 3.0, anchor, unasked), candidate("y", 3.0, anchor)]
    scores, stds = joint_scores(photos, Verdicts([(0, 1)], [0.5], [False]), UNCALIBRATED)
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0] > 3.0
    assert stds[0] < 1 / np.sqrt(2 * UNCALIBRATED.lam)


def test_equal_scores_keep_their_order() -> None:
    assert order_of([2.0, 3.0, 2.0, 3.0]) == [1, 3, 0, 2]


def test_a_group_is_culled_by_comparing_and_not_by_scores_alone() -> None:
    def shot(path: str, quality: float, alone: float, degrees: float) -> Candidate:
        made, (view,) = candidate(path, alone, quality=quality), at(degrees)
        return replace(made, summary=f"seen {path}", view=view)

    photos = [
        shot("blurred", 1.0, 3.1, 1),
        shot("other", 3.0, 3.0, 90),
        shot("sharp", 4.0, 3.0, 4),
        shot("shaken", 2.0, 2.9, 7),
    ]
    (first, second), solutions = culled(photos, eyes(), 0.95, ALWAYS)
    assert [photo.path for photo in first] == ["sharp", "shaken", "blurred"]
    assert [photo.place for photo in first] == [1, 2, 3]
    assert [photo.path for photo in second] == ["other"]
    assert first[0].likeness == 1.0
    assert all(0.95 < photo.likeness <= 1.0 + 1e-6 for photo in first)
    assert first[0].summary == "seen sharp"
    assert first[2].alone == 3.1
    assert [solution.pairs for solution in solutions] == [3, 0]


@settings(max_examples=200, deadline=None)
@given(
    priors=st.tuples(st.floats(1, 5), st.floats(1, 5)),
    qualities=st.tuples(st.floats(1, 5), st.floats(1, 5)),
    preference=st.floats(0, 1),
    std_scale=st.floats(0, 2),
    std_floor=st.floats(0, 1),
    alike=st.booleans(),
)
def test_a_preference_never_contradicts_the_scores(
    priors: tuple[float, float],
    qualities: tuple[float, float],
    preference: float,
    std_scale: float,
    std_floor: float,
    alike: bool,
) -> None:
    anchor = Neighbour("a", "anchor", 3.0, 0.1, preference)
    photos = [
        candidate("x", priors[0], anchor, quality=qualities[0]),
        candidate("y", priors[1], quality=qualities[1]),
    ]
    calibration = replace(
        UNCALIBRATED, std_scale=std_scale, std_floor=std_floor, scene=SCENE if alike else None
    )
    if alike:
        photos = [replace(photo, view=view) for photo, view in zip(photos, at(1, 4), strict=True)]
    solution = solve(photos, eyes(calibration), 2, ALWAYS)
    found = preference_of(solution)
    first, second = (posterior.score for posterior in solution.posteriors)
    assert 0.0 <= found <= 1.0
    assert (found > 0.5) <= (first >= second)
    assert (found < 0.5) <= (first <= second)
    # Of two at the same end of the scale, the preference still tells the better.
    assert (found == 0.5) <= (first == second)


def test_between_shots_of_one_scene_the_verdict_weighs_more_than_the_scores() -> None:
    """Their scores alone differ a little the wrong way; of strangers that would stand."""
    photos = [candidate("worse", 3.1, quality=2.8), candidate("better", 3.0, quality=3.2)]
    sure = replace(UNCALIBRATED, lam=300.0, sigma=2.0, scene=SCENE)
    strangers = solve(photos, eyes(sure), 2, ALWAYS)
    assert preference_of(strangers) > 0.5
    views = at(1, 4)
    shots = [replace(photo, view=view) for photo, view in zip(photos, views, strict=True)]
    solution = solve(shots, eyes(sure), 2, ALWAYS)
    assert preference_of(solution) < 0.3
    assert solution.order == (1, 0)
    # What both scored together stays; how far they are apart is what the comparison says.
    assert solution.scores.mean() == pytest.approx(3.05, abs=1e-6)
    # That is nothing about how far both are from what people would say.
    alone = 1.0 / np.sqrt(2.0 * sure.lam)
    assert [each.std for each in solution.posteriors] == pytest.approx([alone, alone])
    assert strangers.posteriors[0].std < alone
    without = solve(shots, eyes(replace(sure, scene=None)), 2, ALWAYS)
    np.testing.assert_array_equal(without.scores, strangers.scores)


def test_scores_alone_speak_in_a_verdict_of_one_scene() -> None:
    even = np.zeros((3, 2))
    said = SCENE.preferences(even, np.array([-0.1, 0.0, 0.1]))
    assert said[1] == 0.5
    assert said[2] == pytest.approx(1 - said[0])
    assert said[2] > 0.6


class Contrary(FakeModel):
    """A model whose comparisons have nothing to do with its scores."""

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        asked = super().prefer_first(firsts, seconds)
        return 4.0 * np.sin(1e3 * asked)


@pytest.mark.parametrize("seed", range(12))
def test_two_photos_side_by_side_are_of_one_mind(engine: Engine, seed: int) -> None:
    pair = engine.compare(picture(seed), picture(seed + 100))
    assert (pair.preference > 0.5) == (pair.first_score > pair.second_score)


def test_a_model_of_two_minds_gives_one_answer(remembered: Path) -> None:
    """Its scores say one thing and its comparisons another."""
    engine, random, overruled = fake_engine(Contrary(), remembered), np.random.default_rng(4), 0
    for seed in range(30):
        alone = random.uniform(2.5, 3.5, 2)
        photos = [toned(score, 2 * seed + index) for index, score in enumerate(alone)]
        pair = engine.compare(*photos)
        assert (pair.preference > 0.5) == (pair.first_score > pair.second_score)
        overruled += (pair.preference > 0.5) != (alone[0] > alone[1])
    assert overruled > 3


def test_an_engine_ranks_photos_and_lists_what_it_cannot_judge(engine: Engine) -> None:
    ranking = engine.rank([*PHOTOS[:4], b"no photo"], k=4)
    assert [photo.rank for photo in ranking.photos] == [1, 2, 3, 4]
    assert {photo.compared for photo in ranking.photos} <= {2, 3, 4}
    assert [failure.path for failure in ranking.failures] == ["<bytes>"]
    alone = [engine.score(photo, k=4, learn=False).score for photo in PHOTOS[:4]]
    assert sorted(photo.alone for photo in ranking.photos) == pytest.approx(sorted(alone), abs=1e-3)


def test_the_order_given_does_not_matter(engine: Engine) -> None:
    scores = [photo.score for photo in engine.rank(PHOTOS[:4], k=4).photos]
    again = [photo.score for photo in engine.rank(PHOTOS[:4][::-1], k=4).photos]
    assert scores == pytest.approx(again, abs=1e-3)


def test_a_photo_of_a_set_is_read_once(remembered: Path) -> None:
    model = FakeModel()
    with fake_engine(model, remembered) as engine:
        engine.rank([toned(score, 7) for score in (2.0, 2.5, 3.0, 3.5)], k=0)
    assert (model.calls["encode"], model.calls["prefill"]) == (4, 4)


def test_two_photos_are_decoded_and_read_once(remembered: Path) -> None:
    model = FakeModel()
    with fake_engine(model, remembered) as engine:
        engine.compare(toned(2.0), toned(3.0))
    assert model.calls["encode"] == 2


def test_nothing_to_rank(engine: Engine) -> None:
    assert engine.rank([]).photos == ()
    assert engine.cull([]).groups == ()


@pytest.mark.parametrize("rivals", [-2, 3])
def test_there_are_as_many_rivals_before_as_behind(engine: Engine, rivals: int) -> None:
    with pytest.raises(UsageError, match="rivals"):
        engine.rank([], rivals=rivals)


def shots_of(photo: Picture) -> list[Picture]:
    shaken = gaussian_filter(photo, (2, 2, 0))
    return [photo, np.roll(photo, 2, axis=1), shaken]


def test_an_engine_culls_and_lists_what_it_cannot_judge(engine: Engine) -> None:
    scenes = [picture(seed) for seed in (11, 12)]
    photos = [shot for scene in scenes for shot in shots_of(scene)]
    seen: list[None] = []
    culling = engine.cull([*photos, b"no photo"], k=2, on_photo=lambda: seen.append(None))
    assert [len(group) for group in culling.groups] == [3, 3]
    assert [failure.path for failure in culling.failures] == ["<bytes>"]
    assert len(seen) == 7
    for group in culling.groups:
        assert [photo.place for photo in group] == list(range(1, len(group) + 1))
        assert all(a.score >= b.score - 1e-9 for a, b in itertools.pairwise(group))


def test_copies_are_one_group(engine: Engine) -> None:
    culling = engine.cull([PHOTOS[0], PHOTOS[1], PHOTOS[0]], k=2, alike=1.0)
    assert sorted(map(len, culling.groups)) == [1, 2]


def test_a_series_is_kept_whole_as_it_was_taken(remembered: Path) -> None:
    """A bracket among shots of the same view, out of order; its photos aren't compared."""
    model = FakeModel()
    exposures = bracket(scene(1), (0, -2, 2), at=9)
    photos = [exposures[2], *burst(scene(1), 3, 0.2), exposures[0], exposures[1], toned(3.0)]
    with fake_engine(model, remembered) as engine:
        culling = engine.cull(photos, k=0)
    series, shots, (single,) = culling.groups
    assert [photo.kind for photo in (*series, *shots, single)] == [
        *["bracket"] * 3,
        *["burst"] * 3,
        None,
    ]
    light = [photo.alone for photo in series]
    assert light[1] < light[0] < light[2]
    assert [photo.place for photo in series] == [1, 2, 3]
    assert all(photo.kept and not photo.best and not photo.too_close for photo in series)
    assert (
        [photo.kept for photo in shots] == [photo.best for photo in shots] == [True, False, False]
    )
    assert single.best
    assert model.calls["pair"] == 6


def test_only_a_cull_looks_for_series_and_detail(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for place, name in ((sets, "frame_of"), (scoring, "measure_detail")):
        monkeypatch.setattr(place, name, lambda *_, name=name: asked.append(name))
    engine.rank(PHOTOS[:2], k=0)
    engine.compare(PHOTOS[0], PHOTOS[1])
    assert asked == []
    engine.cull(PHOTOS[:1], k=0)
    assert sorted(asked) == ["frame_of", "measure_detail"]


def group_of(*qualities: float, calibration: Calibration = UNCALIBRATED) -> tuple[CulledPhoto, ...]:
    """Shots of one scene, that only a comparison tells apart."""
    views = at(*range(len(qualities)))
    photos = [
        replace(candidate(f"{quality}", 3.0, quality=quality), view=view)
        for quality, view in zip(qualities, views, strict=True)
    ]
    (group,), _ = culled(photos, eyes(calibration), 0.9, ALWAYS)
    return group


def test_what_differs_by_less_than_its_deviation_is_too_close_to_call() -> None:
    fitted = replace(UNCALIBRATED, lam=300.0, scene=SCENE)
    close = group_of(3.0, 3.05, 1.0, calibration=fitted)
    assert [photo.path for photo in close] == ["3.05", "3.0", "1.0"]
    assert [photo.too_close for photo in close] == [True, True, False]
    assert [photo.reason for photo in close] == [None, None, "less preferred in the comparison"]
    clear = group_of(4.0, 2.0, 1.9, calibration=fitted)
    assert [photo.too_close for photo in clear] == [False, False, False]
    assert [photo.reason for photo in clear] == [
        "preferred in the comparison",
        "less preferred in the comparison",
        "less preferred in the comparison",
    ]


@pytest.mark.parametrize(
    ("noises", "wanted"),
    [((9.0, 0.5, 0.5), ["3.0", "3.05", "1.0"]), ((1.0, 0.9, 0.1), ["3.05", "3.0", "1.0"])],
)
def test_what_is_too_close_to_call_is_decided_at_full_size(
    noises: tuple[float, ...], wanted: list[str]
) -> None:
    """Of the best two by score; the third is far behind, however clean it is."""
    fitted = replace(UNCALIBRATED, lam=300.0, scene=SCENE)
    photos = [
        replace(
            candidate(f"{quality}", 3.0, quality=quality),
            view=view,
            observation=Observation((600, 800), Detail(0.5, 1.0, noise, (0, 0, 256, 256))),
        )
        for quality, view, noise in zip((3.05, 3.0, 1.0), at(0, 1, 2), noises, strict=True)
    ]
    (group,), _ = culled(photos, eyes(fitted), 0.9, ALWAYS)
    assert [photo.path for photo in group] == wanted
    reasons = ("less noise", "more noise") if wanted[0] == "3.0" else (None, None)
    assert (group[0].reason, group[1].reason) == reasons
    assert [photo.too_close for photo in group] == [True, True, False]


def test_without_a_scene_verdict_the_deviations_of_both_scores_say_what_is_close() -> None:
    assert [photo.too_close for photo in group_of(3.2, 2.8)] == [True, True]
    sure = replace(UNCALIBRATED, std_scale=0.01)
    assert [photo.too_close for photo in group_of(3.2, 2.8, calibration=sure)] == [False, False]


@pytest.mark.parametrize("alike", [0.0, -0.5, 1.5, float("nan")])
def test_likeness_is_a_cosine(engine: Engine, alike: float) -> None:
    with pytest.raises(UsageError, match="cosine"):
        engine.cull([], alike=alike)


def test_two_photos_side_by_side(engine: Engine) -> None:
    forth = engine.compare(PHOTOS[0], PHOTOS[1])
    back = engine.compare(PHOTOS[1], PHOTOS[0])
    assert forth.preference == pytest.approx(1 - back.preference, abs=1e-4)
    assert (forth.first_score, forth.second_score) == pytest.approx(
        (back.second_score, back.first_score), abs=1e-3
    )
    assert engine.compare(PHOTOS[0], PHOTOS[0]).preference == pytest.approx(0.5, abs=1e-4)


def test_two_shots_of_a_scene_are_compared_without_being_scored(remembered: Path) -> None:
    model = FakeModel()
    with fake_engine(model, remembered) as engine:
        better, worse = (engine.read_shot(toned(score, 5)) for score in (4.0, 3.0))
        before = dict(model.calls)
        found = engine.compare_shots(better, worse)
        back = engine.compare_shots(worse, better)
        same = engine.compare_shots(better, better)
        assert "token" not in model.calls
        assert model.calls["encode"] == before["encode"]  # each was read once
        assert model.calls["pair"] == 6
    assert found.preference > 0.5 > back.preference
    assert found.gap == pytest.approx(-back.gap)
    assert found.gap > 0
    assert same.gap == pytest.approx(0.0, abs=1e-9)
    assert found.std == UNCALIBRATED.sigma


def test_a_gap_of_two_shots_grows_on_where_all_are_sure(remembered: Path) -> None:
    verdict = SceneVerdict(temperature=0.05, gap=0.05, sigma=0.5)
    model = FakeModel(calibration=replace(UNCALIBRATED, scene=verdict, neighbours=8))
    with fake_engine(model, remembered) as engine:
        best, middle, worst = (engine.read_shot(toned(score, 5)) for score in (4.0, 3.6, 3.3))
        near, far = (engine.compare_shots(best, other) for other in (middle, worst))
    assert near.preference > 0.999
    assert far.gap > near.gap > 0
    assert math.isfinite(far.gap)
