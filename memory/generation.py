"""One generation of stored cases: a segment of vectors and a database of records, never changed.

Rows are in the order of the cases' ids, so that a smaller row is a smaller id. Opening reads the
header of the segment and one table of the database; everything else is read where it is used, and
every case is checked against its digest when it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, StoreMismatch, StoreNotFound
from meiqa.memory.cases import Widths
from meiqa.memory.database import (
    REBUILD,
    Identity,
    connect,
    damage_named,
    key_kind_of,
    read_identity,
    sqlite_errors,
)
from meiqa.memory.disk import file_sha256
from meiqa.memory.encoding import EncodedTokens
from meiqa.memory.records import (
    Entry,
    Features,
    Record,
    entry_digest,
    read_records,
    read_thumbnail,
    read_thumbnail_bytes,
)
from meiqa.memory.regression import Regression
from meiqa.memory.search import FlatTable, IndexedTable, Table
from meiqa.memory.segment import Segment, file_identity
from meiqa.memory.segment_layout import Array
from meiqa.types import Origin

__all__ = [
    "FORMAT",
    "Generation",
    "image_hash",
    "left_over",
    "records_name",
    "segment_path",
]

FORMAT = 2
DIGEST_BYTES = 8
REGRESSION = "regression"


def _stem(origin: Origin) -> str:
    """Give what the names of an origin's files begin with."""
    return {"anchor": "anchors", "contrast": "contrast"}[origin]


def segment_path(directory: Path, origin: Origin) -> Path:
    """Give the segment of an origin's current generation."""
    return directory / f"{_stem(origin)}.seg"


def holds_anchors(path: str | Path) -> bool:
    """Tell whether a directory has anchors of its own; one that may not be searched has none."""
    # Unlike Path.exists, this does not raise there.
    return os.path.exists(segment_path(Path(path), "anchor"))


def package_digest_of(path: str | Path) -> str:
    """Give the digest of the package that encoded a memory's anchors.

    Raises:
        StoreNotFound: there are no anchors.
        StoreCorrupted: the segment is damaged.
    """
    segment = Segment.open(segment_path(Path(path), "anchor"), verify=False)
    with damage_named(segment.path):
        return _described(segment, "anchor")[1].package_digest


def records_name(origin: Origin, number: int) -> str:
    """Name the database of records of one generation."""
    # contrast.sqlite3 was another format's.
    if origin == "anchor" and number == 1:
        return "anchors.sqlite3"
    return f"{_stem(origin)}-{number}.sqlite3"


def left_over(directory: Path, origin: Origin, kept: str | None) -> list[Path]:
    """Find the files of killed writers: unfinished ones, and records of no generation.

    Args:
        directory: The memory.
        origin: Whose files.
        kept: Name of the current generation's records.
    """
    unfinished = rf"\.{_stem(origin)}.*\.partial(-journal|-wal|-shm)?"
    records = rf"{_records_pattern(origin)}(-journal|-wal|-shm)?"
    return [
        file
        for file in sorted(directory.iterdir())
        if re.fullmatch(unfinished, file.name)
        or (re.fullmatch(records, file.name) and file.name != kept)
    ]


def _records_pattern(origin: Origin) -> str:
    return rf"{_stem(origin)}(-\d+)?\.sqlite3"


def image_hash(image_digest: str) -> int:
    """Shorten an image digest to a signed 64-bit integer."""
    return int.from_bytes(hashlib.sha256(image_digest.encode()).digest()[:8], "little", signed=True)


