"""What goes into an assessment and what comes out: the values every room passes around."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from meiqa.errors import MeiqaError, UsageError

Origin = Literal["anchor", "contrast"]
KeyKind = Literal["summary", "image", "both"]
QualityWord = Literal["bad", "poor", "fair", "good", "excellent"]
GroupKind = Literal["burst", "bracket", "focus stack", "panorama"]

_DIGITS = {"percentile": 1, "timings_ms": 1, "total_ms": 1, "motion": 2, "noise": 2}
_USUAL_DIGITS = 4
"""Decimals of scores, deviations and probabilities: more would be noise of the arithmetic."""
_TEXT_ONLY: dict[str, Any] = {"in_dict": False}


def digits_of(name: str) -> int:
    """Give the decimals that a value deserves, in every format.

    >>> digits_of("score"), digits_of("timings_ms")
    (4, 1)
    """
    return _DIGITS.get(name, _USUAL_DIGITS)


@dataclass(frozen=True)
class Budget:
    """What may be spent on one photo: milliseconds, a standard deviation to reach, or both.

    Work stops at whichever is met first; `Budget()` sets no limit.

    >>> Budget(ms=300)
    Budget(ms=300, std=None)

    Raises:
        TypeError: a limit is no number.
        UsageError: a limit is not positive and finite.
    """

    ms: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        for name in ("ms", "std"):
            limit: Any = getattr(self, name)
            if limit is None:
                continue
            if not hasattr(limit, "__float__") or isinstance(limit, bool):
                raise TypeError(f"a budget's {name} is a number, not {type(limit).__name__}")
            if not (math.isfinite(limit) and limit > 0):
                raise UsageError(
                    f"a budget's {name} must be positive",
                    seen=limit,
                    allowed="a finite number above 0",
                )


class Result:
    """A dataclass that becomes JSON-ready values; the names of its keys are a public contract."""

    def to_dict(self) -> dict[str, Any]:
        """Give the values as JSON takes them, rounded; None for what is not a finite number."""
        return {
            each.name: _plain(each.name, getattr(self, each.name))
            for each in fields(self)  # type: ignore[arg-type]
            if each.metadata.get("in_dict", True)
        }


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, float):
        return round(float(value), digits_of(name)) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(name, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    return value


@dataclass(frozen=True)
class Neighbour(Result):
    """A remembered photo that the query was, or could have been, compared with.

    `preference` is the probability that the query looks better, None if it was not asked; `device`
    is which one it was learned or added on, None for this one.
    """

    id: str
    origin: Origin
    score: float
    std: float = field(metadata=_TEXT_ONLY)
    preference: float | None
    device: str | None = None


SEVERITIES = ("Barely visible", "Slight", "Visible", "Strong", "Severe")
"""What a strength of 1, 2, 3, 4 and 5 is called."""


@dataclass(frozen=True)
class Distortion(Result):
    """What may be wrong with a photo: the kind, how strong (0-5) and how probable it is."""

    kind: str
    strength: float
    probability: float

    @property
    def phrase(self) -> str:
        """Say it in words, as "Severe white noise"."""
        return f"{SEVERITIES[max(1, round(self.strength)) - 1]} {self.kind}"


@dataclass(frozen=True)
class JpegQuality(Result):
    """The quality, 1-100, that a photo was saved with as JPEG, as the IJG's library counts it.

    `source` is what tells it: the file's luminance table, which is that of a quality ("standard
    table", exact) or nearest to it by its sum ("other table"); or, of what is no JPEG file, the
    "pixels", in which an earlier JPEG has left its steps.
    """

    quality: int
    source: Literal["standard table", "other table", "pixels"]


@dataclass(frozen=True)
class Detail(Result):
    """How a photo holds up at 100 %, seen in a few cuts of its full-size pixels.

    Attributes:
        sharpness: one over the width of its edges in pixels, 0-1 where the photo is sharpest and
            has most to show; higher is sharper. 0.5: an edge takes two pixels.
        motion: length in pixels of what moved while the shutter was open, camera or subject; below
            3 it may be softness, and 0 where noise hides all.
        noise: deviation of its noise in grey levels, where it is flattest.
        place: x, y, width and height, in pixels of the photo as shown, of the cut that sharpness
            and motion are those of.
        jpeg: the quality that it was saved with as JPEG; None where nothing tells of one.
    """

    sharpness: float
    motion: float
    noise: float
    place: tuple[int, int, int, int]
    jpeg: JpegQuality | None = None


@dataclass(frozen=True)
class Embedding(Result):
    """What the vision tower sees of a photo, whatever its size, as one vector.

    It is the mean of the visual tokens, followed by their deviation: photos that look good or bad
    in the same way point in the same direction. Two embeddings can be compared, by their cosine,
    if they have one `digest`, which is that of the package that made them.
    """

    digest: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Reference(Result):
    """What a reference brought to an assessment.

    `score` and `std` are what the patterns say of the photo beside it; `weight` is the share in
    that of the comparison with the reference (the rest looks at the photo alone), `quality` their
    score of the reference by itself, and `moved` by how much all this moved the photo's score.
    """

    path: str
    score: float
    std: float
    weight: float
    quality: float
    moved: float


ABOUT_THE_PHOTO = ("small: ", "pixels damaged", "colour profile ")
"""How those of `Assessment.degraded` begin that tell of the photo, and of nothing left out."""


@dataclass(frozen=True)
class Assessment(Result):
    """The quality of one photo: 1.00–5.00, higher is better, and how it was found.

    `percentile` is the share of anchors that score below, 0–100; `degraded` names what was left
    out, and what is wrong with the photo; `reflection` is the corrected summary, None unless the
    gate opened; `memory_score` is what the memory's regression from visual tokens to human scores
    says, None where it has none;
    `grades` are the model's probabilities of the five words, before any comparison;
    `distortions` are the likeliest, as the package's patterns see them; `reference` is None unless
    one was given; `detail` is what is seen at full size, beside the score, None where left out;
    `embedding` is None unless it was asked for.
    """

    path: str
    score: float
    std: float
    ci95: tuple[float, float]
    initial_score: float
    word: str
    percentile: float
    summary: str | None
    neighbours: tuple[Neighbour, ...] = ()
    degraded: tuple[str, ...] = ()
    reflection: str | None = None
    memory_score: float | None = None
    grades: dict[QualityWord, float] = field(default_factory=dict)
    distortions: tuple[Distortion, ...] = ()
    reference: Reference | None = None
    detail: Detail | None = None
    embedding: Embedding | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of `degraded` was left out or went another way."""
        return tuple(note for note in self.degraded if not note.startswith(ABOUT_THE_PHOTO))


