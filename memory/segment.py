"""Reading segments: every bound is checked before anything is mapped."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from meiqa.errors import StoreCorrupted, StoreError, StoreMismatch, StoreNotFound
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
from meiqa.memory.segment_writer import write_segment

__all__ = ["Segment", "file_identity", "write_segment"]


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
        """Map a segment after checking its header and every bound.

        Args:
            path: The file.
            verify: Also check the digest of every array, which reads the whole file.

        Raises:
            StoreNotFound: there is no such file.
            StoreCorrupted: the file is not a segment, is truncated or was altered.
            StoreMismatch: the file has a format version that this meiqa does not read.
        """
        mapped, file = _map_file(path)
        with _damage_named(path):
            header, first_offset = _read_header(path, mapped)
            arrays = {
                name: _array_view(mapped, entry, first_offset, verify)
                for name, entry in _entries_by_name(header).items()
            }
            attributes = header["attributes"]
            if not isinstance(attributes, dict):
                raise ValueError("the attributes are not a mapping")
        return cls(path, MappingProxyType(arrays), MappingProxyType(attributes), file)


def file_identity(status: os.stat_result) -> tuple[int, int]:
    """Tell a file from every other that exists; one that is mapped still exists."""
    return status.st_dev, status.st_ino


def _map_file(path: Path) -> tuple[mmap.mmap, tuple[int, int]]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < PREAMBLE_BYTES:
                raise StoreCorrupted(f"{path} is too short to be a segment", hint=_restore(path))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return mapped, file_identity(status)
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
    preamble = mapped[: PREAMBLE.size]
    magic, version, _, header_bytes, file_bytes = PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise ValueError("it does not begin as a segment does")
    if file_bytes != len(mapped):
        raise ValueError(f"it has {len(mapped)} bytes instead of {file_bytes}")
    end = PREAMBLE_BYTES + header_bytes
    if header_bytes > LARGEST_HEADER_BYTES or end > len(mapped):
        raise ValueError("its header runs past the end")
    header = mapped[PREAMBLE_BYTES:end]
    if hashlib.sha256(preamble + header).digest() != mapped[PREAMBLE.size : PREAMBLE_BYTES]:
        raise ValueError("its header was altered")
    if version != VERSION:
        raise StoreMismatch(
            f"{path} has another segment format",
            seen=f"version {version}",
            allowed=f"version {VERSION}",
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
    dtype = DTYPES[entry["dtype"]]
    shape = [_natural(extent) for extent in entry["shape"]]
    offset = _natural(entry["offset"])
    count = math.prod(shape)
    end = offset + count * dtype.itemsize
    if offset % ALIGNMENT or offset < first_offset or end > len(mapped):
        raise ValueError(f"array {name!r} lies outside the file")
    array = np.frombuffer(mapped, dtype, count, offset).reshape(shape)
    if verify and _sha256_of(array) != entry["sha256"]:
        raise ValueError(f"array {name!r} was altered")
    return array


def _sha256_of(array: Array) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value
