"""Opening a whole memory, records included: its time, what is resident then, what readers share.

`python -m benchmarks.opening --sizes N …` writes memories of N synthetic anchors through
`AnchorWriter`: keys of 384 numbers, four visual tokens of 16. Each is opened in fresh processes,
once without looking at every byte (`open_ms`, as a command does that checks each case when it reads
it) and once with `verify` (`verified_ms`, which hashes both files from end to end). Then the times
of retrieving are taken, and four processes retrieve and say what they hold of the mapped segment:
where pages are shared, a process's proportional share (PSS) is a quarter of what is resident in it
(RSS). The files are in the page cache throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import (
    asked_afresh,
    memory_kb,
    reported_together,
    resident_kb,
    say,
    wait_for_go,
)
from benchmarks.vectors import clustered_vectors
from meiqa.evaluation.measuring import run_on
from meiqa.memory import AnchorWriter, Case, MemoryBank, RetrievalPolicy

__all__ = ["bench_opening", "main", "write_synthetic_memory"]

PACKAGE_DIGEST = "0" * 64
_MODULE = "benchmarks.opening"
_OPENINGS, _VERIFIED_OPENINGS = 5, 2
_READERS, _READER_QUERIES = 4, 100
_WARM_UP = 20
_TOKENS, _TOKEN_WIDTH = 4, 16
# Graphs of fewer keys are built by one thread, so that they are the same in every run.
_THREADS_FROM = 200_000


def bench_opening(
    sizes: Sequence[int],
    dims: int = 384,
    queries: int = 1_000,
    seed: int = 0,
    *,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Write, open and read memories of synthetic anchors.

    Args:
        sizes: Numbers of anchors.
        dims: Width of their keys.
        queries: How many retrievals are timed.
        seed: Of keys, tokens and queries.
        directory: Keeps the memories, and uses those it has; one that was being written when the
            benchmark was interrupted is gone on with. None makes a temporary one.

    Returns:
        `rows` of n, files_mb, write_s (None where it was there), open_ms (median of five fresh
        processes), open_max_ms, verified_ms, resident_mb and resident_share (of the files) after
        opening, retrieve_p50_ms, retrieve_p95_ms, retrieve_p99_ms, and rss_mb and pss_mb of four
        readers; and what it was run on.
    """
    with nullcontext(directory) if directory else tempfile.TemporaryDirectory() as place:
        rows = [_row(Path(place), size, dims, queries, seed) for size in sizes]
    return {
        "rows": rows,
        "settings": {
            **{"dims": dims, "tokens": _TOKENS, "token_width": _TOKEN_WIDTH, "queries": queries},
            **{"seed": seed, "openings": _OPENINGS, "verified_openings": _VERIFIED_OPENINGS},
            **{"warm_up": _WARM_UP, "readers": _READERS},
        },
        **run_on("numpy", "numba", "hnswlib"),
    }


def _row(base: Path, count: int, dims: int, queries: int, seed: int) -> dict[str, Any]:
    path = base / f"{count}x{dims}-{seed}.memory"
    asked = path.with_suffix(".queries.npy")
    seconds = None
    if not path.exists() or not asked.exists():
        keys, drawn = clustered_vectors(count, dims, queries, seed)
        np.save(asked, drawn)
        begin = time.perf_counter()
        if not path.exists():
            write_synthetic_memory(path, keys, seed)
            seconds = round(time.perf_counter() - begin, 1)
    files_mb = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    plain = [asked_afresh(_MODULE, "--open", path) for _ in range(_OPENINGS)]
    verified = [asked_afresh(_MODULE, "--verify", path) for _ in range(_VERIFIED_OPENINGS)]
    resident_mb = float(np.median([each["resident_mb"] for each in plain]))
    return {
        **{"n": count, "files_mb": round(files_mb, 3), "write_s": seconds},
        "open_ms": round(float(np.median([each["open_ms"] for each in plain])), 3),
        "open_max_ms": max(each["open_ms"] for each in plain),
        "verified_ms": round(float(np.median([each["open_ms"] for each in verified])), 3),
        "resident_mb": round(resident_mb, 3),
        "resident_share": round(resident_mb / files_mb, 5),
        **asked_afresh(_MODULE, "--retrieve", path, asked),
        **_shared(path, asked),
    }


