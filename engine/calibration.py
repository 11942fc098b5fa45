"""What is fitted on photographs that a model was not trained on.

A calibration stands in the manifest of a package, or beside the memory of a remote model. The parts
of a manifest are *records*: dataclasses that say in each field's metadata what it may hold.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import PackageCorrupted, UsageError
from meiqa.kernels.graded import LEAST_STEP

Floats = NDArray[np.float64]
Held = TypeVar("Held", bound="Record")

ScoreHead = Literal["text", "levels", "grm"]
"""What makes the first score: printed rating with grade words, the words' expectation, or their
graded response."""
SCORE_HEADS: tuple[ScoreHead, ...] = get_args(ScoreHead)
DEGRADATION = ("text", "neighbours", "orders")
"""What a tight budget may give up: the description's length, neighbours to compare with, and the
second order of each comparison."""


def _numbers(words: str, holds: Callable[[Any], bool], kind: type = Real) -> dict[str, Any]:
    """Say which numbers, finite in any case, a field may hold: its metadata."""
    return {"words": words, "holds": holds, "kind": kind}


FINITE = _numbers("a finite number", lambda value: True)
POSITIVE = _numbers("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = _numbers("0 or a number above it", lambda value: value >= 0)
SHARE = _numbers("0 to 1", lambda value: 0 <= value <= 1)
COUNT = _numbers("a whole number, 1 or more", lambda value: value >= 1, Integral)
COUNT_OR_NONE = _numbers("a whole number, 0 or more", lambda value: value >= 0, Integral)
YES_OR_NO = _numbers("true or false", lambda value: True, bool)


@dataclass(frozen=True)
class Record:
    """A part of the manifest whose keys are the fields of a dataclass.

    A field's metadata says what it holds: one of the mappings above for a number, with `count` for
    a tuple of so many; `part` for another record, `parts` for several; `as_it_is` for values whose
    lists stay lists. Elsewhere lists become tuples, so that equal records are equal.

    Attributes:
        later: fields that came with a later version, and may be missing.
    """

    later: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if "holds" in each.metadata and not (value is None and "or_none" in each.metadata):
                _refuse_others(f"{type(self).__name__}.{each.name}", value, each.metadata)

    @property
    def identity(self) -> dict[str, Any]:
        """What of it a digest is made of: fields that came later count where they are used."""
        defaults = {each.name: each.default for each in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in self.later or value != defaults[name]
        }

    @classmethod
    def from_dict(cls: type[Held], values: Mapping[str, Any]) -> Held:
        """Read a part; PackageCorrupted for unknown or missing keys and impossible numbers."""
        names = {each.name for each in fields(cls)}
        if not names - set(cls.later) <= values.keys() <= names:
            raise PackageCorrupted(
                f"the manifest's {cls.__name__} has other fields than this version reads",
                seen=", ".join(sorted(values.keys() ^ names)),
                hint="export the checkpoint again with this version",
            )
        given = (each for each in fields(cls) if each.name in values)
        return cls(**{each.name: _read(values[each.name], each) for each in given})


def _read(value: Any, described: Any) -> Any:
    kinds = described.metadata
    if "parts" in kinds and isinstance(value, dict):
        return {name: kinds["parts"].from_dict(each) for name, each in value.items()}
    if "parts" in kinds:
        return tuple(map(kinds["parts"].from_dict, value))
    if "part" in kinds and not (value is None and described.default is None):
        return kinds["part"].from_dict(value)
    return value if "as_it_is" in kinds else _frozen(value)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _frozen(each) for name, each in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _refuse_others(name: str, value: Any, allowed: Mapping[str, Any]) -> None:
    count = allowed.get("count")
    if count is not None and not (isinstance(value, tuple) and len(value) == count):
        what = f"the manifest does not say the numbers of {name}"
        raise PackageCorrupted(what, seen=repr(value), allowed=f"{count} numbers")
    for each in (value,) if count is None else value:
        kind = allowed["kind"]
        of_kind = isinstance(each, kind) and isinstance(each, bool) == (kind is bool)
        if not (of_kind and abs(each) <= sys.float_info.max and allowed["holds"](each)):
            what = f"a number in the manifest makes no sense: {name}"
            raise PackageCorrupted(what, seen=repr(each), allowed=allowed["words"])


@dataclass(frozen=True)
class Logistic(Record):
    """Five-parameter logistic from the model's own scale to 1-5 (method of VQEG)."""

    b1: float = field(metadata=FINITE)
    b2: float = field(metadata=FINITE)
    b3: float = field(metadata=FINITE)
    b4: float = field(metadata=FINITE)
    b5: float = field(metadata=FINITE)

    def __call__(self, raw: Floats | float) -> Floats:
        """b1 (1/2 - 1 / (1 + exp(b2 (raw - b3)))) + b4 raw + b5, kept on the 1-5 scale."""
        x = np.asarray(raw, np.float64)
        curve = self.b1 * (0.5 - 1.0 / (1.0 + np.exp(np.clip(self.b2 * (x - self.b3), -60, 60))))
        return np.clip(curve + self.b4 * x + self.b5, 1.0, 5.0)


