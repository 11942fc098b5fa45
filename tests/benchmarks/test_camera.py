"""The camera's benchmark judges what was told, and what it printed meets the bar."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import camera
from benchmarks.camera import HOLD, RATE_HZ, SOUND, STATE_S, STATES, Watched
from meiqa.serve.guidance import Change
from tests.serve.fakes import FakeEngine, perceived, scene_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "camera.json"
BAR = 0.95


def look(at_s: float, state: str, code: str, text: str, best: bool, best_state: str) -> Watched:
    change = Change(code, text, 3.0, best, 1)  # type: ignore[arg-type]
    return Watched(0, state, at_s, 3.0, change, best_state)


BEFORE = [look(0.0, SOUND, "steady", "Steady", True, SOUND)]
SOFTER = look(2.0, "blurred", "worse", "Softer than the last", False, SOUND)


def test_a_change_is_right_if_way_words_and_best_frame_are() -> None:
    last = look(3.5, "blurred", "steady", "The best was sharper", False, SOUND)
    found = camera.judged_change(BEFORE, [SOFTER, last])
    assert (found["trend"], found["words"], found["best"]) == (True, True, True)
    assert not found["by_scores"]  # they did not move


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ([look(2.0, "blurred", "better", "Softer than the last", False, SOUND)], "trend"),
        ([SOFTER, look(2.4, "blurred", "better", "Hold it: …", False, SOUND)], "trend"),
        ([look(2.0, "blurred", "steady", "Steady", False, SOUND)], "trend"),
        ([look(2.0, "blurred", "worse", "Darker than the last", False, SOUND)], "words"),
        ([look(2.0, "blurred", "worse", "Softer than the last", True, SOUND)], "best"),
        ([look(2.0, "blurred", "worse", "Softer than the last", False, "blurred")], "best"),
    ],
)
def test_what_is_wrong_of_a_change_is_seen(wrong: list[Watched], name: str) -> None:
    assert not camera.judged_change(BEFORE, wrong)[name]


def test_a_return_to_a_sound_picture_may_be_held() -> None:
    before = [look(0.0, "blurred", "worse", "Softer than the last", False, SOUND)]
    after = [look(2.0, SOUND, "better", f"{HOLD} it: the best of the last 5 s", True, SOUND)]
    assert all(camera.judged_change(before, after)[name] for name in ("trend", "words", "best"))


def test_a_scene_made_by_program_is_followed_through_a_video(tmp_path: Path) -> None:
    engine = FakeEngine(rule=perceived)
    looks = list(camera.watched(engine, [scene_of(3), scene_of(4)], tmp_path))
    assert len(looks) == round(2 * len(STATES) * STATE_S * RATE_HZ)
    found = camera.summary(looks)
    assert (found["photographs"], found["changes"]) == (2, 2 * (len(STATES) - 1))
    assert (found["new_scenes_found"], found["new_scenes_imagined"]) == (2, 0)
    assert min(found["trend_right"], found["words_right"], found["best_right"]) >= BAR, found


def test_states_are_what_they_are_called() -> None:
    of_state = {state: [] for state in STATES}  # type: ignore[var-annotated]
    for number, pixels in enumerate(camera.frames_of(scene_of(3), 0)):
        of_state[STATES[int(number / RATE_HZ / STATE_S)]].append(pixels)
    light = {state: np.mean([each.mean() for each in frames]) for state, frames in of_state.items()}
    assert light["dark"] < 0.5 * light[SOUND]
    assert light["blurred and dark"] < 0.5 * light["blurred"]
    fine = {
        s: np.mean([np.diff(e[..., 1].astype(int)).std() for e in f]) for s, f in of_state.items()
    }
    assert fine["blurred"] < 0.6 * fine[SOUND]


def test_the_committed_figures_meet_the_bar() -> None:
    found = json.loads(RESULTS.read_text())
    assert found["photographs"] >= 24
    assert found["trend_right"] >= BAR
    assert found["best_right"] >= BAR
    assert found["new_scenes_found"] == found["photographs"]
