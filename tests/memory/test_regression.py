"""The regression from visual tokens to human scores that a memory brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from meiqa.errors import StoreCorrupted
from meiqa.memory import AnchorWriter, Case, MemoryBank, Regression, token_features
from meiqa.memory.cases import FEWEST_PHOTOS, MOST_PHOTOS, Sample
from meiqa.types import Origin

DIGEST = "ab12"
LAW = np.float32([0.5, -0.3, 0.0, 0.2])


def features_and_scores(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 30) of which a few make the scores, among noise."""
    random = np.random.default_rng(seed)
    law = np.random.default_rng(99).normal(size=30) * (np.arange(30) < 5)
    features = 10 + random.normal(size=(count, 30))
    return features, 3 + 0.2 * (features - 10) @ law + random.normal(0, 0.1, count)


def case(number: int, random: np.random.Generator, origin: Origin = "anchor") -> Case:
    """An anchor whose score follows from its tokens."""
    tokens = random.normal(size=(4, 4)).astype(np.float32)
    score = float(np.clip(3.0 + tokens.mean(axis=0) @ LAW, 1, 5))
    key = random.normal(size=2).astype(np.float32)
    return Case(f"{number:05d}", origin, f"d{number}", score, 0.1, "", key, tokens, (2, 2))


def memory(path: Path, count: int) -> Path:
    """A memory of so many anchors."""
    random = np.random.default_rng(5)
    with AnchorWriter(path, DIGEST, key_width=2, token_width=4) as writer:
        for number in range(count):
            writer.add(case(number, random))
        writer.finish()
    return path


def test_a_law_is_found_among_noise() -> None:
    features, scores = features_and_scores(1, 300)
    unseen, truth = features_and_scores(2, 100)
    regression, _ = Regression.fit(features, scores)
    said = np.array([regression.score(each) for each in unseen])
    assert np.corrcoef(said, truth)[0, 1] > 0.95
    assert said.std() == pytest.approx(truth.std(), rel=0.15)
    assert regression.std == pytest.approx(np.sqrt(np.mean((said - truth) ** 2)), rel=0.3)


def test_what_is_said_of_a_photo_left_out_is_what_a_fit_without_it_says() -> None:
    features, scores = features_and_scores(3, 120)
    _, left_out = Regression.fit(features, scores)
    kept = np.arange(120) != 7
    without, _ = Regression.fit(features[kept], scores[kept])
    assert without.score(features[7]) == pytest.approx(left_out[7], abs=0.02)


def test_noise_is_not_blown_up() -> None:
    random = np.random.default_rng(2)
    regression, _ = Regression.fit(random.normal(size=(60, 200)), random.uniform(2, 4, 60))
    said = [regression.score(each) for each in random.normal(size=(60, 200))]
    assert np.std(said) < 0.3


def test_a_score_stays_on_the_scale() -> None:
    regression = Regression(np.array([1.0]), 0.0, 0.5, np.zeros(1))
    assert (regression.score(np.float32([9])), regression.score(np.float32([-9]))) == (5.0, 1.0)


def test_it_doubts_the_photographs_that_are_hard_to_judge() -> None:
    random = np.random.default_rng(6)
    features, scores = features_and_scores(6, 600)
    noise = 0.1 * np.exp(features[:, 7] - 10)  # one of the features tells how hard it is
    scores = scores + noise * random.normal(size=600)
    regression, _ = Regression.fit(features[:400], scores[:400])
    errors = np.array([regression.score(f) for f in features[400:]]) - scores[400:]
    doubts = np.array([regression.doubt(each) for each in features[400:]])
    assert spearmanr(doubts, noise[400:]).statistic > 0.7
    assert doubts.max() / doubts.min() <= np.exp(1.8) + 1e-9
    assert np.sqrt(np.mean((errors / doubts) ** 2)) == pytest.approx(regression.std, rel=0.3)


def test_it_comes_back_as_it_was_stored() -> None:
    features, scores = features_and_scores(4, 80)
    regression, _ = Regression.fit(features, scores)
    again = Regression.of_array(regression.array)
    assert np.array_equal(again.array, regression.array)


def test_one_of_an_earlier_version_has_no_doubt() -> None:
    features, scores = features_and_scores(4, 80)
    regression, _ = Regression.fit(features, scores)
    earlier = Regression.of_array(regression.array[0])
    assert earlier.score(features[0]) == regression.score(features[0])
    assert {earlier.doubt(each) for each in features} == {1.0}


@pytest.mark.parametrize("count", [MOST_PHOTOS, MOST_PHOTOS + 1, 3 * MOST_PHOTOS])
def test_a_sample_is_bounded_and_spread(count: int) -> None:
    sample = Sample()
    for number in range(count):
        sample.show(str(number), np.zeros((1, 1), np.float32), float(number % 5))
    fitted = sample.fitted()
    assert fitted is not None
    names = np.array([int(name) for name in fitted[1]])
    assert MOST_PHOTOS // 2 <= len(names) <= MOST_PHOTOS
    assert len(set(np.diff(names).tolist())) == 1
    assert names[-1] > count - 8


def test_too_few_anchors_or_scores_that_are_all_one_give_none(tmp_path: Path) -> None:
    with MemoryBank.open(memory(tmp_path / "few", FEWEST_PHOTOS - 1), package_digest=DIGEST) as few:
        assert few.snapshot().regression is None
        assert few.snapshot().scores_left_out() == {}
    sample = Sample()
    for number in range(FEWEST_PHOTOS):
        sample.show(str(number), np.float32([[number]]), 3.0)
    sample.show("no tokens", np.zeros((0, 1), np.float32), 5.0)
    assert sample.fitted() is None


def test_a_memory_brings_its_own(tmp_path: Path) -> None:
    with MemoryBank.open(memory(tmp_path / "memory", 200), package_digest=DIGEST) as bank:
        regression = bank.snapshot().regression
        left_out = bank.snapshot().scores_left_out()
    assert regression is not None
    assert len(left_out) == 200
    random = np.random.default_rng(6)
    unseen = [case(number, random) for number in range(50)]
    said = [regression.score(token_features(each.tokens)) for each in unseen]
    assert np.corrcoef(said, [each.score for each in unseen])[0, 1] > 0.98


def test_added_anchors_count_from_the_next_compaction_on(tmp_path: Path) -> None:
    path = memory(tmp_path / "memory", FEWEST_PHOTOS - 1)
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.add_anchor(case(9_000, np.random.default_rng(7)), provenance="test")
        assert bank.snapshot().regression is None
        bank.compact()
        assert bank.snapshot().regression is not None


def test_contrast_cases_teach_it_nothing(tmp_path: Path) -> None:
    path = memory(tmp_path / "memory", 100)
    random = np.random.default_rng(8)
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        before = bank.snapshot().regression
        for number in range(60):
            bank.remember(case(number, random, "contrast"), provenance="test")
        bank.compact()
        after = bank.snapshot().regression
    assert before is not None
    assert after is not None
    assert np.array_equal(before.array, after.array)


def test_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = memory(tmp_path / "memory", 100)
    with MemoryBank.open(path, package_digest=DIGEST) as bank:
        regression = bank.snapshot().regression
    assert regression is not None
    segment = path / "anchors.seg"
    stored = bytearray(segment.read_bytes())
    stored[stored.index(regression.array.tobytes())] ^= 1
    segment.write_bytes(stored)
    with (
        MemoryBank.open(path, package_digest=DIGEST) as bank,
        pytest.raises(StoreCorrupted, match="regression"),
    ):
        _ = bank.snapshot().regression
