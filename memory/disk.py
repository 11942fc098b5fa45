"""What writing to a disk takes: errors with a name, names that survive a power cut, digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meiqa.errors import StoreError, StoreUnwritable

__all__ = ["disk_errors", "file_sha256", "publish", "refuse_taken", "sync"]


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


def refuse_taken(path: Path) -> None:
    """Refuse the name of a directory to be, unless there is nothing or an empty directory.

    Raises:
        StoreError: there is something.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise StoreError(
            f"{path} already exists", hint="remove it first, or choose another directory"
        )


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


def file_sha256(path: Path) -> str:
    """Give the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
