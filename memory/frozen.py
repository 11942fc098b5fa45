"""Nearest keys among many: a frozen graph, searched in the arrays of a segment.

The arrays are named with the prefix "index_" and described in docs/memory-format.md;
`meiqa.memory.index` makes them. The kernel comes with Numba, whose import takes longer than scoring
a photo: only who searches an index imports it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, StoreMismatch, UsageError
from meiqa.kernels.graph import Graph, check_graph
from meiqa.memory.cases import FloatArray

if TYPE_CHECKING:
    from meiqa.kernels.hnsw import Workspace

__all__ = ["INDEX_PREFIX", "MEASURED_COUNT", "FrozenIndex"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

INDEX_PREFIX = "index_"
MEASURED_COUNT = 32
"""For how many nearest keys the effort of an index was measured."""

_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class FrozenIndex:
    """A graph searched where it lies; safe to share between threads.

    >>> from meiqa.memory.index import build_graph, freeze
    >>> keys = np.eye(4, dtype=np.float16)
    >>> index = FrozenIndex.of(freeze(build_graph(keys), keys), keys)
    >>> index.search(np.float32([0.1, 0.9, 0.3, 0.2]), 2, None).tolist()
    [1, 2]
    """

    _graph: Graph
    _measured: Array
    _workspaces: deque[Workspace] = field(default_factory=deque)

    @classmethod
    def of(cls, arrays: Mapping[str, Array], keys: Array) -> FrozenIndex:
        """View the arrays of `meiqa.memory.index.index_arrays`; none is read or copied.

        Args:
            arrays: Those with the prefix "index_"; others are ignored.
            keys: float16 (N, D), the keys that were indexed.

        Raises:
            StoreCorrupted: an array is missing, or has another dtype or shape.
        """
        named = {"keys": keys.view(np.uint16) if keys.dtype == np.float16 else keys}
        for name in (*Graph._fields[1:], "effort"):
            if INDEX_PREFIX + name not in arrays:
                raise StoreCorrupted("the index lacks an array", seen=f"no {INDEX_PREFIX + name}")
            named[name] = arrays[INDEX_PREFIX + name]
        measured = named.pop("effort")
        graph = Graph(**{name: _read_only(array) for name, array in named.items()})
        try:
            check_graph(graph)
        except ValueError as error:
            raise StoreCorrupted(f"the index does not fit its keys: {error}") from error
        if measured.dtype != np.int32 or measured.shape != (1,):
            raise StoreCorrupted("the index's effort does not fit: it must be one int32")
        return cls(graph, measured)

    def __len__(self) -> int:
        return len(self._graph.keys)

    def effort(self, count: int) -> int:
        """Give the effort that finds at least 97 % of the nearest `count` keys of most queries.

        It was measured on these keys for the nearest 32 when the index was made, and grows in
        proportion where more are wanted.

        Raises:
            StoreCorrupted: the number is damaged.
        """
        measured = int(self._measured[0])
        if measured < 1:
            raise StoreCorrupted(
                "the index's effort is damaged", seen=measured, allowed="1 or more"
            )
        return -(-measured * max(count, MEASURED_COUNT) // MEASURED_COUNT)

    def without(self, rows: Rows) -> FrozenIndex:
        """Give a copy whose walks end at these rows, as if the graph had been built without them.

        Links to them remain, so that a search must say that they are not eligible. The entry must
        not be among them.
        """
        graph = self._graph
        links, upper, offsets = graph.links.copy(), graph.upper_links.copy(), graph.upper_offsets
        links[rows] = -1
        for row in rows.tolist():
            upper[offsets[row] : offsets[row + 1]] = -1
        cut = graph._replace(links=_read_only(links), upper_links=_read_only(upper))
        return replace(self, _graph=cut, _workspaces=deque())

    @property
    def entry(self) -> int:
        """The row where every walk begins; -1 in an index of no rows."""
        return int(self._graph.entry[0])

    def verify(self) -> None:
        """Read all links, and refuse the index if one of them leads nowhere.

        Searching does not depend on it: damaged links are never followed outside the arrays.

        Raises:
            StoreCorrupted: a link, an offset, the entry or the effort is out of range.
        """
        graph, count = self._graph, len(self)
        self.effort(MEASURED_COUNT)
        for name in ("links", "upper_links"):
            _check_links(INDEX_PREFIX + name, getattr(graph, name), count)
        if count and not 0 <= self.entry < count:
            raise StoreCorrupted("the index's entry is no row", seen=self.entry)
        offsets = graph.upper_offsets
        ends = int(offsets[0]), int(offsets[-1])
        if ends != (0, len(graph.upper_links)) or (offsets[1:] < offsets[:-1]).any():
            raise StoreCorrupted(f"{INDEX_PREFIX}upper_offsets do not rise over the upper levels")

    def search(
        self, query: FloatArray, count: int, eligible: Mask | None, effort: int | None = None
    ) -> Rows:
        """Find the nearest keys by cosine in float64, nearest first, equal ones by row.

        Candidates come from the graph; where few keys are eligible all of those are compared.

        Args:
            query: float32 (D,), finite, of any length.
            count: Keys wanted.
            eligible: bool (N,), which keys may be returned; None for all.
            effort: Candidates that the search keeps, at least `count` (hnswlib's ef): more finds
                more of the true neighbours and takes longer. None for `self.effort(count)`.

        Returns:
            Rows (min(count, eligible keys),).

        Raises:
            StoreCorrupted: the measured effort is damaged.
            StoreMismatch: the query has another width than the keys.
            UsageError: the query is not finite; `count` or `effort` makes no sense.
        """
        from meiqa.kernels.hnsw import search_graph

        self._check_width(query)
        count, effort = self._limited(count, effort)
        with _bad_use():
            work = self._workspace(count, effort)
            try:
                return search_graph(self._graph, _as_query(query), count, eligible, effort, work)
            finally:
                self._workspaces.append(work)

    def search_many(
        self, queries: FloatArray, count: int, eligible: Mask | None, effort: int | None = None
    ) -> Rows:
        """Find the nearest keys of each query (B, D), in parallel; otherwise as `search`.

        Returns:
            Rows (B, min(count, eligible keys)).
        """
        from meiqa.kernels.hnsw import search_graph_many

        self._check_width(queries)
        count, effort = self._limited(count, effort)
        with _bad_use():
            return search_graph_many(self._graph, _as_query(queries), count, eligible, effort)

    def _check_width(self, queries: FloatArray) -> None:
        width = self._graph.keys.shape[1]
        if queries.shape[-1:] != (width,):
            raise StoreMismatch(
                "the query does not fit the index", seen=f"shape {queries.shape}", allowed=(width,)
            )

    def _limited(self, count: int, effort: int | None) -> tuple[int, int]:
        """Ask for no more than there is."""
        count = min(count, len(self))
        wanted = self.effort(count) if effort is None else effort
        return count, min(wanted, max(len(self), 1))

    def _workspace(self, count: int, effort: int) -> Workspace:
        """Take one that no other thread uses, or make it."""
        from meiqa.kernels.hnsw import workspace

        try:
            work = self._workspaces.pop()
        except IndexError:
            return workspace(self._graph, count, effort)
        if len(work.rows) >= count and len(work.found) >= max(count, effort):
            return work
        return workspace(self._graph, count, effort)


@contextmanager
def _bad_use() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _as_query(query: FloatArray) -> FloatArray:
    return np.ascontiguousarray(query, dtype=np.float32)


def _read_only(array: Array) -> Array:
    """View an array read-only, as a memory map is, so that the kernel is compiled once."""
    view = array.view()
    view.setflags(write=False)
    return view


def _check_links(name: str, links: Array, count: int) -> None:
    for start in range(0, len(links), _CHUNK_ROWS):
        part = links[start : start + _CHUNK_ROWS]
        if part.size and not (part.min() >= -1 and part.max() < count):
            raise StoreCorrupted(
                f"{name} has a link to no row",
                seen=f"{part.min()} to {part.max()}",
                allowed=f"-1 to {count - 1}",
            )
