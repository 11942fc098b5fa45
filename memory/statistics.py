"""What a memory holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meiqa.memory.recall import RecallTrial
from meiqa.memory.search import IndexedTable
from meiqa.memory.store import CaseStore
from meiqa.memory.view import CaseView
from meiqa.types import KeyKind, Origin

__all__ = ["HISTOGRAM_EDGES", "MemoryStatistics", "OriginStatistics", "take_statistics"]

HISTOGRAM_EDGES = tuple(1.0 + 0.5 * step for step in range(9))
"""Limits of the histogram's bins; each bin holds its lower limit, the last one both."""

_NEIGHBOURS = 32


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
        thumbnails: How many photos are kept as thumbnails.
        histogram: Cases by score, between `HISTOGRAM_EDGES`.
        index: "flat" or "frozen".
        recall: Share of the true 32 nearest that a search finds, over a sample; None without an
            index.
    """

    cases: int
    recent: int
    hidden: int
    generation: int
    segment_bytes: int
    records_bytes: int
    thumbnails: int
    histogram: tuple[int, ...]
    index: str
    recall: float | None


@dataclass(frozen=True)
class MemoryStatistics:
    """Numbers of a memory.

    Attributes:
        key_kind: What its keys are made of.
        origins: Numbers of anchors and contrast cases.
        journal_bytes: Size of what is stored outside segments.
    """

    key_kind: KeyKind
    origins: dict[Origin, OriginStatistics]
    journal_bytes: int


def take_statistics(store: CaseStore, sample: int) -> MemoryStatistics:
    """Count and measure; the recall takes `sample` searches spread over the stored keys."""
    origins = {origin: _of_view(view, sample) for origin, view in store.views().items()}
    files = store.path.glob("cases.sqlite3*")
    journal_bytes = sum(file.stat().st_size for file in files)
    return MemoryStatistics(store.identity.key_kind, origins, journal_bytes)


def _of_view(view: CaseView, sample: int) -> OriginStatistics:
    generation = view.generation
    table = None if generation is None else generation.table
    return OriginStatistics(
        cases=len(view),
        recent=len(view.recent),
        hidden=len(view.hidden),
        generation=0 if generation is None else generation.number,
        segment_bytes=0 if generation is None else generation.segment.path.stat().st_size,
        records_bytes=0 if generation is None else generation.records_path.stat().st_size,
        thumbnails=len(view.thumbnail_bytes()),
        histogram=tuple(np.histogram(view.scores(), HISTOGRAM_EDGES)[0].tolist()),
        index="frozen" if isinstance(table, IndexedTable) else "flat",
        recall=_recall(table, sample) if isinstance(table, IndexedTable) else None,
    )


def _recall(table: IndexedTable, sample: int) -> float:
    """Search for evenly spread stored keys, each as if it were not there."""
    trial = RecallTrial.of(table.index, table.keys, sample, _NEIGHBOURS)
    # With too few keys to take any out, every search is exact.
    return float(trial.shares(None).mean()) if len(trial) else 1.0
