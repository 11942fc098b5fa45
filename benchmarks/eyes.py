"""What the engine sees of what people see at once.

    python -m benchmarks.eyes --data DATA [--photographs 40] [--ladders 12]

Unseen pristine photographs are damaged step by step (KADID-10k's 25 types, and seven of tone and
colour, whose wanted scores are settings; a step counts where the wanted scores of the two levels
differ): how often does `compare` find the better one, how often
do the two scores, and does the score fall along the ladder? Of two hand-held shots, one of which
is damaged by one level, is the sound one chosen? And how far does the score move under haze, casts
and darkness, under what people hardly mind, and on what is no picture at all?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meiqa.engine.engine import Engine
from meiqa.evaluation.metrics import srcc
from meiqa.locations import embedded_assets
from meiqa.progress import Progress
from training.data import (
    PRISTINE_SCORE,
    SHOT_EXPOSURE,
    cut_square,
    damaged_score,
    place_beside,
    pristine_names,
    random_place,
    read_pixels,
)
from training.distortions import (
    EQUAL_TO_THE_EYE,
    KINDS,
    LEVELS,
    TONES,
    damage_scores,
    distort,
)
from training.readout import CHANGES, PLAIN

SIDE = 384
"""Of the squares that are damaged, in pixels."""
HANDS = 4
"""Pairs of hand-held shots of each photograph."""


@dataclass(frozen=True)
class Watcher:
    """An engine, and what is wanted of each type and level of damage, (32, 5)."""

    engine: Engine
    wanted: np.ndarray

    def score(self, pixels: np.ndarray) -> float:
        """Score pixels, without learning."""
        return self.engine.score(pixels, learn=False).score

    def level_score(self, kind: int, level: int) -> float:
        """Give what is wanted of a pristine photograph under damage."""
        return damaged_score(PRISTINE_SCORE, self.wanted, kind, level)

    def prefers_first(self, first: np.ndarray, second: np.ndarray) -> bool:
        """Ask which of two looks better."""
        return self.engine.compare(first, second).preference > 0.5

    def ladder(self, source: np.ndarray, kind: int, seed: int) -> dict[str, Any]:
        """Climb one ladder; give the steps that count, those found each way, and the SRCC."""
        rng = np.random.default_rng(seed)
        levels = range(1, LEVELS + 1)
        rungs = [source, *(distort(source, kind, level, rng) for level in levels)]
        wanted = [self.level_score(kind, level) for level in range(LEVELS + 1)]
        scores = [self.score(rung) for rung in rungs]
        steps = [(i, i + 1) for i in range(LEVELS) if differ(wanted[i], wanted[i + 1])]
        return {
            "steps": len(steps),
            "by_comparing": sum(
                self.prefers_first(rungs[i], rungs[j]) == (wanted[i] > wanted[j]) for i, j in steps
            ),
            "by_scores": sum((scores[i] > scores[j]) == (wanted[i] > wanted[j]) for i, j in steps),
            "srcc": srcc(np.array(scores), np.array(wanted)),
        }

    def hand_held(self, pixels: np.ndarray, seed: int) -> tuple[bool, bool]:
        """Damage one of two hand-held shots; tell if the sound one is chosen, and scored higher."""
        rng, kinds = np.random.default_rng(seed), len(self.wanted)
        kind, level = int(rng.integers(1, kinds + 1)), int(rng.integers(0, LEVELS))
        while self.level_score(kind, level) - self.level_score(kind, level + 1) < EQUAL_TO_THE_EYE:
            kind, level = int(rng.integers(1, kinds + 1)), int(rng.integers(0, LEVELS))
        side = min(SIDE, *(side - side // 32 for side in pixels.shape[:2]))
        place = random_place(rng, pixels.shape, side)
        aside = place_beside(rng, pixels.shape, place, side)
        gain = 2.0 ** rng.uniform(-SHOT_EXPOSURE, SHOT_EXPOSURE)
        sound, damaged = cut_square(pixels, place, side), cut_square(pixels, aside, side)
        damaged = np.rint(np.clip(damaged * gain, 0, 255)).astype(np.uint8)
        sound = distort(sound, kind, level, rng) if level else sound
        damaged = distort(damaged, kind, level + 1, rng)
        first = bool(rng.integers(2))
        chosen = (
            self.prefers_first(sound, damaged) if first else not self.prefers_first(damaged, sound)
        )
        return chosen, self.score(sound) > self.score(damaged)


def differ(first: float, second: float) -> bool:
    """Tell if two levels are a step."""
    return abs(first - second) > EQUAL_TO_THE_EYE


def climbed(
    watcher: Watcher, sources: Sequence[np.ndarray], progress: Progress
) -> dict[str, dict[str, float]]:
    """Climb every ladder on every photograph; figures by type."""
    found = {}
    for kind in (*KINDS, *TONES):
        ladders = []
        for seed, source in enumerate(sources):
            ladders.append(watcher.ladder(source, kind.number, seed))
            progress.advance()
        steps = sum(ladder["steps"] for ladder in ladders)
        found[kind.name] = {
            "steps": steps,
            "by_comparing": sum(ladder["by_comparing"] for ladder in ladders) / steps,
            "by_scores": sum(ladder["by_scores"] for ladder in ladders) / steps,
            "srcc": float(np.mean([ladder["srcc"] for ladder in ladders])),
        }
    return found


def over(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Put types together: steps by their number, ladders by their mean and the worst."""
    steps = np.array([row["steps"] for row in rows])
    shares = {
        name: float(np.average([row[name] for row in rows], weights=steps))
        for name in ("by_comparing", "by_scores")
    }
    ladders = [row["srcc"] for row in rows]
    return {
        "steps": int(steps.sum()),
        **shares,
        "srcc": float(np.mean(ladders)),
        "worst": min(ladders),
    }


