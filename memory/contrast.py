"""The contrast memory: cases learned online, durable before they are acknowledged."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np

from meiqa.errors import StoreError, UsageError
from meiqa.memory.cases import Case, check_case
from meiqa.memory.encoding import decode_keys, dequantise_tokens, encode_key, quantise_tokens
from meiqa.memory.lock import WriterLock
from meiqa.memory.records import (
    Features,
    Identity,
    Record,
    check_identity,
    connect,
    create_database,
    delete_revisions,
    insert_features,
    insert_record,
    read_features,
    read_identity,
    record_of,
    sqlite_errors,
    transaction,
)
from meiqa.memory.retrieval import KeyTable
from meiqa.memory.segment import disk_errors, sync_directory

__all__ = ["ContrastMemory", "ContrastView", "Mode"]

Mode = Literal["r", "rw"]

_DATABASE_NAME = "contrast.sqlite3"
_LOCK_NAME = "contrast.lock"


@dataclass(frozen=True, eq=False)
class ContrastView:
    """The contrast cases as they were at one moment; later writes do not change it."""

    table: KeyTable
    revisions: Sequence[int]
    _stored: Sequence[tuple[Record, Features]]

    @classmethod
    def build(
        cls, stored_by_revision: dict[int, tuple[Record, Features]], key_width: int
    ) -> ContrastView:
        """Freeze stored cases, given by revision."""
        stored = tuple(stored_by_revision.values())
        keys = np.array([features.key for _, features in stored], np.float16)
        table = KeyTable.build(
            decode_keys(keys.reshape(-1, key_width)),
            [record.id for record, _ in stored],
            [record.image_digest for record, _ in stored],
        )
        return cls(table, tuple(stored_by_revision), stored)

    def __len__(self) -> int:
        return len(self._stored)

    def case(self, row: int) -> Case:
        """Give the case in a row of the table."""
        record, features = self._stored[row]
        return Case(
            id=record.id,
            origin="contrast",
            image_digest=record.image_digest,
            score=record.score,
            std=record.std,
            summary=record.summary,
            key=self.table.keys[row],
            tokens=dequantise_tokens(features.tokens),
            grid=features.grid,
        )


class ContrastMemory:
    """The contrast store of one directory: one writer, many readers; safe to share between threads.

    Encoded cases are kept in memory between views; a view reads from the database only what was
    committed since the last one.

    Args:
        path: The directory; created in mode "rw". In mode "r" an absent store is empty, and is
            noticed when it appears.
        mode: "r" or "rw".
        identity: The package and the widths that its cases must have.

    Raises:
        StoreLocked: mode "rw", and another process is writing.
        StoreCorrupted: the database is damaged.
        StoreMismatch: its cases were encoded by another package.
        StoreUnwritable: mode "rw", and the directory cannot be written.
    """

    def __init__(self, path: Path, mode: Mode, identity: Identity) -> None:
        self._database = path / _DATABASE_NAME
        self._identity = identity
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._stored: dict[int, tuple[Record, Features]] = {}
        self._view = ContrastView.build({}, identity.widths.key)
        self._seen_version: int | None = None
        self._retrieved: Counter[int] = Counter()
        self._connection: sqlite3.Connection | None = None
        self._lock: WriterLock | None = None
        self._closed = False
        try:
            if mode == "rw":
                self._begin_writing()
            if self._has_database():
                self._connect()
        except BaseException:
            self.close()
            raise

    @property
    def writable(self) -> bool:
        """Whether the store was opened to be written."""
        return self._lock is not None

    def view(self) -> ContrastView:
        """Give the cases that are committed now.

        Raises:
            StoreCorrupted: a case is not what was written.
        """
        with self._mutex:
            self._require_open()
            if self._connection is None and self._has_database():
                self._connect()
            if self._connection is not None:
                self._refresh(self._connection)
            return self._view

    def remember(self, case: Case, provenance: str) -> None:
        """Store a case durably; it replaces one with the same id or the same image.

        Raises:
            UsageError: the case cannot be stored.
            StoreError: the store is read-only, closed, or the disk is full.
        """
        check_case(case, "contrast", self._identity.widths)
        record = record_of(case, self._identity.package_digest, provenance, time.time())
        rows, columns = case.grid
        features = Features(
            encode_key(case.key), quantise_tokens(case.tokens), (int(rows), int(columns))
        )
        with self._mutex, sqlite_errors(self._database):
            connection = self._writing_connection()
            with transaction(connection, "IMMEDIATE"):
                self._write_retrieved(connection)
                retrieved = _remove_same(connection, record)
                revision = insert_record(connection, record, retrieved)
                insert_features(connection, revision, record, features)
            self._retrieved.clear()
            self._seen_version = None

    def forget(self, since: datetime | None) -> int:
        """Remove the cases stored at `since` or later, or all; give how many.

        Raises:
            UsageError: `since` has no time zone.
            StoreError: the store is read-only or closed.
        """
        if since is not None and since.tzinfo is None:
            raise UsageError("`since` needs a time zone", seen=since.isoformat())
        earliest = since.timestamp() if since is not None else float("-inf")
        with self._mutex, sqlite_errors(self._database):
            connection = self._writing_connection()
            with transaction(connection, "IMMEDIATE"):
                rows = connection.execute(
                    "SELECT revision FROM records WHERE created >= ?", (earliest,)
                ).fetchall()
                delete_revisions(connection, [revision for (revision,) in rows])
            # What was forgotten must not linger in the log either.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._seen_version = None
            return len(rows)

    def note_retrieved(self, revisions: Sequence[int]) -> None:
        """Count retrievals; they reach the disk with the next write or when the store is closed."""
        if self.writable:
            with self._mutex:
                self._retrieved.update(revisions)

    def close(self) -> None:
        """Let go of the database and of the right to write; views stay valid."""
        with self._mutex:
            connection, lock = self._connection, self._lock
            self._connection, self._lock, self._closed = None, None, True
            try:
                # A connection inherited through a fork belongs to the parent.
                if connection is not None and os.getpid() == self._pid:
                    self._end_connection(connection)
            finally:
                if lock is not None:
                    lock.release()

    def _begin_writing(self) -> None:
        directory = self._database.parent
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(directory / _LOCK_NAME)
        if not self._database.exists():
            create_database(self._database, self._identity)
            sync_directory(directory.parent)

    def _end_connection(self, connection: sqlite3.Connection) -> None:
        with sqlite_errors(self._database):
            try:
                if self._retrieved:
                    with transaction(connection, "IMMEDIATE"):
                        self._write_retrieved(connection)
            finally:
                connection.close()

    def _has_database(self) -> bool:
        # Unlike Path.exists, this takes a directory that may not be searched for an empty one.
        return os.path.exists(self._database)

    def _connect(self) -> None:
        connection = connect(self._database, "rw" if self.writable else "r")
        try:
            found = read_identity(self._database, connection)
            hint = "open it with the package that wrote it, or choose another directory"
            check_identity(self._database, found, self._identity, hint)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _refresh(self, connection: sqlite3.Connection) -> None:
        with sqlite_errors(self._database):
            # The version comes first: a commit between the two reads is read again, not lost.
            version: int = connection.execute("PRAGMA data_version").fetchone()[0]
            if version == self._seen_version:
                return
            with transaction(connection, "DEFERRED"):
                rows = connection.execute("SELECT revision FROM records ORDER BY revision")
                self._stored = {
                    revision: self._stored.get(revision) or self._load(connection, revision)
                    for (revision,) in rows.fetchall()
                }
            if tuple(self._stored) != self._view.revisions:
                self._view = ContrastView.build(self._stored, self._identity.widths.key)
            self._seen_version = version

    def _load(self, connection: sqlite3.Connection, revision: int) -> tuple[Record, Features]:
        return read_features(self._database, connection, revision, self._identity.widths)

    def _write_retrieved(self, connection: sqlite3.Connection) -> None:
        connection.executemany(
            "UPDATE records SET retrieved = retrieved + ? WHERE revision = ?",
            [(count, revision) for revision, count in self._retrieved.items()],
        )

    def _writing_connection(self) -> sqlite3.Connection:
        self._require_open()
        if self._connection is None or not self.writable:
            raise StoreError(
                f"{self._database.parent} was opened read-only",
                seen="mode 'r'",
                allowed="mode 'rw'",
                hint="open the memory with mode 'rw' to change it",
            )
        return self._connection

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self._database.parent} is closed", hint="open the memory again")
        if os.getpid() != self._pid:
            raise StoreError(
                f"{self._database.parent} was opened by process {self._pid}",
                hint="open the memory after the fork",
            )


def _remove_same(connection: sqlite3.Connection, record: Record) -> int:
    """Remove what a record replaces and give how often that was retrieved."""
    rows = connection.execute(
        "SELECT revision, retrieved FROM records WHERE id = ? OR image_digest = ?",
        (record.id, record.image_digest),
    ).fetchall()
    delete_revisions(connection, [revision for revision, _ in rows])
    return max((retrieved for _, retrieved in rows), default=0)
