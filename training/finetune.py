"""Stage 3: the decoder learns to read visual tokens: describe, rate, compare, reflect.

    python -m training.finetune --work WORK --minutes 35 --out training/default

The convolutions of stage 1 stay as they are, so every photograph's cell statistics are computed
once and training draws windows of cells from them. Prefixes are shared as in the engine: a
photograph is read once for its description, its grade and its comparisons.
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
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from meiqa.engine.prompts import MEIQA, Prompts, positions_of
from meiqa.export.decoder import DecoderConfig, Segments, SharedPrefixDecoder
from meiqa.export.families.conv_hybrid import ConvHybridTower
from training.cells import CellSet, Drawn, cached_cells
from training.checkpoint import ConvHybridVlm, TrainedVlm, save_checkpoint
from training.commands import run_command
from training.data import SHOTS_PER_SCENE, Photograph
from training.distortions import EQUAL_TO_THE_EYE
from training.pretrain import HIDDEN_SIZE, LADDER_SOFTNESS, load_judged, stage_folder
from training.reading import LinearScore
from training.texts import corpus_of, reflection_pair, scored_answer, train_tokenizer
from training.timed_run import Pace, TimedRun
from training.towers import MEAN, STD, ConvTower

LAYERS, HEADS, KV_HEADS, INNER = 4, 4, 2, 640
PREFERENCE_DEVIATION = 0.5
"""Deviation of the difference of two human scores, in score units: sets how soft verdicts are."""
SCENE_DEVIATION = 0.12
"""The same between shots of one scene, where nothing but the damage differs."""
LEVEL_DEVIATION = 0.6
SCENE_SHARE = 0.4
"""Share of a batch that are shots of scenes, compared with the scene's other shots."""
PLAIN_SHARE = 0.04
"""Share of the others that is no picture of anything."""
SQUARE_SHARE, CUT_SHARE = 0.35, 0.2
LARGEST_SQUARE, SHORTEST_SIDE, LONGEST_SIDE = 8, 3, 12
"""Sides of grids, in cells: 8 x 8 is 512 x 512 pixels, the most that the tower is shown; 3 x 3 is
what cuts of photographs have."""
SAME_GRID_SHARE = 0.6
REPORTED_ANCHORS = 256
REPORTED_SHOTS = 320
"""Unseen photographs and shots in a line of the log."""
RATING_WEIGHT = 4.0
"""Weight of a token of the printed rating beside one of the description."""


@dataclass(frozen=True)
class Recipe:
    """How stage 3 trains."""

    minutes: float = math.inf
    steps: float = math.inf
    prefixes: int = 16
    reflections: int = 4
    learning_rate: float = 1e-3
    tower_share: float = 0.3
    weight_decay: float = 0.05

    @property
    def pace(self) -> Pace:
        """Budget, checkpoints and averaging."""
        return Pace(
            self.minutes,
            checkpoint_minutes=3.0,
            warm_up_steps=100,
            largest_norm=1.0,
            average_decay=0.995,
            steps=self.steps,
        )


@dataclass(frozen=True)
class WindowBatch:
    """Windows of one size from several photographs."""

    features: Tensor
    grid: tuple[int, int]
    photographs: list[Photograph]

    @property
    def scores(self) -> Tensor:
        """(B,)."""
        return torch.tensor([p.score for p in self.photographs], device=self.features.device)


@dataclass(frozen=True)
class ComparedBatch:
    """Pictures that are read, and others that they are compared with.

    Attributes:
        partners: (P, R) which of the others each is compared with.
        deviations: (P, 1) of the difference of two scores.
        alone: how many come first that are of no scene; then two shots of each.
    """

    first: WindowBatch
    others: WindowBatch
    partners: Tensor
    deviations: Tensor
    alone: int


