"""Shots of one scene, and batches in which they are compared with each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.cells import CellSet
from training.data import (
    PRISTINE_SCORE,
    SHOTS_PER_SCENE,
    SYNTHETIC_SIDE,
    Photograph,
    damaged_score,
    scene,
    severity,
)
from training.distortions import FADING_COLOUR, LEVELS
from training.finetune import (
    PREFERENCE_DEVIATION,
    SCENE_DEVIATION,
    WindowSampler,
    step_loss,
)
from training.pretrain import REMEMBERED, CropBatch, Remembered

SCORES = np.tile(PRISTINE_SCORE - 0.7 * np.arange(1.0, LEVELS + 1), (32, 1))


def test_a_scene_is_one_place_at_two_levels_each_shot_twice() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 440, 3), np.uint8)
    for seed in range(6):
        made = scene(pixels, "a", 4.0, SCORES, np.random.default_rng(seed))
        shots, records = zip(*made, strict=True)
        assert len(made) == SHOTS_PER_SCENE
        assert {shot.shape for shot in shots} == {(SYNTHETIC_SIDE, SYNTHETIC_SIDE, 3)}
        assert records[0].score == records[2].score > records[1].score == records[3].score
        assert records[1].kind == records[3].kind
        assert not np.array_equal(shots[0], shots[2])  # the hand moved


def test_damage_costs_what_is_good_more() -> None:
    assert damaged_score(PRISTINE_SCORE, SCORES, 1, 3) == pytest.approx(SCORES[0, 2])
    good, bad = (score - damaged_score(score, SCORES, 1, 5) for score in (4.0, 1.5))
    assert good > 3 * bad > 0
    assert damaged_score(1.0, SCORES, 1, 5) == 1.0
    # Of two-sided types the middle level is the photograph itself.
    assert damaged_score(4.0, SCORES, 18, 3) == damaged_score(4.0, SCORES, 1, 0) == 4.0


def test_severity_follows_what_people_mind_and_grey_is_a_style() -> None:
    assert [severity(1, fall) for fall in (0.0, 0.1, 0.3, 0.7, 1.5, 3.0)] == [0, 1, 2, 3, 4, 5]
    assert severity(FADING_COLOUR, 3.0) == 0


def cells(count: int, side: int, name: str) -> CellSet:
    """Cells that carry the number of their photograph."""
    features = np.arange(count, dtype=np.float16)[:, None, None, None]
    photographs = tuple(Photograph(f"{name}{i}", 1 + i % 4, 0, 0, {}) for i in range(count))
    return CellSet(np.broadcast_to(features, (count, side, side, 2)), photographs)


def test_shots_are_compared_with_their_scene_and_photographs_with_any() -> None:
    scored = [cells(9, 3, "cut"), cells(9, 8, "whole")]
    plain = cells(9, 5, "plain")
    sampler = WindowSampler(scored, [cells(40, 5, "shot")], plain, 0, torch.device("cpu"))
    for _ in range(20):
        batch = sampler.batch(10)
        rows, columns = batch.first.grid
        assert batch.first.features.shape == (10, rows * columns, 2)
        assert batch.alone == 6
        assert len(batch.others.photographs) == 6 + 2 * SHOTS_PER_SCENE
        expected = "cut" if max(rows, columns) <= 3 else "whole"
        numbers = [int(p.name.removeprefix("shot")) for p in batch.first.photographs[6:]]
        assert [number % 2 for number in numbers] == [0, 1, 0, 1]  # of either level
        for at, photograph in enumerate(batch.first.photographs):
            partners = [batch.others.photographs[i].name for i in batch.partners[at]]
            if at < 6:
                assert photograph.name.startswith((expected, "plain"))
                continue
            number = int(photograph.name.removeprefix("shot"))
            first = number - number % SHOTS_PER_SCENE
            scene_of = {f"shot{first + i}" for i in range(SHOTS_PER_SCENE)}
            assert {photograph.name, *partners} == scene_of
        assert batch.deviations[:6].unique().tolist() == [PREFERENCE_DEVIATION]
        assert batch.deviations[6:, 0].tolist() == pytest.approx([SCENE_DEVIATION] * 4)


def test_abroad_all_are_shots_or_plain() -> None:
    plain, device = cells(9, 5, "plain"), torch.device("cpu")
    batch = WindowSampler([], [cells(40, 5, "shot")], plain, 0, device).batch(50)
    assert {p.name[:4] for p in batch.first.photographs} == {"shot", "plai"}


def test_a_step_that_is_seen_costs_little_and_one_that_is_none_costs_nothing() -> None:
    wanted = torch.tensor([4.0, 3.0, 2.0, 2.01])
    right, wrong = torch.tensor([4.2, 2.8, 1.0, 5.0]), torch.tensor([3.0, 4.0, 2.0, 2.0])
    assert float(step_loss(right, wanted)) < 0.05 < 1.0 < float(step_loss(wrong, wanted))


def crops(wanted: torch.Tensor, groups: torch.Tensor) -> CropBatch:
    empty = torch.zeros(0, 2, dtype=torch.long)
    return CropBatch(wanted, wanted, groups, wanted, groups > 0, groups, empty, empty)


def test_new_scores_are_ordered_with_those_that_were_seen_before() -> None:
    remembered, rng = Remembered(), torch.Generator().manual_seed(0)
    groups = torch.tensor([1, 1, 2, 2, 0])
    for _ in range(40):
        wanted = torch.rand(5, generator=rng)
        right = remembered.order_loss(wanted.clone(), crops(wanted, groups))
    assert float(right) == pytest.approx(0.0, abs=1e-4)
    assert not remembered.kept.isnan().any()
    assert len(remembered.kept) == REMEMBERED
    assert set(remembered.kept[:, 2].tolist()) == {1.0, 2.0}  # what nobody scored is not kept
    wanted = torch.rand(5, generator=rng)
    score = (-wanted).requires_grad_()
    wrong = remembered.order_loss(score, crops(wanted, groups))
    wrong.backward()
    assert float(wrong.detach()) > 0.2
    assert score.grad is not None
    assert bool((score.grad[:4] != 0).all())
    assert float(score.grad[4]) == 0.0
