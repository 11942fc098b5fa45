"""Stage 1: the vision tower learns to judge crops.

    python -m training.pretrain --work WORK --tower conv --minutes 30

Half of each batch is human-scored photographs, half steps of ladders: one place of a photograph at
two levels of one damage, and a little that is no picture at all. With `--abroad` all are ladders of
pristine photographs, for a model that has never seen the photographs it is to judge. The learning
rate follows the share of the time budget that is spent, so that a run fits the time there is; a
killed run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from meiqa.export.families.conv_hybrid import Standardised
from training.backbone import (
    begin_from_checkpoint,
    begin_from_imagenet,
    begin_from_votes,
)
from training.commands import run_command
from training.data import (
    PLAIN_SCORE,
    PRISTINE_SCORE,
    SYNTHETIC_SIDE,
    PhotographSet,
    cut_square,
    damaged_score,
    place_beside,
    plain_picture,
    random_place,
)
from training.distortions import FADING_COLOUR, FINE_JPEG, LEVELS, damage_scores, distort
from training.timed_run import Pace, TimedRun
from training.towers import ConvTower, JudgedTower, make_tower, normalised

HIDDEN_SIZE = 256
HUMAN_SHARE = 0.45
"""Share of a batch that is human-scored, unless the model is trained abroad."""
LADDER_SHARE, REPEATED_SHARE = 0.2, 0.08
"""Pairs of steps, and human-scored crops that are shown twice, for each crop of a batch."""
SIZES = ((192, 32, 0.3), (256, 24, 0.2), (384, 12, 0.2), (512, 10, 0.3))
"""Side of the crops, how many of them, and how often: parts teach much at little cost, the whole
is what is judged."""
FEWEST_ORDERED = 3
REMEMBERED = 64
"""Human-scored crops of earlier steps that the order of new ones is judged with: of 512 pixels, a
step has five."""
COLLECTIONS = ("ss01", "ss02", "ss03")
SCARCE, SCARCE_SHARE = COLLECTIONS[1], 0.15
"""Photographs damaged while shooting, and the share of draws that is theirs before all others."""
FADED_SHARE, FADED_FALL = 0.08, 0.3
"""Human-scored crops that are shown in black and white, and what they are said to lose by it."""
LADDER_SOFTNESS = 0.15
MADE_WEIGHT = 0.3
UNNAMED = -100
STANDARDISED_BATCHES = 12
SMALLEST_DEVIATION = 0.05


@dataclass(frozen=True)
class Recipe:
    """How stage 1 trains."""

    minutes: float = math.inf
    steps: float = math.inf
    human_share: float = HUMAN_SHARE
    sizes: tuple[tuple[int, int, float], ...] = SIZES
    learning_rate: float = 6e-4
    taught_share: float = 0.17
    weight_decay: float = 0.05

    @property
    def pace(self) -> Pace:
        """Budget, checkpoints and averaging."""
        return Pace(
            self.minutes,
            checkpoint_minutes=5.0,
            warm_up_steps=100,
            largest_norm=2.0,
            average_decay=0.995,
            steps=self.steps,
        )


@dataclass(frozen=True)
class CropBatch:
    """Crops and what is known about them.

    Attributes:
        images: (B, 3, S, S), or statistics (B, cells, F) of their cells.
        scores: (B,); human: (B,) whether people gave the score.
        kinds: (B,) distortion, 0 for none, `UNNAMED` for what has no name; levels: (B,).
        groups: (B,) collection that the photograph is of, 0 if people did not score it.
        same: (M, 2) crops that show the same and look as good.
        ladders: (L, 2) crops of one place, the better first.
    """

    images: Tensor
    scores: Tensor
    kinds: Tensor
    levels: Tensor
    human: Tensor
    groups: Tensor
    same: Tensor
    ladders: Tensor

    def to(self, device: torch.device) -> CropBatch:
        """The batch on a device."""
        return CropBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Crop:
    """Pixels of a crop, its score, distortion and level, and the collection if people scored it."""

    pixels: np.ndarray
    score: float
    kind: int = 0
    level: int = 0
    group: int = 0


class CropSampler:
    """Draws crops of photographs, their repetitions, and steps of ladders inside a photograph."""

    def __init__(
        self, human: Sequence[PhotographSet], pristine: PhotographSet, scores: np.ndarray, seed: int
    ) -> None:
        """Draw from human-scored sets and from undistorted photographs.

        Args:
            human: sets of human-scored photographs; none when the model is trained abroad.
            pristine: its photographs without a distortion are used.
            scores: (32, 5) of every distortion and level.
            seed: of all choices.
        """
        self.human, self.pristine, self.scores = human, pristine, scores
        self.sound = [i for i, p in enumerate(pristine.photographs) if p.kind == 0]
        self.rng = np.random.default_rng(seed)
        self.scarce = {
            id(s): [i for i, p in enumerate(s.photographs) if p.name.startswith(SCARCE)]
            for s in human
        }

    def batch(self, size: int, human_share: float, side: int) -> CropBatch:
        """`size` crops of `side` pixels; without people's scores, ladders only."""
        humans = round(size * human_share) if self.human else 0
        pairs = (size - humans) // 2 if not humans else round(size * LADDER_SHARE)
        repeated = min(humans, round(size * REPEATED_SHARE))
        plain = max(0, size - humans - repeated - 2 * pairs)
        crops: list[Crop] = []
        for number in range(humans):
            crop, again = self.scored(side)
            crops += [crop, again] if number < repeated else [crop]
        for _ in range(pairs):
            crops += self.steps(side)
        crops += [Crop(plain_picture(self.rng, side), PLAIN_SCORE, UNNAMED) for _ in range(plain)]
        first = humans + repeated + 2 * torch.arange(pairs)
        return CropBatch(
            normalised(torch.from_numpy(np.stack([crop.pixels for crop in crops]))),
            torch.tensor([crop.score for crop in crops]),
            torch.tensor([crop.kind for crop in crops]),
            torch.tensor([float(crop.level) for crop in crops]),
            torch.tensor([crop.group > 0 for crop in crops]),
            torch.tensor([crop.group for crop in crops]),
            torch.stack([2 * torch.arange(repeated), 2 * torch.arange(repeated) + 1], 1),
            torch.stack([first, first + 1], 1),
        )

    def scored(self, side: int) -> tuple[Crop, Crop]:
        """A human-scored photograph's crop, and the same once more, as good to the eye."""
        fitting = [s for s in self.human if s.pixels.shape[1] >= side]
        source = min(fitting, key=lambda s: s.pixels.shape[1])
        scarce = self.scarce[id(source)]
        if scarce and self.rng.random() < SCARCE_SHARE:
            index = int(self.rng.choice(scarce))
        else:
            index = int(self.rng.integers(len(source.photographs)))
        pixels, record = source.pixels[index], source.photographs[index]
        score, group = record.score, collection_of(record.name)
        if self.rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        place = random_place(self.rng, pixels.shape, side)
        cut = cut_square(pixels, place, side)
        beside = place_beside(self.rng, pixels.shape, place, side)
        again = self.repeated(cut_square(pixels, beside, side))
        if self.rng.random() < FADED_SHARE:
            cut, again = (distort(c, FADING_COLOUR, LEVELS, self.rng) for c in (cut, again))
            score -= FADED_FALL
        return Crop(cut, score, group=group), Crop(again, score, group=group)

    def repeated(self, cut: np.ndarray) -> np.ndarray:
        """Mirrored, trimmed, stored or exposed a little differently."""
        side = len(cut)
        mirrored, trimmed, stored, exposed = self.rng.random(4) < (0.5, 0.3, 0.3, 0.3)
        if mirrored:
            cut = np.ascontiguousarray(cut[:, ::-1])
        if trimmed:
            off = int(self.rng.integers(1, 7))
            inner = Image.fromarray(cut[off:, off:])
            cut = np.array(inner.resize((side, side), Image.Resampling.BICUBIC))
        if exposed:
            gain = 2.0 ** self.rng.uniform(-0.05, 0.05)
            cut = np.rint(np.clip(cut * gain, 0, 255)).astype(np.uint8)
        if stored:
            cut = distort(cut, FINE_JPEG, 1, self.rng)
        return cut

    def source(self, side: int) -> tuple[np.ndarray, float]:
        """Pixels and score of a photograph to be damaged."""
        wide = [s for s in self.human if s.pixels.shape[1] > self.pristine.pixels.shape[1]]
        if wide and (side > self.pristine.pixels.shape[1] or self.rng.random() < 0.3):
            index = self.rng.integers(len(wide[0].photographs))
            return wide[0].pixels[index], wide[0].photographs[index].score
        return self.pristine.pixels[self.rng.choice(self.sound)], PRISTINE_SCORE

    def steps(self, side: int) -> list[Crop]:
        """Two levels of one damage to one photograph, the better first."""
        pixels, score = self.source(side)
        kind = int(self.rng.integers(1, len(self.scores) + 1))
        lower = int(self.rng.integers(0, LEVELS))
        higher = lower + 1 if self.rng.random() < 0.7 else int(self.rng.integers(1, LEVELS + 1))
        mirrored, moved = self.rng.random(2) < 0.5
        place = random_place(self.rng, pixels.shape, side)
        crops = []
        for number, level in enumerate((lower, higher)):
            at = place_beside(self.rng, pixels.shape, place, side) if number and moved else place
            cut = cut_square(pixels, at, side)
            if mirrored:
                cut = np.ascontiguousarray(cut[:, ::-1])
            if level:
                cut = distort(cut, kind, level, self.rng)
            kept = damaged_score(score, self.scores, kind, level)
            crops.append(Crop(cut, kept, kind if level else 0, level))
        return sorted(crops, key=lambda crop: -crop.score)


