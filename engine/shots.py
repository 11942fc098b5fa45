"""Shots of one scene: what a photo shows, however well, and which photos show the same.

Visual tokens say how good a picture is, so a sharp and a blurred shot of one scene are nearly as
far apart in them as strangers are. A small thumbnail is the same of both. Of it only what differs
from its surroundings is kept, and compared at every offset that a hand may cause.
`benchmarks/shots.py` measures each of these steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.errors import UsageError

Floats = NDArray[np.float32]

ALIKE = 0.55
"""Mean likeness of views from which on photos are shots of one scene."""
SIDE = 32
"""Pixels of a thumbnail's side, whatever the photo's proportions."""
SURROUNDINGS = 3.0
"""Deviation, in these pixels, of the Gaussian mean that is taken off."""
REACH = 2
"""Pixels by which two views may be shifted against each other: a sixteenth of the side."""
_WINDOW = SIDE - 2 * REACH
_OFFSETS = [(row, column) for row in range(2 * REACH + 1) for column in range(2 * REACH + 1)]
_EVEN = 20.0
"""Length of a part of which nothing can be told: rounding to 8 bits alone has 14."""
BLOCK = 1024  # photos of which the likenesses to as many others are held at once


def view_of(pixels: NDArray[np.uint8]) -> Floats:
    """Give what a photo (H, W, 3) shows: (32, 32, 3), around zero."""
    # Coarsely at first, which is fast: the cells of the thumbnail are large.
    image = Image.fromarray(pixels)
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0))
    thumbnail = small.astype(np.float32)
    blur = _blur()
    view: Floats = thumbnail - np.einsum("rR,cC,RCk->rck", blur, blur, thumbnail, optimize=True)
    return view


@lru_cache(maxsize=1)
def _blur() -> Floats:
    """Matrix (32, 32) of a Gaussian mean along one axis, which the edges mirror."""
    radius = int(4.0 * SURROUNDINGS + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / SURROUNDINGS) ** 2)
    matrix = np.zeros((SIDE, SIDE))
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        places = (np.arange(SIDE) + offset) % (2 * SIDE)
        mirrored = np.minimum(places, 2 * SIDE - 1 - places)
        matrix[np.arange(SIDE), mirrored] += weight
    return matrix.astype(np.float32)


def likenesses(ones: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """Tell how alike the views (32, 32, 3) of n and m photos are, (n, m), up to 1.

    The cosine of the middle of one with every part of the other that is as large, and the reverse;
    the best counts. Contrast does not matter. A part that is the same all over is like nothing.
    """
    return np.maximum(_best(ones, others), _best(others, ones).T)


def _best(ones: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    middles = _parts(ones, (REACH, REACH))
    best = np.full((len(ones), len(others)), -1.0, np.float32)
    for offset in _OFFSETS:
        np.maximum(best, middles @ _parts(others, offset).T, out=best)
    return best


def _parts(views: Sequence[Floats], offset: tuple[int, int]) -> Floats:
    """Parts of views at an offset, as unit vectors (n, 2352)."""
    row, column = offset
    parts = np.stack([view[row : row + _WINDOW, column : column + _WINDOW] for view in views])
    vectors = parts.reshape(len(views), -1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.where(lengths > _EVEN, vectors / np.maximum(lengths, _EVEN), 0.0)
    return units.astype(np.float32)


def grouped(
    views: Sequence[Floats], digests: Sequence[str], alike: float, block: int = BLOCK
) -> list[list[int]]:
    """Group photos of one scene: indices of each group, in the order of their first.

    Two groups are one where the mean likeness between their photos is at least `alike` (average
    linkage): a burst that drifts from one view to another is not held together by its neighbours
    alone. The same pixels, by their digests, are alike, whatever they show.
    """
    names = np.array(digests)
    groups = []
    for members in _connected(views, digests, alike, block):
        own = [views[index] for index in members]
        same = names[members][:, None] == names[members]
        distances = np.maximum(1.0 - np.where(same, 1.0, likenesses(own, own)), 0.0)
        groups += [[members[i] for i in part] for part in average_linkage(distances, 1.0 - alike)]
    return sorted(groups)


def average_linkage(distances: NDArray[np.floating], limit: float) -> list[list[int]]:
    """Merge the two nearest groups as long as their mean distance is within a limit.

    Distances are symmetric, (n, n); each group is in rising order.
    """
    count = len(distances)
    between = np.array(distances, np.float64)
    np.fill_diagonal(between, np.inf)
    sizes = np.ones(count)
    members = [[index] for index in range(count)]
    while count > 1:
        one, other = sorted(divmod(int(between.argmin()), count))
        if between[one, other] > limit:
            break
        total = sizes[one] + sizes[other]
        mean = (sizes[one] * between[one] + sizes[other] * between[other]) / total
        between[one] = between[:, one] = mean
        between[other] = between[:, other] = np.inf
        between[one, one] = np.inf
        sizes[one] = total
        members[one] += members[other]
        members[other] = []
    return [sorted(group) for group in members if group]


def _connected(
    views: Sequence[Floats], digests: Sequence[str], alike: float, block: int
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
    for one, other in _alike_pairs(views, alike, block):
        low, high = sorted((root_of(one), root_of(other)))
        roots[high] = low
    members: dict[int, list[int]] = {}
    for index in range(len(views)):
        members.setdefault(root_of(index), []).append(index)
    yield from members.values()


def _alike_pairs(views: Sequence[Floats], alike: float, block: int) -> Iterator[tuple[int, int]]:
    """Pairs whose likeness is at least `alike`, a block of the matrix at a time."""
    for start in range(0, len(views), block):
        for begin in range(start, len(views), block):
            found = likenesses(views[start : start + block], views[begin : begin + block])
            for one, other in np.argwhere(found >= alike).tolist():
                if start + one < begin + other:
                    yield start + one, begin + other


def require_cosine(alike: float) -> None:
    """Refuse a likeness that is not above 0 and at most 1."""
    if not 0.0 < alike <= 1.0:
        raise UsageError("likeness is a cosine", seen=alike, allowed="above 0, up to 1")
