"""The cases of one memory as they are now: generations, and the journal beside them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meiqa.errors import StoreError, StoreMismatch, StoreNotFound
from meiqa.memory.database import REBUILD, Identity, check_identity
from meiqa.memory.disk import disk_errors
from meiqa.memory.generation import Generation, left_over, segment_path
from meiqa.memory.journal import JOURNAL_NAME, Journal, Mode, Uses
from meiqa.memory.lock import WriterLock
from meiqa.memory.records import Entry
from meiqa.memory.segment import file_identity
from meiqa.memory.view import CaseView
from meiqa.types import Origin

__all__ = ["CaseStore", "Frozen"]

_LOCK_NAME = "cases.lock"
_OLD_DATABASE_NAME = "contrast.sqlite3"


@dataclass(frozen=True, eq=False)
class Frozen:
    """What a compaction merges: a view, the journal's part of it, and the latest hiding."""

    view: CaseView
    revisions: tuple[int, ...]
    stamp: int


@dataclass(frozen=True, eq=False)
class _Known:
    """The parts that a view was made of, and the view."""

    generation: Generation | None = None
    revisions: tuple[int, ...] = ()
    hidden: Mapping[str, int] = field(default_factory=dict)
    view: CaseView | None = None


class CaseStore:
    """One writer, many readers; safe to share between threads.

    Args:
        anchors_path: Directory of the anchors, which may be on a read-only file system.
        cases_path: Directory of what is learned and added; created in mode "rw".
        mode: "r" or "rw".
        package_digest: Digest of the engine package, hexadecimal.
        verify: Check every byte of the generations.

    Raises:
        StoreNotFound: there are no anchors.
        StoreCorrupted: a file is damaged.
        StoreMismatch: a part was encoded by another package, has keys of another kind, or was
            written by another meiqa.
        StoreLocked: mode "rw", and another process is writing.
        StoreUnwritable: mode "rw", and `cases_path` cannot be written.
    """

    def __init__(
        self, anchors_path: Path, cases_path: Path, mode: Mode, package_digest: str, verify: bool
    ) -> None:
        self._directories: dict[Origin, Path] = {"anchor": anchors_path, "contrast": cases_path}
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._lock: WriterLock | None = None
        self._journal: Journal | None = None
        self._compacting: set[Origin] = set()
        self._known: dict[Origin, _Known] = {"anchor": _Known(), "contrast": _Known()}
        self._views: Mapping[Origin, CaseView] = {}
        self.path = cases_path
        self.identity = self._identify(package_digest, verify)
        try:
            _refuse_old_format(cases_path)
            _refuse_other_files(cases_path)
            if mode == "rw":
                with disk_errors(cases_path):
                    cases_path.mkdir(parents=True, exist_ok=True)
                self._lock = WriterLock(cases_path / _LOCK_NAME)
                self._sweep()
            self._journal = Journal(cases_path, mode, self.identity)
            self._refresh()
        except BaseException:
            self.close()
            raise

    @property
    def writable(self) -> bool:
        """Whether the store was opened to be written."""
        return self._lock is not None

    def directory(self, origin: Origin) -> Path:
        """Give the directory of an origin's generations."""
        return self._directories[origin]

    def may_compact(self, origin: Origin) -> bool:
        """Whether the generations of an origin are in the directory that is written."""
        return self.writable and self.directory(origin).resolve() == self.path.resolve()

    def views(self) -> Mapping[Origin, CaseView]:
        """Give the cases that are committed now.

        Never waits: while another thread writes or looks, what was committed before is given.

        Raises:
            StoreCorrupted: a case is not what was written.
        """
        self._open_journal()
        if self._mutex.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._mutex.release()
        return self._views

    def _refresh(self) -> None:
        journal = self._open_journal()
        while True:
            generations = {origin: self._current(origin) for origin in self._known}
            journal.refresh()
            # A compaction first swaps the generation, then takes its cases from the journal: if
            # none was swapped since, none that was taken is missing.
            if all(self._is_latest(origin, each) for origin, each in generations.items()):
                break
        self._views = {origin: self._view(origin, each) for origin, each in generations.items()}

    @contextmanager
    def changing(self) -> Iterator[Change]:
        """Hold others off and do what is inside as one, durably when it ends.

        Raises:
            StoreError: the store is read-only or closed, or the disk is full.
        """
        with self._mutex:
            journal, views = self._writing_journal(), self.views()
            with journal.writing() as connection:

                def drop(origin: Origin, ids: Iterable[str]) -> Uses:
                    dropped = set(ids)
                    journal.drop(connection, origin, dropped)
                    generation = views[origin].generation
                    journal.hide(
                        connection,
                        origin,
                        (
                            case_id
                            for case_id in dropped
                            if origin in self._compacting
                            or (generation is not None and generation.locate(case_id)[1])
                        ),
                    )
                    if origin == "anchor":
                        return 0, 0.0
                    return journal.take_uses(connection, dropped)

                def insert(entry: Entry, uses: Uses) -> None:
                    journal.insert(connection, entry)
                    journal.give_uses(connection, entry.record.id, uses)

                yield Change(views, drop, insert)
            self._refresh()

    def shrink(self) -> None:
        """Leave no trace of removed cases in the journal's files."""
        with self._mutex:
            self._writing_journal().shrink()

    def uses(self) -> dict[str, Uses]:
        """Give how often contrast cases were retrieved, and when last."""
        with self._mutex:
            return self._open_journal().uses()

    def note_retrieved(self, ids: Iterable[str]) -> None:
        """Count retrievals of contrast cases; never waits for a writer."""
        journal = self._journal
        if journal is not None:
            journal.note_retrieved(ids)

    @contextmanager
    def frozen(self, origin: Origin) -> Iterator[Frozen]:
        """Give what a compaction merges; what is removed meanwhile is hidden from its result."""
        with self._mutex:
            journal, view = self._writing_journal(), self.views()[origin]
            stamp = max(journal.hidden[origin].values(), default=0)
            frozen = Frozen(view, self._known[origin].revisions, stamp)
            self._compacting.add(origin)
        try:
            yield frozen
        finally:
            with self._mutex:
                self._compacting.discard(origin)

    def swap(self, origin: Origin, frozen: Frozen, publish: Callable[[], None]) -> None:
        """Put a new generation in place and take what it holds from the journal."""
        with self._mutex:
            journal = self._writing_journal()
            publish()
            with journal.writing() as connection:
                journal.forget_merged(connection, origin, frozen.revisions, frozen.stamp)
            self._refresh()
            journal.shrink()
            if frozen.view.generation is not None:
                with disk_errors(self.path):
                    frozen.view.generation.records_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files and of the right to write; views stay valid."""
        with self._mutex:
            journal, lock = self._journal, self._lock
            self._journal, self._lock = None, None
            try:
                # A connection inherited through a fork belongs to the parent.
                if journal is not None and os.getpid() == self._pid:
                    journal.close()
            finally:
                if lock is not None:
                    lock.release()

    def _identify(self, package_digest: str, verify: bool) -> Identity:
        """Open the generations and check what they were written for."""
        directory = self._directories["anchor"]
        if not os.path.exists(segment_path(directory, "anchor")):
            raise StoreNotFound(f"there is no anchor memory in {directory}", hint=REBUILD)
        anchors = Generation.open(directory, "anchor", verify=verify)
        found = anchors.identity
        identity = Identity(package_digest, found.widths, found.key_kind)
        check_identity(directory, anchors.identity, identity, REBUILD)
        self._known["anchor"] = _Known(anchors)
        if os.path.exists(segment_path(self._directories["contrast"], "contrast")):
            contrast = Generation.open(self._directories["contrast"], "contrast", verify=verify)
            check_identity(contrast.segment.path, contrast.identity, identity, REBUILD)
            self._known["contrast"] = _Known(contrast)
        return identity

    def _current(self, origin: Origin) -> Generation | None:
        known = self._known[origin].generation
        if self._is_latest(origin, known):
            return known
        generation = Generation.open(self._directories[origin], origin)
        check_identity(generation.segment.path, generation.identity, self.identity, REBUILD)
        return generation

    def _is_latest(self, origin: Origin, generation: Generation | None) -> bool:
        """Whether there is no other generation to be read; one that was unlinked still can be."""
        try:
            status = os.stat(segment_path(self._directories[origin], origin))
        except OSError:
            return True
        return generation is not None and file_identity(status) == generation.segment.file

    def _view(self, origin: Origin, generation: Generation | None) -> CaseView:
        journal, known = self._open_journal(), self._known[origin]
        entries = {
            revision: entry
            for revision, entry in journal.entries.items()
            if entry.record.origin == origin
        }
        revisions, hidden = tuple(entries), journal.hidden[origin]
        if (
            known.view is not None
            and known.generation is generation
            and (known.revisions, known.hidden) == (revisions, hidden)
        ):
            return known.view
        recent = sorted(entries.values(), key=lambda entry: entry.record.id)
        view = CaseView(
            self.identity.widths.key,
            generation,
            _hidden_rows(generation, [*hidden, *(entry.record.id for entry in recent)]),
            recent,
        )
        self._known[origin] = _Known(generation, revisions, hidden, view)
        return view

    def _sweep(self) -> None:
        """Remove what a killed writer left unfinished."""
        for origin in self._known:
            if not self.may_compact(origin):
                continue
            # The last writer may have compacted before this one held the lock.
            generation = self._current(origin)
            kept = None if generation is None else generation.records_path.name
            with disk_errors(self.path):
                for file in left_over(self.path, origin, kept):
                    file.unlink(missing_ok=True)

    def _writing_journal(self) -> Journal:
        journal = self._open_journal()
        if not self.writable:
            raise StoreError(
                f"{self.path} was opened read-only",
                seen="mode 'r'",
                allowed="mode 'rw'",
                hint="open the memory with mode 'rw' to change it",
            )
        return journal

    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise StoreError(f"{self.path} is closed", hint="open the memory again")
        if os.getpid() != self._pid:
            raise StoreError(
                f"{self.path} was opened by process {self._pid}",
                hint="open the memory after the fork",
            )
        return self._journal


@dataclass(frozen=True, eq=False)
class Change:
    """What can be done to a store as one.

    Attributes:
        views: The cases before the change.
        drop: Removes cases of an origin by id; gives the sum of their counters.
        insert: Adds a case, whose id must not be there, with its counters.
    """

    views: Mapping[Origin, CaseView]
    drop: Callable[[Origin, Iterable[str]], Uses]
    insert: Callable[[Entry, Uses], None]


def _hidden_rows(
    generation: Generation | None, ids: Iterable[str]
) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    if generation is None:
        return np.empty(0, np.intp)
    located = [generation.locate(case_id) for case_id in ids]
    # np.unique would import numpy.ma, which takes longer than the rest of opening a memory.
    return np.array(sorted({row for row, present in located if present}), np.intp)


def _refuse_other_files(directory: Path) -> None:
    """Refuse to read or make a memory among files of another kind.

    Raises:
        StoreNotFound: there are some, and nothing of a memory.
    """
    segments = (segment_path(directory, "anchor").name, segment_path(directory, "contrast").name)
    own = {JOURNAL_NAME, _LOCK_NAME, _OLD_DATABASE_NAME, *segments}
    try:
        names = os.listdir(directory)
    except OSError:  # there is none yet, or opening says why not
        return
    if names and own.isdisjoint(names):
        raise StoreNotFound(
            f"{directory} holds no memory, but something else",
            seen=min(names),
            hint="name a memory, or an empty or new directory to learn into",
        )


def _refuse_old_format(directory: Path) -> None:
    """Refuse learned cases of another format rather than not to see them.

    Raises:
        StoreMismatch: there are some.
    """
    if os.path.exists(directory / _OLD_DATABASE_NAME):
        raise StoreMismatch(
            f"{directory / _OLD_DATABASE_NAME} was written by another meiqa",
            hint=f"its cases cannot be carried over: rm {directory / _OLD_DATABASE_NAME}*",
        )