class WindowSampler:
    """Draws windows of photographs and of scenes, on the grids the engine meets."""

    def __init__(
        self,
        scored: Sequence[CellSet],
        scenes: Sequence[CellSet],
        plain: CellSet,
        seed: int,
        device: torch.device,
    ) -> None:
        """Draw from human-scored sets, none abroad, scenes of consecutive shots, and the plain."""
        self.scored, self.scenes, self.plain, self.device = scored, scenes, plain, device
        self.rng = np.random.default_rng(seed)

    def grid(self) -> tuple[int, int]:
        """Rows and columns: often the largest square or a cut's, else any up to the largest."""
        drawn = self.rng.random()
        if drawn < SQUARE_SHARE:
            return LARGEST_SQUARE, LARGEST_SQUARE
        if drawn < SQUARE_SHARE + CUT_SHARE:
            return SHORTEST_SIDE, SHORTEST_SIDE
        rows = int(self.rng.integers(SHORTEST_SIDE, LONGEST_SIDE + 1))
        longest = min(LONGEST_SIDE, LARGEST_SQUARE**2 // rows)
        return rows, int(self.rng.integers(SHORTEST_SIDE, longest + 1))

    def batch(self, size: int) -> ComparedBatch:
        """`size` windows on one grid, and those that they are compared with on the same or another.

        Of a scene, a shot of either level is compared with its other shots; the rest with any of
        the others.
        """
        side = self.grid()
        beside = side if self.rng.random() < SAME_GRID_SHARE else self.grid()
        scenes = round(size * SCENE_SHARE / 2)
        alone = size - 2 * scenes
        first = [self.photograph(side) for _ in range(alone)]
        others = [self.photograph(beside) for _ in range(alone)]
        partners = []
        for number in range(scenes):
            read, seen, compared = self.scene(side, beside)
            first.extend(read)
            others.extend(seen)
            partners.append(alone + SHOTS_PER_SCENE * number + compared)
        anyone = self.rng.integers(0, len(others), (alone, SHOTS_PER_SCENE - 1))
        deviations = torch.full((size, 1), PREFERENCE_DEVIATION, device=self.device)
        deviations[alone:] = SCENE_DEVIATION
        return ComparedBatch(
            self.stacked(first, side),
            self.stacked(others, beside),
            torch.from_numpy(np.concatenate([anyone, *partners])).to(self.device),
            deviations,
            alone,
        )

    def photograph(self, side: tuple[int, int]) -> Drawn:
        """A window of a human-scored photograph, abroad of a shot: of the smallest that hold it."""
        sets = self.scored or self.scenes
        holding = [s for s in sets if min(s.features.shape[1:3]) >= max(side)] or [sets[-1]]
        source = holding[0] if self.scored else holding[self.rng.integers(len(holding))]
        if self.rng.random() < PLAIN_SHARE:
            source = self.plain
        index = int(self.rng.integers(len(source.photographs)))
        at = self.rng.random(2)
        return source.window(
            index, side, at, mirrored=bool(self.rng.integers(2))
        ), source.photographs[index]

    def scene(
        self, side: tuple[int, int], beside: tuple[int, int]
    ) -> tuple[list[Drawn], list[Drawn], np.ndarray]:
        """Of one scene, a shot of each level on one grid, all on another, and whom each meets."""
        sizes = np.array([len(s.photographs) for s in self.scenes])
        source = self.scenes[self.rng.choice(len(sizes), p=sizes / sizes.sum())]
        begin = int(self.rng.integers(len(source.photographs) // SHOTS_PER_SCENE)) * SHOTS_PER_SCENE
        at, mirrored = self.rng.random(2), bool(self.rng.integers(2))

        def shots(numbers: Sequence[int], grid: tuple[int, int]) -> list[Drawn]:
            places = [begin + number for number in numbers]
            windows = [source.window(place, grid, at, mirrored=mirrored) for place in places]
            return list(zip(windows, (source.photographs[p] for p in places), strict=True))

        read = [int(level + 2 * self.rng.integers(2)) for level in range(2)]
        everyone = range(SHOTS_PER_SCENE)
        compared = np.array([[other for other in everyone if other != shot] for shot in read])
        return shots(read, side), shots(everyone, beside), compared

    def stacked(self, drawn: Sequence[Drawn], side: tuple[int, int]) -> WindowBatch:
        """Windows of one grid as a batch."""
        windows, photographs = zip(*drawn, strict=True)
        features = torch.from_numpy(np.stack(windows)).to(self.device).float()
        return WindowBatch(features, side, list(photographs))


@dataclass(frozen=True)
class ReadPictures:
    """Pictures that the decoder has read as prefixes."""

    tokens: Tensor
    grid: tuple[int, int]
    key_values: Tensor
    lengths: Tensor
    last_hidden: Tensor
    next_position: int


def no_segments(decoder: SharedPrefixDecoder, prefixes: int, rows: int) -> Segments:
    """Make empty prefixes and pasts."""
    config, weight = decoder.config, decoder.norm.weight
    layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    return Segments(
        prefix=weight.new_zeros(layers, 2, prefixes, heads, 0, width),
        prefix_lengths=torch.zeros(prefixes, dtype=torch.long, device=weight.device),
        past=weight.new_zeros(layers, 2, prefixes, heads, rows, 0, width),
        past_lengths=torch.zeros(prefixes, rows, dtype=torch.long, device=weight.device),
    )


class Reader:
    """The model with its prompts: builds prefixes and continues them, as the engine does."""

    def __init__(self, model: ConvHybridVlm, tokenizer: Tokenizer) -> None:
        self.model = model
        self.prompts = Prompts(MEIQA, tokenizer)

    def on_device(self, values: np.ndarray) -> Tensor:
        """An array on the model's device."""
        weight = self.model.language_model.norm.weight
        return torch.from_numpy(np.ascontiguousarray(values)).to(weight.device)

    def spread(self, positions: np.ndarray, rows: tuple[int, int]) -> Tensor:
        """Positions (3, n) for every row, (3, P, R, n)."""
        return self.on_device(positions)[:, None, None].expand(-1, *rows, -1)

    def embedded(self, ids: np.ndarray, shape: tuple[int, int]) -> Tensor:
        """Embeddings (P, R, n, D) of token ids (n,), the same in every row."""
        embeds: Tensor = self.model.language_model.embed_tokens(self.on_device(ids))
        return embeds.expand(*shape, -1, -1)

    def read(self, features: Tensor, grid: tuple[int, int]) -> ReadPictures:
        """Read pictures given as cell statistics (P, cells, F)."""
        tokens = self.model.visual.tokens_from_features(features)
        rows, p = (tokens.shape[0], 1), self.prompts
        embeds = torch.cat(
            [self.embedded(p.opening, rows), tokens[:, None], self.embedded(p.closing, rows)], 2
        )
        positions, after = positions_of([len(p.opening), grid, len(p.closing)])
        decoder = self.model.language_model
        hidden, key_values = decoder.hidden_states(
            embeds, self.spread(positions, rows), no_segments(decoder, *rows)
        )
        lengths = torch.full(rows[:1], embeds.shape[2], device=embeds.device)
        return ReadPictures(
            tokens, grid, key_values[:, :, :, :, 0], lengths, hidden[:, 0, -1], after
        )

    def continued(self, read: ReadPictures, embeds: Tensor, positions: np.ndarray) -> Tensor:
        """Hidden states (P, R, S, D) of rows (P, R, S, D) that continue the prefixes."""
        decoder = self.model.language_model
        rows = (embeds.shape[0], embeds.shape[1])
        empty = no_segments(decoder, *rows)
        segments = Segments(read.key_values, read.lengths, empty.past, empty.past_lengths)
        return decoder.hidden_states(embeds, self.spread(positions, rows), segments)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        out: Tensor = self.model.language_model.lm_head(hidden)
        return out

    def asked(self, read: ReadPictures, question: np.ndarray) -> Tensor:
        """Next-token logits (P, V) after one question to every picture."""
        positions, _ = positions_of([len(question)], read.next_position)
        embeds = self.embedded(question, (read.lengths.shape[0], 1))
        return self.logits(self.continued(read, embeds, positions)[:, 0, -1])

    def compared(
        self, read: ReadPictures, seconds: Tensor, grid: tuple[int, int], partners: Tensor
    ) -> Tensor:
        """Next-token logits (P * R, V) after "which looks better".

        Args:
            read: the first pictures, P of them.
            seconds: visual tokens (M, cells, D) of the second pictures, on `grid`.
            partners: (P, R) which seconds each first is compared with.
        """
        p, rows = self.prompts, (partners.shape[0], partners.shape[1])
        question = np.concatenate([p.closing, p.compare])
        positions, _ = positions_of(
            [len(p.second_opening), grid, len(question)], read.next_position
        )
        embeds = torch.cat(
            [
                self.embedded(p.second_opening, rows),
                seconds[partners],
                self.embedded(question, rows),
            ],
            2,
        )
        return self.logits(self.continued(read, embeds, positions)[:, :, -1]).flatten(0, 1)

    def text_loss(
        self, read: ReadPictures, prompts: list[np.ndarray], answers: list[str]
    ) -> Tensor:
        """Cross-entropy of answers, the printed rating weighted up."""
        rows = [
            (prompt, self.prompts.ids(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        longest = max(len(p) + len(a) for p, a in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        weights = np.zeros((len(rows), longest), np.float32)
        opens = self.prompts.single(MEIQA.answer_open)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
            rating = np.cumsum(answer == opens) > 0
            weights[row, len(prompt) : len(prompt) + len(answer)] = np.where(
                rating, RATING_WEIGHT, 1.0
            )
        positions, _ = positions_of([longest - 1], read.next_position)
        table = self.model.language_model.embed_tokens
        hidden = self.continued(read, table(self.on_device(ids[:, :-1]))[:, None], positions)[:, 0]
        losses = functional.cross_entropy(
            self.logits(hidden).flatten(0, 1),
            self.on_device(ids[:, 1:]).flatten(),
            reduction="none",
        )
        kept = self.on_device(weights[:, 1:]).flatten()
        return (losses * kept).sum() / kept.sum()


def level_targets(scores: Tensor) -> Tensor:
    """Soft grades (B, 5) around the scores."""
    distance = scores[:, None] - torch.arange(1.0, 6.0, device=scores.device)
    return (-(distance**2) / (2 * LEVEL_DEVIATION**2)).softmax(-1)


def soft_answer_loss(logits: Tensor, ids: np.ndarray | Sequence[int], wanted: Tensor) -> Tensor:
    """Cross-entropy of the whole vocabulary against probabilities of a few tokens."""
    chosen = logits.log_softmax(-1)[:, torch.as_tensor(ids, device=logits.device)]
    return -(wanted * chosen).sum(-1).mean()


def step_loss(said: Tensor, wanted: Tensor) -> Tensor:
    """What lacks of the wanted gap between two shots of a scene, (2 N,) one behind the other."""
    gaps, found = (each[0::2] - each[1::2] for each in (wanted, said))
    lacking = gaps.abs() - gaps.sign() * found
    lost = 2 * LADDER_SOFTNESS * functional.softplus(lacking / LADDER_SOFTNESS)
    return (lost * (gaps.abs() > EQUAL_TO_THE_EYE)).mean()


class Objective(nn.Module):
    """The losses of one batch."""

    def __init__(self, reader: Reader, recipe: Recipe) -> None:
        super().__init__()
        self.reader, self.recipe = reader, recipe
        self.rating, self.linear = nn.Linear(HIDDEN_SIZE, 1), LinearScore()

    def forward(self, drawn: ComparedBatch, rng: np.random.Generator) -> dict[str, Tensor]:
        """Named losses of a batch; their sum is minimised."""
        reader, prompts = self.reader, self.reader.prompts
        batch, others = drawn.first, drawn.others
        read = reader.read(batch.features, batch.grid)
        size = len(batch.photographs)
        rated = 3.0 + self.rating(read.last_hidden).squeeze(-1)
        answers = [scored_answer(p) for p in batch.photographs]
        difference = batch.scores[:, None] - others.scores[drawn.partners]
        wins = torch.special.ndtr(difference / drawn.deviations).flatten()
        seconds = reader.model.visual.tokens_from_features(others.features)
        levels = reader.asked(read, prompts.levels)
        words = levels[:, torch.as_tensor(prompts.level_ids, device=levels.device)].softmax(-1)
        grades = words @ torch.arange(1.0, 6.0, device=levels.device)
        linear = self.linear(read.tokens)
        scores, shots = batch.scores, slice(drawn.alone, None)
        told_apart = [step_loss(said[shots], scores[shots]) for said in (grades, linear)]
        return {
            "rated": 0.5 * functional.smooth_l1_loss(rated, scores, beta=0.5),
            "linear": 0.5 * functional.smooth_l1_loss(linear, scores, beta=0.5),
            "shots": 0.3 * torch.stack(told_apart).sum(),
            "text": reader.text_loss(read, [prompts.score] * size, answers),
            "levels": 0.5 * soft_answer_loss(levels, prompts.level_ids, level_targets(scores)),
            "pairs": 2.0
            * soft_answer_loss(
                reader.compared(read, seconds, others.grid, drawn.partners),
                prompts.verdict_ids,
                torch.stack([wins, 1 - wins], -1),
            ),
            "reflect": 0.5 * self.reflection_loss(read, batch.photographs, rng),
        }

    def reflection_loss(
        self, read: ReadPictures, photographs: list[Photograph], rng: np.random.Generator
    ) -> Tensor:
        """Correct a first impression of the first few pictures."""
        count = self.recipe.reflections
        first = ReadPictures(
            read.tokens[:count],
            read.grid,
            read.key_values[:, :, :count],
            read.lengths[:count],
            read.last_hidden[:count],
            read.next_position,
        )
        pairs = [reflection_pair(photographs[i], photographs[-1 - i], rng) for i in range(count)]
        questions = [self.reader.prompts.ids(question) for question, _ in pairs]
        return self.reader.text_loss(first, questions, [answer for _, answer in pairs])


@torch.no_grad()
def unseen_report(reader: Reader, anchors: CellSet, scenes: CellSet) -> dict[str, float]:
    """Rank correlation of the grades, and the share of right verdicts, on what is kept out.

    Verdicts are counted where people tell the pictures apart: of different photographs, and of one
    scene, there beside how often the grades are right.
    """
    # The table is sorted by kind of photograph.
    chosen = np.random.default_rng(0).permutation(len(anchors.photographs))[:REPORTED_ANCHORS]
    far = judged(reader, anchors, chosen, np.arange(16)[:, None] + np.arange(1, 4), 0.2)
    shots = np.arange(min(REPORTED_SHOTS, len(scenes.photographs)))
    at = np.arange(16)[:, None]
    same = at // SHOTS_PER_SCENE * SHOTS_PER_SCENE + (at + np.arange(1, 4)) % SHOTS_PER_SCENE
    near = judged(reader, scenes, shots, same, EQUAL_TO_THE_EYE)
    return {
        "unseen_srcc": far.srcc,
        "unseen_pairs": far.verdicts,
        "unseen_scenes": near.verdicts,
        "scenes_by_grade": near.by_grade,
    }


@dataclass(frozen=True)
class Figures:
    """How grades and verdicts go with people's scores."""

    srcc: float
    verdicts: float
    by_grade: float


def judged(
    reader: Reader, cells: CellSet, chosen: np.ndarray, partners: np.ndarray, apart: float
) -> Figures:
    """Grade photographs, and compare each with the partners (16, R) within its batch of 16."""
    scores, graded, right, level, asked = [], [], 0, 0, 0
    for start in range(0, len(chosen), 16):
        part = chosen[start : start + 16]
        features = np.array(cells.features[part], np.float32)
        grid = (features.shape[1], features.shape[2])
        read = reader.read(reader.on_device(features).flatten(1, 2), grid)
        words = reader.asked(read, reader.prompts.levels)[
            :, torch.as_tensor(reader.prompts.level_ids)
        ]
        grades = words.softmax(-1).cpu() @ torch.arange(1.0, 6.0)
        truth = torch.tensor([cells.photographs[index].score for index in part])
        graded.extend(grades.tolist())
        scores.extend(truth.tolist())
        others = torch.from_numpy(partners[: len(part)] % len(part))
        first, second = reader.prompts.verdict_ids
        verdicts = reader.compared(read, read.tokens, read.grid, others).cpu()
        said = (verdicts[:, first] > verdicts[:, second]).reshape(others.shape)
        counts = (truth[:, None] - truth[others]).abs() > apart
        better = truth[:, None] > truth[others]
        right += int(((said == better) & counts).sum())
        level += int((((grades[:, None] > grades[others]) == better) & counts).sum())
        asked += int(counts.sum())
    return Figures(
        round(float(spearmanr(graded, scores).statistic), 4),
        round(right / max(asked, 1), 4),
        round(level / max(asked, 1), 4),
    )


def load_pretrained(path: Path) -> ConvTower:
    """The averaged conv tower of stage 1."""
    tower = load_judged(path).tower
    assert isinstance(tower, ConvTower)
    return tower


def initial_model(tower: ConvHybridTower, vocabulary: int) -> ConvHybridVlm:
    """The pretrained tower before a fresh decoder."""
    text = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        mrope_section=(8, 12, 12),
    )
    model = ConvHybridVlm(tower.config, text)
    nn.init.normal_(model.language_model.embed_tokens.weight, std=HIDDEN_SIZE**-0.5)
    model.visual.load_state_dict(tower.state_dict())
    return model


class Finetuning(TimedRun):
    """A resumable run of stage 3."""

    def __init__(
        self, model: ConvHybridVlm, tokenizer: Tokenizer, folder: Path, recipe: Recipe
    ) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.model = model
        self.average = copy.deepcopy(model)
        self.objective = Objective(Reader(model, tokenizer), recipe)
        self.objective.to(model.language_model.norm.weight.device)
        optimiser = torch.optim.AdamW(
            self.parameter_groups(),
            recipe.learning_rate,
            (0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )
        parts: dict[str, nn.Module] = {
            "model": model,
            "average": self.average,
            "rating": self.objective.rating,
            "linear": self.objective.linear,
        }
        super().__init__(folder, parts, optimiser, recipe.pace)

    def parameter_groups(self) -> list[dict[str, object]]:
        """Decoder at full rate, the tower's attention at a share of it, convolutions frozen."""
        tower = self.model.visual
        reading = [
            tower.statistics_norm,
            tower.embed,
            tower.whole,
            tower.blocks,
            tower.merger_norm,
            tower.merger,
        ]
        rate = self.recipe.learning_rate
        decoder = [*self.model.language_model.parameters(), *self.objective.rating.parameters()]
        decoder += self.objective.linear.parameters()
        return [
            {"params": decoder, "lr": rate},
            {
                "params": [p for m in reading for p in m.parameters()],
                "lr": rate * self.recipe.tower_share,
            },
        ]

    def step(self, sampler: WindowSampler) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        losses = self.objective(sampler.batch(self.recipe.prefixes), sampler.rng)
        self.descend(torch.stack(list(losses.values())).sum())
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def run(self, sampler: WindowSampler, anchors: CellSet, scenes: CellSet) -> None:
        """Train until the time is spent, with a log line and a checkpoint every few minutes."""
        self.run_until_spent(
            lambda: self.step(sampler),
            lambda: unseen_report(Reader(self.average, self.tokenizer), anchors, scenes),
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.finetune")
    parser.add_argument("--work", type=Path, required=True, help="folder with the data and stage 1")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--tower", type=Path, help="of stage 1 (default: the one in WORK)")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--steps", type=float, default=math.inf, help="what else ends it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--bfloat16", action="store_true", help="convolve in half precision")
    parser.add_argument("--abroad", action="store_true", help="see no human-scored photograph")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    work, abroad = arguments.work, arguments.abroad
    stage1 = work / stage_folder("stage1-conv", abroad=abroad) / "checkpoint.pt"
    tower = load_pretrained(arguments.tower or stage1).to(arguments.device)
    tower.in_half = arguments.bfloat16
    scored, scenes, (plain, anchors, unseen) = (
        [cached_cells(tower, work, name) for name in names]
        for names in (
            [] if abroad else ["cuts", "human"],
            ["scenes"] if abroad else ["scenes", "human_scenes"],
            ["plain", "anchors", "scenes_unseen"],
        )
    )
    seen = [photograph for cells in (*scored, *scenes) for photograph in cells.photographs]
    tokenizer = train_tokenizer(corpus_of(seen))
    model = initial_model(tower, tokenizer.get_vocab_size()).to(arguments.device)
    folder = work / stage_folder("stage2", abroad=abroad)
    run = Finetuning(model, tokenizer, folder, Recipe(arguments.minutes, arguments.steps))
    sampler = WindowSampler(scored, scenes, plain, run.steps, arguments.device)
    run.run(sampler, anchors, unseen)
    save_checkpoint(TrainedVlm(run.average.cpu().eval(), tokenizer, MEAN, STD), arguments.out)


if __name__ == "__main__":
    run_command(main)
