"""Building an anchor memory: each anchor is staged, the finished memory appears whole."""

from __future__ import annotations

import shutil
import sqlite3
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

from meiqa.errors import StoreError, StoreMismatch, UsageError
from meiqa.memory import database
from meiqa.memory.cases import Case, check_case, encode_case
from meiqa.memory.database import Identity, Widths
from meiqa.memory.index import Building
from meiqa.memory.segment import disk_errors, publish, refuse_taken, sync
from meiqa.memory.versions import write_version
from meiqa.memory.wal import WriterLock, insert_entry, read_entries
from meiqa.types import KeyKind

_STAGING_NAME = "spool.sqlite3"
_LOCK_NAME = "spool.lock"
_DURABLE_EVERY = 64
_THUMBNAILS = "thumbnails"


class AnchorWriter:
    """Writes an anchor memory; its directory appears whole, or not at all.

    What it holds in the end depends neither on the order of the anchors nor on interruptions.

    Args:
        path: The directory to be; it must not exist, or be empty.
        package_digest: Digest of the engine package that encoded the anchors, hexadecimal.
        key_width, token_width: D_key, and D of the visual tokens.
        key_kind: What the keys are made of; see `meiqa.memory.retrieval_key`.
        keep_thumbnails: Each anchor comes with a small JPEG, which is kept; otherwise none does.
        resume: Keep what was added when the writer is interrupted, and go on with what an
            interrupted one has kept; after a kill, up to 64 anchors are missing.

    Attributes:
        known_ids: Ids of the anchors that have been added, those of interrupted runs among them.

    Raises:
        StoreError: the directory is taken or cannot be written, or another writer has resumed it.
        StoreMismatch: the interrupted writer wrote for another package, kind of key or answer to
            whether thumbnails are kept.

    >>> import tempfile
    >>> import numpy as np
    >>> from meiqa.memory import MemoryBank
    >>> path = Path(tempfile.mkdtemp()) / "memory"
    >>> with AnchorWriter(path, "ab12", key_width=2, token_width=3) as writer:
    ...     writer.add(Case("a", "anchor", "d1", 3.2, 0.1, "sharp",
    ...                     np.ones(2, np.float32), np.ones((4, 3), np.float32), (2, 2)))
    ...     writer.finish()
    >>> with MemoryBank.open(path, package_digest="ab12") as bank:
    ...     bank.snapshot().count_anchors
    1
    """

    def __init__(
        self,
        path: str | Path,
        package_digest: str,
        key_width: int,
        token_width: int,
        *,
        key_kind: KeyKind = "summary",
        keep_thumbnails: bool = False,
        resume: bool = False,
    ) -> None:
        self._path = Path(path)
        self._identity = Identity(package_digest, Widths(key_width, token_width), key_kind)
        self._keep_thumbnails = keep_thumbnails
        self._resume = resume
        self._unsaved = 0
        self.known_ids: set[str] = set()
        name = "resumable" if resume else uuid.uuid4().hex
        self._partial = self._path.with_name(f".{self._path.name}.{name}.partial")
        self._staging_path = self._partial / _STAGING_NAME
        self._connection: sqlite3.Connection | None = None
        self._held = ExitStack()
        refuse_taken(self._path)
        with disk_errors(self._path):
            self._partial.mkdir(parents=True, exist_ok=resume)
        try:
            self._held.callback(WriterLock(self._partial / _LOCK_NAME).release)
            self._connection = self._open_staging()
            self._held.callback(self._connection.close)
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> AnchorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._resume:
            self.suspend()
        else:
            self.discard()

    def add(self, case: Case, *, provenance: str = "", thumbnail: bytes | None = None) -> None:
        """Add one anchor, with where its score comes from, and a small JPEG if those are kept.

        Raises:
            UsageError: the case cannot be stored, or its id is taken.
            StoreError: the disk is full.
        """
        check_case(case, "anchor", self._identity.widths)
        if case.id in self.known_ids:
            raise UsageError("two anchors have one id", seen=case.id)
        if (thumbnail is not None) != self._keep_thumbnails:
            raise UsageError("all anchors have a thumbnail, or none has", seen=case.id)
        digest = self._identity.package_digest
        entry = encode_case(case, digest, provenance, time.time(), thumbnail)
        connection = self._staging()
        try:
            with database.sqlite_errors(self._staging_path):
                if not connection.in_transaction:
                    connection.execute("BEGIN IMMEDIATE")
                insert_entry(connection, entry)
                self._unsaved += 1
                if self._unsaved == _DURABLE_EVERY:
                    self._save(connection)
        except BaseException:
            self._let_go()  # SQLite may have undone more than this anchor
            raise
        self.known_ids.add(case.id)

    def finish(self, *, threads: int = 1) -> None:
        """Make the memory durable and give it its name.

        With more than one thread the index of a large memory differs from run to run.

        Raises:
            StoreError: the disk is full, or the directory has been taken meanwhile.
            UsageError: so many anchors take an index, which cannot be built here.
        """
        refuse_taken(self._path)
        connection = self._staging()
        with database.sqlite_errors(self._staging_path):
            self._save(connection)
        with disk_errors(self._path):
            whole = self._partial / "memory"
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir()
            staged = read_entries(self._staging_path, connection, self._identity.widths)
            entries = (entry for _, entry in staged)
            building = Building(threads)
            written = write_version(whole, "anchor", self._identity, 1, entries, building=building)
            with written as appear:
                appear()
            sync(whole)
            publish(whole, self._path)
        self.discard()

    def suspend(self) -> None:
        """Keep what was added, for a writer that resumes."""
        if self._connection is not None:
            with database.sqlite_errors(self._staging_path):
                self._save(self._connection)
        self._let_go()

    def discard(self) -> None:
        """Remove what an unfinished writer has written."""
        self._let_go()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _open_staging(self) -> sqlite3.Connection:
        """Go on where an interrupted writer was, or begin."""
        path, keeps = self._staging_path, "yes" if self._keep_thumbnails else "no"
        if not path.exists():
            database.create_database(path, self._identity, {_THUMBNAILS: keeps})
        connection = database.connect(path, "rw")
        try:
            found, labels = database.read_identity(path, connection)
            begin = f"or begin again: rm -r {self._partial}"
            hint = f"finish it with that package, {begin}"
            kind_hint = f"finish it with --key {found.key_kind}, {begin}"
            database.check_identity(path, found, self._identity, hint, kind_hint)
            if (kept := labels.get(_THUMBNAILS, "no")) != keeps:
                what = f"{path} was begun with another answer to --keep-thumbnails"
                hint = f"finish it as it was begun, {begin}"
                raise StoreMismatch(what, seen=kept, allowed=keeps, hint=hint)
            with database.sqlite_errors(path):
                rows = connection.execute("SELECT id FROM records")
                self.known_ids.update(case_id for (case_id,) in rows)
        except BaseException:
            connection.close()
            raise
        return connection

    def _staging(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"the writer of {self._path} is closed")
        return self._connection

    def _save(self, connection: sqlite3.Connection) -> None:
        if connection.in_transaction:
            connection.execute("COMMIT")
        self._unsaved = 0

    def _let_go(self) -> None:
        self._connection = None
        self._held.close()
