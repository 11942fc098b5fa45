"""The right to write to a directory, held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from meiqa.errors import StoreLocked
from meiqa.memory.disk import disk_errors

__all__ = ["WriterLock"]

_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


class WriterLock:
    """An exclusive lock on a file that holds the pid of its owner.

    The kernel drops the lock when its owner ends, however it ends, so a stale lock cannot be.
    The file stays: removing it would let two processes lock two files of one name.

    Raises:
        StoreLocked: another owner has it; the error names the pid.
        StoreUnwritable: the lock file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            self._close()
            raise StoreLocked(
                f"{path.parent} is being written by process {holder or 'unknown'}",
                hint="wait for it to end, or open the memory with mode 'r'",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Let the next writer in."""
        _held.discard(self)
        self._close()


def _release_inherited() -> None:
    # A forked child shares the lock and would keep it alive after its owner has ended.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_inherited)
