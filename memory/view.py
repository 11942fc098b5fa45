"""The cases of one origin as they were at one moment: a generation, less what is hidden, and more.

Rows count through the generation and go on through the recent cases, which are in the order of
their ids too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.cases import Case
from meiqa.memory.generation import Generation
from meiqa.memory.records import Entry, Record, case_of
from meiqa.memory.regression import Regression
from meiqa.memory.search import FlatTable, Mask, Rows

__all__ = ["Bin", "CaseView"]


@dataclass(frozen=True, eq=False)
class Bin:
    """Which rows belong to one bin of scores: masks over the generation and the recent cases."""

    stored: Mask
    recent: Mask

    def holds(self, rows: Rows) -> Mask:
        """Give which of these rows (n,) belong to it."""
        stored, held = rows < len(self.stored), np.empty(len(rows), np.bool_)
        held[stored] = self.stored[rows[stored]]
        held[~stored] = self.recent[rows[~stored] - len(self.stored)]
        return held


@dataclass(frozen=True, eq=False)
class CaseView:
    """Stored and recent cases of one origin; later writes do not change it.

    Attributes:
        key_width: D_key.
        generation: The stored cases; None if there has been no generation yet.
        hidden: Rows of the generation that have been removed or replaced, ascending.
        recent: The others, by id.
    """

    key_width: int
    generation: Generation | None = None
    hidden: Rows = field(default_factory=lambda: np.empty(0, np.intp))
    recent: Sequence[Entry] = ()

    def __len__(self) -> int:
        return self.stored_count - len(self.hidden) + len(self.recent)

    @cached_property
    def stored_count(self) -> int:
        """Rows of the generation, hidden ones among them."""
        return 0 if self.generation is None else len(self.generation)

    @property
    def regression(self) -> Regression | None:
        """The generation's; recent cases are not in it.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        return None if self.generation is None else self.generation.regression

    @cached_property
    def recent_table(self) -> FlatTable:
        """Keys of the recent cases."""
        keys = [entry.features.key for entry in self.recent]
        return FlatTable.of(np.array(keys, np.float16).reshape(-1, self.key_width))

    @cached_property
    def id_positions(self) -> Rows:
        """How many ids of the generation come before each recent case's."""
        generation = self.generation
        if generation is None:
            return np.zeros(len(self.recent), np.intp)
        located = [generation.locate(entry.record.id)[0] for entry in self.recent]
        return np.array(located, np.intp)

    @cached_property
    def visible(self) -> Mask | None:
        """Which rows of the generation are not hidden; None if all."""
        if not len(self.hidden):
            return None
        visible = np.ones(self.stored_count, np.bool_)
        visible[self.hidden] = False
        return visible

    def entry(self, row: int) -> Entry:
        """Give a stored case with its vectors.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        if row >= self.stored_count:
            return self.recent[row - self.stored_count]
        assert self.generation is not None
        return self.generation.entry(row)

    def whole_entry(self, row: int) -> Entry:
        """Give a stored case with its vectors and its thumbnail.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        entry = self.entry(row)
        if row >= self.stored_count:
            return entry
        assert self.generation is not None
        return replace(entry, thumbnail=self.generation.thumbnail(row))

    def record(self, row: int) -> Record:
        """Give the record of a row."""
        if row >= self.stored_count:
            return self.recent[row - self.stored_count].record
        assert self.generation is not None
        return self.generation.record(row)

    def case(self, row: int) -> Case:
        """Give the case in a row.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        return case_of(self.entry(row))

    def rows_of_image(self, image_digest: str) -> list[int]:
        """Give the rows of the cases that were made from an image."""
        stored = [] if self.generation is None else self.generation.rows_of_image(image_digest)
        if self.visible is not None:
            stored = [row for row in stored if self.visible[row]]
        return stored + [
            self.stored_count + number
            for number, entry in enumerate(self.recent)
            if entry.record.image_digest == image_digest
        ]

    def order(self, rows: Rows, cosines: NDArray[np.float64]) -> Rows:
        """Give what sorts rows by their cosines, highest first, ties by id."""
        return np.lexsort((rows, self._id_order(rows), -cosines))

    def _id_order(self, rows: Rows) -> Rows:
        """Numbers that grow with the ids; recent cases between the same two stored ones tie."""
        order = 2 * rows + 1
        recent = rows >= self.stored_count
        order[recent] = 2 * self.id_positions[rows[recent] - self.stored_count]
        return order

    @cached_property
    def _stored_by_score(self) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Scores and rows of the visible part of the generation, by score, ties by id."""
        if self.generation is None:
            return np.empty(0, np.float64), np.empty(0, np.int32)
        scores, rows = self.generation.sorted_scores, self.generation.by_score
        if self.visible is None:
            return scores, rows
        kept = self.visible[rows]
        return scores[kept], rows[kept]

    @cached_property
    def _recent_by_score(self) -> tuple[Rows, Rows]:
        """Recent cases by score, ties by id, and the rank of each among all that are visible."""
        scores, rows = self._stored_by_score
        recent_scores = np.array([entry.record.score for entry in self.recent], np.float64)
        order = np.argsort(recent_scores, kind="stable")
        before = []
        for number in order.tolist():
            first, last = (
                int(np.searchsorted(scores, recent_scores[number], side))
                for side in ("left", "right")
            )
            tied = np.searchsorted(rows[first:last], self.id_positions[number])
            before.append(first + int(tied))
        return order, np.array(before, np.intp) + np.arange(len(order))

    @cached_property
    def _bins(self) -> dict[int, list[Bin]]:
        return {}

    def bins(self, count: int) -> list[Bin]:
        """Divide all visible cases into bins of equal population over their scores.

        Raises:
            StoreCorrupted: the generation's order is damaged.
        """
        if count not in self._bins:
            self._bins[count] = self._divided(count)
        return self._bins[count]

    def _divided(self, count: int) -> list[Bin]:
        rows = self._stored_by_score[1]
        recent_order, recent_ranks = self._recent_by_score
        limits = [-(-len(self) * each // count) for each in range(count + 1)]
        bins = []
        for first, last in pairwise(limits):
            stored = np.zeros(self.stored_count, np.bool_)
            recent = np.zeros(len(self.recent), np.bool_)
            begin, end = np.searchsorted(recent_ranks, (first, last))
            recent[recent_order[begin:end]] = True
            stored[rows[first - begin : last - end]] = True
            bins.append(Bin(stored, recent))
        return bins

    def percentile(self, score: float) -> float:
        """Give the share of cases that score below, 0–100; NaN when there are none."""
        if not len(self):
            return float("nan")
        stored = int(np.searchsorted(self._stored_by_score[0], score, "left"))
        recent = sum(entry.record.score < score for entry in self.recent)
        return 100.0 * (stored + recent) / len(self)

    def scores(self) -> NDArray[np.float64]:
        """Give the scores of all cases (N,), in no order."""
        recent = np.array([entry.record.score for entry in self.recent], np.float64)
        return np.concatenate([self._stored_by_score[0], recent])

    def rows(self) -> list[int]:
        """Give the rows of all cases, by id."""
        stored = np.setdiff1d(np.arange(self.stored_count), self.hidden, assume_unique=True)
        rows = np.concatenate([stored, self.stored_count + np.arange(len(self.recent))])
        in_order: list[int] = rows[np.lexsort((rows, self._id_order(rows)))].tolist()
        return in_order

    def thumbnail_bytes(self) -> dict[str, int]:
        """Give the sizes of the thumbnails that are kept, by the ids of their cases."""
        hidden = set(self.hidden.tolist())
        stored = {} if self.generation is None else self.generation.thumbnail_bytes()
        sizes = {case_id: size for (row, case_id), size in stored.items() if row not in hidden}
        recent = {each.record.id: each.thumbnail for each in self.recent}
        return sizes | {case_id: len(jpeg) for case_id, jpeg in recent.items() if jpeg is not None}

    def whole_entries(self) -> Iterator[Entry]:
        """Read all cases with their vectors and thumbnails, by id."""
        return (self.whole_entry(row) for row in self.rows())

    def records(
        self, since: float = float("-inf"), ids: Collection[str] | None = None
    ) -> list[Record]:
        """List records, by id.

        Args:
            since: Of cases stored then (seconds since 1970) or later.
            ids: With these ids; None for any.
        """
        found = [entry.record for entry in self.recent]
        found += self._stored_records(since) if ids is None else self._located_records(ids)
        chosen = [
            record
            for record in found
            if record.created >= since and (ids is None or record.id in ids)
        ]
        return sorted(chosen, key=lambda record: record.id)

    def _stored_records(self, since: float) -> list[Record]:
        if self.generation is None:
            return []
        hidden = set(self.hidden.tolist())
        stored = self.generation.records("created >= ?", (since,))
        return [record for row, record in stored if row not in hidden]

    def _located_records(self, ids: Collection[str]) -> list[Record]:
        if self.generation is None:
            return []
        hidden = set(self.hidden.tolist())
        located = [self.generation.locate(case_id) for case_id in ids]
        rows = [row for row, present in located if present and row not in hidden]
        return [self.generation.record(row) for row in rows]
