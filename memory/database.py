"""The SQLite side of a memory: how its databases are created, opened, checked and named in errors.

Databases that nobody writes any more are read with `immutable=1`, so that they can lie on a
read-only file system. The one that is written uses a write-ahead log with synchronous=FULL: what is
committed survives a killed process and a power cut. The log needs a local file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from meiqa.errors import (
    MeiqaError,
    StoreCorrupted,
    StoreError,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
    StoreUnwritable,
    UsageError,
)
from meiqa.memory.segment import disk_errors, publish, sync
from meiqa.types import KeyKind

REBUILD = (
    "build one: meiqa memory build LABELS.csv --images DIR --package P --out MEMORY; for questions "
    "of your own an empty one does: meiqa memory create MEMORY --package P"
)
_ONE_KIND = (
    "use another directory for what is learned, or anchors of its kind:"
    " meiqa memory rekey ANCHORS --key KIND --out NEW"
)

_APPLICATION_ID = 0x4D454951  # "MEIQ"
_SCHEMA_VERSION = 3
_BEFORE_DEVICES = 2

_OUTBOX = """
CREATE TABLE outbox (
    stamp INTEGER PRIMARY KEY AUTOINCREMENT,
    origin TEXT NOT NULL, image TEXT NOT NULL,
    base INTEGER NOT NULL, removal TEXT,
    UNIQUE (origin, image)
);
"""

SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE store (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL, image_digest TEXT NOT NULL, summary TEXT NOT NULL,
    score REAL NOT NULL, std REAL NOT NULL,
    origin TEXT NOT NULL CHECK (origin IN ('anchor', 'contrast')),
    package_digest TEXT NOT NULL, provenance TEXT NOT NULL,
    device TEXT NOT NULL DEFAULT '', created REAL NOT NULL,
    UNIQUE (id, origin)
);
CREATE TABLE features (
    revision INTEGER PRIMARY KEY REFERENCES records ON DELETE CASCADE,
    key_dtype TEXT NOT NULL, key BLOB NOT NULL,
    token_dtype TEXT NOT NULL, tokens BLOB NOT NULL,
    scale_dtype TEXT NOT NULL, scales BLOB NOT NULL,
    grid_rows INTEGER NOT NULL, grid_columns INTEGER NOT NULL,
    sha256 BLOB NOT NULL
);
CREATE TABLE hidden (
    stamp INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL, origin TEXT NOT NULL,
    UNIQUE (id, origin)
);
CREATE TABLE uses (
    id TEXT PRIMARY KEY, retrieved INTEGER NOT NULL, last_retrieved REAL NOT NULL
) WITHOUT ROWID;
{_OUTBOX}
"""

