"""Distortion patterns: a codebook over the frozen tower's tokens learns to judge and to name.

    python -m training.pattern_pairs --data DATA --work WORK --package PACKAGE
    python -m training.patterns --work WORK --package PACKAGE --out CHECKPOINT
    meiqa export --patterns CHECKPOINT/patterns.safetensors --out PACKAGE

Each step takes a few views and some versions of each, beside the untouched version or a degraded
one, and windows of their cells. The tokens were computed once, so a step takes milliseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn
from torch.nn import functional

from meiqa.engine.calibration import IDENTITY, PatternCalibration
from meiqa.engine.package import EnginePackage
from meiqa.export.patterns import (
    FILE,
    RECORD,
    DistortionPatterns,
    PatternConfig,
    TrainedPatterns,
)
from training.cells import cached_cells
from training.checkpoint import load_checkpoint
from training.commands import run_command
from training.distortions import KINDS, TWO_SIDED
from training.pattern_pairs import Views, read_views
from training.towers import ConvTower

NONE = "none"
MILD_SCORE = 3.6
"""A reference is mildly degraded when people give its distortion at least so much."""
UNCALIBRATED = PatternCalibration(
    hybrid=IDENTITY,
    alone=IDENTITY,
    alone_std=0.6,
    trusted_std=0.4,
    doubted_std=0.6,
    correlation=0.3,
    temperature=1.0,
)


@dataclass(frozen=True)
class Recipe:
    """How the patterns are trained.

    Attributes:
        patterns: size of the codebook.
        minutes, steps: what ends training, whichever is first.
        views, versions: of a step; crops: of a step, where there are any.
        whole_share: how often all cells of a view are taken; else `cells` of a window at most.
        mild_share, any_share: how often the reference is a mildly degraded version, or any.
        votes_rate: learning rate of the patterns' votes, as a multiple of the others'.
        decorrelation: weight of the penalty on patterns that are alike.
        naming: weight of the kinds; strength: of the strengths.
    """

    patterns: int = 1024
    minutes: float = 40.0
    steps: int = 3500
    views: int = 6
    versions: int = 8
    crops: int = 64
    learning_rate: float = 3e-3
    votes_rate: float = 5.0
    weight_decay: float = 0.01
    whole_share: float = 0.2
    cells: int = 16
    mild_share: float = 0.35
    any_share: float = 0.15
    decorrelation: float = 1.0
    naming: float = 0.4
    strength: float = 0.05


@dataclass(frozen=True, eq=False)
class View:
    """The versions of one view.

    Attributes:
        tokens: (N, T, D) half precision; grid: rows and columns of the T cells.
        touched: (N, T) cells that are distorted.
        kinds, levels: (N,) the distortion and its strength, 0 where nothing is to be seen.
        named: (N,) KADID's number and level as they were applied.
        scores: (N,) NaN where only a part is distorted.
        clean: index of the untouched version.
    """

    tokens: Tensor
    grid: tuple[int, int]
    touched: Tensor
    kinds: Tensor
    levels: Tensor
    named: NDArray[np.int64]
    scores: Tensor
    clean: int
    mild: NDArray[np.intp] = field(init=False)
    whole: NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        scores, kinds = self.scores.numpy(), self.kinds.numpy()
        object.__setattr__(self, "mild", np.flatnonzero((scores >= MILD_SCORE) & (kinds > 0)))
        object.__setattr__(self, "whole", np.flatnonzero(~np.isnan(scores)))


def views_of(stored: Views) -> list[View]:
    """Sort a photograph's versions by view."""
    ends = np.cumsum(stored.grids.prod(axis=1))
    tokens, touched = (np.split(cells, ends[:-1]) for cells in (stored.tokens, stored.touched))
    views = []
    for number in np.unique(stored.views):
        index = np.flatnonzero(stored.views == number)
        levels = strengths(stored.kinds[index], stored.levels[index])
        kinds = np.where(levels > 0, stored.kinds[index], 0)
        views.append(
            View(
                tokens=torch.from_numpy(np.stack([tokens[i] for i in index])),
                grid=(int(stored.grids[index[0], 0]), int(stored.grids[index[0], 1])),
                touched=torch.from_numpy(np.stack([touched[i] for i in index])),
                kinds=torch.from_numpy(kinds),
                levels=torch.from_numpy(levels),
                named=np.stack([stored.kinds[index], stored.levels[index]], axis=1),
                scores=torch.from_numpy(stored.scores[index]),
                clean=int(np.flatnonzero(stored.kinds[index] == 0)[0]),
            )
        )
    return views


