"""Near-identical shots of a set of photos, and the best of each group of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.comparing import Comparer
from meiqa.engine.manifest import Calibration
from meiqa.engine.ranking import Contestant, ranked
from meiqa.engine.views import likenesses
from meiqa.errors import UsageError
from meiqa.types import CulledPhoto

__all__ = ["ALIKE", "culled", "grouped", "require_cosine"]

ALIKE = 0.55
"""Mean likeness of views from which on photos are shots of one thing (`benchmarks/shots.py`)."""
ALL_PAIRS = 8
"""Photos behind it that a shot is compared with: all, in groups of up to nine."""
_BLOCK = 1024

Floats = NDArray[np.float32]


def culled(
    contestants: Sequence[Contestant],
    comparer: Comparer,
    calibration: Calibration,
    alike: float = ALIKE,
) -> tuple[tuple[CulledPhoto, ...], ...]:
    """Group near-identical shots, and put each group in order by comparing its photos.

    Groups come in the order of their first photos; each holds its best photo first.
    """
    views = [each.view for each in contestants if each.view is not None]
    digests = [each.image_digest for each in contestants]
    return tuple(
        _in_order([contestants[index] for index in group], comparer, calibration)
        for group in grouped(views, digests, alike)
    )


def _in_order(
    group: Sequence[Contestant], comparer: Comparer, calibration: Calibration
) -> tuple[CulledPhoto, ...]:
    """The photos of one group, best first."""
    rivals = 2 * min(len(group) - 1, ALL_PAIRS)
    # By number, since a photo may be given twice.
    numbered = [replace(each, path=str(number)) for number, each in enumerate(group)]
    places = ranked(numbered, comparer, calibration, rivals)
    order = [int(place.path) for place in places]
    to_best = _likenesses([group[order[0]]], [group[index] for index in order])[0]
    return tuple(
        CulledPhoto(
            place=place.rank,
            path=group[index].path,
            score=place.score,
            std=place.std,
            alone=place.alone,
            likeness=round(float(like), 4),
            summary=place.summary,
        )
        for index, place, like in zip(order, places, to_best, strict=True)
    )


def _likenesses(ones: Sequence[Contestant], others: Sequence[Contestant]) -> Floats:
    """How alike photos of one group are; the same pixels wholly."""
    views = [[each.view for each in some if each.view is not None] for some in (ones, others)]
    names = [np.array([each.image_digest for each in some]) for some in (ones, others)]
    same = names[0][:, None] == names[1]
    return np.where(same, np.float32(1.0), likenesses(*views)).clip(-1.0, 1.0)


def grouped(views: Sequence[Floats], digests: Sequence[str], alike: float) -> list[list[int]]:
    """Indices of the photos of each group, in the order of their first.

    Two groups are one where the mean likeness between their photos is at least `alike` (average
    linkage): a burst that drifts from one view to another is not held together by its neighbours
    alone. The same pixels are alike, whatever they show.

    Args:
        views: of N photos; see `view_of`.
        digests: of their pixels.
        alike: see `ALIKE`.
    """
    groups = [
        [members[index] for index in part]
        for members in _connected(views, digests, alike)
        for part in _linked([views[i] for i in members], [digests[i] for i in members], alike)
    ]
    return sorted(groups)


def _connected(
    views: Sequence[Floats], digests: Sequence[str], alike: float
) -> Iterator[list[int]]:
    """Photos that a chain of alike ones holds together; no group reaches beyond these."""
    roots = list(range(len(views)))

    def root_of(index: int) -> int:
        while roots[index] != index:
            roots[index] = roots[roots[index]]
            index = roots[index]
        return index

    first_of: dict[str, int] = {}
    for index, digest in enumerate(digests):
        roots[root_of(index)] = root_of(first_of.setdefault(digest, index))
    for one, other in _alike_pairs(views, alike):
        high, low = sorted((root_of(one), root_of(other)), reverse=True)
        roots[high] = low
    members: dict[int, list[int]] = {}
    for index in range(len(views)):
        members.setdefault(root_of(index), []).append(index)
    yield from members.values()


def _alike_pairs(views: Sequence[Floats], alike: float) -> Iterator[tuple[int, int]]:
    """Pairs whose likeness is at least `alike`, a block of the matrix at a time."""
    for start in range(0, len(views), _BLOCK):
        for begin in range(start, len(views), _BLOCK):
            found = likenesses(views[start : start + _BLOCK], views[begin : begin + _BLOCK])
            for one, other in np.argwhere(found >= alike).tolist():
                if start + one < begin + other:
                    yield start + one, begin + other


def _linked(views: Sequence[Floats], digests: Sequence[str], alike: float) -> list[list[int]]:
    """Indices of the groups that average linkage makes."""
    if len(views) == 1:
        return [[0]]
    from scipy.cluster.hierarchy import fcluster, linkage

    names = np.array(digests)
    cosines = np.where(names[:, None] == names, 1.0, likenesses(views, views))
    distances = np.maximum(1.0 - cosines, 0.0)[np.triu_indices(len(views), 1)]
    labels = fcluster(linkage(distances.astype(np.float64), "average"), 1.0 - alike, "distance")
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]


def require_cosine(alike: float) -> None:
    """Refuse a likeness that is none.

    Raises:
        UsageError: it is not above 0 and at most 1.
    """
    if not 0.0 < alike <= 1.0:
        raise UsageError("likeness is a cosine", seen=alike, allowed="above 0, up to 1")
