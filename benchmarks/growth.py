"""What grows with the number of neighbours, of anchors and of photos in one run.

Neighbours: the comparisons of one photo. Anchors: retrieval from memories of made keys that have
neighbours. Photos: time for each photo of a run, and the peak memory of a process that scores few
and many files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import ENVIRONMENT
from benchmarks.vectors import clustered_vectors
from meiqa.engine.engine import Engine
from meiqa.evaluation.measuring import made_jpeg, photographs_in, quantiles_ms, run_on
from meiqa.memory import AnchorWriter, Case, MemoryBank, RetrievalPolicy

__all__ = ["bench_growth", "main", "table_text"]

NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128)
ANCHORS = (1_000, 10_000, 100_000)
PHOTOS = (1, 2, 4, 8, 16, 32, 64)
FILES = (10, 1_000)
ROUNDS = 5
_KEY_WIDTH, _TOKEN_WIDTH = 384, 8
_QUERIES = 200
_NO_SITE = ("-S",) if sys.flags.no_site else ()  # a child starts as this interpreter did
_PEAK = """
import sys
from pathlib import Path
from benchmarks.processes import peak_kb
from meiqa.engine.engine import Engine
from meiqa.types import Assessment
with Engine.open(memory=sys.argv[2], learn=False) as engine:
    photos = sorted(Path(sys.argv[1]).iterdir())[: int(sys.argv[3])]
    scored = sum(isinstance(each, Assessment) for each in engine.score_many(photos, learn=False))
print(scored, peak_kb())
"""


def bench_growth(
    open_engine: Callable[[], Engine],
    memory: Path,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    anchors: Sequence[int] = ANCHORS,
    photos: Sequence[int] = PHOTOS,
    files: Sequence[int] = FILES,
    images: Path | None = None,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Measure what grows; an empty sequence leaves its part out.

    Args:
        open_engine: Opens an engine; it is closed again.
        memory: The memory that processes of their own score with.
        neighbours: Numbers of neighbours.
        anchors: Numbers of anchors.
        photos: Numbers of photos in a run.
        files: Numbers of files whose peak memory is compared.
        images: A directory of photographs to take these from; made ones of 640 x 480 if it is None.
        rounds: Photos for each number of neighbours, and runs for each number of photos.

    Returns:
        `neighbours`, `anchors` and `photos`, rows each; `peak` with the resident peak of each
        number of files and the `ratio` of the last to the first; and what it was run on.
    """
    by_neighbours, by_photos = [], []
    if neighbours or photos:
        with open_engine() as engine:
            by_neighbours = _neighbour_rows(engine, neighbours, rounds) if neighbours else []
            by_photos = [_photo_row(engine, count, rounds) for count in photos]
    return {
        "neighbours": by_neighbours,
        "anchors": [_anchor_row(count) for count in anchors],
        "photos": by_photos,
        "peak": _peaks(files, memory, images) if files else None,
        "settings": {
            **{"rounds": rounds, "key_width": _KEY_WIDTH, "queries": _QUERIES},
            "images": "made" if images is None else images.name,
        },
        **run_on("numpy", "onnxruntime", "numba", "meiqa"),
    }


