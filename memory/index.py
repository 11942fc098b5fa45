"""Making the index of many keys: hnswlib builds a graph, which is frozen into arrays of a segment.

hnswlib cannot search its graph where it lies on the disk; `meiqa.kernels.hnsw` can. How many
candidates a search of it must keep depends on the keys and on their number; it is measured on the
keys themselves, once, and becomes a part of the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import UsageError
from meiqa.memory.encoding import decode_keys, quantise_tokens
from meiqa.memory.frozen import INDEX_PREFIX, MEASURED_COUNT, FrozenIndex
from meiqa.memory.recall import RecallTrial

__all__ = ["FLAT_BELOW", "RECALL", "build_graph", "freeze", "index_arrays"]

Array = NDArray[Any]
Keys = NDArray[np.float16]

FLAT_BELOW = 3000
"""Fewer keys than this are searched faster without an index (`meiqa bench memory`)."""

RECALL = 0.97
"""Share of the true neighbours that the measured effort finds."""

_NEIGHBOURS = 16
_BUILD_EFFORT = 200
_SEED = 20260320
_CHUNK_ROWS = 1 << 16
_SAMPLE = 512
_LEAST_EFFORT = 32


def index_arrays(keys: Keys, threads: int = 1) -> dict[str, Array]:
    """Build the graph of stored keys and freeze it; give nothing where flat search is faster.

    Args:
        keys: float16 (N, D), rows of length 1 (or 0).
        threads: With one thread the same keys give the same arrays. More are faster and differ
            from run to run.

    Returns:
        Arrays for a segment, as `FrozenIndex.of` takes them; {} below `FLAT_BELOW` keys.

    Raises:
        UsageError: hnswlib is not installed, or the keys are not finite.
    """
    return freeze(build_graph(keys, threads), keys) if len(keys) >= FLAT_BELOW else {}


def build_graph(keys: Keys, threads: int = 1) -> Any:
    """Let hnswlib build the graph of stored keys; arguments and errors are `index_arrays`'s.

    Returns:
        The hnswlib.Index, with the keys' rows as labels.
    """
    try:
        import hnswlib
    except ImportError as error:
        raise UsageError(
            "indexing a memory needs hnswlib", hint="run `pip install 'meiqa[index]'`"
        ) from error
    if not all(np.isfinite(part).all() for part in _parts(keys)):
        raise UsageError("the keys to be indexed are not finite")
    graph = hnswlib.Index("ip", keys.shape[1])
    graph.init_index(len(keys), M=_NEIGHBOURS, ef_construction=_BUILD_EFFORT, random_seed=_SEED)
    for part in _parts(keys):
        graph.add_items(decode_keys(part), num_threads=threads)
    return graph


def freeze(graph: Any, keys: Keys) -> dict[str, Array]:
    """Take the graph that `build_graph` made of these keys apart into arrays for a segment.

    Also measures the effort with which a search finds `RECALL` of the true neighbours: see
    `_least_effort`.
    """
    links = _links(graph.__getstate__()[0]) if len(keys) else _no_links()
    named = {**_walked(keys), **links, "effort": np.full(1, _LEAST_EFFORT, np.int32)}
    arrays = {INDEX_PREFIX + name: array for name, array in named.items()}
    named["effort"][0] = _least_effort(FrozenIndex.of(arrays, keys), keys)
    return arrays


def _least_effort(index: FrozenIndex, keys: Keys) -> int:
    """Find the effort from which on the true share is above `RECALL` beyond reasonable doubt.

    Keys taken out of the graph are the queries, since those in it lie beside their neighbours. The
    mean over them less two standard errors has to reach `RECALL`. With an effort of an eighth of
    the keys the search is exact, so that one is always found.
    """
    trial = RecallTrial.of(index, keys, _SAMPLE, MEASURED_COUNT)
    effort = _LEAST_EFFORT
    while len(trial) and effort < len(keys):
        shares = trial.shares(effort)
        doubt = 2.0 * float(shares.std()) / len(trial) ** 0.5
        if float(shares.mean()) - doubt >= RECALL:
            break
        effort += effort // 4
    return effort


def _walked(keys: Keys) -> dict[str, Array]:
    """Round the keys for walking."""
    levels = np.empty(keys.shape, np.int8)
    scales = np.empty(len(keys), np.float32)
    for number, part in enumerate(_parts(keys)):
        encoded = quantise_tokens(decode_keys(part))
        rows = slice(number * _CHUNK_ROWS, number * _CHUNK_ROWS + len(part))
        levels[rows], scales[rows] = encoded.levels, encoded.scales
    return {"levels": levels, "scales": scales}


def _parts(keys: Keys) -> Iterator[Keys]:
    """Divide keys so that the decoded ones need little memory."""
    for start in range(0, len(keys), _CHUNK_ROWS):
        yield keys[start : start + _CHUNK_ROWS]


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
