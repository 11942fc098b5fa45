"""Rows of a memory: what is known of a case, and its vectors as stored."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.cases import Case, Widths
from meiqa.memory.database import damage_named, sqlite_errors
from meiqa.memory.encoding import (
    EncodedTokens,
    decode_keys,
    dequantise_tokens,
    encode_key,
    quantise_tokens,
)
from meiqa.types import Origin

__all__ = [
    "Entry",
    "Features",
    "Record",
    "case_of",
    "delete_revisions",
    "encode_case",
    "entry_digest",
    "insert_entry",
    "insert_record",
    "insert_thumbnail",
    "read_entry",
    "read_records",
    "read_thumbnail",
    "read_thumbnail_bytes",
]

_KEY_DTYPE, _TOKEN_DTYPE, _SCALE_DTYPE = "<f2", "|i1", "<f4"


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


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A stored case: its record and its vectors, and a JPEG if one is kept and was asked for."""

    record: Record
    features: Features
    thumbnail: bytes | None = None


_THUMBNAILS = """
CREATE TABLE IF NOT EXISTS thumbnails (
    revision INTEGER PRIMARY KEY REFERENCES records ON DELETE CASCADE,
    jpeg BLOB NOT NULL,
    sha256 BLOB NOT NULL
)
"""
_RECORD_COLUMNS = ", ".join(Record.__slots__)
_values = attrgetter(*Record.__slots__)
_FEATURE_COLUMNS = (
    "key_dtype, key, token_dtype, tokens, scale_dtype, scales, grid_rows, grid_columns, sha256"
)


