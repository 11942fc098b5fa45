"""One instruction at a time: what to do to take the picture better, and what has changed.

`RULES` has what was measured in the frame, or which distortion, speaks for each;
docs/camera.md has the same table for people. `Adviser` does not flicker: evidence is averaged over
half a second, an instruction comes at 0.6, goes below 0.35 and stays for a second and a half at
least, unless the scene itself has changed. The first that speaks wins, since it spoils what the
later ones look at: a picture that moves is soft as well, and one in the dark is noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from meiqa.engine.measures import WORDS, describe_attributes
from meiqa.types import Detail, Distortion

STILL = 2.0
"""Grey levels of `motion_between` below which a camera is held still."""
MOVING = 5.0
SHORT_MOTION, LONG_MOTION = 4.0, 10.0
"""Pixels; see `Detail.motion`. Defocus is read as less than the first."""
GOOD = 3.6
DARK, BRIGHT = WORDS["exposure"][1][0], WORDS["exposure"][2][0]
"""Exposure at which pictures begin to be called dark, and bright."""
_SEVERE = 2.5
"""Strength of a distortion that speaks fully for itself, on its scale of 0 to 5."""
_SMOOTHING_S = 0.5
_COMES, _GOES = 0.6, 0.35
_STAYS_S = 1.5

_BLURS = ("gaussian blur", "lens blur")
_SHAKES = ("motion blur", "jitter")
_NOISES = (
    *("white noise", "colour noise", "impulse noise", "multiplicative noise"),
    "denoising smear",
)
_CODECS = ("JPEG compression", "JPEG 2000 compression", "pixelation", "coarse quantisation")
_SEVERITIES = {"barely visible": 0.1, "slight": 0.3, "visible": 0.6, "strong": 1.0, "severe": 1.0}
"""How strongly a distortion speaks that a description names with one of these words."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a frame."""

    score: float
    motion: float | None  # since the frame before, in grey levels; None of a single picture
    measured: Mapping[str, float]  # by `meiqa.engine.measures`
    words: str = ""  # the description of this frame, or of one that looked the same
    distortions: tuple[Distortion, ...] = ()  # as the model's patterns see them
    detail: Detail | None = None  # of this frame

    def says(self, *phrases: str) -> float:
        """Give 1 if one of these phrases is what the frame's measures are called, or 0."""
        return float(not {*phrases}.isdisjoint(describe_attributes(self.measured).values()))

    def distorted(self, kinds: Collection[str]) -> float:
        """Tell how strongly such distortions are seen, or named in the description, 0-1."""
        seen = sum(
            each.probability * min(1.0, each.strength / _SEVERE)
            for each in self.distortions
            if each.kind in kinds
        )
        words = f" {_plain(self.words)} "
        named = (
            share * (f" {_plain(f'{severity} {kind}')} " in words)
            for severity, share in _SEVERITIES.items()
            for kind in kinds
        )
        return max(min(1.0, seen), *named)

    @property
    def soft(self) -> float:
        """How soft the picture is, 0-1.

        Models take one blur for another: of a camera that is seen to be held still, all are focus.
        """
        blurs = (*_BLURS, *_SHAKES) if self.still else _BLURS
        return max(self.says("very soft"), 0.7 * self.says("soft"), self.distorted(blurs))

    @property
    def still(self) -> bool:
        """Whether the camera is seen to be held still."""
        return self.motion is not None and self.motion < STILL


@dataclass(frozen=True)
class Instruction:
    """What to do: a code for programs and words for people; `good` if all is well.

    `reason` is the end of the sentence "because …".
    """

    code: str
    text: str
    reason: str
    good: bool = False


def _hold_still(seen: Evidence) -> float:
    if seen.still:
        return 0.0
    moving = 0.0 if seen.motion is None else ramp(seen.motion, STILL, MOVING)
    length = 0.0 if seen.detail is None else seen.detail.motion
    return max(moving, seen.distorted(_SHAKES), ramp(length, SHORT_MOTION, LONG_MOTION))


def _more_light(seen: Evidence) -> float:
    dark = ramp(-seen.measured["exposure"], -1.2 * DARK, -DARK)
    noisy = max(0.8 * seen.says("strong noise"), seen.distorted(_NOISES))
    return max(dark, seen.distorted(("darkening",)), noisy)


def _less_light(seen: Evidence) -> float:
    bright = ramp(seen.measured["exposure"], 0.95 * BRIGHT, BRIGHT)
    return max(bright, ramp(seen.measured["clipped"], 0.1, 0.3), seen.distorted(("brightening",)))


