"""Which frames get a full assessment, how budgets follow a frame rate, and what changed since.

No clock runs but those that are injected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from meiqa.engine.images import Pixels
from meiqa.engine.model import VisualTokens
from meiqa.serve.camera import (
    BEST_S,
    FAST_NEIGHBOURS,
    KEPT_S,
    LEAST_MS,
    MOST_KEPT,
    MOST_KEPT_BYTES,
    MOST_MS,
    RATE_HZ,
    SHARES,
    CameraSession,
    Judged,
    Pacer,
    Turns,
    Watcher,
    difference,
    frame_stats,
    motion_between,
    same_scene,
)
from meiqa.serve.guidance import Change
from meiqa.testing import FakeClock, FakeEngine, FakeModel
from meiqa.types import Assessment
from tests.engine.samples import fake_anchors, fake_engine, picture
from tests.serve.fakes import perceived, scene_of

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


SCENE = scene_of(1)


def blurred(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2.5)))


def darkened(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (pixels * 0.3).astype(np.uint8)


def grainy(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    noise = np.random.default_rng(3).normal(0.0, 9.0, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


class Camera:
    """A camera before an engine that sees what is perceived."""

    def __init__(self, rule: Callable[[Pixels], float] = perceived) -> None:
        self.clock, self.session = FakeClock(), CameraSession()
        self.watcher = Watcher(FakeEngine(rule), self.session, 1e3, clock=self.clock)

    def watch(
        self, *frames: NDArray[np.uint8], every_s: float = 0.2, each_s: float = 2.0
    ) -> list[Judged]:
        """Look at each picture for a while."""
        seen = []
        for pixels in frames:
            for _ in range(round(each_s / every_s)):
                seen.append(self.watcher.judge(pixels))
                self.clock.advance(1e3 * every_s)
        return seen


def said(seen: Iterable[Judged]) -> list[str]:
    """Give what was said of frames, each text once in a row."""
    texts = [each.change.text for each in seen if each.change is not None]
    return [text for i, text in enumerate(texts) if not i or text != texts[i - 1]]


def change_of(judged: Judged) -> Change:
    assert judged.change is not None
    return judged.change


def test_it_is_named_what_differs_between_two_frames_of_a_scene() -> None:
    sound = frame_stats(SCENE)
    worse = {"softer": blurred, "darker": darkened, "noisier": grainy}
    better = {"sharper": blurred, "brighter": darkened, "less noisy": grainy}
    for word, damage in worse.items():
        assert difference(sound, frame_stats(damage(SCENE)))[0] == word
    for word, damage in better.items():
        assert difference(frame_stats(damage(SCENE)), sound)[0] == word
    assert difference(sound, frame_stats(np.roll(SCENE, 3, 1)))[0] is None


def test_damage_and_a_hand_leave_the_scene_and_another_one_is_told() -> None:
    sound = frame_stats(SCENE)
    for pixels in (blurred(SCENE), darkened(SCENE), grainy(SCENE), np.roll(SCENE, 10, 1)):
        assert same_scene(sound, frame_stats(pixels))
    assert not any(same_scene(sound, frame_stats(scene_of(seed))) for seed in range(2, 30))
    assert same_scene(sound, frame_stats(np.full_like(SCENE, 3)))  # the dark shows nothing


def test_a_scene_that_turns_blurred_dark_and_bright_is_followed() -> None:
    seen = Camera().watch(SCENE, blurred(SCENE), SCENE, darkened(SCENE), SCENE)
    assert said(seen) == [
        *("A new scene", "Steady"),
        *("Softer than the last", "The best of the last 5 s was sharper"),
        "Hold it: the best of the last 5 s",
        *("Darker than the last", "The best of the last 5 s was brighter"),
        "Hold it: the best of the last 5 s",
    ]
    codes = [change_of(each).code for each in seen]
    assert codes[10:15] == ["worse"] * 5
    assert codes[20:25] == ["better"] * 5
    assert {change_of(each).scene for each in seen} == {1}
    assert [change_of(each).best for each in seen] == [i // 10 % 2 == 0 for i in range(50)]


def test_what_was_said_before_a_change_does_not_outlive_it() -> None:
    seen = Camera().watch(SCENE, darkened(darkened(SCENE)), SCENE)
    codes = [each.instruction.code for each in seen]
    assert "more-light" not in codes[:10]
    assert set(codes[13:20]) == {"more-light"}
    assert "more-light" not in codes[23:]


def test_levels_follow_the_comparisons_and_not_the_scores() -> None:
    camera = Camera()
    engine = camera.watcher._engine
    judge, shift = engine.score, iter((0.0, 0.9, -0.9, 0.9))
    engine.score = lambda *a, **k: replace(judge(*a, **k), score=3.0 + next(shift))  # type: ignore[method-assign]
    seen = camera.watch(SCENE, each_s=0.8)
    assert [change_of(each).level for each in seen] == [3.0] * 4
    assert [change_of(each).code for each in seen] == ["new", *["steady"] * 3]


def test_another_scene_begins_anew() -> None:
    seen = Camera().watch(SCENE, scene_of(2), SCENE)
    changes = [change_of(each) for each in seen]
    assert [i for i, each in enumerate(changes) if each.code == "new"] == [0, 10, 20]
    assert [changes[i].scene for i in (0, 10, 20)] == [1, 2, 3]
    assert changes[10].text == "A new scene"


def test_the_best_of_long_ago_is_no_rival() -> None:
    seen = Camera().watch(SCENE, blurred(SCENE), each_s=BEST_S + 2.0)
    assert not change_of(seen[36]).best
    last = change_of(seen[-1])
    assert (last.best, last.code) == (True, "steady")
    late = Camera()
    late.watch(SCENE, each_s=0.2)
    late.clock.advance(1e3 * BEST_S)
    assert [change_of(each).code for each in late.watch(SCENE, each_s=0.2)] == ["new"]


def test_the_best_of_any_window_is_kept_and_no_more_than_may_be() -> None:
    camera = Camera(lambda pixels: 5.0 - 0.02 * camera.clock.seconds)  # it falls all the time
    scenes = camera.session.scenes
    camera.watch(SCENE, each_s=30.0)
    now_s = camera.clock.seconds
    whole = scenes.best(KEPT_S, now_s)
    newest = scenes.best(0.3, now_s)
    assert whole is not None
    assert newest is not None
    assert KEPT_S - 1.0 < now_s - whole.at_s <= KEPT_S
    assert now_s - newest.at_s <= 0.3
    assert whole.level > newest.level
    assert len(scenes._kept) <= MOST_KEPT
    assert scenes.best(KEPT_S, now_s + KEPT_S) is None


def test_bytes_of_kept_frames_are_bounded() -> None:
    session, engine = CameraSession(), FakeEngine(lambda pixels: 3.0)
    for number in range(40):
        plan = session.plan(SCENE, 0.1 * number)
        shot = engine.read_shot(SCENE)
        against = plan.rival and replace(engine.compare_shots(shot, shot), gap=-0.01 * number)
        session.scenes.take(plan, found(3.0), shot, against, bytes(4 << 20))
        assert session.scenes.kept_bytes <= MOST_KEPT_BYTES
    session.scenes.forget()
    assert session.scenes.kept_bytes == 0


def take_falling(session: CameraSession, tokens: int, looks: int, jpeg: bytes = b"") -> None:
    """Take looks, each a little worse than the last, of so many bytes of tokens."""
    engine = FakeEngine(lambda pixels: 3.0)
    for number in range(looks):
        plan = session.plan(SCENE, 0.2 * number)
        shot = replace(engine.read_shot(SCENE), tokens=np.zeros((tokens // 4, 1), np.float32))
        against = plan.rival and engine.compare_shots(shot, plan.rival.shot)
        worse = against and replace(against, gap=3.0 - 0.01 * number - plan.best.level)  # type: ignore[union-attr]
        session.scenes.take(plan, found(3.0), shot, worse, jpeg)


def test_tokens_are_counted_and_kept_of_those_that_can_be_rivals_only() -> None:
    session = CameraSession()
    take_falling(session, 4000, 50)
    kept = session.scenes._kept
    assert len(kept) == MOST_KEPT
    now_s = kept[-1].at_s
    assert {each.comparable for each in kept} == {True, False}
    assert all(each.comparable == (now_s - each.at_s <= BEST_S) for each in kept)
    assert session.scenes.kept_bytes == 4000 * sum(each.comparable for each in kept)
    new = session.plan(scene_of(2), now_s)
    session.scenes.take(new, found(3.0), kept[-1].shot, None)
    assert [each.comparable for each in session.scenes._kept[:-1]] == [False] * (MOST_KEPT - 1)


def test_large_tokens_go_before_frames_do() -> None:
    session = CameraSession()
    take_falling(session, 5 << 20, 15, bytes(1000))
    kept = session.scenes._kept
    assert session.scenes.kept_bytes <= MOST_KEPT_BYTES
    assert len(kept) == 15
    assert sum(each.comparable for each in kept) == 3
    assert kept[0].comparable
    assert kept[-1].comparable


def test_a_smaller_blurred_frame_right_after_the_best_does_not_replace_it() -> None:
    session, engine = CameraSession(), FakeEngine(perceived)
    for number, (pixels, share) in enumerate([(SCENE, 1.0), (blurred(SCENE), 0.5)]):
        plan = session.plan(pixels, 0.2 * number)
        plan = replace(plan, share=share, rival=None)  # none is as large
        shot = engine.read_shot(pixels)
        session.scenes.take(plan, found(shot.score), shot, None)
    best = session.scenes.best(BEST_S, 0.2)
    assert best is not None
    assert (best.share, best.at_s) == (1.0, 0.0)
    plan = replace(session.plan(SCENE, 0.4), share=0.5, rival=session.scenes._kept[1])
    slightly = replace(engine.compare_shots(shot, shot), gap=-0.0)
    session.scenes.take(plan, found(3.0), shot, slightly)
    assert [(each.share, each.at_s) for each in session.scenes._kept] == [(1.0, 0.0), (0.5, 0.4)]


def test_a_smaller_look_is_the_best_only_if_the_whole_was_no_better() -> None:
    session, engine = CameraSession(), FakeEngine(perceived)
    told = []
    for number, (pixels, share) in enumerate(
        [(SCENE, 1.0)] * 5 + [(blurred(SCENE), 1.0)] * 5 + [(blurred(SCENE), 0.5)] * 5
    ):
        plan = session.plan(pixels, 0.2 * number)
        as_large = [e for e in session.scenes.rivals(plan.stats, plan.at_s) if e.share == share]
        plan = replace(plan, share=share, rival=as_large[0] if as_large else None)
        shot = engine.read_shot(pixels)
        against = plan.rival and engine.compare_shots(shot, plan.rival.shot)
        told.append(session.scenes.take(plan, found(shot.score), shot, against))
    assert [each is None for each in told] == [i == 10 for i in range(15)]  # none is as large
    assert [each.best for each in told if each] == [True] * 5 + [False] * 9
    assert {each.scene for each in told if each} == {1}
    levels = [each.level for each in told if each]
    assert levels[9:] == pytest.approx([levels[8]] * 5)  # carried on from the larger looks


def test_a_full_look_without_a_description_does_not_stand_and_is_tried_again() -> None:
    session, tried = CameraSession(), []
    for number in range(200):
        plan = session.plan(SCENE, 0.1 * number)
        hurried = replace(found(3.0), degraded=("no summary",))
        session.advise(plan, hurried, 0.1 * number + 0.05)
        assert not session.stands
        if plan.kind == "full":
            tried.append(round(plan.at_s))
    gaps = np.diff(tried)
    assert len(tried) >= 3
    assert (np.diff(gaps) > 0).all()  # ever more seldom, so that the others keep their pace
    session.advise(replace(plan, kind="full"), found(3.0, SUMMARY), 20.0)
    assert session.stands


class SizedModel(FakeModel):
    """A model that takes the longer to see a picture, the larger it is."""

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        self._spend("encode", pixels.shape[0] * pixels.shape[1] - 1)
        return super().encode(pixels)


@pytest.fixture(scope="module")
def remembered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a memory made by a `FakeModel`."""
    return fake_anchors(tmp_path_factory.mktemp("fake") / "anchors")


