"""The files of a version: how they are named, opened, and written beside the current one.

Opening reads the header of the segment and one table of the database; everything else is read where
it is used. A new version takes the place of the current one at once, by the name of its segment.
"""

from __future__ import annotations

import os
import re
import sqlite3
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meiqa.errors import StoreCorrupted, StoreMismatch, StoreNotFound
from meiqa.memory import database
from meiqa.memory.cases import (
    DIGEST_BYTES,
    REGRESSION,
    Entry,
    Regression,
    Sample,
    Version,
    image_hash,
    regression_sha256,
)
from meiqa.memory.database import REBUILD, SCHEMA, Identity, Widths
from meiqa.memory.index import (
    FLAT_BELOW,
    INDEX_PREFIX,
    Building,
    FrozenIndex,
    can_be_built,
    index_arrays,
)
from meiqa.memory.segment import (
    Array,
    Segment,
    SegmentWriter,
    disk_errors,
    file_identity,
    file_sha256,
)
from meiqa.memory.wal import insert_record
from meiqa.types import Origin

AT_ONCE = Building()
_FORMAT = 2
_ATTRIBUTE_BYTES = 4096
_MOST_ARRAYS = 64
_STEMS: dict[Origin, str] = {"anchor": "anchors", "contrast": "contrast"}


def segment_path(directory: Path, origin: Origin) -> Path:
    """Give the segment of an origin's current version."""
    return directory / f"{_STEMS[origin]}.seg"


def _records_name(origin: Origin, number: int) -> str:
    # The first version of anchors has no number, for memories that were built before there were.
    first = origin == "anchor" and number == 1
    return f"{_STEMS[origin]}.sqlite3" if first else f"{_STEMS[origin]}-{number}.sqlite3"


def _records_pattern(origin: Origin) -> str:
    return rf"{_STEMS[origin]}(-\d+)?\.sqlite3"


def holds_anchors(path: str | Path) -> bool:
    """Tell whether a directory has anchors of its own; one that may not be searched has none."""
    # Unlike Path.exists, this does not raise there.
    return os.path.exists(segment_path(Path(path), "anchor"))


def lacks_index(version: Version) -> bool:
    """Tell whether a version was left without the index that would be built here."""
    return version.index is None and len(version) >= FLAT_BELOW and can_be_built()


def package_digest_of(path: str | Path) -> str:
    """Give the digest of the package that encoded a memory's anchors; StoreNotFound without any."""
    segment = Segment.open(segment_path(Path(path), "anchor"), verify=False)
    with database.reading(segment.path):
        return Identity.of(segment.attributes).package_digest


def left_over(directory: Path, origin: Origin, kept: str | None) -> list[Path]:
    """Find the files of killed writers: unfinished ones, and records other than those `kept`."""
    unfinished = rf"\.{_STEMS[origin]}.*\.partial(-journal|-wal|-shm)?"
    records = rf"{_records_pattern(origin)}(-journal|-wal|-shm)?"
    return [
        file
        for file in sorted(directory.iterdir())
        if re.fullmatch(unfinished, file.name)
        or (re.fullmatch(records, file.name) and file.name != kept)
    ]


def open_version(directory: Path, origin: Origin, *, verify: bool = False) -> Version:
    """Map the current version of a directory; each case is checked when it is read, or all now.

    Raises:
        StoreNotFound: the directory holds no such cases.
        StoreCorrupted: a file is damaged, or the two files are not of one build.
        StoreMismatch: they were written by another meiqa.
    """
    path = segment_path(directory, origin)
    while True:
        segment = Segment.open(path, verify)
        try:
            return _of_segment(segment, origin, verify)
        except StoreNotFound as error:
            # A compaction may have put the next version in its place meanwhile.
            if file_identity(os.stat(path)) == segment.file:
                raise StoreCorrupted(error.what, hint=REBUILD) from error


def no_version(directory: Path, origin: Origin, identity: Identity) -> Version:
    """Give the version before the first one, which has neither cases nor files."""
    arrays = _Columns(origin).arrays(identity.widths.key, AT_ONCE)
    arrays["levels"] = np.empty((0, identity.widths.token), np.int8)
    segment = Segment(segment_path(directory, origin), arrays, {}, (0, 0))
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.executescript(SCHEMA)
    records_path = directory / _records_name(origin, 0)
    return Version(origin, 0, identity, segment, records_path, None, connection)


def _of_segment(segment: Segment, origin: Origin, verify: bool) -> Version:
    arrays, attributes = segment.arrays, segment.attributes
    if attributes.get("format") != _FORMAT:
        what = f"{segment.path} was written by another meiqa"
        seen = f"format {attributes.get('format', 1)}"
        raise StoreMismatch(what, seen=seen, allowed=_FORMAT, hint=REBUILD)
    with database.reading(segment.path):
        identity = Identity.of(attributes)
        number, name = attributes["generation"], attributes["records"]
        if attributes["origin"] != origin:
            raise ValueError(f"it holds cases of origin {attributes['origin']!r}")
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no version")
        if not re.fullmatch(_records_pattern(origin), name):
            raise ValueError(f"{name!r} cannot be its database")
        _check_arrays(segment, identity.widths, attributes["count"])
    records_path = segment.path.with_name(name)
    if verify and file_sha256(records_path) != attributes.get("records_sha256"):
        raise StoreCorrupted(f"{records_path} was altered", hint=REBUILD)
    indexed = any(name.startswith(INDEX_PREFIX) for name in arrays)
    index = FrozenIndex.of(arrays, arrays["keys"]) if indexed else None
    connection = database.connect(records_path, "immutable", check=verify)
    try:
        found, labels = database.read_identity(records_path, connection)
        if found != identity or labels.get("build") != attributes.get("build"):
            raise StoreCorrupted(f"{records_path} is of another build", hint=REBUILD)
    except BaseException:
        connection.close()
        raise
    version = Version(origin, number, identity, segment, records_path, index, connection)
    weakref.finalize(version, connection.close)
    return version


