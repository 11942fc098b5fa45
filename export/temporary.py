"""Folders in the making: locked while somebody works in them, swept once nobody does."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` that vanishes at the end, unless it has another name by then.

    Folders with the same prefix that killed processes left behind are removed first.
    """
    for left in parent.glob(f"{prefix}*"):
        remove_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def remove_if_abandoned(folder: Path) -> None:
    """Remove a folder unless the process that made it holds its lock."""
    # One that has no lock yet is being made, and one that vanishes meanwhile needs no removing.
    with suppress(FileNotFoundError, NotADirectoryError):
        lock = os.open(folder / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            return
        finally:
            os.close(lock)
