"""Search in a frozen HNSW graph, in place over arrays that may be memory-mapped.

The walk is that of Malkov and Yashunin (arXiv 1603.09320, algorithms 2 and 5): down the upper
levels greedily, then best first along level 0. It compares int8 rows with an int16 query, exactly,
in int32; what it finds is scored again in float64 from the float16 keys. Every order is total
(scores, then rows), so that the same arrays give the same answer wherever they are searched.

The arrays are not trusted: each row number read from them is checked before it is followed. A
damaged graph makes for missed neighbours, never for a read outside the arrays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, get_num_threads, njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from meiqa.kernels.graph import Graph

__all__ = ["Workspace", "search_graph", "search_graph_many", "workspace"]

Queries = NDArray[np.float32]
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

_LARGEST_LEVEL = 1 << 15
# Independent sums let the float64 dot product run in vector registers, in one fixed order.
_LANES = 16
_HALF_BIAS = 2.0**112
# Exact search costs `eligible` comparisons, the walk about _STEP_COST for each of the
# effort * rows / eligible steps that it takes until it has met enough eligible rows.
_STEP_COST = 8
_LAST_MARK = 255
_LINE_BYTES = 64
_FETCH_AHEAD = 4
_WORK_DTYPES = (
    *(np.uint8, np.uint8, np.int64, np.int64, np.int32, np.int16),
    *(np.float64, np.float64, np.float64, np.float64, np.int64),
)


class Workspace(NamedTuple):
    """What one search at a time writes to; may be used again, for graphs of the same size.

    Attributes:
        marks: uint8 ``(N,)``: rows met by the search with the current mark.
        mark: uint8 ``(1,)``: the current mark.
        frontier: int64 ``(N + 1,)``: heap of rows to be expanded, best first.
        found: int64 ``(effort,)``: heap of the best eligible rows, worst first.
        fresh: int32 ``(M0,)``: links not met before.
        coarse: int16 ``(D,)`` and fine: float64 ``(D,)``: the query.
        products: float64 ``(16,)`` and squares: float64 ``(16,)``: sums of a dot product.
        cosines: float64 ``(count,)`` and rows: int64 ``(count,)``: heap of the answer, worst first.
    """

    marks: NDArray[np.uint8]
    mark: NDArray[np.uint8]
    frontier: NDArray[np.int64]
    found: NDArray[np.int64]
    fresh: NDArray[np.int32]
    coarse: NDArray[np.int16]
    fine: NDArray[np.float64]
    products: NDArray[np.float64]
    squares: NDArray[np.float64]
    cosines: NDArray[np.float64]
    rows: NDArray[np.int64]


def _fetch(address: int) -> None:
    """Bring a cache line near, early enough that nobody waits for it; never faults."""


def _typed_fetch(context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Give `_fetch` in machine code: LLVM's prefetch, for reading, into all levels of cache."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer, word, word, word]),
            "llvm.prefetch.p0",
        )
        line = builder.inttoptr(arguments[0], pointer)
        builder.call(prefetch, [line, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.intp), emit


_fetch_nb: Any = _fetch if vars(config)["DISABLE_JIT"] else intrinsic(_typed_fetch)


@njit(cache=True, nogil=True, error_model="numpy")
def _fetch_row_nb(start: int, row: int, row_bytes: int) -> None:
    """Bring a row of an array that starts at an address near."""
    first = start + row * row_bytes
    for offset in range(0, row_bytes, _LINE_BYTES):
        _fetch_nb(first + offset)


@njit(cache=True, nogil=True, error_model="numpy")
def _ordered_nb(score: np.float32, row: int) -> int:
    """Pack score and row into an integer that is larger for a better score or, tied, smaller row.

    IEEE 754 numbers sort like their bits taken as sign and magnitude.
    """
    bits = int(np.float32(score).view(np.int32))
    if bits < 0:
        bits ^= 0x7FFFFFFF
    return bits * (1 << 32) + (0x7FFFFFFF - row)


@njit(cache=True, nogil=True, error_model="numpy")
def _row_nb(ordered: int) -> int:
    return 0x7FFFFFFF - (ordered & 0xFFFFFFFF)


@njit(cache=True, nogil=True, error_model="numpy")
def _push_nb(heap: NDArray[np.int64], size: int, value: int) -> None:
    """Add to a heap of ``size`` values whose smallest is first."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if heap[parent] <= value:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = value


