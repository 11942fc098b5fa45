"""A killed run goes on where it was, and what is kept on disk is known by its content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from meiqa.engine.measures import measure_attributes
from meiqa.export.families.conv_hybrid import ConvHybridConfig, ConvHybridTower
from tests.engine.samples import picture
from training.cells import cells_digest
from training.data import Photograph, PhotographSet
from training.distortions import LEVELS
from training.pretrain import (
    UNNAMED,
    CropSampler,
    Pretraining,
    Recipe,
    begun,
    save_judged,
)
from training.towers import ConvTower, JudgedTower

RECIPE = Recipe(steps=100, sizes=((128, 8, 1.0),))
SCORES = np.linspace(4.5, 1.5, LEVELS, dtype=np.float32)[None].repeat(32, 0)


def photographs(seed: int, kind: int, size: tuple[int, int] = (160, 192)) -> PhotographSet:
    """Give five small pictures."""
    pixels = np.stack([picture(seed + number, size) for number in range(5)])
    records = (
        Photograph(f"{number}.png", 1.0 + number, kind, min(kind, 3), measure_attributes(crop))
        for number, crop in enumerate(pixels)
    )
    return PhotographSet(pixels, tuple(records))


def sampler() -> CropSampler:
    return CropSampler([photographs(0, kind=0)], photographs(10, kind=0), SCORES, seed=3)


def small_model() -> JudgedTower:
    """Give a tower of two eyes with few weights."""
    torch.manual_seed(0)
    stages = ((1, 8, 3, 1, 1), (1, 8, 3, 2, 2), (1, 16, 5, 2, 2))
    overview = ((8, 1), (8, 2), (8, 1), (16, 2), (16, 2), (256, 2))
    tower = ConvTower(
        ConvHybridConfig(16, stages=stages, attention_blocks=1, overview=overview, stem_width=8)
    )
    tower.keep_what_is_known()
    return JudgedTower(tower, 16)


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


def test_pretraining_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run, drawn = Pretraining(small_model(), tmp_path, RECIPE), sampler()
    run.standardise(drawn)
    before = [parameter.clone() for parameter in run.model.parameters()]
    losses = [run.step(drawn) for _ in range(2)]
    assert np.isfinite([list(loss.values()) for loss in losses]).all()
    assert any(
        not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True)
    )
    run.spent_s = 1.5
    run.save()
    resumed = Pretraining(small_model(), tmp_path, RECIPE)
    assert (resumed.steps, resumed.spent_s) == (2, 1.5)
    assert_same(resumed.model, run.model)
    assert_same(resumed.average, run.average)
    assert resumed.step(sampler()) == pytest.approx(run.step(sampler()), rel=1e-5)
    assert resumed.steps == 3


def test_a_run_ends_with_a_checkpoint_and_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = photographs(20, kind=0, size=(128, 192))
    recipe = Recipe(steps=1, sizes=RECIPE.sizes)
    run = Pretraining(small_model(), tmp_path, recipe)
    run.run(sampler(), judged, 5)
    log = (tmp_path / "log.jsonl").read_text()
    assert log.count("\n") == 1
    assert capsys.readouterr().out == log
    spent = Pretraining(small_model(), tmp_path, recipe)
    spent.run(sampler(), judged, 5)
    assert spent.steps == run.steps == 1


def test_a_step_abroad_sees_ladders_only_and_some_of_the_sizes(tmp_path: Path) -> None:
    sizes = ((64, 4, 0.3), (128, 4, 0.35))
    run = Pretraining(small_model(), tmp_path, Recipe(steps=100, human_share=0.0, sizes=sizes))
    losses = run.step(CropSampler([], photographs(10, kind=0), SCORES, seed=3))
    assert np.isfinite(list(losses.values())).all()


def test_cached_cells_are_known_by_tower_and_records(tmp_path: Path) -> None:
    tower = ConvHybridTower(ConvHybridConfig(16, attention_blocks=1))
    records = tmp_path / "human.jsonl"
    records.write_text("{}")
    digests = [cells_digest(tower, records)]
    assert cells_digest(tower, records) == digests[0]
    assert len(digests[0]) == 12
    bias = tower.state_dict()["stem.conv.bias"]
    with torch.no_grad():
        bias[:2] = torch.tensor([1.0, -1.0])
        digests.append(cells_digest(tower, records))
        bias[:2] = torch.tensor([-1.0, 1.0])
        digests.append(cells_digest(tower, records))
    records.write_text("[]")
    digests.append(cells_digest(tower, records))
    assert len(set(digests)) == len(digests)


def test_a_batch_holds_scored_ones_their_repetitions_and_ladders() -> None:
    batch = sampler().batch(24, 0.45, 128)
    assert batch.images.shape == (24, 3, 128, 128)
    assert int(batch.human.sum()) == 13
    assert (batch.scores[batch.same[:, 0]] == batch.scores[batch.same[:, 1]]).all()
    assert (batch.scores[batch.ladders[:, 0]] >= batch.scores[batch.ladders[:, 1]]).all()
    assert not batch.human[batch.ladders].any()
    plain = batch.kinds == UNNAMED
    assert int(plain.sum()) == 24 - 13 - batch.ladders.numel()
    assert (batch.scores[plain] == 1.0).all()


def test_abroad_a_batch_holds_ladders_only() -> None:
    drawn = CropSampler([], photographs(10, kind=0), SCORES, seed=3)
    batch = drawn.batch(8, 0.0, 128)
    assert batch.ladders.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not batch.human.any()
    assert batch.same.shape == (0, 2)


def test_tones_are_seen_whatever_the_picture(tmp_path: Path) -> None:
    tower = small_model().tower
    assert isinstance(tower, ConvTower)
    flat = torch.full((1, 3, 128, 128), 0.5)
    features = tower.cell_features(flat)
    assert features.shape == (1, 2, 2, tower.statistics_width)
    mean = features[..., -16:-8]
    torch.testing.assert_close(mean[0, 0, 0], torch.tensor([0.5] * 5 + [0.0] * 3))


def test_a_tower_that_was_written_goes_on(tmp_path: Path) -> None:
    first = begun("conv", None, None)
    save_judged(first, tmp_path / "tower.safetensors")
    again = begun("conv", None, tmp_path / "tower.safetensors")
    torch.testing.assert_close(again.state_dict(), first.state_dict(), atol=1e-3, rtol=1e-3)
    assert isinstance(again.tower, ConvTower)
    assert not again.tower.stem.conv.weight.requires_grad
