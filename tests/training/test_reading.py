"""What reads the statistics of cells: batches of scenes, steps, and what is reported."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from training.cells import CellSet
from training.data import PLAIN_SCORE, SHOTS_PER_SCENE, Photograph
from training.pretrain import HIDDEN_SIZE, UNNAMED
from training.reading import LinearScore, Reading, Recipe, SceneSampler
from training.towers import JudgedTower, make_tower

SHOT_SCORES = (4.4, 3.1, 4.4, 3.1)


@pytest.fixture(scope="module")
def judged() -> JudgedTower:
    torch.manual_seed(0)
    return JudgedTower(make_tower("conv", HIDDEN_SIZE), HIDDEN_SIZE)


def cells(scores: list[float], side: int, name: str, width: int) -> CellSet:
    rng = np.random.default_rng(len(scores))
    features = rng.normal(0, 1, (len(scores), side, side, width)).astype(np.float16)
    photographs = (Photograph(f"{name}{i}", score, 0, 0, {}) for i, score in enumerate(scores))
    return CellSet(features, tuple(photographs))


def sampler(width: int) -> SceneSampler:
    human = [cells([2.0, 3.0, 4.0], 3, "cut", width), cells([1.5, 2.5, 4.5], 8, "whole", width)]
    scenes = [cells([*SHOT_SCORES] * 5, 5, "shot", width)]
    return SceneSampler(human, scenes, cells([PLAIN_SCORE] * 4, 5, "plain", width), seed=0)


def test_a_batch_holds_people_s_scenes_and_what_is_plain() -> None:
    batch = sampler(2).batch(50, 5)
    assert batch.images.shape == (50, 25, 2)
    humans, plain = int(batch.human.sum()), batch.kinds == UNNAMED
    assert humans == 23
    assert not batch.human[humans:].any()
    assert (batch.scores[plain] == PLAIN_SCORE).all()
    better, worse = (batch.scores[each] for each in batch.ladders.unbind(1))
    assert (better == SHOT_SCORES[0]).all()
    assert (worse == SHOT_SCORES[1]).all()
    first, again = batch.same.unbind(1)
    assert (batch.scores[first] == batch.scores[again]).all()
    assert len(batch.ladders) == 2 * len(batch.same) == SHOTS_PER_SCENE * 6


def test_abroad_nobody_scored_anything() -> None:
    drawn = sampler(2)
    batch = SceneSampler([], drawn.scenes, drawn.plain, seed=0).batch(20, 5)
    assert not batch.human.any()
    assert int((batch.kinds == UNNAMED).sum()) == SHOTS_PER_SCENE


def test_a_step_moves_what_reads_and_leaves_the_convolutions(
    judged: JudgedTower, tmp_path: Path
) -> None:
    run = Reading(copy.deepcopy(judged), tmp_path, Recipe(steps=10))
    losses = run.step(sampler(judged.tower.statistics_width))
    assert np.isfinite(list(losses.values())).all()
    before, after = judged.state_dict(), run.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if name.startswith(("tower.stem", "tower.stages"))]


def test_the_report_tells_order_and_steps_of_both_scores(
    judged: JudgedTower, tmp_path: Path
) -> None:
    run, width = Reading(judged, tmp_path, Recipe(steps=10)), judged.tower.statistics_width
    anchors = cells([1.0, 2.0, 3.0, 4.0, 5.0], 8, "whole", width)
    plain = cells([PLAIN_SCORE] * 4, 5, "plain", width)
    report = run.report(anchors, cells([*SHOT_SCORES] * 3, 5, "shot", width), plain)
    assert report.keys() == {"own_srcc", "own_steps", "linear_srcc", "linear_steps", "plain"}
    assert np.isfinite(list(report.values())).all()


def test_tokens_that_are_all_the_same_have_a_gradient() -> None:
    tokens = torch.ones(2, 4, HIDDEN_SIZE, requires_grad=True)
    LinearScore()(tokens).sum().backward()
    assert tokens.grad is not None
    assert bool(tokens.grad.isfinite().all())
