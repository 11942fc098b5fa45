"""Nearest keys among many: flat search, the frozen graph and three libraries on the same vectors.

`python -m benchmarks.memory` prints one row per size and index: recall of the true
neighbours, the time of one query, the time to open the saved index in a fresh process and what is
resident after that. Each approximate index searches with the least effort (ef) that reaches the
recall asked for, so that times are compared at the same recall; all graphs have M = 16 and are
built with ef = 200. Flat search is one BLAS product, with as many threads as NumPy gives it; the
others answer with one thread. The frozen index also says which effort it measured when it was made,
and what that finds. A second table is about whole memories of as many anchors
(`benchmarks.opening`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.opening import bench_opening
from benchmarks.processes import asked_afresh, resident_kb, say
from benchmarks.vectors import clustered_vectors
from meiqa.evaluation.measuring import run_on
from meiqa.memory.index import RECALL, FrozenIndex, build_graph, freeze, true_neighbours
from meiqa.memory.segment import Segment, write_segment

__all__ = ["bench_memory", "main", "table_text"]

Floats = NDArray[np.float32]
Keys = NDArray[np.float16]
Rows = NDArray[np.int64]
Search = Callable[[Floats, int, int], Rows]

SIZES = (1_000, 10_000, 100_000, 1_000_000)
CROSSOVER_SIZES = (500, 1_000, 2_000, 3_000, 4_000, 6_000, 8_000, 12_000, 16_000)
_EFFORTS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024)
_WARM_UP = 50
_ROUNDS = 5
# Flat search takes the same time whatever is asked, and much of it.
_FLAT_QUERIES = 100
# Graphs of fewer vectors are built by one thread, so that they are the same in every run.
_THREADS_FROM = 200_000
_NEIGHBOURS, _BUILD_EFFORT = 16, 200


@dataclass(frozen=True)
class Kind:
    """One way to search: how it is saved, and how what was saved is opened.

    Attributes:
        name: As the table shows it.
        package: What has to be installed.
        save: Builds from float16 (N, D) and writes the file.
        open: Opens a file of vectors of a width and gives a search: query (D,), k, effort.
        approximate: Whether effort matters.
    """

    name: str
    package: str
    save: Callable[[Keys, Path], None]
    open: Callable[[Path, int], Search]
    approximate: bool = True


def bench_memory(
    sizes: Sequence[int] = SIZES,
    dims: int = 384,
    k: int = 32,
    queries: int = 1_000,
    seed: int = 0,
    *,
    crossover_sizes: Sequence[int] | None = None,
    indexes: Sequence[str] | None = None,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Compare the indexes on clustered vectors.

    Args:
        sizes: Numbers of vectors.
        dims: Their width.
        k: Neighbours asked for.
        queries: Queries per size; each is timed five times, in turns with the other indexes.
        seed: Of the vectors and queries.
        crossover_sizes: Where flat search and the frozen graph are compared too; None for the
            usual sizes.
        indexes: Which are compared; None for all that are installed.
        directory: Keeps the saved indexes, and uses those it has; None makes a temporary one.

    Returns:
        `rows` of n, index, recall, p50_ms, p95_ms, p99_ms, open_ms, resident_mb, file_mb, effort;
        `measured`, what the frozen indexes say of their own effort; `crossover`; `memories`, the
        rows of `bench_opening`; and what it was run on.
    """
    wanted = [kind for kind in KINDS if indexes is None or kind.name in indexes]
    kinds = [kind for kind in wanted if _installed(kind)]
    sizes_compared = CROSSOVER_SIZES if crossover_sizes is None else crossover_sizes
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    with nullcontext(directory) if directory else tempfile.TemporaryDirectory() as place:
        base = Path(place)
        base.mkdir(parents=True, exist_ok=True)
        for size in sizes:
            data = _Data.draw(size, dims, k, queries, seed)
            paths = _saved(kinds, data, base)
            for row, kind in zip(_measured(kinds, data, paths), kinds, strict=True):
                rows.append({**row, **_opened_afresh(kind, paths[kind.name], dims)})
            if "frozen" in paths:
                measured.append({"n": size, **_own_effort(paths["frozen"], data)})
        crossing = _crossover(sizes_compared, dims, k, queries, seed, base)
        memories = bench_opening(sizes, dims, queries, seed, directory=base)["rows"]
    return {
        "rows": rows,
        "crossover": crossing,
        "measured": measured,
        "memories": memories,
        "absent": [kind.name for kind in wanted if kind not in kinds],
        "settings": {
            **{"dims": dims, "k": k, "queries": queries, "seed": seed, "recall": RECALL},
            **{"warm_up": _WARM_UP, "rounds": _ROUNDS, "flat_queries": _FLAT_QUERIES},
            **{"neighbours": _NEIGHBOURS, "build_effort": _BUILD_EFFORT},
        },
        **run_on("numba", *sorted({kind.package for kind in kinds})),
    }