_UPGRADE = f"""
BEGIN IMMEDIATE;
ALTER TABLE records ADD COLUMN device TEXT NOT NULL DEFAULT '';
{_OUTBOX}
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""
_AS_IF_UPGRADED = "CREATE TEMP VIEW records AS SELECT *, '' AS device FROM main.records"
"""What was written before there were devices, and may not be changed, is read through this."""

_THUMBNAILS = """
CREATE TABLE IF NOT EXISTS thumbnails (
    revision INTEGER PRIMARY KEY REFERENCES records ON DELETE CASCADE,
    jpeg BLOB NOT NULL,
    sha256 BLOB NOT NULL
)
"""
"""Only a database that keeps any has this table."""

AMONG = "revision IN (SELECT value FROM json_each(?))"
"""An SQL condition on rows: their revisions, as many as there are, are one JSON list."""

_WRITE_FAILURES = tuple(
    getattr(sqlite3, f"SQLITE_IOERR_{name}")
    for name in ("WRITE", "FSYNC", "DIR_FSYNC", "TRUNCATE", "SHMSIZE", "SHMOPEN")
)


@dataclass(frozen=True)
class Widths:
    """Widths of the vectors that one memory holds: (D_key,) keys and (T, D) tokens."""

    key: int
    token: int

    def __post_init__(self) -> None:
        if min(self.key, self.token) < 1:
            raise UsageError("the widths must be positive", seen=self, allowed=">= 1")


@dataclass(frozen=True)
class Identity:
    """What a part of a memory was written for: the package, the widths, the kind of key."""

    package_digest: str
    widths: Widths
    key_kind: KeyKind = "summary"

    @property
    def values(self) -> dict[str, str | int]:
        """As the files record it."""
        return {
            "package_digest": self.package_digest,
            "key_width": self.widths.key,
            "token_width": self.widths.token,
            "key_kind": self.key_kind,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Identity:
        """Read what was recorded; ValueError or KeyError if it makes no sense."""
        # Before there were other kinds, none was recorded.
        kind = values.get("key_kind", "summary")
        if kind not in get_args(KeyKind):
            raise ValueError(f"{kind!r} is no kind of key")
        widths = Widths(int(values["key_width"]), int(values["token_width"]))
        return cls(str(values["package_digest"]), widths, kind)


def store_error(path: Path, error: sqlite3.Error) -> MeiqaError:
    """Give the error of ours that an error of SQLite means."""
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    code = extended & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLocked(f"{path} is in use", seen=error, hint="try again")
    hint = "check its directory and disk"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY) or extended in _WRITE_FAILURES:
        return StoreUnwritable(f"cannot write {path}", seen=error, hint=hint)
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError(f"cannot use {path}", seen=error, hint=hint)
    return corrupted(path, error)


def corrupted(path: Path, what: object) -> StoreCorrupted:
    """Give the error for a file that is not what was written."""
    return StoreCorrupted(
        f"{path} is damaged: {what}", hint=f"restore {path.parent} from a copy or remove it"
    )


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, naming the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise store_error(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Also turn what a damaged file makes of its contents into StoreCorrupted."""
    with sqlite_errors(path):
        try:
            yield
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise corrupted(path, error) from error


