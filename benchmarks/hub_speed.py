"""What sharing costs: pulls of many cases and of few, scoring while one runs, and retrieval.

    python -m benchmarks.hub_speed pulls [--cases 100000]
    python -m benchmarks.hub_speed scoring [--cases 10000]
    python -m benchmarks.hub_speed retrieval [--cases 20000]

A server of this machine is filled with random cases, keys of clusters. `pulls`: they are pulled
into an empty memory, then 100 new ones, several times; once as large as those of
`benchmarks.memory` (384 numbers, four tokens of 16), once as the default package makes them. Given
are seconds, those of them that this process was at work, and how many processes wanted a core.
`scoring`: the default package scores a photo again and again, without and with a pull of so many
cases beside, in turns, until what came is searched through an index. `retrieval`: neighbours are
sought in a memory that was pulled and in one of the same cases that were learned by itself, in
turns. The files are in the page cache throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.conninfo import conninfo_to_dict

from benchmarks.hub_server import Server, serving
from benchmarks.processes import asked_afresh, say
from benchmarks.vectors import clustered_vectors
from meiqa.engine.engine import Engine
from meiqa.engine.scoring import Scorer
from meiqa.evaluation.measuring import made_jpeg, quantiles_ms, run_on
from meiqa.locations import embedded_assets
from meiqa.memory import (
    AnchorWriter,
    ContrastPolicy,
    MemoryBank,
    RetrievalPolicy,
    package_digest_of,
)
from meiqa.memory.database import Identity, Widths
from meiqa.memory.pacing import Pace
from meiqa.memory.replica import Replica, syncing

__all__ = ["bench_hub", "main", "pulls", "retrieval", "scoring"]

_MODULE = "benchmarks.hub_speed"
_DIGEST = sha256(b"a package for hub_speed").hexdigest()
_POLICY = ContrastPolicy(capacity=1_000_000)
_CASES = {"pulls": 100_000, "scoring": 10_000, "retrieval": 20_000}
_FEW, _FEW_TIMES = 100, 5
_ROUNDS, _PHOTOS, _WARM_UP, _NEIGHBOURS = 2, 100, 5, 8
_QUERIES = 1_000
_USUAL_GRID = (8, 8)
_PHOTO = made_jpeg(0)
_COLUMNS = (
    "package, key_kind, origin, image, seq, device, created, base,"
    " score, std, summary, provenance, key, tokens, scales, grid_rows, grid_columns"
)
_SUMMARY = b"The picture is sharp and well exposed, with little noise. Overall good."


def bench_hub(part: str, cases: int) -> dict[str, Any]:
    """Measure one part, with so many cases; see the module."""
    bench = {"pulls": pulls, "scoring": scoring, "retrieval": retrieval}[part]
    with tempfile.TemporaryDirectory(prefix="meiqa-hub-") as place, serving() as server:
        return {part: bench(server, Path(place), cases), **run_on("psycopg")}


def pulls(server: Server, base: Path, cases: int) -> list[dict[str, Any]]:
    """Pull so many cases into empty memories, small ones and usual ones, then a few."""
    rows = []
    for name in ("small", "usual"):
        hub = server.hub()
        fill(hub, *_shape(name), range(cases))
        arguments = ("--hub", hub, "--into", base / name, "--shape", name, "--cases", cases)
        rows.append(asked_afresh(_MODULE, "pulls", *arguments))
        _drop(server, hub)
    return rows


def _shape(name: str) -> tuple[Identity, tuple[int, int]]:
    if name == "small":
        return Identity(_DIGEST, Widths(384, 16)), (2, 2)
    anchors = embedded_assets() / "memory"
    with MemoryBank.open(anchors, package_digest=package_digest_of(anchors)) as bank:
        return bank.identity, _USUAL_GRID


def fill(hub: str, identity: Identity, grid: tuple[int, int], numbers: range) -> None:
    """Put random cases into a hub, by COPY and past its rules, which would take long."""
    keys, _ = clustered_vectors(len(numbers), identity.widths.key, 1, numbers.start)
    with psycopg.connect(hub) as connection:
        connection.execute("ALTER TABLE meiqa.cases DISABLE TRIGGER settle")
        with connection.cursor().copy(
            f"COPY meiqa.cases ({_COLUMNS}) FROM STDIN (FORMAT BINARY)"
        ) as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
            for number, key in zip(numbers, keys, strict=True):
                copy.write(_row(identity, grid, number, key))
            copy.write(b"\xff\xff")
        connection.execute("ALTER TABLE meiqa.cases ENABLE TRIGGER settle")
        connection.execute("SELECT setval('meiqa.seq', %s)", [numbers.stop])


def _row(identity: Identity, grid: tuple[int, int], number: int, key: NDArray[np.float16]) -> bytes:
    draw, tokens = np.random.default_rng(number), grid[0] * grid[1]
    image = sha256(str(number).encode()).hexdigest().encode()
    fields = (
        *(identity.package_digest.encode(), identity.key_kind.encode(), b"contrast", image),
        *(struct.pack(">q", number + 1), b"another", struct.pack(">d", time.time())),
        *(struct.pack(">q", 0), struct.pack(">d", draw.uniform(1, 5)), struct.pack(">d", 0.25)),
        *(_SUMMARY, b"learned", struct.pack(">hh", len(key), 0) + key.astype(">f2").tobytes()),
        draw.integers(-127, 128, tokens * identity.widths.token, np.int8).tobytes(),
        draw.random(tokens, np.float32).tobytes(),
        *(struct.pack(">i", side) for side in grid),
    )
    said = b"".join(struct.pack(">i", len(field)) + field for field in fields)
    return struct.pack(">h", len(fields)) + said


def _empty(path: Path, identity: Identity) -> MemoryBank:
    widths, digest = identity.widths, identity.package_digest
    with AnchorWriter(path, digest, widths.key, widths.token, key_kind=identity.key_kind) as writer:
        writer.finish()
    return MemoryBank.open(path, "rw", package_digest=digest, policy=_POLICY)


def _timed(replica: Replica, count: int) -> float:
    begun = time.perf_counter()
    done = replica.sync()
    assert (done.pulled, done.refused) == (count, []), done
    return time.perf_counter() - begun


def _pulled(hub: str, path: Path, name: str, cases: int) -> dict[str, Any]:
    """Pull many cases, then a few, several times."""
    identity, grid = _shape(name)
    replica, few_s = Replica(_empty(path, identity), hub, "here"), []
    begun_s = time.process_time()
    first_s = _timed(replica, cases)
    work_s, load = time.process_time() - begun_s, os.getloadavg()[0]
    for number in range(_FEW_TIMES):
        start = cases + number * _FEW
        fill(hub, identity, grid, range(start, start + _FEW))
        few_s.append(_timed(replica, _FEW))
    return {
        **{"key": identity.widths.key, "tokens": grid[0] * grid[1]},
        **{"token_width": identity.widths.token, "cases": cases, "first_s": round(first_s, 1)},
        **{"first_work_s": round(work_s, 1), "load": round(load, 1)},
        **{"few": _FEW, "few_s": [round(each, 3) for each in few_s]},
    }


def _drop(server: Server, hub: str) -> None:
    """Give the room of a hub back."""
    name = conninfo_to_dict(hub)["dbname"]
    with psycopg.connect(server.address, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def scoring(server: Server, base: Path, cases: int) -> dict[str, Any]:
    """Score one photo after the other, without and with a pull beside, in turns."""
    with Engine.open(learn=False) as engine:
        return _beside(server, base, engine, cases)


def _beside(server: Server, base: Path, engine: Engine, cases: int) -> dict[str, Any]:
    hub, identity = server.hub(), engine.memory.identity
    fill(hub, identity, _USUAL_GRID, range(cases))
    times: dict[str, list[float]] = {"without": [], "with": []}
    pulls_s = []
    anchors = embedded_assets() / "memory"
    for number in range(_ROUNDS):
        path, digest = base / f"scoring-{number}", identity.package_digest
        with MemoryBank(anchors, path, "rw", package_digest=digest, policy=_POLICY) as bank:
            follower = Engine(Scorer(engine.model, bank, RetrievalPolicy(k=_NEIGHBOURS)))
            for _ in range(_WARM_UP):
                _score_ms(follower)
            times["without"] += [_score_ms(follower) for _ in range(_PHOTOS)]
            begun = time.perf_counter()
            with syncing(bank, hub, "here", every_s=1e6):
                # The pull is over when what came is searched through an index.
                while bank.snapshot().contrast.version.index is None:
                    times["with"].append(_score_ms(follower))
            pulls_s.append(round(time.perf_counter() - begun, 1))
    without, beside = (quantiles_ms(times[name]) for name in ("without", "with"))
    ratio = round(beside["p99_ms"] / without["p99_ms"], 3)
    return {
        **{"cases": cases, "k": _NEIGHBOURS, "pulls_s": pulls_s},
        **{"without": without, "with": beside, "p99_ratio": ratio},
    }


def _score_ms(engine: Engine) -> float:
    engine.forget_photos()
    begun = time.perf_counter()
    engine.score(_PHOTO, learn=False)
    return (time.perf_counter() - begun) * 1e3


def retrieval(server: Server, base: Path, cases: int) -> dict[str, Any]:
    """Seek neighbours in a memory of others' cases and in one of the same as its own, in turns."""
    hub, (identity, grid) = server.hub(), _shape("small")
    fill(hub, identity, grid, range(cases))
    _, queries = clustered_vectors(cases, identity.widths.key, _QUERIES, 0)
    times_ms: dict[str, list[float]] = {"mirrored": [], "own": []}
    with _empty(base / "mirrored", identity) as mirrored, _empty(base / "own", identity) as own:
        Replica(mirrored, hub, "here").sync()
        mirrored.compact()
        entries = mirrored.snapshot().contrast.all_entries()
        own.absorb(
            "contrast", (replace(e, record=replace(e.record, device="")) for e in entries), Pace()
        )
        own.compact()
        for query in queries:
            for name, bank in (("mirrored", mirrored), ("own", own)):
                begun = time.perf_counter()
                found = bank.snapshot().retrieve(query, RetrievalPolicy(), None)
                times_ms[name].append((time.perf_counter() - begun) * 1e3)
                assert len(found) == RetrievalPolicy().k
    of = {name: quantiles_ms(each[_QUERIES // 10 :]) for name, each in times_ms.items()}
    ratio = round(of["mirrored"]["p50_ms"] / of["own"]["p50_ms"], 3)
    return {"cases": cases, **of, "p50_ratio": ratio}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument("part", choices=_CASES)
    parser.add_argument("--cases", type=int, help="in the hub (default: as the module says)")
    parser.add_argument("--hub", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.hub:
        say(json.dumps(_pulled(given.hub, given.into, given.shape, given.cases)))
        os._exit(0)  # the index that is being built in the background is not waited for
    say(json.dumps(bench_hub(given.part, given.cases or _CASES[given.part]), indent=2))


if __name__ == "__main__":
    main()
