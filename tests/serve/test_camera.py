"""Which frames get a full assessment, and how budgets follow the frame rate; no clock runs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.serve.camera import (
    FAST_NEIGHBOURS,
    LEAST_MS,
    MOST_MS,
    RATE_HZ,
    CameraSession,
    Pacer,
    frame_stats,
    motion_between,
)
from meiqa.types import Assessment
from tests.engine.samples import picture

SIZE = (96, 128)
SUMMARY = "Severe JPEG compression. The picture is sharp."


def found(score: float, summary: str | None = None) -> Assessment:
    return Assessment("frame", score, 0.4, (score - 0.8, score + 0.8), score, "fair", 50.0, summary)


def kinds(
    frames: Iterable[NDArray[np.uint8]], scores: Iterable[float], every_s: float = 0.15
) -> list[str]:
    """Kinds of the assessments of frames that come one after the other."""
    session, seen = CameraSession(), []
    for number, (pixels, score) in enumerate(zip(frames, scores, strict=False)):
        plan = session.plan(pixels, number * every_s)
        session.advise(plan, found(score, SUMMARY), number * every_s + 0.1)
        seen.append(plan.kind)
    return seen


@pytest.fixture(scope="module")
def still() -> NDArray[np.uint8]:
    return picture(1, SIZE)


def test_a_moved_picture_moves_and_a_brighter_one_does_not(still: NDArray[np.uint8]) -> None:
    moved = np.roll(still, 24, axis=1)
    brighter = np.clip(still.astype(int) // 2 + 40, 0, 255).astype(np.uint8)
    dimmer = np.clip(still.astype(int) // 2 + 20, 0, 255).astype(np.uint8)
    assert motion_between(frame_stats(still), frame_stats(still)) == 0.0
    assert motion_between(frame_stats(still), frame_stats(moved)) > 5.0
    assert motion_between(frame_stats(brighter), frame_stats(dimmer)) < 0.5


@pytest.mark.parametrize("size", [(1, 1), (2, 50), (1, 2000), (16, 16), (17, 301), (480, 640)])
def test_frames_of_any_size_are_looked_at(size: tuple[int, int]) -> None:
    white = frame_stats(np.full((*size, 3), 255, np.uint8))
    assert (white.cells.mean(), white.measured["clipped"]) == (255.0, 1.0)


def test_who_holds_still_gets_one_full_assessment(still: NDArray[np.uint8]) -> None:
    seen = kinds([still] * 30, [3.0] * 30)
    assert seen.count("full") == 1
    assert 2 <= seen.index("full") <= 5


def test_the_fast_path_asks_no_more_neighbours_than_the_package(still: NDArray[np.uint8]) -> None:
    ks = [CameraSession(neighbours=most).plan(still, 0.0).k for most in (0, 4, 32)]
    assert ks == [0, 4, FAST_NEIGHBOURS]


def test_who_moves_gets_none(still: NDArray[np.uint8]) -> None:
    frames = [np.roll(still, 24 * i, axis=1) for i in range(20)]
    assert kinds(frames, [3.0] * 20) == ["fast"] * 20


def test_another_scene_is_assessed_anew(still: NDArray[np.uint8]) -> None:
    frames = [still] * 10 + [255 - still] * 10
    assert kinds(frames, [3.0] * 20).count("full") == 2


def test_another_score_of_the_same_scene_is_looked_into(still: NDArray[np.uint8]) -> None:
    scores = [3.0] * 10 + [2.0] * 10
    assert kinds([still] * 20, scores).count("full") == 2


def test_a_full_assessment_does_not_last_for_ever(still: NDArray[np.uint8]) -> None:
    assert kinds([still] * 60, [3.0] * 60, every_s=0.5).count("full") == 2


def test_the_description_serves_frames_of_the_same_scene_only(still: NDArray[np.uint8]) -> None:
    session, said = CameraSession(), []
    for number, pixels in enumerate([still] * 15 + [255 - still] * 3):
        plan = session.plan(pixels, 0.2 * number)
        summary = SUMMARY if plan.kind == "full" else None
        said.append(session.advise(plan, found(3.0, summary), 0.2 * number + 0.1).code)
        stood = session.stands
    assert said[14] == "sharper-stream"
    assert not stood


def test_budget_and_the_way_there_share_a_turn() -> None:
    pacer = Pacer(30.0)
    for _ in range(50):
        pacer.idle(0.060)
    assert pacer.budget_ms == pytest.approx(1e3 / RATE_HZ - 60.0, abs=0.5)


def test_a_slow_camera_allows_larger_budgets() -> None:
    assert Pacer(3.0).budget_ms > Pacer(30.0).budget_ms
    assert Pacer(1.0).budget_ms == MOST_MS
    assert Pacer(None).budget_ms == Pacer(30.0).budget_ms


def test_a_slow_way_leaves_the_least_and_pauses_teach_nothing() -> None:
    pacer = Pacer()
    for _ in range(50):
        pacer.idle(0.9)
    assert pacer.budget_ms == LEAST_MS
    other = Pacer()
    before = other.budget_ms
    for pause in (30.0, float("nan"), -1.0):
        other.idle(pause)
    assert other.budget_ms == before


def test_a_busy_service_gets_what_it_asks_for_and_less_again_later() -> None:
    pacer = Pacer()
    before = pacer.budget_ms
    pacer.refused(200.0)
    assert pacer.budget_ms == pytest.approx(1.1 * (before + 200.0))
    for _ in range(100):
        pacer.answered()
    assert pacer.budget_ms == before
