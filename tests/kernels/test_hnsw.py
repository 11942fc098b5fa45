"""The graph kernel against its naive twin, and what no damage to the arrays can bring about."""

from __future__ import annotations

from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config
from numpy.typing import NDArray

from meiqa.kernels.graph import Graph, check_graph
from meiqa.kernels.hnsw import search_graph, workspace
from tests import naive

Keys = NDArray[np.float16]
LARGEST = 300 if config.DISABLE_JIT else 3001
SIZES = [1, 2, 3, 7, 97]
SIZES += [pytest.param(LARGEST, marks=pytest.mark.slow)]  # type: ignore[list-item]


def random_keys(count: int, width: int, seed: int = 0) -> Keys:
    keys = np.random.default_rng(seed).standard_normal((count, width))
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float16)


def linked(keys: Keys, seed: int = 0, degree: int = 8) -> Graph:
    """Link each key to its nearest ones and to some at random; a few rows have upper levels."""
    random = np.random.default_rng(seed)
    count = len(keys)
    wide = keys.astype(np.float32)
    links = np.full((count, degree), -1, np.int32)
    for row, cosines in enumerate(wide @ wide.T):
        near = np.argsort(-cosines, kind="stable")[: degree // 2]
        far = random.integers(count, size=random.integers(degree - len(near) + 1))
        links[row, : len(near) + len(far)] = np.append(near, far)
    heights = np.minimum(random.geometric(0.7, count) - 1, 4)
    offsets = np.append(0, np.cumsum(heights)).astype(np.int32)
    upper = np.full((offsets[-1], degree // 2), -1, np.int32)
    for level in range(4):
        tall = np.flatnonzero(heights > level)
        for row in tall:
            some = random.choice(tall, random.integers(degree // 2 + 1))
            upper[offsets[row] + level, : len(some)] = some
    peaks = np.abs(wide).max(axis=1, initial=0.0)
    scales = (peaks / np.float32(127)).astype(np.float32)
    levels = np.rint(wide / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    entry = np.array([np.argmax(heights) if count else -1], np.int32)
    return Graph(keys.view(np.uint16), levels, scales, links, offsets, upper, entry)


def random_queries(count: int, width: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def assert_as_naive(
    graph: Graph,
    queries: NDArray[np.float32],
    count: int,
    eligible: NDArray[np.bool_] | None,
    effort: int,
) -> None:
    expected = [naive.hnsw_search(graph, query, count, eligible, effort) for query in queries]
    found = [search_graph(graph, query, count, eligible, effort).tolist() for query in queries]
    assert found == expected


@pytest.mark.parametrize("count", [0, 1, 5, 40])
@pytest.mark.parametrize("width", [1, 3, 16, 33])
@pytest.mark.parametrize("rows", SIZES)
def test_agrees_with_the_naive_twin(rows: int, width: int, count: int) -> None:
    graph = linked(random_keys(rows, width))
    check_graph(graph)
    for effort in (1, 9):
        assert_as_naive(graph, random_queries(3, width), count, None, effort)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("rows", SIZES)
def test_agrees_with_the_naive_twin_under_filters(rows: int, share: float) -> None:
    graph = linked(random_keys(rows, 7))
    eligible = np.random.default_rng(2).uniform(size=rows) < share
    for count, effort in ((1, 1), (4, 11)):
        assert_as_naive(graph, random_queries(3, 7), count, eligible, effort)
        found = search_graph(graph, random_queries(1, 7)[0], count, eligible, effort)
        assert eligible[found].all()
        assert len(found) == min(count, eligible.sum())


def test_walks_through_a_row_that_may_not_be_returned() -> None:
    """A chain: row 0 is the entry, and each row leads to the next only."""
    angles = np.linspace(0.0, 3.0, 200)
    keys = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    graph = linked(keys)
    links = np.full((200, 1), -1, np.int32)
    links[:-1, 0] = np.arange(1, 200)
    chain = graph._replace(
        links=links,
        upper_offsets=np.zeros(201, np.int32),
        upper_links=np.empty((0, 4), np.int32),
        entry=np.zeros(1, np.int32),
    )
    eligible = np.ones(200, bool)
    eligible[50:60] = False
    query = keys[57].astype(np.float32)
    found = search_graph(chain, query, 3, eligible, 3)
    assert set(found.tolist()) == {60, 61, 62}
    assert found.tolist() == naive.hnsw_search(chain, query, 3, eligible, 3)


def test_ties_go_to_the_smaller_row() -> None:
    random = np.random.default_rng(3)
    few = random.integers(-1, 2, (9, 5)).astype(np.float16)
    keys = few[random.integers(9, size=200)]
    graph = linked(keys)
    queries = random.integers(-1, 2, (5, 5)).astype(np.float32)
    for effort in (1, 20, 200):
        assert_as_naive(graph, queries, 20, None, effort)
    same = linked(np.ones((150, 3), np.float16))
    assert search_graph(same, np.ones(3, np.float32), 5, None, 150).tolist() == [0, 1, 2, 3, 4]


def test_a_query_of_zeros_and_keys_of_zeros_have_cosine_zero() -> None:
    graph = linked(random_keys(97, 3))
    zeros = np.zeros((1, 3), np.float32)
    assert search_graph(graph, zeros[0], 4, None, 1).tolist() == [0, 1, 2, 3]
    assert_as_naive(linked(np.zeros((97, 3), np.float16)), zeros + 1, 4, None, 1)


def test_extreme_values_keep_their_order() -> None:
    keys = random_keys(300, 9)
    keys[:100] *= np.float16(6e-5)  # subnormal elements
    keys[100:200] *= np.float16(6e4)
    graph = linked(keys)
    for magnitude in (1e-38, 1.0, 1e38):
        queries = random_queries(3, 9) * np.float32(magnitude / 4)
        assert_as_naive(graph, queries, 7, None, 8)


def test_wide_rows_do_not_overflow() -> None:
    """The twin sums in int64."""
    keys = np.full((20, 4097), 0.5, np.float16)
    keys[3] = -0.5
    assert_as_naive(linked(keys), np.outer([1, -1], np.ones(4097)).astype(np.float32), 3, None, 1)


def test_an_empty_graph_has_no_neighbours() -> None:
    graph = linked(np.empty((0, 3), np.float16))
    check_graph(graph)
    assert search_graph(graph, np.ones(3, np.float32), 4, None, 8).tolist() == []


def test_a_workspace_serves_many_searches() -> None:
    graph = linked(random_keys(97, 3))
    work = workspace(graph)
    for query in random_queries(600, 3):  # more than there are marks
        expected = search_graph(graph, query, 3, None, 4)
        assert search_graph(graph, query, 3, None, 4, work).tolist() == expected.tolist()


@pytest.mark.slow
def test_threads_with_their_own_workspaces_agree() -> None:
    graph = linked(random_keys(LARGEST, 16))
    queries = random_queries(20, 16)
    expected = [search_graph(graph, query, 5, None, 20).tolist() for query in queries]
    found: dict[int, list[list[int]]] = {}

    def search(thread: int) -> None:
        found[thread] = [search_graph(graph, query, 5, None, 20).tolist() for query in queries]

    threads = [Thread(target=search, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[thread] for thread in range(4)] == [expected] * 4


words = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-3, 130), st.sampled_from([-1, 0, 96, 97, 98])
)


@pytest.mark.slow
@settings(max_examples=20 if config.DISABLE_JIT else 300, deadline=None)
@given(data=st.data())
def test_garbage_in_any_array_is_never_followed_outside(data: st.DataObject) -> None:
    graph = linked(random_keys(97, 5))
    names = data.draw(st.sets(st.sampled_from(Graph._fields), min_size=1))
    for name in sorted(names):
        array = getattr(graph, name)
        seed = data.draw(st.integers(0, 2**32 - 1))
        garbage = np.random.default_rng(seed).bytes(array.nbytes)
        damaged = np.frombuffer(garbage, array.dtype).reshape(array.shape).copy()
        if array.dtype == np.int32:
            for at in range(min(array.size, 6)):
                damaged.flat[at * array.size // 6] = data.draw(words)
        graph = graph._replace(**{name: damaged})
    eligible = np.arange(97) % 3 > 0 if data.draw(st.booleans()) else None
    available = 97 if eligible is None else int(eligible.sum())
    with np.errstate(all="ignore"):
        found = search_graph(graph, random_queries(1, 5)[0], 4, eligible, 4)
    assert len(found) == min(4, available)
    assert len(set(found.tolist())) == len(found)
    assert ((found >= 0) & (found < 97)).all()
    assert eligible is None or eligible[found].all()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("keys", np.zeros(5, np.uint16)),
        ("keys", np.zeros((97, 0), np.uint16)),
        ("levels", np.zeros((97, 4), np.int8)),
        ("levels", np.zeros((97, 3), np.uint8)),
        ("levels", np.zeros((3, 97), np.int8).T),
        ("scales", np.zeros(96, np.float32)),
        ("links", np.zeros((96, 8), np.int32)),
        ("links", np.zeros((97, 8), np.int64)),
        ("upper_offsets", np.zeros(97, np.int32)),
        ("upper_links", np.zeros(8, np.int32)),
        ("entry", np.zeros(0, np.int32)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name: str, wrong: NDArray[np.generic]) -> None:
    graph = linked(random_keys(97, 3))
    with pytest.raises(ValueError, match=r"must be|kernel"):
        check_graph(graph._replace(**{name: wrong}))


def test_bad_arguments_are_refused() -> None:
    graph = linked(random_keys(97, 3))
    query = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="count"):
        search_graph(graph, query, -1, None, 4)
    with pytest.raises(ValueError, match="effort"):
        search_graph(graph, query, 1, None, 0)
    with pytest.raises(ValueError, match="width"):
        search_graph(graph, np.ones(4, np.float32), 1, None, 4)
    with pytest.raises(ValueError, match="float32"):
        search_graph(graph, np.ones(3), 1, None, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        search_graph(graph, np.array([1, np.nan, 1], np.float32), 1, None, 4)
    with pytest.raises(ValueError, match="contiguous"):
        search_graph(graph, np.ones(6, np.float32)[::2], 1, None, 4)
    with pytest.raises(ValueError, match="eligible"):
        search_graph(graph, query, 1, np.ones(96, bool), 4)
    smaller = workspace(linked(random_keys(96, 3)))
    with pytest.raises(ValueError, match="smaller graph"):
        search_graph(graph, query, 5, None, 4, smaller)
