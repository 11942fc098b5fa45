"""A running camera: which of its frames are scored, in full or fast, and the frames themselves.

`CameraSession` waits for nothing, reads no clock and knows no model: `/v1/live` and the `Watcher`
of `meiqa camera` ask it about every frame and tell it what came of it. Its times are in seconds on
any clock that does not go back. `Capture` gives the frames of a device or of a video file, by PyAV
(BSD; its wheels bring FFmpeg, LGPL), on x86-64 and on ARM.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.budget import CostEstimate
from meiqa.engine.engine import Engine
from meiqa.engine.images import SMALLEST_SIDE
from meiqa.engine.measures import measure_attributes
from meiqa.engine.sets import Candidate
from meiqa.engine.shots import ALIKE, likenesses, view_of
from meiqa.errors import UsageError
from meiqa.serve.guidance import (
    STILL,
    Adviser,
    Change,
    Direction,
    Evidence,
    Instruction,
    change_text,
)
from meiqa.types import Assessment, Budget, ShotComparison

T = TypeVar("T")
FAST_NEIGHBOURS = 8
"""Neighbours of the fast path at most; fewer where the package has fewer."""
RATE_HZ = 6.0
"""Answers a second that the pace is made for, where the camera has as many frames."""
LEAST_MS, MOST_MS, SLOWEST_MS = 50.0, 400.0, 1000.0
"""Budgets of the fast path, and the most where the service needs more."""
_GAP_S = 1.0
"""A pause longer than this is somebody's, not the network's."""
_BESIDE_MS = 20.0
_STILL_S = 0.4
"""How long a camera is held still before a frame is assessed in full."""
_OTHER_SCENE = 8.0
"""Grey levels by which a scene differs from the one that was assessed in full."""
_OTHER_SCORE = 0.3
"""Change of the fast score by which the full one is out of date."""
_FULL_LASTS_S = 20.0
_AGAIN_S, _AGAIN_MOST_S = 1.0, 16.0
"""When a frame is tried in full again that there was no time to describe, and at the latest."""
BEST_S, KEPT_S = 5.0, 10.0
"""How far back a frame's rival may lie, and how long the best frames are kept."""
MOST_KEPT, MOST_KEPT_BYTES = 20, 16 << 20
"""Of frames, and of bytes of them and their tokens; two stay, however large."""
SHARES = (1.0, 0.5, 0.25)
"""Of the pixels that a model looks at, those that a look may have where time is short."""
_ROOM = 0.85
"""Share of a turn that a larger look than the last has to fit into."""
_MOMENT_S, _NOW_S = 1.0, 0.5
"""How long ago "the last" is, since changes of a camera take about as long; and over how much of
the time looks are averaged, then and now."""
_UNSEEN = 1.5
"""Deviations of a comparison within a scene by which frames are told apart of which nothing that is
measured differs: the more that does, the smaller a gap counts."""
_NOISE_GAIN = 20.0
"""Variance that white noise of variance 1 has behind the Laplacian."""
_LEAST_CRISP = 0.02
"""Share of the Laplacian's variance that is taken to be none of noise's, at the least."""
_LIGHT, _CRISPNESS, _NOISE = 0.3, 0.7, 2.0
"""Differences that are seen: in doublings, in log units, in grey levels."""
_LITTLE, _FULL_DIFFERENCE = 0.5, 4.0
"""Of such a difference, what is not seen, and that beyond which more makes nothing worse."""
_SIZE, _MEASURED = (32, 24), (512, 512)
_OPENING_S = 10.0


@dataclass(frozen=True, eq=False)
class FrameStats:
    """What a frame tells without a model."""

    cells: NDArray[np.float32]  # (24, 32) mean grey of as many parts of the frame, 0-255
    measured: dict[str, float]  # by `meiqa.engine.measures`, where no side is longer than 512
    view: NDArray[np.float32]  # what it shows; see `meiqa.engine.shots`

    @property
    def light(self) -> float:
        """Exposure in doublings of the grey level."""
        return math.log2(1.0 + self.measured["exposure"])

    @property
    def crispness(self) -> float:
        """How much of the picture is fine: neither light nor noise changes it (log of a ratio)."""
        fine = math.expm1(self.measured["sharpness"])
        fine = max(fine - _NOISE_GAIN * self.measured["noise"] ** 2, _LEAST_CRISP * fine)
        return math.log((1.0 + fine) / (1.0 + float(np.square(self.view).mean())))


