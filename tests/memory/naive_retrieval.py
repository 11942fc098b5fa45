"""The slow, obvious twin of retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.memory import Case, RetrievalPolicy


@cache
def as_stored(key_bytes: bytes) -> list[float]:
    key = np.frombuffer(key_bytes, np.float32)
    length = math.sqrt(sum(float(x) ** 2 for x in key))
    unit = [np.float16(np.float32(float(x) / length if length else 0.0)) for x in key]
    return as_unit(np.array(unit, np.float32))


def as_unit(key: NDArray[Any]) -> list[float]:
    length = math.sqrt(sum(float(x) ** 2 for x in key))
    return [float(np.float32(float(x) / length if length else 0.0)) for x in key]


def by_similarity(query: NDArray[Any], cases: Sequence[Case]) -> list[Case]:
    unit = as_unit(query)

    return sorted(cases, key=lambda case: (-cosine(unit, case), case.id))


def cosine(unit: Sequence[float], case: Case) -> float:
    products = zip(as_stored(case.key.tobytes()), unit, strict=True)
    return round(sum(a * b for a, b in products), 12)


def tokens_as_stored(tokens: NDArray[Any]) -> NDArray[Any]:
    """Round each token to 127 steps of its largest magnitude, either way."""
    steps = [max(abs(token)) / np.float32(127) or np.float32(1) for token in tokens]
    rounded = [np.rint(token / step) * step for token, step in zip(tokens, steps, strict=True)]
    return np.array(rounded)


def naive_descriptor(tokens: NDArray[Any], grid: tuple[int, int]) -> NDArray[Any]:
    """Average a fine enough copy of the grid in 4 x 4 blocks, take the mean off, scale."""
    rows, columns = grid
    cells = tokens.astype(np.float64).reshape(rows, columns, -1)
    fine = cells.repeat(4, axis=0).repeat(4, axis=1)
    fields = [
        fine[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns].mean(axis=(0, 1))
        for r in range(4)
        for c in range(4)
    ]
    centred = (np.array(fields) - np.mean(fields, axis=0)).ravel()
    length = math.sqrt(float(centred @ centred))
    return centred / length if length > 1e-9 else np.zeros_like(centred)


def naive_retrieve(
    anchors: Sequence[Case],
    contrast: Sequence[Case],
    query: NDArray[Any],
    policy: RetrievalPolicy,
    exclude_digest: str | None,
    descriptor: NDArray[Any] | None = None,
) -> list[str]:
    by_score = sorted(anchors, key=lambda case: (case.score, case.id))
    bin_of = {case.id: i * policy.bins // len(anchors) for i, case in enumerate(by_score)}

    def may_be_taken(case: Case) -> bool:
        if case.image_digest == exclude_digest:
            return False
        if descriptor is None or policy.exclude_above == 1:
            return True
        likeness = float(naive_descriptor(tokens_as_stored(case.tokens), case.grid) @ descriptor)
        return likeness <= policy.exclude_above

    anchors = [case for case in anchors if may_be_taken(case)]
    contrast = [case for case in contrast if may_be_taken(case)]

    wanted = math.floor(policy.k * policy.anchor_share + 0.5)
    contrast_count = min(policy.k - min(wanted, len(anchors)), len(contrast))
    anchor_count = min(policy.k - contrast_count, len(anchors))

    ranked = by_similarity(query, anchors)
    chosen: list[Case] = []
    for number in range(policy.bins):
        inside = [case for case in ranked if bin_of[case.id] == number]
        chosen += inside[: anchor_count // policy.bins]
    rest = [case for case in ranked if case not in chosen]
    chosen += rest[: anchor_count - len(chosen)]
    nearest_contrast = by_similarity(query, contrast)[:contrast_count]
    return [case.id for case in (*by_similarity(query, chosen), *nearest_contrast)]