def create_database(
    path: Path, identity: Identity, labels: Mapping[str, str] | None = None
) -> None:
    """Create or replace a database; its name appears only when it is whole and on the disk."""
    unfinished = path.with_name(f".{path.name}.partial")
    remove_database(unfinished)
    remove_database(path)
    with sqlite_errors(path):
        connection = sqlite3.connect(unfinished, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.executescript(f"BEGIN;{SCHEMA}")
            said = {name: str(value) for name, value in identity.values.items()}
            rows = (said | dict(labels or {})).items()
            connection.executemany("INSERT INTO store VALUES (?, ?)", rows)
            connection.execute("COMMIT")
        finally:
            connection.close()
    with disk_errors(path):
        publish(unfinished, path)


def remove_database(path: Path) -> None:
    """Remove a database with its logs, which would be taken for those of the next one so named."""
    with disk_errors(path):
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


def connect(path: Path, mode: str, *, check: bool = True) -> sqlite3.Connection:
    """Open a database, and check it from end to end if asked to.

    The mode is "rw" to write; "r" to follow a database that others write; "immutable" for one that
    nobody writes, which leaves no file beside it; "alone" is for `filling`.

    Raises:
        StoreNotFound: there is no such file, or no longer.
        StoreCorrupted: the file is not a memory's database, or it is damaged.
        StoreMismatch: it has a schema version that this meiqa does not read.
    """
    try:
        connection = _opened(path, mode)
    except sqlite3.Error as error:
        # A compaction removes records that a reader is about to open.
        if not path.exists():
            raise StoreNotFound(f"there is no memory database {path}") from error
        raise store_error(path, error) from error
    try:
        with reading(path):
            if mode == "rw":
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                # A forgotten photo leaves no trace.
                connection.execute("PRAGMA secure_delete = ON")
            if mode == "alone":
                connection.execute("PRAGMA journal_mode = OFF")
                connection.execute("PRAGMA synchronous = OFF")
            if _check(path, connection, whole=check) == _BEFORE_DEVICES:
                connection.executescript(_UPGRADE if mode == "rw" else _AS_IF_UPGRADED)
    except BaseException:
        connection.close()
        raise
    return connection


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    # A reader that could not create the log's files, and has none to follow.
    log = path.with_name(path.name + "-wal")
    if mode == "r" and not os.access(path.parent, os.W_OK) and not log.exists():
        mode = "immutable"
    options = {"r": "mode=ro", "immutable": "mode=ro&immutable=1"}.get(mode, "mode=rw")
    return sqlite3.connect(
        f"{path.resolve().as_uri()}?{options}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
    )


def _check(path: Path, connection: sqlite3.Connection, *, whole: bool) -> int:
    """Refuse what is no database of a memory, or not read here; give its schema version."""

    def value(pragma: str) -> Any:
        return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    if whole and (problem := value("quick_check(1)")) != "ok":
        raise corrupted(path, problem)
    if value("application_id") != _APPLICATION_ID:
        raise corrupted(path, "it is not a memory's database")
    version: int = value("user_version")
    if version not in (_BEFORE_DEVICES, _SCHEMA_VERSION):
        seen, allowed = f"version {version}", f"versions {_BEFORE_DEVICES}, {_SCHEMA_VERSION}"
        hint = f"use the meiqa that wrote it or {REBUILD}"
        raise StoreMismatch(f"{path} has another schema", seen=seen, allowed=allowed, hint=hint)
    return version


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    """Commit what is done inside as one, or nothing of it; `kind` is "DEFERRED" or "IMMEDIATE"."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def filling(path: Path) -> Iterator[sqlite3.Connection]:
    """Fill a database that nobody else knows of yet, as one; it is durable when this ends."""
    with (
        sqlite_errors(path),
        closing(connect(path, "alone", check=False)) as connection,
        transaction(connection, "IMMEDIATE"),
    ):
        yield connection
    with disk_errors(path):
        sync(path)


def read_identity(path: Path, connection: sqlite3.Connection) -> tuple[Identity, dict[str, str]]:
    """Read what a database was written for, and all that it says of itself."""
    with reading(path):
        values = dict(connection.execute("SELECT name, value FROM store").fetchall())
        return Identity.of(values), values


def check_identity(
    path: Path, found: Identity, wanted: Identity, hint: str, kind_hint: str = _ONE_KIND
) -> None:
    """Refuse with StoreMismatch what was written for another package, or another kind of key.

    `hint` says what to do where the package is another, `kind_hint` where only the kind of key is.
    """
    if found.package_digest == wanted.package_digest and found.key_kind != wanted.key_kind:
        what, kind = f"{path} has keys of another kind", found.key_kind
        raise StoreMismatch(what, seen=kind, allowed=wanted.key_kind, hint=kind_hint)
    for name, value in wanted.values.items():
        if (seen := found.values[name]) != value:
            what = f"{path} was written for another engine package"
            raise StoreMismatch(what, seen=f"{name} {seen}", allowed=value, hint=hint)


def insert_thumbnail(connection: sqlite3.Connection, revision: int, thumbnail: bytes) -> None:
    """Add the JPEG of a row."""
    connection.execute(_THUMBNAILS)
    digest = hashlib.sha256(thumbnail).digest()
    connection.execute("INSERT INTO thumbnails VALUES (?, ?, ?)", (revision, thumbnail, digest))


def read_thumbnails(
    path: Path, connection: sqlite3.Connection, revisions: Iterable[int]
) -> dict[int, bytes]:
    """Read the JPEGs that are kept of some rows; StoreCorrupted if one was altered."""
    found: dict[int, bytes] = {}
    with reading(path):
        if not keeps_thumbnails(connection):
            return found
        query = f"SELECT revision, jpeg, sha256 FROM thumbnails WHERE {AMONG}"
        for revision, jpeg, digest in connection.execute(query, (json.dumps([*revisions]),)):
            if hashlib.sha256(jpeg).digest() != digest:
                raise corrupted(path, f"the thumbnail of revision {revision} was altered")
            found[revision] = jpeg
    return found


def keeps_thumbnails(connection: sqlite3.Connection) -> bool:
    """Tell whether a database keeps any thumbnail."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'thumbnails'"
    return connection.execute(query).fetchone() is not None
