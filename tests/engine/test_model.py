"""Prefixes are kept by content: what is used last stays, and both bounds hold."""

from __future__ import annotations

import copy
import math
import threading

import numpy as np
import pytest

from meiqa.engine.comparing import (
    MOST_AT_ONCE,
    NEIGHBOUR_CACHE_BYTES,
    PHOTO_CACHE_BYTES,
    PrefixCache,
    held_bytes,
)
from meiqa.engine.engine import Engine
from meiqa.engine.images import token_grid
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.model import Prefix, VisualTokens
from meiqa.engine.runtime.decoder import KeyValues


def prefix(number: int, nbytes: int = 40, grid: tuple[int, int] = (2, 3)) -> Prefix:
    """A prefix of so many bytes, all but four of them keys and values."""
    array = np.full((1, 1, 1, (nbytes - 4) // 4, 1), number, np.float32)
    tokens = VisualTokens(np.zeros((1, 1), np.float32), grid)
    opening = KeyValues(array, array.shape[3])
    made = Prefix(tokens, opening, opening, opening.length)
    assert held_bytes(made) == nbytes
    return made


def kept(cache: PrefixCache, names: str, grid: tuple[int, int] = (2, 3)) -> str:
    """Those of some names that are in the cache."""
    return "".join(name for name in names if cache.get("photos", name, grid))


def filled(names: str, photo_bytes: int = 120, neighbour_bytes: int = 0) -> PrefixCache:
    cache = PrefixCache(photo_bytes, neighbour_bytes)
    for number, name in enumerate(names):
        cache.put("photos", name, prefix(number))
    return cache


def test_the_least_recently_used_goes_first() -> None:
    cache = filled("abc")
    assert cache.get("photos", "a", (2, 3)) is not None
    cache.put("photos", "d", prefix(3))
    assert kept(cache, "abcd") == "acd"
    assert cache.state()["photos"].used_bytes == 120


def test_a_large_one_drops_as_many_as_it_needs() -> None:
    cache = filled("abc")
    cache.put("photos", "d", prefix(3, 80))
    assert kept(cache, "abcd") == "cd"
    assert cache.state()["photos"].used_bytes == 120


def test_one_above_the_limit_is_not_kept_and_drops_nothing() -> None:
    cache = filled("a")
    cache.put("photos", "b", prefix(1, 124))
    assert kept(cache, "ab") == "a"


def test_replacing_one_counts_its_bytes_once() -> None:
    cache = filled("a")
    cache.put("photos", "a", prefix(1, 80))
    newest = prefix(2, 20)
    cache.put("photos", "a", newest)
    assert cache.state()["photos"].used_bytes == 20
    assert cache.get("photos", "a", (2, 3)) is newest


def test_every_part_of_the_key_counts() -> None:
    cache = filled("a")
    assert cache.get("photos", "b", (2, 3)) is None
    assert cache.get("photos", "a", (3, 2)) is None
    state = cache.state()["photos"]
    assert (state.hits, state.misses) == (0, 2)


def test_the_same_pixels_on_two_grids_are_two() -> None:
    cache = filled("a")
    cache.put("photos", "a", prefix(1, grid=(3, 2)))
    assert kept(cache, "a", (2, 3)) == kept(cache, "a", (3, 2)) == "a"


def test_photos_and_neighbours_do_not_crowd_each_other_out() -> None:
    cache = filled("ab", photo_bytes=80, neighbour_bytes=40)
    for number, name in enumerate("nop"):
        cache.put("neighbours", name, prefix(number))
    assert kept(cache, "abnop") == "abp"
    state = cache.state()
    assert (state["photos"].used_bytes, state["photos"].limit_bytes) == (80, 80)
    assert (state["neighbours"].used_bytes, state["neighbours"].limit_bytes) == (40, 40)


def test_either_is_found_by_both_and_counts_for_who_asks() -> None:
    cache = filled("a", neighbour_bytes=40)
    cache.put("neighbours", "n", prefix(1))
    for name in "anx":
        cache.get("neighbours", name, (2, 3))
    assert cache.get("photos", "n", (2, 3)) is not None
    state = cache.state()
    assert (state["neighbours"].hits, state["neighbours"].misses) == (2, 1)
    assert (state["photos"].hits, state["photos"].misses) == (1, 0)


def test_one_part_is_forgotten() -> None:
    cache = filled("ab", neighbour_bytes=40)
    cache.put("neighbours", "n", prefix(1))
    cache.forget("photos")
    assert kept(cache, "abn") == "n"
    assert cache.state()["photos"].used_bytes == 0


@pytest.mark.parametrize("threads", [4])
def test_threads_keep_the_books_straight(threads: int) -> None:
    cache = PrefixCache(400, 200)
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(1000):
            number = int(random.integers(40))
            found = cache.get("photos", str(number), (2, 3))
            if found is not None and found.key_values.array[0, 0, 0, 0, 0] != number:
                wrong.append(number)
            role = "photos" if random.integers(2) else "neighbours"
            cache.put(role, str(number), prefix(number, 4 * int(random.integers(3, 30))))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    state = cache.state()
    assert state["photos"].hits + state["photos"].misses == threads * 1000
    assert 0 < state["photos"].used_bytes <= 400
    assert 0 < state["neighbours"].used_bytes <= 200
    cache.forget("neighbours")
    left = [cache.get("photos", str(number), (2, 3)) for number in range(40)]
    assert sum(held_bytes(each) for each in left if each) == state["photos"].used_bytes


@pytest.mark.parametrize(
    ("prefix_bytes", "memory", "photos", "neighbours"),
    [
        (400_000, 8 << 30, PHOTO_CACHE_BYTES, NEIGHBOUR_CACHE_BYTES),  # the default model's
        (20 << 20, 16 << 30, 80 << 20, 800 << 20),
        (99 << 20, 8 << 30, (1 << 30) // 10, 1 << 30),  # as far as there is memory
        (99 << 20, 64 << 20, PHOTO_CACHE_BYTES, NEIGHBOUR_CACHE_BYTES),
    ],
)
def test_the_cache_holds_the_neighbours_of_a_photo_where_there_is_memory(
    prefix_bytes: int, memory: int, photos: int, neighbours: int
) -> None:
    cache = PrefixCache.holding(prefix_bytes, memory)
    assert cache.state()["photos"].limit_bytes == photos
    assert cache.state()["neighbours"].limit_bytes == neighbours
    assert 1 <= cache.at_once(prefix_bytes) <= MOST_AT_ONCE
    assert cache.at_once(prefix_bytes) * prefix_bytes <= max(neighbours, prefix_bytes)


def test_the_largest_prefix_is_as_large_as_is_told(engine: Engine) -> None:
    model = engine.model
    side = math.isqrt(model.image.max_pixels) // model.image.cell_pixels * model.image.cell_pixels
    (prefix,) = model.prefill([model.encode(np.zeros((side, side, 3), np.uint8))])
    text = prefix.opening.length - len(prefix.tokens.values)
    told = model.largest_prefix_bytes
    assert told <= held_bytes(prefix) <= told * (1 + 2 * text / len(prefix.tokens.values))


def test_the_largest_prefix_of_a_photo_in_tiles_is_that_of_the_longest(engine: Engine) -> None:
    half, sides = (0.5, 0.5, 0.5), range(1, 7)
    tilings = tuple((rows, columns) for rows in sides for columns in sides)
    model = copy.copy(engine.model)
    square = math.isqrt(model.image.max_pixels) // model.image.cell_pixels
    token_bytes = model.largest_prefix_bytes // square**2  # it keeps no state
    model.image = ImageProcessing(14, 1, 1, 1 << 20, half, half, False, 384, tilings)
    sizes = [(2304, 384), *np.random.default_rng(0).integers(40, 4000, (200, 2)).tolist()]
    tokens = [math.prod(token_grid(size, model.image)) for size in sizes]
    assert model.largest_prefix_bytes == max(tokens) * token_bytes == tokens[0] * token_bytes
    assert tokens[0] > math.prod(token_grid((1024, 1024), model.image))
