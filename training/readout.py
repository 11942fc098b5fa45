"""What a tower of stage 1 sees: read out of it without a decoder.

    python -m training.readout --work WORK --data DATA

Prints one JSON object: rank correlations on the anchors (of the tower's own score, of a kernel
regression on its tokens, out of fold, and of both together), how often neighbouring levels of the
unseen pristine photographs are told apart, and how far changes move the score that people hardly
or strongly mind. With `--val` the same is read of that split, from the anchors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.manifest import ImageProcessing
from training.checkpoint import MAX_PIXELS, MIN_PIXELS
from training.commands import run_command
from training.data import (
    PhotographSet,
    human_photograph,
    human_scored,
    pristine_names,
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
from training.pretrain import load_judged, stage_folder
from training.towers import MEAN, STD, ConvTower, JudgedTower, normalised

FOLDS = 8
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3)
SHARES = tuple(np.linspace(0, 1, 11))
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def damaged(kind: int, level: int) -> Change:
    """A change by one level of a distortion."""
    return lambda pixels, rng: distort(pixels, kind, level, rng)


CHANGES: dict[str, Change] = {
    "contrast x 0.3": damaged(26, 5),
    "haze": damaged(27, 5),
    "colour cast": damaged(28, 5),
    "light x 0.12": damaged(29, 3),
    "tones x 0.12": lambda pixels, rng: np.rint(pixels * 0.12).astype(np.uint8),
    "light x 3": damaged(30, 3),
    "tones x 3": lambda pixels, rng: np.minimum(pixels.astype(int) * 3, 255).astype(np.uint8),
    "black-and-white": damaged(31, 5),
    "JPEG 97": damaged(32, 1),
    "JPEG 85": damaged(32, 3),
    "JPEG 75": damaged(32, 4),
    "trimmed by 3 pixels": lambda pixels, rng: pixels[3:-3, 3:-3].copy(),
    "mirrored": lambda pixels, rng: pixels[:, ::-1].copy(),
}
PLAIN: dict[str, np.ndarray] = {
    **{
        name: np.full((512, 512, 3), tone, np.uint8)
        for name, tone in {"black": 0, "white": 255, "grey": 128}.items()
    },
    "noise": np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8),
}
"""What is no picture."""


@dataclass(frozen=True)
class Reading:
    """Scores (N,) and pooled tokens (N, 2 D) of photographs."""

    scores: np.ndarray
    tokens: np.ndarray


class Eyes:
    """A tower that reads photographs of any size."""

    def __init__(self, model: JudgedTower) -> None:
        self.model = model.eval()
        assert isinstance(model.tower, ConvTower)
        shape = model.tower.config
        self.image = ImageProcessing(
            shape.patch_size, shape.merge_size, MIN_PIXELS, MAX_PIXELS, MEAN, STD, pad_to_grid=True
        )

    @torch.no_grad()
    def read(self, pictures: list[np.ndarray]) -> Reading:
        """Read pictures one by one."""
        scores, pooled = [], []
        for picture in pictures:
            fitted = fit_to_grid(load_pixels(picture), self.image)
            tokens = self.model.tower.tokens(normalised(torch.from_numpy(np.array(fitted))[None]))
            mixed = self.model.mix(tokens)[0]
            scores.append(3.0 + float(self.model.score(mixed.mean(0))))
            pooled.append(torch.cat([mixed.mean(0), tokens[0].mean(0), tokens[0].std(0)]).numpy())
        return Reading(np.array(scores), np.stack(pooled))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's."""
    return float(spearmanr(first, second).statistic)


def regressed(known: np.ndarray, scores: np.ndarray, asked: np.ndarray, ridge: float) -> np.ndarray:
    """Kernel regression of scores on standardised tokens; the kernel is Gaussian.

    Its width is the median squared distance between the known.
    """
    centre, spread = known.mean(0), known.std(0) + 1e-3
    known, asked = (known - centre) / spread, (asked - centre) / spread
    squares = distances(known, known)
    width = float(np.median(squares))
    gram = np.exp(-squares / width) + ridge * np.eye(len(known))
    mean = scores.mean()
    weights = np.linalg.solve(gram, scores - mean)
    answer: np.ndarray = mean + np.exp(-distances(asked, known) / width) @ weights
    return answer


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distances (N, M)."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    above: np.ndarray = np.maximum(squares, 0)
    return above


