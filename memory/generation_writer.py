"""Writing a generation: beside the current one, then in its place at once."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.database import (
    Identity,
    connect,
    create_database,
    remove_database,
    sqlite_errors,
    transaction,
)
from meiqa.memory.disk import disk_errors, file_sha256, sync
from meiqa.memory.encoding import dequantise_tokens
from meiqa.memory.generation import (
    DIGEST_BYTES,
    FORMAT,
    REGRESSION,
    image_hash,
    records_name,
    regression_sha256,
    segment_path,
)
from meiqa.memory.index import index_arrays
from meiqa.memory.records import Entry, entry_digest, insert_record, insert_thumbnail
from meiqa.memory.regression import Sample
from meiqa.memory.segment_layout import Array
from meiqa.memory.segment_writer import SegmentWriter
from meiqa.types import Origin

__all__ = ["written_generation"]

_ATTRIBUTE_BYTES = 4096
_MOST_ARRAYS = 64


@contextmanager
def written_generation(
    directory: Path,
    origin: Origin,
    identity: Identity,
    number: int,
    entries: Iterable[Entry],
    *,
    threads: int = 1,
) -> Iterator[Callable[[], None]]:
    """Write a generation that nobody sees before the function given is called.

    Args:
        directory: The memory, which must exist.
        origin: Of all entries.
        identity: Package, widths and kind of key that they were encoded with.
        number: One more than the current generation's.
        entries: In the order of their ids; read once.
        threads: That build the index.

    Raises:
        StoreUnwritable: the disk is full, or the directory cannot be written.
    """
    records_path = directory / records_name(origin, number)
    build, published = uuid.uuid4().hex, False
    create_database(records_path, identity, {"build": build})
    try:
        with SegmentWriter(
            segment_path(directory, origin), _ATTRIBUTE_BYTES, _MOST_ARRAYS
        ) as writer:
            columns = _Columns(identity)
            with (
                sqlite_errors(records_path),
                closing(connect(records_path, "alone", check=False)) as connection,
                transaction(connection, "IMMEDIATE"),
            ):
                levels = columns.gather(entries, connection)
                writer.stream("levels", levels, identity.widths.token, np.int8)
            regression = columns.regression_arrays(origin)
            for name, array in (columns.arrays(threads) | regression).items():
                writer.add(name, array)
            with disk_errors(records_path):
                sync(records_path)
                records_sha256 = file_sha256(records_path)
            writer.finish(
                {
                    "format": FORMAT,
                    "origin": origin,
                    "generation": number,
                    "count": len(columns),
                    "package_digest": identity.package_digest,
                    "key_width": identity.widths.key,
                    "token_width": identity.widths.token,
                    "key_kind": identity.key_kind,
                    "records": records_path.name,
                    "records_sha256": records_sha256,
                    "regression_sha256": regression_sha256(regression),
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
            remove_database(records_path)


class _Columns:
    """What is gathered of each entry while its tokens are written."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._keys: list[NDArray[np.float16]] = []
        self._scales: list[NDArray[np.float32]] = []
        self._grids: list[tuple[int, int]] = []
        self._scores: list[float] = []
        self._images: list[int] = []
        self._digests = bytearray()
        self._sample = Sample()

    def __len__(self) -> int:
        return len(self._keys)

    def gather(self, entries: Iterable[Entry], connection: sqlite3.Connection) -> Iterator[Array]:
        """Store each record, keep what is small and hand on the levels of its tokens."""
        for entry in entries:
            revision = insert_record(connection, entry.record)
            if entry.thumbnail is not None:
                insert_thumbnail(connection, revision, entry.thumbnail)
            self._keys.append(entry.features.key)
            self._scales.append(entry.features.tokens.scales)
            self._grids.append(entry.features.grid)
            self._scores.append(entry.record.score)
            self._images.append(image_hash(entry.record.image_digest))
            self._digests += entry_digest(entry)[:DIGEST_BYTES]
            tokens = dequantise_tokens(entry.features.tokens)
            self._sample.show(entry.record.id, tokens, entry.record.score)
            yield entry.features.tokens.levels

    def regression_arrays(self, origin: Origin) -> dict[str, Array]:
        """Give the regression from tokens to human scores; none is made of predicted ones."""
        fitted = self._sample.fitted() if origin == "anchor" else None
        return {} if fitted is None else {REGRESSION: fitted[0].array}

    def arrays(self, threads: int) -> dict[str, Array]:
        """Give everything but the levels; so many threads build the index."""
        keys = np.array(self._keys, np.float16).reshape(-1, self._identity.widths.key)
        scores = np.array(self._scores, np.float64)
        images = np.array(self._images, np.int64)
        by_score, by_image = (np.argsort(column, kind="stable") for column in (scores, images))
        return {
            "keys": keys,
            "scales": np.concatenate([np.empty(0, np.float32), *self._scales]),
            "offsets": np.cumsum([0, *map(len, self._scales)], dtype=np.int64),
            "grids": np.array(self._grids, np.int32).reshape(-1, 2),
            "digests": np.frombuffer(self._digests, np.uint8).reshape(-1, DIGEST_BYTES),
            "sorted_scores": scores[by_score],
            "by_score": by_score.astype(np.int32),
            "image_hashes": images[by_image],
            "image_rows": by_image.astype(np.int32),
            **index_arrays(keys, threads),
        }
