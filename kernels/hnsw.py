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
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from meiqa.kernels.graph import Graph

Queries = NDArray[np.float32]
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
Marks = NDArray[np.uint8]
Links = NDArray[np.int32]
Halves = NDArray[np.uint16]
Coarse = NDArray[np.int16]
Fine = NDArray[np.float64]

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


def _machine_code_can_be_kept() -> bool:
    """Say if Numba finds a writable place for it: NUMBA_CACHE_DIR, beside this file or at home.

    Asked to keep machine code where there is none, it refuses to compile at all.
    """
    try:
        njit(cache=True)(_machine_code_can_be_kept)
    except RuntimeError:
        return False
    return True


_KEPT = _machine_code_can_be_kept()
_kernel = njit(cache=_KEPT, nogil=True, error_model="numpy")


class Workspace(NamedTuple):
    """What one search at a time writes to; may be used again, for graphs of the same size.

    Attributes:
        marks: uint8 ``(N,)``: rows met by the search with the current mark.
        mark: uint8 ``(1,)``: the current mark.
        frontier: int64 ``(N + 1,)``: heap of rows to be expanded, best first.
    """

    marks: Marks
    mark: Marks
    frontier: Rows


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


@_kernel
def _fetch_row_nb(start: int, row: int, row_bytes: int) -> None:
    """Bring a row of an array that starts at an address near."""
    first = start + row * row_bytes
    for offset in range(0, row_bytes, _LINE_BYTES):
        _fetch_nb(first + offset)


@_kernel
def _ordered_nb(score: np.float32, row: int) -> int:
    """Pack score and row into an integer that is larger for a better score or, tied, smaller row.

    IEEE 754 numbers sort like their bits taken as sign and magnitude.
    """
    bits = int(np.float32(score).view(np.int32))
    if bits < 0:
        bits ^= 0x7FFFFFFF
    return bits * (1 << 32) + (0x7FFFFFFF - row)


@_kernel
def _row_nb(ordered: int) -> int:
    return 0x7FFFFFFF - (ordered & 0xFFFFFFFF)


