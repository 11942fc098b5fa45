"""Immutable files of named arrays, checked before they are mapped.

Layout, little-endian throughout:

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

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

__all__ = ["Segment", "disk_errors", "file_sha256", "sync_directory", "write_segment"]

Array = NDArray[Any]

_MAGIC = b"MEIQASEG"
_VERSION = 1
_ALIGNMENT = 64
_PREAMBLE = struct.Struct("<8sIIQQ")
_PREAMBLE_BYTES = _PREAMBLE.size + 32
_LARGEST_HEADER_BYTES = 1 << 24
_DTYPES = {name: np.dtype(name) for name in ("|i1", "|u1", "<i4", "<i8", "<f2", "<f4", "<f8")}
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, eq=False)
class Segment:
    """Read-only arrays over a memory map of one file, shared between processes.

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

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Segment:
        """Map a segment after checking its header and every bound.

        Args:
            path: The file.
            verify: Also check the digest of every array, which reads the whole file.

        Raises:
            StoreNotFound: there is no such file.
            StoreCorrupted: the file is not a segment, is truncated or was altered.
            StoreMismatch: the file has a format version that this meiqa does not read.
        """
        mapped = _map_file(path)
        with _damage_named(path):
            header, first_offset = _read_header(path, mapped)
            arrays = {
                name: _array_view(mapped, entry, first_offset, verify)
                for name, entry in _entries_by_name(header).items()
            }
            attributes = header["attributes"]
            if not isinstance(attributes, dict):
                raise ValueError("the attributes are not a mapping")
        return cls(path, MappingProxyType(arrays), MappingProxyType(attributes))


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
    stored = {name: _as_stored(name, array) for name, array in arrays.items()}
    header, offsets, file_bytes = _build_header(stored, attributes)
    preamble = _PREAMBLE.pack(_MAGIC, _VERSION, 0, len(header), file_bytes)
    digest = hashlib.sha256(preamble + header).digest()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(preamble + digest + header)
                for name, array in stored.items():
                    _write_array(file, array, offsets[name])
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors on writing into ours, naming the path."""
    try:
        yield
    except OSError as error:
        raise StoreUnwritable(
            f"cannot write {path}",
            seen=error.strerror,
            hint="choose a writable directory with room, or open the memory with mode 'r'",
        ) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Give the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_stored(name: str, array: Array) -> Array:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
    if little.dtype.str not in _DTYPES:
        raise UsageError(
            f"array {name!r} has a dtype that segments do not hold",
            seen=array.dtype,
            allowed=", ".join(dtype.name for dtype in _DTYPES.values()),
        )
    return little


def _build_header(
    arrays: Mapping[str, Array], attributes: Mapping[str, Any]
) -> tuple[bytes, dict[str, int], int]:
    """Give the header, the offset of each array and the length of the file."""
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "offset": 0,
            "sha256": _array_sha256(array),
        }
        for name, array in arrays.items()
    ]
    # Offsets count from a boundary that depends on the header's length, which depends on the
    # offsets' digits: room for the longest offsets settles it.
    room = len(_header_json(attributes, entries)) + 20 * len(entries)
    position = _aligned(_PREAMBLE_BYTES + room)
    offsets = {}
    for entry, (name, array) in zip(entries, arrays.items(), strict=True):
        entry["offset"] = offsets[name] = _aligned(position)
        position = offsets[name] + array.nbytes
    header = _header_json(attributes, entries).ljust(room)
    if len(header) > _LARGEST_HEADER_BYTES:
        raise UsageError("the segment's attributes are too large", seen=f"{len(header)} bytes")
    return header, offsets, max(position, _PREAMBLE_BYTES + room)


def _header_json(attributes: Mapping[str, Any], entries: list[dict[str, Any]]) -> bytes:
    document = {"attributes": dict(attributes), "arrays": entries}
    return json.dumps(document, sort_keys=True).encode()


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _array_sha256(array: Array) -> str:
    return hashlib.sha256(_bytes_of(array)).hexdigest()


def _write_array(file: BinaryIO, array: Array, offset: int) -> None:
    file.write(bytes(offset - file.tell()))
    content = _bytes_of(array)
    for start in range(0, len(content), _CHUNK_BYTES):
        file.write(content[start : start + _CHUNK_BYTES])


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _PREAMBLE_BYTES:
                raise StoreCorrupted(f"{path} is too short to be a segment", hint=_restore(path))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise StoreNotFound(f"there is no segment {path}") from error
    except OSError as error:
        raise StoreError(f"cannot open {path}", seen=error.strerror) from error


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise StoreCorrupted(f"{path} is damaged: {error}", hint=_restore(path)) from error


def _restore(path: Path) -> str:
    return f"restore {path.parent} from a copy or build it again"


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
        raise StoreMismatch(
            f"{path} has another segment format",
            seen=f"version {version}",
            allowed=f"version {_VERSION}",
            hint="use the meiqa that wrote it or build the memory again",
        )
    document = json.loads(header)
    if not isinstance(document, dict):
        raise ValueError("its header is not a mapping")
    return document, end


def _entries_by_name(header: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    entries = header["arrays"]
    if not isinstance(entries, list):
        raise ValueError("its arrays are not a list")
    by_name = {str(entry["name"]): entry for entry in entries}
    if len(by_name) != len(entries):
        raise ValueError("two of its arrays have one name")
    return by_name


def _array_view(
    mapped: mmap.mmap, entry: Mapping[str, Any], first_offset: int, verify: bool
) -> Array:
    """View one array, after checking that it lies within the file."""
    name = entry["name"]
    dtype = _DTYPES[entry["dtype"]]
    shape = [_natural(extent) for extent in entry["shape"]]
    offset = _natural(entry["offset"])
    count = math.prod(shape)
    end = offset + count * dtype.itemsize
    if offset % _ALIGNMENT or offset < first_offset or end > len(mapped):
        raise ValueError(f"array {name!r} lies outside the file")
    array = np.frombuffer(mapped, dtype, count, offset).reshape(shape)
    if verify and _array_sha256(array) != entry["sha256"]:
        raise ValueError(f"array {name!r} was altered")
    return array


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value
