"""Time `meiqa bulk` beside `meiqa score --format jsonl`, predict its time, and weigh its store.

    python -m benchmarks.bulk_speed --images DIR [--photos 600] [--rounds 2] [--output FILE]

Both score the same photographs on all cores, by turns, and give no detail; times are of whole
commands, Ray's beginning included. The prediction is that of docs/scale.md, start + photos x ms of
a worker / workers, from one run on 120 other photographs. What Ray's object store holds is asked
ten times a second during one more run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import ENVIRONMENT, module_command
from meiqa import cli
from meiqa.evaluation.measuring import run_on
from meiqa.folders import Selection, gather
from meiqa.locations import embedded_assets
from meiqa.parts import BulkOutput

PILOT = 120
"""Photos of the run from which others are predicted."""


def seconds_of(*command: object) -> float:
    """Run meiqa, and take the time of the whole command."""
    began = time.perf_counter()
    run = subprocess.run(
        module_command("meiqa", *command),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if run.returncode not in (0, 1):
        raise RuntimeError(run.stderr.decode())
    return time.perf_counter() - began


@contextmanager
def watched_store(found: dict[str, Any]) -> Iterator[None]:
    """Note the most bytes that the object store of this process's Ray holds."""
    import ray

    over, peak, asked = threading.Event(), 0.0, 0

    def watch() -> None:
        nonlocal peak, asked
        while not over.wait(0.1):
            if ray.is_initialized():
                whole: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
                free: Any = ray.available_resources()  # type: ignore[no-untyped-call]
                name = "object_store_memory"
                if name in whole and name in free:
                    peak, asked = max(peak, whole[name] - free[name]), asked + 1

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    yield
    over.set()
    watching.join(10)
    found.update(object_store_peak_mb=round(peak / 1e6, 2), object_store_asked=asked)


def measured(images: Path, photos: int, rounds: int) -> dict[str, Any]:
    """Do it, and give the figures."""
    found: dict[str, Any] = {"photos": photos, "run_on": run_on()}
    names = list(Selection(sample=photos + PILOT).of(gather([str(images)]).photos, str))
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="meiqa-speed-") as place:
        pilot, folder, out = (Path(place, name) for name in ("pilot", "photos", "out"))
        for into, part in ((pilot, names[:PILOT]), (folder, names[PILOT:])):
            into.mkdir()
            for name in part:
                shutil.copy(name, into)
        bulk = ("--out", out, "--force")
        memory = ("--memory", embedded_assets() / "memory")
        alone = ("--format", "jsonl", "--no-learn", "--no-detail", *memory)
        seconds_of("bulk", pilot, *bulk)  # warm
        pilot_s = seconds_of("bulk", pilot, *bulk)
        each_s = BulkOutput(str(out), "parquet").report().score_s / PILOT
        start_s = pilot_s - PILOT * each_s / workers
        found["worker_ms"], found["start_s"] = round(1e3 * each_s, 1), round(start_s, 1)
        found["predicted_s"] = round(start_s + photos * each_s / workers, 1)
        times = [
            (seconds_of("score", folder, *alone), seconds_of("bulk", folder, *bulk))
            for _ in range(rounds)
        ]
        with watched_store(found):
            cli.main(["bulk", str(folder), *map(str, bulk)])
    score_s, bulk_s = (sum(each) / rounds for each in zip(*times, strict=True))
    return {
        **found,
        "score_s": [round(one, 1) for one, _ in times],
        "bulk_s": [round(other, 1) for _, other in times],
        "throughput_ratio": round(score_s / bulk_s, 3),
        "throughput_ratio_without_start": round(score_s / (bulk_s - found["start_s"]), 3),
        "prediction_off": round(found["predicted_s"] / bulk_s - 1, 3),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk_speed", description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    text = json.dumps(measured(options.images, options.photos, options.rounds), indent=2) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
