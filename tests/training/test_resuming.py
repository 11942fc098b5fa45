"""A killed run goes on where it was, and what is kept on disk is known by its content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from meiqa.export.families.conv_hybrid import ConvHybridConfig, ConvHybridTower
from meiqa.training import pretrain
from meiqa.training.attributes import measure_attributes
from meiqa.training.data import Photograph, PhotographSet
from meiqa.training.finetune import cells_digest
from meiqa.training.pretrain import CropSampler, Pretraining, Recipe
from tests.engine.samples import picture

CPU = torch.device("cpu")
RECIPE = Recipe(minutes=5.0, batch=4)


def photographs(seed: int, kind: int, size: tuple[int, int] = (160, 192)) -> PhotographSet:
    """Give five small pictures."""
    pixels = np.stack([picture(seed + number, size) for number in range(5)])
    records = (
        Photograph(f"{number}.png", 1.0 + number, kind, min(kind, 3), measure_attributes(crop))
        for number, crop in enumerate(pixels)
    )
    return PhotographSet(pixels, tuple(records))


def sampler() -> CropSampler:
    return CropSampler(photographs(0, kind=0), photographs(10, kind=7), seed=3)


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


def test_pretraining_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "CROP", 128)
    run, drawn = Pretraining(tmp_path, "conv", RECIPE, CPU), sampler()
    before = [parameter.clone() for parameter in run.model.parameters()]
    losses = [run.step(drawn) for _ in range(2)]
    assert np.isfinite(losses).all()
    assert any(
        not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True)
    )
    run.spent_s = 1.5
    run.save()
    resumed = Pretraining(tmp_path, "conv", RECIPE, CPU)
    assert (resumed.steps, resumed.spent_s) == (2, 1.5)
    assert_same(resumed.model, run.model)
    assert_same(resumed.average, run.average)
    assert resumed.step(sampler()) == pytest.approx(run.step(sampler()), rel=1e-5)
    assert resumed.steps == 3


def test_a_run_ends_with_a_checkpoint_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "CROP", 128)
    judged = photographs(20, kind=0, size=(128, 192))
    recipe = Recipe(minutes=1e-6, batch=4)
    run = Pretraining(tmp_path, "conv", recipe, CPU)
    run.run(sampler(), judged, 5)
    log = (tmp_path / "stage1-conv" / "log.jsonl").read_text()
    assert log.count("\n") == 1
    assert capsys.readouterr().out == log
    spent = Pretraining(tmp_path, "conv", recipe, CPU)
    spent.run(sampler(), judged, 5)
    assert spent.steps == run.steps == 1


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
