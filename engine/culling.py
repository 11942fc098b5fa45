"""Near-identical shots of a set of photos, and the best of each group of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.comparing import Comparer
from meiqa.engine.package import Calibration
from meiqa.engine.ranking import Contestant, ranked
from meiqa.errors import UsageError
from meiqa.memory import layout
from meiqa.types import CulledPhoto

__all__ = ["ALIKE", "culled", "grouped", "require_cosine"]

ALIKE = 0.9
"""Mean cosine of layouts from which on photos are shots of one thing (`benchmarks/shots.py`)."""
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
    layouts = [layout(each.tokens, each.grid) for each in contestants]
    groups = grouped(layouts, [each.image_digest for each in contestants], alike)
    return tuple(
        _in_order(
            [contestants[index] for index in group],
            [layouts[index] for index in group],
            comparer,
            calibration,
        )
        for group in groups
    )


def _in_order(
    group: Sequence[Contestant],
    layouts: Sequence[Floats],
    comparer: Comparer,
    calibration: Calibration,
) -> tuple[CulledPhoto, ...]:
    """The photos of one group, best first."""
    rivals = 2 * min(len(group) - 1, ALL_PAIRS)
    # By number, since a photo may be given twice.
    numbered = [replace(each, path=str(number)) for number, each in enumerate(group)]
    places = ranked(numbered, comparer, calibration, rivals)
    order = [int(place.path) for place in places]
    best = layouts[order[0]]
    return tuple(
        CulledPhoto(
            place=place.rank,
            path=group[index].path,
            score=place.score,
            std=place.std,
            alone=place.alone,
            likeness=1.0 if place.rank == 1 else float(best @ layouts[index]),
            summary=place.summary,
        )
        for index, place in zip(order, places, strict=True)
    )


def grouped(layouts: Sequence[Floats], digests: Sequence[str], alike: float) -> list[list[int]]:
    """Indices of the photos of each group, in the order of their first.

    Two groups are one where the mean cosine between their photos is at least `alike` (average
    linkage): a burst that drifts from one view to another is not held together by its neighbours
    alone. The same pixels are alike, whatever they show.

    Args:
        layouts: unit vectors (D,), or zeros, of N photos.
        digests: of their pixels.
        alike: see `ALIKE`.
    """
    groups = [
        [members[index] for index in part]
        for members in _connected(layouts, digests, alike)
        for part in _linked(_cosines(layouts, digests, members), alike)
    ]
    return sorted(groups)


def _connected(
    layouts: Sequence[Floats], digests: Sequence[str], alike: float
) -> Iterator[list[int]]:
    """Photos that a chain of alike ones holds together; no group reaches beyond these."""
    roots = list(range(len(layouts)))

    def root_of(index: int) -> int:
        while roots[index] != index:
            roots[index] = roots[roots[index]]
            index = roots[index]
        return index

    first_of: dict[str, int] = {}
    for index, digest in enumerate(digests):
        roots[root_of(index)] = root_of(first_of.setdefault(digest, index))
    for one, other in _alike_pairs(layouts, alike):
        high, low = sorted((root_of(one), root_of(other)), reverse=True)
        roots[high] = low
    members: dict[int, list[int]] = {}
    for index in range(len(layouts)):
        members.setdefault(root_of(index), []).append(index)
    yield from members.values()


def _alike_pairs(layouts: Sequence[Floats], alike: float) -> Iterator[tuple[int, int]]:
    """Pairs whose cosine is at least `alike`, a block of the matrix at a time."""
    for start in range(0, len(layouts), _BLOCK):
        rows = np.stack(layouts[start : start + _BLOCK])
        for begin in range(start, len(layouts), _BLOCK):
            columns = np.stack(layouts[begin : begin + _BLOCK])
            for one, other in np.argwhere(rows @ columns.T >= alike).tolist():
                if start + one < begin + other:
                    yield start + one, begin + other


def _cosines(
    layouts: Sequence[Floats], digests: Sequence[str], members: Sequence[int]
) -> NDArray[np.float64]:
    """Cosines (n, n) between some of the photos."""
    rows = np.stack([layouts[index] for index in members]).astype(np.float64)
    names = np.array([digests[index] for index in members])
    cosines: NDArray[np.float64] = np.where(names[:, None] == names, 1.0, rows @ rows.T)
    return cosines


def _linked(cosines: NDArray[np.float64], alike: float) -> list[list[int]]:
    """Indices of the groups that average linkage makes."""
    if len(cosines) == 1:
        return [[0]]
    from scipy.cluster.hierarchy import fcluster, linkage

    distances = np.maximum(1.0 - cosines, 0.0)
    tree = linkage(distances[np.triu_indices(len(cosines), 1)], "average")
    labels = fcluster(tree, 1.0 - alike, "distance")
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]


def require_cosine(alike: float) -> None:
    """Refuse a likeness that is none.

    Raises:
        UsageError: it is not above 0 and at most 1.
    """
    if not 0.0 < alike <= 1.0:
        raise UsageError("likeness is a cosine", seen=alike, allowed="above 0, up to 1")
