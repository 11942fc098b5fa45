"""Stage 2: what reads the cells' statistics learns on many more pictures than convolutions can see.

    python -m training.reading --work WORK --minutes 25 --bfloat16

The convolutions of stage 1 stay as they are, so that the statistics of every picture are computed
once, and a step takes a tenth of the time. Half of a batch is human-scored, half shots of scenes:
the better of two levels must score higher, and a shot by another hand the same. Beside the tower's
own score a linear one is trained, of mean and deviation of the visual tokens: that is what the
memory's regression reads of them.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from training.cells import CellSet, Drawn, cached_cells
from training.commands import run_command
from training.data import SHOTS_PER_SCENE
from training.distortions import EQUAL_TO_THE_EYE
from training.pretrain import (
    HIDDEN_SIZE,
    UNNAMED,
    CropBatch,
    Remembered,
    batch_loss,
    collection_of,
    gap_loss,
    load_judged,
    save_judged,
    stage_folder,
    value_loss,
)
from training.timed_run import Pace, TimedRun
from training.towers import ConvTower, JudgedTower

HUMAN_SHARE, SCENE_SHARE = 0.46, 0.5
"""Of a batch; the rest is plain."""
SIDES = ((3, 96, 0.3), (5, 64, 0.35), (8, 32, 0.35))
"""Cells a side of a window, how many windows, and how often."""
KEPT_CELLS = (0.5, 1.0)
"""Share of a batch's cells that is shown, drawn anew each time."""
REPORTED_ANCHORS, REPORTED_SHOTS, AT_ONCE = 512, 1_600, 32


@dataclass(frozen=True)
class Recipe:
    """How the reading is trained."""

    minutes: float = math.inf
    steps: float = math.inf
    learning_rate: float = 5e-4
    embed_share: float = 0.3
    weight_decay: float = 0.2

    @property
    def pace(self) -> Pace:
        """Budget, checkpoints and averaging."""
        return Pace(
            self.minutes,
            checkpoint_minutes=2.5,
            warm_up_steps=200,
            largest_norm=2.0,
            average_decay=0.998,
            steps=self.steps,
        )


class SceneSampler:
    """Draws windows of human-scored photographs, of all shots of scenes, and of plain pictures."""

    def __init__(
        self, human: Sequence[CellSet], scenes: Sequence[CellSet], plain: CellSet, seed: int
    ) -> None:
        """Draw from these; abroad there are no human-scored ones."""
        self.human, self.scenes, self.plain = human, scenes, plain
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int, side: int) -> CropBatch:
        """About `size` windows of `side` x `side` cells, scenes whole."""
        humans = round(size * HUMAN_SHARE) if self.human else 0
        scenes = round(size * SCENE_SHARE) // SHOTS_PER_SCENE
        if not humans:
            scenes = size // SHOTS_PER_SCENE - 1
        drawn = [self.scored(side) for _ in range(humans)]
        drawn += [shot for _ in range(scenes) for shot in self.scene(side)]
        rest = size - len(drawn)
        drawn += [self.window(self.plain, self.any_of(self.plain), side) for _ in range(rest)]
        windows, records = zip(*drawn, strict=True)
        scores = torch.tensor([record.score for record in records])
        scored = torch.arange(len(records)) < humans
        groups = [collection_of(r.name) if h else 0 for r, h in zip(records, scored, strict=True)]
        first = humans + SHOTS_PER_SCENE * torch.arange(scenes)[:, None]
        # As the camera stood and after the hand moved, the lower level first each time.
        pairs = (first + torch.tensor([[[0, 1]], [[2, 3]], [[0, 3]], [[2, 1]]])).reshape(-1, 2)
        falls = scores[pairs[:, 0]] < scores[pairs[:, 1]]
        pairs = torch.where(falls[:, None], pairs.flip(1), pairs)
        return CropBatch(
            torch.from_numpy(np.stack(windows)).float(),
            scores,
            torch.tensor([r.kind for r in records[: size - rest]] + [UNNAMED] * rest),
            torch.tensor([float(record.level) for record in records]),
            scored,
            torch.tensor(groups),
            torch.cat([first + torch.tensor([0, 2]), first + torch.tensor([1, 3])]),
            pairs[(scores[pairs[:, 0]] - scores[pairs[:, 1]]) > EQUAL_TO_THE_EYE],
        )

    def any_of(self, cells: CellSet) -> int:
        """Number of any picture."""
        return int(self.rng.integers(len(cells.photographs)))

    def window(self, cells: CellSet, index: int, side: int, at: np.ndarray | None = None) -> Drawn:
        """A window and its record."""
        place = self.rng.random(2) if at is None else at
        mirrored = bool(self.rng.integers(2))
        window = cells.window(index, (side, side), place, mirrored=mirrored)
        return window, cells.photographs[index]

    def scored(self, side: int) -> Drawn:
        """A window of a human-scored photograph, of the smallest set that holds it."""
        source = next(s for s in self.human if min(s.features.shape[1:3]) >= side)
        return self.window(source, self.any_of(source), side)

    def scene(self, side: int) -> list[Drawn]:
        """Windows of all shots of one scene."""
        sizes = np.array([len(s.photographs) for s in self.scenes])
        source = self.scenes[self.rng.choice(len(sizes), p=sizes / sizes.sum())]
        begin = self.any_of(source) // SHOTS_PER_SCENE * SHOTS_PER_SCENE
        at = self.rng.random(2)
        return [self.window(source, begin + shot, side, at) for shot in range(SHOTS_PER_SCENE)]