def write_synthetic_memory(path: Path, keys: NDArray[np.float16], seed: int = 0) -> None:
    """Write a memory with an anchor for each key (N, D); go on with an interrupted one.

    Raises:
        StoreError: the directory is taken or cannot be written.
    """
    random = np.random.default_rng([seed, len(keys)])
    tokens = random.standard_normal((_TOKENS, _TOKEN_WIDTH), np.float32)
    with AnchorWriter(path, PACKAGE_DIGEST, keys.shape[1], _TOKEN_WIDTH, resume=True) as writer:
        for number, key in enumerate(keys):
            name = f"anchor-{number:08d}"
            if name in writer.known_ids:
                continue
            case = Case(
                id=name,
                origin="anchor",
                image_digest=sha256(name.encode()).hexdigest(),
                score=1.0 + 4.0 * (number * 7919 % len(keys)) / len(keys),
                std=0.2,
                summary="The picture is sharp and well exposed, with little noise. Overall good.",
                key=key.astype(np.float32),
                tokens=np.roll(tokens, number % tokens.size),
                grid=(2, 2),
            )
            writer.add(case, provenance="made for a benchmark")
        writer.finish(threads=1 if len(keys) < _THREADS_FROM else os.cpu_count() or 1)


def _shared(path: Path, asked: Path) -> dict[str, list[float]]:
    memory = reported_together(_READERS, _MODULE, "--read", path, asked)
    return {
        f"{name.lower()}_mb": [round(each[name] * 1024 / 1e6, 3) for each in memory]
        for name in ("Rss", "Pss")
    }


def _open_here(path: Path, *, verify: bool) -> dict[str, float]:
    before_kb = resident_kb()
    begin = time.perf_counter_ns()
    with MemoryBank.open(path, package_digest=PACKAGE_DIGEST, verify=verify):
        open_ns = time.perf_counter_ns() - begin
        grown_kb = resident_kb() - before_kb
    return {"open_ms": round(open_ns / 1e6, 3), "resident_mb": round(grown_kb * 1024 / 1e6, 3)}


def _retrieve_here(path: Path, asked: Path) -> dict[str, float]:
    queries = np.load(asked)
    with MemoryBank.open(path, package_digest=PACKAGE_DIGEST) as bank:
        times_ms = _retrieval_ms(bank, queries)[min(_WARM_UP, len(queries) - 1) :]
    return {
        f"retrieve_p{percent}_ms": round(float(np.percentile(times_ms, percent)), 3)
        for percent in (50, 95, 99)
    }


def _read_here(path: Path, asked: Path) -> None:
    """Retrieve, and when the other readers did too, tell what is held of the segment."""
    with MemoryBank.open(path, package_digest=PACKAGE_DIGEST) as bank:
        _retrieval_ms(bank, np.load(asked)[:_READER_QUERIES])
        wait_for_go()
        say(json.dumps(memory_kb("/proc/self/smaps", str(path / "anchors.seg"))))
        wait_for_go()


def _retrieval_ms(bank: MemoryBank, queries: NDArray[np.float32]) -> list[float]:
    """Time what an engine asks for by default, with a new snapshot for each photo."""
    times_ms = []
    for query in queries:
        begin = time.perf_counter_ns()
        bank.snapshot().retrieve(query, RetrievalPolicy(), None)
        times_ms.append((time.perf_counter_ns() - begin) / 1e6)
    return times_ms


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="keeps the memories for the next run")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--verify", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--retrieve", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.open or given.verify:
        opened = _open_here(given.open or given.verify, verify=given.verify is not None)
        say(json.dumps(opened))
    elif given.retrieve:
        say(json.dumps(_retrieve_here(*given.retrieve)))
    elif given.read:
        _read_here(*given.read)
    else:
        sizes, queries = given.sizes, given.queries
        result = bench_opening(sizes, 384, queries, given.seed, directory=given.directory)
        say(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
