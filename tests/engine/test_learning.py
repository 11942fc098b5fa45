"""What comparisons teach is written, survives, and serves the next photo."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa.engine.engine import Engine
from meiqa.engine.images import load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.engine.scoring import Scorer
from meiqa.errors import StoreError, UsageError
from meiqa.memory import Case, MemoryBank, RetrievalPolicy, retrieval_key
from meiqa.types import Assessment, Budget, KeyKind
from tests.engine.samples import (
    ANCHORS,
    PHOTOS,
    SIZES,
    K,
    assessed,
    calibrated_copy,
    open_model,
    picture,
    read_memory,
    seen,
)


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


def test_all_photos_are_remembered_if_told_to(
    package: EnginePackage, tmp_path: Path, memory: Path
) -> None:
    """Those whose gate stayed shut with their first description, and never as anchors."""
    calm = calibrated_copy(package, tmp_path / "calm", reflect_above=4.0).path
    with Engine.open(calm, memory, threads=1, learn="all") as engine:
        before = engine.memory.snapshot().count_anchors
        result = engine.score(PHOTOS[0], k=K)
        engine.score(PHOTOS[1], k=K, learn=False)
        assert result.reflection is None
        assert not any("remembered" in note for note in result.degraded)
        (record,) = engine.memory.cases("contrast")
        assert engine.memory.snapshot().count_anchors == before
        hurried = engine.score(PHOTOS[2], k=K, budget=Budget(ms=0.01))
        assert "not remembered: no summary" in hurried.degraded
    assert (record.summary, record.score) == (result.summary, pytest.approx(result.score))
    assert record.provenance == "scored <array>"


def test_gate_and_reflection_are_the_same_whatever_is_admitted(keen: Path, memory: Path) -> None:
    with Engine.open(keen, memory, threads=1, learn="all") as engine:
        result = engine.score(PHOTOS[0])
        (record,) = engine.memory.cases("contrast")
    assert record.summary == result.reflection
    assert record.provenance.startswith("reflected on")


@pytest.mark.parametrize("kind", ["image", "both"])
def test_cases_are_learnt_and_found_with_the_memorys_kind_of_key(
    keen: Path, memory: Path, package: EnginePackage, tmp_path: Path, kind: KeyKind
) -> None:
    with read_memory(package, memory) as bank:
        bank.rekey(kind, tmp_path / "rekeyed")
    with Engine.open(keen, tmp_path / "rekeyed", threads=1) as engine:
        engine.score(PHOTOS[0])
        later = engine.score(PHOTOS[1], learn=False)
        hurried = engine.score(PHOTOS[1], learn=False, budget=Budget(ms=0.01))
        tokens = seen(open_model(package), PHOTOS[0]).values
        width = package.manifest.decoder.hidden_size
        own = retrieval_key(kind, np.zeros(width, np.float32), tokens)
        nearest = RetrievalPolicy(k=1, anchor_share=0.0)
        (case,) = engine.memory.snapshot().retrieve(own, nearest, None)
    assert len(contrast_ids(later)) == 1
    assert hurried.summary is None
    image_part = case.key[-width:] * np.float32(np.sqrt(2) if kind == "both" else 1)
    np.testing.assert_allclose(image_part, retrieval_key("image", own, tokens), atol=2e-3)


def test_near_duplicates_are_no_neighbours(
    package: EnginePackage, memory: Path, tmp_path: Path
) -> None:
    """A copy of an anchor with other pixels is not compared with it unless that is asked for."""
    copy = picture(1000, SIZES[0]).copy()
    copy[:8, :8] += np.uint8(1)
    found = {}
    for above in (0.97, 1.0):
        policy = RetrievalPolicy(exclude_above=above)
        with Engine.open(package.path, memory, threads=1, learn=False, retrieval=policy) as engine:
            found[above] = [n.id for n in engine.score(copy, k=ANCHORS).neighbours]
    assert "anchor-00" in found[1.0]
    assert "anchor-00" not in found[0.97]
    assert set(found[0.97]) < set(found[1.0])


def test_a_senseless_policy_is_refused_and_the_memory_let_go(keen: Path, memory: Path) -> None:
    with pytest.raises(UsageError, match="exclude_above is a cosine"):
        Engine.open(keen, memory, threads=1, retrieval=RetrievalPolicy(exclude_above=3.0))
    some: Any = "some"
    with pytest.raises(UsageError, match="gated, all"):
        Engine.open(keen, memory, threads=1, learn=some)
    with Engine.open(keen, memory, threads=1) as engine:
        assert engine.score(PHOTOS[0]).reflection is not None


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


def test_a_memory_that_is_only_read_is_no_news_for_each_photo(keen: Path, memory: Path) -> None:
    """Whoever opened it asked for it, or was told."""
    with Engine.open(keen, memory, threads=1, learn=False) as engine:
        result = engine.score(PHOTOS[0])
    assert result.reflection is not None
    assert not any("not remembered" in note for note in result.degraded)
    with Engine.open(keen, memory, threads=1) as engine:
        assert engine.score(PHOTOS[0]).score == pytest.approx(result.score)


def test_a_locked_memory_is_said_once_and_scoring_goes_on(
    keen: Path, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine.open(keen, memory, threads=1) as writer:
        writer.score(PHOTOS[1])
        with (
            caplog.at_level(logging.WARNING),
            Engine.open(keen, memory, threads=1) as reader,
        ):
            results = assessed(reader.score_many([PHOTOS[0], PHOTOS[2]]))
        assert caplog.text.count("nothing will be remembered") == 1
        assert not any("not remembered" in note for each in results for note in each.degraded)
        assert [len(contrast_ids(each)) for each in results] == [1, 1]
        assert writer.memory.snapshot().count_contrast == 1


class Full(MemoryBank):
    """A memory on a full disk."""

    def remember(self, case: Case, *, provenance: str, gated: bool = True) -> bool:
        raise StoreError("no space left")


def test_a_full_disk_is_said_and_scoring_goes_on(keen: Path, memory: Path) -> None:
    model = open_model(EnginePackage.open(keen))
    bank = Full.open(memory, "rw", package_digest=model.digest)
    with Engine(Scorer(model, bank, RetrievalPolicy(k=K))) as engine:
        result = engine.score(PHOTOS[0])
    assert "not remembered: no space left" in result.degraded
    assert result.reflection is not None
