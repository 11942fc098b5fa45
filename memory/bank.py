"""The memory of an engine: anchors and contrast cases behind one face."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from meiqa.errors import UsageError
from meiqa.memory.cases import Case, FloatArray, check_case
from meiqa.memory.compaction import Compactor
from meiqa.memory.encoding import dequantise_tokens
from meiqa.memory.exporting import ExportFormat, export_cases
from meiqa.memory.journal import Mode
from meiqa.memory.policies import Admission, ContrastPolicy, near_duplicates, worth
from meiqa.memory.records import Record, encode_case
from meiqa.memory.regression import Regression, Sample
from meiqa.memory.rekeying import rekey_store
from meiqa.memory.retrieval import RetrievalPolicy, Sought, nearest_anchors, shares
from meiqa.memory.statistics import MemoryStatistics, take_statistics
from meiqa.memory.store import CaseStore
from meiqa.memory.view import CaseView
from meiqa.types import KeyKind, Origin

__all__ = ["Case", "MemoryBank", "Snapshot"]

_ORIGINS: tuple[Origin, ...] = ("anchor", "contrast")
_KEPT_ON_EVICTION = 0.95


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The memory as it was at one moment; safe to share between threads."""

    _anchors: CaseView
    _contrast: CaseView
    _note_retrieved: Callable[[Sequence[str]], None]

    @property
    def count_anchors(self) -> int:
        """Number of anchors."""
        return len(self._anchors)

    @property
    def count_contrast(self) -> int:
        """Number of contrast cases."""
        return len(self._contrast)

    def retrieve(
        self,
        key: FloatArray,
        policy: RetrievalPolicy,
        exclude_digest: str | None,
        layout: FloatArray | None = None,
    ) -> tuple[Case, ...]:
        """Give the neighbours of a photo: anchors, then contrast cases, each nearest first.

        The result depends on the query, the policy and the stored cases only; equal similarities
        are ordered by id. All cases are given when there are fewer than `policy.k`.

        Args:
            key: float32 (D_key,), of any length, made by `retrieval_key`.
            policy: How many, and from where.
            exclude_digest: Digest of the query's own image, whose cases are left out.
            layout: Of the query's own tokens, from `meiqa.memory.layout`; near-duplicates of it
                are left out. None for a query that is no photo.

        Raises:
            StoreMismatch: the key has another width than the stored ones.
            StoreCorrupted: a stored case is damaged.
            UsageError: the key is not finite.
        """
        anchors = Sought(self._anchors, key, policy.effort, exclude_digest)
        contrast = Sought(self._contrast, key, policy.effort, exclude_digest)
        while True:
            from_anchors, from_contrast = shares(policy, anchors.available, contrast.available)
            chosen = (
                (anchors, nearest_anchors(anchors, self._anchors, from_anchors, policy)),
                (contrast, contrast.nearest(from_contrast).rows.tolist()),
            )
            if layout is None or not _leave_out_alike(chosen, layout, policy.exclude_above):
                break
        given = [[sought.case(row) for row in rows] for sought, rows in chosen]
        self._note_retrieved([case.id for case in given[1]])
        return (*given[0], *given[1])

    @property
    def regression(self) -> Regression | None:
        """From visual tokens to human scores, as the anchors were when last compacted.

        None when they were too few; see `meiqa.memory.regression`.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        return self._anchors.regression

    def scores_left_out(self) -> dict[str, float]:
        """Give what a regression on all other anchors says of each, by image digest; reads all.

        Empty when there are too few for a regression.

        Raises:
            StoreCorrupted: an anchor is damaged.
        """
        sample = Sample()
        for entry in self._anchors.whole_entries():
            tokens = dequantise_tokens(entry.features.tokens)
            sample.show(entry.record.image_digest, tokens, entry.record.score)
        fitted = sample.fitted()
        return {} if fitted is None else fitted[1]

    def percentile(self, score: float) -> float:
        """Give the share of anchors that score below, 0–100; NaN when there are no anchors."""
        return self._anchors.percentile(score)


def _leave_out_alike(
    chosen: Iterable[tuple[Sought, list[int]]], layout: FloatArray, above: float
) -> bool:
    """Leave out those of the chosen that are near-duplicates; tell whether there were any."""
    found = False
    for sought, rows in chosen:
        alike = sought.alike(rows, layout, above) if above < 1.0 else []
        sought.leave_out(alike)
        found = found or bool(alike)
    return found


class MemoryBank:
    """Anchors and contrast cases of one directory, or of two; a context manager.

    Safe to share between threads. One process may write; any number may read.

    >>> import tempfile
    >>> import numpy as np
    >>> from meiqa.memory import AnchorWriter
    >>> path = Path(tempfile.mkdtemp()) / "memory"
    >>> with AnchorWriter(path, "ab12", key_width=2, token_width=3) as writer:
    ...     writer.finish()
    >>> case = Case("photo", "contrast", "d1", 3.2, 0.1, "sharp",
    ...             np.ones(2, np.float32), np.ones((4, 3), np.float32), (2, 2))
    >>> with MemoryBank.open(path, "rw", package_digest="ab12") as bank:
    ...     bank.remember(case, provenance="example")
    ...     found = bank.snapshot().retrieve(case.key, RetrievalPolicy(k=4), None)
    True
    >>> [neighbour.id for neighbour in found]
    ['photo']
    """

    def __init__(self, store: CaseStore, policy: ContrastPolicy) -> None:
        self._store = store
        self._policy = policy
        self._compactor = Compactor(store)

    @classmethod
    def open(
        cls,
        path: str | Path,
        mode: Mode = "r",
        *,
        package_digest: str,
        verify: bool = False,
        policy: ContrastPolicy | None = None,
    ) -> MemoryBank:
        """Open a directory that holds both the anchors and the contrast cases.

        Args and errors are those of `compose`.
        """
        return cls.compose(
            path, path, mode, package_digest=package_digest, verify=verify, policy=policy
        )

    @classmethod
    def compose(
        cls,
        anchors_path: str | Path,
        cases_path: str | Path,
        mode: Mode = "r",
        *,
        package_digest: str,
        verify: bool = False,
        policy: ContrastPolicy | None = None,
    ) -> MemoryBank:
        """Open anchors, which may be on a read-only file system, with other cases beside them.

        Args:
            anchors_path: Directory of the anchors.
            cases_path: Directory of what is learned and added; created in mode "rw", may be absent
                in mode "r".
            mode: "r", or "rw" to change the memory.
            package_digest: Digest of the engine package, hexadecimal.
            verify: Check every byte now; otherwise each case is checked when it is read.
            policy: What becomes of contrast cases.

        Raises:
            StoreNotFound: there are no anchors.
            StoreCorrupted: a file is damaged.
            StoreMismatch: a part was encoded by another package or has an older format, or the
                contrast cases have another kind of key than the anchors; the hint says what to run.
            StoreLocked: mode "rw", and another process is writing.
            StoreUnwritable: mode "rw", and `cases_path` cannot be written.
            UsageError: unknown mode.
        """
        if mode not in ("r", "rw"):
            raise UsageError("unknown mode for a memory", seen=mode, allowed="r, rw")
        store = CaseStore(Path(anchors_path), Path(cases_path), mode, package_digest, verify)
        return cls(store, policy or ContrastPolicy())

    def __enter__(self) -> MemoryBank:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def key_kind(self) -> KeyKind:
        """What the keys are made of; see `retrieval_key`."""
        return self._store.identity.key_kind

    @property
    def admission(self) -> Admission:
        """Which cases `remember` stores."""
        return self._policy.admission

    def snapshot(self) -> Snapshot:
        """Freeze what is stored now; what is changed later does not change it."""
        views = self._store.views()
        return Snapshot(views["anchor"], views["contrast"], self._store.note_retrieved)

    def remember(self, case: Case, *, provenance: str, gated: bool = True) -> bool:
        """Store a contrast case; when the call returns, neither a kill nor a power cut undoes it.

        A case with the same id or the same image is replaced, and so are near-duplicates; their
        counters of use are added up.

        Args:
            case: Its origin must be "contrast".
            provenance: Where the score comes from, in a few words.
            gated: Whether the case passed the reflection's gate.

        Returns:
            Whether the policy admitted it.

        Raises:
            UsageError: the case cannot be stored.
            StoreError: the bank is read-only or closed, or the disk is full.
        """
        if not gated and self._policy.admission == "gated":
            return False
        self._put(case, "contrast", provenance, self._policy.merge_above)
        contrast = self._store.views()["contrast"]
        if len(contrast) > self._policy.capacity:
            self.evict(keep=max(1, int(self._policy.capacity * _KEPT_ON_EVICTION)))
        if len(contrast.recent) + len(contrast.hidden) >= self._policy.compact_after:
            self._compactor.begin("contrast")
        return True

    def add_anchor(self, case: Case, *, provenance: str, thumbnail: bytes | None = None) -> None:
        """Add an anchor, or replace the one with the same id or image; durable and found at once.

        `compact` makes it part of the segment, where the anchors' directory is the one written.

        Args:
            case: Its origin must be "anchor": a human gave its score.
            provenance: Who did, in a few words.
            thumbnail: A small JPEG of it, if one is to be kept.

        Raises:
            UsageError: the case cannot be stored, or is a predicted one.
            StoreError: the bank is read-only or closed, or the disk is full.
        """
        self._put(case, "anchor", provenance, merge_above=1.0, thumbnail=thumbnail)

    def _put(
        self,
        case: Case,
        origin: Origin,
        provenance: str,
        merge_above: float,
        thumbnail: bytes | None = None,
    ) -> None:
        check_case(case, origin, self._store.identity.widths)
        digest = self._store.identity.package_digest
        entry = encode_case(case, digest, provenance, time.time(), thumbnail)
        with self._store.changing() as change:
            view = change.views[origin]
            replaced = {case.id, *near_duplicates(view, case, merge_above)}
            replaced |= {view.record(row).id for row in view.rows_of_image(case.image_digest)}
            change.insert(entry, change.drop(origin, replaced))

    def cases(
        self, origin: Origin | None = None, since: datetime | None = None
    ) -> Iterator[Record]:
        """List what is stored, anchors first, each origin by id.

        Args:
            origin: Of this origin only.
            since: Stored then or later only.

        Raises:
            UsageError: unknown origin, or `since` has no time zone.
        """
        chosen, earliest = _chosen_origins(origin), _timestamp(since)
        views = self._store.views()
        return (record for each in chosen for record in views[each].records(earliest))

    def thumbnail_bytes(self) -> dict[str, int]:
        """Give the sizes of the thumbnails that are kept, by the ids of their anchors."""
        return self._store.views()["anchor"].thumbnail_bytes()

    def remove(
        self,
        ids: Collection[str] | None = None,
        *,
        origin: Origin | None = None,
        since: datetime | None = None,
    ) -> int:
        """Remove the cases that fulfil every condition given; give how many.

        They are gone at once and for good. Those that a segment holds are erased from its file by
        the compaction that follows: now for contrast cases, with the next `compact` for anchors.

        Args:
            ids: With these ids.
            origin: Of this origin.
            since: Stored then or later.

        Raises:
            UsageError: no condition, unknown origin, or `since` has no time zone.
            StoreError: the bank is read-only or closed, or the disk is full.
        """
        if ids is None and origin is None and since is None:
            raise UsageError("say what is to be removed", allowed="ids, origin, since")
        chosen, earliest = _chosen_origins(origin), _timestamp(since)
        count = 0
        with self._store.changing() as change:
            for each in chosen:
                records = change.views[each].records(earliest, ids)
                change.drop(each, [record.id for record in records])
                count += len(records)
        self._erase()
        return count

    def forget(self, since: datetime | None = None) -> int:
        """Remove the contrast cases stored at `since` or later, or all; give how many.

        Raises:
            UsageError: `since` has no time zone.
            StoreError: the bank is read-only or closed, or the disk is full.
        """
        return self.remove(origin="contrast", since=since)

    def evict(self, keep: int) -> int:
        """Remove the contrast cases that are worth least until `keep` are left; give how many.

        What a case is worth is in `meiqa.memory.policies.worth`.

        Raises:
            UsageError: `keep` is negative.
            StoreError: the bank is read-only or closed, or the disk is full.
        """
        if keep < 0:
            raise UsageError("keep must not be negative", seen=keep, allowed="0 or more")
        now, uses = time.time(), self._store.uses()

        def value(record: Record) -> tuple[float, float, str]:
            retrieved, last = uses.get(record.id, (0, 0.0))
            idle = now - max(record.created, last)
            half_life = self._policy.half_life_days
            return worth(retrieved, idle, record.std, half_life), record.created, record.id

        with self._store.changing() as change:
            records = sorted(change.views["contrast"].records(), key=value)
            evicted = [record.id for record in records[: max(len(records) - keep, 0)]]
            change.drop("contrast", evicted)
        return len(evicted)

    def compact(self) -> bool:
        """Merge what was stored since into new segments; tell whether there was anything to merge.

        Snapshots and other processes keep what they have, and notice the new segments with their
        next snapshot. A kill at any instant leaves the old or the new ones. Anchors in another
        directory than the one that is written stay as they are.

        Raises:
            StoreCorrupted: a stored case is damaged.
            StoreError: the bank is read-only or closed, or the disk is full; nothing is lost.
        """
        merged = [
            self._compactor.compact(origin)
            for origin in _ORIGINS
            if origin == "contrast" or self._store.may_compact(origin)
        ]
        return any(merged)

    def statistics(self, *, sample: int = 64) -> MemoryStatistics:
        """Count, weigh and measure the memory; the recall of an index takes `sample` searches."""
        return take_statistics(self._store, sample)

    def export(self, path: str | Path, format: ExportFormat = "jsonl") -> int:
        """Write all records and keys to a file; give how many.

        Raises:
            UsageError: unknown format, or pyarrow is not installed.
            StoreUnwritable: the file cannot be written.
        """
        return export_cases(self._store, Path(path), format)

    def rekey(self, kind: KeyKind, path: str | Path) -> int:
        """Write the cases with keys of another kind into a new memory; give how many.

        The photographs are not needed. Keys of kind "image" can be made of any memory; the others
        need one that holds summary keys.

        Args:
            kind: "summary", "image" or "both".
            path: The directory to be; it must not exist, or be empty.

        Raises:
            UsageError: the memory has keys of this kind, or there is no such kind.
            StoreMismatch: the memory holds no summary keys.
            StoreError: the directory is taken or cannot be written.
        """
        return rekey_store(self._store, kind, Path(path))

    def close(self) -> None:
        """Let go of the files, once a compaction has ended; snapshots stay valid."""
        self._compactor.wait()
        self._store.close()

    def _erase(self) -> None:
        self._store.shrink()
        if len(self._store.views()["contrast"].hidden):
            self._compactor.compact("contrast")


def _chosen_origins(origin: Origin | None) -> tuple[Origin, ...]:
    if origin is None:
        return _ORIGINS
    if origin not in _ORIGINS:
        raise UsageError("unknown origin", seen=origin, allowed=", ".join(_ORIGINS))
    return (origin,)


def _timestamp(since: datetime | None) -> float:
    if since is None:
        return float("-inf")
    if since.tzinfo is None:
        raise UsageError("`since` needs a time zone", seen=since.isoformat())
    return since.timestamp()
