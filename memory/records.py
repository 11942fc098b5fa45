"""The SQLite side of a memory: one row for each case, plus its vectors where there is no segment.

An anchor memory is written once and read with `immutable=1`, so that it can lie on a read-only file
system. A contrast store uses a write-ahead log with synchronous=FULL: a committed case survives a
killed process and a power cut. The write-ahead log needs a local file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import (
    MeiqaError,
    StoreCorrupted,
    StoreError,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
    StoreUnwritable,
)
from meiqa.memory.cases import Case, Widths
from meiqa.memory.encoding import EncodedTokens
from meiqa.memory.segment import disk_errors, sync_directory
from meiqa.types import Origin

__all__ = [
    "Features",
    "Identity",
    "Record",
    "check_identity",
    "connect",
    "create_database",
    "delete_revisions",
    "insert_features",
    "insert_record",
    "read_features",
    "read_identity",
    "read_records",
    "record_of",
    "sqlite_errors",
    "transaction",
]

_APPLICATION_ID = 0x4D454951  # "MEIQ"
_SCHEMA_VERSION = 1
_KEY_DTYPE, _TOKEN_DTYPE, _SCALE_DTYPE = "<f2", "|i1", "<f4"

_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE store (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    image_digest TEXT NOT NULL,
    summary TEXT NOT NULL,
    score REAL NOT NULL,
    std REAL NOT NULL,
    origin TEXT NOT NULL CHECK (origin IN ('anchor', 'contrast')),
    package_digest TEXT NOT NULL,
    provenance TEXT NOT NULL,
    created REAL NOT NULL,
    retrieved INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX records_by_image ON records (image_digest);
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
"""


@dataclass(frozen=True)
class Identity:
    """What a database was written for."""

    package_digest: str
    widths: Widths


@dataclass(frozen=True, slots=True)
class Record:
    """One case without its vectors; `created` is in seconds since 1970, UTC."""

    id: str
    image_digest: str
    summary: str
    score: float
    std: float
    origin: Origin
    package_digest: str
    provenance: str
    created: float


@dataclass(frozen=True, eq=False, slots=True)
class Features:
    """The vectors of one case as stored: float16 unit key (D_key,), int8 tokens (T, D), grid."""

    key: NDArray[np.float16]
    tokens: EncodedTokens
    grid: tuple[int, int]


_RECORD_COLUMNS = ", ".join(Record.__slots__)


def record_of(case: Case, package_digest: str, provenance: str, created: float) -> Record:
    """Describe a case as a row."""
    return Record(
        case.id,
        case.image_digest,
        case.summary,
        float(case.score),
        float(case.std),
        case.origin,
        package_digest,
        provenance,
        created,
    )


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, naming the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise _store_error(path, error) from error


def _store_error(path: Path, error: sqlite3.Error) -> MeiqaError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLocked(f"{path} is in use", seen=error, hint="try again")
    hint = "check its directory and disk"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
        return StoreUnwritable(f"cannot write {path}", seen=error, hint=hint)
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError(f"cannot use {path}", seen=error, hint=hint)
    return _corrupted(path, error)


def _corrupted(path: Path, what: object) -> StoreCorrupted:
    return StoreCorrupted(
        f"{path} is damaged: {what}", hint=f"restore {path.parent} from a copy or remove it"
    )


