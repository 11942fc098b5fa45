"""Training data: photographs with human scores, and pristine ones distorted as KADID-10k does.

`prepare` decodes everything once into memory-mapped arrays, so that training reads crops without
decoding. Human-scored photographs are split by a stable hash of their names into those the model
is trained on and the anchors it never sees; pristine photographs keep a part unseen as well.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from meiqa.engine.measures import measure_attributes
from training.commands import run_command
from training.distortions import (
    FADING_COLOUR,
    KINDS,
    LEVELS,
    damage_scores,
    distort,
    is_untouched,
    kadid_scores,
)

ANCHOR_COUNT = 1_024
HELD_OUT_PRISTINE = 40
HUMAN_SIDE = 512
SYNTHETIC_SIDE = 320
CALIBRATION_PHOTOGRAPHS = 256
SYNTHETIC_PER_PHOTOGRAPH = 18
PRISTINE_PER_PHOTOGRAPH = 2
PLAIN_PICTURES, PLAIN_SCORE = 400, 1.0
"""What is no picture of anything is bad."""
PRISTINE_SCORE = 4.6
"""What people give an undistorted photograph on KADID's scale (its mildest levels reach 4.6)."""
SCENES_PER_PRISTINE, HUMAN_SCENES = 18, 2_400
SUBTLE = (3, 4, 5, 7, 17, 18, 20, 25, 28, 31, 32)
"""Types of damage that are hardest to tell apart; scenes have twice as many of each."""
SHOTS_PER_SCENE = 4
"""Two levels of one damage, each as the camera stood and after a hand moved and exposed anew."""
SHOT_EXPOSURE = 0.1
"""Largest difference of exposure between two shots, in EV."""
FALLS = (0.08, 0.25, 0.6, 1.3, 2.2)
"""Falls of the score from which damage is barely visible, slight, visible, strong and severe."""


@dataclass(frozen=True)
class Photograph:
    """One training picture: where it comes from and what is known about it.

    Attributes:
        name: source file name.
        score: human (or KADID's pseudo-) score, 1-5.
        kind: number of its distortion, 0 when none was applied or none is to be named.
        level: its level 1-5, of shots of a scene how severe people find it; 0 when none.
        attributes: measured sharpness, noise, exposure, contrast, colour and blocking.
    """

    name: str
    score: float
    kind: int
    level: int
    attributes: dict[str, float]


Made: TypeAlias = tuple[np.ndarray, Photograph]
"""Pixels of a picture, and its record."""


@dataclass(frozen=True)
class PhotographSet:
    """Pixels (N, S, S, 3) uint8, memory-mapped, and what is known about each."""

    pixels: np.ndarray
    photographs: tuple[Photograph, ...]

    @property
    def scores(self) -> np.ndarray:
        """(N,) float32."""
        return np.array([p.score for p in self.photographs], np.float32)

    @classmethod
    def load(cls, folder: Path, name: str) -> PhotographSet:
        """Open what `prepare` wrote."""
        pixels = np.load(folder / f"{name}.npy", mmap_mode="r")
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        return cls(pixels, tuple(Photograph(**json.loads(line)) for line in lines))


def name_hash(name: str) -> str:
    """Stable order of names that has nothing to do with their content."""
    return hashlib.sha256(name.encode()).hexdigest()


def human_scored(data: Path, table_name: str = "mos.csv") -> list[dict[str, str]]:
    """Rows of a table of BIQ2021."""
    with (data / "biq2021" / table_name).open() as table:
        return list(csv.DictReader(table))


def anchor_names(data: Path, count: int = ANCHOR_COUNT) -> frozenset[str]:
    """Names of the photographs kept out of training to become anchors."""
    names = [row["file"] for row in human_scored(data) if row["split"] == "train"]
    return frozenset(sorted(names, key=name_hash)[:count])


