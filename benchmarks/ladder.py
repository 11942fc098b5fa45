"""Does the score fall when a photograph is distorted more?

Pristine photographs are distorted by each of KADID-10k's 25 types at five levels; with the
photograph as it was, that is a ladder of six images. Types 18 and 25 change brightness and
contrast in both directions, with the photograph as it was in the middle: there a level counts by
its distance from the middle, and a ladder goes down on both sides.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.engine import Engine
from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.engine.images import load_pixels
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import Column, run_on, table_text
from meiqa.evaluation.metrics import srcc
from meiqa.locations import embedded_assets
from meiqa.types import Failure
from training.data import HELD_OUT_PRISTINE, SYNTHETIC_SIDE, name_hash
from training.distortions import KINDS, LEVELS, DistortionKind, distort

__all__ = [
    "IMAGES_A_PHOTOGRAPH",
    "bench_ladder",
    "ladder_text",
    "main",
    "photographs_of",
]

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
RUNGS = 5
IMAGES_A_PHOTOGRAPH = 1 + 25 * RUNGS
TWO_SIDED = (18, 25)
MIDDLE = 3


@dataclass(frozen=True, eq=False)
class Rungs:
    """Scores of one type of distortion.

    Attributes:
        severity: (L,) how strong the distortion is; steps: pairs of rungs, the milder first.
        scores: (P, L) of P photographs.
    """

    severity: Floats
    steps: tuple[tuple[int, int], ...]
    scores: Floats

    @classmethod
    def of(cls, number: int, scores: Floats) -> Rungs:
        """Lay out scores (P, 6) of the levels 0-5 of a type."""
        if number not in TWO_SIDED:
            return cls(np.arange(6.0), ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)), scores)
        # Level 0 is the same image as the middle one, and left out.
        severity = np.abs(np.arange(1.0, 6.0) - MIDDLE)
        return cls(severity, ((2, 1), (1, 0), (2, 3), (3, 4)), scores[:, 1:])

    def figures(self) -> dict[str, float]:
        """Give the rank correlations, positive when scores fall, and how the steps go."""
        pooled = np.tile(self.severity, len(self.scores))
        falls = np.array([self.scores[:, a] - self.scores[:, b] for a, b in self.steps])
        return {
            "srcc": -srcc(self.scores.ravel(), pooled),
            "within": float(np.mean([-srcc(one, self.severity) for one in self.scores])),
            "falling": float(np.mean(falls > 0.0)),
            "rising": float(np.mean(falls < 0.0)),
        }


def bench_ladder(
    engine: Engine,
    photographs: Sequence[Path],
    *,
    k: int | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score every photograph under every distortion, without learning.

    The random parts of a distortion are drawn anew from the same seed at each level, so that all
    levels of a ladder differ in strength alone, and each run sees the same images.

    Args:
        engine: What scores.
        photographs: P pristine ones; what the model was trained on tells little.
        k: Neighbours to compare with; None leaves it to the engine.
        on_image: Called after each of the images, 126 a photograph.

    Returns:
        JSON-ready: photographs, types, and for initial and fused: mean (over the types), worst
        (the type with the lowest srcc) and rows. Figures are srcc (rank correlation of score and
        level over all photographs, positive when scores fall), within (the mean of that within
        each photograph), falling and rising (shares of the steps from one level to the next).
        ms_per_image, machine and versions.

    Raises:
        ImageError: a photograph cannot be judged.
        UsageError: there are no photographs.
    """
    if not photographs:
        raise UsageError("there are no photographs to distort")
    kinds = KINDS
    started = time.perf_counter()
    scored = []
    for photograph in photographs:
        column = []
        for result in engine.score_many(images_of(photograph, kinds), k=k, learn=False):
            if isinstance(result, Failure):
                raise result.error
            column.append((result.initial_score, result.score))
            on_image()
        scored.append(column)
    seconds = time.perf_counter() - started
    initial, fused = np.moveaxis(np.array(scored), 2, 0)
    return {
        "photographs": len(photographs),
        "types": len(kinds),
        "initial": report_of(initial, kinds),
        "fused": report_of(fused, kinds),
        "ms_per_image": 1e3 * seconds / initial.size,
        **run_on("numpy", "onnxruntime"),
    }


