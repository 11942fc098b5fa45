"""How long `meiqa score photo.jpg` takes in a fresh process, beside importing what it stands on.

Both are run in turns and the best of several runs is compared: the first ones read files that the
rest finds in the system's cache, compile what an installation has compiled, and optimise the
graphs for this processor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meiqa.benchmarks.machine import machine, versions
from meiqa.benchmarks.photographs import made_jpeg
from meiqa.benchmarks.timing import quantiles_ms

__all__ = ["bench_cold", "main", "table_text"]

RUNS = 10
_BASE = "import numpy, onnxruntime"
_NO_SITE = ("-S",) if sys.flags.no_site else ()  # a child starts as this interpreter did
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)")
_SLOWEST = 12
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"


def bench_cold(
    runs: int = RUNS, *, image: Path | None = None, k: int | None = None
) -> dict[str, Any]:
    """Run both commands in turns.

    Args:
        runs: How often; one more of each goes before.
        image: The photo; a made one of 1024 x 768 if it is None.
        k: Neighbours; the package's number if it is None.

    Returns:
        `ratio` of the best times, `rows` of each command, `modules`: what importing took most for
        (milliseconds of each module by itself), and what it was run on.
    """
    with tempfile.TemporaryDirectory() as folder:
        photo = image or Path(folder) / "photo.jpg"
        if image is None:
            photo.write_bytes(made_jpeg(0))
        python = [sys.executable, "-P", *_NO_SITE]
        score = ["-m", "meiqa", "score", str(photo), "--no-learn"]
        score += [] if k is None else ["--k", str(k)]
        environment = {
            **{name: value for name, value in os.environ.items() if name != _NO_BYTECODE},
            "MEIQA_MEMORY": str(Path(folder) / "memory"),
            "MEIQA_CACHE": str(Path(folder) / "cache"),
            "PYTHONPYCACHEPREFIX": str(Path(folder) / "bytecode"),
        }
        commands = {
            "numpy and onnxruntime": [*python, "-c", _BASE],
            "meiqa score": [*python, *score],
            "meiqa --version": [*python, "-m", "meiqa", "--version"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(runs + 1):
            for name, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, env=environment, capture_output=True, check=True)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - began))
        listing = subprocess.run(
            [*python, "-X", "importtime", *score],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    rows = {name: quantiles_ms(each) for name, each in times.items()}
    return {
        "ratio": round(rows["meiqa score"]["min_ms"] / rows["numpy and onnxruntime"]["min_ms"], 2),
        "rows": rows,
        "modules": _slowest(listing),
        "settings": {"runs": runs, "warm_up": 1, "k": k, "image": image and image.name},
        "machine": machine(),
        "versions": versions("numpy", "onnxruntime", "meiqa"),
    }


def _slowest(listing: str) -> dict[str, float]:
    """Sum up the time of importing by top-level package, what it imports in turn left out."""
    sums: dict[str, float] = {}
    for own, _, module in _IMPORT.findall(listing):
        name = module.partition(".")[0]
        sums[name] = sums.get(name, 0.0) + int(own) / 1e3
    most = sorted(sums.items(), key=lambda item: -item[1])[:_SLOWEST]
    return {name: round(ms, 1) for name, ms in most}


def table_text(result: dict[str, Any]) -> str:
    """Lay out the result for people."""
    lines = [f"{'':<24}{'best ms':>10}{'p50 ms':>10}"]
    lines += [
        f"{name:<24}{row['min_ms']:10.0f}{row['p50_ms']:10.0f}"
        for name, row in result["rows"].items()
    ]
    lines += ["", f"{'ratio':<24}{result['ratio']:10.2f}", "", "imports, ms:"]
    lines += [f"  {name:<22}{ms:10.1f}" for name, ms in result["modules"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--image", type=Path, metavar="PATH")
    parser.add_argument("--k", type=int, metavar="N")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    result = bench_cold(options.runs, image=options.image, k=options.k)
    as_json = options.format == "json"
    sys.stdout.write((json.dumps(result, indent=2) if as_json else table_text(result)) + "\n")


if __name__ == "__main__":
    main()