def pristine_names(data: Path, *, held_out: bool) -> list[str]:
    """Names of the pristine photographs, large enough to crop, used for training or kept unseen."""
    with (data / "pristine" / "index.csv").open() as table:
        rows = list(csv.DictReader(table))
    large = [r["file"] for r in rows if min(int(r["width"]), int(r["height"])) >= SYNTHETIC_SIDE]
    names = sorted(large, key=name_hash)
    return names[:HELD_OUT_PRISTINE] if held_out else names[HELD_OUT_PRISTINE:]


def read_pixels(path: Path) -> np.ndarray:
    """Decode to uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def cut_photograph(row: dict[str, str], data: Path) -> tuple[np.ndarray, Photograph]:
    """Pixels and record of a cut that has the whole photograph's score."""
    pixels = read_pixels(data / "biq2021" / "crops" / row["file"])
    score = 1.0 + 4.0 * float(row["mos"])
    return pixels, Photograph(row["file"], score, 0, 0, measure_attributes(pixels))


def squared(pixels: np.ndarray) -> np.ndarray:
    """A photograph at HUMAN_SIDE a side, so that all of them fit one array.

    Five are of another size and are resized; the engine keeps each on a grid of its own.
    """
    if pixels.shape[:2] == (HUMAN_SIDE, HUMAN_SIDE):
        return pixels
    resized = Image.fromarray(pixels).resize((HUMAN_SIDE, HUMAN_SIDE), Image.Resampling.BICUBIC)
    return np.array(resized)


def human_photograph(row: dict[str, str], data: Path) -> tuple[np.ndarray, Photograph]:
    """Pixels and record of one human-scored photograph; its score 0-1 becomes 1-5."""
    pixels = squared(read_pixels(data / "biq2021" / "images" / row["file"]))
    score = 1.0 + 4.0 * float(row["mos"])
    return pixels, Photograph(row["file"], score, 0, 0, measure_attributes(pixels))


def distorted_photographs(name: str, data: Path, scores: np.ndarray) -> list[Made]:
    """Random crops of one pristine photograph under random distortions, and undistorted ones."""
    source = read_pixels(data / "pristine" / "images" / name)
    rng = np.random.default_rng(int(name_hash(name)[:16], 16))
    made = []
    for index in range(SYNTHETIC_PER_PHOTOGRAPH + PRISTINE_PER_PHOTOGRAPH):
        top = rng.integers(source.shape[0] - SYNTHETIC_SIDE + 1)
        left = rng.integers(source.shape[1] - SYNTHETIC_SIDE + 1)
        crop = source[top : top + SYNTHETIC_SIDE, left : left + SYNTHETIC_SIDE]
        if index < PRISTINE_PER_PHOTOGRAPH:
            record = Photograph(name, PRISTINE_SCORE, 0, 0, measure_attributes(crop))
        else:
            kind, level = int(rng.integers(1, len(KINDS) + 1)), int(rng.integers(1, 6))
            crop = distort(np.ascontiguousarray(crop), kind, level, rng)
            score = float(scores[kind - 1, level - 1])
            record = Photograph(name, score, kind, level, measure_attributes(crop))
        made.append((crop, record))
    return made


def random_place(rng: np.random.Generator, shape: tuple[int, ...], side: int) -> np.ndarray:
    """Top and left of a crop."""
    return rng.integers(0, np.array(shape[:2]) - side + 1)


