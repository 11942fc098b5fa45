"""Photos of a set beside each other: the joint solution that ranks, culls and compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.budget import PairTime
from meiqa.engine.calibration import Calibration
from meiqa.engine.comparing import Comparer
from meiqa.engine.estimates import (
    UNDOUBTED,
    Doubt,
    Posterior,
    before_comparisons,
    calibrated,
    preferences_of,
)
from meiqa.engine.images import Pixels
from meiqa.engine.reasons import (
    COMPARED,
    NOTHING_SEEN,
    Observation,
    reason_for,
    seen_at_full_size,
    turned,
)
from meiqa.engine.scoring import Scored, Scorer, as_neighbours
from meiqa.engine.series import Frame, frame_of, series_in
from meiqa.engine.shots import ALIKE, grouped, likenesses, view_of
from meiqa.errors import UsageError
from meiqa.kernels.thurstone import thurstone_joint
from meiqa.memory import Snapshot
from meiqa.types import CulledPhoto, GroupKind, Neighbour, RankedPhoto, ShotComparison

RIVALS = 4
"""Photos of the set that each is compared with: of near scores, whose order is least certain."""
ALL_PAIRS = 8
"""Photos behind it that a shot is compared with: all, in groups of up to nine."""
HELD = 20.0
"""Weight of a comparison of two shots against that of their scores alone, which speak in it
already: an even gap follows the comparison to 0.64 HELD / (1 + 0.64 HELD) = 93 %."""
LEAST_COUNT = 1e-6
SUREST = 1e-12
"""A preference is taken for no surer than this, or its complement, so that its odds are finite."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is kept of a scored photo until it is compared with the others of its set.

    Attributes:
        prior: the score before any comparison; score: the fused one; doubt: of its deviation.
        view: what it shows, None if that is not known; frame: the shot as far as series go;
            observation: what may speak for it; both for a cull alone.
        notes: what of its file is damaged.
    """

    path: str
    image_digest: str
    tokens: NDArray[np.float32]
    grid: tuple[int, int]
    prior: float
    score: float
    neighbours: tuple[Neighbour, ...]
    summary: str | None = None
    view: NDArray[np.float32] | None = None
    frame: Frame | None = None
    observation: Observation = NOTHING_SEEN
    hurried: bool = False
    doubt: Doubt = UNDOUBTED
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, scored: Scored, *, culled: bool = False) -> Candidate:
        """Keep what a set, or a cull, needs of a scored photo; its pixels are let go."""
        return cls(
            path=scored.pixels.name,
            image_digest=scored.pixels.digest,
            tokens=scored.prefix.tokens.values,
            grid=scored.prefix.tokens.grid,
            prior=before_comparisons(scored.estimates).score,
            score=scored.posterior.score,
            neighbours=as_neighbours(scored.neighbours, scored.preferences),
            summary=scored.summary,
            view=view_of(scored.pixels.array),
            frame=frame_of(scored.pixels) if culled else None,
            observation=_observed(scored) if culled else NOTHING_SEEN,
            hurried=scored.hurried,
            doubt=scored.doubt,
            notes=scored.pixels.notes,
        )

    @classmethod
    def graded(cls, pixels: Pixels, scorer: Scorer, snapshot: Snapshot) -> Candidate:
        """Read a shot and grade it, to be compared with others: no text, and no neighbours."""
        prefix, prior = scorer.graded(pixels, snapshot)
        return cls(
            path=pixels.name,
            image_digest=pixels.digest,
            tokens=prefix.tokens.values,
            grid=prefix.tokens.grid,
            prior=prior.score,
            score=prior.score,
            neighbours=(),
        )


def _observed(scored: Scored) -> Observation:
    height, width = scored.pixels.array.shape[:2]
    distortions = () if scored.patterns is None else scored.patterns.distortions
    return Observation((height, width), scored.detail, distortions)


@dataclass(frozen=True, eq=False)
class Solution:
    """A set of N photos after all comparisons.

    Attributes:
        scores: (N,) of the joint solution, which may lie beyond the scale.
        posteriors: the same as people's scores and deviations go.
        order: indices, best first; alone: the same by the scores before the photos met.
        compared: (N,) with how many of the set each was compared.
        left_out: of all `pairs` those that there was no time for.
        scene_std: deviation of the difference of two scores where all comparisons were of shots
            of one scene, None where it is that of both scores.
    """

    scores: Floats
    posteriors: tuple[Posterior, ...]
    order: tuple[int, ...]
    alone: tuple[int, ...]
    compared: NDArray[np.intp]
    left_out: int
    pairs: int
    scene_std: float | None = None

    def gap_std(self, one: int, other: int) -> float:
        """Give the deviation of the difference of two scores: of one comparison within a scene."""
        if self.scene_std is not None:
            return self.scene_std
        return math.hypot(self.posteriors[one].std, self.posteriors[other].std)

    def too_close(self, one: int, other: int) -> bool:
        """Tell whether two scores differ by no more than the deviation of that."""
        gap = abs(float(self.scores[one] - self.scores[other]))
        return gap <= self.gap_std(one, other)


def solve(
    candidates: Sequence[Candidate],
    comparer: Comparer,
    rivals: int,
    time: PairTime,
    alike: float = ALIKE,
) -> Solution:
    """Compare photos with those next to them in score, and solve for all scores together.

    Each is compared with `rivals` others, half of them before it and half behind it; those that
    are at least `alike` are shots of one scene.
    """
    calibration, verdicts, left_out = comparer.model.calibration, Verdicts(), 0
    alone = order_of([each.score for each in candidates])
    for place, index in enumerate(alone):
        following = alone[place + 1 : place + 1 + rivals // 2]
        while following and (wave := following[: time.affordable]):
            others = [candidates[other] for other in wave]
            logits = comparer.between(candidates[index], others)
            of_scene = [_likeness(candidates[index], other) >= alike for other in others]
            preferences = told(candidates[index], others, logits, of_scene, calibration)
            verdicts.add(index, wave, preferences, of_scene)
            following = following[len(wave) :]
        left_out += len(following)
    scores, stds = joint_scores(candidates, verdicts, calibration)
    solved = zip(candidates, scores.tolist(), stds.tolist(), strict=True)
    posteriors = tuple(
        each.doubt.combined(calibrated(score, std, calibration)) for each, score, std in solved
    )
    is_scene = bool(verdicts.of_scene) and all(verdicts.of_scene)
    return Solution(
        scores=scores,
        posteriors=posteriors,
        # By the solution and not by the mapped score, which may be cut off at the scale's ends.
        order=tuple(order_of(scores)),
        alone=tuple(alone),
        compared=np.bincount(np.array(verdicts.pairs, np.intp).ravel(), minlength=len(candidates)),
        left_out=left_out,
        pairs=left_out + len(verdicts.pairs),
        scene_std=calibration.scene.sigma if calibration.scene and is_scene else None,
    )


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Comparisons within a set: who with whom, how it went, and whether both show one scene."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    preferences: list[float] = field(default_factory=list)
    of_scene: list[bool] = field(default_factory=list)

    def add(
        self, index: int, others: Sequence[int], preferences: Floats, of_scene: Sequence[bool]
    ) -> None:
        """Add comparisons of one photo with others."""
        self.pairs.extend((index, other) for other in others)
        self.preferences.extend(preferences.tolist())
        self.of_scene.extend(of_scene)


def told(
    first: Candidate,
    others: Sequence[Candidate],
    logits: Floats,
    of_scene: Sequence[bool],
    calibration: Calibration,
) -> Floats:
    """Tell by logits (n, 2) how probably a photo looks better than each of n others.

    What is known of shots of one scene counts where they are that: see `SceneVerdict`.
    """
    preferences, scene = preferences_of(logits, calibration.temperature), calibration.scene
    if scene is None:
        return preferences
    gaps = np.array([first.prior - other.prior for other in others])
    return np.where(of_scene, scene.preferences(logits, gaps), preferences)


def joint_scores(
    candidates: Sequence[Candidate], verdicts: Verdicts, calibration: Calibration
) -> tuple[Floats, Floats]:
    """Scores and deviations (N,) that suit all comparisons best; see `thurstone_joint`.

    Each photo has its prior; a remembered photo that several were compared with is one item. Shots
    of one scene err alike, of which their comparisons tell nothing: deviations are those without.
    """
    count, scene = len(candidates), calibration.scene
    prior, stds = [each.prior for each in candidates], [np.nan] * count
    pairs, preferences = list(verdicts.pairs), list(verdicts.preferences)
    items: dict[tuple[str, str], int] = {}
    for index, each in enumerate(candidates):
        for known in each.neighbours:
            if known.preference is not None:
                item = items.setdefault((known.origin, known.id), count + len(items))
                if item == len(prior):
                    prior.append(known.score)
                    stds.append(known.std)
                pairs.append((index, item))
                preferences.append(known.preference)
    weights, places = np.full(len(prior), calibration.lam), np.array(pairs, np.int64)
    start, given = (prior, weights, stds), np.array(preferences)
    sigmas, counts = np.full(len(pairs), calibration.sigma), np.ones(len(pairs))
    of_scene = np.zeros(len(pairs), bool)
    if scene is not None:
        of_scene[: len(verdicts.of_scene)] = verdicts.of_scene
        sigmas[of_scene] = scene.sigma
        counts[of_scene] = max(LEAST_COUNT, HELD * calibration.lam * scene.sigma**2)
    scores, deviations = thurstone_joint(
        *start, places.reshape(-1, 2), given, sigmas, counts=counts
    )
    if of_scene.any():
        strangers = ~of_scene
        _, deviations = thurstone_joint(
            *start, places[strangers], given[strangers], calibration.sigma
        )
    return scores[:count], deviations[:count]


def shots_compared(first: Candidate, second: Candidate, comparer: Comparer) -> ShotComparison:
    """Compare two shots of one scene with each other alone.

    The gap is that of Bradley and Terry with the deviation of such a comparison, not Thurstone's:
    of two shots that are both far behind, it still tells which is farther.
    """
    calibration = comparer.model.calibration
    logits = comparer.between(first, [second])
    preference = float(told(first, [second], logits, [True], calibration)[0])
    std = calibration.scene.sigma if calibration.scene else calibration.sigma
    sure = min(max(preference, SUREST), 1.0 - SUREST)
    gap = std * math.sqrt(3.0) / math.pi * math.log(sure / (1.0 - sure))
    return ShotComparison(first.path, second.path, preference, gap, std)


def ranked(candidates: Sequence[Candidate], solution: Solution) -> tuple[RankedPhoto, ...]:
    """Order photos, best first; those of equal score keep the order they were given in."""
    place_alone = {index: place for place, index in enumerate(solution.alone)}
    return tuple(
        RankedPhoto(
            rank=place + 1,
            path=candidates[index].path,
            score=solution.posteriors[index].score,
            std=solution.posteriors[index].std,
            alone=candidates[index].score,
            compared=int(solution.compared[index]),
            places=place_alone[index] - place,
            summary=candidates[index].summary,
        )
        for place, index in enumerate(solution.order)
    )


def culled(
    candidates: Sequence[Candidate], comparer: Comparer, alike: float, time: PairTime
) -> tuple[tuple[tuple[CulledPhoto, ...], ...], tuple[Solution, ...]]:
    """Find series, group shots of one scene, and put each group in order by comparing its photos.

    Groups come in the order of their first photos; each holds its best photo first. The photos of
    a series aren't compared, since none is to be chosen, and stay as they were taken.
    """
    series = series_in([each.frame for each in candidates])
    together = {index for each in series for index in each.members}
    apart = [index for index in range(len(candidates)) if index not in together]
    views = [view for index in apart if (view := candidates[index].view) is not None]
    digests = [candidates[index].image_digest for index in apart]
    found: list[tuple[Sequence[int], GroupKind | None]] = [(e.members, e.kind) for e in series]
    for places in grouped(views, digests, alike):
        found.append(([apart[place] for place in places], "burst" if len(places) > 1 else None))
    groups, solutions = [], []
    for members, kind in sorted(found, key=lambda each: min(each[0])):
        group = [candidates[index] for index in members]
        rivals = 2 * min(len(group) - 1, ALL_PAIRS) if kind == "burst" else 0
        solution = solve(group, comparer, rivals, time, alike=-1.0)
        groups.append(_in_order(group, solution, kind))
        solutions.append(solution)
    return tuple(groups), tuple(solutions)


def _in_order(
    group: Sequence[Candidate], solution: Solution, kind: GroupKind | None
) -> tuple[CulledPhoto, ...]:
    order = _best_first(group, solution) if kind == "burst" else tuple(range(len(group)))
    first, best = order[0], group[order[0]]
    near = [kind == "burst" and solution.too_close(first, each) for each in order]
    if kind == "burst":
        near[0] = near[1]
    return tuple(
        CulledPhoto(
            place=place,
            path=group[index].path,
            score=solution.posteriors[index].score,
            std=solution.posteriors[index].std,
            alone=group[index].score,
            likeness=_likeness(best, group[index]),
            summary=group[index].summary,
            kind=kind,
            too_close=close,
            reason=_reason(group, order, place, solution) if kind == "burst" else None,
        )
        for place, (index, close) in enumerate(zip(order, near, strict=True), 1)
    )


def _best_first(group: Sequence[Candidate], solution: Solution) -> tuple[int, ...]:
    """Order a burst: of those too close to the best, one that is better at full size goes first."""
    first = best = solution.order[0]
    for each in solution.order[1:]:
        if solution.too_close(first, each):
            shown, other = group[each].observation, group[best].observation
            if seen_at_full_size(shown, other) and not seen_at_full_size(other, shown):
                best = each
    return (best, *(each for each in solution.order if each != best))


def _reason(
    group: Sequence[Candidate], order: Sequence[int], place: int, solution: Solution
) -> str | None:
    """What speaks for the best photo against the next, or against another beside the best.

    That is what is seen, or else the comparison.
    """
    best, other = order[0], order[max(place, 2) - 1]
    reason = reason_for(group[best].observation, group[other].observation)
    if reason is None and solution.compared[best] and not solution.too_close(best, other):
        reason = COMPARED
    return reason if reason is None or place == 1 else turned(reason)


def _likeness(one: Candidate, other: Candidate) -> float:
    """How alike two photos are; the same pixels wholly, and what is not known not at all."""
    if one.image_digest == other.image_digest:
        return 1.0
    if one.view is None or other.view is None:
        return 0.0
    return round(float(likenesses([one.view], [other.view])[0, 0].clip(-1.0, 1.0)), 4)


def preference_of(solution: Solution) -> float:
    """Give the probability that the first of two photos looks better, by their joint solution."""
    gap, std = float(solution.scores[0] - solution.scores[1]), solution.gap_std(0, 1)
    if std == 0.0:
        return 0.5 + 0.5 * float(np.sign(gap))
    return 0.5 * math.erfc(-gap / (std * math.sqrt(2.0)))


def left_out(candidates: Sequence[Candidate], solutions: Sequence[Solution]) -> tuple[str, ...]:
    """Name what is damaged, and what there was no time for."""
    notes = [f"{each.path}: {note}" for each in candidates for note in each.notes]
    if hurried := sum(each.hurried for each in candidates):
        photos = f"{hurried} of {len(candidates)} photos"
        notes.append(f"{photos} scored without all of their text and comparisons: no time")
    if missing := sum(each.left_out for each in solutions):
        pairs = sum(each.pairs for each in solutions)
        notes.append(f"{missing} of {pairs} pairs not compared: no time")
    return tuple(notes)


def order_of(scores: Sequence[float] | Floats) -> list[int]:
    """Give indices by falling score, equal scores as they come."""
    order: list[int] = np.argsort(-np.asarray(scores, np.float64), kind="stable").tolist()
    return order


def require_even(rivals: int) -> None:
    """Refuse a number of rivals of which there is no half, or a negative one."""
    if rivals < 0 or rivals % 2:
        raise UsageError("rivals are before and behind a photo", seen=rivals, allowed="0, 2, 4, …")