def _check_arrays(segment: Segment, widths: Widths, count: int) -> None:
    """Refuse arrays that are missing, or have another dtype or shape than fits the others."""
    tokens = segment.arrays["scales"].size if "scales" in segment.arrays else 0
    wanted: dict[str, tuple[type, tuple[int, ...]]] = {
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
        width = 2 * widths.token + 2
        # Until 0.2.0 it knew of no doubt, and had one row.
        earlier = segment.arrays[REGRESSION].ndim == 1
        wanted[REGRESSION] = (np.float64, (width,) if earlier else (2, width))
    for name, (dtype, shape) in wanted.items():
        array = segment.arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            raise StoreCorrupted(f"{segment.path} has no fitting array {name!r}", hint=REBUILD)


@contextmanager
def write_version(
    directory: Path,
    origin: Origin,
    identity: Identity,
    number: int,
    entries: Iterable[Entry],
    *,
    building: Building = AT_ONCE,
    learned: Regression | None = None,
) -> Iterator[Callable[[], None]]:
    """Write a version that nobody sees before the function given is called.

    Its number is one more than the current version's; an index that is not built is left to the
    next version. The entries are in the order of their ids, and are read once.
    Where anchors among them have no tokens to learn from, what was `learned` before stays.
    """
    records_path = directory / _records_name(origin, number)
    build, published = uuid.uuid4().hex, False
    database.create_database(records_path, identity, {"build": build})
    try:
        path, columns = segment_path(directory, origin), _Columns(origin, learned)
        with SegmentWriter(path, _ATTRIBUTE_BYTES, _MOST_ARRAYS) as writer:
            with database.filling(records_path) as connection:
                levels = columns.gather(entries, connection)
                writer.stream("levels", levels, identity.widths.token, np.int8)
            arrays = columns.arrays(identity.widths.key, building)
            for name, array in arrays.items():
                writer.add(name, array)
            with disk_errors(records_path):
                records_sha256 = file_sha256(records_path)
            writer.finish(
                {
                    "format": _FORMAT,
                    "origin": origin,
                    "generation": number,
                    "count": len(arrays["keys"]),
                    **identity.values,
                    "records": records_path.name,
                    "records_sha256": records_sha256,
                    "regression_sha256": regression_sha256(arrays),
                    "build": build,
                }
            )

            def publish() -> None:
                nonlocal published
                published = True
                writer.publish()

            yield publish
    finally:
        if not published:
            database.remove_database(records_path)


class _Kept(NamedTuple):
    """What is kept of an entry while its tokens are written."""

    key: Array
    scales: Array
    grid: tuple[int, int]
    score: float
    image: int
    digest: bytes


class _Columns:
    """What is gathered of all entries."""

    def __init__(self, origin: Origin, learned: Regression | None = None) -> None:
        self._origin, self._learned = origin, learned
        self._all_have_tokens = True
        self._rows: list[_Kept] = []
        self._sample = Sample()

    def gather(self, entries: Iterable[Entry], connection: sqlite3.Connection) -> Iterator[Array]:
        """Store each record, keep what is small and hand on the levels of its tokens."""
        for entry in entries:
            record, features = entry.record, entry.features
            insert_record(connection, entry)
            if self._origin == "anchor":  # nothing is learned of predicted scores
                self._sample.show(record.id, features.tokens, record.score)
                self._all_have_tokens &= len(features.scales) > 0
            image, digest = image_hash(record.image_digest), entry.digest[:DIGEST_BYTES]
            vectors = features.key, features.scales, features.grid
            self._rows.append(_Kept(*vectors, record.score, image, digest))
            yield features.levels

    def arrays(self, key_width: int, building: Building) -> dict[str, Array]:
        """Give everything but the levels."""
        rows = self._rows
        keys = np.array([row.key for row in rows], np.float16).reshape(-1, key_width)
        scales = [np.empty(0, np.float32), *(row.scales for row in rows)]
        scores = np.array([row.score for row in rows], np.float64)
        images = np.array([row.image for row in rows], np.int64)
        digests = np.frombuffer(b"".join(row.digest for row in rows), np.uint8)
        by_score, by_image = (np.argsort(column, kind="stable") for column in (scores, images))
        arrays = {
            "keys": keys,
            "scales": np.concatenate(scales),
            "offsets": np.cumsum([len(part) for part in scales], dtype=np.int64),
            "grids": np.array([row.grid for row in rows], np.int32).reshape(-1, 2),
            "digests": digests.reshape(-1, DIGEST_BYTES),
            "sorted_scores": scores[by_score],
            "by_score": by_score.astype(np.int32),
            "image_hashes": images[by_image],
            "image_rows": by_image.astype(np.int32),
        }
        # Learned cases are few enough to be compared one by one where no index can be built.
        if building.threads and (self._origin == "anchor" or can_be_built()):
            arrays |= index_arrays(keys, *building)
        learned = self._learned
        if self._all_have_tokens:
            fitted = self._sample.fitted()
            learned = None if fitted is None else fitted[0]
        return arrays if learned is None else arrays | {REGRESSION: learned.array}