@dataclass(frozen=True)
class Failure(Result):
    """A photo of a run that could not be assessed, and why."""

    path: str
    error: MeiqaError

    def to_dict(self) -> dict[str, Any]:
        """Give the failure as JSON-ready values: path, error and hint."""
        return {"path": self.path, "error": str(self.error), "hint": self.error.hint}


@dataclass(frozen=True)
class RankedPhoto(Result):
    """A photo's place in a set.

    `alone` is its score before it was compared with the others of the set, `compared` the number
    of those, and `places` by how many places these comparisons moved it, up being positive;
    `summary` is what was written about it.
    """

    rank: int
    path: str
    score: float
    std: float
    alone: float
    compared: int
    places: int
    summary: str | None = field(default=None, metadata=_TEXT_ONLY)


@dataclass(frozen=True)
class Ranking(Result):
    """A set of photos, best first, and those of it that could not be judged.

    `degraded` names what the budget left out.
    """

    photos: tuple[RankedPhoto, ...]
    failures: tuple[Failure, ...] = ()
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True)
class CulledPhoto(Result):
    """A photo in its group; `place` 1 is the best of a burst, or the first of a series.

    `score` and `std` follow from all that it was compared with, the other shots included; `alone`
    is its score without them; `likeness` is that of its view with the first one's, up to 1, and
    `summary` what was written about it. `kind` is that of its group, None for a single photo; an
    exposure bracket, a focus stack and a panorama are *series*, of which nothing is a reject.
    `too_close` says that this shot and the best (of the best: and the next) differ by no more than
    the deviation of that; `reason` is what speaks for the best of a burst,
    and against the others beside it.
    """

    place: int
    path: str
    score: float
    std: float
    alone: float
    likeness: float
    summary: str | None = field(default=None, metadata=_TEXT_ONLY)
    kind: GroupKind | None = None
    too_close: bool = False
    reason: str | None = None

    @property
    def in_series(self) -> bool:
        """Whether it belongs to others that are worth nothing without it."""
        return self.kind not in (None, "burst")

    @property
    def best(self) -> bool:
        """Whether it is the best of its burst, or alone; a series has no best."""
        return self.place == 1 and not self.in_series

    @property
    def kept(self) -> bool:
        """Whether it is no reject."""
        return self.best or self.in_series

    def to_dict(self) -> dict[str, Any]:
        """Give the values as JSON takes them, and whether this is the best shot, and kept."""
        values = super().to_dict()
        first = {"kind": values.pop("kind"), "place": values.pop("place")}
        return {**first, "best": self.best, "kept": self.kept, **values}


@dataclass(frozen=True)
class Culling(Result):
    """Photos in groups of shots that belong together, and those not judged.

    Of near-identical shots the best is first; a series is in the order in which it was taken; a
    photo that is like no other is a group of its own. Groups come in the order of their first
    photos. `degraded` names what the budget left out.
    """

    groups: tuple[tuple[CulledPhoto, ...], ...]
    failures: tuple[Failure, ...] = ()
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairComparison(Result):
    """Two photos side by side; `preference` is the probability that the first looks better.

    `degraded` names what the budget left out.
    """

    first: str
    second: str
    preference: float
    first_score: float
    second_score: float
    timings_ms: dict[str, float] = field(default_factory=dict)
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShotComparison(Result):
    """Two shots of one scene side by side; `preference` is for the first.

    `gap` says by how much it is better, in units of score, and `std` how far that is usually off:
    what differs by less can't be told.
    """

    first: str
    second: str
    preference: float
    gap: float
    std: float


@dataclass(frozen=True)
class Answer(Result):
    """How probable each option is as the reply to a question about a photo.

    `probabilities` are those among the options, and sum to 1. `logprobs` are natural logarithms of
    the probability that the model's reply goes on so, whatever else it might say: where all are far
    below 0, the model would have said something else. `second` is the photo that was shown second.
    """

    path: str
    question: str
    probabilities: dict[str, float]
    logprobs: dict[str, float]
    second: str | None = None

    @property
    def best(self) -> str:
        """The likeliest option."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


@dataclass(frozen=True)
class RememberedCase:
    """A photo in a service's memory; `created` is in seconds since 1970."""

    id: str
    origin: Origin
    score: float
    std: float
    summary: str
    provenance: str
    created: float
