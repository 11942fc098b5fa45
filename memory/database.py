"""The SQLite side of a memory: how its databases are created, opened, checked and written.

Databases that nobody writes any more are read with `immutable=1`, so that they can lie on a
read-only file system. The one that is written uses a write-ahead log with synchronous=FULL: what is
committed survives a killed process and a power cut. The log needs a local file system.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from meiqa.errors import (
    MeiqaError,
    StoreCorrupted,
    StoreError,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
    StoreUnwritable,
)
from meiqa.memory.cases import Widths
from meiqa.memory.disk import disk_errors, publish
from meiqa.types import KeyKind

__all__ = [
    "ONE_KIND",
    "REBUILD",
    "Identity",
    "check_identity",
    "connect",
    "create_database",
    "damage_named",
    "key_kind_of",
    "read_identity",
    "remove_database",
    "sqlite_errors",
    "transaction",
]

REBUILD = "build it again: meiqa memory build LABELS.csv --images DIR --package P --out MEMORY"
ONE_KIND = (
    "use another directory for what is learned, or anchors of its kind:"
    " meiqa memory rekey ANCHORS --key KIND --out NEW"
)

_APPLICATION_ID = 0x4D454951  # "MEIQ"
_SCHEMA_VERSION = 2
_KEY_KINDS: tuple[KeyKind, ...] = get_args(KeyKind)

_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE store (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    image_digest TEXT NOT NULL,
    summary TEXT NOT NULL,
    score REAL NOT NULL,
    std REAL NOT NULL,
    origin TEXT NOT NULL CHECK (origin IN ('anchor', 'contrast')),
    package_digest TEXT NOT NULL,
    provenance TEXT NOT NULL,
    created REAL NOT NULL,
    UNIQUE (id, origin)
);
CREATE TABLE features (
    revision INTEGER PRIMARY KEY REFERENCES records ON DELETE CASCADE,
    key_dtype TEXT NOT NULL,
    key BLOB NOT NULL,
    token_dtype TEXT NOT NULL,
    tokens BLOB NOT NULL,
    scale_dtype TEXT NOT NULL,
    scales BLOB NOT NULL,
    grid_rows INTEGER NOT NULL,
    grid_columns INTEGER NOT NULL,
    sha256 BLOB NOT NULL
);
CREATE TABLE hidden (
    stamp INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    origin TEXT NOT NULL,
    UNIQUE (id, origin)
);
CREATE TABLE uses (
    id TEXT PRIMARY KEY,
    retrieved INTEGER NOT NULL,
    last_retrieved REAL NOT NULL
) WITHOUT ROWID;
"""

_WRITE_FAILURES = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMOPEN,
)


@dataclass(frozen=True)
class Identity:
    """What a database was written for: the package, the widths of its vectors, the kind of key."""

    package_digest: str
    widths: Widths
    key_kind: KeyKind = "summary"


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, naming the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise _store_error(path, error) from error


def _store_error(path: Path, error: sqlite3.Error) -> MeiqaError:
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    code = extended & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLocked(f"{path} is in use", seen=error, hint="try again")
    hint = "check its directory and disk"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY) or extended in _WRITE_FAILURES:
        return StoreUnwritable(f"cannot write {path}", seen=error, hint=hint)
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError(f"cannot use {path}", seen=error, hint=hint)
    return _corrupted(path, error)


def _corrupted(path: Path, what: object) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} is damaged: {what}", hint=f"restore {path.parent} from a copy or remove it"
    )


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged file makes of its contents into StoreCorrupted, naming the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise _corrupted(path, error) from error


