"""A small memory: fewer anchors, without tokens, with what was learned of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meiqa.errors import StoreError, StoreMismatch, UsageError
from meiqa.memory import MemoryBank, RetrievalPolicy, verify_memory
from tests.memory.samples import DIGEST, build_anchors, make_case, make_cases, uses_of

ANCHORS, KEPT = 60, 7


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = build_anchors(tmp_path / "whole", make_cases(ANCHORS, "anchor"))
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.remember(make_case("learnt"), provenance="a test")
        bank.snapshot().retrieve(make_case("learnt").key, RetrievalPolicy(), None)
        bank.remember(make_case("later"), provenance="writes the counters")
    return path


def thinned(whole: Path, keep: int = KEPT) -> Path:
    with MemoryBank.open(whole, package_digest=DIGEST) as bank:
        bank.thin(whole.with_name("thin"), keep)
    return whole.with_name("thin")


def test_anchors_spread_over_the_scale_stay_without_tokens(whole: Path) -> None:
    path = thinned(whole)
    assert verify_memory(path) == []
    scores = sorted(case.score for case in make_cases(ANCHORS, "anchor"))
    with MemoryBank.open(path, package_digest=DIGEST, verify=True) as bank:
        snapshot = bank.snapshot()
        found = snapshot.retrieve(make_case("a").key, RetrievalPolicy(k=1000), None)
        anchors = [case for case in found if case.origin == "anchor"]
        kept = sorted(case.score for case in anchors)
        assert len(kept) == snapshot.count_anchors == KEPT
        assert (kept[0], kept[-1]) == (scores[0], scores[-1])
        ranks = np.searchsorted(scores, kept)
        assert np.ptp(np.diff(ranks)) <= 1
        assert not any(len(case.tokens) for case in anchors)
    assert {len(case.tokens) for case in found if case.origin == "contrast"} == {4}
    assert uses_of(path) == uses_of(whole)


def test_what_was_learned_of_all_stays_through_compaction(whole: Path) -> None:
    with MemoryBank.open(whole, package_digest=DIGEST) as bank:
        learned = bank.snapshot().regression
    assert learned is not None
    with MemoryBank.open(thinned(whole), "rw", package_digest=DIGEST) as bank:
        for case in make_cases(2 * ANCHORS, "anchor")[ANCHORS:]:
            bank.add_anchor(case, provenance="a test")
        bank.compact()
        found = bank.snapshot().regression
    assert found is not None
    np.testing.assert_array_equal(found.array, learned.array)


def test_no_more_anchors_stay_than_there_are(whole: Path) -> None:
    with MemoryBank.open(whole, package_digest=DIGEST) as bank:
        assert bank.thin(whole.with_name("thin"), 1000) == ANCHORS


def test_what_cannot_be_thinned_is_refused(whole: Path) -> None:
    with MemoryBank.open(whole, "rw", package_digest=DIGEST) as bank:
        with pytest.raises(StoreError, match="already exists"):
            bank.thin(whole, KEPT)
        bank.add_anchor(make_case("added", "anchor"), provenance="a test")
        with pytest.raises(StoreMismatch, match=r"not merged yet.*memory compact"):
            bank.thin(whole.with_name("thin"), KEPT)
        with pytest.raises(UsageError, match=r"0.*1 or more"):
            bank.thin(whole.with_name("thin"), 0)
    assert not whole.with_name("thin").exists()


def test_keys_of_tokens_cannot_be_made_of_none(whole: Path) -> None:
    with (
        MemoryBank.open(thinned(whole), package_digest=DIGEST) as bank,
        pytest.raises(StoreMismatch, match="need visual tokens"),
    ):
        bank.rekey("image", whole.with_name("rekeyed"))
    assert not whole.with_name("rekeyed").exists()
