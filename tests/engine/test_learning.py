"""What comparisons teach is written, survives, and serves the next photo."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from meiqa.engine.images import load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import Engine
from meiqa.errors import StoreError
from meiqa.memory import Case, MemoryBank, RetrievalPolicy
from meiqa.types import Assessment
from tests.engine.samples import PHOTOS, K, assessed, calibrated_copy, read_memory


def contrast_ids(assessment: Assessment) -> list[str]:
    return [n.id for n in assessment.neighbours if n.origin == "contrast"]


def test_what_was_reflected_on_is_found_after_reopening(keen: Path, memory: Path) -> None:
    with Engine.open(keen, memory, threads=1) as engine:
        learnt = engine.score(PHOTOS[0])
        assert learnt.reflection is not None
        assert contrast_ids(learnt) == []
        assert "reflect" in learnt.timings_ms
        own = engine.score(PHOTOS[0], learn=False)
        assert contrast_ids(own) == []
    with Engine.open(keen, memory, threads=1) as engine:
        assert engine.memory.snapshot().count_contrast == 1
        later = engine.score(PHOTOS[1], learn=False)
    (found,) = [n for n in later.neighbours if n.origin == "contrast"]
    assert found.score == pytest.approx(learnt.score)
    assert found.std == pytest.approx(learnt.std)
    assert found.preference is not None


def test_the_case_holds_what_the_photo_was(
    keen: Path, memory: Path, package: EnginePackage
) -> None:
    with Engine.open(keen, memory, threads=1) as engine:
        learnt = engine.score(PHOTOS[0])
    with read_memory(package, memory) as stored:
        key = np.ones(package.manifest.decoder.hidden_size, np.float32)
        nearest = RetrievalPolicy(k=1, anchor_share=0.0)
        (case,) = stored.snapshot().retrieve(key, nearest, None)
    assert case.summary == learnt.reflection
    assert case.score == pytest.approx(learnt.score)
    assert case.image_digest == load_pixels(PHOTOS[0]).digest
    assert case.grid[0] * case.grid[1] == len(case.tokens) == learnt.counters["visual_tokens"]


def test_a_photo_is_remembered_once(keen: Path, memory: Path) -> None:
    with Engine.open(keen, memory, threads=1) as engine:
        for _ in range(2):
            engine.score(PHOTOS[0])
        assert engine.memory.snapshot().count_contrast == 1


def test_a_small_move_is_not_reflected_on(
    package: EnginePackage, tmp_path: Path, memory: Path
) -> None:
    calm = calibrated_copy(package, tmp_path / "calm", reflect_above=4.0)
    with Engine.open(calm.path, memory, threads=1) as engine:
        assert engine.score(PHOTOS[0], k=K).reflection is None
        assert engine.memory.snapshot().count_contrast == 0


def test_learning_can_be_forgone(keen: Path, memory: Path) -> None:
    with Engine.open(keen, memory, threads=1) as engine:
        result = engine.score(PHOTOS[0], learn=False)
        assert result.reflection is None
        assert result.degraded == engine.score(PHOTOS[0], learn=False).degraded
        assert engine.memory.snapshot().count_contrast == 0


def test_a_call_sees_the_memory_as_it_was_when_it_began(keen: Path, memory: Path) -> None:
    with Engine.open(keen, memory, threads=1) as engine:
        before = engine.score_many(PHOTOS[:2])
        engine.score(PHOTOS[2])
        assert [contrast_ids(result) for result in assessed(before)] == [[], []]
        after = assessed(engine.score_many(PHOTOS[3:4], learn=False))
    assert len(contrast_ids(after[0])) == 3


def test_a_read_only_memory_is_said_and_scoring_goes_on(keen: Path, memory: Path) -> None:
    with Engine.open(keen, memory, threads=1, learn=False) as engine:
        result = engine.score(PHOTOS[0])
    assert result.reflection is not None
    assert any("not remembered" in n and "read-only" in n for n in result.degraded)
    assert 1 <= result.score <= 5


def test_a_locked_memory_is_said_and_scoring_goes_on(
    keen: Path, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine.open(keen, memory, threads=1) as writer:
        writer.score(PHOTOS[1])
        with (
            caplog.at_level(logging.WARNING),
            Engine.open(keen, memory, threads=1) as reader,
        ):
            result = reader.score(PHOTOS[0])
        assert "nothing will be remembered" in caplog.text
        assert any("not remembered" in note for note in result.degraded)
        assert len(contrast_ids(result)) == 1
        assert writer.memory.snapshot().count_contrast == 1


def test_a_full_disk_is_said_and_scoring_goes_on(
    keen: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: MemoryBank, case: Case, *, provenance: str) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(MemoryBank, "remember", fail)
    with Engine.open(keen, memory, threads=1) as engine:
        result = engine.score(PHOTOS[0])
    assert "not remembered: no space left" in result.degraded
    assert result.reflection is not None