@dataclass(frozen=True, eq=False)
class Generation:
    """The stored cases of one origin; safe to share between threads.

    Attributes:
        origin: Of all its cases.
        number: 1 as built; each compaction adds one.
        identity: Package, widths and kind of key that the cases were encoded with.
        segment: The vectors, mapped.
        records_path: The database of records.
    """

    origin: Origin
    number: int
    identity: Identity
    segment: Segment
    records_path: Path
    _connection: Any = field(repr=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _located: dict[str, tuple[int, bool]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, directory: Path, origin: Origin, *, verify: bool = False) -> Generation:
        """Map the current generation of a directory, which may be on a read-only file system.

        Args:
            directory: The memory.
            origin: Which of its cases.
            verify: Check every byte; otherwise a case is checked when it is read.

        Raises:
            StoreNotFound: the directory holds no such cases.
            StoreCorrupted: a file is damaged, or the two files are not of one build.
            StoreMismatch: they were written by another meiqa.
        """
        path = segment_path(directory, origin)
        while True:
            segment = Segment.open(path, verify)
            try:
                return cls._of_segment(segment, origin, verify)
            except StoreNotFound as error:
                # A compaction may have put the next generation in its place meanwhile.
                if file_identity(os.stat(path)) == segment.file:
                    raise StoreCorrupted(error.what, hint=REBUILD) from error

    @classmethod
    def _of_segment(cls, segment: Segment, origin: Origin, verify: bool) -> Generation:
        if segment.attributes.get("format") != FORMAT:
            raise StoreMismatch(
                f"{segment.path} was written by another meiqa",
                seen=f"format {segment.attributes.get('format', 1)}",
                allowed=FORMAT,
                hint=REBUILD,
            )
        with damage_named(segment.path):
            number, identity, records_path = _described(segment, origin)
            _check_arrays(segment, identity.widths, _natural(segment.attributes["count"]))
        if verify and _sha256_of(records_path) != segment.attributes.get("records_sha256"):
            raise StoreCorrupted(f"{records_path} was altered", hint=REBUILD)
        connection = connect(records_path, "immutable", check=verify)
        try:
            found, labels = read_identity(records_path, connection)
            if found != identity or labels.get("build") != segment.attributes.get("build"):
                raise StoreCorrupted(f"{records_path} is of another build", hint=REBUILD)
        except BaseException:
            connection.close()
            raise
        generation = cls(origin, number, identity, segment, records_path, connection)
        weakref.finalize(generation, connection.close)
        if generation.is_indexed:
            generation.table  # noqa: B018 - an index that does not fit is refused now
        return generation

    def __len__(self) -> int:
        return len(self.segment.arrays["keys"])

    @cached_property
    def table(self) -> Table:
        """What a search walks: the mapped index, or all keys in memory where they are few."""
        keys, index = self.segment.arrays["keys"], self._index_arrays
        return IndexedTable.of(index, keys) if index else FlatTable.of(keys)

    @property
    def is_indexed(self) -> bool:
        """Whether it is searched by an index."""
        return bool(self._index_arrays)

    @property
    def _index_arrays(self) -> dict[str, Array]:
        return {
            name: array for name, array in self.segment.arrays.items() if name.startswith("index_")
        }

    def entry(self, row: int) -> Entry:
        """Read the case in a row.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        arrays = self.segment.arrays
        begin, end = (int(arrays["offsets"][row + each]) for each in (0, 1))
        if not 0 <= begin <= end <= len(arrays["scales"]):
            raise StoreCorrupted(f"{self.segment.path} has offsets out of order", hint=REBUILD)
        tokens = EncodedTokens(arrays["levels"][begin:end], arrays["scales"][begin:end])
        rows, columns = arrays["grids"][row].tolist()
        entry = Entry(self.record(row), Features(arrays["keys"][row], tokens, (rows, columns)))
        if not self._checked[row]:
            if entry_digest(entry)[:DIGEST_BYTES] != arrays["digests"][row].tobytes():
                raise StoreCorrupted(
                    f"{self.segment.path} is damaged: case {entry.record.id!r} was altered",
                    hint=REBUILD,
                )
            self._checked[row] = True
        return entry

    @cached_property
    def _checked(self) -> NDArray[np.bool_]:
        """Rows that have been read and found whole, which they stay: the files never change."""
        return np.zeros(len(self), np.bool_)

    def thumbnail(self, row: int) -> bytes | None:
        """Read the thumbnail of a row; None if none is kept.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        with self._mutex:
            return read_thumbnail(self.records_path, self._connection, row + 1)

    def thumbnail_bytes(self) -> dict[tuple[int, str], int]:
        """Give the sizes of the thumbnails that are kept, by row and id."""
        with self._mutex:
            sizes = read_thumbnail_bytes(self.records_path, self._connection)
        return {(revision - 1, case_id): size for revision, case_id, size in sizes}

    def record(self, row: int) -> Record:
        """Read the record of a row.

        Raises:
            StoreCorrupted: there is none.
        """
        for _, record in self.records("revision = ?", (row + 1,)):
            return record
        raise StoreCorrupted(f"{self.records_path} has no record {row + 1}", hint=REBUILD)

    def records(
        self, condition: str = "TRUE", values: tuple[Any, ...] = ()
    ) -> Iterator[tuple[int, Record]]:
        """Read the rows and records that fulfil an SQL condition."""
        with self._mutex:
            found = list(read_records(self.records_path, self._connection, condition, values))
        for revision, record in found:
            if not 1 <= revision <= len(self):
                raise StoreCorrupted(f"{self.records_path} has a record too many", hint=REBUILD)
            yield revision - 1, record

    def locate(self, case_id: str) -> tuple[int, bool]:
        """Give how many ids are smaller, which is the row of this one, and whether it is there."""
        known = self._located.get(case_id)
        if known is None:
            with self._mutex, sqlite_errors(self.records_path):
                found = self._connection.execute(
                    "SELECT revision, id FROM records WHERE id >= ? ORDER BY id LIMIT 1", (case_id,)
                ).fetchone()
            known = (len(self), False) if found is None else (found[0] - 1, found[1] == case_id)
            self._located[case_id] = known
        return known

    def rows_of_image(self, image_digest: str) -> list[int]:
        """Give the rows of the cases that were made from an image."""
        hashes, rows = self.segment.arrays["image_hashes"], self.segment.arrays["image_rows"]
        wanted = np.int64(image_hash(image_digest))
        first, last = (int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
        return [
            row
            for row in rows[first:last].tolist()
            if 0 <= row < len(self) and self.record(row).image_digest == image_digest
        ]

    @cached_property
    def by_score(self) -> NDArray[np.int32]:
        """Rows by score, ties by id (N,).

        Raises:
            StoreCorrupted: they are not rows.
        """
        rows: NDArray[np.int32] = self.segment.arrays["by_score"]
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise StoreCorrupted(f"{self.segment.path} has scores of no rows", hint=REBUILD)
        return rows

    @cached_property
    def regression(self) -> Regression | None:
        """From visual tokens to scores; None where there were too few anchors to fit one.

        Raises:
            StoreCorrupted: it is not what was written.
        """
        arrays, attributes = self.segment.arrays, self.segment.attributes
        stored = {name: arrays[name] for name in (REGRESSION,) if name in arrays}
        if regression_sha256(stored) != attributes.get("regression_sha256"):
            raise StoreCorrupted(f"the regression in {self.segment.path} was altered", hint=REBUILD)
        return Regression.of_array(stored[REGRESSION]) if stored else None

    @property
    def sorted_scores(self) -> NDArray[np.float64]:
        """Scores in that order (N,)."""
        scores: NDArray[np.float64] = self.segment.arrays["sorted_scores"]
        return scores


def regression_sha256(arrays: Mapping[str, Array]) -> str | None:
    """Give the digest of the regression among some arrays; None where there is none."""
    stored = arrays.get(REGRESSION)
    return None if stored is None else hashlib.sha256(stored.tobytes()).hexdigest()


def _sha256_of(path: Path) -> str:
    """Give the SHA-256 of a file that may have been removed meanwhile.

    Raises:
        StoreNotFound: it has been.
    """
    try:
        return file_sha256(path)
    except FileNotFoundError as error:
        raise StoreNotFound(f"there is no memory database {path}") from error


def _described(segment: Segment, origin: Origin) -> tuple[int, Identity, Path]:
    """Read number, identity and the place of the records from a segment's attributes."""
    attributes: Mapping[str, Any] = segment.attributes
    if attributes["origin"] != origin:
        raise ValueError(f"it holds cases of origin {attributes['origin']!r}")
    number = _natural(attributes["generation"])
    if not re.fullmatch(_records_pattern(origin), attributes["records"]):
        raise ValueError(f"{attributes['records']!r} cannot be its database")
    widths = Widths(_natural(attributes["key_width"]), _natural(attributes["token_width"]))
    kind = key_kind_of(attributes.get("key_kind", "summary"))
    identity = Identity(str(attributes["package_digest"]), widths, kind)
    return number, identity, segment.path.with_name(attributes["records"])


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _check_arrays(segment: Segment, widths: Widths, count: int) -> None:
    """Refuse arrays that do not fit each other.

    Raises:
        StoreCorrupted: one is missing, or has another dtype or shape.
    """
    tokens = segment.arrays["scales"].size if "scales" in segment.arrays else 0
    wanted = {
        "keys": (np.float16, (count, widths.key)),
        "levels": (np.int8, (tokens, widths.token)),
        "scales": (np.float32, (tokens,)),
        "offsets": (np.int64, (count + 1,)),
        "grids": (np.int32, (count, 2)),
        "digests": (np.uint8, (count, DIGEST_BYTES)),
        "sorted_scores": (np.float64, (count,)),
        "by_score": (np.int32, (count,)),
        "image_hashes": (np.int64, (count,)),
        "image_rows": (np.int32, (count,)),
    }
    if REGRESSION in segment.arrays:
        wanted[REGRESSION] = (np.float64, (2 * widths.token + 2,))
    for name, (dtype, shape) in wanted.items():
        array = segment.arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            raise StoreCorrupted(f"{segment.path} has no fitting array {name!r}", hint=REBUILD)