def encode_case(
    case: Case,
    package_digest: str,
    provenance: str,
    created: float,
    thumbnail: bytes | None = None,
) -> Entry:
    """Give a case as it is stored."""
    record = Record(
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
    rows, columns = case.grid
    grid = int(rows), int(columns)
    features = Features(encode_key(case.key), quantise_tokens(case.tokens), grid)
    return Entry(record, features, thumbnail)


def case_of(entry: Entry) -> Case:
    """Give a stored case back."""
    record, features = entry.record, entry.features
    return Case(
        id=record.id,
        origin=record.origin,
        image_digest=record.image_digest,
        score=record.score,
        std=record.std,
        summary=record.summary,
        key=decode_keys(features.key[None])[0],
        tokens=dequantise_tokens(features.tokens),
        grid=features.grid,
    )


def insert_record(connection: sqlite3.Connection, record: Record) -> int:
    """Add a row and give its revision, which grows with every row and is never used again."""
    cursor = connection.execute(
        f"INSERT INTO records ({_RECORD_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)", _values(record)
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def insert_thumbnail(connection: sqlite3.Connection, revision: int, thumbnail: bytes) -> None:
    """Add the thumbnail of a row; only a database that keeps any has a table for them."""
    connection.execute(_THUMBNAILS)
    digest = hashlib.sha256(thumbnail).digest()
    connection.execute("INSERT INTO thumbnails VALUES (?, ?, ?)", (revision, thumbnail, digest))


def insert_entry(connection: sqlite3.Connection, entry: Entry) -> None:
    """Add a row with its vectors, a digest over the row and them, and its thumbnail if it has one.

    The digest leaves the thumbnail out, so that a case is the same with and without.
    """
    revision = insert_record(connection, entry.record)
    if entry.thumbnail is not None:
        insert_thumbnail(connection, revision, entry.thumbnail)
    connection.execute(
        f"INSERT INTO features (revision, {_FEATURE_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)",
        (revision, *_stored_features(entry.features), _row_sha256(entry)),
    )


def delete_revisions(connection: sqlite3.Connection, revisions: Iterable[int]) -> None:
    """Remove rows with their vectors."""
    connection.executemany(
        "DELETE FROM records WHERE revision = ?", [(revision,) for revision in revisions]
    )


def read_records(
    path: Path,
    connection: sqlite3.Connection,
    condition: str = "TRUE",
    values: tuple[Any, ...] = (),
) -> Iterator[tuple[int, Record]]:
    """Read rows that fulfil an SQL condition, each with its revision, in that order.

    Raises:
        StoreCorrupted: a row is not what was written.
    """
    with sqlite_errors(path), damage_named(path):
        query = f"SELECT revision, {_RECORD_COLUMNS} FROM records WHERE {condition}"
        for revision, *row in connection.execute(f"{query} ORDER BY revision", values):
            yield revision, _record_from_row(tuple(row))


def read_entry(path: Path, connection: sqlite3.Connection, revision: int, widths: Widths) -> Entry:
    """Read one row with its vectors and its thumbnail.

    Raises:
        StoreCorrupted: the row, its vectors or its thumbnail are not what was written.
    """
    with sqlite_errors(path), damage_named(path):
        row = connection.execute(
            f"SELECT {_RECORD_COLUMNS}, {_FEATURE_COLUMNS}"
            " FROM records JOIN features USING (revision) WHERE revision = ?",
            (revision,),
        ).fetchone()
        if row is None:
            raise ValueError(f"revision {revision} has no vectors")
        described = len(Record.__slots__)
        record = _record_from_row(row[:described])
        features = _features_from_row(row[described:-1], widths)
        entry = Entry(record, features, read_thumbnail(path, connection, revision))
        if _row_sha256(entry) != row[-1]:
            raise ValueError(f"case {record.id!r} was altered")
        return entry


def _keeps_thumbnails(connection: sqlite3.Connection) -> bool:
    """Tell whether a database keeps any thumbnail."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'thumbnails'"
    return connection.execute(query).fetchone() is not None


def read_thumbnail(path: Path, connection: sqlite3.Connection, revision: int) -> bytes | None:
    """Read the thumbnail of a row; None if none is kept.

    Raises:
        StoreCorrupted: it is not what was written.
    """
    with sqlite_errors(path), damage_named(path):
        if not _keeps_thumbnails(connection):
            return None
        row = connection.execute(
            "SELECT jpeg, sha256 FROM thumbnails WHERE revision = ?", (revision,)
        ).fetchone()
        if row is None:
            return None
        if hashlib.sha256(row[0]).digest() != row[1]:
            raise ValueError(f"the thumbnail of revision {revision} was altered")
        thumbnail: bytes = row[0]
        return thumbnail


def read_thumbnail_bytes(path: Path, connection: sqlite3.Connection) -> list[tuple[int, str, int]]:
    """Read the sizes of all thumbnails, each with its revision and id."""
    with sqlite_errors(path):
        if not _keeps_thumbnails(connection):
            return []
        return connection.execute(
            "SELECT revision, id, length(jpeg) FROM thumbnails JOIN records USING (revision)"
        ).fetchall()


def entry_digest(entry: Entry) -> bytes:
    """Digest all of a case but the moment it was stored; 32 bytes."""
    stored = _stored_features(entry.features)
    blobs = [value for value in stored if isinstance(value, bytes)]
    plain = [value for value in (*_values(entry.record)[:-1], *stored) if type(value) is not bytes]
    digest = hashlib.sha256(json.dumps([*plain, *(len(blob) for blob in blobs)]).encode())
    for blob in blobs:
        digest.update(blob)
    return digest.digest()


def _row_sha256(entry: Entry) -> bytes:
    created = json.dumps(entry.record.created).encode()
    return hashlib.sha256(entry_digest(entry) + created).digest()


def _stored_features(features: Features) -> tuple[str | bytes | int, ...]:
    return (
        _KEY_DTYPE,
        features.key.astype(_KEY_DTYPE, copy=False).tobytes(),
        _TOKEN_DTYPE,
        features.tokens.levels.tobytes(),
        _SCALE_DTYPE,
        features.tokens.scales.astype(_SCALE_DTYPE, copy=False).tobytes(),
        *features.grid,
    )


def _record_from_row(row: tuple[Any, ...]) -> Record:
    kinds = (str, str, str, float, float, str, str, str, float)
    if any(type(value) is not kind for value, kind in zip(row, kinds, strict=True)):
        raise TypeError(f"case {row[0]!r} has a value of the wrong type")
    return Record(*row)


def _features_from_row(stored: tuple[Any, ...], widths: Widths) -> Features:
    key_dtype, key, token_dtype, tokens, scale_dtype, scales, rows, columns = stored
    if (key_dtype, token_dtype, scale_dtype) != (_KEY_DTYPE, _TOKEN_DTYPE, _SCALE_DTYPE):
        raise ValueError(f"unknown dtypes {key_dtype}, {token_dtype}, {scale_dtype}")
    if type(rows) is not int or type(columns) is not int:
        raise TypeError(f"{rows!r} by {columns!r} is not a grid")
    levels = np.frombuffer(tokens, np.dtype(_TOKEN_DTYPE)).reshape(-1, widths.token)
    encoded = EncodedTokens(levels, np.frombuffer(scales, np.dtype(_SCALE_DTYPE)))
    stored_key = np.frombuffer(key, np.dtype(_KEY_DTYPE))
    if stored_key.shape != (widths.key,) or len(encoded.scales) != len(levels):
        raise ValueError("vectors of the wrong length")
    return Features(stored_key, encoded, (rows, columns))
