"""What is seen at 100 %: sharpness, motion and noise, measured in cuts of full-size photographs.

    python -m benchmarks.detail --data DATA [--pristine 40] [--format json]

Photographs as cameras wrote them (DATA/large), and pristine ones that are kept unseen, are blurred,
shaken and made noisy at full size. How many of neighbouring strengths does `Assessment.detail` put
in order, and how many the score, which sees the photograph made small? The measures were made on
one half of the large photographs, which are named, and on other pristine ones; what is judged is
the rest. Besides: what each measure says under each damage, what it costs beside decoding, and how
far the score moves when a pristine photograph is halved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from meiqa.engine.detail import measure_detail
from meiqa.engine.engine import Engine
from meiqa.engine.images import load_pixels
from meiqa.evaluation.measuring import run_on
from meiqa.formats import tree_text
from meiqa.locations import embedded_assets
from meiqa.progress import Progress
from training.data import name_hash, pristine_names

Picture = NDArray[np.uint8]
Damage = Callable[[Picture, float, np.random.Generator], Picture]
Measures = dict[str, float]

NAMES = "sharpness", "motion", "noise"
DIRECTIONS = 3
"""Ways that the camera is moved in, of each photograph."""
ROUNDS = 5


def defocused(pixels: Picture, radius: float, rng: np.random.Generator) -> Picture:
    """Blur with a Gaussian of so many pixels."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def motion_blurred(pixels: Picture, length: float, rng: np.random.Generator) -> Picture:
    """Move by so many pixels, in a direction by chance, while the shutter is open."""
    angle = rng.uniform(0, np.pi)
    along = np.linspace(-length / 2, length / 2, 8 * int(np.ceil(length)) + 1)
    reach = int(np.ceil(length / 2)) + 1
    cells = np.arange(-reach, reach + 1)
    rows = np.clip(1 - np.abs(cells[:, None] - along * np.sin(angle)), 0, 1)
    columns = np.clip(1 - np.abs(cells[:, None] - along * np.cos(angle)), 0, 1)
    line = (rows @ columns.T).astype(np.float32)
    line /= line.sum()
    height, width = pixels.shape[:2]
    wider = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    total = np.zeros(pixels.shape, np.float32)
    for row, column in np.argwhere(line > 0):
        total += line[row, column] * wider[row : row + height, column : column + width]
    return np.rint(total).clip(0, 255).astype(np.uint8)


def noisy(pixels: Picture, deviation: float, rng: np.random.Generator) -> Picture:
    """Add white noise of this deviation to each channel."""
    noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(deviation)
    taken: Picture = np.rint(noise + pixels).clip(0, 255).astype(np.uint8)
    return taken


LADDERS: dict[str, tuple[Damage, tuple[float, ...], int]] = {
    "sharpness": (defocused, (1, 2, 3, 4.5, 6), 1),
    "motion": (motion_blurred, (1, 3, 6, 12, 24), DIRECTIONS),
    "noise": (noisy, (3, 6, 12, 24, 36), 1),
}
"""By the measure that is to tell it: a damage, its strengths, and how often it is done."""


@dataclass
class Tally:
    """What was seen of some photographs: steps in order by measure and judge, and every reading."""

    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    right: dict[str, dict[str, int]] = field(
        default_factory=lambda: {judge: dict.fromkeys(NAMES, 0) for judge in ("detail", "score")}
    )
    readings: dict[str, dict[float, list[Measures]]] = field(
        default_factory=lambda: {name: {} for name in NAMES}
    )

    def add(self, name: str, strengths: Sequence[float], seen: Sequence[Measures]) -> None:
        """Count one ladder, from the sound photograph up."""
        sign = -1 if name == "sharpness" else 1
        for one, other in pairwise(seen):
            self.steps[name] += 1
            self.right["detail"][name] += sign * other[name] > sign * one[name]
            self.right["score"][name] += other["score"] < one["score"]
        for strength, each in zip(strengths, seen, strict=True):
            self.readings[name].setdefault(strength, []).append(each)

    def report(self) -> dict[str, Any]:
        """Give shares of steps in order, and median readings by damage and strength."""
        shares = {
            judge: {name: right[name] / self.steps[name] for name in NAMES}
            for judge, right in self.right.items()
        }
        medians = {
            f"{name} {strength:g}": {
                measure: round(float(np.median([each[measure] for each in seen])), 3)
                for measure in (*NAMES, "score")
            }
            for name, strengths in self.readings.items()
            for strength, seen in strengths.items()
        }
        return {"steps": self.steps, "in order": shares, "medians": medians}