def stage_folder(name: str, *, abroad: bool) -> str:
    """Where a stage keeps its checkpoint; the two settings keep theirs apart."""
    return f"{name}-abroad" if abroad else name


def collection_of(name: str) -> int:
    """Number of the collection that a human-scored photograph is of; 1 if it is of none."""
    return next((i for i, prefix in enumerate(COLLECTIONS, 1) if name.startswith(prefix)), 1)


def correlation_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - Pearson correlation."""
    p, w = predicted - predicted.mean(), wanted - wanted.mean()
    correlation: Tensor = (p * w).sum() / (p.norm() * w.norm() + 1e-6)
    return 1 - correlation


class Remembered(nn.Module):
    """Scores of the human-scored crops that were seen last, to order new ones with.

    A row is a score, what people gave, and the collection; NaN where nothing was seen yet.
    """

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.full((REMEMBERED, 3), torch.nan))

    def order_loss(self, score: Tensor, batch: CropBatch) -> Tensor:
        """Lack of correlation with people: of all, and of each collection by itself."""
        new = torch.stack([score, batch.scores, batch.groups.float()], 1)
        if batch.human.sum() < FEWEST_ORDERED:
            return correlation_loss(new[:, 0], new[:, 1])
        new = new[batch.human]
        both = torch.cat([new, self.kept[~self.kept[:, 0].isnan()]])
        # What is remembered has no gradient; the new keep that of a batch of their own.
        losses, weight = [correlation_loss(both[:, 0], both[:, 1])], len(both) / len(new)
        for group in {*new[:, 2].tolist()}:
            mine = both[both[:, 2] == group]
            if len(mine) >= 2 * FEWEST_ORDERED:
                share = (new[:, 2] == group).float().mean()
                losses.append(share * correlation_loss(mine[:, 0], mine[:, 1]))
        self.kept.copy_(torch.cat([new.detach(), self.kept])[:REMEMBERED])
        return weight / 2 * torch.stack(losses).sum()


def value_loss(score: Tensor, batch: CropBatch) -> Tensor:
    """Distance from people's scores; what damage costs is a setting, and counts less."""
    made = ~batch.human
    off = functional.smooth_l1_loss(score, batch.scores, beta=0.5, reduction="none")
    people = off[batch.human].mean() if batch.human.any() else off.new_zeros(())
    return people + MADE_WEIGHT * off[made].mean()


