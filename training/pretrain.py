"""Stage 1: the vision tower learns to judge crops.

    python -m meiqa.training.pretrain --work WORK --tower conv --minutes 30

Half of each batch is human-scored photographs, half distorted pristine ones; with `--abroad` all
are distorted ones, for a model that has never seen the photographs it is to judge. The learning
rate follows the share of the time budget that is spent, so that a run fits the time there is; a
killed run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from meiqa.export.commands import run_command
from meiqa.export.families.conv_hybrid import ConvHybridTower
from meiqa.training.backbone import begin_from_imagenet
from meiqa.training.data import PhotographSet
from meiqa.training.timed_run import Pace, TimedRun
from meiqa.training.towers import JudgedTower, make_tower, normalised

HIDDEN_SIZE = 256
CROP = 256
HUMAN_SHARE = 0.5
"""Share of a batch that is human-scored, unless the model is trained abroad."""


@dataclass(frozen=True)
class Recipe:
    """How stage 1 trains."""

    minutes: float
    batch: int = 24
    human_share: float = HUMAN_SHARE
    learning_rate: float = 1e-3
    convolutions_share: float = 0.2
    weight_decay: float = 0.05

    @property
    def pace(self) -> Pace:
        """Time budget, checkpoints and averaging."""
        return Pace(self.minutes, 4.0, warm_up_steps=200, largest_norm=2.0, average_decay=0.995)


@dataclass(frozen=True)
class CropBatch:
    """Crops and what is known about them."""

    images: Tensor
    scores: Tensor
    kinds: Tensor
    levels: Tensor
    human: Tensor

    def to(self, device: torch.device) -> CropBatch:
        """The batch on a device."""
        return CropBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


class CropSampler:
    """Draws random flipped crops from a human-scored and a distorted set."""

    def __init__(self, human: PhotographSet, distorted: PhotographSet, seed: int) -> None:
        self.sets = (human, distorted)
        self.rng = np.random.default_rng(seed)

    def crop(self, pixels: np.ndarray) -> np.ndarray:
        """One crop, flipped left to right half of the time."""
        top, left = self.rng.integers(0, np.array(pixels.shape[:2]) - CROP + 1)
        cut = pixels[top : top + CROP, left : left + CROP]
        return cut[:, ::-1] if self.rng.random() < 0.5 else cut

    def batch(self, size: int, human_share: float) -> CropBatch:
        """`size` crops, the first `human_share` of them human-scored."""
        humans = round(size * human_share)
        crops, photographs = [], []
        for source, count in zip(self.sets, (humans, size - humans), strict=True):
            for index in self.rng.integers(0, len(source.photographs), count):
                crops.append(self.crop(source.pixels[index]))
                photographs.append(source.photographs[index])
        return CropBatch(
            normalised(torch.from_numpy(np.stack(crops))),
            torch.tensor([p.score for p in photographs]),
            torch.tensor([p.kind for p in photographs]),
            torch.tensor([float(p.level) for p in photographs]),
            torch.arange(size) < humans,
        )


def stage_folder(name: str, *, abroad: bool) -> str:
    """Where a stage keeps its checkpoint; the two settings keep theirs apart."""
    return f"{name}-abroad" if abroad else name


def correlation_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - Pearson correlation."""
    p, w = predicted - predicted.mean(), wanted - wanted.mean()
    correlation: Tensor = (p * w).sum() / (p.norm() * w.norm() + 1e-6)
    return 1 - correlation


def batch_loss(model: JudgedTower, batch: CropBatch) -> Tensor:
    """Score (value and order), distortion type and level."""
    score, kind, level = model(batch.images)
    made = ~batch.human
    ordered = batch.human if batch.human.any() else made
    value = functional.smooth_l1_loss(score, batch.scores, beta=0.5)
    order = correlation_loss(score[ordered], batch.scores[ordered])
    named = functional.cross_entropy(kind[made], batch.kinds[made])
    graded = functional.smooth_l1_loss(level[made], batch.levels[made])
    return value + 0.5 * order + 0.3 * named + 0.2 * graded


@torch.no_grad()
def judged_scores(model: JudgedTower, pixels: np.ndarray, batch: int = 8) -> np.ndarray:
    """Scores (N,) of whole photographs."""
    model.eval()
    device = model.score.weight.device
    parts = [
        model(normalised(torch.from_numpy(np.array(pixels[i : i + batch])).to(device)))[0]
        for i in range(0, len(pixels), batch)
    ]
    return torch.cat(parts).cpu().numpy()


class Pretraining(TimedRun):
    """A resumable run of stage 1."""

    def __init__(self, work: Path, tower: str, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(0)
        self.recipe, self.device = recipe, device
        self.model = JudgedTower(make_tower(tower, HIDDEN_SIZE), HIDDEN_SIZE)
        if isinstance(self.model.tower, ConvHybridTower):
            begin_from_imagenet(self.model.tower)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model)
        optimiser = torch.optim.AdamW(
            self.parameter_groups(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        parts: dict[str, nn.Module] = {"model": self.model, "average": self.average}
        folder = work / stage_folder(f"stage1-{tower}", abroad=recipe.human_share == 0.0)
        super().__init__(folder, parts, optimiser, recipe.pace)

    def parameter_groups(self) -> list[dict[str, object]]:
        """All at full rate, but convolutions that ImageNet has taught already."""
        tower, rate = self.model.tower, self.recipe.learning_rate
        taught: list[nn.Parameter] = []
        if isinstance(tower, ConvHybridTower):
            taught = [*tower.stem.parameters(), *tower.stages.parameters()]
        known = {id(parameter) for parameter in taught}
        fresh = [p for p in self.model.parameters() if id(p) not in known]
        return [
            {"params": fresh, "lr": rate},
            {"params": taught, "lr": rate * self.recipe.convolutions_share},
        ]

    def step(self, sampler: CropSampler) -> float:
        """One optimiser step; returns the loss."""
        self.model.train()
        batch = sampler.batch(self.recipe.batch, self.recipe.human_share)
        loss = batch_loss(self.model, batch.to(self.device))
        self.descend(loss)
        return float(loss.detach())

    def unseen_srcc(self, judged: PhotographSet, count: int) -> float:
        """Rank correlation of the average's scores on photographs kept out of training."""
        scores = judged_scores(self.average, judged.pixels[:count])
        return float(spearmanr(scores, judged.scores[:count]).statistic)

    def run(self, sampler: CropSampler, judged: PhotographSet, judged_count: int) -> None:
        """Train until the time is spent, with a log line and a checkpoint every few minutes."""
        self.run_until_spent(
            lambda: {"loss": self.step(sampler)},
            lambda: {
                "crops": self.steps * self.recipe.batch,
                "unseen_srcc": self.unseen_srcc(judged, judged_count),
            },
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.training.pretrain")
    parser.add_argument("--work", type=Path, required=True, help="folder written by training.data")
    parser.add_argument("--tower", choices=("conv", "vit"), default="conv")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--abroad", action="store_true", help="see no human-scored photograph")
    parser.add_argument("--judged", type=int, default=256, help="unseen photographs in a log line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(arguments.minutes, human_share=0.0 if arguments.abroad else HUMAN_SHARE)
    run = Pretraining(arguments.work, arguments.tower, recipe, arguments.device)
    sampler = CropSampler(
        PhotographSet.load(arguments.work, "human"),
        PhotographSet.load(arguments.work, "distorted"),
        seed=run.steps,
    )
    run.run(sampler, PhotographSet.load(arguments.work, "anchors"), arguments.judged)


if __name__ == "__main__":
    run_command(main)