@njit(cache=True, nogil=True, error_model="numpy")
def _replace_first_nb(heap: NDArray[np.int64], size: int, value: int) -> None:
    """Put a value in place of the smallest."""
    at = 0
    child = 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if value <= heap[child]:
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = value


@njit(cache=True, nogil=True, error_model="numpy")
def _score_nb(
    levels: NDArray[np.int8], scales: NDArray[np.float32], coarse: NDArray[np.int16], row: int
) -> int:
    """Give a row's place in the walk's order."""
    product = np.int32(0)
    for i in range(coarse.shape[0]):
        product += np.int32(levels[row, i]) * np.int32(coarse[i])
    return _ordered_nb(np.float32(product) * scales[row], row)


@njit(cache=True, nogil=True, error_model="numpy")
def _cosine_nb(
    keys: NDArray[np.uint16],
    fine: NDArray[np.float64],
    products: NDArray[np.float64],
    squares: NDArray[np.float64],
    row: int,
) -> float:
    """Give the cosine between query and row, times the query's length; 0 for a row of zeros."""
    products[:] = 0.0
    squares[:] = 0.0
    width = fine.shape[0]
    whole = width - width % _LANES
    for start in range(0, whole, _LANES):
        for lane in range(_LANES):
            element = _half_nb(keys[row, start + lane])
            products[lane] += element * fine[start + lane]
            squares[lane] += element * element
    for i in range(whole, width):
        element = _half_nb(keys[row, i])
        products[i - whole] += element * fine[i]
        squares[i - whole] += element * element
    product = 0.0
    square = 0.0
    for lane in range(_LANES):
        product += products[lane]
        square += squares[lane]
    return product / math.sqrt(square) if square > 0.0 else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def _half_nb(pattern: int) -> float:
    """Decode a finite float16: its bits, moved into a float32, lack the difference in bias."""
    bits = np.int32(pattern)
    moved = np.int32(
        ((bits & np.int32(0x7FFF)) << np.int32(13)) | ((bits & np.int32(0x8000)) << np.int32(16))
    )
    return np.float64(np.int32(moved).view(np.float32)) * _HALF_BIAS


