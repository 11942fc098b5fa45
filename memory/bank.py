"""The memory of an engine: anchors and contrast cases, what is learned, and how it is kept small.

What a reader sees of an origin is (version − tombstones − ids in the WAL) + WAL: an id in the WAL
wins over the same id in a version. A compaction merges them into the next version while readers go
on.
"""

from __future__ import annotations

import heapq
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Literal, get_args

from meiqa.errors import (
    MeiqaError,
    StoreError,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
    StoreUnwritable,
    UsageError,
)
from meiqa.locations import embedded_assets, package_memory
from meiqa.memory import maintenance, versions
from meiqa.memory.anchor_writer import AnchorWriter
from meiqa.memory.cases import ORIGINS, Case, Entry, Record, Version, check_case, encode_case
from meiqa.memory.database import REBUILD, Identity, check_identity, store_error
from meiqa.memory.index import Building, can_be_built
from meiqa.memory.maintenance import ExportFormat, MemoryStatistics
from meiqa.memory.pacing import Pace
from meiqa.memory.retrieval import NEAR_DUPLICATE, Snapshot, View, near_duplicates
from meiqa.memory.segment import disk_errors, refuse_taken
from meiqa.memory.wal import LOCK_NAME, WAL_NAME, Image, Mode, Uses, Waiting, Wal, WriterLock
from meiqa.types import KeyKind, Origin

LOG = logging.getLogger(__name__)

REMOTE_SETTINGS = "remote.json"
"""How a remote model is asked, beside the memory that was made with it."""

Admission = Literal["gated", "all"]

_SECONDS_A_DAY = 86_400.0
_DOUBTFUL_STD = 0.5
_MOST_DUPLICATES = 16
_KEPT_ON_EVICTION = 0.95


@dataclass(frozen=True)
class ContrastPolicy:
    """What becomes of the cases that are learned.

    Attributes:
        admission: "gated" stores the cases whose score moved from the first by more than the
            reflection's gate allows; "all" stores every case.
        capacity: Most contrast cases; beyond it a twentieth of them is evicted, the least worth
            first. So many are searched fast without an index.
        merge_above: Cosine of spatial descriptors above which two cases are near-duplicates; the
            newer is kept. 1 merges the same image only.
        half_life_days: Time without a retrieval that halves what a case is worth.
        compact_after: Cases that wait before they are compacted in the background.

    >>> ContrastPolicy().admission
    'gated'
    """

    admission: Admission = "gated"
    capacity: int = 4_000
    merge_above: float = NEAR_DUPLICATE
    half_life_days: float = 30.0
    compact_after: int = 256

    def __post_init__(self) -> None:
        if self.admission not in get_args(Admission):
            raise UsageError("unknown admission", seen=self.admission, allowed="gated, all")
        for name, value in (("capacity", self.capacity), ("compact_after", self.compact_after)):
            if value < 1:
                raise UsageError(f"{name} must be positive", seen=value, allowed="1 or more")
        if not 0.0 <= self.merge_above <= 1.0:
            raise UsageError("merge_above is a cosine", seen=self.merge_above, allowed="0 to 1")
        if not self.half_life_days > 0.0:
            raise UsageError("half_life_days must be positive", seen=self.half_life_days)

    def worth(self, retrieved: int, idle_seconds: float, std: float) -> float:
        """Tell what a case is worth: more for use, less for age and for an uncertain score.

        worth = (1 + retrieved) · 2^(−idle / half-life) / (1 + (std / 0.5)²), idle since it was last
        retrieved, or stored; a clock set back counts as 0.

        >>> ContrastPolicy(half_life_days=30).worth(3, 30 * 86_400, 0.5)
        1.0
        """
        halvings = max(idle_seconds, 0.0) / (_SECONDS_A_DAY * self.half_life_days)
        return float((1 + retrieved) * 0.5**halvings / (1.0 + (std / _DOUBTFUL_STD) ** 2))


@dataclass(frozen=True)
class Pulled:
    """What a pull from a hub makes of a memory.

    Attributes:
        stored: Cases of other devices; each takes the place of the one of its image.
        removed: Cases that were removed elsewhere.
        told: What the hub knows already, and need not be told any more.
        pulled: The sequence number up to which the hub has been followed then.
    """

    stored: Sequence[Entry]
    removed: Sequence[Image]
    told: Sequence[Waiting]
    pulled: int


