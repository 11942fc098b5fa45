"""Which learned cases are kept, listed and removed."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa.errors import StoreError, UsageError
from meiqa.memory import Case, ContrastPolicy, MemoryBank, RetrievalPolicy
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    assert_same_case,
    build_anchors,
    make_case,
    make_cases,
    uses_of,
)

DAY = 86_400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build_anchors(tmp_path / "m", make_cases(5, "anchor"))


def open_bank(path: Path, mode: str = "rw", **policy: Any) -> MemoryBank:
    return MemoryBank.open(
        path,
        mode,  # type: ignore[arg-type]
        package_digest=DIGEST,
        policy=ContrastPolicy(**policy),
    )


def learnt(bank: MemoryBank) -> list[str]:
    return [record.id for record in bank.cases(origin="contrast")]


def alike(case: Case, case_id: str, **changes: Any) -> Case:
    """A case of another image that looks and is described almost like it."""
    twin = make_case(case_id, key=case.key + np.float32(1e-3))
    for name, value in ({"tokens": case.tokens * np.float32(1.01)} | changes).items():
        object.__setattr__(twin, name, value)
    return twin


def test_only_gated_cases_are_admitted_unless_told(path: Path) -> None:
    with open_bank(path) as bank:
        assert not bank.remember(make_case("a"), provenance="a test", gated=False)
        assert bank.remember(make_case("b"), provenance="a test")
        assert learnt(bank) == ["b"]
    with open_bank(path, admission="all") as bank:
        assert bank.remember(make_case("a"), provenance="a test", gated=False)
        assert learnt(bank) == ["a", "b"]


@pytest.mark.parametrize("compacted", [False, True])
def test_near_duplicates_merge_and_add_up_their_uses(path: Path, compacted: bool) -> None:
    first, other = make_case("first"), make_case("other")
    with open_bank(path) as bank:
        for case in (first, other):
            bank.remember(case, provenance="a test")
        if compacted:
            bank.compact()
        for _ in range(3):
            bank.snapshot().retrieve(first.key, RetrievalPolicy(anchor_share=0), None)
        newer = alike(first, "newer")
        bank.remember(newer, provenance="a test")
        assert learnt(bank) == ["newer", "other"]
        found = bank.snapshot().retrieve(first.key, RetrievalPolicy(k=1, anchor_share=0), None)
        assert_same_case(found[0], newer)
    assert {name: uses[0] for name, uses in uses_of(path).items()} == {"newer": 4, "other": 3}


def test_what_only_reads_alike_stays(path: Path) -> None:
    first = make_case("first")
    with open_bank(path) as bank:
        for case in (first, alike(first, "another look", tokens=make_case("another").tokens)):
            bank.remember(case, provenance="a test")
        assert len(learnt(bank)) == 2
    with open_bank(path, merge_above=1.0) as bank:
        bank.remember(alike(first, "merged never"), provenance="a test")
        assert len(learnt(bank)) == 3


def test_the_same_picture_described_otherwise_merges(path: Path) -> None:
    first = make_case("first")
    with open_bank(path) as bank:
        bank.remember(first, provenance="a test")
        bank.remember(alike(first, "newer", key=make_case("another").key), provenance="a test")
        assert learnt(bank) == ["newer"]


def test_worth_follows_its_formula() -> None:
    worth = ContrastPolicy(half_life_days=30.0).worth
    assert worth(0, 0.0, 0.0) == 1.0
    assert worth(5, 0.0, 0.0) == 6.0
    assert worth(0, 60 * DAY, 0.0) == 0.25
    assert worth(0, 0.0, 1.0) == pytest.approx(0.2)
    assert worth(3, 15 * DAY, 0.25) == pytest.approx(4 / math.sqrt(2) / 1.25)
    assert worth(1, -DAY, 0.0) == 2.0


@pytest.mark.parametrize("compacted", [False, True])
def test_the_least_worth_is_evicted_first(path: Path, compacted: bool) -> None:
    with open_bank(path) as bank:
        for name, std in (("doubtful", 2.0), ("sure", 0.1), ("used", 2.0)):
            case = make_case(name)
            object.__setattr__(case, "std", std)
            bank.remember(case, provenance="a test")
        if compacted:
            bank.compact()
        for _ in range(30):
            bank.snapshot().retrieve(
                make_case("used").key, RetrievalPolicy(k=1, anchor_share=0), None
            )
        bank.remember(make_case("sure", score=2.0), provenance="writes the counters")
        assert bank.evict(keep=5) == 0
        assert bank.evict(keep=2) == 1
        assert learnt(bank) == ["sure", "used"]
        assert bank.evict(keep=1) == 1
        assert learnt(bank) == ["used"]
        assert bank.evict(keep=0) == 1
        assert bank.snapshot().count_anchors == 5
        with pytest.raises(UsageError, match="keep"):
            bank.evict(keep=-1)


def test_a_full_memory_makes_room(path: Path) -> None:
    with open_bank(path, capacity=40, compact_after=15) as bank:
        for case in make_cases(100, "contrast"):
            bank.remember(case, provenance="a test")
            assert bank.snapshot().count_contrast <= 40
        assert bank.snapshot().count_contrast >= 38


def test_cases_are_listed_by_origin_and_moment(path: Path) -> None:
    with open_bank(path) as bank:
        bank.remember(make_case("old"), provenance="reflected on a.jpg")
        bank.compact()
        time.sleep(0.01)
        moment = datetime.now(UTC)
        bank.remember(make_case("new"), provenance="reflected on b.jpg")
        bank.add_anchor(make_case("b", "anchor"), provenance="a person")
        everything = [record.id for record in bank.cases()]
        assert everything == [*(f"anchor-000{n}" for n in range(5)), "b", "new", "old"]
        assert [record.id for record in bank.cases(since=moment)] == ["b", "new"]
        assert [record.provenance for record in bank.cases("contrast", moment)] == [
            "reflected on b.jpg"
        ]
        with pytest.raises(UsageError, match="origin"):
            bank.cases(origin="neither")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="time zone"):
            bank.cases(since=datetime(2026, 1, 1))


@pytest.mark.parametrize("compacted", [False, True])
def test_removal_undoes_what_was_added_or_learnt(path: Path, compacted: bool) -> None:
    with open_bank(path) as bank:
        moment = datetime.now(UTC)
        for name in ("x", "y", "z"):
            bank.remember(make_case(name), provenance="a test")
            bank.add_anchor(make_case(name, "anchor"), provenance="a test")
        if compacted:
            bank.compact()
        assert bank.remove(["x", "nobody"]) == 2
        assert bank.remove(["y"], origin="contrast") == 1
        assert bank.remove(["anchor-0000"], since=moment) == 0
        assert bank.remove(origin="anchor", since=moment) == 2
        assert [record.id for record in bank.cases()] == [
            *(f"anchor-000{n}" for n in range(5)),
            "z",
        ]
        assert bank.remove(origin="anchor") == 5
        assert math.isnan(bank.snapshot().percentile(3.0))
        with pytest.raises(UsageError, match="ids, origin, since"):
            bank.remove()
    with open_bank(path, "r") as bank:
        assert [record.id for record in bank.cases()] == ["z"]
        with pytest.raises(StoreError, match="mode 'rw'"):
            bank.remove(["z"])


def test_removed_cases_leave_no_trace_in_a_segment_either(path: Path) -> None:
    case = make_case("secret case")
    secret = "a very private photograph"
    object.__setattr__(case, "summary", secret)
    with open_bank(path) as bank:
        bank.remember(case, provenance="a test")
        bank.remember(make_case("another"), provenance="a test")
        bank.snapshot().retrieve(case.key, RetrievalPolicy(), None)
        bank.compact()
        assert any(secret.encode() in file.read_bytes() for file in path.iterdir())
        bank.remove(["secret case"])
        assert not any(secret.encode() in file.read_bytes() for file in path.iterdir())
        assert learnt(bank) == ["another"]


def test_predicted_scores_never_enter_the_anchors(path: Path) -> None:
    with open_bank(path) as bank:
        with pytest.raises(UsageError, match="wrong origin"):
            bank.add_anchor(make_case("predicted", "contrast"), provenance="a test")
        assert bank.snapshot().count_anchors == 5


@pytest.mark.parametrize(
    "options",
    [
        {"admission": "none"},
        {"capacity": 0},
        {"compact_after": 0},
        {"merge_above": 1.5},
        {"merge_above": float("nan")},
        {"half_life_days": 0.0},
        {"half_life_days": float("nan")},
    ],
)
def test_senseless_policies_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ContrastPolicy(**options)


def test_keys_of_zero_width_tokens_do_not_merge(path: Path) -> None:
    with open_bank(path) as bank:
        for name in ("a", "b"):
            case = make_case(name, key=np.ones(KEY_WIDTH, np.float32), tokens=0)
            bank.remember(case, provenance="a test")
        assert learnt(bank) == ["a", "b"]
