"""Which remembered photos a query is compared with, and by what they are found.

A memory holds keys of one kind: of what was written, of what is seen, or of both; the key of a
query is made by the same function as theirs. The share of anchors is taken from bins of equal
population over their scores, so that the neighbours span the scale; contrast cases are taken
nearest first (arXiv 2603.20785, section 3). Neither the order in which cases were stored nor
whether they have been compacted changes what is retrieved, as long as the search is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreMismatch, UsageError
from meiqa.memory.cases import (
    Case,
    Entry,
    FloatArray,
    Mask,
    Record,
    Regression,
    Rows,
    Sample,
    Version,
    decode_keys,
    exact_cosines,
    unit_rows,
)
from meiqa.memory.database import Widths
from meiqa.types import KeyKind, Origin

NEAR_DUPLICATE = 0.97
"""Cosine of spatial descriptors above which photos are near-duplicates.

What is caught is the same picture again, not another shot of it (docs/memory-format.md).
"""

_SIDE = 4
_EVEN = 1e-5
_TIMES_AS_FAR = 5  # a search for all bins together; more would cost more than it saves
_ROWS_AT_ONCE = 256


def retrieval_key(kind: KeyKind, summary: FloatArray, tokens: FloatArray) -> FloatArray:
    """Make the key of a photo, stored or sought, of the kind that the memory has.

    "summary" takes the key of what was written (D_summary,), or what is projected in its place, as
    it is; "image" the direction of the mean visual token (T, D); and "both" the two unit vectors
    one behind the other, over √2, so that a cosine is the mean of theirs.

    >>> retrieval_key("both", np.float32([3, 0]), np.float32([[0, 2], [0, 4]])).round(3).tolist()
    [0.7070000171661377, 0.0, 0.0, 0.7070000171661377]
    """
    if kind == "summary":
        return summary
    mean = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
    image: FloatArray = unit_rows(mean[None])[0]
    if kind == "image":
        return image
    parts = np.concatenate([unit_rows(summary[None])[0], image])
    both: FloatArray = parts * np.float32(np.sqrt(0.5))
    return both


def key_widths(kind: KeyKind, summary: int, token: int) -> Widths:
    """Give the widths of keys and tokens, for summary keys and visual tokens of these widths.

    >>> key_widths("both", 256, 512)
    Widths(key=768, token=512)
    """
    keys: dict[KeyKind, int] = {"summary": summary, "image": token, "both": summary + token}
    if kind not in keys:
        raise UsageError("unknown kind of key", seen=kind, allowed=", ".join(keys))
    return Widths(keys[kind], token)


def spatial_descriptor(tokens: FloatArray, grid: tuple[int, int]) -> FloatArray:
    """Describe where a photo's tokens differ from their mean: a unit vector (16 · D,).

    No key tells near-duplicates: photos that are good or bad in the same way are described alike,
    and their mean tokens point the same way. What photos of one scene share is this. The grid of
    tokens (T, D), row by row, is averaged to 4 × 4 fields, so that photos of other sizes compare,
    and the mean is taken off. Of a photo that is the same all over, as one of a single token is,
    or of none, nothing is left: a zero vector, which is like no other.
    """
    return unit_rows(_centred_fields(tokens, grid)[None]).reshape(-1)


def _centred_fields(tokens: FloatArray, grid: tuple[int, int]) -> FloatArray:
    if not len(tokens):
        return np.zeros(_SIDE * _SIDE * tokens.shape[1], np.float32)
    fields = _shares_of_grid(grid) @ tokens
    centred = (fields - fields.mean(axis=0)).reshape(-1)
    # Rounding leaves something of fields that are all the same; it points nowhere.
    even = np.abs(centred).max() <= _EVEN * np.abs(tokens).max()
    return np.zeros_like(centred) if even else centred


@lru_cache(maxsize=256)
def _shares_of_grid(grid: tuple[int, int]) -> FloatArray:
    """Give what each token contributes to each field (16, T); rows add up to 1."""
    shares: FloatArray = np.kron(*map(_shares_of_line, grid)).astype(np.float32)
    return shares


def _shares_of_line(tokens: int) -> NDArray[np.float64]:
    """Give what each token of a line contributes to each field (4, tokens); rows add up to 1."""
    edges = np.linspace(0.0, tokens, _SIDE + 1)
    begins, ends = edges[:-1, None], edges[1:, None]
    numbers = np.arange(tokens)
    covered = np.minimum(ends, numbers + 1) - np.maximum(begins, numbers)
    shares: NDArray[np.float64] = np.maximum(covered, 0.0) * (_SIDE / tokens)
    return shares


@dataclass(frozen=True)
class RetrievalPolicy:
    """How many neighbours there are and where they come from.

    Attributes:
        k: Neighbours in all; 0 asks for none.
        anchor_share: Share of anchors among them, 0–1, rounded to the nearest count, halves up.
        bins: Bins of equal population over the anchors' scores: the same number is taken from each,
            then the most similar of the rest. With 1 the most similar are taken.
        exclude_above: Leave out near-duplicates of the query: cases whose spatial descriptor has a
            higher cosine with its own; 1 leaves out none.
        effort: Candidates that a search keeps where there is an index; more find better. None for
            as many as the index needs, which was measured when it was made.

    >>> RetrievalPolicy(k=8).anchor_share
    0.5
    """

    k: int = 32
    anchor_share: float = 0.5
    bins: int = 5
    exclude_above: float = NEAR_DUPLICATE
    effort: int | None = None

    def __post_init__(self) -> None:
        share, cosine, effort = self.anchor_share, self.exclude_above, self.effort
        for what, seen, fits, allowed in (
            ("k must not be negative", self.k, self.k >= 0, "0 or more"),
            ("anchor_share is a share", share, 0.0 <= share <= 1.0, "0 to 1"),
            ("there must be at least one bin", self.bins, self.bins >= 1, "1 or more"),
            ("exclude_above is a cosine", cosine, -1.0 <= cosine <= 1.0, "-1 to 1"),
            ("effort must be positive", effort, effort is None or effort >= 1, "1 or more"),
        ):
            if not fits:
                raise UsageError(what, seen=seen, allowed=allowed)


@dataclass(frozen=True, eq=False)
class View:
    """The cases of one origin as they were at one moment; later writes do not change it.

    Rows count through the version and go on through the recent cases, which are in the order of
    their ids too.

    Attributes:
        version: The stored cases.
        tombstones: Ids that count no longer in the version, with the moment of each.
        entries: Cases that are in no version yet, by their revision.
    """

    version: Version
    tombstones: Mapping[str, int] = field(default_factory=dict)
    entries: Mapping[int, Entry] = field(default_factory=dict)
    _bins: dict[int, list[Mask]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.version) - len(self.dead) + len(self.recent)

    @cached_property
    def recent(self) -> list[Entry]:
        """The cases that are in no version yet, by id."""
        return sorted(self.entries.values(), key=lambda entry: entry.record.id)

    @cached_property
    def dead(self) -> list[int]:
        """Rows of the version that have been removed or replaced, ascending."""
        replaced = (entry.record.id for entry in self.recent)
        located = [self.version.locate(case_id) for case_id in (*self.tombstones, *replaced)]
        return sorted({row for row, present in located if present})

    @cached_property
    def visible(self) -> Mask | None:
        """Which rows are not dead; None if all."""
        if not self.dead:
            return None
        visible = np.ones(len(self.version) + len(self.recent), np.bool_)
        visible[self.dead] = False
        return visible

    @cached_property
    def recent_keys(self) -> FloatArray:
        """Unit keys of the recent cases."""
        keys = [entry.features.key for entry in self.recent]
        return decode_keys(np.array(keys, np.float16).reshape(-1, self.version.identity.widths.key))

    @cached_property
    def id_positions(self) -> Rows:
        """How many ids of the version come before each recent case's."""
        return np.array([self.version.locate(each.record.id)[0] for each in self.recent], np.intp)

    def unit_keys(self, rows: Rows) -> FloatArray:
        """Give the unit keys of rows (n, D_key)."""
        keys = np.empty((len(rows), self.version.identity.widths.key), np.float32)
        stored = rows < len(self.version)
        keys[stored] = self.version.keys_of(rows[stored])
        keys[~stored] = self.recent_keys[rows[~stored] - len(self.version)]
        return keys

    def entries_in(self, rows: Iterable[int], *, thumbnails: bool = False) -> list[Entry]:
        """Give the cases in rows; however many are in the version, they take one statement."""
        split, rows = len(self.version), list(rows)
        stored = [row for row in rows if row < split]
        read = self.version.entries(stored, thumbnails=thumbnails)
        found = dict(zip(stored, read, strict=True))
        return [found[row] if row < split else self.recent[row - split] for row in rows]

    def entry(self, case_id: str) -> Entry | None:
        """Read one case with its thumbnail; None if it is not there."""
        recent = next((each for each in self.recent if each.record.id == case_id), None)
        row, present = self.version.locate(case_id)
        if recent is not None or not present or row in self.dead:
            return recent
        return self.version.entries([row], thumbnails=True)[0]

    def all_entries(self) -> Iterator[Entry]:
        """Read all cases with their vectors and thumbnails, by id."""
        every = np.arange(len(self.version) + len(self.recent))
        every = every if self.visible is None else every[self.visible]
        rows = every[np.lexsort((every, self.id_order(every)))].tolist()
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield from self.entries_in(rows[start : start + _ROWS_AT_ONCE], thumbnails=True)

    def near_duplicates(
        self, rows: Iterable[int], descriptor: FloatArray, above: float
    ) -> list[int]:
        """Give those of the rows whose spatial descriptor has a higher cosine with this one."""

        def cosine(row: int) -> float:
            fresh = row - len(self.version)
            features = self.version.features(row) if fresh < 0 else self.recent[fresh].features
            own = _centred_fields(features.tokens, features.grid).astype(np.float64)
            return float(own @ descriptor) / (math.sqrt(own @ own) or 1.0)

        return [row for row in rows if cosine(row) > above]

    def rows_of_image(self, image_digest: str) -> list[int]:
        """Give the rows of the cases that were made from an image."""
        stored = self.version.rows_of_image(image_digest)
        recent = self._recent_rows.get(image_digest, [])
        return [row for row in stored if self.visible is None or self.visible[row]] + recent

    @cached_property
    def _recent_rows(self) -> dict[str, list[int]]:
        """Rows of the recent cases by their images."""
        rows: dict[str, list[int]] = {}
        for row, entry in enumerate(self.recent, len(self.version)):
            rows.setdefault(entry.record.image_digest, []).append(row)
        return rows

    def record_of_image(self, image_digest: str) -> Record | None:
        """Give the record of the case that was made from an image; None if there is none."""
        rows = self.rows_of_image(image_digest)
        return self._record_in(rows[0]) if rows else None

    def record_of_id(self, case_id: str) -> Record | None:
        """Give the record of the case with an id; None if there is none."""
        for entry in self.recent:
            if entry.record.id == case_id:
                return entry.record
        row, present = self.version.locate(case_id)
        return self._record_in(row) if present and row not in self.dead else None

    def _record_in(self, row: int) -> Record:
        fresh = row - len(self.version)
        return self.version.records_in([row])[0] if fresh < 0 else self.recent[fresh].record

    def id_order(self, rows: Rows) -> Rows:
        """Give numbers that grow with the ids; recent cases between two stored ones tie."""
        order = 2 * rows + 1
        recent = rows >= len(self.version)
        order[recent] = 2 * self.id_positions[rows[recent] - len(self.version)]
        return order

    @cached_property
    def by_score(self) -> tuple[NDArray[np.float64], Rows]:
        """Scores and rows of all cases, by score, ties by id."""
        scores, rows = self.version.segment.arrays["sorted_scores"], self.version.by_score
        if self.visible is not None:
            kept = self.visible[rows]
            scores, rows = scores[kept], rows[kept]
        if not self.recent:
            return scores, rows
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
        merged = np.insert(rows, before, len(self.version) + order)
        return np.insert(scores, before, recent_scores[order]), merged

    def bins(self, count: int) -> list[Mask]:
        """Divide all cases into bins of equal population over their scores; masks over the rows."""
        if count not in self._bins:
            limits = [-(-len(self) * each // count) for each in range(count + 1)]
            masks = np.zeros((count, len(self.version) + len(self.recent)), np.bool_)
            for mask, (first, last) in zip(masks, pairwise(limits), strict=True):
                mask[self.by_score[1][first:last]] = True
            self._bins[count] = list(masks)
        return self._bins[count]

    def records(
        self, since: float = float("-inf"), ids: Collection[str] | None = None
    ) -> list[Record]:
        """List records of cases stored at `since` (seconds since 1970) or later, by id."""
        found = [entry.record for entry in self.recent if entry.record.created >= since]
        condition = "created >= ? AND (? IS NULL OR id IN (SELECT value FROM json_each(?)))"
        named, dead = None if ids is None else json.dumps([*ids]), set(self.dead)
        stored = self.version.records(condition, (since, named, named))
        found += [record for row, record in stored if row not in dead]
        chosen = found if ids is None else [record for record in found if record.id in ids]
        return sorted(chosen, key=lambda record: record.id)

    def thumbnail_bytes(self) -> dict[str, int]:
        """Give the sizes of the thumbnails that are kept, by the ids of their cases."""
        dead = set(self.dead)
        stored = self.version.thumbnail_bytes()
        sizes = {case_id: size for row, case_id, size in stored if row not in dead}
        recent = {entry.record.id: entry.thumbnail for entry in self.recent}
        return sizes | {case_id: len(jpeg) for case_id, jpeg in recent.items() if jpeg is not None}


class _Search:
    """One query against the cases of one origin.

    The order is exact and repeatable: candidates are ranked by their cosine in float64, summed the
    same way for every row, and equal cosines by id. Neither the number of threads nor the way in
    which the candidates were found changes what is nearer.
    """

    def __init__(
        self,
        view: View,
        key: FloatArray,
        effort: int | None = None,
        exclude_digest: str | None = None,
    ) -> None:
        if key.shape != (width := view.version.identity.widths.key,):
            what = "the key does not fit the memory"
            raise StoreMismatch(what, seen=f"shape {key.shape}", allowed=width)
        if not np.isfinite(key).all():
            raise UsageError("the key is not finite")
        self._view, self._effort = view, effort
        self._query = unit_rows(key[None])[0]
        self._left_out = [] if exclude_digest is None else view.rows_of_image(exclude_digest)
        self._unlike: set[int] = set()
        self._recent_cosines = view.recent_keys @ self._query
        compared = view.version.unit_keys if view.version.index is None else view.recent_keys[:0]
        self._stored_cosines = compared @ self._query

    @property
    def available(self) -> int:
        """How many cases may be taken."""
        return len(self._view) - len(self._left_out)

    def leave_out_alike(self, rows: list[int], descriptor: FloatArray, above: float) -> bool:
        """Give the near-duplicates among these rows no longer; tell whether there are any."""
        fresh = [row for row in rows if row not in self._unlike]
        alike = self._view.near_duplicates(fresh, descriptor, above)
        self._unlike.update(fresh)
        self._left_out += alike
        return bool(alike)

    def nearest(self, count: int, eligible: Mask | None = None) -> Rows:
        """Give the `count` nearest rows of those that are eligible, or all if they are fewer."""
        if count <= 0:
            return np.empty(0, np.intp)
        mask = self._view.visible if eligible is None else eligible
        rows = self._candidates(count + len(self._left_out), mask)
        return self._in_order(_without(rows, np.array(self._left_out, np.intp)))[:count]

    def _in_order(self, rows: Rows) -> Rows:
        """Sort by exact cosine, highest first, ties by id."""
        cosines = exact_cosines(self._view.unit_keys(rows), self._query)
        return rows[np.lexsort((rows, self._view.id_order(rows), -cosines))]

    def _candidates(self, count: int, eligible: Mask | None) -> Rows:
        """Give rows among which the nearest are."""
        split, index = len(self._view.version), self._view.version.index
        stored, recent = (None, None) if eligible is None else np.split(eligible, [split])
        if index is None:
            first = self._close(self._stored_cosines, count, stored)
        else:
            first = index.search(self._query, count, stored, self._effort).astype(np.intp)
        return np.concatenate([first, split + self._close(self._recent_cosines, count, recent)])

    def _close(self, cosines: FloatArray, count: int, eligible: Mask | None) -> Rows:
        """Give all rows that may be among the nearest, where float32 leaves a doubt."""
        rows = np.arange(len(cosines)) if eligible is None else np.flatnonzero(eligible)
        if count >= len(rows):
            return rows
        # Twice the largest error of a float32 dot product of two unit vectors, in any order.
        margin = 2.0 * (len(self._query) + 4) * 2.0**-24
        among = cosines[rows]
        cutoff = np.partition(among, len(rows) - count)[len(rows) - count]
        close: Rows = rows[among >= cutoff - margin]
        return close

    def stratified(self, count: int, policy: RetrievalPolicy) -> Rows:
        """Take `count` cases, from as many bins of their scores as the policy says, nearest first.

        `count // bins` come from each bin, the rest by similarity alone. One search, some times as
        far as without bins, serves all that have enough there; only the others are searched for
        themselves.
        """
        if policy.bins == 1 or count < policy.bins:
            return self.nearest(count)
        around = self.nearest(min(policy.bins, _TIMES_AS_FAR) * count)
        from_each = count // policy.bins
        taken = []
        for mask in self._view.bins(policy.bins):
            inside = around[mask[around]][:from_each]
            taken.append(inside if len(inside) == from_each else self.nearest(from_each, mask))
        rows = np.concatenate(taken)
        rest = _without(around, rows)[: count - len(rows)]
        return self._in_order(np.concatenate([rows, rest]))


def _without(rows: Rows, left_out: Rows) -> Rows:
    kept: Rows = rows[~np.isin(rows, left_out, kind="table")]  # sorting imports numpy.ma
    return kept


def near_duplicates(view: View, case: Case, above: float, among: int) -> list[Record]:
    """Give the near-duplicates of a case among as many cases with the nearest keys."""
    if above >= 1.0:
        return []
    rows = _Search(view, case.key).nearest(among).tolist()
    alike = view.near_duplicates(rows, spatial_descriptor(case.tokens, case.grid), above)
    return [entry.record for entry in view.entries_in(alike)]


def _shares(policy: RetrievalPolicy, anchors: int, contrast: int) -> tuple[int, int]:
    """Split k between the available anchors and contrast cases; each fills what the other lacks.

    >>> _shares(RetrievalPolicy(k=32), anchors=1000, contrast=3)
    (29, 3)
    """
    wanted = int(policy.k * policy.anchor_share + 0.5)
    from_contrast = min(policy.k - min(wanted, anchors), contrast)
    return min(policy.k - from_contrast, anchors), from_contrast


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The memory as it was at one moment; safe to share between threads."""

    anchors: View
    contrast: View
    _note_retrieved: Callable[[Sequence[str]], None]
    pulled: int | None = None
    """Up to which sequence number of its hub it has been pulled; None without a hub."""

    @property
    def views(self) -> dict[Origin, View]:
        return {"anchor": self.anchors, "contrast": self.contrast}

    @property
    def count_anchors(self) -> int:
        return len(self.anchors)

    @property
    def count_contrast(self) -> int:
        return len(self.contrast)

    def retrieve(
        self,
        key: FloatArray,
        policy: RetrievalPolicy,
        exclude_digest: str | None,
        descriptor: FloatArray | None = None,
    ) -> tuple[Case, ...]:
        """Give the neighbours of a photo: anchors, then contrast cases, each nearest first.

        The result depends on the query, the policy and the stored cases only; equal similarities
        are ordered by id. All cases are given when there are fewer than `policy.k`.

        Args:
            key: float32 (D_key,), of any length, made by `retrieval_key`.
            policy: How many, and from where.
            exclude_digest: Digest of the query's own image, whose cases are left out.
            descriptor: Of the query's own tokens, by `spatial_descriptor`; near-duplicates of it
                are left out. None for a query that is no photo.

        Raises:
            StoreMismatch: the key has another width than the stored ones.
            StoreCorrupted: a stored case is damaged.
            UsageError: the key is not finite, or there is an index that cannot be searched here.
        """
        anchors = _Search(self.anchors, key, policy.effort, exclude_digest)
        contrast = _Search(self.contrast, key, policy.effort, exclude_digest)
        while True:
            counts = _shares(policy, anchors.available, contrast.available)
            from_anchors: list[int] = anchors.stratified(counts[0], policy).tolist()
            from_contrast: list[int] = contrast.nearest(counts[1]).tolist()
            if descriptor is None or policy.exclude_above >= 1.0:
                break
            found = [
                anchors.leave_out_alike(from_anchors, descriptor, policy.exclude_above),
                contrast.leave_out_alike(from_contrast, descriptor, policy.exclude_above),
            ]
            if not any(found):
                break
        learned = self.contrast.entries_in(from_contrast)
        self._note_retrieved([entry.record.id for entry in learned])
        return tuple(entry.case for entry in self.anchors.entries_in(from_anchors) + learned)

    @property
    def regression(self) -> Regression | None:
        """From visual tokens to human scores, as of the last compaction; None of too few."""
        return self.anchors.version.regression

    def scores_left_out(self) -> dict[str, float]:
        """Give what a regression on all others says of each anchor, by image digest; {} of few."""
        sample = Sample()
        for entry in self.anchors.all_entries():
            sample.show(entry.record.image_digest, entry.features.tokens, entry.record.score)
        fitted = sample.fitted()
        return {} if fitted is None else fitted[1]

    def percentile(self, score: float) -> float:
        """Give the share of anchors that score below, 0–100; NaN when there are no anchors."""
        scores = self.anchors.by_score[0]
        below = int(np.searchsorted(scores, score, "left"))
        return 100.0 * below / len(scores) if len(scores) else float("nan")