def strengths(kinds: NDArray[np.int64], levels: NDArray[np.int64]) -> NDArray[np.float32]:
    """KADID's levels as strengths 0-5; two of the types are strong at both ends."""
    two_sided = np.isin(kinds, TWO_SIDED)
    return np.where(two_sided, 2 * np.abs(levels - 3), levels).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Crops:
    """Distorted crops without references: tokens (N, T, D), and what is known of each, (N,)."""

    tokens: Tensor
    scores: Tensor
    kinds: Tensor
    levels: Tensor

    @classmethod
    @torch.no_grad()
    def read(cls, work: Path, checkpoint: Path) -> Crops:
        """See the distorted crops with the tower of a checkpoint."""
        visual = load_checkpoint(checkpoint).model.visual
        tower = ConvTower(visual.config)
        tower.load_state_dict(visual.state_dict())
        cells, parts = cached_cells(tower, work, "distorted"), []
        for start in range(0, len(cells.photographs), 64):
            some = torch.from_numpy(np.array(cells.features[start : start + 64])).float()
            parts.append(tower.tokens_from_features(some.flatten(1, 2)).half())
        photographs = cells.photographs
        named = np.array([(p.kind, p.level) for p in photographs])
        levels = strengths(named[:, 0], named[:, 1])
        return cls(
            torch.cat(parts),
            torch.tensor([p.score for p in photographs]),
            torch.from_numpy(np.where(levels > 0, named[:, 0], 0)),
            torch.from_numpy(levels),
        )


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Versions of one view beside references.

    Attributes:
        tokens, references: (B, T, D).
        scores: (B,) NaN where nobody was asked; kinds, levels: (B,); touched: (B, T).
        clean: (B,) the reference is the untouched version.
    """

    tokens: Tensor
    references: Tensor
    scores: Tensor
    kinds: Tensor
    levels: Tensor
    touched: Tensor
    clean: Tensor


def drawn(view: View, recipe: Recipe, rng: np.random.Generator) -> PairBatch:
    """Draw versions, references and, often, some cells of a window."""
    count = min(recipe.versions, len(view.scores))
    chosen = rng.choice(len(view.scores), count, replace=False)
    beside = np.full(count, view.clean)
    share = rng.random(count)
    if len(view.mild):
        mild = share < recipe.mild_share
        beside[mild] = rng.choice(view.mild, int(mild.sum()))
    anyhow = share > 1 - recipe.any_share
    beside[anyhow] = rng.choice(view.whole, int(anyhow.sum()))
    cells = np.arange(view.tokens.shape[1])
    if rng.random() >= recipe.whole_share:
        cells = window(view.grid, rng)
        cells = rng.permutation(cells)[: recipe.cells]
    return PairBatch(
        tokens=view.tokens[chosen][:, cells].float(),
        references=view.tokens[beside][:, cells].float(),
        scores=view.scores[chosen],
        kinds=view.kinds[chosen],
        levels=view.levels[chosen],
        touched=view.touched[chosen][:, cells],
        clean=torch.from_numpy(beside == view.clean),
    )


def window(grid: tuple[int, int], rng: np.random.Generator) -> NDArray[np.intp]:
    """Cells of a random rectangle, two or more a side where there are so many."""
    sides = [int(rng.integers(min(2, n), n + 1)) for n in grid]
    starts = [int(rng.integers(n - side + 1)) for n, side in zip(grid, sides, strict=True)]
    rows, columns = (s + np.arange(n) for s, n in zip(starts, sides, strict=True))
    cells: NDArray[np.intp] = (rows[:, None] * grid[1] + columns).ravel()
    return cells


def pair_loss(model: DistortionPatterns, batch: PairBatch, recipe: Recipe) -> Tensor:
    """Scores beside a reference, and changes of cells, with all that a photo alone has."""
    of_photo, of_reference = model.features(batch.tokens), model.features(batch.references)
    likeness = model.likeness(model.comparable(batch.tokens), model.comparable(batch.references))
    full, weight = model.score_beside(likeness), model.weight(of_photo, of_reference)
    cosines = model.patterns(of_photo)
    score = model.score_alone(functional.relu(cosines))
    hybrid = weight * full + (1 - weight) * score
    asked, wanted = ~batch.scores.isnan(), batch.scores.nan_to_num()
    errors = (hybrid - wanted) ** 2 + batch.clean * (full - wanted) ** 2
    levels = batch.touched * batch.levels[:, None]
    changed = ((model.changes(likeness) - levels)[batch.clean] ** 2).sum()
    changed = changed / max(1, int(batch.clean.sum()) * likeness.shape[1])
    alone = alone_loss(
        model, cosines, score, batch.scores, batch.kinds, batch.levels, batch.touched, recipe
    )
    return alone + (errors * asked).mean() + recipe.strength * changed


def alone_loss(
    model: DistortionPatterns,
    cosines: Tensor,
    alone: Tensor,
    scores: Tensor,
    true_kinds: Tensor,
    levels: Tensor,
    touched: Tensor,
    recipe: Recipe,
) -> Tensor:
    """Score without a reference, kinds and strengths of picture and cells.

    Args:
        cosines: (B, T, M) of the patterns; alone: (B,) the score.
        scores: (B,) NaN where nobody was asked.
        true_kinds: (B,) kinds; levels: (B,) strengths; touched: (B, T) cells that have them.
    """
    asked = ~scores.isnan()
    loss = ((alone - scores.nan_to_num()) ** 2 * asked).mean()
    kinds, strength = model.votes(cosines)
    cell_kinds = torch.where(touched, true_kinds[:, None], 0)
    named = functional.cross_entropy(kinds.mean(1)[asked], true_kinds[asked])
    named = named + 0.3 * functional.cross_entropy(kinds.flatten(0, 1), cell_kinds.flatten())
    graded = ((strength.mean(1) - levels)[asked] ** 2).mean()
    graded = graded + 0.3 * ((strength - touched * levels[:, None]) ** 2).mean()
    return loss + recipe.naming * named + recipe.strength * graded


def crop_loss(
    model: DistortionPatterns, crops: Crops, recipe: Recipe, rng: np.random.Generator
) -> Tensor:
    """The loss of some crops without references."""
    some = rng.integers(0, len(crops.scores), recipe.crops)
    cells = rng.permutation(crops.tokens.shape[1])[: recipe.cells]
    tokens = crops.tokens[some][:, cells].float()
    cosines = model.patterns(model.features(tokens))
    return alone_loss(
        model,
        cosines,
        model.score_alone(functional.relu(cosines)),
        crops.scores[some],
        crops.kinds[some],
        crops.levels[some],
        torch.ones(tokens.shape[:2], dtype=torch.bool),
        recipe,
    )


def alikeness(patterns: Tensor, sample: int = 256) -> Tensor:
    """Mean square of the cosines between different patterns, of a random sample of them.

    The penalty on correlated patterns; it can't fall below 1/F - 1/M with more patterns than
    dimensions.
    """
    some = functional.normalize(patterns, dim=-1)[torch.randperm(len(patterns))[:sample]]
    cosines = some @ some.T
    apart: Tensor = (cosines**2).sum() - len(some)
    return apart / (len(some) * (len(some) - 1))


def settle(model: DistortionPatterns) -> None:
    """Give all patterns length 1, for matches to be cosines."""
    with torch.no_grad():
        model.patterns.weight.copy_(functional.normalize(model.patterns.weight, dim=-1))


def save_patterns(trained: TrainedPatterns, path: Path) -> None:
    """Write weights in half precision, and everything else as metadata."""
    record = {
        "config": asdict(trained.module.config),
        "source": trained.source,
        "kinds": trained.kinds,
        "calibration": asdict(trained.calibration),
        "report": trained.report,
    }
    weights = {n: w.half().contiguous() for n, w in trained.module.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt", RECORD: json.dumps(record)})


def train(
    views: list[View],
    width: int,
    recipe: Recipe,
    crops: Crops | None = None,
    seed: int = 0,
) -> DistortionPatterns:
    """Train patterns from nothing, on views and, without references, on further crops."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = DistortionPatterns(PatternConfig(width, len(KINDS) + 1, recipe.patterns))
    settle(model)
    votes = [model.kinds.weight, model.strengths.weight, model.sharpness]
    others = [p for p in model.parameters() if all(p is not vote for vote in votes)]
    # Each pattern's vote is a small part of every answer, so it may move faster.
    groups = [{"params": others, "rate": 1.0}, {"params": votes, "rate": recipe.votes_rate}]
    optimiser = torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)
    started = time.perf_counter()
    for step in range(recipe.steps):
        spent = max(step / recipe.steps, (time.perf_counter() - started) / (60 * recipe.minutes))
        if spent >= 1.0:
            break
        for group in optimiser.param_groups:
            rate = recipe.learning_rate * group["rate"]
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1.0 - spent)
        some = [views[i] for i in rng.integers(0, len(views), recipe.views)]
        losses = [pair_loss(model, drawn(view, recipe, rng), recipe) for view in some]
        apart = alikeness(model.patterns.weight)
        loss = torch.stack(losses).mean() + recipe.decorrelation * apart
        if crops is not None:
            loss = loss + crop_loss(model, crops, recipe, rng)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        settle(model)
        if step % 250 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss:.4f}, alike {apart:.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


@dataclass(frozen=True, eq=False)
class Judged:
    """What the patterns say of unseen photographs, every distorted version of each.

    P photographs · V versions of each. All (P, V) but `kinds`, (P, V, K).
    """

    wanted: NDArray[np.float64]
    true_kinds: NDArray[np.int64]
    levels: NDArray[np.float64]
    alone: NDArray[np.float64]
    full: NDArray[np.float64]
    weight: NDArray[np.float64]
    degraded_full: NDArray[np.float64]
    degraded_weight: NDArray[np.float64]
    kinds: NDArray[np.float64]
    strength: NDArray[np.float64]
    cell_ranks: NDArray[np.float64]
    """(R,) how well the map ranks touched cells above others, of each partly distorted version."""

    @property
    def hybrid(self) -> NDArray[np.float64]:
        """With the untouched reference."""
        return self.weight * self.full + (1 - self.weight) * self.alone

    @property
    def degraded(self) -> NDArray[np.float64]:
        """With a mildly degraded one."""
        w = self.degraded_weight
        return w * self.degraded_full + (1 - w) * self.alone


@torch.no_grad()
def judged(model: DistortionPatterns, views: list[View], seed: int = 0) -> Judged:
    """Judge every version of views beside the untouched one, and beside a mild one."""
    rng = np.random.default_rng(seed)
    rows, ranks = [], []
    for view in views:
        index = np.flatnonzero(~view.scores.isnan().numpy() & (view.named[:, 0] > 0))
        tokens = view.tokens.float()
        beside = rng.choice(view.mild, len(index))
        features, comparable = model.features(tokens), model.comparable(tokens)
        cosines = model.patterns(features)
        kinds, strength = model.votes(cosines)
        made = []
        for reference in (np.full(len(index), view.clean), beside):
            likeness = model.likeness(comparable[index], comparable[reference])
            made.append(model.score_beside(likeness))
            made.append(model.weight(features[index], features[reference]))
        columns = [view.scores[index], view.kinds[index], view.levels[index]]
        columns += [model.score_alone(functional.relu(cosines[index])), *made]
        columns += [kinds[index].mean(1), strength[index].mean(1)]
        rows.append([column.double().numpy() for column in columns])
        ranks += [
            area(strength[i].numpy(), view.touched[i].numpy())
            for i in np.flatnonzero(view.scores.isnan().numpy())
            if 0 < view.touched[i].sum() < view.touched.shape[1]
        ]
    names = [field.name for field in fields(Judged) if field.name != "cell_ranks"]
    stacked = {
        name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    stacked["true_kinds"] = stacked["true_kinds"].astype(np.int64)
    return Judged(**stacked, cell_ranks=np.array(ranks))


def area(values: NDArray[np.float32], touched: NDArray[np.bool_]) -> float:
    """Area under the curve of telling touched cells from others."""
    count = int(touched.sum())
    above = rankdata(values)[touched].sum() - count * (count + 1) / 2
    return float(above / (count * (len(touched) - count)))


def figures(found: Judged) -> dict[str, float]:
    """Rank correlations with KADID's scores, and how well kinds are named."""
    right = found.kinds.argmax(-1) == found.true_kinds
    wanted = found.wanted.ravel()

    def srcc(values: NDArray[np.float64]) -> float:
        return float(spearmanr(values.ravel(), wanted).statistic)

    named = {
        "alone": srcc(found.alone),
        "full": srcc(found.full),
        "hybrid": srcc(found.hybrid),
        "degraded_hybrid": srcc(found.degraded),
        "degraded_full": srcc(found.degraded_full),
        "weight": float(found.weight.mean()),
        "degraded_weight": float(found.degraded_weight.mean()),
        "kinds_named": float(right.mean()),
        "strength": float(spearmanr(found.strength.ravel(), found.levels.ravel()).statistic),
        "map_auc": float(found.cell_ranks.mean()) if len(found.cell_ranks) else float("nan"),
    }
    return {name: round(value, 4) for name, value in named.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.patterns", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="written by pattern_pairs")
    parser.add_argument("--package", type=Path, required=True, help="whose tower made the tokens")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--patterns", type=int, default=Recipe.patterns, help="of the codebook")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--crops", action="store_true", help="learn from WORK's distorted crops, too"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = Recipe(patterns=given.patterns, minutes=given.minutes, steps=given.steps)
    package = EnginePackage.open(given.package).manifest
    seen, unseen = (
        [view for stored in read_views(given.work, unseen=kept) for view in views_of(stored)]
        for kept in (False, True)
    )
    crops = Crops.read(given.work, given.out) if given.crops else None
    model = train(seen, package.decoder.embed_width, recipe, crops)
    report = {"recipe": asdict(recipe), "views": len(seen)}
    if unseen:
        report |= {"unseen": figures(judged(model, unseen)), "unseen_views": len(unseen)}
    trained = TrainedPatterns(
        model,
        package.source["sha256"],
        (NONE, *(kind.name for kind in KINDS)),
        UNCALIBRATED,
        report,
    )
    save_patterns(trained, given.out / FILE)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_command(main)
