"""Nearest keys among many: a graph that hnswlib builds, frozen into the arrays of a segment.

hnswlib cannot search its graph where it lies on the disk; `meiqa.kernels.hnsw` can. The graph's
arrays are named with the prefix "index_" and described in docs/memory-format.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, StoreMismatch, UsageError
from meiqa.kernels.hnsw import (
    Graph,
    Workspace,
    check_graph,
    search_graph,
    search_graph_many,
    workspace,
)
from meiqa.memory.cases import FloatArray
from meiqa.memory.encoding import quantise_tokens

__all__ = ["FLAT_BELOW", "FrozenIndex", "build_graph", "freeze", "index_arrays"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

FLAT_BELOW = 3000
"""Fewer keys than this are searched faster without an index (`meiqa bench memory`)."""

_NEIGHBOURS = 16
_BUILD_EFFORT = 200
_SEED = 20260320
_PREFIX = "index_"
_CHUNK_ROWS = 1 << 16


def index_arrays(keys: FloatArray, threads: int = 1) -> dict[str, Array]:
    """Build the graph of unit keys and freeze it; give nothing where flat search is faster.

    Args:
        keys: float32 (N, D), rows of length 1 (or 0).
        threads: With one thread the same keys give the same arrays. More are faster and differ
            from run to run.

    Returns:
        Arrays for a segment, as `FrozenIndex.of` takes them; {} below `FLAT_BELOW` keys.

    Raises:
        UsageError: hnswlib is not installed, or the keys are not finite.
    """
    return freeze(build_graph(keys, threads), keys) if len(keys) >= FLAT_BELOW else {}


def build_graph(keys: FloatArray, threads: int = 1) -> Any:
    """Let hnswlib build the graph of unit keys; arguments and errors are `index_arrays`'s.

    Returns:
        The hnswlib.Index, with the keys' rows as labels.
    """
    try:
        import hnswlib
    except ImportError as error:
        raise UsageError(
            "indexing a memory needs hnswlib", hint="run `pip install 'meiqa[index]'`"
        ) from error
    if not np.isfinite(keys).all():
        raise UsageError("the keys to be indexed are not finite")
    graph = hnswlib.Index("ip", keys.shape[1])
    graph.init_index(len(keys), M=_NEIGHBOURS, ef_construction=_BUILD_EFFORT, random_seed=_SEED)
    for start in range(0, len(keys), _CHUNK_ROWS):
        graph.add_items(keys[start : start + _CHUNK_ROWS], num_threads=threads)
    return graph


def freeze(graph: Any, keys: FloatArray) -> dict[str, Array]:
    """Take the graph that `build_graph` made of these keys apart into arrays for a segment."""
    encoded = quantise_tokens(keys)
    links = _links(graph.__getstate__()[0]) if len(keys) else _no_links()
    named: dict[str, Array] = {"levels": encoded.levels, "scales": encoded.scales, **links}
    return {_PREFIX + name: array for name, array in named.items()}


@dataclass(frozen=True, eq=False)
class FrozenIndex:
    """A graph searched where it lies; safe to share between threads.

    >>> keys = np.eye(4, dtype=np.float32)
    >>> index = FrozenIndex.of(freeze(build_graph(keys), keys), keys.astype(np.float16))
    >>> index.search(np.float32([0.1, 0.9, 0.3, 0.2]), 2, None, effort=8).tolist()
    [1, 2]
    """

    _graph: Graph
    _workspaces: deque[Workspace] = field(default_factory=deque)

    @classmethod
    def of(cls, arrays: Mapping[str, Array], keys: Array) -> FrozenIndex:
        """View the arrays of `index_arrays`; none is read or copied.

        Args:
            arrays: Those with the prefix "index_"; others are ignored.
            keys: float16 (N, D), the keys that were indexed.

        Raises:
            StoreCorrupted: an array is missing, or has another dtype or shape.
        """
        named = {"keys": keys.view(np.uint16) if keys.dtype == np.float16 else keys}
        for name in Graph._fields[1:]:
            if _PREFIX + name not in arrays:
                raise StoreCorrupted("the index lacks an array", seen=f"no {_PREFIX + name}")
            named[name] = arrays[_PREFIX + name]
        graph = Graph(**{name: _read_only(array) for name, array in named.items()})
        try:
            check_graph(graph)
        except ValueError as error:
            raise StoreCorrupted(f"the index does not fit its keys: {error}") from error
        return cls(graph)

    def __len__(self) -> int:
        return len(self._graph.keys)

    def verify(self) -> None:
        """Read all links, and refuse the index if one of them leads nowhere.

        Searching does not depend on it: damaged links are never followed outside the arrays.

        Raises:
            StoreCorrupted: a link, an offset or the entry is out of range.
        """
        graph, count = self._graph, len(self)
        for name in ("links", "upper_links"):
            _check_links(_PREFIX + name, getattr(graph, name), count)
        if count and not 0 <= graph.entry[0] < count:
            raise StoreCorrupted("the index's entry is no row", seen=int(graph.entry[0]))
        offsets = graph.upper_offsets
        ends = int(offsets[0]), int(offsets[-1])
        if ends != (0, len(graph.upper_links)) or (offsets[1:] < offsets[:-1]).any():
            raise StoreCorrupted(f"{_PREFIX}upper_offsets do not rise over the upper levels")

    def search(self, query: FloatArray, count: int, eligible: Mask | None, effort: int) -> Rows:
        """Find the nearest keys by cosine in float64, nearest first, equal ones by row.

        Candidates come from the graph; where few keys are eligible all of those are compared.

        Args:
            query: float32 (D,), finite, of any length.
            count: Keys wanted.
            eligible: bool (N,), which keys may be returned; None for all.
            effort: Candidates that the search keeps, at least `count` (hnswlib's ef): more finds
                more of the true neighbours and takes longer.

        Returns:
            Rows (min(count, eligible keys),).

        Raises:
            StoreMismatch: the query has another width than the keys.
            UsageError: the query is not finite; `count` or `effort` makes no sense.
        """
        self._check_width(query)
        count, effort = min(count, len(self)), min(effort, max(len(self), 1))
        with _bad_use():
            work = self._workspace(count, effort)
            try:
                return search_graph(self._graph, _as_query(query), count, eligible, effort, work)
            finally:
                self._workspaces.append(work)

    def search_many(
        self, queries: FloatArray, count: int, eligible: Mask | None, effort: int
    ) -> Rows:
        """Find the nearest keys of each query (B, D), in parallel; otherwise as `search`.

        Returns:
            Rows (B, min(count, eligible keys)).
        """
        self._check_width(queries)
        count, effort = min(count, len(self)), min(effort, max(len(self), 1))
        with _bad_use():
            return search_graph_many(self._graph, _as_query(queries), count, eligible, effort)

    def _check_width(self, queries: FloatArray) -> None:
        width = self._graph.keys.shape[1]
        if queries.shape[-1:] != (width,):
            raise StoreMismatch(
                "the query does not fit the index", seen=f"shape {queries.shape}", allowed=(width,)
            )

    def _workspace(self, count: int, effort: int) -> Workspace:
        """Take one that no other thread uses, or make it."""
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


def _no_links() -> dict[str, Array]:
    """Give the links of an index of no rows."""
    return {
        "links": np.empty((0, 2 * _NEIGHBOURS), np.int32),
        "upper_offsets": np.zeros(1, np.int32),
        "upper_links": np.empty((0, _NEIGHBOURS), np.int32),
        "entry": np.full(1, -1, np.int32),
    }


def _links(state: Mapping[str, Any]) -> dict[str, Array]:
    """Rewrite hnswlib's links between its places as links between rows.

    With several threads a row's place depends on who came first.
    """
    count = state["cur_element_count"]
    places = _level_zero(state)
    row_at = places[:, state["label_offset"] // 4].astype(np.int64)
    order = np.argsort(row_at)
    to_row = np.append(row_at, -1).astype(np.int32)  # -1 stays -1
    base = _without_header(places[:, : state["max_M0"] + 1], to_row)[order]
    levels = state["element_levels"][:count]
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(levels[order], out=offsets[1:])
    upper = state["link_lists"].view(np.uint32).reshape(-1, state["max_M"] + 1)
    upper_order = _runs(np.cumsum(levels) - levels, levels, order)
    return {
        "links": base,
        "upper_offsets": offsets.astype(np.int32),
        "upper_links": _without_header(upper, to_row)[upper_order],
        "entry": to_row[state["enterpoint_node"]].reshape(1),
    }


def _level_zero(state: Mapping[str, Any]) -> NDArray[np.uint32]:
    """View hnswlib's records of level 0: count, neighbours, vector, label; all of 4-byte words."""
    count, record_bytes = state["cur_element_count"], state["size_data_per_element"]
    content: NDArray[np.uint8] = state["data_level0"].view(np.uint8)[: count * record_bytes]
    return content.view(np.uint32).reshape(count, record_bytes // 4)


def _without_header(lists: NDArray[np.uint32], to_row: NDArray[np.int32]) -> NDArray[np.int32]:
    """Give lists of rows, padded with -1, for lists of places that begin with their length."""
    lengths = lists[:, :1] & 0xFFFF  # the upper half holds flags
    places = lists[:, 1:].astype(np.int32)
    places[np.arange(places.shape[1]) >= lengths] = -1
    return to_row[places]


def _runs(
    starts: NDArray[np.int32], lengths: NDArray[np.int32], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Give the positions of runs, one run after the other in another order.

    >>> _runs(np.int32([0, 2, 2]), np.int32([2, 0, 1]), np.array([2, 1, 0])).tolist()
    [2, 0, 1]
    """
    ordered = lengths[order].astype(np.int64)
    before = np.cumsum(ordered) - ordered
    positions: NDArray[np.int64] = np.repeat(starts[order] - before, ordered)
    positions += np.arange(len(positions))
    return positions
