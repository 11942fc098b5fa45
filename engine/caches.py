"""Content-addressed caches, bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What a cache can hold: it knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...


Value = TypeVar("Value", bound=Sized)


@dataclass(frozen=True)
class ContentKey:
    """What a cached value was computed from: equal keys mean equal content.

    Attributes:
        image_digest: SHA-256 of the decoded pixels.
        grid: rows and columns of visual tokens.
        package_digest: identity of the engine package.
    """

    image_digest: str
    grid: tuple[int, int]
    package_digest: str


@dataclass(frozen=True)
class CacheState:
    """How a cache stands: its limit, what it holds, and how its lookups went."""

    limit_bytes: int
    used_bytes: int
    hits: int
    misses: int


class ByteLru(Generic[Value]):
    """Least-recently-used values up to a number of bytes; safe to share between threads.

    Attributes:
        hits, misses: lookups so far.
        used_bytes: bytes held now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.misses = self.used_bytes = 0
        self._values: OrderedDict[ContentKey, Value] = OrderedDict()
        self._lock = Lock()

    def get(self, key: ContentKey) -> Value | None:
        """The value under a key, made the most recent; None if there is none."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return value

    def put(self, key: ContentKey, value: Value) -> None:
        """Keep a value, dropping the least recent ones; one above the limit is not kept."""
        if value.nbytes > self.limit_bytes:
            return
        with self._lock:
            old = self._values.pop(key, None)
            self.used_bytes += value.nbytes - (old.nbytes if old is not None else 0)
            self._values[key] = value
            while self.used_bytes > self.limit_bytes:
                _, dropped = self._values.popitem(last=False)
                self.used_bytes -= dropped.nbytes

    def get_or_make(self, key: ContentKey, make: Callable[[], Value]) -> Value:
        """The value under a key, made and kept if there is none."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    @property
    def state(self) -> CacheState:
        """How it stands now."""
        with self._lock:
            return CacheState(self.limit_bytes, self.used_bytes, self.hits, self.misses)

    def __len__(self) -> int:
        return len(self._values)