def kept_rates(
    remembered: Path, fps: float, slower: Iterable[float]
) -> tuple[list[float], list[list[Judged]]]:
    """Watch for ten seconds at each speed of an engine; give looks a second, and the looks."""
    clock = FakeClock()
    whole_ms = {"encode": 60.0 / 128**2, "prefill": 15.0, "grade": 2.0, "token": 3.0, "pair": 2.0}
    model = SizedModel(clock=clock, ms=whole_ms)
    engine = fake_engine(model, remembered, clock)
    engine.scorer.costs()
    turns = Turns(fps, clock, lambda seconds: clock.advance(1e3 * seconds))
    watcher = Watcher(engine, CameraSession(30.0, neighbours=8), 2e3, turns, clock)
    noise = np.random.default_rng(1)
    frames = (SCENE[:128, :128] ^ noise.integers(0, 4, (128, 128, 3), np.uint8) for _ in count())
    rates, seen = [], []
    for factor in slower:
        model.ms = {name: factor * ms for name, ms in whole_ms.items()}
        began_s, looks = clock.seconds, []
        for pixels in turns.pace(frames):
            looks.append(watcher.judge(pixels))
            if clock.seconds - began_s >= 10.0:
                break
        rates.append(len(looks) / (clock.seconds - began_s))
        seen.append(looks)
    return rates, seen