def frame_stats(pixels: NDArray[np.uint8]) -> FrameStats:
    """Measure a frame (H, W, 3)."""
    image = Image.fromarray(pixels)
    cells = np.asarray(image.convert("L").resize(_SIZE, Image.Resampling.BOX), np.float32)
    view = view_of(pixels)
    image.thumbnail(_MEASURED)
    return FrameStats(cells, measure_attributes(np.asarray(image)), view)


_DIFFERENCES = (("darker", "brighter"), ("softer", "sharper"), ("less noisy", "noisier"))


def differences(before: FrameStats, after: FrameStats) -> NDArray[np.float64]:
    """Tell how much more light, crispness and noise there is; from 1 on, or -1, it is seen."""
    light = after.light - before.light
    crispness = after.crispness - before.crispness
    noise = after.measured["noise"] - before.measured["noise"]
    return np.array([light / _LIGHT, crispness / _CRISPNESS, noise / _NOISE])


def difference(before: FrameStats, after: FrameStats) -> tuple[str | None, float]:
    """Name what differs most between two frames of a scene, as "sharper", and tell how much."""
    seen = differences(before, after)
    most = int(np.abs(seen).argmax())
    size = float(abs(seen[most]))
    return _DIFFERENCES[most][int(seen[most] > 0)] if size >= 1.0 else None, size


def approach(best: FrameStats, before: FrameStats, after: FrameStats) -> float:
    """Tell by how much a scene comes nearer to the look of its best frame, or goes farther (< 0).

    It is 0 where it comes nearer in one thing and goes farther in another.
    """
    was, now = (
        np.minimum(np.abs(differences(best, each)), _FULL_DIFFERENCE) for each in (before, after)
    )
    nearer = was - now
    one_way = (nearer > -_LITTLE).all() or (nearer < _LITTLE).all()
    return float(nearer.sum()) if one_way else 0.0


def same_scene(one: FrameStats, other: FrameStats) -> bool:
    """Tell whether two frames show the same; one in which nothing can be told is of any scene."""
    alike = likenesses([one.view, other.view], [one.view, other.view])
    shows = np.diag(alike) > ALIKE
    return bool(alike[0, 1] >= ALIKE or not shows.all())


def motion_between(before: FrameStats, after: FrameStats) -> float:
    """Tell how far the picture moved, in grey levels: the mean change of a cell.

    What all cells have in common is left out: a camera that sets its exposure does not move.
    """
    change = after.cells - before.cells
    return float(np.abs(change - np.median(change)).mean())


class Pacer:
    """Fit the budget of a frame to the frame rate.

    What the network and the camera are seen to add to an assessment is taken off the time from one
    frame to the next. Where a service is too busy, or a machine too slow, for what is left, frames
    become fewer: it is given what it asks for.
    """

    def __init__(self, camera_hz: float | None = None) -> None:
        rate = RATE_HZ if not camera_hz else min(RATE_HZ, max(1.0, camera_hz))
        self._turn_ms = 1e3 / rate
        self._beside = CostEstimate(_BESIDE_MS)
        self._needed_ms = LEAST_MS

    @property
    def budget_ms(self) -> float:
        """Milliseconds for the next frame."""
        return max(self._needed_ms, min(MOST_MS, self._turn_ms - self._beside.expected))

    def refused(self, late_ms: float) -> None:
        """Learn that an answer would have come so much too late."""
        self._needed_ms = min(SLOWEST_MS, 1.1 * (self.budget_ms + late_ms))

    def answered(self) -> None:
        """Learn that there was time enough: a little less may do next time."""
        self._needed_ms = max(LEAST_MS, 0.95 * self._needed_ms)

    def idle(self, seconds: float) -> None:
        """Learn how long it took from a score to the next frame."""
        if 0.0 <= seconds <= _GAP_S:
            self._beside.observe(1e3 * seconds)


