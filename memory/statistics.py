"""What a memory holds, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from meiqa.memory.encoding import decode_keys
from meiqa.memory.generation import Generation
from meiqa.memory.retrieval import RetrievalPolicy
from meiqa.memory.store import CaseStore
from meiqa.memory.view import CaseView
from meiqa.types import Origin

__all__ = ["HISTOGRAM_EDGES", "MemoryStatistics", "OriginStatistics", "take_statistics"]

HISTOGRAM_EDGES = tuple(1.0 + 0.5 * step for step in range(9))
"""Limits of the histogram's bins; each bin holds its lower limit, the last one both."""

_NEIGHBOURS = 32
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class OriginStatistics:
    """Numbers of the cases of one origin.

    Attributes:
        cases: How many there are.
        recent: How many of them are not in a segment yet.
        hidden: How many rows of the segment count no longer.
        generation: Number of the current generation; 0 if there is none.
        segment_bytes: Size of its segment.
        records_bytes: Size of its database.
        histogram: Cases by score, between `HISTOGRAM_EDGES`.
        index: "flat" or "frozen".
        recall: Share of the exact 32 nearest that a search finds, over a sample; None without an
            index.
    """

    cases: int
    recent: int
    hidden: int
    generation: int
    segment_bytes: int
    records_bytes: int
    histogram: tuple[int, ...]
    index: str
    recall: float | None


@dataclass(frozen=True)
class MemoryStatistics:
    """Numbers of a memory; `journal_bytes` is what is stored outside segments."""

    origins: dict[Origin, OriginStatistics]
    journal_bytes: int


def take_statistics(store: CaseStore, sample: int) -> MemoryStatistics:
    """Count and measure; the recall takes `sample` searches spread over the stored keys."""
    origins = {origin: _of_view(view, sample) for origin, view in store.views().items()}
    files = store.path.glob("cases.sqlite3*")
    return MemoryStatistics(origins, sum(file.stat().st_size for file in files))


def _of_view(view: CaseView, sample: int) -> OriginStatistics:
    generation = view.generation
    indexed = generation is not None and generation.is_indexed
    return OriginStatistics(
        cases=len(view),
        recent=len(view.recent),
        hidden=len(view.hidden),
        generation=0 if generation is None else generation.number,
        segment_bytes=0 if generation is None else generation.segment.path.stat().st_size,
        records_bytes=0 if generation is None else generation.records_path.stat().st_size,
        histogram=tuple(np.histogram(view.scores(), HISTOGRAM_EDGES)[0].tolist()),
        index="frozen" if indexed else "flat",
        recall=_recall(generation, sample) if generation is not None and indexed else None,
    )


def _recall(generation: Generation, sample: int) -> float:
    """Compare the index with exact search, for evenly spread stored keys."""
    effort = RetrievalPolicy().effort
    keys: Any = generation.segment.arrays["keys"]
    rows = np.unique(np.linspace(0, len(keys) - 1, sample).astype(np.intp))
    queries = decode_keys(keys[rows])
    count = min(_NEIGHBOURS, len(keys))
    found = [generation.table.probe(query, effort).nearest(count, None).rows for query in queries]
    exact = _exact(keys, queries, count)
    hits = sum(len(np.intersect1d(one, other)) for one, other in zip(found, exact, strict=True))
    return hits / (count * len(rows))


def _exact(keys: Any, queries: Any, count: int) -> Any:
    """Rows (Q, count) of the keys nearest to each query, in no order."""
    rows: Any = np.empty((len(queries), 0), np.intp)
    cosines: Any = np.empty((len(queries), 0), np.float32)
    for first, chunk in _chunks(keys):
        near = queries @ chunk.T
        cosines = np.concatenate([cosines, near], axis=1)
        numbers = np.broadcast_to(first + np.arange(len(chunk)), near.shape)
        rows = np.concatenate([rows, numbers], axis=1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        rows, cosines = (np.take_along_axis(each, best, axis=1) for each in (rows, cosines))
    return rows


def _chunks(keys: Any) -> Iterator[tuple[int, Any]]:
    for first in range(0, len(keys), _CHUNK_ROWS):
        yield first, decode_keys(keys[first : first + _CHUNK_ROWS])