def create_database(path: Path, identity: Identity) -> None:
    """Create an empty database so that its name appears only when it is whole and on the disk.

    Raises:
        StoreUnwritable: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    with sqlite_errors(temporary):
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
            connection.executemany(
                "INSERT INTO store VALUES (?, ?)", _identity_values(identity).items()
            )
        finally:
            connection.close()
    with disk_errors(path):
        os.replace(temporary, path)
        sync_directory(path.parent)


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open a database, checked from end to end.

    Args:
        path: The file.
        mode: "rw" to write; "r" to follow a database that others write; "immutable" for one that
            nobody writes, which leaves no file beside it.

    Raises:
        StoreNotFound: there is no such file.
        StoreCorrupted: the file is not a memory's database, or it is damaged.
        StoreMismatch: it has a schema version that this meiqa does not read.
    """
    if not path.exists():
        raise StoreNotFound(f"there is no memory database {path}")
    with sqlite_errors(path), _rows_trusted(path):
        connection = _open_connection(path, mode)
        try:
            if mode == "rw":
                _make_durable(connection)
            _check_database(path, connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _open_connection(path: Path, mode: str) -> sqlite3.Connection:
    if mode == "r" and _must_be_immutable(path):
        mode = "immutable"
    options = {"rw": "mode=rw", "r": "mode=ro", "immutable": "mode=ro&immutable=1"}[mode]
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


def _check_database(path: Path, connection: sqlite3.Connection) -> None:
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise _corrupted(path, problem)
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise _corrupted(path, "it is not a memory's database")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _SCHEMA_VERSION:
        raise StoreMismatch(
            f"{path} has another schema",
            seen=f"version {version}",
            allowed=f"version {_SCHEMA_VERSION}",
            hint="use the meiqa that wrote it or build the memory again",
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
    }


def read_identity(path: Path, connection: sqlite3.Connection) -> Identity:
    """Read what a database was written for.

    Raises:
        StoreCorrupted: the database does not say.
    """
    with sqlite_errors(path), _rows_trusted(path):
        values = dict(connection.execute("SELECT name, value FROM store").fetchall())
        widths = Widths(int(values["key_width"]), int(values["token_width"]))
        return Identity(str(values["package_digest"]), widths)


def check_identity(path: Path, found: Identity, wanted: Identity, hint: str) -> None:
    """Refuse a database that was written for another package.

    Raises:
        StoreMismatch: the digests or the widths differ.
    """
    found_values, wanted_values = _identity_values(found), _identity_values(wanted)
    for name, value in wanted_values.items():
        if found_values[name] != value:
            raise StoreMismatch(
                f"{path} was written for another engine package",
                seen=f"{name} {found_values[name]}",
                allowed=value,
                hint=hint,
            )


def insert_record(connection: sqlite3.Connection, record: Record, retrieved: int = 0) -> int:
    """Add a row and give its revision, which grows with every row and is never used again."""
    cursor = connection.execute(
        f"INSERT INTO records ({_RECORD_COLUMNS}, retrieved) VALUES (?,?,?,?,?,?,?,?,?,?)",
        (*astuple(record), retrieved),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def insert_features(
    connection: sqlite3.Connection, revision: int, record: Record, features: Features
) -> None:
    """Add the vectors of a row, with a digest over the row and them."""
    stored = (
        _KEY_DTYPE,
        features.key.astype(_KEY_DTYPE).tobytes(),
        _TOKEN_DTYPE,
        features.tokens.levels.tobytes(),
        _SCALE_DTYPE,
        features.tokens.scales.astype(_SCALE_DTYPE).tobytes(),
        *features.grid,
    )
    connection.execute(
        "INSERT INTO features VALUES (?,?,?,?,?,?,?,?,?,?)",
        (revision, *stored, _row_sha256(astuple(record), stored)),
    )


def delete_revisions(connection: sqlite3.Connection, revisions: Iterable[int]) -> None:
    """Remove rows with their vectors."""
    connection.executemany(
        "DELETE FROM records WHERE revision = ?", [(revision,) for revision in revisions]
    )


def read_records(path: Path, connection: sqlite3.Connection) -> list[Record]:
    """Read all rows, in the order of their revisions.

    Raises:
        StoreCorrupted: a row is not what was written.
    """
    with sqlite_errors(path), _rows_trusted(path):
        rows = connection.execute(f"SELECT {_RECORD_COLUMNS} FROM records ORDER BY revision")
        return [_record_from_row(row) for row in rows]


def read_features(
    path: Path, connection: sqlite3.Connection, revision: int, widths: Widths
) -> tuple[Record, Features]:
    """Read one row with its vectors.

    Raises:
        StoreCorrupted: the row or its vectors are not what was written.
    """
    with sqlite_errors(path), _rows_trusted(path):
        row = connection.execute(
            f"SELECT {_RECORD_COLUMNS}, key_dtype, key, token_dtype, tokens, scale_dtype, scales,"
            " grid_rows, grid_columns, sha256"
            " FROM records JOIN features USING (revision) WHERE revision = ?",
            (revision,),
        ).fetchone()
        if row is None:
            raise ValueError(f"revision {revision} has no vectors")
        described = len(Record.__slots__)
        record, stored, sha256 = row[:described], row[described:-1], row[-1]
        if _row_sha256(record, stored) != sha256:
            raise ValueError(f"case {record[0]!r} was altered")
        return _record_from_row(record), _features_from_row(stored, widths)


@contextmanager
def _rows_trusted(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise _corrupted(path, error) from error


def _row_sha256(record: tuple[Any, ...], stored: tuple[Any, ...]) -> bytes:
    blobs = [value for value in stored if isinstance(value, bytes)]
    plain = [value for value in (*record, *stored) if not isinstance(value, bytes)]
    described = [*plain, *(len(blob) for blob in blobs)]
    digest = hashlib.sha256(json.dumps(described).encode())
    for blob in blobs:
        digest.update(blob)
    return digest.digest()


def _record_from_row(row: tuple[Any, ...]) -> Record:
    kinds = (str, str, str, float, float, str, str, str, float)
    if any(type(value) is not kind for value, kind in zip(row, kinds, strict=True)):
        raise TypeError(f"case {row[0]!r} has a value of the wrong type")
    return Record(*row)


def _features_from_row(stored: tuple[Any, ...], widths: Widths) -> Features:
    key_dtype, key, token_dtype, tokens, scale_dtype, scales, rows, columns = stored
    if (key_dtype, token_dtype, scale_dtype) != (_KEY_DTYPE, _TOKEN_DTYPE, _SCALE_DTYPE):
        raise ValueError(f"unknown dtypes {key_dtype}, {token_dtype}, {scale_dtype}")
    levels = np.frombuffer(tokens, np.dtype(_TOKEN_DTYPE)).reshape(-1, widths.token)
    encoded = EncodedTokens(levels, np.frombuffer(scales, np.dtype(_SCALE_DTYPE)))
    stored_key = np.frombuffer(key, np.dtype(_KEY_DTYPE))
    if stored_key.shape != (widths.key,) or len(encoded.scales) != len(levels):
        raise ValueError("vectors of the wrong length")
    return Features(stored_key, encoded, (rows, columns))
