"""The frozen graph finds what hnswlib's finds, from a memory map, and refuses damage."""

from __future__ import annotations

import builtins
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, StoreMismatch, UsageError
from meiqa.kernels.hnsw import Graph
from meiqa.memory.encoding import unit_rows
from meiqa.memory.index import FLAT_BELOW, FrozenIndex, build_graph, freeze, index_arrays
from meiqa.memory.segment import Segment, write_segment
from tests import naive

Floats = NDArray[np.float32]


def clustered(count: int, width: int, seed: int = 0) -> Floats:
    """Unit vectors as float16 holds them: the same 40 clusters in 12 dimensions for every seed."""
    fixed, random = np.random.default_rng(99), np.random.default_rng(seed)
    centres = fixed.standard_normal((40, 12))
    carry = fixed.standard_normal((12, width))
    latent = centres[random.integers(40, size=count)]
    latent += 0.7 * random.standard_normal(latent.shape)
    return unit_rows((latent @ carry).astype(np.float32)).astype(np.float16).astype(np.float32)


def frozen(keys: Floats, threads: int = 1) -> FrozenIndex:
    return FrozenIndex.of(freeze(build_graph(keys, threads), keys), keys.astype(np.float16))


def graph_of(arrays: dict[str, NDArray[Any]], keys: Floats) -> Graph:
    halves = keys.astype(np.float16).view(np.uint16)
    return Graph(halves, *(arrays["index_" + name] for name in Graph._fields[1:]))


def exact(keys: Floats, query: Floats, count: int) -> list[int]:
    wide = keys.astype(np.float64)
    cosines = (wide * query).sum(axis=1) / np.sqrt((wide * wide).sum(axis=1))
    order: list[int] = np.lexsort((np.arange(len(keys)), -cosines))[:count].tolist()
    return order


@pytest.mark.parametrize("width", [1, 3, 16, 97])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 97, 1001, 3000])
def test_agrees_with_the_naive_twin(count: int, width: int) -> None:
    keys = clustered(count, width)
    arrays = freeze(build_graph(keys), keys)
    index = FrozenIndex.of(arrays, keys.astype(np.float16))
    index.verify()
    assert len(index) == count
    queries = clustered(3, width, seed=1)
    some = np.random.default_rng(2).uniform(size=count) < 0.6
    for eligible in (None, some, np.zeros(count, bool)):
        expected = [
            naive.hnsw_search(graph_of(arrays, keys), query, 5, eligible, 9) for query in queries
        ]
        for query, rows in zip(queries, expected, strict=True):
            assert index.search(query, 5, eligible, 9).tolist() == rows
        assert index.search_many(queries, 5, eligible, 9).tolist() == expected


def test_duplicates_come_in_the_order_of_their_rows() -> None:
    keys = np.tile(clustered(300, 33), (7, 1))
    arrays = freeze(build_graph(keys), keys)
    index = FrozenIndex.of(arrays, keys.astype(np.float16))
    for query in keys[:10]:
        found = index.search(query, 14, None, 200).tolist()
        assert found == exact(keys, query, 14)
        assert found == naive.hnsw_search(graph_of(arrays, keys), query, 14, None, 200)


@pytest.mark.parametrize("threads", [1, 2])
def test_finds_the_true_neighbours(threads: int) -> None:
    keys = clustered(8000, 97)
    queries = clustered(50, 97, seed=3)
    index = frozen(keys, threads)
    index.verify()
    hits = [
        len({*found.tolist()} & {*exact(keys, query, 32)})
        for query, found in zip(queries, index.search_many(queries, 32, None, 128), strict=True)
    ]
    assert sum(hits) / (50 * 32) >= 0.97


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
def test_filters_keep_recall(share: float) -> None:
    keys = clustered(8000, 33)
    index = frozen(keys)
    eligible = np.random.default_rng(4).uniform(size=8000) < share
    rows = np.flatnonzero(eligible)
    hits = total = 0
    for query in clustered(30, 33, seed=5):
        found = index.search(query, 10, eligible, 96)
        true = rows[exact(keys[rows], query, 10)]
        assert eligible[found].all()
        hits += len(np.intersect1d(found, true))
        total += len(true)
    assert hits >= 0.97 * total


def test_walks_the_links_that_hnswlib_made() -> None:
    keys = clustered(2000, 16)
    graph = build_graph(keys)
    index = FrozenIndex.of(freeze(graph, keys), keys.astype(np.float16))
    graph.set_ef(64)
    queries = clustered(40, 16, seed=6)
    theirs, _ = graph.knn_query(queries, 10, num_threads=1)
    ours = index.search_many(queries, 10, None, 64)
    # Both meet nearly all true neighbours; only int8 against float32 sets them apart.
    same = [len(np.intersect1d(a, b)) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) >= 0.98 * 400


