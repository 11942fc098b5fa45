"""Stage 1: the vision tower learns to judge crops.

    python -m meiqa.training.pretrain --work WORK --tower conv --minutes 30

Half of each batch is human-scored photographs, half distorted pristine ones. The learning rate
follows the share of the time budget that is spent, so that a run fits the time there is; a killed
run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from meiqa.export.commands import run_command
from meiqa.training.data import PhotographSet
from meiqa.training.towers import JudgedTower, make_tower, normalised

HIDDEN_SIZE = 256
CROP = 256


@dataclass(frozen=True)
class Recipe:
    """How stage 1 trains."""

    minutes: float
    batch: int = 24
    human_share: float = 0.5
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    average_decay: float = 0.995
    checkpoint_minutes: float = 4.0


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


def correlation_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - Pearson correlation."""
    p, w = predicted - predicted.mean(), wanted - wanted.mean()
    correlation: Tensor = (p * w).sum() / (p.norm() * w.norm() + 1e-6)
    return 1 - correlation


def batch_loss(model: JudgedTower, batch: CropBatch) -> Tensor:
    """Score (value and order), distortion type and level."""
    score, kind, level = model(batch.images)
    made = ~batch.human
    value = functional.smooth_l1_loss(score, batch.scores, beta=0.5)
    order = correlation_loss(score[batch.human], batch.scores[batch.human])
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


@torch.no_grad()
def average_into(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average's weights and statistics towards the model's; copy its counters."""
    pairs = zip(
        (*average.parameters(), *average.buffers()),
        (*model.parameters(), *model.buffers()),
        strict=True,
    )
    for kept, new in pairs:
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


class Pretraining:
    """A resumable run of stage 1."""

    def __init__(self, work: Path, tower: str, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(0)
        self.recipe, self.folder, self.device = recipe, work / f"stage1-{tower}", device
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = JudgedTower(make_tower(tower, HIDDEN_SIZE), HIDDEN_SIZE)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.steps, self.spent_s = 0, 0.0
        if (self.folder / "checkpoint.pt").exists():
            self.resume()

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps, self.spent_s = state["steps"], state["spent_s"]

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the one before."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "steps": self.steps,
            "spent_s": self.spent_s,
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")

    def learning_rate(self) -> float:
        """Warm-up over the first 200 steps, then a cosine over the time budget."""
        share = min(1.0, self.spent_s / (60 * self.recipe.minutes))
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return self.recipe.learning_rate * min(1.0, (self.steps + 1) / 200) * (0.02 + 0.98 * cosine)

    def step(self, sampler: CropSampler) -> float:
        """One optimiser step; returns the loss."""
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        batch = sampler.batch(self.recipe.batch, self.recipe.human_share)
        loss = batch_loss(self.model, batch.to(self.device))
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimiser.step()
        self.steps += 1
        average_into(
            self.average, self.model, min(self.recipe.average_decay, 1 - 10 / (self.steps + 10))
        )
        return float(loss.detach())

    def run(self, sampler: CropSampler, judged: PhotographSet, judged_count: int) -> None:
        """Train until the time is spent, with a log line and a checkpoint every few minutes."""
        next_save_s, losses = self.spent_s + 60 * self.recipe.checkpoint_minutes, []
        while self.spent_s < 60 * self.recipe.minutes:
            began = time.perf_counter()
            losses.append(self.step(sampler))
            self.spent_s += time.perf_counter() - began
            if self.spent_s >= next_save_s or self.spent_s >= 60 * self.recipe.minutes:
                self.save()
                self.log(losses, judged, judged_count)
                losses, next_save_s = [], self.spent_s + 60 * self.recipe.checkpoint_minutes

    def log(self, losses: list[float], judged: PhotographSet, count: int) -> None:
        """Append the loss and the rank correlation on photographs kept out of training."""
        scores = judged_scores(self.average, judged.pixels[:count])
        line = {
            "minutes": round(self.spent_s / 60, 2),
            "steps": self.steps,
            "crops": self.steps * self.recipe.batch,
            "loss": round(float(np.mean(losses)), 4),
            "unseen_srcc": round(float(spearmanr(scores, judged.scores[:count]).statistic), 4),
        }
        print(json.dumps(line), flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.training.pretrain")
    parser.add_argument("--work", type=Path, required=True, help="folder written by training.data")
    parser.add_argument("--tower", choices=("conv", "vit"), default="conv")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--judged", type=int, default=256, help="unseen photographs in a log line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = Pretraining(arguments.work, arguments.tower, Recipe(arguments.minutes), arguments.device)
    sampler = CropSampler(
        PhotographSet.load(arguments.work, "human"),
        PhotographSet.load(arguments.work, "distorted"),
        seed=run.steps,
    )
    run.run(sampler, PhotographSet.load(arguments.work, "anchors"), arguments.judged)


if __name__ == "__main__":
    run_command(main)
