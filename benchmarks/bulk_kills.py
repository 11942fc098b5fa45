"""Kill a bulk run on Ray at random until it is through, and compare its rows with `meiqa score`'s.

    python -m benchmarks.bulk_kills [--photos 3000] [--broken 30] [--kills 50] [--output FILE]

Photos are made, some of their files are no photos. Driver, actors and Ray's workers die of SIGKILL;
whenever the run has ended before it was through, it is gone on with. What has to come of it: one
row for each photo, the scores of `meiqa score`, an error for each broken file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.processes import ENVIRONMENT, module_command
from meiqa.locations import embedded_assets

LONGEST_S = 3600.0
_DRIVER_SHARE, _OTHERS_SHARE = 0.2, 0.2
_SPARED = ("Agent", "IDLE")
"""Of Ray's processes: a node dies with its agents, and an idle worker has nothing to lose."""


def make_photos(folder: Path, count: int, broken: int) -> None:
    """Write small photos of noise and ramps, the first ones broken."""
    folder.mkdir(parents=True)
    made = np.random.default_rng(0)
    for number in range(count):
        grain = made.integers(0, 255, (3 + number % 5, 4, 3), np.uint8)
        image = Image.fromarray(grain).resize((96 + number % 64, 72), Image.Resampling.BICUBIC)
        image.save(file := io.BytesIO(), "JPEG", quality=60 + number % 40)
        data = file.getvalue() if number >= broken else file.getvalue()[:number]
        (folder / f"{number:06}.jpg").write_bytes(data)


def processes_below(parent: int) -> Iterator[tuple[int, str]]:
    """Give the processes that descend from one, with their titles."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            parents[int(entry.name)] = (int(status.rpartition(")")[2].split()[1]), title)
    for process, (above, title) in parents.items():
        while above in parents and above != parent:
            above = parents[above][0]
        if above == parent:
            yield process, title


class Killer:
    """Runs a command again and again, and kills it and its Ray until it was left alone once."""

    def __init__(self, command: Sequence[str], kills: int, seed: int, pause_s: float) -> None:
        self._command, self._left, self._pause_s = command, kills, pause_s
        self._random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.runs = 0

    def run(self) -> str:
        """Give what the last run said.

        Raises:
            TimeoutError: it took too long.
        """
        ends = time.monotonic() + LONGEST_S
        while time.monotonic() < ends:
            self.runs += 1
            with subprocess.Popen(
                self._command,
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as driver:
                while driver.poll() is None and self._left and time.monotonic() < ends:
                    time.sleep(self._random.uniform(0.2, 1.8) * self._pause_s)
                    self._kill_one(driver)
                said, _ = driver.communicate(timeout=max(1.0, ends - time.monotonic()))
            if driver.returncode in (0, 1):
                return said
        raise TimeoutError(f"not through after {LONGEST_S:g} s")

    def _kill_one(self, driver: subprocess.Popen[str]) -> None:
        workers = [
            (process, title)
            for process, title in processes_below(driver.pid)
            if title.startswith("ray::") and not any(each in title for each in _SPARED)
        ]
        if driver.poll() is not None or not workers:
            return  # Ray is still beginning
        scoring = [each for each in workers if "MapWorker" in each[1]]
        victim, title = self._random.choice(scoring or workers)
        lot = self._random.random()
        if lot < _OTHERS_SHARE:
            victim, title = self._random.choice(workers)
        elif lot > 1 - _DRIVER_SHARE:
            victim, title = driver.pid, "driver"
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._left -= 1
        self.killed[title.removeprefix("ray::").partition("(")[0].strip()] += 1


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Read all rows as any other program would."""
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def scores_alone(folder: Path, options: Sequence[str]) -> dict[str, float]:
    """Give `meiqa score`'s scores by path, of photos that have one."""
    memory = () if "--memory" in options else ("--memory", str(embedded_assets() / "memory"))
    plain = ("--format", "jsonl", "--no-detail", "--no-learn", *memory)
    asked = ("score", str(folder), *plain, *options)
    run = subprocess.run(
        module_command("meiqa", *asked),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    each = map(json.loads, run.stdout.splitlines())
    return {one["path"]: one["score"] for one in each if "score" in one}


def measured(
    photos: int, broken: int, kills: int, *, seed: int, pause_s: float, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Do it, and give the counts."""
    with tempfile.TemporaryDirectory(prefix="meiqa-kills-") as place:
        folder, out = Path(place, "photos"), Path(place, "out")
        make_photos(folder, photos, broken)
        began = time.monotonic()
        command = module_command("meiqa", "bulk", folder, "--out", out, "--resume", *options)
        killer = Killer(command, kills, seed, pause_s)
        said = killer.run()
        took_s = time.monotonic() - began
        rows, alone = rows_of(out), scores_alone(folder, options)
        ids = Counter(row["id"] for row in rows)
        paths = Counter(row["path"] for row in rows)
        scored = {row["path"]: row["score"] for row in rows if row["error"] is None}
    off = [abs(score - scored.get(path, float("nan"))) for path, score in alone.items()]
    return {
        "photos": photos,
        "broken": broken,
        "killed": dict(killer.killed),
        "kills": killer.killed.total(),
        "runs": killer.runs,
        "rows": len(rows),
        "distinct_ids": len(ids),
        "distinct_paths": len(paths),
        "error_rows": sum(row["error"] is not None for row in rows),
        "scores_compared": len(off),
        "largest_difference": max(off, default=float("nan")),
        "seconds": round(took_s, 1),
        "said": said.splitlines()[-1].partition(": ")[2].partition(": ")[2],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk_kills", description=__doc__)
    parser.add_argument("--photos", type=int, default=3000)
    parser.add_argument("--broken", type=int, default=30)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    found = measured(options.photos, options.broken, options.kills, seed=options.seed, pause_s=4.0)
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
