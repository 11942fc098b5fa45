"""The whole way of a model of one's own, with what each step takes.

    python -m benchmarks.own_model CHECKPOINT LABELS.csv --images DIR --work WORK [--output FILE]

Exports a checkpoint, looks into the package, makes a memory of a hundred photographs, calibrates on
them and scores one that is not among them, each by the command that a user gives. Told are the
wall time and the processor's, the most memory that was resident, and what lies on the disk
afterwards. Logs lie in WORK, and commands that an earlier run finished there are not repeated, up
to the first that is new.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meiqa.errors import MeiqaError
from meiqa.evaluation.measuring import run_on
from meiqa.labels import LabelTable

__all__ = ["main", "markdown_text", "run", "steps_of"]

ANCHORS, PICTURES = 100, 24
SETTINGS = ("precision", "prompt", "anchors", "pictures", "max_pixels")


def write_anchors(table: LabelTable, count: int, out: Path) -> str:
    """Write a table of so many photographs, spread over another; one more, not among them."""
    chosen = table.spread(count + 1)
    rows = [*zip(chosen.files, chosen.scores_1_to_5(), strict=True)]
    other, _ = rows.pop(len(rows) // 2)
    with out.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "mos"), *rows])
    return other


def steps_of(given: argparse.Namespace, table: Path, photo: Path) -> dict[str, list[str]]:
    """Give the arguments of `meiqa` for each step."""
    package, memory = given.work / "package", given.work / "memory"
    at, photographs = ["--package", package], ["--images", given.images]
    scale = ["--mos-range", "1", "5"]
    export = ["export", given.checkpoint, "--out", package, "--precision", given.precision]
    export += ["--prompt", given.prompt]
    if given.precision in ("int8", "int4"):
        export += ["--calibration", given.images, "--pictures", given.pictures]
    if given.max_pixels is not None:
        export += ["--max-pixels", given.max_pixels]
    if given.largest_move is not None:
        export += ["--largest-move", given.largest_move]
    if given.no_sensitivity:
        export.append("--no-sensitivity")
    steps = {
        "export": export,
        "inspect": ["inspect", package],
        "memory": ["memory", "build", table, *photographs, *at, "--out", memory, *scale],
        "calibrate": ["calibrate", table, *photographs, *at, "--memory", memory, *scale],
        "score": ["score", photo, *at, "--memory", memory],
    }
    return {name: [str(each) for each in arguments] for name, arguments in steps.items()}


def run(name: str, arguments: Sequence[str], work: Path) -> dict[str, Any]:
    """Run a step as a process of its own, and weigh it.

    Raises:
        MeiqaError: it failed.
    """
    log = work / f"{name}.log"
    began = time.monotonic()
    with log.open("wb") as written:
        command = [sys.executable, "-m", "meiqa", *arguments]
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        seen = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise MeiqaError(f"`meiqa {shlex.join(arguments)}` failed", seen=seen, hint=f"see {log}")
    return {
        "step": name,
        "command": f"meiqa {shlex.join(arguments)}",
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6),  # KiB on Linux
        "disk_mb": {each.name: round(size_mb(each), 1) for each in work.iterdir() if each.is_dir()},
    }


def size_mb(folder: Path) -> float:
    """Megabytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def done_in(work: Path) -> list[dict[str, Any]]:
    """Give the rows of the commands that an earlier run finished."""
    kept = work / "steps.json"
    found: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    return found


def rows_of(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Go all the way, and give a row for each step."""
    given.work.mkdir(parents=True, exist_ok=True)
    table = given.work / "anchors.csv"
    photo = write_anchors(LabelTable.read(given.labels), given.anchors, table)
    known = {row["command"]: row for row in done_in(given.work)}
    rows: list[dict[str, Any]] = []
    for name, arguments in steps_of(given, table, given.images / photo).items():
        command = f"meiqa {shlex.join(arguments)}"
        if command not in known:
            known.clear()  # what comes after it stands on it
            sys.stderr.write(f"{command}\n")
        rows.append(known.get(command) or run(name, arguments, given.work))
        (given.work / "steps.json").write_text(json.dumps(rows, indent=2) + "\n")
        yield rows[-1]


def markdown_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the rows as a table of a document."""
    lines = ["| step | minutes | CPU minutes | peak MB | MB on the disk |", "|---|---|---|---|---|"]
    for row in rows:
        disk = ", ".join(f"{name} {mb:,.0f}" for name, mb in row["disk_mb"].items())
        minutes = f"{row['wall_s'] / 60:.1f} | {row['cpu_s'] / 60:.1f}"
        lines.append(f"| {row['step']} | {minutes} | {row['peak_mb']:,} | {disk} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Go all the way, and print what each step took, as a table of a document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_model", description=__doc__)
    parser.add_argument("checkpoint", help="a folder or a hub id")
    parser.add_argument("labels", type=Path, help="photographs and their human scores")
    parser.add_argument("--images", type=Path, required=True, help="where these are")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8", "int4"), default="int8")
    parser.add_argument("--prompt", default="visualquality-r1")
    parser.add_argument("--anchors", type=int, default=ANCHORS)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="to calibrate the export on")
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--largest-move", type=float)
    parser.add_argument("--no-sensitivity", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    rows = [*rows_of(given)]
    if given.output is not None:
        report = {
            "settings": {name: vars(given)[name] for name in SETTINGS},
            "rows": [{n: v for n, v in row.items() if n != "command"} for row in rows],
            **run_on("onnxruntime", "torch", "transformers"),
        }
        given.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(markdown_text(rows) + "\n")


if __name__ == "__main__":
    main()
