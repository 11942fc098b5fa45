"""Which of two pictures looks better: asked in both orders, over prefixes that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal, Protocol

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from meiqa.engine.model import Model, Prefix, VisualTokens
from meiqa.engine.runtime.decoder import parts_of
from meiqa.kernels.cores import usable_memory

PHOTO_CACHE_BYTES = 12 << 20
NEIGHBOUR_CACHE_BYTES = 80 << 20
PHOTOS_KEPT, NEIGHBOURS_KEPT = 4, 40
"""Of a large model that many are kept, more than one photo needs, as far as there is memory."""
MEMORY_SHARE = 1 / 8
"""For each engine, of which a service may have several."""
MOST_AT_ONCE = 64
"""Pictures whose prefixes are held for one round of questions."""

Role = Literal["photos", "neighbours"]


@dataclass(frozen=True)
class CacheState:
    """How a part of the cache stands."""

    limit_bytes: int
    used_bytes: int
    hits: int
    misses: int


class PrefixCache:
    """Prefixes by the digest of the pixels and the grid; safe to share between threads.

    Photos and neighbours have a limit each, so that neither crowds the other out, and are found in
    both parts. The least recently used go first.
    """

    def __init__(
        self, photo_bytes: int = PHOTO_CACHE_BYTES, neighbour_bytes: int = NEIGHBOUR_CACHE_BYTES
    ) -> None:
        self._parts: dict[Role, LRUCache[tuple[str, tuple[int, int]], Prefix]] = {
            "photos": LRUCache(photo_bytes, getsizeof=held_bytes),
            "neighbours": LRUCache(neighbour_bytes, getsizeof=held_bytes),
        }
        self._lookups: dict[Role, list[int]] = {"photos": [0, 0], "neighbours": [0, 0]}
        self._lock = Lock()

    @classmethod
    def holding(cls, prefix_bytes: int, memory_bytes: int | None = None) -> PrefixCache:
        """Make one for prefixes of up to so many bytes, and for the machine's memory by default."""
        free = int(MEMORY_SHARE * (usable_memory() if memory_bytes is None else memory_bytes))
        photos = min(PHOTOS_KEPT * prefix_bytes, free * PHOTOS_KEPT // NEIGHBOURS_KEPT)
        neighbours = min(NEIGHBOURS_KEPT * prefix_bytes, free)
        return cls(max(PHOTO_CACHE_BYTES, photos), max(NEIGHBOUR_CACHE_BYTES, neighbours))

    def at_once(self, prefix_bytes: int) -> int:
        """Give how many neighbours of such prefixes are read for one call, so that all are kept."""
        limit = int(self._parts["neighbours"].maxsize)
        return max(1, min(MOST_AT_ONCE, limit // max(prefix_bytes, 1)))

    def get(self, role: Role, image_digest: str, grid: tuple[int, int]) -> Prefix | None:
        """Give the prefix of a picture, made the most recent; None if it is not kept."""
        key = image_digest, grid
        with self._lock:
            found = next((part[key] for part in self._parts.values() if key in part), None)
            self._lookups[role][found is None] += 1
            return found

    def put(self, role: Role, image_digest: str, prefix: Prefix) -> None:
        """Keep a prefix, dropping the least recent ones; one above the limit is not kept."""
        part = self._parts[role]
        with self._lock:
            if held_bytes(prefix) <= part.maxsize:
                part[image_digest, prefix.tokens.grid] = prefix

    def forget(self, role: Role) -> None:
        """Drop what is kept in one part."""
        with self._lock:
            self._parts[role].clear()

    def state(self) -> dict[Role, CacheState]:
        """Give how each part stands."""
        with self._lock:
            return {
                role: CacheState(int(part.maxsize), int(part.currsize), *self._lookups[role])
                for role, part in self._parts.items()
            }


def held_bytes(prefix: Prefix) -> int:
    return int(prefix.key_values.nbytes + prefix.tokens.values.nbytes)


def largest_prefix_bytes(photo: Prefix, pictures: Sequence[VisualTokens]) -> int:
    """Estimate the largest prefix, of a photo or of pictures, by what the photo's holds a token."""
    tokens = max((len(picture.values) for picture in pictures), default=0)
    return held_bytes(photo) * max(tokens, len(photo.tokens.values)) // len(photo.tokens.values)


class Pictured(Protocol):
    """What can be compared: a remembered case, or another photo of the same set."""

    @property
    def image_digest(self) -> str: ...

    @property
    def tokens(self) -> NDArray[np.float32]: ...  # (T, D)

    @property
    def grid(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Comparer:
    """Asks a model for comparisons, and keeps the prefixes of whom it compares with."""

    model: Model
    prefixes: PrefixCache

    def ask(
        self, photo: Prefix, others: Sequence[Pictured], *, both_orders: bool
    ) -> tuple[NDArray[np.float64], int]:
        """Ask whether a photo looks better than each of n others.

        Gives logits (n, 2) of "it does" with the photo shown first and with it shown second, NaN
        where that was not asked; and how many tokens of prefixes were not read again.
        """
        pictures = [VisualTokens(other.tokens, other.grid) for other in others]
        logits = np.full((len(others), 2), np.nan)
        logits[:, 0] = self.model.prefer_first([photo], pictures)
        reused = photo.opening.length * len(others)
        if both_orders:
            largest = largest_prefix_bytes(photo, pictures)
            for part in parts_of(len(others), self.prefixes.at_once(largest)):
                firsts, kept = self._prefilled(others[part], pictures[part])
                logits[part, 1] = -self.model.prefer_first(firsts, [photo.tokens] * len(firsts))
                reused += kept
        return logits, reused

    def between(self, first: Pictured, others: Sequence[Pictured]) -> NDArray[np.float64]:
        """Ask whether one looks better than each of the others; logits as `ask` gives them."""
        (prefix,), _ = self._prefilled([first], [VisualTokens(first.tokens, first.grid)])
        return self.ask(prefix, others, both_orders=True)[0]

    def _prefilled(
        self, others: Sequence[Pictured], pictures: Sequence[VisualTokens]
    ) -> tuple[list[Prefix], int]:
        found = [self.prefixes.get("neighbours", o.image_digest, o.grid) for o in others]
        kept = sum(prefix.opening.length for prefix in found if prefix is not None)
        missing = [index for index, prefix in enumerate(found) if prefix is None]
        read = self.model.prefill([pictures[index] for index in missing])
        for index, prefix in zip(missing, read, strict=True):
            found[index] = prefix
            self.prefixes.put("neighbours", others[index].image_digest, prefix)
        return [prefix for prefix in found if prefix is not None], kept