def test_a_rate_is_kept_with_whatever_fits(remembered: Path) -> None:
    rates, seen = kept_rates(remembered, 5.0, (0.5, 1.0, 2.0, 4.0, 1.0))
    assert rates == pytest.approx([5.0] * 5, rel=0.05)
    settled = [looks[len(looks) // 2 :] for looks in seen]
    described = [sum(each.found.summary is not None for each in looks) for looks in settled]
    neighbours = [np.mean([len(each.found.neighbours) for each in looks]) for looks in settled]
    shares = [float(np.median([each.plan.share for each in looks])) for looks in settled]
    assert described[0] == len(settled[0])
    assert described[2:4] == [0, 0]
    assert neighbours[:2] == [8.0, 8.0]
    assert neighbours[3] < 8
    assert shares == [*sorted(shares[:4], reverse=True), 1.0]
    assert shares[0] == 1.0
    assert shares[3] == SHARES[-1]  # even the least look at the whole would be too long
    assert all(each.change is not None for looks in settled for each in looks)


def test_no_more_looks_than_are_asked_for(remembered: Path) -> None:
    rates, _ = kept_rates(remembered, 1.0, (0.1, 1.0))
    assert rates == pytest.approx([1.0] * 2, rel=0.1)


def test_what_cannot_be_kept_falls_behind_without_making_up(remembered: Path) -> None:
    rates, seen = kept_rates(remembered, 20.0, (8.0, 0.1))
    assert 2.0 < rates[0] < 8.0
    assert rates[1] == pytest.approx(20.0, rel=0.05)
    assert {each.plan.share for each in seen[0][5:]} == {SHARES[-1]}