def test_links_are_between_rows_whatever_order_they_were_added_in() -> None:
    keys = clustered(500, 16)
    backwards = hnswlib.Index("ip", 16)
    backwards.init_index(500, M=16, ef_construction=200, random_seed=1)
    for row in reversed(range(500)):
        backwards.add_items(keys[row : row + 1], [row], num_threads=1)
    index = FrozenIndex.of(freeze(backwards, keys), keys.astype(np.float16))
    index.verify()
    hits = sum(
        len({*index.search(query, 10, None, 50).tolist()} & {*exact(keys, query, 10)})
        for query in keys[::10]
    )
    assert hits >= 0.97 * 500


def test_the_same_keys_give_the_same_arrays() -> None:
    keys = clustered(700, 16)
    first, second = (freeze(build_graph(keys), keys) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_few_keys_need_no_index() -> None:
    assert index_arrays(clustered(FLAT_BELOW - 1, 3)) == {}
    arrays = index_arrays(clustered(FLAT_BELOW, 3))
    assert len(arrays["index_links"]) == FLAT_BELOW


def test_searches_a_memory_map_without_copying(tmp_path: Path) -> None:
    keys = clustered(1000, 33)
    arrays = {"keys": keys.astype(np.float16), **freeze(build_graph(keys), keys)}
    write_segment(tmp_path / "a.seg", arrays, {})
    stored = Segment.open(tmp_path / "a.seg").arrays
    index = FrozenIndex.of(stored, stored["keys"])
    for name, array in index._graph._asdict().items():
        original = stored["keys" if name == "keys" else "index_" + name]
        assert np.shares_memory(array, original) or array.size == 0
    in_memory = FrozenIndex.of(arrays, arrays["keys"])
    for query in clustered(5, 33, seed=7):
        expected = in_memory.search(query, 9, None, 40).tolist()
        assert index.search(query, 9, None, 40).tolist() == expected


def test_threads_share_an_index() -> None:
    keys = clustered(3000, 33)
    index = frozen(keys)
    queries = clustered(200, 33, seed=8)
    expected = index.search_many(queries, 5, None, 30).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: index.search(query, 5, None, 30).tolist(), queries))
    assert found == expected


def test_more_can_be_asked_for_than_there_is() -> None:
    index = frozen(clustered(7, 3))
    query = np.ones(3, np.float32)
    assert sorted(index.search(query, 10**12, None, 10**12).tolist()) == list(range(7))
    assert index.search(query, 0, None, 1).tolist() == []


@pytest.mark.parametrize("name", ["levels", "scales", "links", "upper_offsets", "entry"])
def test_missing_and_misshapen_arrays_are_refused(name: str) -> None:
    keys = clustered(97, 3)
    arrays = freeze(build_graph(keys), keys)
    halves = keys.astype(np.float16)
    whole = arrays["index_" + name]
    with pytest.raises(StoreCorrupted, match="does not fit"):
        FrozenIndex.of({**arrays, "index_" + name: whole[:-1]}, halves)
    with pytest.raises(StoreCorrupted, match="does not fit"):
        FrozenIndex.of({**arrays, "index_" + name: whole.astype(np.float64)}, halves)
    del arrays["index_" + name]
    with pytest.raises(StoreCorrupted, match="lacks an array; got no index_" + name):
        FrozenIndex.of(arrays, halves)


def test_keys_of_another_dtype_are_refused() -> None:
    keys = clustered(97, 3)
    with pytest.raises(StoreCorrupted, match="keys"):
        FrozenIndex.of(freeze(build_graph(keys), keys), keys)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("links", (5, 0), 97),
        ("links", (5, 0), -2),
        ("upper_links", (0, 0), 2**31 - 1),
        ("upper_offsets", 0, 1),
        ("upper_offsets", 50, -1),
        ("upper_offsets", -1, 10**6),
        ("entry", 0, 97),
        ("entry", 0, -1),
    ],
)
def test_damaged_links_are_refused_when_verified(name: str, at: Any, value: int) -> None:
    keys = clustered(97, 3)
    arrays = freeze(build_graph(keys), keys)
    damaged = arrays["index_" + name].copy()
    damaged[at] = value
    index = FrozenIndex.of({**arrays, "index_" + name: damaged}, keys.astype(np.float16))
    with pytest.raises(StoreCorrupted):
        index.verify()
    assert len(index.search(np.ones(3, np.float32), 4, None, 4)) == 4


def test_bad_use_is_refused() -> None:
    index = frozen(clustered(97, 3))
    with pytest.raises(StoreMismatch, match="does not fit the index"):
        index.search(np.ones(4, np.float32), 1, None, 8)
    with pytest.raises(StoreMismatch, match="does not fit the index"):
        index.search_many(np.ones((2, 4), np.float32), 1, None, 8)
    with pytest.raises(UsageError, match="finite"):
        index.search(np.full(3, np.inf, np.float32), 1, None, 8)
    with pytest.raises(UsageError, match="eligible"):
        index.search(np.ones(3, np.float32), 1, np.ones(3, bool), 8)
    with pytest.raises(UsageError, match="not finite"):
        build_graph(np.full((2, 3), np.nan, np.float32))


def test_a_missing_hnswlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "hnswlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="needs hnswlib; run `pip install"):
        build_graph(np.eye(3, dtype=np.float32))