@dataclass(frozen=True, eq=False)
class _Data:
    keys: Keys
    queries: Floats
    truth: Rows
    seed: int

    @classmethod
    def draw(cls, count: int, dims: int, k: int, queries: int, seed: int) -> _Data:
        keys, asked = clustered_vectors(count, dims, queries, seed)
        return cls(keys, asked, true_neighbours(keys, asked, min(k, count))[0], seed)

    def first(self, queries: int) -> _Data:
        return replace(self, queries=self.queries[:queries], truth=self.truth[:queries])

    @property
    def k(self) -> int:
        return int(self.truth.shape[1])


def _installed(kind: Kind) -> bool:
    return importlib.util.find_spec(_MODULES.get(kind.package, kind.package)) is not None


def _saved(kinds: Sequence[Kind], data: _Data, base: Path) -> dict[str, Path]:
    """Save an index of each kind, unless the directory has it."""
    count, dims = data.keys.shape
    paths = {kind.name: base / f"{count}x{dims}-{data.seed}.{kind.name}" for kind in kinds}
    missing = [kind for kind in kinds if not paths[kind.name].exists()]
    for kind in missing:
        unfinished = paths[kind.name].with_suffix(".partial")
        kind.save(data.keys, unfinished)
        os.replace(unfinished, paths[kind.name])
    return paths