def on_anchors(reading: Reading, wanted: np.ndarray) -> dict[str, float]:
    """Figures on the anchors, and the ridge and share that are best there."""
    folds = np.arange(len(wanted)) % FOLDS
    best = {"kernel": -1.0, "both": -1.0}
    for ridge in RIDGES:
        out = np.empty(len(wanted))
        for fold in range(FOLDS):
            held = folds == fold
            out[held] = regressed(reading.tokens[~held], wanted[~held], reading.tokens[held], ridge)
        kernel = correlation(out, wanted)
        if kernel > best["kernel"]:
            best |= {"kernel": kernel, "ridge": ridge, "both": -1.0}
            for share in SHARES:
                both = correlation(share * out + (1 - share) * reading.scores, wanted)
                if both > best["both"]:
                    best |= {"both": both, "share": share}
    return {"score": correlation(reading.scores, wanted), **best}


def told_apart(
    eyes: Eyes, sources: list[np.ndarray], wanted: np.ndarray
) -> dict[str, dict[str, float]]:
    """Of each distortion: steps in the right order, and the ladder's rank correlation."""
    found = {}
    for kind in (*KINDS, *TONES):
        right, steps, ladders = 0, 0, []
        targets = np.array([4.6, *wanted[kind.number - 1]])
        for number, source in enumerate(sources):
            rng = np.random.default_rng(number)
            ladder = [
                source,
                *(distort(source, kind.number, level, rng) for level in range(1, LEVELS + 1)),
            ]
            scores = eyes.read(ladder).scores
            gaps = np.diff(targets)
            real = np.abs(gaps) > EQUAL_TO_THE_EYE
            right += int((np.sign(np.diff(scores)) == np.sign(gaps))[real].sum())
            steps += int(real.sum())
            ladders.append(correlation(scores[1:], targets[1:]))
        found[kind.name] = {"steps": right / steps, "ladder": float(np.mean(ladders))}
    return found


def moved(eyes: Eyes, sources: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Of each change: mean fall of the score, its mean size, and how often it falls."""
    before = eyes.read(sources).scores
    found = {}
    for name, change in CHANGES.items():
        rng = np.random.default_rng(0)
        falls = before - eyes.read([change(source, rng) for source in sources]).scores
        found[name] = {
            "fall": float(falls.mean()),
            "size": float(np.abs(falls).mean()),
            "falls": float((falls > 0).mean()),
        }
    return found


def plain_scores(eyes: Eyes) -> dict[str, float]:
    """Scores of what is no picture."""
    return dict(zip(PLAIN, eyes.read(list(PLAIN.values())).scores.tolist(), strict=True))


def squares_of(names: list[str], folder: Path, side: int) -> list[np.ndarray]:
    """The middle of photographs."""
    made = []
    for name in names:
        pixels = read_pixels(folder / name)
        top, left = ((n - min(n, side)) // 2 for n in pixels.shape[:2])
        made.append(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.readout")
    parser.add_argument("--work", type=Path, required=True, help="folder with stage 1")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tower", type=Path, help="of stage 1 (default: the one in WORK)")
    parser.add_argument("--photographs", type=int, default=40, help="unseen pristine ones")
    parser.add_argument("--ladders", type=int, default=12, help="of them, for ladders")
    parser.add_argument("--bfloat16", action="store_true", help="convolve in half precision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--val", action="store_true", help="look at val, which is to be rare")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stage1 = arguments.work / stage_folder("stage1-conv", abroad=False) / "checkpoint.pt"
    model = load_judged(arguments.tower or stage1)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(model.tower, ConvTower)
    model.tower.in_half = arguments.bfloat16
    eyes, data = Eyes(model), arguments.data
    anchors = PhotographSet.load(arguments.work, "anchors")
    known, wanted = eyes.read(list(anchors.pixels)), anchors.scores
    best = on_anchors(known, wanted)
    report: dict[str, object] = {"anchors": best}
    if arguments.val:
        rows = [row for row in human_scored(data) if row["split"] == "val"]
        photographs = [human_photograph(row, data) for row in rows]
        truth = np.array([record.score for _, record in photographs])
        seen = eyes.read([pixels for pixels, _ in photographs])
        kernel = regressed(known.tokens, wanted, seen.tokens, best["ridge"])
        both = best["share"] * kernel + (1 - best["share"]) * seen.scores
        figures = {"score": seen.scores, "kernel": kernel, "both": both}
        report["val"] = {name: correlation(value, truth) for name, value in figures.items()}
    names = pristine_names(data, held_out=True)[: arguments.photographs]
    whole = [read_pixels(data / "pristine" / "images" / name) for name in names]
    report |= {"changes": moved(eyes, whole), "plain": plain_scores(eyes)}
    squares = squares_of(names[: arguments.ladders], data / "pristine" / "images", 320)
    scores = damage_scores(data / "labels" / "KADID-10k.txt")
    ladders = told_apart(eyes, squares, scores)
    report["steps"] = float(np.mean([found["steps"] for found in ladders.values()]))
    report["ladders"] = ladders
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_command(main)
