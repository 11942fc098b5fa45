"""What meiqa takes on a small device: installed, in memory while it scores, and when it starts.

`python -m benchmarks.footprint --wheel dist/meiqa-….whl` installs the wheel twice into empty
folders: with all that pip installs for `meiqa[cpu]`, and as docker/packages.sh does, with what
scoring imports alone; bytecode of what a first photo imports is weighed with it. Memory is what a
process of its own, with that second installation, held at most while it scored photos. How long a
cold `meiqa score` takes is told by `meiqa bench cold`, and what importing NumPy and ONNX Runtime
takes, by the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meiqa.evaluation.measuring import Column, made_jpeg, run_on, table_text
from meiqa.evaluation.speed import bench_cold

__all__ = ["bench_footprint", "footprint_text", "main"]

ROOT = Path(__file__).parents[1]
BARS = {"installed_mb": 200.0, "resident_mb": 250.0, "cold_ratio": 2.5}
SIZES = {"frame of 2 MP": (1080, 1920), "photo of 12 MP": (3000, 4000)}
_PHOTOS = 3
_SCORE = """
import json, sys
from meiqa import Engine
from meiqa.cli.doctor import held
with Engine.open(memory=sys.argv[1], learn=False) as engine:
    opened = held()
    for photo in sys.argv[2:]:
        engine.score(photo, learn=False)
    print(json.dumps({"opened": opened, "scored": held()}))
"""


def bench_footprint(wheel: Path, *, runs: int = 10) -> dict[str, Any]:
    """Install a wheel of this machine's architecture, weigh it, score with it and start it.

    Args:
        runs: cold starts of each command; see `bench_cold`.

    Returns:
        `installed`, rows of how and MB; `resident`, rows of what was scored and MB, of it pages of
        files; `cold`, what `bench_cold` returns; `bars` with limit, seen and met of each; and what
        it was run on.
    """
    with _folder() as place:
        scoring, everything = place / "scoring", place / "everything"
        _installed(wheel, place / "wheels", scoring)
        _installed(wheel, place / "wheels", everything, "cpu")
        resident = [_resident_row(scoring, place, name, size) for name, size in SIZES.items()]
        installed = [
            {"what": "what scoring imports, with its bytecode", "mb": _megabytes(scoring)},
            {"what": "all of meiqa[cpu], without bytecode", "mb": _megabytes(everything)},
        ]
        cold = bench_cold(runs)
    seen = {
        "installed_mb": installed[0]["mb"],
        "resident_mb": resident[0]["mb"],
        "cold_ratio": cold["ratio"],
    }
    return {
        "installed": installed,
        "resident": resident,
        "cold": cold,
        "bars": {
            name: {"limit": limit, "seen": seen[name], "met": seen[name] <= limit}
            for name, limit in BARS.items()
        },
        "settings": {"photos": _PHOTOS},
        **run_on("numpy", "onnxruntime", "meiqa"),
    }


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="meiqa-footprint-") as place:
        yield Path(place)


def _installed(wheel: Path, wheels: Path, target: Path, *extras: str) -> None:
    """Install by docker/packages.sh for this interpreter, fetching what is not there yet."""
    script = ROOT / "docker" / "packages.sh"
    given = (wheels, os.uname().machine, "{}.{}".format(*sys.version_info))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    if not wheels.is_dir():
        wheels.mkdir()
        shutil.copy(wheel, wheels)
        fetch = (script, "fetch", *given)
        subprocess.run([*map(str, fetch)], env=environment, check=True)
    install = (script, "install", *given, target, *extras)
    subprocess.run([*map(str, install)], env=environment, check=True)


def _resident_row(installed: Path, place: Path, name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Score photos of a size, (height, width), in a process of its own."""
    photos = [place / f"{size[0]}-{number}.jpg" for number in range(_PHOTOS)]
    for number, photo in enumerate(photos):
        photo.write_bytes(made_jpeg(number, size))
    memory = place / "memory"
    memory.mkdir(exist_ok=True)
    environment = {
        **{n: value for n, value in os.environ.items() if not n.startswith("PYTHON")},
        "PYTHONPATH": str(installed),
        "MEIQA_CACHE": str(place / "cache"),
    }
    command = [sys.executable, "-S", "-c", _SCORE, str(memory), *map(str, photos)]
    said = json.loads(
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    )
    opened, scored = said["opened"], said["scored"]
    return {
        "what": name,
        "opened_mb": opened["resident_bytes"] / 1e6,
        "mb": scored["peak_bytes"] / 1e6,
        "afterwards_mb": scored["resident_bytes"] / 1e6,
        "of_files_mb": scored["mapped_bytes"] / 1e6,
    }


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def footprint_text(result: dict[str, Any]) -> str:
    """Lay out the result of `bench_footprint`."""
    installed = (Column("what", "installed"), Column("mb", "MB", ".0f"))
    resident = (
        Column("what", "scoring a"),
        Column("mb", "at most, MB", ".0f"),
        Column("opened_mb", "before", ".0f"),
        Column("afterwards_mb", "after", ".0f"),
        Column("of_files_mb", "of mapped files", ".0f"),
    )
    bars = [
        {"bar": name, **bar, "word": "met" if bar["met"] else "missed"}
        for name, bar in result["bars"].items()
    ]
    judged = (
        Column("bar", "bar"),
        Column("limit", "at most", ".1f"),
        Column("seen", "seen", ".2f"),
        Column("word", ""),
    )
    return "\n\n".join(
        (
            table_text(result["installed"], installed),
            table_text(result["resident"], resident),
            table_text(bars, judged),
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="one of `make wheels`")
    parser.add_argument("--runs", type=int, default=10, help="cold starts of each command")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    result = bench_footprint(options.wheel, runs=options.runs)
    print(json.dumps(result, indent=2) if options.format == "json" else footprint_text(result))


if __name__ == "__main__":
    main()