IDENTITY = Logistic(b1=0.0, b2=1.0, b3=3.0, b4=1.0, b5=0.0)
"""The logistic of a model whose scores need no mapping."""
_LOGISTIC = {"part": Logistic}


@dataclass(frozen=True)
class GradedHead(Record):
    """Graded response of the five grade words (`meiqa.kernels.graded`).

    Attributes:
        weights: (5,) of the words' centred log-probabilities in the ability; offset: added to it.
        discrimination, first, step: a, b_1 and d of the model, a d of `LEAST_STEP` or more.
        std_scale, std_floor: the score's deviation from people's is
            sqrt(scale^2 * variance of the grade + floor^2).
    """

    weights: tuple[float, ...] = field(
        default=(-0.2, -0.1, 0.0, 0.1, 0.2), metadata={**FINITE, "count": 5}
    )
    offset: float = field(default=0.0, metadata=FINITE)
    discrimination: float = field(default=2.0, metadata=POSITIVE)
    first: float = field(default=-1.5, metadata=FINITE)
    step: float = field(default=1.0, metadata=POSITIVE)
    score: Logistic = field(default=IDENTITY, metadata=_LOGISTIC)
    std_scale: float = field(default=1.0, metadata=NOT_NEGATIVE)
    std_floor: float = field(default=0.0, metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        gap = self.discrimination * self.step
        if not LEAST_STEP * (1.0 - 1e-12) <= gap < float("inf"):
            raise PackageCorrupted(
                "the graded response could have two modes",
                seen=f"discrimination times step {gap:.6g}",
                allowed=f"ln 3 = {LEAST_STEP:.6f} or more",
            )


NEUTRAL_GRADED = GradedHead()
"""The graded response of a package exported with this head, before one is fitted."""


@dataclass(frozen=True)
class SceneVerdict(Record):
    """What it says of two shots of one scene that one is preferred, and what they scored alone.

    There the scores err alike, and a comparison sees what differs: it is worth far more than one of
    two strangers.

    Attributes:
        temperature: divides the difference of the two verdicts' logits.
        gap: divides the difference of the two scores alone, which is added.
        sigma: deviation of such a comparison, in score units.
    """

    temperature: float = field(metadata=POSITIVE)
    gap: float = field(metadata=POSITIVE)
    sigma: float = field(metadata=POSITIVE)

    def preferences(self, logits: Floats, gaps: Floats) -> Floats:
        """Give the probability (n,) that the first looks better.

        Args:
            logits: (n, 2) of the verdict in both orders; gaps: (n,) of the scores alone.
        """
        sure = logits.mean(axis=1) / self.temperature + gaps / self.gap
        return np.asarray(np.exp(-np.logaddexp(0.0, -sure)))


@dataclass(frozen=True)
class Calibration(Record):
    """How a model's answers become a score, and what they are worth.

    Attributes:
        text, levels: logistic of the printed rating and of the expectation over grade words.
        text_std, levels_std: deviation of each mapped score from people's.
        grade_share: weight of the grade words in the score that fusion starts from; the rest is
            the printed rating's.
        sigma: deviation of a comparison, in score units (Thurstone Case V).
        lam: weight of that starting score in the fusion.
        temperature: divides the difference of the two verdicts' logits.
        std_scale, std_floor: map the posterior's deviation to the observed one:
            sqrt((scale * std)^2 + floor^2).
        reflect_above: a score that moved by more than this is reflected on and remembered.
        neighbours: K, the neighbours of a photo unless asked otherwise.
        bins: strata over the anchors' scores.
        memory_correlation: how far the errors of the starting score go with those of the memory's
            regression on visual tokens (Pearson), which is joined with it.
        memory_share: weight of that regression, None for the one with the smallest variance.
        graded: graded response of the grade words, None where none was fitted.
        degradation: `DEGRADATION` in the order in which a tight budget gives these up.
        scene: of comparisons between shots of one scene, None where it was not fitted.
    """

    later = ("memory_correlation", "memory_share", "graded", "degradation", "scene")

    text: Logistic = field(default=IDENTITY, metadata=_LOGISTIC)
    levels: Logistic = field(default=IDENTITY, metadata=_LOGISTIC)
    text_std: float = field(default=0.6, metadata=NOT_NEGATIVE)
    levels_std: float = field(default=0.6, metadata=NOT_NEGATIVE)
    grade_share: float = field(default=0.5, metadata=SHARE)
    sigma: float = field(default=0.7, metadata=POSITIVE)
    lam: float = field(default=0.5, metadata=POSITIVE)
    temperature: float = field(default=1.0, metadata=POSITIVE)
    std_scale: float = field(default=1.0, metadata=NOT_NEGATIVE)
    std_floor: float = field(default=0.0, metadata=NOT_NEGATIVE)
    reflect_above: float = field(default=0.75, metadata=NOT_NEGATIVE)
    neighbours: int = field(default=32, metadata=COUNT_OR_NONE)
    bins: int = field(default=5, metadata=COUNT)
    memory_correlation: float = field(default=0.5, metadata=SHARE)
    memory_share: float | None = field(default=None, metadata={**SHARE, "or_none": True})
    graded: GradedHead | None = field(default=None, metadata={"part": GradedHead})
    degradation: tuple[str, ...] = DEGRADATION
    scene: SceneVerdict | None = field(default=None, metadata={"part": SceneVerdict})

    def __post_init__(self) -> None:
        super().__post_init__()
        order = self.degradation
        if not isinstance(order, tuple) or sorted(map(str, order)) != sorted(DEGRADATION):
            raise PackageCorrupted(
                "the manifest's order of degradation is none: Calibration.degradation",
                seen=repr(order),
                allowed=f"each of {', '.join(DEGRADATION)}, once",
            )

    @cached_property
    def is_fitted(self) -> bool:
        """Whether anything was fitted, for any head; what was only chosen does not count."""
        neutral = Calibration(
            neighbours=self.neighbours, bins=self.bins, degradation=self.degradation
        )
        return self not in (neutral, replace(neutral, graded=NEUTRAL_GRADED))


UNCALIBRATED = Calibration()
"""What an exported package starts with, before anything is fitted."""


@dataclass(frozen=True)
class PatternCalibration(Record):
    """How the scores of the distortion patterns go with people's, on photographs kept unseen.

    Attributes:
        hybrid, alone: logistic of the score with a reference, and of that without one.
        alone_std: deviation of the latter, mapped, from people's.
        trusted_std, doubted_std: deviation of the mapped hybrid score where the gate gives the
            reference the whole weight, and where it gives it none.
        correlation: how far the errors of the hybrid score go with those of the model's (Pearson).
        temperature: divides the logits of the kinds of distortion.
    """

    hybrid: Logistic = field(metadata=_LOGISTIC)
    alone: Logistic = field(metadata=_LOGISTIC)
    alone_std: float = field(metadata=POSITIVE)
    trusted_std: float = field(metadata=POSITIVE)
    doubted_std: float = field(metadata=POSITIVE)
    correlation: float = field(metadata=SHARE)
    temperature: float = field(metadata=POSITIVE)


def check_score_head(head: str) -> ScoreHead:
    """Give the score head of that name, or raise UsageError."""
    if head not in SCORE_HEADS:
        raise UsageError("unknown score head", seen=head, allowed=", ".join(SCORE_HEADS))
    return head


def model_terms(digest: str, calibration: Calibration) -> dict[str, str]:
    """Give what a score depends on in the model, by the digests of a package and calibration."""
    text = json.dumps(asdict(calibration), sort_keys=True)
    return {"package": digest, "calibration": hashlib.sha256(text.encode()).hexdigest()}