def _neighbour_rows(engine: Engine, numbers: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Compare each photo with ever more neighbours, so that its own reading is done once."""
    engine.score(made_jpeg(999), k=max(numbers), learn=False)
    compare: dict[int, list[float]] = {k: [] for k in numbers}
    asked: dict[int, int] = {}
    for turn in range(rounds):
        photo = made_jpeg(turn)
        for k in numbers:
            result = engine.score(photo, k=k, learn=False)
            compare[k].append(result.timings_ms["compare"])
            asked[k] = len(result.neighbours)
    return [{"k": k, "asked": asked[k], **quantiles_ms(compare[k])} for k in numbers]


def _photo_row(engine: Engine, count: int, rounds: int) -> dict[str, Any]:
    times = []
    for turn in range(rounds):
        photos = [made_jpeg(100_000 * count + 1_000 * turn + number) for number in range(count)]
        began = time.perf_counter()
        for _ in engine.score_many(photos, learn=False):
            pass
        times.append(1e3 * (time.perf_counter() - began) / count)
    return {"photos": count, **quantiles_ms(times)}


def _anchor_row(count: int) -> dict[str, Any]:
    """Write a memory of keys that have neighbours and retrieve from it."""
    random = np.random.default_rng(count)
    keys, queries = clustered_vectors(count, _KEY_WIDTH, _QUERIES, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory"
        with AnchorWriter(path, "made", _KEY_WIDTH, _TOKEN_WIDTH) as writer:
            for number, key in enumerate(keys):
                writer.add(_made_case(number, key, random), provenance="made")
            writer.finish()
        began = time.perf_counter()
        with MemoryBank.open(path, "r", package_digest="made") as bank:
            snapshot = bank.snapshot()
            open_ms = 1e3 * (time.perf_counter() - began)
            policy, times = RetrievalPolicy(), []
            for turn, key in enumerate(queries):
                began = time.perf_counter()
                snapshot.retrieve(key, policy, None)
                if turn >= _QUERIES // 10:
                    times.append(1e3 * (time.perf_counter() - began))
    return {"anchors": count, "open_ms": round(open_ms, 3), **quantiles_ms(times)}


def _made_case(number: int, key: NDArray[np.float16], random: np.random.Generator) -> Case:
    return Case(
        id=f"made-{number:07d}",
        origin="anchor",
        image_digest=f"{number:064x}",
        score=float(random.uniform(1, 5)),
        std=0.2,
        summary="",
        key=key.astype(np.float32),
        tokens=random.standard_normal((1, _TOKEN_WIDTH), np.float32),
        grid=(1, 1),
    )


def _peaks(files: Sequence[int], memory: Path, images: Path | None) -> dict[str, Any]:
    """Score few and many files in a process of their own each; the peak of its resident memory."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if images is None:
            for number in range(max(files)):
                (Path(folder) / f"{number:05d}.jpg").write_bytes(made_jpeg(number, (480, 640)))
        else:
            for path in photographs_in(images, max(files)):
                (Path(folder) / Path(str(path)).name).symlink_to(Path(str(path)).resolve())
        run = partial(subprocess.run, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        for count in files:
            command = [sys.executable, *_NO_SITE, "-c", _PEAK, folder, str(memory)]
            scored, peak = run([*command, str(count)]).stdout.split()
            rows.append({"files": int(scored), "peak_mb": round(int(peak) * 1024 / 1e6, 1)})
    return {"rows": rows, "ratio": round(rows[-1]["peak_mb"] / rows[0]["peak_mb"], 3)}


def table_text(result: dict[str, Any]) -> str:
    """Lay out the rows for people."""
    lines = []
    for subject, name in (("neighbours", "k"), ("anchors", "anchors"), ("photos", "photos")):
        if not result[subject]:
            continue
        lines.append(f"{name:>10}{'p50 ms':>12}{'p99 ms':>12}")
        lines += [
            f"{row[name]:10}{row['p50_ms']:12.3f}{row['p99_ms']:12.3f}" for row in result[subject]
        ]
        lines.append("")
    if result["peak"]:
        lines += [f"{r['files']:10} files{r['peak_mb']:10.1f} MB" for r in result["peak"]["rows"]]
        lines.append(f"{'ratio':>16}{result['peak']['ratio']:10.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows."""
    from meiqa.locations import embedded_assets

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--neighbours", type=int, nargs="*", default=NEIGHBOURS)
    parser.add_argument("--anchors", type=int, nargs="*", default=ANCHORS)
    parser.add_argument("--photos", type=int, nargs="*", default=PHOTOS)
    parser.add_argument("--files", type=int, nargs="*", default=FILES)
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", type=Path, default=embedded_assets() / "memory")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    result = bench_growth(
        lambda: Engine.open(memory=options.memory, learn=False),
        options.memory,
        neighbours=options.neighbours,
        anchors=options.anchors,
        photos=options.photos,
        files=options.files,
        images=options.images,
        rounds=options.rounds,
    )
    as_json = options.format == "json"
    sys.stdout.write((json.dumps(result, indent=2) if as_json else table_text(result)) + "\n")


if __name__ == "__main__":
    main()