@njit(cache=True, nogil=True, error_model="numpy")
def _prepare_nb(query: Queries, coarse: NDArray[np.int16], fine: NDArray[np.float64]) -> bool:
    """Round the query for walking and scale it to peak 1 for scoring; say if it is not zero."""
    width = query.shape[0]
    peak = 0.0
    for i in range(width):
        peak = max(peak, abs(np.float64(query[i])))
    if peak == 0.0:
        fine[:] = 0.0
        return False
    # Sums of `width` products with int8 stay within int32.
    steps = min(32767, (2**31 - 1) // (128 * width))
    for i in range(width):
        share = np.float64(query[i]) / peak
        coarse[i] = np.int16(np.rint(share * steps))
        fine[i] = share
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _descend_nb(graph: Graph, coarse: NDArray[np.int16]) -> int:
    """Follow the upper levels towards the query; give the place in order of the row reached.

    Links that lead outside are not followed. Each step improves on the last, so that no circle
    of links holds the walk.
    """
    levels, scales = graph.levels, graph.scales
    offsets, links = graph.upper_offsets, graph.upper_links
    rows = levels.shape[0]
    entry = int(graph.entry[0])
    if not 0 <= entry < rows:
        entry = 0
    best = _score_nb(levels, scales, coarse, entry)
    height = int(offsets[entry + 1]) - int(offsets[entry])
    for level in range(min(height, _LARGEST_LEVEL) - 1, -1, -1):
        moved = True
        while moved:
            moved = False
            row = _row_nb(best)
            at = int(offsets[row]) + level
            end = min(int(offsets[row + 1]), links.shape[0])
            if not 0 <= at < end:
                break
            for j in range(links.shape[1]):
                link = int(links[at, j])
                if not 0 <= link < rows:
                    continue
                score = _score_nb(levels, scales, coarse, link)
                if score > best:
                    best = score
                    moved = True
    return best


@njit(cache=True, nogil=True, error_model="numpy")
def _next_mark_nb(marks: NDArray[np.uint8], mark: NDArray[np.uint8]) -> int:
    """Give a mark that no row bears."""
    if mark[0] == _LAST_MARK:
        marks[:] = 0
        mark[0] = 0
    mark[0] += np.uint8(1)
    return int(mark[0])


@njit(cache=True, nogil=True, error_model="numpy")
def _fresh_links_nb(
    links: NDArray[np.int32],
    marks: NDArray[np.uint8],
    fresh: NDArray[np.int32],
    row: int,
    mark: int,
) -> int:
    """Collect the row's neighbours that were not met before and mark them."""
    rows = links.shape[0]
    count = 0
    for j in range(links.shape[1]):
        link = int(links[row, j])
        if 0 <= link < rows and marks[link] != mark:
            marks[link] = mark
            fresh[count] = link
            count += 1
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _walk_nb(graph: Graph, work: Workspace, start: int, eligible: Mask, effort: int) -> int:
    """Expand rows best first until ``effort`` eligible ones are better than all that is left.

    Leaves their order in ``work.found`` and gives their number. The heap of the frontier, largest
    first, holds negated values; each row enters it once.
    """
    # Each use of a tuple's array would count its references: they are taken out once.
    levels, scales, links = graph.levels, graph.scales, graph.links
    marks, frontier, found = work.marks, work.frontier, work.found
    fresh, coarse = work.fresh, work.coarse
    levels_at, links_at = levels.ctypes.data, links.ctypes.data
    everything = eligible.shape[0] == 0
    mark = _next_mark_nb(marks, work.mark)
    first = _row_nb(start)
    marks[first] = mark
    frontier[0] = -start
    waiting = 1
    kept = 0
    if everything or eligible[first]:
        found[0] = start
        kept = 1
    while waiting > 0:
        best = -frontier[0]
        if kept == effort and best < found[0]:
            break
        waiting -= 1
        _replace_first_nb(frontier, waiting, frontier[waiting])
        met = _fresh_links_nb(links, marks, fresh, _row_nb(best), mark)
        for j in range(met):
            _fetch_row_nb(levels_at, int(fresh[j]), levels.shape[1])
        if waiting > 0:
            _fetch_row_nb(links_at, _row_nb(-frontier[0]), 4 * links.shape[1])
        for j in range(met):
            row = int(fresh[j])
            score = _score_nb(levels, scales, coarse, row)
            if kept == effort and score < found[0]:
                continue
            _push_nb(frontier, waiting, -score)
            waiting += 1
            if not (everything or eligible[row]):
                continue
            if kept < effort:
                _push_nb(found, kept, score)
                kept += 1
            else:
                _replace_first_nb(found, kept, score)
    return kept


@njit(cache=True, nogil=True, error_model="numpy")
def _worse_nb(cosine: float, row: int, other_cosine: float, other_row: int) -> bool:
    return cosine < other_cosine or (cosine == other_cosine and row > other_row)


@njit(cache=True, nogil=True, error_model="numpy")
def _sink_nb(
    cosines: NDArray[np.float64], rows: NDArray[np.int64], size: int, cosine: float, row: int
) -> None:
    """Put a row in place of the answer's worst."""
    at = 0
    child = 1
    while child < size:
        if child + 1 < size and _worse_nb(
            cosines[child + 1], rows[child + 1], cosines[child], rows[child]
        ):
            child += 1
        if not _worse_nb(cosines[child], rows[child], cosine, row):
            break
        cosines[at] = cosines[child]
        rows[at] = rows[child]
        at = child
        child = 2 * at + 1
    cosines[at] = cosine
    rows[at] = row


@njit(cache=True, nogil=True, error_model="numpy")
def _offer_nb(
    cosines: NDArray[np.float64],
    rows: NDArray[np.int64],
    size: int,
    count: int,
    cosine: float,
    row: int,
) -> int:
    """Take a row into the answer of at most ``count`` if it is good enough; give the new size."""
    if size == count:
        if _worse_nb(cosines[0], rows[0], cosine, row):
            _sink_nb(cosines, rows, size, cosine, row)
        return size
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if not _worse_nb(cosine, row, cosines[parent], rows[parent]):
            break
        cosines[at] = cosines[parent]
        rows[at] = rows[parent]
        at = parent
    cosines[at] = cosine
    rows[at] = row
    return size + 1


@njit(cache=True, nogil=True, error_model="numpy")
def _rescore_nb(graph: Graph, work: Workspace, kept: int, count: int) -> int:
    """Make the answer from what the walk found."""
    keys, found = graph.keys, work.found
    fine, products, squares = work.fine, work.products, work.squares
    cosines, rows = work.cosines, work.rows
    keys_at = keys.ctypes.data
    for j in range(min(kept, _FETCH_AHEAD)):
        _fetch_row_nb(keys_at, _row_nb(found[j]), 2 * keys.shape[1])
    size = 0
    for j in range(kept):
        if j + _FETCH_AHEAD < kept:
            _fetch_row_nb(keys_at, _row_nb(found[j + _FETCH_AHEAD]), 2 * keys.shape[1])
        row = _row_nb(found[j])
        cosine = _cosine_nb(keys, fine, products, squares, row)
        size = _offer_nb(cosines, rows, size, count, cosine, row)
    return size


@njit(cache=True, nogil=True, error_model="numpy")
def _exact_nb(graph: Graph, work: Workspace, eligible: Mask, count: int) -> int:
    """Make the answer from every eligible row."""
    keys = graph.keys
    fine, products, squares = work.fine, work.products, work.squares
    cosines, rows = work.cosines, work.rows
    everything = eligible.shape[0] == 0
    size = 0
    for row in range(keys.shape[0]):
        if everything or eligible[row]:
            cosine = _cosine_nb(keys, fine, products, squares, row)
            size = _offer_nb(cosines, rows, size, count, cosine, row)
    return size


@njit(cache=True, nogil=True, error_model="numpy")
def _search_nb(
    graph: Graph, work: Workspace, query: Queries, eligible: Mask, effort: int, out: Rows
) -> None:
    """Fill ``out`` with the nearest eligible rows, by a walk unless ``effort`` is 0."""
    count = out.shape[0]
    kept = 0
    directed = _prepare_nb(query, work.coarse, work.fine)
    if directed and effort > 0:
        start = _descend_nb(graph, work.coarse)
        kept = _walk_nb(graph, work, start, eligible, effort)
    if kept >= count:
        _rescore_nb(graph, work, kept, count)
    else:
        _exact_nb(graph, work, eligible, count)
    cosines, rows = work.cosines, work.rows
    for left in range(count - 1, -1, -1):
        out[left] = rows[0]
        _sink_nb(cosines, rows, left, cosines[left], rows[left])


@njit(cache=True, nogil=True, error_model="numpy")
def _lane_nb(work: Workspace, lane: int) -> Workspace:
    """Give the part of a stack of workspaces that belongs to one thread."""
    return Workspace(
        work.marks[lane],
        work.mark[lane],
        work.frontier[lane],
        work.found[lane],
        work.fresh[lane],
        work.coarse[lane],
        work.fine[lane],
        work.products[lane],
        work.squares[lane],
        work.cosines[lane],
        work.rows[lane],
    )


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _search_many_nb(
    graph: Graph, stack: Workspace, queries: Queries, eligible: Mask, effort: int, out: Rows
) -> None:
    lanes = stack.mark.shape[0]
    for lane in prange(lanes):
        work = _lane_nb(stack, lane)
        for i in range(lane, queries.shape[0], lanes):
            _search_nb(graph, work, queries[i], eligible, effort, out[i])


def workspace(graph: Graph, count: int, effort: int, lanes: tuple[int, ...] = ()) -> Workspace:
    """Allocate what a search for ``count`` rows with at most ``effort`` writes to.

    Args:
        graph: The graph; only its size matters.
        count: Rows asked for.
        effort: The largest effort.
        lanes: ``(T,)`` for `search_graph_many` with T threads.
    """
    marks, mark, *rest = (
        np.empty((*lanes, size), dtype)
        for size, dtype in zip(_work_sizes(graph, count, effort), _WORK_DTYPES, strict=True)
    )
    marks[:] = 0
    mark[:] = 0
    return Workspace(marks, mark, *rest)


def _work_sizes(graph: Graph, count: int, effort: int) -> tuple[int, ...]:
    rows, width = graph.levels.shape
    kept = max(count, effort)
    neighbours = graph.links.shape[1]
    return rows, 1, rows + 1, kept, neighbours, width, width, _LANES, _LANES, count, count


def search_graph(
    graph: Graph,
    query: Queries,
    count: int,
    eligible: Mask | None,
    effort: int,
    work: Workspace | None = None,
) -> Rows:
    """Find the rows nearest to a query by cosine, nearest first, equal ones by row.

    The walk follows the links of rows that are not eligible but returns none of them. Where it
    would cost more than comparing the query with every eligible row (few are eligible, or there
    are few rows), where it meets fewer than ``count`` of them (a damaged or disconnected graph),
    and for a query of zeros, the search is exact instead; so ``count`` rows, or all eligible
    ones if there are fewer, always come back.

    Args:
        graph: As `check_graph` accepts.
        query: float32 ``(D,)``, finite, of any length.
        count: Rows wanted, not negative.
        eligible: bool ``(N,)``: which rows may be returned; None for all.
        effort: How many candidates the walk keeps (ef); at least ``count`` are kept.
        work: Made by `workspace` for this graph, ``count`` and effort, or larger ones; no other
            search may use it at the same time. None allocates.

    Returns:
        int64 ``(min(count, eligible rows),)``.

    Raises:
        ValueError: a dtype, a shape or a value is outside what is allowed above.
    """
    _check_queries(graph, query, 1)
    mask, count, effort = _checked(graph, count, eligible, effort)
    out = np.empty(count, np.int64)
    if count:
        if work is None:
            work = workspace(graph, count, effort)
        _check_workspace(graph, work, count, effort)
        _search_nb(graph, work, query, mask, effort, out)
    return out


def search_graph_many(
    graph: Graph, queries: Queries, count: int, eligible: Mask | None, effort: int
) -> Rows:
    """Find the rows nearest to each of ``(B, D)`` queries, in parallel; each as `search_graph`.

    Returns:
        int64 ``(B, min(count, eligible rows))``.

    Raises:
        ValueError: as `search_graph`.
    """
    _check_queries(graph, queries, 2)
    mask, count, effort = _checked(graph, count, eligible, effort)
    out = np.empty((len(queries), count), np.int64)
    if out.size:
        lanes = min(get_num_threads(), len(queries))
        stack = workspace(graph, count, effort, (lanes,))
        _search_many_nb(graph, stack, queries, mask, effort, out)
    return out


def _checked(graph: Graph, count: int, eligible: Mask | None, effort: int) -> tuple[Mask, int, int]:
    """Give mask (empty for all rows), count and effort (0 to compare every row) of the search."""
    rows = len(graph.levels)
    mask, available = np.empty(0, np.bool_), rows
    if eligible is not None:
        mask, available = np.ascontiguousarray(eligible), int(np.count_nonzero(eligible))
        if mask.dtype != np.bool_ or mask.shape != (rows,):
            raise ValueError(f"eligible must be bool ({rows},), not {mask.dtype} {mask.shape}")
    if count < 0 or effort < 1:
        raise ValueError(f"count must be at least 0 and effort 1, not {count} and {effort}")
    count = min(count, available)
    effort = max(effort, count)
    walks = available * available > _STEP_COST * effort * rows
    return mask, count, effort if walks else 0


def _check_queries(graph: Graph, queries: Queries, dimensions: int) -> None:
    width = graph.levels.shape[1]
    if queries.ndim != dimensions or queries.shape[-1] != width or queries.dtype != np.float32:
        raise ValueError(f"queries must be float32 of width {width}, not {queries.shape}")
    if not queries.flags.c_contiguous:
        raise ValueError("queries must be contiguous")
    if not np.isfinite(queries).all():
        raise ValueError("queries must be finite")


def _check_workspace(graph: Graph, work: Workspace, count: int, effort: int) -> None:
    arrays: tuple[NDArray[Any], ...] = work
    if any(map(operator.lt, map(len, arrays), _work_sizes(graph, count, effort))):
        raise ValueError("the workspace was made for a smaller search")
