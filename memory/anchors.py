"""The anchor memory: photos with human scores, written once, mapped read-only by everybody."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, StoreError, StoreNotFound, UsageError
from meiqa.memory.cases import Case, FloatArray, Widths, check_case
from meiqa.memory.encoding import (
    EncodedTokens,
    decode_keys,
    dequantise_tokens,
    encode_key,
    quantise_tokens,
)
from meiqa.memory.records import (
    Identity,
    Record,
    check_identity,
    connect,
    create_database,
    insert_record,
    read_identity,
    read_records,
    record_of,
    sqlite_errors,
    transaction,
)
from meiqa.memory.retrieval import KeyTable, ranks_of
from meiqa.memory.segment import Segment, disk_errors, file_sha256, sync_directory, write_segment

__all__ = ["AnchorMemory", "AnchorWriter"]

_SEGMENT_NAME = "anchors.seg"
_RECORDS_NAME = "anchors.sqlite3"
_SPOOL_NAME = "tokens.partial"
_REBUILD = "build the memory for this package with `python -m meiqa.training.build_memory`"


@dataclass(frozen=True, eq=False)
class AnchorMemory:
    """Anchors of one engine package; safe to share between threads.

    Attributes:
        widths: Widths of the keys and of the visual tokens.
        table: Unit keys, ids and digests, for searching.
        score_ranks: Rank of each anchor by score, ties by id (N,).
    """

    path: Path
    widths: Widths
    table: KeyTable
    score_ranks: NDArray[np.intp]
    _sorted_scores: NDArray[np.float64]
    _records: list[Record]
    _segment: Segment

    @classmethod
    def open(cls, path: Path, *, package_digest: str, verify: bool = True) -> AnchorMemory:
        """Map the anchors in a directory, which may be on a read-only file system.

        Args:
            path: The directory.
            package_digest: Digest of the engine package that will use them, hexadecimal.
            verify: Check the digest of every array and of the records.

        Raises:
            StoreNotFound: the directory holds no anchor memory.
            StoreCorrupted: a file is damaged, or the two files are not of one build.
            StoreMismatch: the anchors were encoded by another package or another meiqa.
        """
        if not (path / _SEGMENT_NAME).exists():
            raise StoreNotFound(f"there is no anchor memory in {path}", hint=_REBUILD)
        segment = Segment.open(path / _SEGMENT_NAME, verify)
        identity, records = _read_directory(path)
        check_identity(path, identity, Identity(package_digest, identity.widths), _REBUILD)
        _check_arrays(segment, identity.widths, len(records))
        if verify and segment.attributes.get("records_sha256") != file_sha256(path / _RECORDS_NAME):
            raise StoreCorrupted(f"{path / _RECORDS_NAME} was altered", hint=_REBUILD)
        return cls._assemble(path, identity.widths, segment, records)

    @classmethod
    def _assemble(
        cls, path: Path, widths: Widths, segment: Segment, records: list[Record]
    ) -> AnchorMemory:
        ids = [record.id for record in records]
        table = KeyTable.build(
            decode_keys(segment.arrays["keys"]), ids, [record.image_digest for record in records]
        )
        scores = np.array([record.score for record in records], np.float64)
        by_score = np.lexsort((table.id_ranks, scores))
        return cls(path, widths, table, ranks_of(by_score), scores[by_score], records, segment)

    def __len__(self) -> int:
        return len(self._records)

    def case(self, row: int) -> Case:
        """Give the anchor in a row of the table."""
        record, arrays = self._records[row], self._segment.arrays
        own = slice(int(arrays["offsets"][row]), int(arrays["offsets"][row + 1]))
        encoded = EncodedTokens(arrays["levels"][own], arrays["scales"][own])
        rows, columns = arrays["grids"][row].tolist()
        return Case(
            id=record.id,
            origin="anchor",
            image_digest=record.image_digest,
            score=record.score,
            std=record.std,
            summary=record.summary,
            key=self.table.keys[row],
            tokens=dequantise_tokens(encoded),
            grid=(rows, columns),
        )

    def percentile(self, score: float) -> float:
        """Give the share of anchors that score below, 0–100; NaN when there are no anchors."""
        if not len(self):
            return float("nan")
        return 100.0 * float(np.searchsorted(self._sorted_scores, score, "left")) / len(self)


class AnchorWriter:
    """Writes an anchor memory; its directory appears whole, or not at all.

    Args:
        path: The directory to be; it must not exist, or be empty.
        package_digest: Digest of the engine package that encoded the anchors, hexadecimal.
        key_width: D_key.
        token_width: D of the visual tokens.

    Raises:
        StoreError: the directory is taken or cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "memory"
    >>> with AnchorWriter(path, "ab12", key_width=2, token_width=3) as writer:
    ...     writer.add(Case("a", "anchor", "d1", 3.2, 0.1, "sharp",
    ...                     np.ones(2, np.float32), np.ones((4, 3), np.float32), (2, 2)))
    ...     writer.finish()
    >>> len(AnchorMemory.open(path, package_digest="ab12"))
    1
    """

    def __init__(
        self, path: str | Path, package_digest: str, key_width: int, token_width: int
    ) -> None:
        self._path = Path(path)
        self._identity = Identity(package_digest, Widths(key_width, token_width))
        self._partial = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.partial")
        self._records: dict[str, Record] = {}
        self._keys: list[NDArray[np.float16]] = []
        self._scales: list[FloatArray] = []
        self._grids: list[tuple[int, int]] = []
        _refuse_taken(self._path)
        with disk_errors(self._path):
            self._partial.mkdir(parents=True)
            # Tokens are spooled to the disk: those of a large model do not fit in memory.
            self._spool = (self._partial / _SPOOL_NAME).open("wb")

    def __enter__(self) -> AnchorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()

    def add(self, case: Case, *, provenance: str = "") -> None:
        """Add one anchor; `provenance` says where its score comes from.

        Raises:
            UsageError: the case cannot be stored, or its id is taken.
            StoreError: the disk is full.
        """
        check_case(case, "anchor", self._identity.widths)
        if case.id in self._records:
            raise UsageError("two anchors have one id", seen=case.id)
        encoded = quantise_tokens(case.tokens)
        with disk_errors(self._path):
            self._spool.write(encoded.levels.tobytes())
        self._scales.append(encoded.scales)
        self._keys.append(encode_key(case.key))
        self._grids.append(case.grid)
        self._records[case.id] = record_of(
            case, self._identity.package_digest, provenance, time.time()
        )

    def finish(self) -> None:
        """Make the memory durable and give it its name.

        Raises:
            StoreError: the disk is full, or the directory has been taken meanwhile.
        """
        _refuse_taken(self._path)
        with disk_errors(self._path):
            self._spool.close()
            self._write_records()
            attributes = {"records_sha256": file_sha256(self._partial / _RECORDS_NAME)}
            write_segment(self._partial / _SEGMENT_NAME, self._arrays(), attributes)
            (self._partial / _SPOOL_NAME).unlink()
            sync_directory(self._partial)
            os.rename(self._partial, self._path)
            sync_directory(self._path.parent)

    def discard(self) -> None:
        """Remove what an unfinished writer has written."""
        self._spool.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _write_records(self) -> None:
        path = self._partial / _RECORDS_NAME
        create_database(path, self._identity)
        with sqlite_errors(path):
            connection = connect(path, "rw")
            try:
                with transaction(connection, "IMMEDIATE"):
                    for record in self._records.values():
                        insert_record(connection, record)
                # A write-ahead log cannot be read where its files cannot be created.
                connection.execute("PRAGMA journal_mode = DELETE")
            finally:
                connection.close()

    def _arrays(self) -> dict[str, NDArray[Any]]:
        widths, counts = self._identity.widths, [len(scales) for scales in self._scales]
        levels: NDArray[np.int8] = np.empty((0, widths.token), np.int8)
        if sum(counts):
            spool = self._partial / _SPOOL_NAME
            levels = np.memmap(spool, np.int8, "r", shape=(sum(counts), widths.token))
        return {
            "keys": np.array(self._keys, np.float16).reshape(-1, widths.key),
            "levels": levels,
            "scales": np.concatenate([np.empty(0, np.float32), *self._scales]),
            "offsets": np.cumsum([0, *counts], dtype=np.int64),
            "grids": np.array(self._grids, np.int32).reshape(-1, 2),
        }


def _refuse_taken(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise StoreError(
            f"{path} already exists", hint="remove it first, or choose another directory"
        )


def _read_directory(path: Path) -> tuple[Identity, list[Record]]:
    records_path = path / _RECORDS_NAME
    connection = connect(records_path, "immutable")
    try:
        return read_identity(records_path, connection), read_records(records_path, connection)
    finally:
        connection.close()


def _check_arrays(segment: Segment, widths: Widths, count: int) -> None:
    """Refuse arrays that do not fit each other or the records.

    Raises:
        StoreCorrupted: a shape, a dtype or an offset is wrong.
    """
    tokens = segment.arrays["levels"].size // widths.token if "levels" in segment.arrays else 0
    wanted = {
        "keys": (np.float16, (count, widths.key)),
        "levels": (np.int8, (tokens, widths.token)),
        "scales": (np.float32, (tokens,)),
        "offsets": (np.int64, (count + 1,)),
        "grids": (np.int32, (count, 2)),
    }
    for name, (dtype, shape) in wanted.items():
        array = segment.arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            raise StoreCorrupted(f"{segment.path} has no fitting array {name!r}", hint=_REBUILD)
    offsets = segment.arrays["offsets"]
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        raise StoreCorrupted(f"{segment.path} has offsets out of order", hint=_REBUILD)
