"""What to do with the frames of a running camera: which get a full assessment, and what each costs.

Nothing here waits, reads a clock or knows a model: `meiqa.serve.live` and `meiqa camera` ask it
about every frame and tell it what came of it. Times are in seconds on any clock that does not go
back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meiqa.serve.frames import Glance, glance_at, motion_between
from meiqa.serve.guidance import STILL, Adviser, Evidence, Instruction, described
from meiqa.types import Assessment

__all__ = ["FAST_NEIGHBOURS", "Pacer", "View", "Viewing"]

FAST_NEIGHBOURS = 8
RATE_HZ = 6.0
"""Answers a second that the pace is made for, where the camera has as many frames."""
LEAST_MS, MOST_MS = 50.0, 400.0
"""Budgets of the fast path, where the service does not need more."""
SLOWEST_MS = 1000.0
"""The most that it is given where it does."""
_GAP_S = 1.0
"""A pause longer than this is somebody's, not the network's."""
_STILL_S = 0.4
"""How long a camera is held still before a frame is assessed in full."""
_OTHER_SCENE = 8.0
"""Grey levels by which a scene differs from the one that was assessed in full."""
_OTHER_SCORE = 0.3
"""Change of the fast score by which the full one is out of date."""
_FULL_LASTS_S = 20.0


class Pacer:
    """Fits the budget of a frame to the frame rate.

    A turn is everything from one frame to the next: the assessment, and what the network and the
    camera add. What they are seen to add is taken off the time of a turn. Where a service is too
    busy, or a machine too slow, for that, frames become fewer: it is given what it asks for.

    Args:
        camera_hz: frames a second that the camera gives, if that is known.
    """

    _WEIGHT = 0.25

    def __init__(self, camera_hz: float | None = None) -> None:
        rate = RATE_HZ if not camera_hz else min(RATE_HZ, max(1.0, camera_hz))
        self._turn_ms = 1e3 / rate
        self._beside_ms = 20.0
        self._needed_ms = LEAST_MS

    @property
    def budget_ms(self) -> float:
        """Milliseconds for the next frame."""
        return max(self._needed_ms, min(MOST_MS, self._turn_ms - self._beside_ms))

    def refused(self, late_ms: float) -> None:
        """Learn that an answer would have come so much too late."""
        self._needed_ms = min(SLOWEST_MS, 1.1 * (self.budget_ms + late_ms))

    def answered(self) -> None:
        """Learn that there was time enough: a little less may do next time."""
        self._needed_ms = max(LEAST_MS, 0.95 * self._needed_ms)

    def idle(self, seconds: float) -> None:
        """Learn how long it took from an answer to the next frame."""
        if 0.0 <= seconds <= _GAP_S:
            self._beside_ms += self._WEIGHT * (1e3 * seconds - self._beside_ms)


@dataclass(frozen=True, eq=False)
class View:
    """A frame that is to be assessed.

    Attributes:
        kind: "full" with everything, since the camera is held still; "fast" without text.
        budget_ms: of the fast path.
        motion: since the frame before, in grey levels; None of the first.
        still: whether the camera is held still.
        at_s: when the frame came.
    """

    kind: Literal["fast", "full"]
    budget_ms: float
    motion: float | None
    still: bool
    at_s: float
    glance: Glance


class Viewing:
    """One camera, from its first frame to its last."""

    def __init__(self, camera_hz: float | None = None) -> None:
        self._pacer = Pacer(camera_hz)
        self._adviser = Adviser()
        self._last: Glance | None = None
        self._answered_s = math.nan
        self._still_since_s: float | None = None
        self._full: _Full | None = None

    def look(self, pixels: NDArray[np.uint8], at_s: float) -> View:
        """Take up a frame (H, W, 3)."""
        self._pacer.idle(at_s - self._answered_s)
        glance = glance_at(pixels)
        motion = None if self._last is None else motion_between(self._last, glance)
        self._last = glance
        still = motion is not None and motion < STILL
        if not still:
            self._still_since_s = None
        elif self._still_since_s is None:
            self._still_since_s = at_s
        if self._full is not None and self._full.is_outdated(glance, at_s):
            self._full = None
        kind: Literal["fast", "full"] = "full" if self._wants_full(at_s) else "fast"
        return View(kind, self._pacer.budget_ms, motion, still, at_s, glance)

    def advise(self, view: View, found: Assessment, answered_s: float) -> Instruction:
        """Say what to do after a frame was assessed.

        Args:
            answered_s: when the answer is given.
        """
        self._answered_s = answered_s
        if view.kind == "fast":
            self._pacer.answered()
        if view.kind == "full":
            self._full = _Full(found, view.glance, view.at_s)
        elif self._full is not None and self._full.is_contradicted(found.score):
            self._full = None
        evidence = Evidence(
            score=found.score if self._full is None else self._full.found.score,
            motion=view.motion,
            brightness=view.glance.brightness,
            blown_out=view.glance.blown_out,
            words="" if self._full is None else described(self._full.found),
            distortions=found.distortions,
        )
        return self._adviser.advise(evidence, view.at_s)

    def refused(self, view: View, late_ms: float) -> View:
        """Give a frame, for which there was too little time, as much as it takes."""
        self._pacer.refused(late_ms)
        return replace(view, kind="fast", budget_ms=self._pacer.budget_ms)

    @property
    def stands(self) -> bool:
        """Whether the last full assessment still holds: same scene, and no other score since."""
        return self._full is not None

    def _wants_full(self, at_s: float) -> bool:
        if self._full is not None or self._still_since_s is None:
            return False
        return at_s - self._still_since_s >= _STILL_S


@dataclass(eq=False)
class _Full:
    """A full assessment, and the scene that it is of."""

    found: Assessment
    glance: Glance
    at_s: float
    fast_score: float | None = None

    def is_outdated(self, glance: Glance, at_s: float) -> bool:
        differs = float(np.abs(glance.cells - self.glance.cells).mean())
        return differs > _OTHER_SCENE or at_s - self.at_s > _FULL_LASTS_S

    def is_contradicted(self, fast_score: float) -> bool:
        """Whether the fast score has moved since the first one after this."""
        if self.fast_score is None:
            self.fast_score = fast_score
        return abs(fast_score - self.fast_score) > _OTHER_SCORE
