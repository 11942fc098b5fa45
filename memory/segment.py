"""Segments: immutable, memory-mapped files of named arrays, and what makes a file durable.

Little-endian throughout:

    0   8 bytes  magic "MEIQASEG"
    8   uint32   format version
    12  uint32   zero
    16  uint64   length of the header in bytes
    24  uint64   length of the file in bytes
    32  32 bytes SHA-256 of bytes 0-31 followed by the header
    64  header   JSON: {"attributes": {...}, "arrays": [{name, dtype, shape, offset, sha256}]}
    ..  arrays   C order, each at a multiple of 64 bytes, zeros between them

The first 64 bytes keep their meaning in every version, so that a newer file is told from a damaged
one. A file is never changed once it has its name: a new one is written beside it and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import (
    StoreCorrupted,
    StoreError,
    StoreMismatch,
    StoreNotFound,
    StoreUnwritable,
    UsageError,
)

Array: TypeAlias = NDArray[Any]

_MAGIC = b"MEIQASEG"
_VERSION = 1
_ALIGNMENT = 64
_PREAMBLE = struct.Struct("<8sIIQQ")
_PREAMBLE_BYTES = _PREAMBLE.size + 32
_LARGEST_HEADER_BYTES = 1 << 24
_DTYPES = {name: np.dtype(name) for name in ("|i1", "|u1", "<i4", "<i8", "<f2", "<f4", "<f8")}
_CHUNK_BYTES = 1 << 22
_ENTRY_BYTES = 320
"""More than the header says of one array: digest, offset, shape, dtype and a name."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Read-only arrays over a memory map of one file, shared between processes.

    Attributes:
        path: The file.
        arrays: Views of the map, by name.
        attributes: What the writer said about them.
        file: What tells the mapped file from another of the same name; see `file_identity`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "example.seg"
    >>> write_segment(path, {"keys": np.eye(2, dtype=np.float16)}, {"model": "m"})
    >>> segment = Segment.open(path)
    >>> segment.arrays["keys"].tolist(), segment.attributes["model"]
    ([[1.0, 0.0], [0.0, 1.0]], 'm')
    """

    path: Path
    arrays: Mapping[str, Array]
    attributes: Mapping[str, Any]
    file: tuple[int, int]

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Segment:
        """Map a segment after checking its header and every bound; to verify it, all of it is read.

        Raises:
            StoreNotFound: there is no such file.
            StoreCorrupted: the file is not a segment, is truncated or was altered.
            StoreMismatch: the file has a format version that this meiqa does not read.
        """
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size < _PREAMBLE_BYTES:
                    raise _corrupted(path, "it is too short to be a segment")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise StoreNotFound(f"there is no segment {path}") from error
        except OSError as error:
            raise StoreError(f"cannot open {path}", seen=error.strerror) from error
        try:
            header, first_offset = _read_header(path, mapped)
            attributes, entries = header["attributes"], header["arrays"]
            if not isinstance(attributes, dict) or not isinstance(entries, list):
                raise TypeError("its header is not a mapping of attributes and a list of arrays")
            arrays = {
                str(entry["name"]): _array_view(mapped, entry, first_offset, verify)
                for entry in entries
            }
            if len(arrays) != len(entries):
                raise ValueError("two of its arrays have one name")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise _corrupted(path, error) from error
        views, said = MappingProxyType(arrays), MappingProxyType(attributes)
        return cls(path, views, said, file_identity(status))


def _corrupted(path: Path, what: object) -> StoreCorrupted:
    hint = f"restore {path.parent} from a copy or build it again"
    return StoreCorrupted(f"{path} is damaged: {what}", hint=hint)


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """Give the header and the first position that an array may take."""
    preamble = mapped[: _PREAMBLE.size]
    magic, version, _, header_bytes, file_bytes = _PREAMBLE.unpack(preamble)
    if magic != _MAGIC:
        raise ValueError("it does not begin as a segment does")
    if file_bytes != len(mapped):
        raise ValueError(f"it has {len(mapped)} bytes instead of {file_bytes}")
    end = _PREAMBLE_BYTES + header_bytes
    if header_bytes > _LARGEST_HEADER_BYTES or end > len(mapped):
        raise ValueError("its header runs past the end")
    header = mapped[_PREAMBLE_BYTES:end]
    if hashlib.sha256(preamble + header).digest() != mapped[_PREAMBLE.size : _PREAMBLE_BYTES]:
        raise ValueError("its header was altered")
    if version != _VERSION:
        what = f"{path} has another segment format"
        seen, allowed = f"version {version}", f"version {_VERSION}"
        hint = "use the meiqa that wrote it or build the memory again"
        raise StoreMismatch(what, seen=seen, allowed=allowed, hint=hint)
    document = json.loads(header)
    if not isinstance(document, dict):
        raise TypeError("its header is not a mapping")
    return document, end


def _array_view(
    mapped: mmap.mmap, entry: Mapping[str, Any], first_offset: int, verify: bool
) -> Array:
    """View one array, after checking that it lies within the file."""
    name = entry["name"]
    dtype = _DTYPES[entry["dtype"]]
    shape, offset = entry["shape"], entry["offset"]
    for size in (*shape, offset):
        if type(size) is not int or size < 0:
            raise ValueError(f"{size!r} is not a size")
    count = math.prod(shape)
    inside = first_offset <= offset <= len(mapped) - count * dtype.itemsize
    if offset % _ALIGNMENT or not inside:
        raise ValueError(f"array {name!r} lies outside the file")
    array = np.frombuffer(mapped, dtype, count, offset).reshape(shape)
    if verify:
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        if digest != entry["sha256"]:
            raise ValueError(f"array {name!r} was altered")
    return array


def write_segment(path: Path, arrays: Mapping[str, Array], attributes: Mapping[str, Any]) -> None:
    """Write a segment so that its name appears only when it is whole and on the disk.

    An older one is replaced. UsageError if an array is not of int8, uint8, int32, int64, float16,
    float32 or float64; StoreUnwritable where the file cannot be written.
    """
    with SegmentWriter(path, len(json.dumps(dict(attributes))), len(arrays)) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        writer.finish(attributes)
        writer.publish()


class SegmentWriter:
    """Writes a segment beside its place, array after array, so that large ones can be streamed.

    A context manager that leaves nothing unfinished behind. It makes room for `attribute_bytes` of
    JSON and `most_arrays`. All raises StoreUnwritable where the file cannot be written.
    """

    def __init__(self, path: Path, attribute_bytes: int, most_arrays: int) -> None:
        self._path = path
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._entries: list[dict[str, Any]] = []
        self._header_bytes = attribute_bytes + most_arrays * _ENTRY_BYTES + 64
        with disk_errors(path):
            self._file = self._unfinished.open("wb")
            self._file.write(bytes(_PREAMBLE_BYTES + self._header_bytes))

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def add(self, name: str, array: Array) -> None:
        """Write an array; UsageError if segments do not hold its dtype."""
        self._write(name, array.dtype, [array.reshape(-1)])
        self._entries[-1]["shape"] = list(array.shape)

    def stream(self, name: str, rows: Iterable[Array], width: int, dtype: type[Any]) -> None:
        """Write the array (sum of T, width) that chunks of rows (T, width) make."""
        written = self._write(name, np.dtype(dtype), rows)
        self._entries[-1]["shape"] = [written // width, width]

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Write the header and make the file durable, under its unfinished name."""
        document = {"attributes": dict(attributes), "arrays": self._entries}
        header = json.dumps(document, sort_keys=True).encode().ljust(self._header_bytes)
        if len(header) > min(self._header_bytes, _LARGEST_HEADER_BYTES):
            raise UsageError("the segment's attributes are too large", seen=f"{len(header)} bytes")
        with disk_errors(self._path):
            preamble = _PREAMBLE.pack(_MAGIC, _VERSION, 0, len(header), self._file.tell())
            self._file.seek(0)
            self._file.write(preamble + hashlib.sha256(preamble + header).digest() + header)
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Give the finished file its name, in place of an older one."""
        with disk_errors(self._path):
            publish(self._unfinished, self._path)

    def _write(self, name: str, dtype: np.dtype[Any], chunks: Iterable[Array]) -> int:
        """Write chunks at the next boundary; give how many elements there were."""
        little = dtype.newbyteorder("<")
        if little.str not in _DTYPES:
            allowed = ", ".join(known.name for known in _DTYPES.values())
            what = f"array {name!r} has a dtype that segments do not hold"
            raise UsageError(what, seen=dtype, allowed=allowed)
        digest, count = hashlib.sha256(), 0
        with disk_errors(self._path):
            offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors on writing into StoreUnwritable, naming the path."""
    try:
        yield
    except OSError as error:
        hint = "choose a writable directory with room, or open the memory with mode 'r'"
        raise StoreUnwritable(f"cannot write {path}", seen=error.strerror, hint=hint) from error


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(unfinished: Path, path: Path) -> None:
    """Give a finished file or directory its name, at once and durably."""
    os.replace(unfinished, path)
    sync(path.parent)


def refuse_taken(path: Path) -> None:
    """Refuse the name of a directory to be, unless there is nothing or an empty directory."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        hint = "remove it first, or choose another directory"
        raise StoreError(f"{path} already exists", hint=hint)


def file_identity(status: os.stat_result) -> tuple[int, int]:
    """Tell a file from every other that exists; one that is mapped still exists."""
    return status.st_dev, status.st_ino


def file_sha256(path: Path) -> str:
    """Give the SHA-256 of a file, hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise StoreNotFound(f"there is no file {path}") from error