def images_of(photograph: Path, kinds: Sequence[DistortionKind]) -> Iterator[Pixels]:
    """A photograph as it is, then under each type at levels 1-5."""
    pixels = load_pixels(photograph)
    yield pixels.array
    for kind in kinds:
        seed = [int(pixels.digest[:16], 16), kind.number]
        for level in range(1, LEVELS + 1):
            yield distort(pixels.array, kind.number, level, np.random.default_rng(seed))


def report_of(scores: Floats, kinds: Sequence[DistortionKind]) -> dict[str, Any]:
    """Figures of every type, from scores (P, 1 + 5 T) in the order of `images_of`."""
    rows: list[dict[str, Any]] = []
    for at, kind in enumerate(kinds):
        levels = scores[:, 1 + RUNGS * at : 1 + RUNGS * (at + 1)]
        rungs = Rungs.of(kind.number, np.column_stack([scores[:, 0], levels]))
        rows.append({"type": kind.number, "name": kind.name, **rungs.figures()})
    worst = min(rows, key=lambda row: row["srcc"])
    mean = {name: float(np.mean([row[name] for row in rows])) for name in _FIGURES}
    return {"mean": mean, "worst": {"name": worst["name"], "srcc": worst["srcc"]}, "rows": rows}


def photographs_of(folder: str | Path, index: str | Path | None = None) -> list[Path]:
    """Give the photographs in a folder, by name, or those that an index keeps out of training.

    Args:
        folder: Where they are.
        index: CSV with the columns file, width and height, as `training.data` reads it; the
            photographs are those that it keeps unseen.

    Raises:
        UsageError: there is no such folder or index, or the index lacks a column.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory", hint="give it with --images DIR")
    if index is not None:
        return [folder / name for name in unseen_names(Path(index))]
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def unseen_names(index: Path) -> list[str]:
    """The files of an index that training keeps unseen."""
    try:
        with index.open(newline="") as table:
            sizes = {
                row["file"]: min(int(row["width"]), int(row["height"]))
                for row in csv.DictReader(table)
            }
    except OSError as error:
        raise UsageError(f"{index}: {error.strerror}") from error
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"{index} is no index of photographs",
            seen=error,
            allowed="a CSV file with the columns file, width and height",
        ) from error
    large = [name for name, side in sizes.items() if side >= SYNTHETIC_SIDE]
    return sorted(large, key=name_hash)[:HELD_OUT_PRISTINE]


def ladder_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `bench_ladder` as a table."""
    rows = [
        {"name": fused["name"], "initial": initial["srcc"], **fused}
        for initial, fused in zip(report["initial"]["rows"], report["fused"]["rows"], strict=True)
    ]
    mean = {"name": "mean", **report["fused"]["mean"]}
    mean["initial"] = report["initial"]["mean"]["srcc"]
    worst = report["fused"]["worst"]
    return "\n".join(
        [
            f"photographs: {report['photographs']}, types of distortion: {report['types']}; "
            f"worst: {worst['name']}, {worst['srcc']:.3f}",
            "",
            table_text([*rows, mean], _COLUMNS),
        ]
    )


_FIGURES = ("srcc", "within", "falling", "rising")
_COLUMNS = (
    Column("name", "type"),
    Column("initial", "initial SRCC", ".3f"),
    Column("srcc", "SRCC", ".3f"),
    Column("within", "within a photo", ".3f"),
    Column("falling", "falling", ".1%"),
    Column("rising", "rising", ".1%"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark on the default package and print its table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    parser.add_argument("--images", required=True, help="a directory of pristine photographs")
    parser.add_argument("--index", help="CSV: only those that training keeps unseen")
    parser.add_argument("--limit", type=int, help="the first so many photographs")
    parser.add_argument("--k", type=int)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args(arguments)
    photographs = photographs_of(given.images, given.index)[: given.limit]
    with Engine.open(memory=embedded_assets() / "memory", learn=False) as engine:
        report = bench_ladder(engine, photographs, k=given.k)
    as_json = given.format == "json"
    sys.stdout.write((json.dumps(report, indent=2) if as_json else ladder_text(report)) + "\n")


if __name__ == "__main__":
    main()
