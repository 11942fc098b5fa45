"""Compaction: what the journal holds becomes part of a new generation, while readers go on."""

from __future__ import annotations

import logging
import threading

from meiqa.errors import MeiqaError
from meiqa.memory.generation_writer import written_generation
from meiqa.memory.store import CaseStore
from meiqa.types import Origin

__all__ = ["Compactor"]

LOG = logging.getLogger(__name__)


class Compactor:
    """Compacts one store, at most one generation at a time; safe to share between threads.

    A reader waits only while the new generation takes its name and the journal is emptied.
    """

    def __init__(self, store: CaseStore) -> None:
        self._store = store
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failed = False

    def compact(self, origin: Origin) -> bool:
        """Merge the journal's cases of an origin into a new generation; tell whether any were.

        Raises:
            StoreCorrupted: a stored case is damaged.
            StoreError: the store is read-only or closed, or the disk is full; nothing is lost.
        """
        with self._one_at_a_time, self._store.frozen(origin) as frozen:
            view = frozen.view
            if not len(view.recent) and not len(view.hidden):
                return False
            number = 1 if view.generation is None else view.generation.number + 1
            with written_generation(
                self._store.directory(origin),
                origin,
                self._store.identity,
                number,
                view.whole_entries(),
            ) as publish:
                self._store.swap(origin, frozen, publish)
            return True

    def begin(self, origin: Origin) -> None:
        """Compact in the background, unless that goes on already or has failed before."""
        if self._failed or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(
            target=self._compact_quietly, args=(origin,), name="memory compaction"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the background to end."""
        if self._thread is not None:
            self._thread.join()

    def _compact_quietly(self, origin: Origin) -> None:
        try:
            self.compact(origin)
        except MeiqaError as error:
            self._failed = True  # a full disk is not asked again with every case
            LOG.warning("the memory was not compacted: %s", error)
