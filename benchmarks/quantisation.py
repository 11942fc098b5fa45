"""What quantisation costs: packages of one checkpoint judge the same photographs.

    python -m benchmarks.quantisation LABELS.csv --images DIR --split val \\
        --package fp32 PACKAGE MEMORY --package int8 PACKAGE MEMORY …

The first package is what the others are compared with, and its calibration is used for all. Each
needs a memory of its own, since visual tokens differ; all are to hold the same anchors.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from meiqa.engine.calibration import Calibration
from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from meiqa.errors import MeiqaError, UsageError
from meiqa.evaluation.accuracy import judge
from meiqa.labels import LabelTable
from meiqa.types import Assessment, Failure

Floats = NDArray[np.float64]


def open_engine(package: EnginePackage, memory: Path, calibration: Calibration) -> Engine:
    """An engine on a package with another calibration than its own."""
    manifest = replace(package.manifest, calibration=calibration)
    return Engine.open(EnginePackage(package.path, manifest), memory, learn=False)


def judged(engine: Engine, labels: LabelTable, images: Path) -> tuple[dict[str, Any], Floats]:
    """Agreement with people, and scores (N, 2): fused and initial."""
    scores: list[tuple[float, float]] = []

    def note(result: Assessment | Failure) -> None:
        if isinstance(result, Failure):
            raise UsageError("a photograph can't be judged", seen=result.path)
        scores.append((result.score, result.initial_score))
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{len(scores)} of {len(labels)}")

    with engine:
        report = judge(engine, labels, images, on_result=note).report()
    return report, np.array(scores)


def size_bytes(package: EnginePackage) -> int:
    """Bytes of a package's files."""
    return sum((package.path / name).stat().st_size for name in package.manifest.files)


def compared(
    labels: LabelTable, images: Path, packages: Sequence[tuple[str, Path, Path]]
) -> list[dict[str, Any]]:
    """A row a package: agreement with people, and moves from the first."""
    opened = [(name, EnginePackage.open(path), memory) for name, path, memory in packages]
    calibration = opened[0][1].manifest.calibration
    rows: list[dict[str, Any]] = []
    exact: Floats | None = None
    for name, package, memory in opened:
        report, scores = judged(open_engine(package, memory, calibration), labels, images)
        exact = scores if exact is None else exact
        moves = np.abs(scores - exact).mean(axis=0)
        rows.append(
            {
                "package": name,
                "precision": package.manifest.precision,
                "megabytes": round(size_bytes(package) / 1e6, 2),
                "score_move": round(float(moves[0]), 4),
                "initial_score_move": round(float(moves[1]), 4),
                "srcc": round(report["fused"]["srcc"], 4),
                "initial_srcc": round(report["initial"]["srcc"], 4),
                "seconds_per_image": round(report["seconds_per_image"], 4),
            }
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantisation")
    parser.add_argument("labels", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int, help="so many photographs, spread over the table")
    parser.add_argument(
        "--package",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "PACKAGE", "MEMORY"),
        help="may be repeated; the first is what the others are compared with",
    )
    arguments = parser.parse_args()
    packages = [(name, Path(path), Path(memory)) for name, path, memory in arguments.package]
    labels = LabelTable.read(arguments.labels, split=arguments.split).spread(arguments.limit)
    try:
        rows = compared(labels, arguments.images, packages)
    except MeiqaError as error:
        sys.exit(f"error: {error}")
    report = {
        "n": len(labels),
        "machine": platform.platform(),
        "onnxruntime": onnxruntime.__version__,
        "packages": rows,
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
