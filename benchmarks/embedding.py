"""What photographs near each other in the embedding share: people's scores, and their damage.

    python -m benchmarks.embedding --data DATA [--photos 150] [--scenes 12] [--format json]

Scores: photographs of BIQ2021's split `val`, none of which the model was trained on; how far apart,
on the scale 1-5, are a photograph and its nearest neighbour, and how well does the mean of its ten
nearest order photographs as people do (SRCC)? Damage: unseen pristine photographs, each damaged in
25 ways at level 4 of 5; has the nearest of another photograph the same damage? Beside the embedding
stands the likeness of pixels (32 x 32, by their cosine, too), and chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.engine import Engine
from meiqa.engine.images import ImageSource, fit_to_grid, load_pixels
from meiqa.evaluation.measuring import run_on
from meiqa.evaluation.metrics import srcc
from meiqa.formats import tree_text
from meiqa.labels import LabelTable
from meiqa.locations import embedded_assets
from meiqa.memory import token_features
from meiqa.progress import Progress
from training.data import name_hash, pristine_names
from training.distortions import KINDS, distort

Vectors = NDArray[np.float32]
Seen = dict[str, list[Vectors]]
LEVEL, SIDE, NEAREST = 4, 32, 10


def look(engine: Engine, photo: ImageSource, seen: Seen) -> None:
    """Note the embedding of a photograph, as `Assessment` has it, and its pixels made small."""
    pixels = load_pixels(photo)
    tokens = engine.model.encode(fit_to_grid(pixels, engine.model.image))
    small = Image.fromarray(pixels.array).resize((SIDE, SIDE), Image.Resampling.BOX)
    seen["embedding"].append(token_features(tokens.values))
    seen["pixels"].append(np.asarray(small, np.float32).ravel())


def cosines(vectors: list[Vectors], allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Give the cosines (N, N) of vectors; the pairs that are not allowed are no neighbours."""
    units = np.array(vectors, np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    return np.where(allowed, units @ units.T, -np.inf)


def by_score(
    engine: Engine, table: LabelTable, images: Path, done: Callable[[], None]
) -> dict[str, Any]:
    """Tell how near the scores of neighbours are."""
    human, seen = np.array(table.scores_1_to_5()), Seen(embedding=[], pixels=[])
    for name in table.files:
        look(engine, images / name, seen)
        done()
    others = ~np.eye(len(human), dtype=bool)
    apart = np.abs(human[:, None] - human)
    found: dict[str, Any] = {"photographs": len(human)}
    for name, vectors in seen.items():
        order = cosines(vectors, others).argsort(1)[:, ::-1]
        found[name] = {
            "nearest differs by": float(apart[np.arange(len(human)), order[:, 0]].mean()),
            "srcc of the ten nearest": srcc(human[order[:, :NEAREST]].mean(1), human),
        }
    return {**found, "by chance": {"nearest differs by": float(apart[others].mean())}}


def by_damage(engine: Engine, photos: list[Path], done: Callable[[], None]) -> dict[str, Any]:
    """Tell how often the nearest of another photograph has the same damage."""
    seen = Seen(embedding=[], pixels=[])
    for photo in photos:
        pixels = load_pixels(photo).array
        rng = np.random.default_rng(int(name_hash(photo.name)[:8], 16))
        for each in KINDS:
            look(engine, distort(pixels, each.number, LEVEL, rng), seen)
        done()
    scene, kind = np.divmod(np.arange(len(photos) * len(KINDS)), len(KINDS))
    others = scene[:, None] != scene
    found: dict[str, Any] = {"photographs": len(photos), "kinds": len(KINDS)}
    for name, vectors in seen.items():
        nearest = cosines(vectors, others).argmax(1)
        found[name] = {"same damage": float(np.mean(kind[nearest] == kind))}
    return {**found, "by chance": {"same damage": 1 / len(KINDS)}}


def bench_embedding(engine: Engine, data: Path, photos: int, scenes: int) -> dict[str, Any]:
    """Give every figure, JSON-ready."""
    table = LabelTable.read(str(data / "biq2021" / "mos.csv"), split="val").spread(photos)
    unseen = pristine_names(data, held_out=True)[:scenes]
    with Progress(len(table) + len(unseen)) as progress:
        done = progress.advance
        return {
            "digest": engine.package.digest,
            "scores": by_score(engine, table, data / "biq2021" / "images", done),
            "damage": by_damage(engine, [data / "pristine" / "images" / n for n in unseen], done),
            **run_on(),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedding", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="as docs/training.md lays it out")
    parser.add_argument("--photos", type=int, default=150)
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args()
    with Engine.open(memory=embedded_assets() / "memory", learn=False) as engine:
        report = bench_embedding(engine, given.data, given.photos, given.scenes)
    as_json = given.format == "json"
    sys.stdout.write((json.dumps(report, indent=1) if as_json else tree_text(report)) + "\n")


if __name__ == "__main__":
    main()