def open_memory(
    path: str | Path | None, package_digest: str, *, learn: bool | Admission = True
) -> MemoryBank:
    """Open the memory of a package; see `Engine.open`.

    While another process writes to it, it is opened read-only, with one warning. So is the user's
    own where it cannot be written; one that was asked for by its path is refused then.

    Args:
        path: Directory of the memory, which must exist; None for the user's own, which is created
            to learn into. One without anchors of its own gets the embedded ones.
        package_digest: Digest of the engine package, hexadecimal.
        learn: Open it for writing, to remember photos that pass the reflection's gate (True or
            "gated"), or every photo ("all"); False to only read.

    Raises:
        StoreNotFound: there is no directory `path`, or what it holds is no memory.
        StoreUnwritable: `path` cannot be written, and `learn` asks for it.
        StoreError: the memory cannot be used; see `MemoryBank`.
    """
    policy = ContrastPolicy("gated" if isinstance(learn, bool) else learn)
    cases = package_memory(package_digest) if path is None else Path(path)
    if path is not None and not os.path.isdir(cases):
        hint = "check the path, or make one: meiqa memory create PATH, meiqa memory build"
        raise StoreNotFound(f"there is no memory {cases}", hint=hint)
    anchors = cases if versions.holds_anchors(cases) else embedded_assets() / "memory"
    if learn:
        try:
            return MemoryBank(anchors, cases, "rw", package_digest=package_digest, policy=policy)
        except StoreLocked as error:
            LOG.warning("nothing will be remembered: %s", error)
        except StoreUnwritable as error:
            if path is not None:
                hint = "name a writable directory, or only read it: --no-learn (learn=False)"
                raise StoreUnwritable(error.what, seen=error.seen, hint=hint) from error
            LOG.warning("nothing will be remembered: %s (%s)", error.what, error.seen)
    # The policy goes along, so that what it would have admitted is said not to be remembered.
    return MemoryBank(anchors, cases, "r", package_digest=package_digest, policy=policy)


def create_memory(path: str | Path, package_digest: str, key_width: int, token_width: int) -> bool:
    """Make a memory with nothing learned yet; tell whether it learns beside the embedded anchors.

    That of another package than theirs has no anchors: questions can be asked, and it learns.

    Args:
        key_width, token_width: D_key and D of the package's; see `AnchorWriter`.

    Raises:
        StoreError: the directory is neither absent nor empty, or cannot be written.
    """
    refuse_taken(Path(path))
    anchors = embedded_assets() / "memory"
    beside = versions.package_digest_of(anchors) == package_digest
    if beside:
        MemoryBank(anchors, path, "rw", package_digest=package_digest).close()
    else:
        with AnchorWriter(path, package_digest, key_width, token_width) as writer:
            writer.finish()
    return beside