class LinearScore(nn.Module):
    """A score of mean and deviation of the visual tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(2 * HIDDEN_SIZE, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, cells, D) → scores (B,)."""
        deviation = torch.sqrt(tokens.var(1, correction=0) + 1e-6)
        score: Tensor = self.weights(torch.cat([tokens.mean(1), deviation], -1))
        return 3.0 + score.squeeze(-1)


class Reading(TimedRun):
    """A resumable run."""

    def __init__(self, model: JudgedTower, folder: Path, recipe: Recipe) -> None:
        assert isinstance(model.tower, ConvTower)
        self.recipe, self.model, self.remembered = recipe, model, Remembered()
        self.linear = LinearScore()
        self.average = copy.deepcopy(model)
        tower, rate = model.tower, recipe.learning_rate
        heads: list[nn.Module] = [
            tower.whole,
            tower.blocks,
            tower.merger_norm,
            tower.merger,
            self.linear,
        ]
        heads += [model.mix, model.score, model.kind, model.level]
        groups = [
            {"params": [p for head in heads for p in head.parameters()], "lr": rate},
            {"params": [*tower.embed.parameters()], "lr": rate * recipe.embed_share},
        ]
        optimiser = torch.optim.AdamW(groups, rate, weight_decay=recipe.weight_decay)
        parts: dict[str, nn.Module] = {
            "model": model,
            "average": self.average,
            "linear": self.linear,
            "remembered": self.remembered,
        }
        super().__init__(folder, parts, optimiser, recipe.pace)

    def step(self, sampler: SceneSampler) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        sides = np.array([share for *_, share in SIDES])
        side, count, _ = SIDES[sampler.rng.choice(len(SIDES), p=sides)]
        batch = sampler.batch(count, side)
        cells = batch.images.shape[1]
        kept = sampler.rng.permutation(cells)[: round(cells * sampler.rng.uniform(*KEPT_CELLS))]
        tokens = self.seen_by(self.model, batch.images[:, kept])
        losses = batch_loss(self.model.judged(tokens), batch, self.remembered)
        linear = self.linear(tokens)
        losses["linear"] = value_loss(linear, batch) + gap_loss(linear, batch)
        self.descend(torch.stack(list(losses.values())).sum())
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def seen_by(self, model: JudgedTower, features: Tensor) -> Tensor:
        """Statistics (B, cells, F) → visual tokens (B, cells, D)."""
        assert isinstance(model.tower, ConvTower)
        return model.tower.tokens_from_features(features)

    @torch.no_grad()
    def scores(self, cells: CellSet, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The average's own score, and the linear one."""
        own, linear = [], []
        for start in range(0, len(chosen), AT_ONCE):
            features = np.array(cells.features[chosen[start : start + AT_ONCE]], np.float32)
            tokens = self.seen_by(self.average, torch.from_numpy(features).flatten(1, 2))
            own.append(self.average.judged(tokens)[0])
            linear.append(self.linear(tokens))
        return torch.cat(own).numpy(), torch.cat(linear).numpy()

    def report(self, anchors: CellSet, scenes: CellSet, plain: CellSet) -> dict[str, float]:
        """On what is unseen: rank correlation, and how often the better level scores higher."""
        spread = np.linspace(0, len(anchors.photographs) - 1, REPORTED_ANCHORS).astype(int)
        human = np.array([anchors.photographs[i].score for i in spread])
        shots = np.arange(min(REPORTED_SHOTS, len(scenes.photographs)))
        wanted = np.array([scenes.photographs[i].score for i in shots]).reshape(-1, 2)
        differ = np.abs(wanted[:, 0] - wanted[:, 1]) > EQUAL_TO_THE_EYE
        found = {}
        judged = zip(self.scores(anchors, spread), self.scores(scenes, shots), strict=True)
        for name, (whole, shot) in zip(("own", "linear"), judged, strict=True):
            steps = shot.reshape(-1, 2)
            right = (steps[:, 0] > steps[:, 1]) == (wanted[:, 0] > wanted[:, 1])
            found[f"{name}_srcc"] = float(spearmanr(whole, human).statistic)
            found[f"{name}_steps"] = float(right[differ].mean())
        found["plain"] = float(
            self.scores(plain, np.arange(min(64, len(plain.photographs))))[0].mean()
        )
        return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.reading")
    parser.add_argument("--work", type=Path, required=True, help="folder with the data and stage 1")
    parser.add_argument("--tower", type=Path, help="of stage 1 (default: the one in WORK)")
    parser.add_argument("--out", type=Path, help="write the tower there at the end (safetensors)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=float, default=math.inf, help="what else ends it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="convolve in half precision")
    parser.add_argument("--abroad", action="store_true", help="see no human-scored photograph")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    work, abroad = arguments.work, arguments.abroad
    stage1 = work / stage_folder("stage1-conv", abroad=abroad) / "checkpoint.pt"
    model = load_judged(arguments.tower or stage1)
    assert isinstance(model.tower, ConvTower)
    model.tower.in_half = arguments.bfloat16
    human, scenes, (plain, anchors, unseen) = (
        [cached_cells(model.tower, work, name) for name in names]
        for names in (
            [] if abroad else ["cuts", "human"],
            ["scenes"] if abroad else ["scenes", "human_scenes"],
            ["plain", "anchors", "scenes_unseen"],
        )
    )
    folder = work / stage_folder("reading", abroad=abroad)
    run = Reading(model, folder, Recipe(arguments.minutes, arguments.steps))
    sampler = SceneSampler(human, scenes, plain, run.steps)
    run.run_until_spent(lambda: run.step(sampler), lambda: run.report(anchors, unseen, plain))
    if arguments.out is not None:
        save_judged(run.average, arguments.out)


if __name__ == "__main__":
    run_command(main)