@_kernel
def _push_nb(heap: Rows, size: int, value: int) -> None:
    """Add to a heap of ``size`` values whose smallest is first."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if heap[parent] <= value:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = value


@_kernel
def _replace_first_nb(heap: Rows, size: int, value: int) -> None:
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


@_kernel
def _score_nb(
    levels: NDArray[np.int8], scales: NDArray[np.float32], coarse: Coarse, row: int
) -> int:
    """Give a row's place in the walk's order."""
    product = np.int32(0)
    for i in range(coarse.shape[0]):
        product += np.int32(levels[row, i]) * np.int32(coarse[i])
    return _ordered_nb(np.float32(product) * scales[row], row)


@_kernel
def _cosine_nb(keys: Halves, fine: Fine, products: Fine, squares: Fine, row: int) -> float:
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


@_kernel
def _half_nb(pattern: int) -> float:
    """Decode a finite float16: its bits, moved into a float32, lack the difference in bias."""
    bits = np.int32(pattern)
    moved = np.int32(
        ((bits & np.int32(0x7FFF)) << np.int32(13)) | ((bits & np.int32(0x8000)) << np.int32(16))
    )
    return np.float64(np.int32(moved).view(np.float32)) * _HALF_BIAS


@_kernel
def _prepare_nb(query: Queries, coarse: Coarse, fine: Fine) -> bool:
    """Round the query for walking and scale it to peak 1 for scoring; say if it is not zero."""
    peak = np.float64(np.abs(query).max())
    if peak == 0.0:
        fine[:] = 0.0
        return False
    # Sums of as many products with int8 stay within int32.
    steps = min(32767, (2**31 - 1) // (128 * query.shape[0]))
    for i in range(query.shape[0]):
        fine[i] = np.float64(query[i]) / peak
        coarse[i] = np.int16(np.rint(fine[i] * steps))
    return True


@_kernel
def _descend_nb(graph: Graph, coarse: Coarse) -> int:
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


@_kernel
def _fresh_links_nb(links: Links, marks: Marks, fresh: Links, row: int, mark: int) -> int:
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


@_kernel
def _walk_nb(graph: Graph, work: Workspace, coarse: Coarse, eligible: Mask, effort: int) -> Rows:
    """Expand rows best first until ``effort`` eligible ones are better than all that is left.

    Gives the eligible rows, at most ``effort``. Each row enters the frontier once, a heap of
    negated places in the order.
    """
    # Each use of a tuple's array would count its references: they are taken out once.
    levels, scales, links = graph.levels, graph.scales, graph.links
    marks, frontier = work.marks, work.frontier
    found, fresh = np.empty(effort, np.int64), np.empty(links.shape[1], np.int32)
    levels_at, links_at = levels.ctypes.data, links.ctypes.data
    everything = eligible.shape[0] == 0
    if work.mark[0] == _LAST_MARK:
        marks[:] = 0
        work.mark[0] = 0
    work.mark[0] += np.uint8(1)
    mark = int(work.mark[0])
    start = _descend_nb(graph, coarse)
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
    for j in range(kept):
        found[j] = _row_nb(found[j])
    return found[:kept]


@_kernel
def _nearest_nb(keys: Halves, fine: Fine, candidates: Rows, out: Rows) -> None:
    """Fill ``out`` with the candidates nearest by cosine, nearest first, equal ones by row."""
    products, squares = np.empty(_LANES), np.empty(_LANES)
    cosines = np.empty(out.shape[0])
    keys_at = keys.ctypes.data
    size = 0
    for j in range(candidates.shape[0] + _FETCH_AHEAD):
        if j < candidates.shape[0]:
            _fetch_row_nb(keys_at, candidates[j], 2 * keys.shape[1])
        if j >= _FETCH_AHEAD:
            row = candidates[j - _FETCH_AHEAD]
            cosine = _cosine_nb(keys, fine, products, squares, row)
            size = _insert_nb(cosines, out, size, cosine, row)


@_kernel
def _insert_nb(cosines: Fine, rows: Rows, size: int, cosine: float, row: int) -> int:
    """Put a row in its place among the nearest, of which the last may fall out; give their number.

    Of many candidates few come so far as to move others: that costs less than a heap of them.
    """
    at = size
    while at > 0 and (
        cosine > cosines[at - 1] or (cosine == cosines[at - 1] and row < rows[at - 1])
    ):
        at -= 1
        if at + 1 < rows.shape[0]:
            cosines[at + 1] = cosines[at]
            rows[at + 1] = rows[at]
    if at < rows.shape[0]:
        cosines[at] = cosine
        rows[at] = row
    return size + 1 if size < rows.shape[0] else size


@_kernel
def _search_nb(
    graph: Graph, work: Workspace, query: Queries, eligible: Mask, effort: int, out: Rows
) -> None:
    """Fill ``out`` with the nearest eligible rows, by a walk unless ``effort`` is 0."""
    rows, width = graph.levels.shape
    coarse, fine = np.empty(width, np.int16), np.empty(width, np.float64)
    directed = _prepare_nb(query, coarse, fine)
    candidates = np.empty(0, np.int64)
    if directed and effort > 0:
        candidates = _walk_nb(graph, work, coarse, eligible, effort)
    if candidates.shape[0] < out.shape[0]:
        candidates = np.flatnonzero(eligible) if eligible.shape[0] else np.arange(rows)
    _nearest_nb(graph.keys, fine, candidates, out)


def workspace(graph: Graph) -> Workspace:
    """Allocate what a search writes to."""
    rows = len(graph.levels)
    return Workspace(
        np.zeros(rows, np.uint8),
        np.zeros(1, np.uint8),
        np.empty(rows + 1, np.int64),
    )


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
        work: Made by `workspace` for this graph or a larger one; no other search may use it at
            the same time. None allocates.

    Returns:
        int64 ``(min(count, eligible rows),)``.

    Raises:
        ValueError: a dtype, a shape or a value is outside what is allowed above.
    """
    _check_query(graph, query)
    mask, count, effort = _limited(graph, count, eligible, effort)
    out = np.empty(count, np.int64)
    if count:
        work = work or workspace(graph)
        if min(len(work.marks), len(work.frontier) - 1) < len(graph.levels):
            raise ValueError("the workspace was made for a smaller graph")
        _search_nb(graph, work, query, mask, effort, out)
    return out


def _limited(graph: Graph, count: int, eligible: Mask | None, effort: int) -> tuple[Mask, int, int]:
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


def _check_query(graph: Graph, query: Queries) -> None:
    width = graph.levels.shape[1]
    if query.shape != (width,) or query.dtype != np.float32:
        raise ValueError(f"query must be float32 of width {width}, not {query.shape}")
    if not query.flags.c_contiguous:
        raise ValueError("query must be contiguous")
    if not np.isfinite(query).all():
        raise ValueError("query must be finite")
