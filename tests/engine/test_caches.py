"""The byte-bounded cache: what is used last stays, and the bound holds."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from meiqa.engine.caches import ByteLru, ContentKey


@dataclass(frozen=True)
class Value:
    name: str
    nbytes: int = 10


def key(name: str, grid: tuple[int, int] = (2, 3), package: str = "ab") -> ContentKey:
    return ContentKey(name, grid, package)


def test_the_least_recently_used_goes_first() -> None:
    cache: ByteLru[Value] = ByteLru(30)
    for name in "abc":
        cache.put(key(name), Value(name))
    assert cache.get(key("a")) == Value("a")
    cache.put(key("d"), Value("d"))
    assert [name for name in "abcd" if cache.get(key(name))] == ["a", "c", "d"]
    assert cache.used_bytes == 30


def test_a_large_value_drops_as_many_as_it_needs() -> None:
    cache: ByteLru[Value] = ByteLru(30)
    for name in "abc":
        cache.put(key(name), Value(name))
    cache.put(key("d"), Value("d", 20))
    assert [name for name in "abcd" if cache.get(key(name))] == ["c", "d"]
    assert cache.used_bytes == 30


def test_a_value_above_the_limit_is_not_kept_and_drops_nothing() -> None:
    cache: ByteLru[Value] = ByteLru(30)
    cache.put(key("a"), Value("a"))
    cache.put(key("b"), Value("b", 31))
    assert cache.get(key("b")) is None
    assert cache.get(key("a")) == Value("a")


def test_replacing_a_value_counts_its_bytes_once() -> None:
    cache: ByteLru[Value] = ByteLru(30)
    cache.put(key("a"), Value("old", 20))
    cache.put(key("a"), Value("new", 5))
    assert (len(cache), cache.used_bytes) == (1, 5)
    assert cache.get(key("a")) == Value("new", 5)


def test_every_part_of_the_key_counts() -> None:
    cache: ByteLru[Value] = ByteLru(30)
    cache.put(key("a"), Value("a"))
    for other in (key("b"), key("a", grid=(3, 2)), key("a", package="cd")):
        assert cache.get(other) is None
    assert (cache.hits, cache.misses) == (0, 3)


def test_a_value_is_made_once() -> None:
    cache: ByteLru[Value] = ByteLru(30)
    made = [cache.get_or_make(key("a"), lambda: Value("a")) for _ in range(3)]
    assert made[0] is made[1] is made[2]
    assert (cache.hits, cache.misses) == (2, 1)


@pytest.mark.parametrize("threads", [4])
def test_threads_keep_the_books_straight(threads: int) -> None:
    cache: ByteLru[Value] = ByteLru(100)
    wrong: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(2000):
            name = f"photo {random.integers(40)}"
            found = cache.get(key(name))
            if found is not None and found.name != name:
                wrong.append(name)
            cache.put(key(name), Value(name, int(random.integers(1, 30))))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert cache.hits + cache.misses == threads * 2000
    kept = [cache.get(key(f"photo {number}")) for number in range(40)]
    assert cache.used_bytes == sum(value.nbytes for value in kept if value is not None) <= 100
