"""The index of many keys: hnswlib builds a graph, which is frozen into arrays and searched there.

hnswlib cannot search its graph where it lies on the disk; `meiqa.kernels.hnsw` can. How many
candidates a search of it must keep depends on the keys and on their number; it is measured on the
keys themselves, once, and becomes a part of the index (docs/memory-format.md). hnswlib and Numba
come with the extra `index`, and are loaded where an index is built or searched only.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, UsageError, install_hint
from meiqa.kernels.graph import Graph, check_graph
from meiqa.memory.cases import FloatArray, Mask, decode_keys, exact_cosines, quantise_tokens
from meiqa.memory.pacing import Pace
from meiqa.memory.segment import Array

Keys: TypeAlias = NDArray[np.float16]
Found: TypeAlias = NDArray[np.int64]

INDEX_PREFIX = "index_"

FLAT_BELOW = 3000
"""Fewer keys than this are searched faster without an index (`python -m benchmarks.memory`)."""

RECALL = 0.97
"""Share of the true neighbours that the measured effort finds."""

_MEASURED_COUNT = 32
"""For how many nearest keys the effort of an index is measured."""

_NEIGHBOURS = 16
_BUILD_EFFORT = 200
_SEED = 20260320
_CHUNK_ROWS = 1 << 16
_STEP_ROWS = 16
_SAMPLE = 512
_LEAST_EFFORT = 32
_SPARE = 8
"""More candidates than are wanted, since float32 orders close ones wrongly."""


def can_be_built() -> bool:
    """Tell whether hnswlib is installed."""
    return importlib.util.find_spec("hnswlib") is not None


class Building(NamedTuple):
    """How an index is built: by so many threads, none where it is not, and at what pace."""

    threads: int = 1
    pace: Pace | None = None


def index_arrays(keys: Keys, threads: int = 1, pace: Pace | None = None) -> dict[str, Array]:
    """Give the arrays of an index over unit keys (N, D) for a segment; {} below `FLAT_BELOW`.

    With one thread the same keys give the same arrays. More are faster and differ from run to run.
    UsageError if hnswlib or Numba is not installed, or the keys are not finite.
    """
    if len(keys) < FLAT_BELOW:
        return {}
    pace = pace or Pace()
    return freeze(build_graph(keys, threads, pace), keys, pace)


def build_graph(keys: Keys, threads: int = 1, pace: Pace | None = None) -> Any:
    """Let hnswlib build the graph of stored keys, with their rows as labels; see `index_arrays`."""
    try:
        import hnswlib
    except ImportError as error:
        raise UsageError("indexing a memory needs hnswlib", hint=install_hint("index")) from error
    if not all(np.isfinite(part).all() for part in _parts(keys)):
        raise UsageError("the keys to be indexed are not finite")
    graph = hnswlib.Index("ip", keys.shape[1])
    graph.init_index(len(keys), M=_NEIGHBOURS, ef_construction=_BUILD_EFFORT, random_seed=_SEED)
    parts = _parts(keys, _STEP_ROWS if threads == 1 else _CHUNK_ROWS)
    for part in (pace or Pace()).through(parts):
        graph.add_items(decode_keys(part), num_threads=threads)
    return graph


def freeze(graph: Any, keys: Keys, pace: Pace | None = None) -> dict[str, Array]:
    """Take the graph of these keys apart into arrays for a segment, and measure its effort."""
    levels, scales = np.empty(keys.shape, np.int8), np.empty(len(keys), np.float32)
    for rows in _parts(np.arange(len(keys))):
        levels[rows], scales[rows] = quantise_tokens(decode_keys(keys[rows]))
    effort = np.full(1, _LEAST_EFFORT, np.int32)
    named = _links(graph.__getstate__()[0])
    named |= {"levels": levels, "scales": scales, "effort": effort}
    arrays = {INDEX_PREFIX + name: array for name, array in named.items()}
    effort[0] = _least_effort(FrozenIndex.of(arrays, keys), keys, pace or Pace())
    return arrays


def _least_effort(index: FrozenIndex, keys: Keys, pace: Pace) -> int:
    """Find the effort from which on the true share is above `RECALL` beyond reasonable doubt.

    Keys taken out of the graph are the queries, since those in it lie beside their neighbours. The
    mean over them less two standard errors has to reach `RECALL`. With an effort of an eighth of
    the keys the search is exact, so that one is always found.
    """
    shares_at, effort = recall_trial(index, keys, _SAMPLE, pace=pace), _LEAST_EFFORT
    while effort < len(keys) and len(shares := shares_at(effort)):
        doubt = 2.0 * float(shares.std()) / len(shares) ** 0.5
        if float(shares.mean()) - doubt >= RECALL:
            break
        effort += effort // 4
    return effort


def _parts(rows: Array, size: int = _CHUNK_ROWS) -> Iterator[Array]:
    """Divide rows so that decoded ones need little memory."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _links(state: Mapping[str, Any]) -> dict[str, Array]:
    """Rewrite hnswlib's links between its places as links between rows.

    With several threads a row's place depends on who came first.
    """
    count, record_bytes = state["cur_element_count"], state["size_data_per_element"]
    # hnswlib's records of level 0: count, neighbours, vector, label; all of 4-byte words.
    content = state["data_level0"].view(np.uint8)[: count * record_bytes]
    places = content.view(np.uint32).reshape(count, record_bytes // 4)
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


@dataclass(frozen=True, eq=False)
class FrozenIndex:
    """A graph searched where it lies; safe to share between threads.

    >>> keys = np.eye(4, dtype=np.float16)
    >>> index = FrozenIndex.of(freeze(build_graph(keys), keys), keys)
    >>> index.search(np.float32([0.1, 0.9, 0.3, 0.2]), 2, None).tolist()
    [1, 2]
    """

    _graph: Graph
    _measured: Array
    _workspaces: deque[Any] = field(default_factory=deque)

    @classmethod
    def of(cls, arrays: Mapping[str, Array], keys: Array) -> FrozenIndex:
        """View the arrays of `index_arrays` over the keys (N, D) that were indexed.

        None is read or copied. StoreCorrupted if one is missing, or has another dtype or shape.
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

        It was measured for the nearest 32, and grows in proportion where more are wanted.
        """
        measured = int(self._measured[0])
        if measured < 1:
            what = "the index's effort is damaged"
            raise StoreCorrupted(what, seen=measured, allowed="1 or more")
        return -(-measured * max(count, _MEASURED_COUNT) // _MEASURED_COUNT)

    def without(self, rows: Found) -> FrozenIndex:
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
        """The row where every walk begins."""
        return int(self._graph.entry[0])

    def verify(self) -> None:
        """Read all links and refuse damaged ones, which are never followed outside the arrays."""
        graph, count = self._graph, len(self)
        self.effort(_MEASURED_COUNT)
        for name in ("links", "upper_links"):
            for part in _parts(getattr(graph, name)):
                if part.size and not (part.min() >= -1 and part.max() < count):
                    what = f"{INDEX_PREFIX}{name} has a link to no row"
                    seen = f"{part.min()} to {part.max()}"
                    raise StoreCorrupted(what, seen=seen, allowed=f"-1 to {count - 1}")
        if not 0 <= self.entry < count:
            raise StoreCorrupted("the index's entry is no row", seen=self.entry)
        offsets = graph.upper_offsets
        ends = int(offsets[0]), int(offsets[-1])
        if ends != (0, len(graph.upper_links)) or (offsets[1:] < offsets[:-1]).any():
            raise StoreCorrupted(f"{INDEX_PREFIX}upper_offsets do not rise over the upper levels")

    def search(
        self, query: FloatArray, count: int, eligible: Mask | None, effort: int | None = None
    ) -> Found:
        """Find the nearest keys by cosine in float64, nearest first, equal ones by row.

        Candidates come from the graph; where few keys are eligible (N,) all of those are compared.
        The effort is how many candidates the search keeps (hnswlib's ef): more finds more of the
        true neighbours and takes longer. None stands for `self.effort(count)`.
        """
        try:
            from meiqa.kernels import hnsw as kernel  # and Numba with it
        except ImportError as error:
            what = "searching the index of a memory needs numba"
            raise UsageError(what, hint=install_hint("index")) from error
        graph = self._graph
        query, count = np.ascontiguousarray(query, dtype=np.float32), min(count, len(self))
        effort = min(self.effort(count) if effort is None else effort, max(len(self), 1))
        try:
            work = self._workspaces.pop()  # one that no other thread uses
        except IndexError:
            work = kernel.workspace(graph)
        try:
            found = kernel.search_graph(graph, query, count, eligible, effort, work)
        except ValueError as error:
            raise UsageError(str(error)) from error
        finally:
            self._workspaces.append(work)
        return found


def _read_only(array: Array) -> Array:
    """View an array read-only, as a memory map is, so that the kernel is compiled once."""
    view = array.view()
    view.setflags(write=False)
    return view


def recall_trial(
    index: FrozenIndex,
    keys: Keys,
    size: int,
    count: int = _MEASURED_COUNT,
    pace: Pace | None = None,
) -> Callable[[int | None], NDArray[np.float64]]:
    """Take keys out of an index as queries, to measure how many true neighbours a search finds.

    A key that is in the graph is found with less effort than any other query, and so are its
    neighbours, to which it is linked. So `size` keys, or an eighth of all, evenly spread, are taken
    out; fewer where that meets the entry.

    Returns:
        A function of the effort that gives the share found of each one's nearest `count` (Q,). Of
        equally near keys one is as good as another.
    """
    rows = np.unique(np.linspace(0, len(keys) - 1, min(size, len(keys) // 8)).astype(np.int64))
    rows = rows[rows != index.entry]
    eligible, queries = np.ones(len(keys), np.bool_), decode_keys(keys[rows])
    eligible[rows] = False
    cut, count = index.without(rows), min(count, len(keys) - len(rows))
    pace = pace or Pace()
    _, cosines = true_neighbours(keys, queries, count, eligible)

    def shares(effort: int | None) -> NDArray[np.float64]:
        found = np.empty(len(queries), np.float64)
        pairs = pace.through(zip(queries, cosines, strict=True))
        for number, (query, true) in enumerate(pairs):
            near = decode_keys(keys[cut.search(query, count, eligible, effort)])
            found[number] = (exact_cosines(near, query) >= true[-1]).sum()
        found /= count
        return found

    return shares


def true_neighbours(
    keys: Keys, queries: FloatArray, count: int, eligible: Mask | None = None
) -> tuple[Found, NDArray[np.float64]]:
    """Compare every unit query (Q, D) with every stored key (N, D) that is eligible (N,).

    Returns:
        Rows and cosines (Q, count), nearest first, equal ones by row.
    """
    kept = np.empty((len(queries), 0), np.int64)
    near = np.empty((len(queries), 0), np.float32)
    for rows in _parts(np.arange(len(keys)) if eligible is None else np.flatnonzero(eligible)):
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


def _largest(values: FloatArray, count: int) -> Found:
    """Give the columns of the largest values of each row, in no order."""
    if values.shape[1] <= count:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, values.shape[1] - count, axis=1)[:, -count:]