def _clean_the_lens(seen: Evidence) -> float:
    hazy = max(seen.says("flat contrast"), 0.9 * seen.says("mild contrast"))
    return min(seen.soft, hazy) * (1.0 - seen.says("dark", "very dark"))


RULES: tuple[tuple[Instruction, Callable[[Evidence], float]], ...] = (
    (Instruction("hold-still", "Hold still", "the picture moves"), _hold_still),
    (Instruction("more-light", "More light", "it is too dark"), _more_light),
    (Instruction("less-light", "Turn away from the light", "it is too bright"), _less_light),
    (
        Instruction("clean-lens", "Clean the lens", "it is soft and hazy though held still"),
        _clean_the_lens,
    ),
    (Instruction("step-back", "Step back", "it is not in focus"), lambda seen: seen.soft),
    (
        Instruction("sharper-stream", "Choose a higher resolution", "compression can be seen"),
        lambda seen: max(seen.says("visible blocking"), seen.distorted(_CODECS)),
    ),
    (
        Instruction("side-light", "Let light come from the side", "there is little contrast"),
        lambda seen: seen.says("flat contrast"),
    ),
    (
        Instruction("take-it", "Take it now", "no clear flaw", good=True),
        lambda seen: ramp(seen.score, GOOD - 0.2, GOOD + 0.1),
    ),
)
"""What to do, the first first, and how strongly the evidence speaks for it, 0-1."""

OTHERWISE = Instruction("other-view", "Try another view", "no single thing is wrong with this one")


class Adviser:
    """Chooses the instruction of a running camera; a single picture is its first frame."""

    def __init__(self) -> None:
        self._strengths: dict[Instruction, float] = {}
        self._speaking: set[Instruction] = set()
        self._seen_s: float | None = None
        self._given_s = -math.inf
        self._given: Instruction | None = None

    def release(self) -> None:
        """Let the next instruction come as soon as it speaks: what is seen has changed."""
        self._given_s = -math.inf

    def advise(self, seen: Evidence, now_s: float) -> Instruction:
        """Take one more frame in, and say what to do.

        Args:
            now_s: when it was taken, on any clock that does not go back.
        """
        weight = 1.0
        if self._seen_s is not None:
            weight = -math.expm1(-max(0.0, now_s - self._seen_s) / _SMOOTHING_S)
        self._seen_s = now_s
        for instruction, strength in RULES:
            before = self._strengths.get(instruction, 0.0)
            self._strengths[instruction] = before + weight * (strength(seen) - before)
        self._speaking = {
            each
            for each, averaged in self._strengths.items()
            if averaged >= (_GOES if each in self._speaking else _COMES)
        }
        first = next((each for each, _ in RULES if each in self._speaking), OTHERWISE)
        if self._given is None or (first != self._given and now_s - self._given_s >= _STAYS_S):
            self._given, self._given_s = first, now_s
        return self._given


Direction = Literal["better", "worse", "steady"]


@dataclass(frozen=True)
class Change:
    """How a frame looks beside the others of its scene, for programs and for people.

    Attributes:
        code: which way it went since a moment ago; "new" for the first frame of a scene.
        level: its score as comparisons within the scene have it; it may lie beyond the scale.
        best: whether no frame of the scene's last seconds is seen to be better.
        scene: number of the scene, from 1.
    """

    code: Direction | Literal["new"]
    text: str
    level: float
    best: bool
    scene: int


def change_text(
    code: Direction, best: bool, improved: bool, differs: str | None, lacks: str | None
) -> str:
    """Say what has changed.

    Args:
        improved: whether a frame of the last seconds is seen to be worse.
        differs: what the frame is beside that of a moment ago, as "sharper".
        lacks: what the best of the last seconds is beside this frame.
    """
    if best and improved and code != "worse":
        return "Hold it: the best of the last 5 s"
    if code != "steady":
        return f"{(differs or code).capitalize()} than the last"
    return "Steady" if best else f"The best of the last 5 s was {lacks or 'better'}"


def ramp(value: float, low: float, high: float) -> float:
    """Rise from 0 at `low` to 1 at `high`."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _plain(text: str) -> str:
    """Make words lower case, without punctuation, and "barely" a part of the next."""
    kept = "".join(char if char.isalnum() else " " for char in text.lower())
    return " ".join(kept.split()).replace("barely ", "barely-")
