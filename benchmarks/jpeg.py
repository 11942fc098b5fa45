"""How well the quality of a JPEG is told, by its file and by the pixels that it left.

    python -m benchmarks.jpeg --data DATA [--photos 12] [--format json]

Photographs are made smaller, so that no earlier JPEG is left in them, and saved with known
qualities. Then they are read as they are, from their pixels alone, as of a PNG, and from these with
some rows and columns cut off. Besides, from pixels: without having been made smaller ("again": two
JPEGs, one over the other), with the tables of cameras that are no standard ones, and never saved as
JPEG, where every answer is a false alarm. The estimate was made on other pristine photographs
and on those of DATA/large that `benchmarks.detail` names as developed on; what is judged is the
rest, and BIQ2021's split `val`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.detail import cost, pixels_of
from meiqa.engine.detail import measure_detail
from meiqa.engine.images import ImageSource, load_pixels
from meiqa.engine.jpeg import quality_by_table
from meiqa.evaluation.measuring import run_on
from meiqa.formats import tree_text
from meiqa.labels import LabelTable
from meiqa.progress import Progress
from training.data import name_hash, pristine_names

Picture = NDArray[np.uint8]
QUALITIES = (10, 30, 50, 70, 80, 90, 95, 98)
SUBSAMPLINGS = 3
SHRUNK = 0.75


def saved(pixels: Picture, **options: Any) -> bytes:
    """Encode as JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def shrunk(pixels: Picture) -> Picture:
    """Make a photograph smaller: no block of it is one of 8 x 8 pixels any more."""
    height, width = (round(SHRUNK * each) for each in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def told(source: ImageSource) -> int | None:
    """Give the quality that `Assessment.detail` would tell; None for no JPEG."""
    photo = load_pixels(source)
    detail = measure_detail(photo.array, photo.luminance_table)
    return None if detail is None or detail.jpeg is None else detail.jpeg.quality


def cases_of(
    photo: Path, cameras: list[dict[int, list[int]]]
) -> Iterator[tuple[str, int | None, ImageSource]]:
    """Give a kind, a true quality and a picture for everything that is made of a photograph."""
    rng = np.random.default_rng(int(name_hash(photo.name)[:8], 16))
    whole = load_pixels(photo).array
    small = shrunk(whole)
    top, left = rng.integers(1, 8, 2)
    yield "never", None, Image.fromarray(small)
    yield "never", None, Image.fromarray(small[top:, left:])
    for quality in QUALITIES:
        subsampling = int(rng.integers(SUBSAMPLINGS))
        file = saved(small, quality=quality, subsampling=subsampling)
        pixels = load_pixels(file).array
        yield "file", quality, file
        yield "pixels", quality, Image.fromarray(pixels)
        yield "cropped", quality, Image.fromarray(pixels[top:, left:])
        again = load_pixels(saved(whole, quality=quality, subsampling=subsampling)).array
        yield "again", quality, Image.fromarray(again)
    for tables in cameras:
        file = saved(small, qtables=tables, subsampling=0)
        truth = quality_by_table(load_pixels(file).luminance_table or ()).quality
        yield "camera tables", truth, Image.fromarray(load_pixels(file).array)


def camera_tables(photos: list[Path]) -> list[dict[int, list[int]]]:
    """Give the tables of those photographs whose are no standard ones."""
    found: list[dict[int, list[int]]] = []
    for photo in photos:
        with Image.open(photo) as image:
            tables: dict[int, list[int]] = image.quantization  # type: ignore[attr-defined]
        standard = quality_by_table(tables[0]).source == "standard table"
        if not standard and tables not in found:
            found.append(tables)
    return found


def judged(photos: list[Path], cameras: list[dict[int, list[int]]]) -> dict[str, Any]:
    """Give errors by kind, and false alarms."""
    seen: dict[str, list[tuple[int | None, int | None]]] = defaultdict(list)
    with Progress(len(photos)) as progress:
        for photo in photos:
            for kind, truth, file in cases_of(photo, cameras):
                seen[kind].append((truth, told(file)))
            progress.advance()
    alarms = [found is not None for _, found in seen.pop("never")]
    return {
        "photographs": len(photos),
        "files": {kind: errors(pairs) for kind, pairs in seen.items()},
        "never a JPEG": {"n": len(alarms), "taken for one": int(sum(alarms))},
    }


def errors(pairs: list[tuple[int | None, int | None]]) -> dict[str, float]:
    """Sum up how far qualities are told wrong."""
    off = [abs(found - truth) for truth, found in pairs if truth and found is not None]
    return {
        "n": len(pairs),
        "not told": len(pairs) - len(off),
        "exact": float(np.mean([each == 0 for each in off])),
        "mean error": float(np.mean(off)),
        "largest error": max(off),
    }


def bench_jpeg(data: Path, count: int) -> dict[str, Any]:
    """Give every figure, JSON-ready."""
    large = sorted((data / "large" / "images").iterdir(), key=lambda photo: name_hash(photo.name))
    middle = len(large) // 2
    pristine = [
        data / "pristine" / "images" / name for name in pristine_names(data, held_out=True)[:count]
    ]
    table = LabelTable.read(str(data / "biq2021" / "mos.csv"), split="val").spread(count)
    val = [data / "biq2021" / "images" / name for name in table.files]
    cameras = camera_tables(large)
    nearest = min(large[middle:], key=lambda photo: abs(pixels_of(photo) - 12_000_000))
    return {
        "qualities": list(QUALITIES),
        "camera tables": len(cameras),
        "pristine": judged(pristine, cameras),
        "biq2021 val": judged(val, cameras),
        "large": judged(large[middle:], []),
        "cost": cost(nearest),
        **run_on("pillow"),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jpeg", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="as docs/training.md lays it out")
    parser.add_argument("--photos", type=int, default=12, help="of each set")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args()
    report = bench_jpeg(given.data, given.photos)
    as_json = given.format == "json"
    sys.stdout.write((json.dumps(report, indent=1) if as_json else tree_text(report)) + "\n")


if __name__ == "__main__":
    main()
