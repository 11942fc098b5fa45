"""Nearest keys of one table, exactly ordered: flat where there are few, by the frozen index above.

The order is exact and repeatable: candidates are ranked by their cosine in float64, summed the same
way for every row, and equal cosines by row. Neither the number of threads nor the way in which the
candidates were found changes what is nearer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.cases import FloatArray
from meiqa.memory.encoding import decode_keys
from meiqa.memory.frozen import FrozenIndex
from meiqa.memory.recall import exact_cosines
from meiqa.memory.segment_layout import Array

__all__ = ["FlatTable", "Found", "IndexedTable", "Mask", "Probe", "Rows", "Table"]

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Found:
    """Rows (n,), nearest first, with their exact cosines (n,)."""

    rows: Rows
    cosines: NDArray[np.float64]

    def where(self, kept: Mask) -> Found:
        """Give those for which `kept` (n,) is true."""
        return Found(self.rows[kept], self.cosines[kept])

    def first(self, count: int) -> Found:
        """Give the `count` nearest."""
        return Found(self.rows[:count], self.cosines[:count])


class Probe(Protocol):
    """One query against one table."""

    def nearest(self, count: int, eligible: Mask | None) -> Found:
        """Give the `count` nearest rows of those that are eligible, or all if they are fewer."""


class Table(Protocol):
    """Unit keys that can be searched."""

    def probe(self, query: FloatArray, effort: int | None) -> Probe:
        """Begin to search for a unit query (D_key,) with an effort, or with that of the index."""


@dataclass(frozen=True, eq=False)
class FlatTable:
    """Unit keys (N, D_key) in memory, all of which are compared."""

    keys: FloatArray

    @classmethod
    def of(cls, stored: NDArray[np.float16]) -> FlatTable:
        """Decode stored keys (N, D_key)."""
        return cls(decode_keys(stored))

    def probe(self, query: FloatArray, effort: int | None) -> Probe:
        """Compare with every key; `effort` does not matter."""
        return _FlatProbe(self.keys, query, self.keys @ query)


@dataclass(frozen=True, eq=False)
class _FlatProbe:
    keys: FloatArray
    query: FloatArray
    cosines: FloatArray

    def nearest(self, count: int, eligible: Mask | None) -> Found:
        rows = np.arange(len(self.keys)) if eligible is None else np.flatnonzero(eligible)
        if count <= 0:
            rows = rows[:0]
        elif count < len(rows):
            cosines = self.cosines[rows]
            cutoff = np.partition(cosines, len(rows) - count)[len(rows) - count]
            rows = rows[cosines >= cutoff - self._margin]
        return _in_order(rows, self.keys[rows], self.query, count)

    @property
    def _margin(self) -> float:
        """Twice the largest error of a float32 dot product of two unit vectors, in any order."""
        return 2.0 * (len(self.query) + 4) * 2.0**-24


@dataclass(frozen=True, eq=False)
class IndexedTable:
    """Stored keys (N, D_key) under a frozen index; both are mapped, and nothing is copied."""

    keys: NDArray[np.float16]
    index: FrozenIndex

    @classmethod
    def of(cls, arrays: Mapping[str, Array], keys: NDArray[np.float16]) -> IndexedTable:
        """View the arrays of an index over stored keys."""
        return cls(keys, FrozenIndex.of(arrays, keys))

    def probe(self, query: FloatArray, effort: int | None) -> Probe:
        """Begin a walk, which keeps `effort` candidates, or as many as the index says."""
        return _IndexedProbe(self, query, effort)


@dataclass(frozen=True, eq=False)
class _IndexedProbe:
    table: IndexedTable
    query: FloatArray
    effort: int | None

    def nearest(self, count: int, eligible: Mask | None) -> Found:
        if count <= 0:
            return Found(np.empty(0, np.intp), np.empty(0, np.float64))
        rows = self.table.index.search(self.query, count, eligible, self.effort)
        rows = rows.astype(np.intp, copy=False)
        return _in_order(rows, decode_keys(self.table.keys[rows]), self.query, count)


def _in_order(rows: Rows, keys: FloatArray, query: FloatArray, count: int) -> Found:
    """Sort rows by their exact cosine, highest first, ties by row."""
    cosines = exact_cosines(keys, query)
    order = np.lexsort((rows, -cosines))[: max(count, 0)]
    return Found(rows[order], cosines[order])