def moved(watcher: Watcher, whole: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Tell how far each change moves the score, and how often it falls."""
    before = np.array([watcher.score(pixels) for pixels in whole])
    found = {}
    for name, change in CHANGES.items():
        rng = np.random.default_rng(0)
        falls = before - [watcher.score(change(pixels, rng)) for pixels in whole]
        found[name] = {
            "fall": float(falls.mean()),
            "size": float(np.abs(falls).mean()),
            "falls": float((falls > 0).mean()),
        }
    return found


def bench_eyes(watcher: Watcher, data: Path, photographs: int, ladders: int) -> dict[str, Any]:
    """Give every figure, JSON-ready."""
    names = pristine_names(data, held_out=True)[:photographs]
    whole = [read_pixels(data / "pristine" / "images" / name) for name in names]
    squares = [middle(pixels) for pixels in whole[:ladders]]
    with Progress((len(KINDS) + len(TONES)) * len(squares)) as progress:
        rows = climbed(watcher, squares, progress)
    hands = np.array(
        [
            watcher.hand_held(pixels, HANDS * number + hand)
            for number, pixels in enumerate(whole)
            for hand in range(HANDS)
        ],
        float,
    )
    ordered = list(rows.values())
    return {
        "photographs": len(whole),
        "ladders": len(squares),
        "KADID-10k's types": over(ordered[: len(KINDS)]),
        "tone and colour": over(ordered[len(KINDS) :]),
        "hand-held": {
            "pairs": len(hands),
            "by_comparing": float(hands[:, 0].mean()),
            "by_scores": float(hands[:, 1].mean()),
        },
        "changes": moved(watcher, whole),
        "plain": {name: watcher.score(pixels) for name, pixels in PLAIN.items()},
        "types": rows,
    }


def middle(pixels: np.ndarray) -> np.ndarray:
    """Cut the middle of a photograph."""
    side = min(SIDE, *pixels.shape[:2])
    return cut_square(pixels, (np.array(pixels.shape[:2]) - side) // 2, side)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eyes", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="as docs/training.md lays it out")
    parser.add_argument("--package", type=Path)
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--photographs", type=int, default=40, help="unseen pristine ones")
    parser.add_argument("--ladders", type=int, default=12, help="of them, for ladders")
    given = parser.parse_args()
    memory = given.memory or embedded_assets() / "memory"
    wanted = damage_scores(given.data / "labels" / "KADID-10k.txt")
    with Engine.open(given.package, memory=memory, learn=False) as engine:
        watcher = Watcher(engine, wanted)
        print(
            json.dumps(bench_eyes(watcher, given.data, given.photographs, given.ladders), indent=1)
        )


if __name__ == "__main__":
    main()
