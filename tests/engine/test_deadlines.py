"""A budget buys what it can, a set of photos keeps one deadline, and the rest is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from meiqa.engine.engine import Engine
from meiqa.testing import FakeClock, FakeModel
from meiqa.types import Budget
from tests.engine.samples import ANCHORS, assessed, fake_engine, toned

MS = {"encode": 10.0, "prefill": 20.0, "grade": 5.0, "token": 4.0, "pair": 6.0}
SCORED_MS = MS["encode"] + MS["prefill"] + MS["grade"]
"""A photo's score takes no less."""
CALL_MS = 2 * 8 * MS["pair"] + 9 * MS["prefill"]
"""The dearest call: a photo beside eight others in both orders, all of them to be read anew."""
PHOTOS = [toned(1.0 + 0.16 * number, number) for number in range(24)]
SHOTS = [np.roll(toned(3.0, 5), (number % 2, number // 2), (0, 1)) for number in range(12)]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def engine(clock: FakeClock, remembered: Path) -> Engine:
    return fake_engine(FakeModel(clock=clock, ms=MS), remembered, clock)


@pytest.fixture
def warm(engine: Engine) -> Engine:
    """Give an engine that has measured its costs, which no photo pays for."""
    engine.scorer.costs()
    return engine


def left_out(degraded: Sequence[str], what: str) -> tuple[int, int]:
    """How many of how many are named as left out."""
    found = [re.match(rf"(\d+) of (\d+) {what}", note) for note in degraded]
    ((left, of),) = [(int(match[1]), int(match[2])) for match in found if match] or [(0, 0)]
    return left, of


@pytest.mark.parametrize("count", [2, 9, 24])
@pytest.mark.parametrize("ms", [1, 36, 50, 120, 300, 1000])
def test_a_ranking_keeps_the_deadline_of_its_photos(
    warm: Engine, clock: FakeClock, ms: float, count: int
) -> None:
    began = clock()
    ranking = warm.rank(PHOTOS[:count], budget=Budget(ms=ms))
    assert 1e3 * (clock() - began) <= max(ms, SCORED_MS) * count + CALL_MS
    assert len(ranking.photos) == count
    asked = sum(photo.compared for photo in ranking.photos) // 2
    pairs = 2 * count - 3
    assert left_out(ranking.degraded, "pairs not compared: no time") == (
        (pairs - asked, pairs) if asked < pairs else (0, 0)
    )
    unwritten = sum(photo.summary is None for photo in ranking.photos)
    assert unwritten <= left_out(ranking.degraded, "photos scored without")[0] <= count


@pytest.mark.parametrize("ms", [1, 36, 50, 120, 300, 1000])
def test_a_culling_keeps_the_deadline_of_its_photos(
    warm: Engine, clock: FakeClock, ms: float
) -> None:
    """Twelve shots of one scene, each to be compared with eight others."""
    began = clock()
    culling = warm.cull(SHOTS, budget=Budget(ms=ms))
    taken_ms, allowed_ms = 1e3 * (clock() - began), max(ms, SCORED_MS) * len(SHOTS)
    assert taken_ms <= allowed_ms + CALL_MS
    (group,) = culling.groups
    assert len(group) == len(SHOTS)
    left, pairs = left_out(culling.degraded, "pairs not compared: no time")
    assert (left, pairs) == (0, 0) or pairs == 60
    assert (left > 0) == (ms < 200)


@pytest.mark.parametrize("ms", [1, 20, 36, 60, 200, 1000])
def test_a_comparison_keeps_the_deadline_of_its_photos(
    warm: Engine, clock: FakeClock, ms: float
) -> None:
    began = clock()
    pair = warm.compare(PHOTOS[4], PHOTOS[9], budget=Budget(ms=ms))
    assert 1e3 * (clock() - began) <= 2 * max(ms, SCORED_MS) + CALL_MS
    assert (left_out(pair.degraded, "pairs") == (1, 1)) == (ms < 60)
    assert pair.preference < 0.5
    assert pair.first_score < pair.second_score


def test_time_is_kept_for_the_pairs(warm: Engine) -> None:
    """Where there is none for the text of any photo, but for all pairs."""
    ranking = warm.rank(PHOTOS, budget=Budget(ms=100))
    assert left_out(ranking.degraded, "pairs") == (0, 0)
    assert left_out(ranking.degraded, "photos scored without") == (24, 24)


def test_without_a_budget_nothing_is_left_out(engine: Engine) -> None:
    assert engine.rank(PHOTOS).degraded == ()
    assert engine.cull(SHOTS).degraded == ()
    assert engine.compare(*PHOTOS[:2]).degraded == ()
    assert engine.rank(PHOTOS, budget=Budget(ms=1e4)).degraded == ()


def test_a_precision_that_is_reached_is_no_lack_of_time(engine: Engine) -> None:
    assert engine.rank(PHOTOS, budget=Budget(std=0.5)).degraded == ()


def test_no_photo_pays_for_the_first_measurement_of_costs(engine: Engine, clock: FakeClock) -> None:
    result = engine.score(PHOTOS[3], budget=Budget(ms=400))
    assert result.summary is not None
    assert result.counters["comparisons"] == 16
    assert clock() > 0.6
    assert result.timings_ms["total"] < 400


def test_photos_that_cannot_be_judged_leave_their_time_to_the_others(warm: Engine) -> None:
    alone = warm.rank(PHOTOS[:3], budget=Budget(ms=300))
    together = warm.rank([b"", b"", *PHOTOS[:3]], budget=Budget(ms=300))
    assert len(together.failures) == 2
    assert alone.degraded != together.degraded == ()


# One photo


def test_a_millisecond_buys_the_initial_score(warm: Engine) -> None:
    result = warm.score(PHOTOS[0], budget=Budget(ms=1))
    assert "initial score only" in result.degraded
    assert result.neighbours == ()
    assert result.summary is None
    assert result.score == result.initial_score
    assert result.counters["comparisons"] == 0


def test_little_time_buys_fewer_comparisons(warm: Engine) -> None:
    whole = warm.score(PHOTOS[1])
    short = warm.score(PHOTOS[1], budget=Budget(ms=100))
    assert {"no summary", "4 of 8 neighbours", "one order"} <= {*short.degraded}
    assert short.summary is None
    assert 0 < short.counters["comparisons"] < whole.counters["comparisons"]
    assert "no summary" not in whole.degraded


def test_plenty_of_time_buys_everything(warm: Engine) -> None:
    whole = warm.score(PHOTOS[1])
    result = warm.score(PHOTOS[1], budget=Budget(ms=1e6))
    assert result.degraded == whole.degraded
    assert result.score == pytest.approx(whole.score, abs=1e-3)


@pytest.mark.parametrize("ms", [36, 60, 100, 150, 200, 300, 400])
def test_a_photo_is_done_in_time(warm: Engine, ms: float) -> None:
    """Among neighbours that were read before: what reading them takes is known as a mean only."""
    assessed(warm.score_many(PHOTOS[:6]))
    for photo in PHOTOS[:6]:
        result = warm.score(photo, budget=Budget(ms=ms))
        assert result.timings_ms["total"] <= ms


def test_a_description_ends_in_time_for_what_comes_after_it(warm: Engine, clock: FakeClock) -> None:
    """Tokens are ten times as slow as when they were measured."""
    model = warm.model
    assert isinstance(model, FakeModel)
    model.ms["token"] = 40.0
    result = warm.score(PHOTOS[3], budget=Budget(ms=600))
    assert "summary cut at the token limit" in result.degraded
    assert result.counters["comparisons"] >= 4
    assert result.timings_ms["total"] <= 600


def test_a_precision_stops_the_comparisons(engine: Engine) -> None:
    whole = engine.score(PHOTOS[3], k=ANCHORS)
    target = 1.2 * whole.std
    result = engine.score(PHOTOS[3], budget=Budget(std=target), k=ANCHORS)
    asked = [n for n in result.neighbours if n.preference is not None]
    assert 0 < len(asked) < len(whole.neighbours)
    assert whole.std < result.std <= target
    assert f"stopped after {len(asked)} of {ANCHORS} neighbours" in result.degraded


def test_a_precision_out_of_reach_asks_everything(engine: Engine) -> None:
    whole = engine.score(PHOTOS[3])
    result = engine.score(PHOTOS[3], budget=Budget(std=1e-6))
    assert result.counters["comparisons"] == whole.counters["comparisons"]
    assert result.std > 1e-6