def create_database(
    path: Path, identity: Identity, labels: Mapping[str, str] | None = None
) -> None:
    """Create an empty database so that its name appears only when it is whole and on the disk.

    Args:
        path: The file; an older one is replaced.
        identity: What it is written for.
        labels: More that it says about itself.

    Raises:
        StoreUnwritable: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.partial")
    remove_database(unfinished)
    remove_database(path)
    with sqlite_errors(path):
        connection = sqlite3.connect(unfinished, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.executescript(f"BEGIN;{_SCHEMA}")
            connection.executemany(
                "INSERT INTO store VALUES (?, ?)",
                {**_identity_values(identity), **(labels or {})}.items(),
            )
            connection.execute("COMMIT")
        finally:
            connection.close()
    with disk_errors(path):
        publish(unfinished, path)


def remove_database(path: Path) -> None:
    """Remove a database with its logs, which would be taken for those of the next one so named.

    Raises:
        StoreUnwritable: a file cannot be removed.
    """
    with disk_errors(path):
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


def connect(path: Path, mode: str, *, check: bool = True) -> sqlite3.Connection:
    """Open a database.

    Args:
        path: The file.
        mode: "rw" to write; "r" to follow a database that others write; "immutable" for one that
            nobody writes, which leaves no file beside it; "alone" to fill one that nobody else
            knows of yet, which is not durable before the file is.
        check: Check it from end to end.

    Raises:
        StoreNotFound: there is no such file.
        StoreCorrupted: the file is not a memory's database, or it is damaged.
        StoreMismatch: it has a schema version that this meiqa does not read.
    """
    if not path.exists():
        raise StoreNotFound(f"there is no memory database {path}")
    with sqlite_errors(path), damage_named(path):
        connection = _open_connection(path, mode)
        try:
            if mode == "rw":
                _make_durable(connection)
            if mode == "alone":
                connection.execute("PRAGMA journal_mode = OFF")
                connection.execute("PRAGMA synchronous = OFF")
            if check:
                _check_pages(path, connection)
            _check_schema(path, connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _open_connection(path: Path, mode: str) -> sqlite3.Connection:
    if mode == "r" and _must_be_immutable(path):
        mode = "immutable"
    options = {
        "rw": "mode=rw",
        "alone": "mode=rw",
        "r": "mode=ro",
        "immutable": "mode=ro&immutable=1",
    }[mode]
    return sqlite3.connect(
        f"{path.resolve().as_uri()}?{options}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
    )


def _make_durable(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # a forgotten photo leaves no trace


def _must_be_immutable(path: Path) -> bool:
    """Tell whether a reader could not create the log's files and has none to follow."""
    return not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()


def _check_pages(path: Path, connection: sqlite3.Connection) -> None:
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise _corrupted(path, problem)


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise _corrupted(path, "it is not a memory's database")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _SCHEMA_VERSION:
        raise StoreMismatch(
            f"{path} has another schema",
            seen=f"version {version}",
            allowed=f"version {_SCHEMA_VERSION}",
            hint=f"use the meiqa that wrote it or {REBUILD}",
        )


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


def _identity_values(identity: Identity) -> dict[str, str]:
    return {
        "package_digest": identity.package_digest,
        "key_width": str(identity.widths.key),
        "token_width": str(identity.widths.token),
        "key_kind": identity.key_kind,
    }


def read_identity(path: Path, connection: sqlite3.Connection) -> tuple[Identity, dict[str, str]]:
    """Read what a database was written for, and its labels.

    Raises:
        StoreCorrupted: the database does not say.
    """
    with sqlite_errors(path), damage_named(path):
        values = dict(connection.execute("SELECT name, value FROM store").fetchall())
        widths = Widths(int(values.pop("key_width")), int(values.pop("token_width")))
        # Before there were other kinds, none was recorded.
        kind = key_kind_of(values.pop("key_kind", "summary"))
        return Identity(str(values.pop("package_digest")), widths, kind), values


def key_kind_of(value: object) -> KeyKind:
    """Give a recorded kind of key.

    Raises:
        ValueError: there is no such kind.
    """
    for kind in _KEY_KINDS:
        if value == kind:
            return kind
    raise ValueError(f"{value!r} is no kind of key")


def check_identity(
    path: Path, found: Identity, wanted: Identity, hint: str, kind_hint: str = ONE_KIND
) -> None:
    """Refuse a database that was written for another package, or with keys of another kind.

    Args:
        path: What is refused.
        found: What it was written for.
        wanted: What it should have been written for.
        hint: What to do where the package is another.
        kind_hint: What to do where only the kind of key is.

    Raises:
        StoreMismatch: the digests, the kinds of key or the widths differ.
    """
    found_values, wanted_values = _identity_values(found), _identity_values(wanted)
    if found.package_digest == wanted.package_digest and found.key_kind != wanted.key_kind:
        raise StoreMismatch(
            f"{path} has keys of another kind",
            seen=found.key_kind,
            allowed=wanted.key_kind,
            hint=kind_hint,
        )
    for name, value in wanted_values.items():
        if found_values[name] != value:
            raise StoreMismatch(
                f"{path} was written for another engine package",
                seen=f"{name} {found_values[name]}",
                allowed=value,
                hint=hint,
            )