def place_beside(
    rng: np.random.Generator, shape: tuple[int, ...], place: np.ndarray, side: int
) -> np.ndarray:
    """A place a little aside, as a hand moves between two shots."""
    moved = place + rng.integers(-(side // 32), side // 32 + 1, 2)
    return np.clip(moved, 0, np.array(shape[:2]) - side)


def cut_square(pixels: np.ndarray, place: np.ndarray, side: int) -> np.ndarray:
    """One crop."""
    top, left = place
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def damaged_score(score: float, scores: np.ndarray, kind: int, level: int) -> float:
    """Score of a photograph under damage, by what it costs a pristine one.

    What is bad already loses less.

    Args:
        score: of the undamaged photograph.
        scores: (32, 5) of every distortion and level.
    """
    if level == 0 or is_untouched(kind, level):
        return score
    wanted = min(PRISTINE_SCORE, float(scores[kind - 1, level - 1]))
    return 1 + (score - 1) * (wanted - 1) / (PRISTINE_SCORE - 1)


def severity(kind: int, fall: float) -> int:
    """How severe damage is that costs so much, 0 to 5; fading colour is a style, never named."""
    return 0 if kind == FADING_COLOUR else sum(fall >= least for least in FALLS)


def scene(
    pixels: np.ndarray, name: str, score: float, scores: np.ndarray, rng: np.random.Generator
) -> list[Made]:
    """Shots of one place of a photograph: two levels of one damage, each twice."""
    kind = int(rng.choice([*range(1, len(scores) + 1), *SUBTLE]))
    lower = int(rng.integers(LEVELS))
    higher = lower + 1 if rng.random() < 0.7 else int(rng.integers(lower + 1, LEVELS + 1))
    place, made = random_place(rng, pixels.shape, SYNTHETIC_SIDE), []
    moved = place_beside(rng, pixels.shape, place, SYNTHETIC_SIDE)
    gain = 2.0 ** rng.uniform(-SHOT_EXPOSURE, SHOT_EXPOSURE)
    for at, light in ((place, 1.0), (moved, gain)):
        for level in (lower, higher):
            shot = cut_square(pixels, at, SYNTHETIC_SIDE)
            shot = np.rint(np.clip(shot * light, 0, 255)).astype(np.uint8)
            shot = distort(shot, kind, level, rng) if level else shot
            now = damaged_score(score, scores, kind, level)
            severe = severity(kind, score - now)
            named = kind if severe else 0
            made.append((shot, Photograph(name, now, named, severe, measure_attributes(shot))))
    return made


def pristine_scenes(name: str, data: Path, scores: np.ndarray) -> list[Made]:
    """Scenes of one pristine photograph."""
    pixels = read_pixels(data / "pristine" / "images" / name)
    rng = np.random.default_rng(int(name_hash(name)[-16:], 16))
    scenes = (scene(pixels, name, PRISTINE_SCORE, scores, rng) for _ in range(SCENES_PER_PRISTINE))
    return [shot for shots in scenes for shot in shots]


def human_scene(row: dict[str, str], data: Path, scores: np.ndarray) -> list[Made]:
    """One scene of a human-scored photograph."""
    pixels, photograph = human_photograph(row, data)
    rng = np.random.default_rng(int(name_hash(photograph.name)[-16:], 16))
    return scene(pixels, photograph.name, photograph.score, scores, rng)


def plain_picture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A tone, a shade between two, or noise."""
    first, second = rng.integers(0, 256, (2, 3))
    if rng.random() < 0.5:
        first = second = np.repeat(rng.choice([0, 255, 128, first[0]]), 3)
    elif rng.random() < 0.5:
        second = first
    share = np.linspace(0, 1, side)[:, None, None]
    shade = np.broadcast_to(first + share * (second - first), (side, side, 3))
    strength = rng.choice([0, 0, 2, 20, 80])
    grain = rng.normal(0, 1, (side, side, int(rng.choice([1, 3])))) * strength
    pixels: np.ndarray = np.rint(np.clip(shade + grain, 0, 255)).astype(np.uint8)
    return pixels


def plain_photograph(number: int) -> Made:
    """Pixels and record of one that is no picture of anything."""
    pixels = plain_picture(np.random.default_rng(number), SYNTHETIC_SIDE)
    record = Photograph(f"plain-{number}", PLAIN_SCORE, 0, 0, measure_attributes(pixels))
    return pixels, record


def write_set(folder: Path, name: str, count: int, made: Iterator[Made]) -> None:
    """Write pixels and records of `count` photographs; the records come last, as the seal."""
    pixels, records = None, []
    for index, (crop, record) in enumerate(made):
        if pixels is None:
            pixels = np.lib.format.open_memmap(
                folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(count, *crop.shape)
            )
        pixels[index] = crop
        records.append(json.dumps(asdict(record)))
        if (index + 1) % 500 == 0:
            print(f"{name}: {index + 1} of {count}", flush=True)
    (folder / f"{name}.jsonl").write_text("\n".join(records))


def copy_calibration_photographs(data: Path, rows: list[dict[str, str]], folder: Path) -> None:
    """Lay out training photographs for the export, which calibrates on files."""
    folder.mkdir(exist_ok=True)
    for row in sorted(rows, key=lambda r: name_hash(r["file"]))[:CALIBRATION_PHOTOGRAPHS]:
        shutil.copyfile(data / "biq2021" / "images" / row["file"], folder / row["file"])


def write_labels(rows: list[dict[str, str]], path: Path) -> None:
    """Write the label table that the anchor memory is built from."""
    with path.open("w", newline="") as table:
        writer = csv.DictWriter(table, ("file", "mos"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def prepare(data: Path, folder: Path, workers: int) -> None:
    """Decode and distort everything that training reads; sets already written are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    anchors = anchor_names(data)
    rows = [row for row in human_scored(data) if row["split"] == "train"]
    human = {
        "human": [row for row in rows if row["file"] not in anchors],
        "anchors": [row for row in rows if row["file"] in anchors],
    }
    cuts = human_scored(data, "crops.csv") if (data / "biq2021" / "crops.csv").exists() else []
    pristine, unseen = (pristine_names(data, held_out=held_out) for held_out in (False, True))
    scene_rows = sorted(human["human"], key=lambda row: name_hash(row["file"]))[:HUMAN_SCENES]
    table = data / "labels" / "KADID-10k.txt"
    kadid, damage = kadid_scores(table), damage_scores(table)
    per_source = SYNTHETIC_PER_PHOTOGRAPH + PRISTINE_PER_PHOTOGRAPH
    copy_calibration_photographs(data, human["human"], folder / "calibration")
    write_labels(human["anchors"], folder / "anchors.csv")
    shutil.copyfile(table, folder / "KADID-10k.txt")
    with ProcessPoolExecutor(workers) as pool:
        for name, part in {**human, "cuts": cuts}.items():
            if part and not (folder / f"{name}.jsonl").exists():
                read = cut_photograph if name == "cuts" else human_photograph
                made = pool.map(partial(read, data=data), part, chunksize=16)
                write_set(folder, name, len(part), iter(made))
        if not (folder / "plain.jsonl").exists():
            write_set(folder, "plain", PLAIN_PICTURES, map(plain_photograph, range(PLAIN_PICTURES)))
        makers: dict[str, tuple[Callable[..., list[Made]], Sequence[Any], int, np.ndarray]] = {
            "distorted": (distorted_photographs, pristine, per_source, kadid),
            "distorted_unseen": (distorted_photographs, unseen, per_source, kadid),
            "scenes": (pristine_scenes, pristine, SCENES_PER_PRISTINE * SHOTS_PER_SCENE, damage),
            "scenes_unseen": (
                pristine_scenes,
                unseen,
                SCENES_PER_PRISTINE * SHOTS_PER_SCENE,
                damage,
            ),
            "human_scenes": (human_scene, scene_rows, SHOTS_PER_SCENE, damage),
        }
        for name, (maker, sources, each, scores) in makers.items():
            if not (folder / f"{name}.jsonl").exists():
                batches = pool.map(partial(maker, data=data, scores=scores), sources)
                write_set(folder, name, len(sources) * each, (m for made in batches for m in made))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with biq2021/, pristine/ and labels/"
    )
    parser.add_argument("--work", type=Path, required=True, help="where the arrays are written")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    prepare(arguments.data, arguments.work, arguments.workers)


if __name__ == "__main__":
    run_command(main)
