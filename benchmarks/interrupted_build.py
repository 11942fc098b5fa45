"""A memory built with interruptions ends the same as one built without: every array and record.

    python -m benchmarks.interrupted_build LABELS.csv --images DIR [--interruptions N]

Runs `meiqa memory build` to its end and takes the time. Then runs it again to another place and
interrupts it at random moments, by turns with SIGINT (Ctrl-C) and SIGKILL, each time starting the
same command anew, until the last run is left to finish. Prints as JSON what was interrupted when
and how the two memories differ: only the moments of storing may. Ends with 1 where more does.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import module_command
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import run_on
from meiqa.memory import Segment, verify_memory
from meiqa.memory.database import read_thumbnails
from meiqa.memory.versions import open_version

__all__ = ["differences", "interrupted_build", "main"]

_SIGNALS = (signal.SIGINT, signal.SIGKILL)
_PATIENCE_S = 0.01
# Each run gets at most this share of its part of the build, so that no run is the last too early;
# where the machine was slower while the time was taken, less.
_SHARES = (0.9, 0.5, 0.2, 0.05)
_OWN_ATTRIBUTES = {"build", "records_sha256"}


def interrupted_build(
    labels: Path,
    images: Path,
    options: Sequence[str] = (),
    *,
    interruptions: int = 2,
    seed: int = 0,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Build a memory with and without interruptions, and compare.

    Args:
        labels: Table of photographs and scores.
        images: Where the photographs are.
        options: More that `meiqa memory build` is given.
        interruptions: How often it is interrupted.
        seed: Of the moments.
        directory: Keeps both memories, as `whole` and `interrupted`; it must have neither.

    Returns:
        `anchors`, `arrays` (their names), `uninterrupted_s`, `interruptions` (signal, seconds
        since the writer had begun, anchors that were kept), `differences`, `equal`, and what it was
        run on.

    Raises:
        UsageError: the command fails, or is too fast to be interrupted so often.
    """
    command = module_command(
        "meiqa", "memory", "build", labels, "--images", images, *options, "--out"
    )
    with nullcontext(directory) if directory else tempfile.TemporaryDirectory() as place:
        whole, other = Path(place) / "whole", Path(place) / "interrupted"
        seconds = _built(command, whole)
        moments = random.Random(seed)
        for share in _SHARES:
            _remove(other)
            longest = share * seconds / max(interruptions, 1)
            made = _interrupted(command, other, interruptions, longest, moments)
            if len(made) == interruptions:
                break
        else:
            raise UsageError("the build is too fast to be interrupted", seen=f"{seconds:.1f} s")
        _built(command, other)
        found = differences(whole, other)
        version = open_version(whole, "anchor")
        return {
            "anchors": len(version),
            "arrays": sorted(version.segment.arrays),
            "uninterrupted_s": round(seconds, 2),
            "interruptions": made,
            "differences": found,
            "equal": not found,
            "settings": {"options": list(options), "seed": seed},
            **run_on("numpy", "onnxruntime"),
        }


def differences(first: Path, second: Path) -> list[str]:
    """Tell what two memories of anchors do not have in common, but for the moments of storing.

    Raises:
        StoreError: one cannot be opened.
    """
    one, other = (open_version(path, "anchor") for path in (first, second))
    found = [
        f"{finding.file}: {finding.problem}"
        for path in (first, second)
        for finding in verify_memory(path)
    ]
    arrays, others = one.segment.arrays, other.segment.arrays
    for name in sorted({*arrays, *others}):
        if name not in arrays or name not in others or not _same(arrays[name], others[name]):
            found.append(f"array {name}")
    attributes, others_attributes = _attributes(one.segment), _attributes(other.segment)
    found += [
        f"attribute {name}"
        for name in sorted({*attributes, *others_attributes})
        if attributes.get(name) != others_attributes.get(name)
    ]
    records, others_records = (
        {row: replace(record, created=0.0) for row, record in each.records()}
        for each in (one, other)
    )
    thumbnails, others_thumbnails = (_thumbnails(each.records_path) for each in (one, other))
    found += [
        f"record of row {row}"
        for row in sorted({*records, *others_records})
        if records.get(row) != others_records.get(row)
        or thumbnails.get(row + 1) != others_thumbnails.get(row + 1)
    ]
    return found


def _same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and one.tobytes() == other.tobytes()


def _thumbnails(records: Path) -> dict[int, bytes]:
    with closing(sqlite3.connect(records)) as connection:
        revisions = [row for (row,) in connection.execute("SELECT revision FROM records")]
        return read_thumbnails(records, connection, revisions)


def _attributes(segment: Segment) -> dict[str, Any]:
    """Give what does not name this one build."""
    named = segment.attributes.items()
    return {name: value for name, value in named if name not in _OWN_ATTRIBUTES}


def _built(command: Sequence[str], out: Path) -> float:
    """Let the command run to its end; give the seconds since its writer had begun."""
    child = _started(command, out)
    begin = _writer_began(child, out)
    _, said = child.communicate()
    seconds = time.perf_counter() - begin
    if not out.exists():
        raise UsageError("the memory was not built", seen=said.strip()[-300:])
    return seconds


def _interrupted(
    command: Sequence[str], out: Path, count: int, longest: float, moments: random.Random
) -> list[dict[str, Any]]:
    """Interrupt so many runs at random moments; fewer, if one had finished before."""
    made = []
    for number in range(count):
        sent = _SIGNALS[number % len(_SIGNALS)]
        child = _started(command, out)
        begin = _writer_began(child, out)
        time.sleep(moments.uniform(0.0, longest))
        child.send_signal(sent)
        after = time.perf_counter() - begin
        child.communicate()
        if out.exists():
            break
        made.append(
            {"signal": sent.name, "after_s": round(after, 3), "anchors_kept": _kept(_spool(out))}
        )
    return made


def _started(command: Sequence[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _writer_began(child: subprocess.Popen[str], out: Path) -> float:
    """Wait until the child's writer holds the spool; give the time."""
    lock = _spool(out).with_name("spool.lock")
    holder = str(child.pid)
    while child.poll() is None and not (lock.exists() and lock.read_text().strip() == holder):
        time.sleep(_PATIENCE_S)
    return time.perf_counter()


def _kept(spool: Path) -> int:
    if not spool.exists():  # it was interrupted before the first moment
        return 0
    with closing(sqlite3.connect(spool)) as connection:
        count: int = connection.execute("SELECT count(*) FROM records").fetchone()[0]
    return count


def _spool(out: Path) -> Path:
    """Give where a resumable writer keeps what it was given."""
    return out.with_name(f".{out.name}.resumable.partial") / "spool.sqlite3"


def _remove(out: Path) -> None:
    for path in (out, _spool(out).parent):
        shutil.rmtree(path, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both builds and print JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interrupted_build", description=__doc__
    )
    parser.add_argument("labels", type=Path, metavar="LABELS.csv")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--package", metavar="DIR", help="engine package (default: the embedded)")
    parser.add_argument("--split", metavar="S", help="only the rows of this split")
    parser.add_argument("--limit", metavar="N", help="N of them, spread")
    parser.add_argument("--interruptions", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps both memories")
    # A shell's background job ignores Ctrl-C, and so would the builds that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = parser.parse_args(arguments)
    options = [
        part
        for name in ("package", "split", "limit")
        if (value := getattr(given, name)) is not None
        for part in (f"--{name}", value)
    ]
    result = interrupted_build(
        given.labels,
        given.images,
        options,
        interruptions=given.interruptions,
        seed=given.seed,
        directory=given.work,
    )
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
