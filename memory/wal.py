"""The cases that no version holds yet: one database with a write-ahead log, and the right to write.

One process writes, many read. `AnchorWriter` stages its anchors in a database of the same tables.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from meiqa.errors import StoreLocked
from meiqa.memory import database
from meiqa.memory.cases import ORIGINS, VECTOR_DTYPES, Entry, Features, Record
from meiqa.memory.database import AMONG, Identity, Widths
from meiqa.memory.segment import disk_errors, sync
from meiqa.types import Origin

Mode = Literal["r", "rw"]
Uses = tuple[int, float]
"""How often a case was retrieved, and when last, in seconds since 1970."""

Image = tuple[Origin, str]
"""What two devices know a case by: its origin and the digest of its image."""

WAL_NAME = "cases.sqlite3"
LOCK_NAME = "cases.lock"

_FEATURE_COLUMNS = (
    "key_dtype, token_dtype, scale_dtype, key, tokens, scales, grid_rows, grid_columns, sha256"
)
_DESCRIBED = len(Record.__slots__)


class Mirrored(NamedTuple):
    """The hub that a memory is a replica of, and the sequence number up to which it has pulled."""

    hub: str
    pulled: int


class Waiting(NamedTuple):
    """Something that the hub is to be told: how an image's case is now, or that it was removed.

    Attributes:
        stamp: Grows with every change; names this one.
        origin, image: Whose case.
        base: Up to which sequence number the hub's removals of the image were known when this was
            done: what had been pulled, or the number that a removal of this device's was given.
        removal: A name of its own for each removal; None where a case was stored.
    """

    stamp: int
    origin: Origin
    image: str
    base: int
    removal: str | None


def insert_record(connection: sqlite3.Connection, entry: Entry) -> int:
    """Add a row, and its thumbnail if it has one; give its revision, which is never used again."""
    query = f"INSERT INTO records ({Record.COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)"
    revision = connection.execute(query, entry.record.values).lastrowid
    assert revision is not None
    if entry.thumbnail is not None:
        database.insert_thumbnail(connection, revision, entry.thumbnail)
    return revision


def insert_entry(connection: sqlite3.Connection, entry: Entry) -> None:
    """Add a row with its vectors and a digest over the row and them."""
    revision, features = insert_record(connection, entry), entry.features
    query = f"INSERT INTO features (revision, {_FEATURE_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)"
    stored = *VECTOR_DTYPES, *features.blobs, *features.grid
    connection.execute(query, (revision, *stored, _row_sha256(entry)))


def _row_sha256(entry: Entry) -> bytes:
    created = json.dumps(entry.record.created).encode()
    return hashlib.sha256(entry.digest + created).digest()


def read_entries(
    path: Path,
    connection: sqlite3.Connection,
    widths: Widths,
    revisions: Sequence[int] | None = None,
) -> Iterator[tuple[int, Entry]]:
    """Read some rows, or all, with their vectors and thumbnails, by id."""
    condition, values = ("TRUE", ()) if revisions is None else (AMONG, (json.dumps(revisions),))
    query = (
        f"SELECT revision, {Record.COLUMNS}, {_FEATURE_COLUMNS}"
        f" FROM records LEFT JOIN features USING (revision) WHERE {condition} ORDER BY id"
    )
    with database.reading(path):
        for revision, *row in connection.execute(query, values):
            if row[_DESCRIBED] is None:
                raise ValueError(f"revision {revision} has no vectors")
            record = Record.of(path, row[:_DESCRIBED])
            features = _features_of(row[_DESCRIBED:-1], widths)
            thumbnail = database.read_thumbnails(path, connection, [revision]).get(revision)
            entry = Entry(record, features, thumbnail)
            if _row_sha256(entry) != row[-1]:
                raise ValueError(f"case {record.id!r} was altered")
            yield revision, entry


def _features_of(stored: list[Any], widths: Widths) -> Features:
    *dtypes, key, tokens, scales, rows, columns = stored
    if dtypes != [*VECTOR_DTYPES]:
        raise ValueError(f"unknown dtypes {', '.join(map(str, dtypes))}")
    if type(rows) is not int or type(columns) is not int:
        raise TypeError(f"{rows!r} by {columns!r} is not a grid")
    stored_key, scales = np.frombuffer(key, dtypes[0]), np.frombuffer(scales, dtypes[2])
    levels = np.frombuffer(tokens, dtypes[1]).reshape(-1, widths.token)
    if stored_key.shape != (widths.key,) or len(scales) != len(levels):
        raise ValueError("vectors of the wrong length")
    return Features(stored_key, levels, scales, (rows, columns))


def _removal_of(origin: str, image: str) -> str:
    return f"removal of {origin} {image}"


class Wal:
    """Cases, tombstones of what versions hold, and how often contrast cases were retrieved.

    Encoded cases are kept in memory; a refresh reads only what was committed since the last one.
    In mode "r" an absent database is empty, and is noticed when it appears; in mode "rw" it is
    created. Not safe to share between threads.

    Attributes:
        path: The database.
        connection: To it, while it is open and there.
        seen: The commit up to which it was read, as SQLite's `data_version` counts; None for none.
        entries: The cases by revision, ascending, by origin.
        tombstones: Ids that count no longer, with the moment of each, by origin.
        mirrored: Which hub this is a replica of; None for none.
    """

    def __init__(self, directory: Path, mode: Mode, identity: Identity) -> None:
        self.path = directory / WAL_NAME
        self.connection: sqlite3.Connection | None = None
        self.seen: int | None = None
        self.entries: Mapping[Origin, Mapping[int, Entry]] = {origin: {} for origin in ORIGINS}
        self.tombstones: Mapping[Origin, Mapping[str, int]] = {origin: {} for origin in ORIGINS}
        self.mirrored: Mirrored | None = None
        self._mode = mode
        self._identity = identity
        if mode == "rw" and not self.path.exists():
            database.create_database(self.path, identity)
            with disk_errors(directory):
                sync(directory.parent)
        self._connect_if_there()

    def refresh(self) -> None:
        """Read what has been committed; StoreCorrupted if a case is not what was written."""
        self._connect_if_there()
        if self.connection is None:
            return
        with database.reading(self.path):
            # The version comes first: a commit between the two reads is read again, not lost.
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            if version != self.seen:
                with database.transaction(self.connection, "DEFERRED"):
                    self._read(self.connection)
                self.seen = version

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Do what is inside as one; when it ends, neither a kill nor a power cut undoes it."""
        mirrored = self.mirrored
        try:
            with database.sqlite_errors(self.path):
                with database.transaction(self._database, "IMMEDIATE"):
                    yield
                self.seen = None
        except BaseException:
            self.mirrored = mirrored
            raise

    def insert(self, entry: Entry) -> None:
        """Add a case, whose id must not be here."""
        insert_entry(self._database, entry)

    def delete(self, origin: Origin, ids: Iterable[str]) -> None:
        """Remove the cases that are here."""
        wanted, entries = set(ids), self.entries[origin]
        self._delete(rev for rev, each in entries.items() if each.record.id in wanted)

    def _delete(self, revisions: Iterable[int]) -> None:
        query = f"DELETE FROM records WHERE {AMONG}"
        self._database.execute(query, (json.dumps([*revisions]),))

    def bury(self, origin: Origin, ids: Iterable[str]) -> None:
        """Let cases of the version, or of one being written, count no longer."""
        query = "INSERT OR REPLACE INTO hidden (id, origin) VALUES (?, ?)"
        self._database.executemany(query, [(case_id, origin) for case_id in ids])

    def forget_merged(self, origin: Origin, revisions: Iterable[int], stamp: int) -> None:
        """Remove the cases that a version holds now, and the tombstones until `stamp`."""
        self._delete(revisions)
        query = "DELETE FROM hidden WHERE origin = ? AND stamp <= ?"
        self._database.execute(query, (origin, stamp))

    def mirror(self, hub: str, pulled: int) -> None:
        """Note which hub this is a replica of, and up to where it has been pulled."""
        said = {"hub": hub, "pulled": str(pulled)}.items()
        self._database.executemany("INSERT OR REPLACE INTO store VALUES (?, ?)", said)
        self._database.execute("DELETE FROM store WHERE name LIKE ?", (_removal_of("%", "%"),))
        self.mirrored = Mirrored(hub, pulled)

    def tell_hub(self, origin: Origin, images: Iterable[str], *, removed: bool = False) -> None:
        """Let the hub be told, with the next push, of cases stored or removed, if there is one."""
        if self.mirrored is None:
            return
        query = (
            "INSERT OR REPLACE INTO outbox (origin, image, base, removal) VALUES (?, ?, max(?,"
            " ifnull((SELECT CAST(value AS INTEGER) FROM store WHERE name = ?), 0)), ?)"
        )
        base = self.mirrored.pulled
        rows = [
            (origin, image, base, _removal_of(origin, image), uuid.uuid4().hex if removed else None)
            for image in images
        ]
        self._database.executemany(query, rows)

    def outbox(self) -> list[Waiting]:
        """Give what the hub is still to be told, the oldest first."""
        query = "SELECT stamp, origin, image, base, removal FROM outbox ORDER BY stamp"
        with database.sqlite_errors(self.path):
            return [Waiting(*row) for row in self._database.execute(query)]

    def told(self, waiting: Iterable[Waiting]) -> None:
        """Take out of the outbox what the hub knows now, unless it has changed since."""
        query = "DELETE FROM outbox WHERE stamp = ?"
        self._database.executemany(query, [(each.stamp,) for each in waiting])

    def know_removed(self, removals: Iterable[tuple[Waiting, int]]) -> None:
        """Note until the pull what numbers the hub gave to removals of this device's.

        A photo that is learned again, already or before the pull, is so with knowledge of them.
        """
        for each, seq in removals:
            update = "UPDATE outbox SET base = max(base, ?) WHERE origin = ? AND image = ?"
            self._database.execute(update, (seq, each.origin, each.image))
            said = _removal_of(each.origin, each.image), str(seq)
            self._database.execute("INSERT OR REPLACE INTO store VALUES (?, ?)", said)

    def uses(self) -> dict[str, Uses]:
        """Give how often contrast cases were retrieved, and when last, as far as it is written."""
        if self.connection is None:
            return {}
        with database.sqlite_errors(self.path):
            rows = self.connection.execute("SELECT id, retrieved, last_retrieved FROM uses")
            return {case_id: (retrieved, last) for case_id, retrieved, last in rows}

    def count_uses(self, counts: Mapping[str, int]) -> None:
        """Add retrievals to the counters."""
        now = time.time()
        self._database.executemany(
            "INSERT INTO uses VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
            " retrieved = retrieved + excluded.retrieved, last_retrieved = excluded.last_retrieved",
            [(case_id, count, now) for case_id, count in counts.items()],
        )

    def drop_uses(self, ids: Iterable[str], heir: str | None) -> None:
        """Remove the counters of cases; their sum, and the latest moment, go to an heir."""
        query = "DELETE FROM uses WHERE id IN (SELECT value FROM json_each(?)) RETURNING *"
        rows = self._database.execute(query, (json.dumps([*ids]),)).fetchall()
        if heir is not None and rows:
            uses = sum(row[1] for row in rows), max(row[2] for row in rows)
            self._database.execute("INSERT INTO uses VALUES (?, ?, ?)", (heir, *uses))

    def shrink(self) -> None:
        """Leave no trace of removed cases in the files, and give their room back."""
        with database.sqlite_errors(self.path):
            self._database.execute("PRAGMA incremental_vacuum").fetchall()
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Let go of the file."""
        connection, self.connection = self.connection, None
        if connection is not None:
            with database.sqlite_errors(self.path):
                connection.close()

    @property
    def _database(self) -> sqlite3.Connection:
        assert self.connection is not None
        return self.connection

    def _connect_if_there(self) -> None:
        # Unlike Path.exists, this takes a directory that may not be searched for an empty one.
        if self.connection is not None or not os.path.exists(self.path):
            return
        connection = database.connect(self.path, self._mode)
        try:
            found, _ = database.read_identity(self.path, connection)
            hint = "open it with the package that wrote it, or choose another directory"
            database.check_identity(self.path, found, self._identity, hint)
        except BaseException:
            connection.close()
            raise
        self.connection = connection

    def _read(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute("SELECT revision FROM records ORDER BY revision").fetchall()
        known = {rev: each for entries in self.entries.values() for rev, each in entries.items()}
        fresh = [revision for (revision,) in rows if revision not in known]
        known |= dict(read_entries(self.path, connection, self._identity.widths, fresh))
        here = {revision: known[revision] for (revision,) in rows}
        self.entries = {
            origin: {rev: each for rev, each in here.items() if each.record.origin == origin}
            for origin in ORIGINS
        }
        said = dict(connection.execute("SELECT name, value FROM store").fetchall())
        self.mirrored = Mirrored(said["hub"], int(said["pulled"])) if "hub" in said else None
        query = "SELECT id, stamp FROM hidden WHERE origin = ?"
        self.tombstones = {
            origin: dict(connection.execute(query, (origin,)).fetchall()) for origin in ORIGINS
        }


class WriterLock:
    """The right to write to a directory: an exclusive lock on a file with the pid of its owner.

    The kernel drops the lock when its owner ends, however it ends, so a stale lock cannot be.
    The file stays: removing it would let two processes lock two files of one name.
    """

    def __init__(self, path: Path) -> None:
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            self._close()
            what = f"{path.parent} is being written by process {holder or 'unknown'}"
            hint = "wait for it to end, or open the memory with mode 'r'"
            raise StoreLocked(what, hint=hint) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Let the next writer in."""
        _held.discard(self)
        self._close()


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _release_inherited() -> None:
    # A forked child shares the lock and would keep it alive after its owner has ended.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_inherited)
