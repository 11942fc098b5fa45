"""Which remembered photos a query is compared with.

The share of anchors is taken from bins of equal population over their scores, so that the
neighbours span the scale; contrast cases are taken nearest first (arXiv 2603.20785, section 3).
Neither the order in which cases were stored nor whether they have been compacted changes what is
retrieved, as long as the search is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from meiqa.errors import StoreMismatch, UsageError
from meiqa.memory.cases import Case, FloatArray
from meiqa.memory.encoding import unit_rows
from meiqa.memory.likeness import NEAR_DUPLICATE, layout
from meiqa.memory.search import Found, Mask, Probe, Rows
from meiqa.memory.view import Bin, CaseView

__all__ = ["RetrievalPolicy", "Sought", "nearest_anchors", "shares"]

_TIMES_AS_FAR = 5  # a search for all bins together; more would cost more than it saves


@dataclass(frozen=True)
class RetrievalPolicy:
    """How many neighbours there are and where they come from.

    Attributes:
        k: Neighbours in all; 0 asks for none.
        anchor_share: Share of anchors among them, 0–1, rounded to the nearest count, halves up.
        bins: Bins of equal population over the anchors' scores.
        stratified: Take the same number from each bin, then the most similar of the rest.
        exclude_above: Leave out near-duplicates of the query: cases whose layout has a higher
            cosine with its own (`meiqa.memory.likeness`); 1 leaves out none.
        effort: Candidates that a search keeps where there is an index; more find better. None for
            as many as the index needs, which was measured when it was made.

    >>> RetrievalPolicy(k=8).anchor_share
    0.5

    Raises:
        UsageError: a value out of range.
    """

    k: int = 32
    anchor_share: float = 0.5
    bins: int = 5
    stratified: bool = True
    exclude_above: float = NEAR_DUPLICATE
    effort: int | None = None

    def __post_init__(self) -> None:
        if self.k < 0:
            raise UsageError("k must not be negative", seen=self.k, allowed="0 or more")
        if not 0.0 <= self.anchor_share <= 1.0:
            raise UsageError("anchor_share is a share", seen=self.anchor_share, allowed="0 to 1")
        if self.bins < 1:
            raise UsageError("there must be at least one bin", seen=self.bins, allowed="1 or more")
        if not -1.0 <= self.exclude_above <= 1.0:
            raise UsageError(
                "exclude_above is a cosine", seen=self.exclude_above, allowed="-1 to 1"
            )
        if self.effort is not None and self.effort < 1:
            raise UsageError("effort must be positive", seen=self.effort, allowed="1 or more")


class Sought:
    """One query against the cases of one origin.

    Args:
        view: The cases.
        key: float32 (D_key,), of any length.
        effort: `RetrievalPolicy.effort`.
        exclude_digest: Digest of the query's own image, whose cases are left out.

    Raises:
        StoreMismatch: the key has another width than the stored ones.
        UsageError: the key is not finite.
    """

    def __init__(
        self, view: CaseView, key: FloatArray, effort: int | None, exclude_digest: str | None
    ) -> None:
        if key.shape != (view.key_width,):
            raise StoreMismatch(
                "the key does not fit the memory", seen=f"shape {key.shape}", allowed=view.key_width
            )
        if not np.isfinite(key).all():
            raise UsageError("the key is not finite")
        query = unit_rows(key[None])[0]
        self._view = view
        self._left_out = [] if exclude_digest is None else view.rows_of_image(exclude_digest)
        self._cases: dict[int, Case] = {}
        self._recent = view.recent_table.probe(query, effort)
        self._stored: Probe | None = None
        if view.generation is not None:
            self._stored = view.generation.table.probe(query, effort)

    @property
    def available(self) -> int:
        """How many cases may be taken."""
        return len(self._view) - len(self._left_out)

    def case(self, row: int) -> Case:
        """Give the case in a row, which is read once.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        if row not in self._cases:
            self._cases[row] = self._view.case(row)
        return self._cases[row]

    def alike(self, rows: Iterable[int], own_layout: FloatArray, above: float) -> list[int]:
        """Give the rows of the cases that are near-duplicates of what has this layout.

        Raises:
            StoreCorrupted: a case is not what was written.
        """
        cases = [(row, self.case(row)) for row in rows]
        return [row for row, case in cases if _likeness(case, own_layout) > above]

    def leave_out(self, rows: Iterable[int]) -> None:
        """Give these rows no longer."""
        self._left_out += rows

    def nearest(self, count: int, among: Bin | None = None) -> Found:
        """Give the most similar cases, nearest first, ties by id; fewer when fewer may be taken.

        Args:
            count: How many.
            among: The bin that they must be of.
        """
        left_out = np.array(self._left_out, np.intp)
        split, parts = self._view.stored_count, []
        if self._stored is not None:
            eligible = self._view.visible
            if among is not None:
                eligible = among.stored  # bins have no hidden rows
            parts.append(_permitted(self._stored, eligible, left_out, count))
        eligible = None if among is None else among.recent
        recent = _permitted(self._recent, eligible, left_out - split, count)
        parts.append(Found(recent.rows + split, recent.cosines))
        rows = np.concatenate([part.rows for part in parts])
        cosines = np.concatenate([part.cosines for part in parts])
        order = self._view.order(rows, cosines)[:count]
        return Found(rows[order], cosines[order])


def _permitted(probe: Probe, eligible: Mask | None, left_out: Rows, count: int) -> Found:
    """Search so much further that `count` remain when rows are left out."""
    found = probe.nearest(count + len(left_out) if count > 0 else 0, eligible)
    return _without(found, left_out)


def _without(found: Found, rows: Rows) -> Found:
    return found.where(~np.isin(found.rows, rows, kind="table"))  # sorting imports numpy.ma


def _likeness(case: Case, own_layout: FloatArray) -> float:
    return float(layout(case.tokens, case.grid) @ own_layout)


def shares(policy: RetrievalPolicy, anchors: int, contrast: int) -> tuple[int, int]:
    """Split k between the available anchors and contrast cases; each fills what the other lacks.

    >>> shares(RetrievalPolicy(k=32), anchors=1000, contrast=3)
    (29, 3)
    """
    wanted = int(policy.k * policy.anchor_share + 0.5)
    from_contrast = min(policy.k - min(wanted, anchors), contrast)
    return min(policy.k - from_contrast, anchors), from_contrast


def nearest_anchors(
    sought: Sought, view: CaseView, count: int, policy: RetrievalPolicy
) -> list[int]:
    """Take `count` anchors, stratified over their scores if the policy says so, nearest first.

    `count // bins` come from each bin, the rest by similarity alone. One search, some times as far
    as without bins, serves all that have enough there; only the others are searched for themselves.

    Raises:
        StoreCorrupted: the order of the scores is damaged.
    """
    if not policy.stratified or count < policy.bins:
        nearest: list[int] = sought.nearest(count).rows.tolist()
        return nearest
    around = sought.nearest(min(policy.bins, _TIMES_AS_FAR) * count)
    from_each = count // policy.bins
    taken = []
    for each in view.bins(policy.bins):
        inside = around.where(each.holds(around.rows))
        enough = len(inside.rows) >= from_each
        taken.append(inside.first(from_each) if enough else sought.nearest(from_each, each))
    rows = np.concatenate([found.rows for found in taken])
    rest = _without(around, rows).first(count - len(rows))
    rows = np.concatenate([rows, rest.rows])
    cosines = np.concatenate([*(found.cosines for found in taken), rest.cosines])
    in_order: list[int] = rows[view.order(rows, cosines)].tolist()
    return in_order