@dataclass(frozen=True, eq=False)
class FramePlan:
    """How a frame is to be scored: in full, since the camera is held still, or fast."""

    kind: Literal["fast", "full"]
    budget_ms: float | None  # of the fast path; None, like k, for everything
    k: int | None
    motion: float | None  # since the frame before, in grey levels; None of the first
    still: bool
    at_s: float
    stats: FrameStats
    best: Look | None = None  # frame of late of its scene; None of a new one
    rival: Look | None = None  # the best comparable one that is as large, if any
    share: float = 1.0  # of the pixels that the model looks at


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame that took its place among those of its scene.

    `level` is its score as comparisons within the scene have it: that of the scene's first frame,
    and the gaps since.
    """

    at_s: float
    level: float
    stats: FrameStats


@dataclass(frozen=True, eq=False)
class Look(Seen):
    """One that others may be compared with; `jpeg` is it itself, where somebody may ask for it."""

    scene: int
    share: float
    found: Assessment
    shot: Candidate
    jpeg: bytes = field(default=b"", repr=False)

    @property
    def comparable(self) -> bool:
        """Whether the tokens are still there that a comparison takes."""
        return self.shot.tokens.size > 0

    @property
    def nbytes(self) -> int:
        """Bytes of the frame and of its tokens."""
        return len(self.jpeg) + self.shot.tokens.nbytes

    def without_tokens(self) -> Look:
        """Give what is left of it once nothing is compared with it any more."""
        return replace(self, shot=replace(self.shot, tokens=np.zeros((0, 0), np.float32)))


class Scenes:
    """Which scene the camera sees, and the best of its frames.

    A frame belongs to the scene of the best frame of the last 5 s as long as both show the same
    (`same_scene`); otherwise, or if there is none, a new scene begins with it. A frame that a later
    one of its size, compared with its rival, equals or beats is let go: the best of any stretch up
    to now is still there, or where they are too many, one from shortly before or after it.
    """

    def __init__(self) -> None:
        self._scene = 0
        self._kept: list[Look] = []  # oldest first
        self._recent: list[Seen] = []  # of this scene, and of the last 5 s

    @property
    def kept_bytes(self) -> int:
        """Bytes of the frames that are kept, and of what the model sees of them."""
        return sum(each.nbytes for each in self._kept)

    def rivals(self, stats: FrameStats, at_s: float) -> list[Look]:
        """Give frames of late of the scene that a frame belongs to, best first; none of a new one.

        One may be there of which the tokens were too many, and so not `comparable`.
        """
        late = [each for each in self._kept if self._is_late(each, at_s)]
        late.sort(key=_level, reverse=True)
        return late if late and same_scene(late[0].stats, stats) else []

    def best(self, seconds: float, now_s: float) -> Look | None:
        """Give the best frame of the last seconds, up to 10, of whatever scene."""
        late = (each for each in self._kept if now_s - each.at_s <= seconds)
        return max(late, key=_level, default=None)

    def take(
        self,
        plan: FramePlan,
        found: Assessment,
        shot: Candidate,
        against: ShotComparison | None,
        jpeg: bytes = b"",
    ) -> Change | None:
        """Give a frame its place, and say what changed.

        Nothing can be said of a frame without a rival in a scene that goes on: its level is taken
        to be that of the one before, and no frame is let go for it.
        """
        change, level = None, found.score
        if plan.best is None:
            self._scene, self._recent = self._scene + 1, []
            change = Change("new", "A new scene", level, True, self._scene)
        elif plan.rival is None or against is None:
            level = self._recent[-1].level
        else:
            level = plan.rival.level + against.gap
            seen = Seen(plan.at_s, level, plan.stats)
            change = self._change(seen, plan.best, against.std)
        self._recent = [each for each in self._recent if plan.at_s - each.at_s <= BEST_S]
        self._recent.append(Seen(plan.at_s, level, plan.stats))
        look = Look(plan.at_s, level, plan.stats, self._scene, plan.share, found, shot, jpeg)
        if against is not None:
            self._let_go_of_beaten(look)
        self._keep(look)
        return change

    def forget(self) -> None:
        """Let go of all frames."""
        self._kept, self._recent = [], []

    def _change(self, seen: Seen, top: Look, std: float) -> Change:
        """Compare a look with that of a moment ago, and with the best and the worst of late."""
        past = [each for each in self._recent if seen.at_s - each.at_s >= _MOMENT_S]
        then = past or self._recent[:1]
        before = then[-1]
        gaps = seen.level - before.level, _mean_level([*self._recent, seen]) - _mean_level(then)
        differs, by = difference(before.stats, seen.stats)
        moved = 0.0 if gaps[0] * gaps[1] < 0 else min(gaps, key=abs)
        if abs(moved) <= _told(by, std):
            moved = 0.0
        best = not _is_behind(seen, top, std)
        if not best and _is_behind(before, top, std):
            # Of two that are both far from good, the look of the best says more than a gap.
            nearer = approach(top.stats, before.stats, seen.stats)
            moved = nearer if abs(nearer) >= 1.0 else moved
        code: Direction = "better" if moved > 0 else "worse" if moved < 0 else "steady"
        worst = min(each.level for each in self._recent)
        lacks, _ = difference(seen.stats, top.stats)
        text = change_text(code, best, seen.level - worst > std, differs, lacks)
        return Change(code, text, seen.level, best, self._scene)

    def _is_late(self, look: Look, at_s: float) -> bool:
        """Tell whether a frame of that time may still have this one for a rival."""
        return look.scene == self._scene and at_s - look.at_s <= BEST_S

    def _let_go_of_beaten(self, look: Look) -> None:
        self._kept = [
            each for each in self._kept if each.share != look.share or each.level > look.level
        ]

    def _keep(self, look: Look) -> None:
        self._kept = [
            each if self._is_late(each, look.at_s) else each.without_tokens()
            for each in self._kept
            if look.at_s - each.at_s <= KEPT_S
        ]
        self._kept.append(look)
        while len(self._kept) > 2 and not self._fits():
            self._thin()

    def _fits(self) -> bool:
        return len(self._kept) <= MOST_KEPT and self.kept_bytes <= MOST_KEPT_BYTES

    def _thin(self) -> None:
        """Let go of the tokens of a look, or of a look: neither of the best nor of the newest.

        It is the one whose neighbours are nearest: its stretch loses least.
        """
        best = max(self._kept, key=_level)
        spare = [i for i, each in enumerate(self._kept[:-1]) if each is not best]
        comparable = [i for i in spare if self._kept[i].comparable]
        if comparable and len(self._kept) <= MOST_KEPT:
            least = min(comparable, key=self._stretch_s)
            self._kept[least] = self._kept[least].without_tokens()
        else:
            del self._kept[min(spare, key=self._stretch_s)]

    def _stretch_s(self, i: int) -> float:
        return self._kept[i + 1].at_s - self._kept[max(i - 1, 0)].at_s


def _level(look: Look) -> float:
    return look.level


def _mean_level(looks: Sequence[Seen]) -> float:
    """Give the mean level of the last of some looks."""
    levels = [each.level for each in looks if looks[-1].at_s - each.at_s < _NOW_S]
    return sum(levels) / len(levels)


def _is_behind(seen: Seen, rival: Seen, std: float) -> bool:
    """Tell whether a frame is seen to be worse than another of its scene."""
    return rival.level - seen.level > _told(difference(seen.stats, rival.stats)[1], std)


def _told(by: float, std: float) -> float:
    """Give the gap from which on frames are told apart that differ so much; see `difference`."""
    return _UNSEEN * std / (1.0 + by)


class CameraSession:
    """One camera, from its first frame to its last.

    Args:
        camera_hz: frames a second that it gives, if that is known.
        neighbours: those that the package compares with.

    Attributes:
        scenes: what was seen; fit: what of a look fits where a rate is to be kept.
    """

    def __init__(
        self, camera_hz: float | None = None, *, neighbours: int = FAST_NEIGHBOURS
    ) -> None:
        self._pacer = Pacer(camera_hz)
        self._k = min(FAST_NEIGHBOURS, neighbours)
        self._adviser = Adviser()
        self.scenes, self.fit = Scenes(), Fit()
        self._again_s, self._tried_s = _AGAIN_S, -math.inf
        self._last: FrameStats | None = None
        self._way = "steady"
        self._scored_s = math.nan
        self._still_since_s: float | None = None
        self._full: _Full | None = None

    def plan(
        self, pixels: NDArray[np.uint8], at_s: float, left_ms: float | None = None
    ) -> FramePlan:
        """Take up a frame (H, W, 3).

        Args:
            left_ms: all that there is for it, where a rate is to be kept.
        """
        self._pacer.idle(at_s - self._scored_s)
        stats = frame_stats(pixels)
        motion = None if self._last is None else motion_between(self._last, stats)
        self._last = stats
        still = motion is not None and motion < STILL
        if not still:
            self._still_since_s = None
        elif self._still_since_s is None:
            self._still_since_s = at_s
        if self._full is not None and self._full.is_outdated(stats, at_s):
            self._full = None
        held_s = 0.0 if self._still_since_s is None else at_s - self._still_since_s
        share = 1.0 if left_ms is None else self.fit.share(left_ms)
        rivals = self.scenes.rivals(stats, at_s)
        rival = next((each for each in rivals if each.share == share and each.comparable), None)
        best = rivals[0] if rivals else None
        plan = FramePlan("full", None, None, motion, still, at_s, stats, best, rival, share)
        due = self._full is None and at_s - self._tried_s >= self._again_s
        plan = plan if due and held_s >= _STILL_S else self._fast(plan)
        if left_ms is None:
            return plan
        return replace(plan, budget_ms=max(1.0, left_ms - self.fit.comparing.careful))

    def replan(self, plan: FramePlan, late_ms: float) -> FramePlan:
        """Give a frame, for which there was too little time, as much as it takes."""
        self._pacer.refused(late_ms)
        return self._fast(plan)

    def _fast(self, plan: FramePlan) -> FramePlan:
        return replace(plan, kind="fast", budget_ms=self._pacer.budget_ms, k=self._k)

    def advise(
        self, plan: FramePlan, found: Assessment, scored_s: float, change: Change | None = None
    ) -> Instruction:
        """Say what to do after a frame was scored.

        Args:
            scored_s: when it was; what follows until the next frame is not in its budget.
            change: since a moment ago: what was said before does not stand.
        """
        self._scored_s = scored_s
        if change is not None and change.code != self._way:
            self._way = change.code
            if change.code != "steady":
                self._adviser.release()
                self._full = None
        if plan.kind == "full":
            self._take_full(plan, found)
        else:
            self._pacer.answered()
            if self._full is not None and self._full.is_contradicted(found.score):
                self._full = None
        full = None if self._full is None else self._full.found
        evidence = Evidence(
            score=(full or found).score,
            motion=plan.motion,
            measured=plan.stats.measured,
            words=(full and (full.reflection or full.summary)) or "",
            distortions=found.distortions,
            detail=found.detail,
        )
        return self._adviser.advise(evidence, plan.at_s)

    def _take_full(self, plan: FramePlan, found: Assessment) -> None:
        """Let a full assessment stand, unless there was no time to describe: then try again."""
        if "no summary" in found.degraded:
            self._tried_s, self._again_s = plan.at_s, min(2 * self._again_s, _AGAIN_MOST_S)
        else:
            self._full = _Full(found, plan.stats, plan.at_s)
            self._tried_s, self._again_s = -math.inf, _AGAIN_S

    @property
    def stands(self) -> bool:
        """Whether the last full assessment still holds: same scene, and no other score since."""
        return self._full is not None


@dataclass(eq=False)
class _Full:
    """A full assessment, and the scene that it is of."""

    found: Assessment
    stats: FrameStats
    at_s: float
    fast_score: float | None = None

    def is_outdated(self, stats: FrameStats, at_s: float) -> bool:
        differs = float(np.abs(stats.cells - self.stats.cells).mean())
        return differs > _OTHER_SCENE or at_s - self.at_s > _FULL_LASTS_S

    def is_contradicted(self, fast_score: float) -> bool:
        """Whether the fast score has moved since the first one after this."""
        if self.fast_score is None:
            self.fast_score = fast_score
        return abs(fast_score - self.fast_score) > _OTHER_SCORE


class Fit:
    """What of a look fits into a turn, by what earlier ones took."""

    def __init__(self) -> None:
        self._read, self._rest = CostEstimate(), CostEstimate()
        self.comparing = CostEstimate()
        self._share = SHARES[0]

    def share(self, left_ms: float) -> float:
        """Give the largest share of the pixels that there is time to read."""
        for share in SHARES:
            takes_ms = share * self._read.careful + self._rest.careful + self.comparing.careful
            if takes_ms <= (left_ms if share <= self._share else _ROOM * left_ms):
                break
        self._share = share
        return share

    def learn(self, found: Assessment, share: float) -> None:
        """Take a look just done as a measure of the next ones; what a budget shortens is left out.

        A frame that looks exactly like an earlier one was not read, and teaches nothing.
        """
        ms = found.timings_ms
        if not found.counters.get("photo_cache_hits"):
            self._read.observe(ms.get("read", 0.0) / share)
            elastic_ms = sum(ms.get(stage, 0.0) for stage in ("read", "describe", "compare"))
            self._rest.observe(ms["total"] - elastic_ms)


class Turns:
    """Gives so many turns a second; one that was missed is not made up for.

    Args:
        fps: turns a second.
        clock: seconds; sleep: lets so many of them pass.
    """

    def __init__(
        self,
        fps: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._turn_s, self._clock, self._sleep = 1.0 / fps, clock, sleep
        self._due_s = clock()

    @property
    def left_ms(self) -> float:
        """Milliseconds until the next turn."""
        return 1e3 * (self._due_s - self._clock())

    def pace(self, frames: Iterable[T]) -> Iterator[T]:
        """Give the frame that is there at each turn."""
        following = iter(frames)
        while True:
            late_s = self._clock() - self._due_s
            if late_s < 0:
                self._sleep(-late_s)
            self._due_s += self._turn_s if late_s < self._turn_s else late_s + self._turn_s
            frame = next(following, None)
            if frame is None:
                return
            yield frame


@dataclass(frozen=True, eq=False)
class Judged:
    """What came of a frame; `change` is None where it was not compared."""

    plan: FramePlan
    found: Assessment
    change: Change | None
    instruction: Instruction

    @property
    def level(self) -> float:
        """Its score beside the other frames of its scene."""
        return self.found.score if self.change is None else self.change.level


class Watcher:
    """Judges the frames of a camera with an engine of its own.

    Args:
        full_ms: for a frame that is assessed in full.
        turns: where a rate is to be kept, with whatever looks fit.
    """

    def __init__(
        self,
        engine: Engine,
        session: CameraSession,
        full_ms: float,
        turns: Turns | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self._engine, self._full_ms = engine, full_ms
        self._turns, self._clock = turns, clock

    def judge(self, pixels: NDArray[np.uint8]) -> Judged:
        """Assess a frame (H, W, 3), compare it with the best of its scene, and say what to do.

        Raises:
            ImageError: it can't be judged.
        """
        left_ms = None if self._turns is None else self._turns.left_ms
        plan = self.session.plan(pixels, self._clock(), left_ms)
        shown, most = pixels, self._engine.model.image.max_pixels
        if plan.share < 1.0:
            shown = shrunk(pixels, plan.share * most)
        budget = Budget(ms=plan.budget_ms or self._full_ms)
        found = self._engine.score(shown, budget=budget, k=plan.k, learn=False)
        scored_s = self._clock()
        self.session.fit.learn(found, plan.share)
        change = self._compare(plan, shown, found)
        return Judged(plan, found, change, self.session.advise(plan, found, scored_s, change))

    def _compare(
        self, plan: FramePlan, shown: NDArray[np.uint8], found: Assessment
    ) -> Change | None:
        """Compare a frame with its rival, unless its turn ends before."""
        comparing = self.session.fit.comparing
        if self._turns is not None and self._turns.left_ms < comparing.careful:
            return None
        began_s = self._clock()
        shot = self._engine.read_shot(shown)
        against = None
        if plan.rival is not None:
            against = self._engine.compare_shots(shot, plan.rival.shot)
            comparing.observe(1e3 * (self._clock() - began_s))
        return self.session.scenes.take(plan, found, shot, against)


def shrunk(pixels: NDArray[np.uint8], most: float) -> NDArray[np.uint8]:
    """Give a frame (H, W, 3) of at most so many pixels."""
    height, width = pixels.shape[:2]
    if height * width <= most:
        return pixels
    scale = math.sqrt(most / (height * width))
    size = max(SMALLEST_SIDE, round(scale * width)), max(SMALLEST_SIDE, round(scale * height))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


@dataclass(frozen=True, eq=False)
class CapturedFrame:
    """A frame (H, W, 3), upright, and the number of those before it that nobody took."""

    pixels: NDArray[np.uint8]
    at_s: float  # since the first frame
    dropped: int


class Capture:
    """A camera, or a file that is played at its own speed; a context manager and an iterable.

    Args:
        source: the path of a V4L2 device or of a video file.
        live: whether it is a device.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        UsageError: the source can't be opened, or has no pictures.
    """

    def __init__(self, source: str | Path, *, live: bool) -> None:
        import av

        self._source, self._live = source, live
        try:
            self._container = av.open(
                str(source), format="v4l2" if live else None, timeout=(_OPENING_S, None)
            )
        except (OSError, ValueError, av.FFmpegError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UsageError(
                f"{source} can't be opened as a {'camera' if live else 'video'}: {reason}",
                allowed=_devices() if live else None,
                hint="or play a file: --video FILE" if live else "choose a video file",
            ) from None
        if not self._container.streams.video:
            self._container.close()
            raise UsageError(f"{source} has no pictures", hint="choose a video file")
        self._changed = threading.Condition()
        self._newest: Any = None
        self._dropped, self._ended = 0, False
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)

    @property
    def rate_hz(self) -> float | None:
        """Frames a second that it announces."""
        rate = self._container.streams.video[0].average_rate
        return None if not rate else float(rate)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        self._container.close()

    def __iter__(self) -> Iterator[CapturedFrame]:
        """Give the newest frame, each at most once, until there are no more.

        Raises:
            UsageError: it broke off.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ended)
                (frame, at_s), self._newest = self._newest or (None, 0.0), None
            if frame is None:
                break
            pixels = frame.to_ndarray(format="rgb24")
            turned = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
            yield CapturedFrame(turned, at_s, self._dropped)
        if self._failed is not None:
            raise UsageError(f"{self._source} broke off: {self._failed}", hint="is it damaged?")

    def _read(self) -> None:
        began_s: float | None = None
        try:
            for frame in self._container.decode(video=0):
                now_s = time.monotonic()
                began_s = now_s if began_s is None else began_s
                due_s = now_s - began_s if self._live else float(frame.time or 0.0)
                if not self._keep(frame, due_s, due_s - (now_s - began_s)):
                    return
        except Exception as error:  # whatever a damaged file makes of a decoder
            self._failed = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _keep(self, frame: Any, at_s: float, early_s: float) -> bool:
        """Keep a frame once its time has come; False when nobody wants any more."""
        with self._changed:
            if early_s > 0:
                self._changed.wait_for(lambda: self._ended, early_s)
            if self._ended:
                return False
            self._dropped += self._newest is not None
            self._newest = frame, at_s
            self._changed.notify_all()
            return True


def _devices() -> str:
    """Name the cameras that are plugged in."""
    found = ", ".join(sorted(map(str, Path("/dev").glob("video*"))))
    return f"{found}, which no other program uses" if found else "a camera, and none is plugged in"