def gap_loss(score: Tensor, batch: CropBatch) -> Tensor:
    """What lacks of the wanted gap between two steps of a ladder."""
    better, worse = batch.ladders.unbind(1)
    lacking = batch.scores[better] - batch.scores[worse] - (score[better] - score[worse])
    return 2 * LADDER_SOFTNESS * functional.softplus(lacking / LADDER_SOFTNESS).mean()


def batch_loss(
    judged: tuple[Tensor, Tensor, Tensor], batch: CropBatch, remembered: Remembered
) -> dict[str, Tensor]:
    """Score (value and order), steps of ladders, repetitions, distortion type and level."""
    score, kind, level = judged
    made = ~batch.human
    first, again = batch.same.unbind(1)
    losses = {
        "value": value_loss(score, batch),
        "order": remembered.order_loss(score, batch),
        "ladder": gap_loss(score, batch),
        "named": 0.2
        * functional.cross_entropy(kind[made], batch.kinds[made], ignore_index=UNNAMED),
        "graded": 0.1 * functional.smooth_l1_loss(level[made], batch.levels[made]),
    }
    if len(first):
        losses["same"] = functional.smooth_l1_loss(score[first], score[again], beta=0.1)
    return losses


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

    def __init__(self, model: JudgedTower, folder: Path, recipe: Recipe) -> None:
        self.recipe, self.model, self.remembered = recipe, model, Remembered()
        self.average = copy.deepcopy(model)
        optimiser = torch.optim.AdamW(
            self.parameter_groups(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.remembered.to(model.score.weight.device)
        parts: dict[str, nn.Module] = {
            "model": model,
            "average": self.average,
            "remembered": self.remembered,
        }
        super().__init__(folder, parts, optimiser, recipe.pace)

    def parameter_groups(self) -> list[dict[str, object]]:
        """All at full rate, but convolutions that have been taught already.

        And what reads the statistics: there are so many that a step at full rate overturns it.
        """
        tower, rate = self.model.tower, self.recipe.learning_rate
        taught: list[nn.Parameter] = []
        if isinstance(tower, ConvTower):
            assert tower.overview is not None
            slow = (tower.stem, tower.stages, tower.overview, tower.embed)
            taught = [p for m in slow for p in m.parameters() if p.requires_grad]
        known = {id(parameter) for parameter in taught}
        fresh = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        return [
            {"params": fresh, "lr": rate},
            {"params": taught, "lr": rate * self.recipe.taught_share},
        ]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.score.weight.device

    def step(self, sampler: CropSampler) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        self.model.train()
        sizes = self.recipe.sizes
        shares = np.array([share for *_, share in sizes])
        side, count, _ = sizes[sampler.rng.choice(len(sizes), p=shares / shares.sum())]
        batch = sampler.batch(count, self.recipe.human_share, side).to(self.device)
        losses = batch_loss(self.model(batch.images), batch, self.remembered)
        self.descend(torch.stack(list(losses.values())).sum())
        return {name: float(loss.detach()) for name, loss in losses.items()}

    @torch.no_grad()
    def standardise(self, sampler: CropSampler) -> None:
        """Measure what the statistics usually are, where that is not known yet."""
        norm = getattr(self.model.tower, "statistics_norm", None)
        if not isinstance(norm, Standardised) or not bool((norm.scale == 1).all()):
            return
        assert isinstance(self.model.tower, ConvTower)
        side, count, _ = self.recipe.sizes[-1]
        seen = torch.cat(
            [
                self.model.tower.cell_features(
                    sampler.batch(count, self.recipe.human_share, side).images.to(self.device)
                ).flatten(0, 2)
                for _ in range(STANDARDISED_BATCHES)
            ]
        )
        for norm in self.model.tower.statistics_norm, self.average.tower.statistics_norm:
            assert isinstance(norm, Standardised)
            norm.mean.copy_(seen.mean(0))
            norm.scale.copy_(1 / (seen.std(0) + SMALLEST_DEVIATION))

    def unseen_srcc(self, judged: PhotographSet, count: int) -> float:
        """Rank correlation of the average's scores on photographs kept out of training."""
        # Spread over the table, which is sorted by kind of photograph.
        chosen = np.linspace(0, len(judged.photographs) - 1, count).astype(int)
        scores = judged_scores(self.average, judged.pixels[chosen])
        return float(spearmanr(scores, judged.scores[chosen]).statistic)

    def run(self, sampler: CropSampler, judged: PhotographSet, judged_count: int) -> None:
        """Train until the time is spent, with a log line and a checkpoint every few minutes."""
        self.run_until_spent(
            lambda: self.step(sampler),
            lambda: {"unseen_srcc": self.unseen_srcc(judged, judged_count)},
        )


def begun(name: str, votes: Path | None, begin: Path | None) -> JudgedTower:
    """A tower with the convolutions it begins with and fresh heads, or one that is to go on."""
    torch.manual_seed(0)
    if begin is not None and begin.is_file():
        model = load_judged(begin)
    else:
        model = JudgedTower(make_tower(name, HIDDEN_SIZE), HIDDEN_SIZE)
        if isinstance(model.tower, ConvTower):
            teach(model.tower, votes, begin)
    if isinstance(model.tower, ConvTower):
        model.tower.keep_what_is_known()
    return model


def teach(tower: ConvTower, votes: Path | None, checkpoint: Path | None) -> None:
    """Give both eyes the convolutions they begin with."""
    if checkpoint is None:
        begin_from_imagenet(tower)
    else:
        begin_from_checkpoint(tower, checkpoint)
    if votes is not None:
        assert tower.overview is not None
        begin_from_votes(tower.overview, votes)


def load_judged(path: Path) -> JudgedTower:
    """The conv tower with its heads, from a checkpoint of a run or the file that `--out` wrote."""
    judged = JudgedTower(make_tower("conv", HIDDEN_SIZE), HIDDEN_SIZE)
    if path.suffix == ".safetensors":
        state = {name: value.float() for name, value in load_file(path).items()}
    else:
        state = torch.load(path, "cpu", weights_only=True)["average"]
    judged.load_state_dict(state)
    return judged.eval()


def save_judged(model: JudgedTower, path: Path) -> None:
    """Write a tower with its heads in half precision."""
    halves = {name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(halves, path, metadata={"format": "pt"})


def load_sampler(work: Path, *, abroad: bool, seed: int) -> CropSampler:
    """The sampler of prepared sets; the photographs that were cut are not everywhere."""
    names = [] if abroad else ["cuts", "human"]
    return CropSampler(
        [PhotographSet.load(work, name) for name in names if (work / f"{name}.jsonl").exists()],
        PhotographSet.load(work, "distorted"),
        damage_scores(work / "KADID-10k.txt"),
        seed,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.pretrain")
    parser.add_argument("--work", type=Path, required=True, help="folder written by training.data")
    parser.add_argument("--tower", choices=("conv", "vit"), default="conv")
    parser.add_argument("--votes", type=Path, help="NIMA's weights, for the overview")
    parser.add_argument(
        "--begin",
        type=Path,
        help="a checkpoint's folder, for its convolutions, or a tower to go on with",
    )
    parser.add_argument("--out", type=Path, help="write the tower there at the end (safetensors)")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=float, default=math.inf, help="what else ends it")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--bfloat16", action="store_true", help="convolve in half precision")
    parser.add_argument("--abroad", action="store_true", help="see no human-scored photograph")
    parser.add_argument("--judged", type=int, default=256, help="unseen photographs in a log line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    abroad = arguments.abroad
    share = 0.0 if abroad else HUMAN_SHARE
    recipe = Recipe(
        arguments.minutes,
        arguments.steps,
        human_share=share,
        learning_rate=arguments.learning_rate,
    )
    if abroad:
        recipe = replace(recipe, sizes=tuple(size for size in SIZES if size[0] <= SYNTHETIC_SIDE))
    model = begun(arguments.tower, arguments.votes, arguments.begin)
    model.to(arguments.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(model.tower, ConvTower):
        model.tower.in_half = arguments.bfloat16
    folder = arguments.work / stage_folder(f"stage1-{arguments.tower}", abroad=abroad)
    run = Pretraining(model, folder, recipe)
    sampler = load_sampler(arguments.work, abroad=abroad, seed=run.steps)
    run.standardise(sampler)
    run.run(sampler, PhotographSet.load(arguments.work, "anchors"), arguments.judged)
    if arguments.out is not None:
        save_judged(run.average, arguments.out)


if __name__ == "__main__":
    run_command(main)
