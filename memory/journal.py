"""The cases that no generation holds yet: one database, written by one process, read by many."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from meiqa.memory.database import (
    Identity,
    check_identity,
    connect,
    create_database,
    read_identity,
    sqlite_errors,
    transaction,
)
from meiqa.memory.disk import sync
from meiqa.memory.records import (
    Entry,
    delete_revisions,
    insert_entry,
    read_entry,
)
from meiqa.types import Origin

__all__ = ["JOURNAL_NAME", "Journal", "Mode", "Uses"]

Mode = Literal["r", "rw"]
Uses = tuple[int, float]
"""How often a case was retrieved, and when last, in seconds since 1970."""

JOURNAL_NAME = "cases.sqlite3"


class Journal:
    """Cases, what is hidden of the generations, and how often contrast cases were retrieved.

    Encoded cases are kept in memory; a refresh reads only what was committed since the last one.
    Not safe to share between threads, but for counting retrievals.

    Args:
        directory: The memory. In mode "r" an absent journal is empty, and is noticed when it
            appears; in mode "rw" it is created.
        mode: "r" or "rw".
        identity: The package and the widths that its cases must have.

    Raises:
        StoreCorrupted: the database is damaged.
        StoreMismatch: its cases were encoded by another package.
        StoreUnwritable: mode "rw", and the directory cannot be written.

    Attributes:
        path: The database.
        entries: The cases by revision, ascending.
        hidden: Ids that count no longer, with the moment of each, by origin.
    """

    def __init__(self, directory: Path, mode: Mode, identity: Identity) -> None:
        self.path = directory / JOURNAL_NAME
        self.entries: Mapping[int, Entry] = {}
        self.hidden: Mapping[Origin, Mapping[str, int]] = {"anchor": {}, "contrast": {}}
        self._mode = mode
        self._identity = identity
        self._retrieved: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._seen_version: int | None = None
        self._connection: sqlite3.Connection | None = None
        if mode == "rw" and not self.path.exists():
            create_database(self.path, identity)
            sync(directory.parent)
        self._connect_if_there()

    def refresh(self) -> None:
        """Read what has been committed.

        Raises:
            StoreCorrupted: a case is not what was written.
        """
        self._connect_if_there()
        if self._connection is None:
            return
        with sqlite_errors(self.path):
            # The version comes first: a commit between the two reads is read again, not lost.
            version: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
            if version != self._seen_version:
                with transaction(self._connection, "DEFERRED"):
                    self._read(self._connection)
                self._seen_version = version

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Do what is inside as one; when it ends, neither a kill nor a power cut undoes it.

        Raises:
            StoreUnwritable: the disk is full; nothing was done.
        """
        assert self._connection is not None
        with sqlite_errors(self.path):
            with transaction(self._connection, "IMMEDIATE"):
                self._write_retrieved(self._connection)
                yield self._connection
            self._seen_version = None

    def insert(self, connection: sqlite3.Connection, entry: Entry) -> None:
        """Add a case."""
        insert_entry(connection, entry)

    def drop(self, connection: sqlite3.Connection, origin: Origin, ids: Iterable[str]) -> None:
        """Remove the cases that are here."""
        wanted = set(ids)
        delete_revisions(
            connection,
            (
                revision
                for revision, entry in self.entries.items()
                if entry.record.origin == origin and entry.record.id in wanted
            ),
        )

    def hide(self, connection: sqlite3.Connection, origin: Origin, ids: Iterable[str]) -> None:
        """Let cases of the generation, or of one being written, count no longer."""
        connection.executemany(
            "INSERT OR REPLACE INTO hidden (id, origin) VALUES (?, ?)",
            [(case_id, origin) for case_id in ids],
        )

    def forget_merged(
        self, connection: sqlite3.Connection, origin: Origin, revisions: Iterable[int], stamp: int
    ) -> None:
        """Remove the cases that a generation holds now, and what was hidden until `stamp`."""
        delete_revisions(connection, revisions)
        connection.execute("DELETE FROM hidden WHERE origin = ? AND stamp <= ?", (origin, stamp))

    def note_retrieved(self, ids: Iterable[str]) -> None:
        """Count retrievals, from any thread; the next write takes them along, or closing does."""
        if self._mode == "rw":
            with self._counting:
                self._retrieved.update(ids)

    def uses(self) -> dict[str, Uses]:
        """Give how often contrast cases were retrieved, and when last, as far as it is written."""
        if self._connection is None:
            return {}
        with sqlite_errors(self.path):
            rows = self._connection.execute("SELECT id, retrieved, last_retrieved FROM uses")
            return {case_id: (retrieved, last) for case_id, retrieved, last in rows}

    def take_uses(self, connection: sqlite3.Connection, ids: Iterable[str]) -> Uses:
        """Remove the counters of cases and give their sum, and the latest moment."""
        total, latest = 0, 0.0
        for case_id in ids:
            row = connection.execute(
                "DELETE FROM uses WHERE id = ? RETURNING retrieved, last_retrieved", (case_id,)
            ).fetchall()
            for retrieved, last in row:
                total, latest = total + retrieved, max(latest, last)
        return total, latest

    def give_uses(self, connection: sqlite3.Connection, case_id: str, uses: Uses) -> None:
        """Set the counters of a case."""
        if uses[0]:
            connection.execute("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", (case_id, *uses))

    def shrink(self) -> None:
        """Leave no trace of removed cases in the files, and give their room back."""
        assert self._connection is not None
        with sqlite_errors(self.path):
            self._connection.execute("PRAGMA incremental_vacuum").fetchall()
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Write what was counted and let go of the file."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with sqlite_errors(self.path):
                try:
                    if self._retrieved:
                        with transaction(connection, "IMMEDIATE"):
                            self._write_retrieved(connection)
                finally:
                    connection.close()

    def _connect_if_there(self) -> None:
        # Unlike Path.exists, this takes a directory that may not be searched for an empty one.
        if self._connection is not None or not os.path.exists(self.path):
            return
        connection = connect(self.path, self._mode)
        try:
            found, _ = read_identity(self.path, connection)
            hint = "open it with the package that wrote it, or choose another directory"
            check_identity(self.path, found, self._identity, hint)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _read(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute("SELECT revision FROM records ORDER BY revision").fetchall()
        self.entries = {
            revision: self.entries.get(revision)
            or read_entry(self.path, connection, revision, self._identity.widths)
            for (revision,) in rows
        }
        hidden: dict[Origin, dict[str, int]] = {"anchor": {}, "contrast": {}}
        for case_id, origin, stamp in connection.execute("SELECT id, origin, stamp FROM hidden"):
            if origin in hidden:
                hidden[origin][case_id] = stamp
        self.hidden = hidden

    def _write_retrieved(self, connection: sqlite3.Connection) -> None:
        now = time.time()
        with self._counting:
            counts, self._retrieved = self._retrieved, Counter()
        connection.executemany(
            "INSERT INTO uses VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
            " retrieved = retrieved + excluded.retrieved, last_retrieved = excluded.last_retrieved",
            [(case_id, count, now) for case_id, count in counts.items()],
        )
