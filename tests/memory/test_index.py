"""The frozen graph finds what hnswlib's finds, from a memory map, and refuses damage."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, UsageError
from meiqa.kernels.graph import Graph
from meiqa.memory.cases import unit_rows
from meiqa.memory.index import (
    FLAT_BELOW,
    RECALL,
    FrozenIndex,
    build_graph,
    freeze,
    index_arrays,
    recall_trial,
    true_neighbours,
)
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


def arrays_of(keys: Floats | NDArray[np.float16], threads: int = 1) -> dict[str, NDArray[Any]]:
    stored = keys.astype(np.float16)
    return freeze(build_graph(stored, threads), stored)


def frozen(keys: Floats, threads: int = 1) -> FrozenIndex:
    return FrozenIndex.of(arrays_of(keys, threads), keys.astype(np.float16))


def graph_of(arrays: dict[str, NDArray[Any]], keys: Floats) -> Graph:
    halves = keys.astype(np.float16).view(np.uint16)
    return Graph(halves, *(arrays["index_" + name] for name in Graph._fields[1:]))


def search_many(
    index: FrozenIndex, queries: Floats, count: int, effort: int | None = None
) -> NDArray[np.int64]:
    return np.array([index.search(query, count, None, effort) for query in queries])


def recall(index: FrozenIndex, keys: Floats, queries: Floats, count: int, effort: int) -> float:
    found = search_many(index, queries, count, effort)
    hits = [
        len({*rows.tolist()} & {*exact(keys, query, count)})
        for query, rows in zip(queries, found, strict=True)
    ]
    return sum(hits) / (count * len(queries))


def exact(keys: Floats, query: Floats, count: int) -> list[int]:
    wide = keys.astype(np.float64)
    cosines = (wide * query).sum(axis=1) / np.sqrt((wide * wide).sum(axis=1))
    order: list[int] = np.lexsort((np.arange(len(keys)), -cosines))[:count].tolist()
    return order


@pytest.mark.parametrize("width", [1, 3, 16, 97])
@pytest.mark.parametrize("count", [1, 2, 7, 97, 1001, 3000])
def test_agrees_with_the_naive_twin(count: int, width: int) -> None:
    keys = clustered(count, width)
    arrays = arrays_of(keys)
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


def test_duplicates_come_in_the_order_of_their_rows() -> None:
    keys = np.tile(clustered(300, 33), (7, 1))
    arrays = arrays_of(keys)
    index = FrozenIndex.of(arrays, keys.astype(np.float16))
    for query in keys[:10]:
        found = index.search(query, 14, None, 200).tolist()
        assert found == exact(keys, query, 14)
        assert found == naive.hnsw_search(graph_of(arrays, keys), query, 14, None, 200)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_finds_the_true_neighbours(threads: int) -> None:
    keys = clustered(8000, 97)
    queries = clustered(50, 97, seed=3)
    index = frozen(keys, threads)
    index.verify()
    assert recall(index, keys, queries, 32, 128) >= 0.97


@pytest.mark.slow
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
    stored = keys.astype(np.float16)
    graph = build_graph(stored)
    index = FrozenIndex.of(freeze(graph, stored), stored)
    graph.set_ef(64)
    queries = clustered(40, 16, seed=6)
    theirs, _ = graph.knn_query(queries, 10, num_threads=1)
    ours = search_many(index, queries, 10, 64)
    # Both meet nearly all true neighbours; only int8 against float32 sets them apart.
    same = [len(np.intersect1d(a, b)) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) >= 0.98 * 400


def test_links_are_between_rows_whatever_order_they_were_added_in() -> None:
    keys = clustered(500, 16)
    backwards = hnswlib.Index("ip", 16)
    backwards.init_index(500, M=16, ef_construction=200, random_seed=1)
    for row in reversed(range(500)):
        backwards.add_items(keys[row : row + 1], [row], num_threads=1)
    stored = keys.astype(np.float16)
    index = FrozenIndex.of(freeze(backwards, stored), stored)
    index.verify()
    hits = sum(
        len({*index.search(query, 10, None, 50).tolist()} & {*exact(keys, query, 10)})
        for query in keys[::10]
    )
    assert hits >= 0.97 * 500


def test_the_same_keys_give_the_same_arrays() -> None:
    keys = clustered(700, 16)
    first, second = (arrays_of(keys) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_few_keys_need_no_index() -> None:
    assert index_arrays(clustered(FLAT_BELOW - 1, 3).astype(np.float16)) == {}
    arrays = index_arrays(clustered(FLAT_BELOW, 3).astype(np.float16))
    assert len(arrays["index_links"]) == FLAT_BELOW


def test_searches_a_memory_map_without_copying(tmp_path: Path) -> None:
    keys = clustered(1000, 33)
    arrays = {"keys": keys.astype(np.float16), **arrays_of(keys)}
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
    expected = search_many(index, queries, 5, 30).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: index.search(query, 5, None, 30).tolist(), queries))
    assert found == expected


def test_more_can_be_asked_for_than_there_is() -> None:
    index = frozen(clustered(7, 3))
    query = np.ones(3, np.float32)
    assert sorted(index.search(query, 10**12, None, 10**12).tolist()) == list(range(7))
    assert index.search(query, 0, None, 1).tolist() == []


@pytest.mark.parametrize("name", ["levels", "scales", "links", "upper_offsets", "entry", "effort"])
def test_missing_and_misshapen_arrays_are_refused(name: str) -> None:
    keys = clustered(97, 3)
    arrays = arrays_of(keys)
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
        FrozenIndex.of(arrays_of(keys), keys)


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
        ("effort", 0, 0),
    ],
)
def test_damaged_links_are_refused_when_verified(name: str, at: Any, value: int) -> None:
    keys = clustered(97, 3)
    arrays = arrays_of(keys)
    damaged = arrays["index_" + name].copy()
    damaged[at] = value
    index = FrozenIndex.of({**arrays, "index_" + name: damaged}, keys.astype(np.float16))
    with pytest.raises(StoreCorrupted):
        index.verify()
    assert len(index.search(np.ones(3, np.float32), 4, None, 4)) == 4


def uniform(count: int, width: int, seed: int = 0) -> Floats:
    """Unit vectors that are far from one another, in which a graph leads astray."""
    drawn = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    return unit_rows(drawn).astype(np.float16).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [clustered, uniform])
@pytest.mark.parametrize("rows", [3000, 6000])
def test_the_measured_effort_finds_enough_for_new_queries(
    draw: Callable[[int, int, int], Floats], rows: int
) -> None:
    keys, queries = draw(rows, 24, 0), draw(100, 24, 9)
    index = frozen(keys)
    for count in (8, 32, 96):
        assert recall(index, keys, queries, count, index.effort(count)) >= RECALL - 0.01


@pytest.mark.slow
def test_keys_that_lead_astray_take_more_effort() -> None:
    efforts = [
        frozen(draw(rows, 24)).effort(32)
        for draw, rows in ((clustered, 3000), (uniform, 3000), (uniform, 9000))
    ]
    assert efforts == sorted({*efforts})


def test_the_effort_grows_with_what_is_wanted() -> None:
    arrays = arrays_of(clustered(500, 8))
    keys = clustered(500, 8).astype(np.float16)
    arrays["index_effort"][0] = 100
    index = FrozenIndex.of(arrays, keys)
    assert [index.effort(count) for count in (0, 1, 32, 33, 64)] == [100, 100, 100, 104, 200]


@pytest.mark.slow
def test_a_search_without_an_effort_takes_the_measured_one() -> None:
    keys = uniform(6000, 24)
    index = frozen(keys)
    effort = index.effort(32)
    assert effort < 6000 // 8  # it is no exact search
    queries = uniform(20, 24, 3)
    found = search_many(index, queries, 32)
    assert found.tolist() == search_many(index, queries, 32, effort).tolist()
    assert found.tolist() != search_many(index, queries, 32, 32).tolist()


def test_what_is_taken_out_is_neither_found_nor_walked_through() -> None:
    keys = clustered(2000, 16)
    index = frozen(keys)
    rows = np.array([row for row in range(0, 2000, 5) if row != index.entry])
    eligible = np.ones(2000, bool)
    eligible[rows] = False
    cut = index.without(rows)
    cut.verify()
    for query in keys[rows[:20]]:
        assert eligible[cut.search(query, 10, eligible, 64)].all()
    graph = cut._graph
    assert (graph.links[rows] == -1).all()
    for row in rows:
        assert (graph.upper_links[slice(*graph.upper_offsets[row : row + 2])] == -1).all()
    assert (index._graph.links[rows] >= 0).any(axis=1).all()


def test_equal_keys_count_as_found() -> None:
    """Descriptions repeat; of equal keys any is a true neighbour."""
    keys = np.repeat(clustered(300, 16), 10, axis=0).astype(np.float16)
    shares = recall_trial(FrozenIndex.of(arrays_of(keys), keys), keys, 64, 5)
    assert shares(64).mean() > 0.97


@pytest.mark.slow
def test_where_equal_keys_tear_the_graph_apart_the_effort_makes_up_for_it() -> None:
    """More equal keys than a row has links are linked with each other only."""
    keys = np.repeat(clustered(40, 16), 100, axis=0).astype(np.float16)
    index = FrozenIndex.of(arrays_of(keys), keys)
    shares = recall_trial(index, keys, 64)
    assert shares(64).mean() < 0.8
    assert shares(None).mean() >= RECALL


@pytest.mark.parametrize("rows", [40, 1000])
def test_true_neighbours_are_the_exact_ones(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meiqa.memory.index._CHUNK_ROWS", 97)
    keys = np.tile(clustered(rows // 4, 9), (4, 1))
    queries = clustered(5, 9, seed=2)
    eligible = np.arange(rows) % 3 > 0
    kept = np.flatnonzero(eligible)
    for mask, among in ((None, np.arange(rows)), (eligible, kept)):
        found, cosines = true_neighbours(keys.astype(np.float16), queries, 12, mask)
        for query, row, values in zip(queries, found, cosines, strict=True):
            assert (np.diff(values) <= 0).all()
            best = np.sort((unit_rows(keys[among]).astype(float) * query).sum(axis=1))[::-1][:12]
            np.testing.assert_allclose(values, best, rtol=1e-12)
            assert {*row.tolist()} <= {*among.tolist()}


def test_bad_use_is_refused() -> None:
    index = frozen(clustered(97, 3))
    for shape in ((4,), (2, 3)):
        with pytest.raises(UsageError, match="float32 of width 3"):
            index.search(np.ones(shape, np.float32), 1, None, 8)
    with pytest.raises(UsageError, match="finite"):
        index.search(np.full(3, np.inf, np.float32), 1, None, 8)
    with pytest.raises(UsageError, match="eligible"):
        index.search(np.ones(3, np.float32), 1, np.ones(3, bool), 8)
    with pytest.raises(UsageError, match="not finite"):
        build_graph(np.full((2, 3), np.nan, np.float16))


def test_a_missing_hnswlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "hnswlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="needs hnswlib; pip install"):
        build_graph(np.eye(3, dtype=np.float16))
