"""Writing segments: array after array, so that one larger than memory can be streamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from meiqa.errors import UsageError
from meiqa.memory.disk import disk_errors, publish
from meiqa.memory.segment_layout import (
    ALIGNMENT,
    DTYPES,
    LARGEST_HEADER_BYTES,
    MAGIC,
    PREAMBLE,
    PREAMBLE_BYTES,
    VERSION,
    Array,
)

__all__ = ["SegmentWriter", "write_segment"]

_CHUNK_BYTES = 1 << 22
_ENTRY_BYTES = 320
"""More than the header says of one array: digest, offset, shape, dtype and a name."""


def write_segment(path: Path, arrays: Mapping[str, Array], attributes: Mapping[str, Any]) -> None:
    """Write a segment so that its name appears only when it is whole and on the disk.

    Args:
        path: The file; an older one is replaced.
        arrays: Arrays of int8, uint8, int32, int64, float16, float32 or float64.
        attributes: What JSON can hold.

    Raises:
        UsageError: an array has another dtype.
        StoreUnwritable: the file cannot be written.
    """
    with SegmentWriter(path, len(json.dumps(dict(attributes))), len(arrays)) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        writer.finish(attributes)
        writer.publish()


class SegmentWriter:
    """Writes a segment beside its place; a context manager that leaves nothing unfinished behind.

    Args:
        path: The file to be.
        attribute_bytes: Room for the attributes as JSON.
        most_arrays: How many arrays will be written, or more.

    Raises:
        StoreUnwritable: the file cannot be written.
    """

    def __init__(self, path: Path, attribute_bytes: int, most_arrays: int) -> None:
        self._path = path
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._entries: list[dict[str, Any]] = []
        self._header_bytes = attribute_bytes + most_arrays * _ENTRY_BYTES + 64
        with disk_errors(path):
            self._file = self._unfinished.open("wb")
            self._file.write(bytes(PREAMBLE_BYTES + self._header_bytes))

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def add(self, name: str, array: Array) -> None:
        """Write an array.

        Raises:
            UsageError: segments do not hold its dtype.
            StoreUnwritable: the file cannot be written.
        """
        self._write(name, array.dtype, [array.reshape(-1)])
        self._entries[-1]["shape"] = list(array.shape)

    def stream(self, name: str, rows: Iterable[Array], width: int, dtype: type[Any]) -> None:
        """Write the array (sum of T, width) that chunks of rows (T, width) make.

        Raises:
            StoreUnwritable: the file cannot be written.
        """
        written = self._write(name, np.dtype(dtype), rows)
        self._entries[-1]["shape"] = [written // width, width]

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Write the header and make the file durable, under its unfinished name.

        Raises:
            UsageError: the attributes take more room than was announced.
            StoreUnwritable: the file cannot be written.
        """
        document = {"attributes": dict(attributes), "arrays": self._entries}
        header = json.dumps(document, sort_keys=True).encode().ljust(self._header_bytes)
        if len(header) > min(self._header_bytes, LARGEST_HEADER_BYTES):
            raise UsageError("the segment's attributes are too large", seen=f"{len(header)} bytes")
        with disk_errors(self._path):
            preamble = PREAMBLE.pack(MAGIC, VERSION, 0, len(header), self._file.tell())
            self._file.seek(0)
            self._file.write(preamble + hashlib.sha256(preamble + header).digest() + header)
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Give the finished file its name, in place of an older one.

        Raises:
            StoreUnwritable: the directory cannot be written.
        """
        with disk_errors(self._path):
            publish(self._unfinished, self._path)

    def _write(self, name: str, dtype: np.dtype[Any], chunks: Iterable[Array]) -> int:
        """Write chunks at the next boundary; give how many elements there were."""
        little = dtype.newbyteorder("<")
        if little.str not in DTYPES:
            allowed = ", ".join(known.name for known in DTYPES.values())
            raise UsageError(
                f"array {name!r} has a dtype that segments do not hold", seen=dtype, allowed=allowed
            )
        digest, count = hashlib.sha256(), 0
        with disk_errors(self._path):
            offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
            self._file.write(bytes(offset - self._file.tell()))
        for chunk in chunks:
            content = np.ascontiguousarray(chunk, little).reshape(-1).view(np.uint8).data
            with disk_errors(self._path):
                for start in range(0, len(content), _CHUNK_BYTES):
                    self._file.write(content[start : start + _CHUNK_BYTES])
            digest.update(content)
            count += chunk.size
        self._entries.append(
            {"name": name, "dtype": little.str, "offset": offset, "sha256": digest.hexdigest()}
        )
        return count