def _measured(
    kinds: Sequence[Kind], data: _Data, paths: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Give recall and times of each kind, measured in turns."""
    count, dims = data.keys.shape
    searches = [kind.open(paths[kind.name], dims) for kind in kinds]
    parts = [data if kind.approximate else data.first(_FLAT_QUERIES) for kind in kinds]
    tuned = [
        _least_effort(search, asked) if kind.approximate else (0, _recall(search, asked, 0))
        for kind, search, asked in zip(kinds, searches, parts, strict=True)
    ]
    times_ns: list[list[int]] = [[] for _ in kinds]
    for _ in range(_ROUNDS):
        for search, asked, (effort, _), times in zip(searches, parts, tuned, times_ns, strict=True):
            for query in asked.queries[:_WARM_UP]:
                search(query, data.k, effort)
            times.extend(_times_ns(search, asked, effort))
    return [
        {
            **{"n": count, "index": kind.name, "recall": round(recall, 4)},
            **{f"p{percent}_ms": _quantile_ms(times, percent) for percent in (50, 95, 99)},
            "effort": effort if kind.approximate else None,
        }
        for kind, (effort, recall), times in zip(kinds, tuned, times_ns, strict=True)
    ]


def _least_effort(search: Search, data: _Data) -> tuple[int, float]:
    """Give the least effort that finds enough true neighbours, or the largest tried; and recall."""
    for effort in _EFFORTS:
        recall = _recall(search, data, effort)
        if recall >= RECALL:
            break
    return effort, recall


def _own_effort(path: Path, data: _Data) -> dict[str, Any]:
    """Give the effort that a frozen index measured of itself, and what it finds of new queries."""
    effort = _frozen_at(path).effort(data.k)
    return {"effort": effort, "recall": round(_recall(_open_frozen(path, 0), data, effort), 4)}


def _recall(search: Search, data: _Data, effort: int) -> float:
    found = [search(query, data.k, effort) for query in data.queries]
    hits = [len(np.intersect1d(rows, true)) for rows, true in zip(found, data.truth, strict=True)]
    return float(np.sum(hits) / data.truth.size)


def _times_ns(search: Search, data: _Data, effort: int) -> list[int]:
    times = []
    for query in data.queries:
        begin = time.perf_counter_ns()
        search(query, data.k, effort)
        times.append(time.perf_counter_ns() - begin)
    return times


def _quantile_ms(times_ns: Sequence[int], percent: float) -> float:
    return round(float(np.percentile(times_ns, percent)) / 1e6, 4)


def _crossover(
    sizes: Sequence[int], dims: int, k: int, queries: int, seed: int, base: Path
) -> dict[str, Any]:
    """Compare flat and frozen search, and give the size from which frozen is always faster."""
    kinds = [kind for kind in KINDS if kind.name in ("flat", "frozen")]
    rows = []
    for size in sorted(sizes):
        data = _Data.draw(size, dims, k, queries, seed)
        flat, frozen = _measured(kinds, data, _saved(kinds, data, base))
        rows.append({"n": size, "flat_ms": flat["p50_ms"], "frozen_ms": frozen["p50_ms"]})
    faster_from = None
    for row in reversed(rows):
        if row["frozen_ms"] >= row["flat_ms"]:
            break
        faster_from = row["n"]
    return {"rows": rows, "frozen_faster_from": faster_from}


def _opened_afresh(kind: Kind, path: Path, dims: int) -> dict[str, float]:
    opened = asked_afresh("benchmarks.memory", "--open", kind.name, path, dims)
    return {**opened, "file_mb": round(path.stat().st_size / 1e6, 3)}


def _open_here(name: str, path: Path, dims: int) -> dict[str, float]:
    """Open an index in this process, after what it imports, and give time and resident memory."""
    kind = next(kind for kind in KINDS if kind.name == name)
    importlib.import_module(_MODULES.get(kind.package, kind.package))
    importlib.import_module("meiqa.kernels.hnsw")
    before_kb = resident_kb()
    begin = time.perf_counter_ns()
    search = kind.open(path, dims)
    open_ns = time.perf_counter_ns() - begin
    after_kb = resident_kb()
    del search
    return {
        "open_ms": round(open_ns / 1e6, 3),
        "resident_mb": round((after_kb - before_kb) * 1024 / 1e6, 3),
    }


def _threads(count: int) -> int:
    return 1 if count < _THREADS_FROM else os.cpu_count() or 1


def _save_flat(keys: Keys, path: Path) -> None:
    keys.astype(np.float32).tofile(path)


def _open_flat(path: Path, dims: int) -> Search:
    keys = np.memmap(path, np.float32, "r").reshape(-1, dims)

    def search(query: Floats, k: int, effort: int) -> Rows:
        cosines = keys @ query
        rows = np.argpartition(cosines, max(len(cosines) - k, 0))[-k:]
        nearest: Rows = rows[np.argsort(-cosines[rows])]
        return nearest

    return search


def _save_hnswlib(keys: Keys, path: Path) -> None:
    graph = build_graph(keys, _threads(len(keys)))
    graph.save_index(str(path))


def _open_hnswlib(path: Path, dims: int) -> Search:
    import hnswlib

    index = hnswlib.Index("ip", dims)
    index.load_index(str(path))

    def search(query: Floats, k: int, effort: int) -> Rows:
        index.set_ef(effort)
        rows: Rows = index.knn_query(query, k, num_threads=1)[0][0]
        return rows

    return search


def _save_frozen(keys: Keys, path: Path) -> None:
    """Freeze the graph that was saved for hnswlib beside it, so that both search the same one."""
    import hnswlib

    saved = path.with_suffix(".hnswlib")
    graph = hnswlib.Index("ip", keys.shape[1])
    if saved.exists():
        graph.load_index(str(saved))
    else:
        graph = build_graph(keys, _threads(len(keys)))
    write_segment(path, {"keys": keys, **freeze(graph, keys)}, {})


def _open_frozen(path: Path, dims: int) -> Search:
    index = _frozen_at(path)

    def search(query: Floats, k: int, effort: int) -> Rows:
        return index.search(query, k, None, effort)

    return search


def _frozen_at(path: Path) -> FrozenIndex:
    arrays = Segment.open(path, verify=False).arrays
    return FrozenIndex.of(arrays, arrays["keys"])


def _save_usearch(keys: Keys, path: Path) -> None:
    usearch = importlib.import_module("usearch.index")
    index = usearch.Index(
        ndim=keys.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=_NEIGHBOURS,
        expansion_add=_BUILD_EFFORT,
    )
    index.add(np.arange(len(keys)), keys.astype(np.float32), threads=_threads(len(keys)))
    index.save(str(path))


def _open_usearch(path: Path, dims: int) -> Search:
    usearch = importlib.import_module("usearch.index")
    index = usearch.Index(ndim=dims, metric="ip", dtype="f16", connectivity=_NEIGHBOURS)
    index.view(str(path))

    def search(query: Floats, k: int, effort: int) -> Rows:
        index.expansion_search = effort
        rows: Rows = index.search(query, k, threads=1).keys.astype(np.int64)
        return rows

    return search


def _save_faiss(keys: Keys, path: Path) -> None:
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(_threads(len(keys)))
    index = faiss.IndexHNSWFlat(keys.shape[1], _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _BUILD_EFFORT
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(path))


def _open_faiss(path: Path, dims: int) -> Search:
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)

    def search(query: Floats, k: int, effort: int) -> Rows:
        index.hnsw.efSearch = effort
        rows: Rows = index.search(query[None], k)[1][0]
        return rows

    return search


KINDS = (
    Kind("flat", "numpy", _save_flat, _open_flat, approximate=False),
    Kind("hnswlib", "hnswlib", _save_hnswlib, _open_hnswlib),
    Kind("frozen", "hnswlib", _save_frozen, _open_frozen),
    Kind("usearch", "usearch", _save_usearch, _open_usearch),
    Kind("faiss", "faiss-cpu", _save_faiss, _open_faiss),
)
_MODULES = {"faiss-cpu": "faiss"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--indexes", nargs="+", choices=[kind.name for kind in KINDS])
    parser.add_argument("--directory", type=Path, help="keeps the saved indexes for the next run")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--open", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.open:
        name, path, dims = given.open
        say(json.dumps(_open_here(name, Path(path), int(dims))))
    else:
        result = bench_memory(
            given.sizes,
            queries=given.queries,
            seed=given.seed,
            indexes=given.indexes,
            directory=given.directory,
        )
        say(json.dumps(result, indent=2) if given.format == "json" else table_text(result))


def table_text(result: Mapping[str, Any]) -> str:
    """Lay out `bench_memory` for people: the indexes, and the whole memories."""
    columns = ("n", "index", "recall", "p50_ms", "p99_ms", "open_ms", "resident_mb", "file_mb")
    whole = ("n", "files_mb", "open_ms", "verified_ms", "resident_share", "retrieve_p50_ms")
    return "\n".join((*_lines(columns, result["rows"]), "", *_lines(whole, result["memories"])))


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    table = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in table) for at in range(len(columns))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    ]


if __name__ == "__main__":
    main()
