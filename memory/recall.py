"""What a search finds of the true neighbours, measured on keys that it searches among."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.cases import FloatArray
from meiqa.memory.encoding import decode_keys
from meiqa.memory.frozen import FrozenIndex, Mask, Rows

__all__ = ["RecallTrial", "exact_cosines", "true_neighbours"]

Keys = NDArray[np.float16]

_CHUNK_ROWS = 1 << 16
_SPARE = 8
"""More candidates than are wanted, since float32 orders close ones wrongly."""


@dataclass(frozen=True, eq=False)
class RecallTrial:
    """Keys taken out of an index as queries, whose true neighbours are known.

    A key that is in the graph is found with less effort than any other query, and so are its
    neighbours, to which it is linked.

    Attributes:
        index: The index as if it had been built without them.
        keys: float16 (N, D), stored.
        eligible: bool (N,), false for the queries.
        queries: float32 (Q, D).
        cosines: float64 (Q, count) of their true neighbours, best first.
    """

    index: FrozenIndex
    keys: Keys
    eligible: Mask
    queries: FloatArray
    cosines: NDArray[np.float64]

    @classmethod
    def of(cls, index: FrozenIndex, keys: Keys, size: int, count: int) -> RecallTrial:
        """Take out `size` keys, or an eighth of all, and find the nearest `count` of each.

        They are evenly spread; fewer are taken than asked for where that meets the entry.
        """
        size = min(size, len(keys) // 8)
        rows = np.unique(np.linspace(0, len(keys) - 1, size).astype(np.int64))
        rows = rows[rows != index.entry]
        eligible = np.ones(len(keys), np.bool_)
        eligible[rows] = False
        queries = decode_keys(keys[rows])
        count = min(count, len(keys) - len(rows))
        _, cosines = true_neighbours(keys, queries, count, eligible)
        return cls(index.without(rows), keys, eligible, queries, cosines)

    def __len__(self) -> int:
        return len(self.queries)

    def shares(self, effort: int | None) -> NDArray[np.float64]:
        """Give what share of its true neighbours a search finds for each query (Q,).

        Of equally near keys one is as good as another.

        Args:
            effort: As `FrozenIndex.search` takes it.
        """
        count = self.cosines.shape[1]
        hits = [
            (exact_cosines(self._found(query, effort), query) >= true[-1]).sum()
            for query, true in zip(self.queries, self.cosines, strict=True)
        ]
        return np.array([hit / count for hit in hits], np.float64)

    def _found(self, query: FloatArray, effort: int | None) -> FloatArray:
        rows = self.index.search(query, self.cosines.shape[1], self.eligible, effort)
        return decode_keys(self.keys[rows])


def exact_cosines(keys: FloatArray, query: FloatArray) -> NDArray[np.float64]:
    """Give the cosines of unit keys (n, D) with a unit query (D,), summed alike for each row."""
    cosines: NDArray[np.float64] = (keys.astype(np.float64) * query).sum(axis=1)
    return cosines


def true_neighbours(
    keys: Keys, queries: FloatArray, count: int, eligible: Mask | None = None
) -> tuple[Rows, NDArray[np.float64]]:
    """Compare every query with every key that is eligible.

    Args:
        keys: float16 (N, D), stored.
        queries: float32 (Q, D), of length 1.
        count: How many of the nearest are wanted, no more than are eligible.
        eligible: bool (N,); None for all.

    Returns:
        Rows and cosines (Q, count), nearest first, equal ones by row.
    """
    kept = np.empty((len(queries), 0), np.int64)
    near = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(keys), _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, len(keys))
        rows = np.arange(start, stop)
        if eligible is not None:
            rows = rows[eligible[start:stop]]
        part = queries @ decode_keys(keys[rows]).T
        best = _largest(part, count + _SPARE)
        near = np.hstack([near, np.take_along_axis(part, best, axis=1)])
        kept = np.hstack([kept, rows[best]])
    best = _largest(near, count + _SPARE)
    kept = np.take_along_axis(kept, best, axis=1)
    found = np.empty((len(queries), count), np.int64)
    cosines = np.empty((len(queries), count), np.float64)
    for number, (query, rows) in enumerate(zip(queries, kept, strict=True)):
        exact = exact_cosines(decode_keys(keys[rows]), query)
        order = np.lexsort((rows, -exact))[:count]
        found[number], cosines[number] = rows[order], exact[order]
    return found, cosines


def _largest(values: FloatArray, count: int) -> Rows:
    """Give the columns of the largest values of each row, in no order."""
    if values.shape[1] <= count:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, values.shape[1] - count, axis=1)[:, -count:]
