"""What goes into an assessment and what comes out: the values every room passes around."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Literal

from meiqa.errors import MeiqaError, UsageError

__all__ = [
    "Assessment",
    "Budget",
    "Failure",
    "KeyKind",
    "Neighbour",
    "Origin",
    "PairComparison",
    "QualityWord",
    "RankedPhoto",
    "Ranking",
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
class Assessment:
    """The quality of one photo: 1.00–5.00, higher is better, and how it was found.

    `percentile` is the share of anchors that score below, 0–100; `degraded` names what the budget
    left out; `reflection` is the corrected summary, None unless the gate opened; `memory_score` is
    what the memory's regression from visual tokens to human scores says, None where it has none.
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
    of those, and `places` by how many places these comparisons moved it, up being positive.
    """

    rank: int
    path: str
    score: float
    std: float
    alone: float
    compared: int
    places: int

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