class MemoryBank:
    """Anchors and contrast cases of one directory (see `open`) or of two; a context manager.

    Anchors may be on a read-only file system, with other cases beside them. Safe to share between
    threads. One process may write; any number may read. What changes the memory raises StoreError
    where it is read-only or closed, or the disk is full, when nothing is lost; and UsageError where
    a case cannot be stored or an argument makes no sense.

    Args:
        anchors_path: Directory of the anchors.
        cases_path: Directory of what is learned and added; created in mode "rw", may be absent
            in mode "r".
        mode: "r", or "rw" to change the memory.
        package_digest: Digest of the engine package, hexadecimal.
        verify: Check every byte now; otherwise each case is checked when it is read.

    Raises:
        StoreNotFound: there are no anchors, or `cases_path` holds something else.
        StoreCorrupted: a file is damaged.
        StoreMismatch: a part is of another package, format or kind of key than it must be.
        StoreLocked, StoreUnwritable: mode "rw", and another process writes, or none can.

    >>> import tempfile
    >>> import numpy as np
    >>> from meiqa.memory import AnchorWriter, RetrievalPolicy
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

    def __init__(
        self,
        anchors_path: str | Path,
        cases_path: str | Path,
        mode: Mode = "r",
        *,
        package_digest: str,
        verify: bool = False,
        policy: ContrastPolicy | None = None,
    ) -> None:
        if mode not in ("r", "rw"):
            raise UsageError("unknown mode for a memory", seen=mode, allowed="r, rw")
        self._policy = policy or ContrastPolicy()
        self._path = Path(cases_path)
        self._directories: dict[Origin, Path] = {
            "anchor": Path(anchors_path),
            "contrast": self._path,
        }
        self._segments = {
            each: versions.segment_path(self._directories[each], each) for each in ORIGINS
        }
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._lock: WriterLock | None = None
        self._wal: Wal | None = None
        self._merging: set[Origin] = set()
        self._one_compaction = threading.Lock()
        self._background: threading.Thread | None = None
        self._background_failed = False
        self._pace = Pace()
        self._retrieved: Counter[str] = Counter()
        self._versions: dict[Origin, Version]
        self._snapshot: Snapshot
        self._identity = self._open_anchors(package_digest, verify)
        try:
            _refuse_other_files(self._path)
            if mode == "rw":
                with disk_errors(self._path):
                    self._path.mkdir(parents=True, exist_ok=True)
                self._lock = WriterLock(self._path / LOCK_NAME)
                self._sweep()
            self._wal = Wal(self._path, mode, self._identity)
            self._refresh(self._wal, verify)
        except BaseException:
            self.close()
            raise

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
        """Open a directory that holds both the anchors and the contrast cases."""
        return cls(path, path, mode, package_digest=package_digest, verify=verify, policy=policy)

    def __enter__(self) -> MemoryBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def key_kind(self) -> KeyKind:
        """What the keys are made of; see `retrieval_key`."""
        return self._identity.key_kind

    @property
    def identity(self) -> Identity:
        """The package, the widths and the kind of key of everything in it."""
        return self._identity

    @property
    def path(self) -> Path:
        """The directory of what is learned and added."""
        return self._path

    @property
    def holds_pictures(self) -> bool:
        """Whether it was made with a remote model, so that its tokens are pictures."""
        return any((each / REMOTE_SETTINGS).exists() for each in self._directories.values())

    @property
    def policy(self) -> ContrastPolicy:
        """What becomes of the cases that are learned."""
        return self._policy

    @property
    def admission(self) -> Admission:
        """Which cases `remember` stores."""
        return self._policy.admission

    @property
    def writable(self) -> bool:
        """Whether the memory was opened to be changed, so that it can learn."""
        return self._lock is not None

    def snapshot(self) -> Snapshot:
        """Freeze what is stored now; what is changed later does not change it.

        Never waits: while another thread writes or looks, what was committed before is given.
        """
        wal = self._opened()
        if self._mutex.acquire(blocking=False):
            try:
                if not self._is_current(wal):
                    self._refresh(wal)
            finally:
                self._mutex.release()
        return self._snapshot

    def _is_current(self, wal: Wal) -> bool:
        """Whether nothing has been committed or compacted since the last snapshot."""
        if wal.connection is None:
            committed = os.path.exists(wal.path)
        else:
            try:
                (version,) = wal.connection.execute("PRAGMA data_version").fetchone()
            except sqlite3.Error as error:
                raise store_error(wal.path, error) from error
            committed = version != wal.seen
        return not committed and all(map(self._is_latest, ORIGINS, self._versions.values()))

    def _is_latest(self, origin: Origin, version: Version) -> bool:
        """Whether there is no other version to be read; one that was unlinked still can be."""
        try:
            status = os.stat(self._segments[origin])
        except OSError:
            return True
        return version.segment.file == (status.st_dev, status.st_ino)

    def _refresh(self, wal: Wal, verify: bool = False) -> None:
        while True:
            latest = {origin: self._latest(origin, verify) for origin in ORIGINS}
            wal.refresh()
            # A compaction first swaps the version, then takes its cases from the WAL: if none was
            # swapped since, none that was taken is missing.
            if all(map(self._is_latest, ORIGINS, latest.values())):
                break
        self._versions, views = latest, self._snapshot.views
        for origin, old in self._snapshot.views.items():
            seen = latest[origin], wal.tombstones[origin], wal.entries[origin]
            if seen != (old.version, old.tombstones, old.entries):
                views[origin] = View(*seen)
        pulled = None if wal.mirrored is None else wal.mirrored.pulled
        parts = views["anchor"], views["contrast"]
        self._snapshot = Snapshot(*parts, self._retrieved.update, pulled)

    def _latest(self, origin: Origin, verify: bool = False) -> Version:
        known = self._versions[origin]
        if self._is_latest(origin, known):
            return known
        version = versions.open_version(self._directories[origin], origin, verify=verify)
        check_identity(version.segment.path, version.identity, self._identity, REBUILD)
        return version

    def _open_anchors(self, package_digest: str, verify: bool) -> Identity:
        """Open the anchors, and give what everything else must have been written for."""
        directory = self._directories["anchor"]
        if not versions.holds_anchors(directory):
            raise StoreNotFound(f"there is no anchor memory in {directory}", hint=REBUILD)
        anchors = versions.open_version(directory, "anchor", verify=verify)
        identity = Identity(package_digest, anchors.identity.widths, anchors.identity.key_kind)
        check_identity(directory, anchors.identity, identity, REBUILD)
        contrast = versions.no_version(self._path, "contrast", identity)
        self._versions = {"anchor": anchors, "contrast": contrast}
        self._snapshot = Snapshot(View(anchors), View(contrast), self._retrieved.update)
        return identity

    def _sweep(self) -> None:
        """Remove what a killed writer left unfinished."""
        for origin in ORIGINS:
            if self.writes(origin):
                # The last writer may have compacted before this one held the lock.
                kept = self._versions[origin] = self._latest(origin)
                with disk_errors(self._path):
                    for file in versions.left_over(self._path, origin, kept.records_path.name):
                        file.unlink(missing_ok=True)

    def writes(self, origin: Origin) -> bool:
        """Tell whether the versions of an origin are in the directory that is written."""
        return self._directories[origin].resolve() == self._path.resolve()

    def remember(self, case: Case, *, provenance: str, gated: bool = True) -> bool:
        """Store a contrast case; when the call returns, neither a kill nor a power cut undoes it.

        A case with the same id or the same image is replaced, and so are near-duplicates; their
        counters of use are added up. `provenance` says in a few words where the score comes from,
        `gated` whether the case passed the reflection's gate.

        Returns:
            Whether the policy admitted it.
        """
        if not gated and self._policy.admission == "gated":
            return False
        self._put(case, "contrast", provenance)
        self._keep_small("contrast")
        return True

    def _keep_small(self, origin: Origin) -> None:
        """Evict what is too much, and merge what waits, as the policy says."""
        view = self.snapshot().views[origin]
        if origin == "contrast" and len(view) > self._policy.capacity:
            self.evict(keep=max(1, int(self._policy.capacity * _KEPT_ON_EVICTION)))
        waiting = len(view.recent) + len(view.dead) >= self._policy.compact_after
        if self.writes(origin) and (waiting or versions.lacks_index(view.version)):
            self._compact_in_background(origin)

    def add_anchor(self, case: Case, *, provenance: str, thumbnail: bytes | None = None) -> None:
        """Add an anchor, or replace the one with the same id or image; durable and found at once.

        A human gave its score; `provenance` says who, in a few words. The thumbnail is a small JPEG
        of it. `compact` makes it part of the segment, where that is in the directory written.
        """
        self._put(case, "anchor", provenance, thumbnail)

    def _put(self, case: Case, origin: Origin, provenance: str, jpeg: bytes | None = None) -> None:
        check_case(case, origin, self._identity.widths)
        entry = encode_case(case, self._identity.package_digest, provenance, time.time(), jpeg)
        above = self._policy.merge_above if origin == "contrast" else 1.0
        with self._changing() as (wal, views):
            view = views[origin]
            alike = near_duplicates(view, case, above, _MOST_DUPLICATES)
            of_image = view.entries_in(view.rows_of_image(case.image_digest))
            replaced = [*alike, *(each.record for each in of_image)]
            if (of_id := view.record_of_id(case.id)) is not None:
                replaced.append(of_id)
            self._drop(wal, view, origin, {each.id for each in replaced}, heir=case.id)
            wal.insert(entry)
            wal.tell_hub(origin, {each.image_digest for each in replaced}, removed=True)
            wal.tell_hub(origin, [case.image_digest])

    @contextmanager
    def _changing(self) -> Iterator[tuple[Wal, Mapping[Origin, View]]]:
        """Hold others off and do what is inside as one, durably when it ends."""
        with self._mutex:
            wal, views = self._written(), self.snapshot().views
            with wal.writing():
                self._write_retrieved(wal)
                yield wal, views
            self._refresh(wal)

    def _write_retrieved(self, wal: Wal) -> None:
        counts = dict(self._retrieved)
        self._retrieved.clear()  # what another thread counts meanwhile may be lost
        wal.count_uses(counts)

    def _drop(
        self, wal: Wal, view: View, origin: Origin, ids: Collection[str], heir: str | None = None
    ) -> None:
        """Remove cases; their counters of use go to an heir."""
        self._hide(wal, view, origin, ids)
        if origin == "contrast":
            wal.drop_uses(ids, heir)

    def _hide(self, wal: Wal, view: View, origin: Origin, ids: Collection[str]) -> None:
        wal.delete(origin, ids)
        if origin in self._merging:
            wal.bury(origin, ids)  # what is being merged is in no version yet
        else:
            wal.bury(origin, [case_id for case_id in ids if view.version.locate(case_id)[1]])

    def cases(
        self, origin: Origin | None = None, since: datetime | None = None
    ) -> Iterator[Record]:
        """List what is stored, or was since a moment, anchors first, each origin by id."""
        chosen, earliest = _chosen_origins(origin), _timestamp(since)
        views = self.snapshot().views
        return (record for each in chosen for record in views[each].records(earliest))

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
        """
        if ids is None and origin is None and since is None:
            raise UsageError("say what is to be removed", allowed="ids, origin, since")
        chosen, earliest = _chosen_origins(origin), _timestamp(since)
        count = 0
        with self._changing() as (wal, views):
            for each in chosen:
                removed = views[each].records(earliest, ids)
                self._drop(wal, views[each], each, [record.id for record in removed])
                wal.tell_hub(each, [record.image_digest for record in removed], removed=True)
                count += len(removed)
        self._erase()
        return count

    def _erase(self) -> None:
        """Leave no trace of what was removed, but for anchors in a segment."""
        with self._mutex:
            self._written().shrink()
        if self.snapshot().contrast.dead:
            self._pace.hurry()
            self._compact("contrast")

    def follow(self, hub: str, *, anew: bool = False) -> int:
        """Share this memory through a hub; give the sequence number up to which it was pulled.

        With the first time on, or `anew`, everything that was learned or added in this directory
        waits to be told to the hub, and so does every change that follows. StoreMismatch if the
        memory is a replica of another hub.
        """
        with self._mutex:
            mirrored = self._written().mirrored
        if mirrored is None or anew:
            with self._changing() as (wal, views):
                wal.mirror(hub, 0)
                for origin, view in views.items():
                    recent = [entry.record for entry in view.recent]
                    records = view.records() if self.writes(origin) else recent
                    wal.tell_hub(origin, [record.image_digest for record in records])
            return 0
        if mirrored.hub != hub:
            what, hint = f"{self._path} is a replica of another hub", "move it there: --anew"
            raise StoreMismatch(what, seen=f"hub {hub}", allowed=mirrored.hub, hint=hint)
        return mirrored.pulled

    def outbox(self) -> list[Waiting]:
        """Give what the hub is still to be told, the oldest first."""
        with self._mutex:
            return self._written().outbox()

    def told(
        self, waiting: Sequence[Waiting], removals: Sequence[tuple[Waiting, int]] = ()
    ) -> None:
        """Take out of the outbox what the hub has acknowledged.

        The sequence numbers that it gave to `removals` are noted until the next pull: a photo that
        is learned again before then is learned by a device that knows of its removal.
        """
        with self._mutex:
            wal = self._written()
            with wal.writing():
                wal.told(waiting)
                wal.know_removed(removals)

    def absorb(self, origin: Origin, entries: Iterable[Entry], pace: Pace) -> None:
        """Write many cases of other devices, by id, straight into the next version.

        Those whose image or id is stored already are left out. Beside scoring, which would go
        through them one by one, their index is built first; else it is left to the next compaction.
        A kill before the version is swapped in leaves everything as it was.
        """
        self._compact(origin, entries, pace)

    def pull(self, decide: Callable[[Mapping[Origin, View], Sequence[Waiting]], Pulled]) -> Pulled:
        """Do as one what a hub tells; `decide` says what, of what is stored and waits just then.

        Cases stored so are not told to the hub again. What is removed leaves no trace, as by
        `remove`.
        """
        with self._changing() as (wal, views):
            found = decide(views, wal.outbox())
            for origin, view in views.items():
                entries = [each for each in found.stored if each.record.origin == origin]
                images = [each.record.image_digest for each in entries]
                held = [view.record_of_image(image) for image in images]
                ids = {each.id for each in held if each} | {each.record.id for each in entries}
                self._hide(wal, view, origin, ids)
                for entry in entries:
                    wal.insert(entry)
                lost = [
                    view.record_of_image(image) for each, image in found.removed if each == origin
                ]
                self._drop(wal, view, origin, [each.id for each in lost if each])
            wal.told(found.told)
            assert wal.mirrored is not None
            wal.mirror(wal.mirrored.hub, found.pulled)
        if found.removed:
            self._erase()
        for origin in ORIGINS:
            self._keep_small(origin)
        return found

    def forget(self, since: datetime | None = None) -> int:
        """Remove the contrast cases stored at `since` or later, or all; see `remove`."""
        return self.remove(origin="contrast", since=since)

    def evict(self, keep: int) -> int:
        """Remove the contrast cases that are worth least until `keep` are left; give how many."""
        if keep < 0:
            raise UsageError("keep must not be negative", seen=keep, allowed="0 or more")
        now, uses = time.time(), self._uses()

        def value(record: Record) -> tuple[float, float, str]:
            retrieved, last = uses.get(record.id, (0, 0.0))
            idle = now - max(record.created, last)
            return self._policy.worth(retrieved, idle, record.std), record.created, record.id

        with self._changing() as (wal, views):
            records = sorted(views["contrast"].records(), key=value)
            evicted = [record.id for record in records[: max(len(records) - keep, 0)]]
            self._drop(wal, views["contrast"], "contrast", evicted)
        return len(evicted)

    def compact(self) -> bool:
        """Merge what was stored since into new segments; tell whether there was anything to merge.

        Snapshots and other processes keep what they have, and notice the new segments with their
        next snapshot. A kill at any instant leaves the old or the new ones. Anchors in another
        directory than the one that is written stay as they are. UsageError if so many anchors take
        an index, which cannot be built here.
        """
        self._written()
        self._pace.hurry()
        return any([self._compact(origin) for origin in ORIGINS if self.writes(origin)])

    def _compact(
        self,
        origin: Origin,
        incoming: Iterable[Entry] | None = None,
        pace: Pace | None = None,
    ) -> bool:
        """Write the next version of what is stored, and of what comes in beside it."""
        pace = pace or Pace()
        with self._one_compaction:
            self._pace = pace  # of the compaction under way, which whoever waits for it hurries
            with self._mutex:
                self._written()
                view = self.snapshot().views[origin]
                # What is removed meanwhile gets a tombstone against the result.
                self._merging.add(origin)
            try:
                merged = view.recent or view.dead or versions.lacks_index(view.version)
                if incoming is None and not merged:
                    return False
                directory, number = self._directories[origin], view.version.number + 1
                entries, threads = pace.through(view.all_entries()), 1
                if incoming is not None:
                    entries = _with_new(view, incoming)
                    threads = int(pace.gentle and can_be_built())
                written = versions.write_version(
                    directory,
                    origin,
                    self._identity,
                    number,
                    entries,
                    building=Building(threads, pace),
                    learned=view.version.regression,
                )
                with written as publish, self._mutex:
                    wal = self._written()
                    publish()
                    with wal.writing():
                        stamp = max(view.tombstones.values(), default=0)
                        wal.forget_merged(origin, view.entries, stamp)
                    self._refresh(wal)
                    wal.shrink()
                    with disk_errors(self._path):
                        view.version.records_path.unlink(missing_ok=True)
                return True
            finally:
                with self._mutex:
                    self._merging.discard(origin)

    def _compact_in_background(self, origin: Origin) -> None:
        """Compact cases gently, unless that goes on already or has failed before."""

        def compact() -> None:
            try:
                self._compact(origin, pace=pace)
            except MeiqaError as error:
                self._background_failed = True  # a full disk is not asked again with every case
                LOG.warning("the memory was not compacted: %s", error)

        goes_on = self._background is not None and self._background.is_alive()
        if not self._background_failed and not goes_on:
            pace = self._pace = Pace(gently=True)
            self._background = threading.Thread(target=compact, name="memory compaction")
            self._background.start()

    def _uses(self) -> dict[str, Uses]:
        with self._mutex:
            return self._opened().uses()

    def statistics(self, *, sample: int = 64) -> MemoryStatistics:
        """Count, weigh and measure the memory; the recall of an index takes `sample` searches."""
        return maintenance.statistics(self.snapshot().views, self.key_kind, self._path, sample)

    def export(self, path: str | Path, format: ExportFormat = "jsonl") -> int:
        """Write all records and keys to a file; give how many; see `maintenance`."""
        views, uses = self.snapshot().views, self._uses()
        return maintenance.export(views, uses, self.key_kind, Path(path), format)

    def rekey(self, kind: KeyKind, path: str | Path) -> int:
        """Write the cases with keys of another kind into a new memory; see `maintenance`."""
        views, uses = self.snapshot().views, self._uses()
        return maintenance.rekey(views, uses, self._identity, kind, Path(path))

    def thin(self, path: str | Path, keep: int) -> int:
        """Write a small memory with fewer anchors, without their tokens; see `maintenance`."""
        views, uses = self.snapshot().views, self._uses()
        return maintenance.thin(views, uses, self._identity, Path(path), keep)

    def close(self) -> None:
        """Let go of the files, once a compaction has ended; snapshots stay valid."""
        self._pace.hurry()
        if self._background is not None:
            self._background.join()
        with self._mutex, ExitStack() as last:
            wal, lock = self._wal, self._lock
            self._wal, self._lock = None, None
            if lock is not None:
                last.callback(lock.release)
            # A connection inherited through a fork belongs to the parent.
            if wal is not None and os.getpid() == self._pid:
                last.callback(wal.close)
                if lock is not None and self._retrieved:
                    with wal.writing():
                        self._write_retrieved(wal)

    def _written(self) -> Wal:
        wal = self._opened()
        if not self.writable:
            what, hint = f"{self._path} was opened read-only", "open it with mode 'rw' to change it"
            raise StoreError(what, seen="mode 'r'", allowed="mode 'rw'", hint=hint)
        return wal

    def _opened(self) -> Wal:
        if self._wal is None:
            raise StoreError(f"{self._path} is closed", hint="open the memory again")
        if os.getpid() != self._pid:
            what = f"{self._path} was opened by process {self._pid}"
            raise StoreError(what, hint="open the memory after the fork")
        return self._wal