def seen_of(engine: Engine, pixels: Picture) -> Measures:
    """Give the measures of a picture, and its score."""
    detail = measure_detail(pixels)
    assert detail is not None, "the photographs are large enough"
    score = engine.score(pixels, learn=False, detail=False).score
    return {**{name: getattr(detail, name) for name in NAMES}, "score": score}


def climb(engine: Engine, pixels: Picture, seed: int, tally: Tally) -> None:
    """Damage a photograph step by step, in every way, and count what is seen."""
    rng, sound = np.random.default_rng(seed), seen_of(engine, pixels)
    for name, (damage, strengths, times) in LADDERS.items():
        for own_seed in rng.integers(1 << 31, size=times):
            rungs: Iterator[Picture] = (
                damage(pixels, strength, np.random.default_rng(own_seed)) for strength in strengths
            )
            tally.add(name, (0, *strengths), [sound, *(seen_of(engine, rung) for rung in rungs)])


def judged(engine: Engine, photos: Sequence[Path]) -> dict[str, Any]:
    """Climb with all of some photographs."""
    tally = Tally()
    with Progress(len(photos)) as progress:
        for photo in photos:
            climb(engine, load_pixels(photo).array, int(name_hash(photo.name)[:8], 16), tally)
            progress.advance()
    return {"photographs": [photo.name for photo in photos], **tally.report()}


def cost(photo: Path) -> dict[str, float]:
    """Give milliseconds of the processor for decoding a photograph and for its detail.

    Twice: by the table of its JPEG, and by its pixels, as of a PNG.
    """

    def took_ms(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return 1e3 * (time.process_time() - began)

    read = load_pixels(photo)
    pixels = read.array
    measure_detail(pixels, ())
    turns = [
        (
            took_ms(lambda: load_pixels(photo)),
            took_ms(lambda: measure_detail(pixels, read.luminance_table)),
            took_ms(lambda: measure_detail(pixels, ())),
        )
        for _ in range(ROUNDS)
    ]
    decode_ms, detail_ms, by_pixels_ms = np.median(turns, 0).tolist()
    megapixels = pixels.shape[0] * pixels.shape[1] / 1e6
    return {
        "megapixels": megapixels,
        "decode_ms": decode_ms,
        "detail_ms": detail_ms,
        "detail / decode": detail_ms / decode_ms,
        "by pixels / decode": by_pixels_ms / decode_ms,
    }


def pixels_of(photo: Path) -> int:
    """Count the pixels that a photograph's header announces."""
    with Image.open(photo) as image:
        return image.width * image.height


def halved(engine: Engine, photos: Sequence[Path]) -> dict[str, float]:
    """Tell how far the score moves when photographs are made half as wide and high."""
    changes = []
    for photo in photos:
        whole = load_pixels(photo).array
        height, width = (each // 2 for each in whole.shape[:2])
        half = np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.LANCZOS))
        scores = [engine.score(each, learn=False, detail=False).score for each in (whole, half)]
        changes.append(scores[1] - scores[0])
    return {
        "photographs": len(changes),
        "mean change": float(np.mean(changes)),
        "rises": float(np.mean(np.array(changes) > 0)),
    }


def bench_detail(engine: Engine, data: Path, pristine: int) -> dict[str, Any]:
    """Give every figure, JSON-ready."""
    large = sorted((data / "large" / "images").iterdir(), key=lambda photo: name_hash(photo.name))
    unseen = pristine_names(data, held_out=True)[:pristine]
    small = [data / "pristine" / "images" / name for name in unseen]
    middle = len(large) // 2
    nearest = min(large[middle:], key=lambda photo: abs(pixels_of(photo) - 12_000_000))
    return {
        "developed on": [photo.name for photo in large[:middle]],
        "large": judged(engine, large[middle:]),
        "pristine": judged(engine, small),
        "cost": cost(nearest),
        "half size": halved(engine, small),
        **run_on(),
    }


def text_of(report: Mapping[str, Any]) -> str:
    """Lay out the shares and the other figures; medians are in the JSON."""
    kept = {
        name: {key: each for key, each in value.items() if key not in ("medians", "photographs")}
        if isinstance(value, dict) and "medians" in value
        else value
        for name, value in report.items()
    }
    return tree_text(kept)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detail", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="as docs/training.md lays it out")
    parser.add_argument("--pristine", type=int, default=40, help="unseen pristine photographs")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args()
    with Engine.open(memory=embedded_assets() / "memory", learn=False) as engine:
        report = bench_detail(engine, given.data, given.pristine)
    as_json = given.format == "json"
    sys.stdout.write((json.dumps(report, indent=1) if as_json else text_of(report)) + "\n")


if __name__ == "__main__":
    main()
