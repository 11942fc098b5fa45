"""What goes into an assessment and what comes out: the values every room passes around."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from meiqa.errors import MeiqaError, UsageError

__all__ = [
    "Assessment",
    "Budget",
    "Distortion",
    "Failure",
    "KeyKind",
    "Neighbour",
    "Origin",
    "PairComparison",
    "QualityWord",
    "RankedPhoto",
    "Ranking",
    "Reference",
    "grades_by_word",
    "quality_word",
]

Origin = Literal["anchor", "contrast"]
KeyKind = Literal["summary", "image", "both"]
QualityWord = Literal["bad", "poor", "fair", "good", "excellent"]

_WORDS: tuple[QualityWord, ...] = ("bad", "poor", "fair", "good", "excellent")
_WORD_CUTS = (1.8, 2.6, 3.4, 4.2)


def quality_word(score: float) -> QualityWord:
    """Name the fifth of the 1–5 scale that a score lies in.

    >>> quality_word(1.79), quality_word(1.8), quality_word(5.0)
    ('bad', 'poor', 'excellent')

    Raises:
        ValueError: the score is NaN.
    """
    if math.isnan(score):
        raise ValueError("a NaN score has no quality word")
    return _WORDS[bisect_right(_WORD_CUTS, score)]


def grades_by_word(probabilities: Iterable[float]) -> dict[QualityWord, float]:
    """Name the probabilities of grades 1 to 5.

    >>> grades_by_word([0.0, 0.1, 0.2, 0.5, 0.2])["good"]
    0.5
    """
    return {word: float(one) for word, one in zip(_WORDS, probabilities, strict=True)}


@dataclass(frozen=True)
class Budget:
    """What may be spent on one photo: milliseconds, a standard deviation to reach, or both.

    Work stops at whichever is met first; `Budget()` sets no limit.

    >>> Budget(ms=300)
    Budget(ms=300, std=None)

    Raises:
        UsageError: a limit is not a positive finite number.
    """

    ms: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("ms", self.ms), ("std", self.std)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise UsageError(
                    f"a budget's {name} must be positive",
                    seen=limit,
                    allowed="a finite number above 0",
                )


@dataclass(frozen=True)
class Neighbour:
    """A remembered photo that the query was, or could have been, compared with.

    `preference` is the probability that the query looks better, None if it was not asked.
    """

    id: str
    origin: Origin
    score: float
    std: float
    preference: float | None

    def to_dict(self) -> dict[str, Any]:
        """Give the neighbour as it stands in the JSON of an assessment."""
        return {
            "id": self.id,
            "origin": self.origin,
            "score": self.score,
            "preference": self.preference,
        }


@dataclass(frozen=True)
class Distortion:
    """What may be wrong with a photo: the kind, how strong (0-5) and how probable it is."""

    kind: str
    strength: float
    probability: float

    def to_dict(self) -> dict[str, Any]:
        """Give the distortion as it stands in the JSON of an assessment."""
        return {"kind": self.kind, "strength": self.strength, "probability": self.probability}


@dataclass(frozen=True)
class Reference:
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

    def to_dict(self) -> dict[str, Any]:
        """Give the reference as it stands in the JSON of an assessment."""
        return {
            "path": self.path,
            "score": self.score,
            "std": self.std,
            "weight": self.weight,
            "quality": self.quality,
            "moved": self.moved,
        }


@dataclass(frozen=True)
class Assessment:
    """The quality of one photo: 1.00–5.00, higher is better, and how it was found.

    `percentile` is the share of anchors that score below, 0–100; `degraded` names what the budget
    left out; `reflection` is the corrected summary, None unless the gate opened; `memory_score` is
    what the memory's regression from visual tokens to human scores says, None where it has none;
    `grades` are the model's probabilities of the five words, before any comparison;
    `distortions` are the likeliest, as the package's patterns see them; `reference` is None unless
    one was given.
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
    timings_ms: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give the assessment as JSON-ready values; the key names are a public contract."""
        return {
            "path": self.path,
            "score": self.score,
            "std": self.std,
            "ci95": list(self.ci95),
            "initial_score": self.initial_score,
            "word": self.word,
            "percentile": self.percentile,
            "summary": self.summary,
            "neighbours": [neighbour.to_dict() for neighbour in self.neighbours],
            "degraded": list(self.degraded),
            "reflection": self.reflection,
            "memory_score": self.memory_score,
            "grades": dict(self.grades),
            "distortions": [distortion.to_dict() for distortion in self.distortions],
            "reference": self.reference and self.reference.to_dict(),
            "timings_ms": dict(self.timings_ms),
            "counters": dict(self.counters),
        }


@dataclass(frozen=True)
class Failure:
    """A photo of a run that could not be assessed, and why."""

    path: str
    error: MeiqaError

    def to_dict(self) -> dict[str, Any]:
        """Give the failure as JSON-ready values: path, error and hint."""
        return {"path": self.path, "error": str(self.error), "hint": self.error.hint}


@dataclass(frozen=True)
class RankedPhoto:
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
    summary: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give the place as JSON-ready values."""
        return {
            "rank": self.rank,
            "path": self.path,
            "score": self.score,
            "std": self.std,
            "alone": self.alone,
            "compared": self.compared,
            "places": self.places,
        }


@dataclass(frozen=True)
class Ranking:
    """A set of photos, best first, and those of it that could not be judged."""

    photos: tuple[RankedPhoto, ...]
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class CulledPhoto:
    """A photo in its group of near-identical shots; `place` 1 is the best of them.

    `score` and `std` follow from all that it was compared with, the other shots included; `alone`
    is its score without them; `likeness` is that of its view with the best shot's, up to 1, and
    `summary` what was written about it.
    """

    place: int
    path: str
    score: float
    std: float
    alone: float
    likeness: float
    summary: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give the photo as JSON-ready values."""
        return {
            "place": self.place,
            "best": self.place == 1,
            "path": self.path,
            "score": self.score,
            "std": self.std,
            "alone": self.alone,
            "likeness": self.likeness,
        }


@dataclass(frozen=True)
class Culling:
    """Photos in groups of near-identical shots, the best of each first, and those not judged.

    A photo that is like no other is a group of its own. Groups come in the order of their first
    photos.
    """

    groups: tuple[tuple[CulledPhoto, ...], ...]
    failures: tuple[Failure, ...] = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Give the photos with the numbers of their groups, and the failures behind them."""
        photos = [
            {"group": number, **photo.to_dict()}
            for number, group in enumerate(self.groups, 1)
            for photo in group
        ]
        return photos + [failure.to_dict() for failure in self.failures]


@dataclass(frozen=True)
class PairComparison:
    """Two photos side by side; `preference` is the probability that the first looks better."""

    first: str
    second: str
    preference: float
    first_score: float
    second_score: float
    timings_ms: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give the comparison as JSON-ready values."""
        return {
            "first": self.first,
            "second": self.second,
            "preference": self.preference,
            "first_score": self.first_score,
            "second_score": self.second_score,
            "timings_ms": dict(self.timings_ms),
        }