def _with_new(view: View, incoming: Iterable[Entry]) -> Iterator[Entry]:
    """Give what is stored and what comes in, by id; what is stored stays as it is."""
    new = (each for each in incoming if view.record_of_image(each.record.image_digest) is None)
    merged = heapq.merge(view.all_entries(), new, key=_id_of)  # what is stored comes first
    return (next(alike) for _, alike in groupby(merged, _id_of))


def _id_of(entry: Entry) -> str:
    return entry.record.id


def _chosen_origins(origin: Origin | None) -> tuple[Origin, ...]:
    if origin not in (None, *ORIGINS):
        raise UsageError("unknown origin", seen=origin, allowed=", ".join(ORIGINS))
    return ORIGINS if origin is None else (origin,)


def _timestamp(since: datetime | None) -> float:
    if since is None:
        return float("-inf")
    if since.tzinfo is None:
        raise UsageError("`since` needs a time zone", seen=since.isoformat())
    return since.timestamp()


def _refuse_other_files(directory: Path) -> None:
    """Refuse with StoreNotFound to read or make a memory among files of another kind."""
    segments = {versions.segment_path(directory, origin).name for origin in ORIGINS}
    try:
        names = os.listdir(directory)
    except OSError:  # there is none yet, or opening says why not
        return
    if names and not segments.union((WAL_NAME, LOCK_NAME)).intersection(names):
        what = f"{directory} holds no memory, but something else"
        hint = "name a memory, or an empty directory to learn into"
        raise StoreNotFound(what, seen=min(names), hint=hint)
