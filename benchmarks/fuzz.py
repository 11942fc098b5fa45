"""Damaged files of every readable format, read one by one in a process beside, EXIF as well.

    python -m benchmarks.fuzz --files 10000 --seed 0 [--keep DIR] [--format json]

Each is made by program, then damaged at random; the same seed damages alike. A file may be read or
refused with one of `meiqa.errors`. Faults are: another exception, a warning, a process that ends
or does not answer in time, and memory that grows. `--keep` keeps the files that are at fault.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.photo_files import files_of
from meiqa.engine.images import load_pixels
from meiqa.engine.series import frame_of
from meiqa.errors import MeiqaError
from meiqa.evaluation.measuring import Column, run_on, table_text

LIMIT_S = 30.0
"""Seconds after which a file counts as never read."""
WARM_UP = 1000
"""Files that are read before memory is first looked at."""
MOST_GROWTH_MB = 64
SIZE = (97, 64)
GOOD = ("read", "read, damage named", "refused")
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x01", b"\x80\0\0\0")


def damaged(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Damage a file in one of seven ways; `other` is one of the same format."""
    made = bytearray(data)
    at, end = sorted(random.integers(0, len(data), 2).tolist())
    way = random.integers(7)
    if way == 0:
        for place in random.integers(0, len(data), random.integers(1, 9)):
            made[place] = int(random.integers(256))
    elif way == 1:
        del made[at:]
    elif way == 2:
        del made[at:end]
    elif way == 3:
        made[at:end] = bytes(end - at)
    elif way == 4:
        made[at:at] = made[at : min(end, at + 256)]
    elif way == 5:
        made[at:] = other[at:]
    else:  # sizes and offsets stand near the beginning
        place = int(random.integers(0, min(512, len(data))))
        made[place : place + 4] = EXTREMES[random.integers(len(EXTREMES))]
    return bytes(made)


def read_files(files: Connection) -> None:
    """Read files until there are no more, and say what came of each and the memory that is held."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of damage
    while (data := files.recv_bytes()) != b"":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                photo = load_pixels(data)
                frame_of(photo)
                outcome = "read, damage named" if photo.notes else "read"
            except MeiqaError:
                outcome = "refused"
            except BaseException as error:  # whatever else it is, it is what is looked for
                outcome = f"{type(error).__name__}: {error}"
        files.send((f"warned: {said[0].message}" if said else outcome, resident_mb()))


def resident_mb() -> float:
    """Give the memory that this process holds, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Reader:
    """A process that reads files, and the next one where it ended."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.held_mb: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._files, theirs = self._context.Pipe()
        self._process = self._context.Process(target=read_files, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def outcome(self, data: bytes) -> str:
        """Tell what comes of a file."""
        self._files.send_bytes(data)
        if not self._files.poll(LIMIT_S):
            return self._again("never read")
        try:
            outcome, held_mb = self._files.recv()
        except EOFError:
            return self._again("the process ended")
        self.held_mb.append(held_mb)
        return str(outcome)

    @property
    def growth_mb(self) -> float:
        """By how much memory grew from the first files after the warm-up to the last."""
        after = self.held_mb[WARM_UP:] or self.held_mb
        some = max(1, len(after) // 10)
        return float(np.median(after[-some:]) - np.median(after[:some]))

    def _again(self, why: str) -> str:
        self.close()
        code = self._process.exitcode
        self._begin()
        return f"{why}, exit code {code}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def bench_fuzz(files: int, seed: int, keep: Path | None = None) -> dict[str, Any]:
    """Damage and read so many files, the formats in turn.

    Returns:
        `outcomes`, counts by format and outcome; `faults`, each with the number of its file;
        `growth_mb`, by which the reader's memory grew after its first thousand files.
    """
    formats = [*files_of(_picture()).items()]
    outcomes: dict[str, Counter[str]] = {format: Counter() for format, _ in formats}
    faults, reader = list[dict[str, Any]](), Reader()
    for number in range(files):
        format, seeds = formats[number % len(formats)]
        random = np.random.default_rng([seed, number])
        one, other = (seeds[index] for index in random.integers(0, len(seeds), 2))
        data = damaged(one, other, random) or b"\0"
        outcome = reader.outcome(data)
        outcomes[format][outcome if outcome in GOOD else "fault"] += 1
        if outcome not in GOOD:
            faults.append({"number": number, "format": format, "outcome": outcome})
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}.{format.lower()}").write_bytes(data)
    reader.close()
    return {
        "files": files,
        "seed": seed,
        "outcomes": {format: dict(counts) for format, counts in outcomes.items()},
        "faults": faults,
        "growth_mb": round(reader.growth_mb, 1),
        "holds": not faults and reader.growth_mb <= MOST_GROWTH_MB,
        "settings": {"limit_s": LIMIT_S, "warm_up": WARM_UP, "most_growth_mb": MOST_GROWTH_MB},
        **run_on("pillow", "pillow-heif", "pylibjxl", "simplejpeg", "rawpy"),
    }


def _picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)


def fuzz_text(found: dict[str, Any]) -> str:
    """Lay the counts out."""
    rows = [{"format": format, **counts} for format, counts in found["outcomes"].items()]
    columns = [Column("format", "format"), *(Column(each, each, "d") for each in (*GOOD, "fault"))]
    faults = [f"{each['number']} ({each['format']}): {each['outcome']}" for each in found["faults"]]
    return "\n".join(
        [table_text(rows, columns), f"memory grew by {found['growth_mb']} MB", *faults]
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 if anything is at fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where files at fault are written")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    options = parser.parse_args(argv)
    found = bench_fuzz(options.files, options.seed, options.keep)
    print(json.dumps(found, indent=2) if options.format == "json" else fuzz_text(found))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
