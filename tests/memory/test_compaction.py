"""Where a case lies, in a segment or beside it, changes nothing that a reader sees."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.errors import StoreError, StoreUnwritable
from meiqa.memory import (
    Case,
    ContrastPolicy,
    MemoryBank,
    RetrievalPolicy,
    spatial_descriptor,
    verify_memory,
)
from meiqa.memory.cases import Entry
from meiqa.memory.pacing import Pace
from meiqa.types import Origin
from tests.memory.naive_retrieval import naive_retrieve
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    assert_same_case,
    build_anchors,
    make_case,
    make_cases,
)

EVERYTHING = RetrievalPolicy(k=100_000)
UNMERGED = ContrastPolicy(merge_above=1.0)


def open_bank(path: Path, mode: str = "rw", **options: Any) -> MemoryBank:
    return MemoryBank.open(path, mode, package_digest=DIGEST, **options)  # type: ignore[arg-type]


def all_cases(bank: MemoryBank) -> dict[tuple[str, str], Case]:
    found = bank.snapshot().retrieve(np.ones(KEY_WIDTH, np.float32), EVERYTHING, None)
    cases = {(case.origin, case.id): case for case in found}
    assert len(cases) == len(found)
    return cases


@contextmanager
def once(owner: Any, name: str, act: Callable[..., object]) -> Iterator[None]:
    """Let something happen when a function is called, before it does its work.

    Once; but if `act` gives False, with the next call.
    """
    real = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        setattr(owner, name, real)
        if act(*arguments) is False:
            setattr(owner, name, interrupted)
        return real(*arguments, **options)

    setattr(owner, name, interrupted)
    try:
        yield
    finally:
        setattr(owner, name, real)


def tied_case(number: int, origin: Origin, image: int) -> Case:
    """Few distinct keys and scores, so that ids decide; ids that sort unlike their numbers."""
    random = np.random.default_rng(number)
    return make_case(
        f"{number}",
        origin,
        image_digest=f"image {image}",
        score=float(random.integers(1, 4)),
        key=np.eye(KEY_WIDTH, dtype=np.float32)[random.integers(3)],
    )


actions = st.one_of(
    st.tuples(st.sampled_from(["anchor", "contrast"]), st.integers(0, 40), st.integers(0, 60)),
    st.tuples(st.just("remove"), st.integers(0, 40), st.just(0)),
    st.tuples(st.sampled_from(["compact", "reopen"]), st.just(0), st.just(0)),
)
policies = st.builds(
    RetrievalPolicy,
    k=st.integers(0, 40),
    anchor_share=st.sampled_from([0.0, 0.5, 1.0]),
    bins=st.integers(1, 7),
    exclude_above=st.sampled_from([1.0, 0.97, 0.1]),
    effort=st.just(1000),
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    built=st.integers(0, 30), steps=st.lists(actions, max_size=25), policy=policies, data=st.data()
)
@pytest.mark.parametrize("flat_below", [1, 10_000])
def test_any_history_reads_like_a_plain_list(
    tmp_path_factory: pytest.TempPathFactory,
    flat_below: int,
    built: int,
    steps: list[tuple[str, int, int]],
    policy: RetrievalPolicy,
    data: st.DataObject,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meiqa.memory.index.FLAT_BELOW", flat_below)
        live_through(tmp_path_factory.mktemp("history") / "m", built, steps, policy, data)


def live_through(
    path: Path,
    built: int,
    steps: list[tuple[str, int, int]],
    policy: RetrievalPolicy,
    data: st.DataObject,
) -> None:
    start = [tied_case(number, "anchor", image=number) for number in range(built)]
    build_anchors(path, start)
    expected: dict[Origin, dict[str, Case]] = {
        "anchor": {case.id: case for case in start},
        "contrast": {},
    }
    bank = open_bank(path, policy=UNMERGED)
    for action, number, image in steps:
        if action == "compact":
            bank.compact()
        elif action == "reopen":
            bank.close()
            bank = open_bank(path, policy=UNMERGED)
        elif action == "remove":
            gone = sum(cases.pop(f"{number}", None) is not None for cases in expected.values())
            assert bank.remove([f"{number}"]) == gone
        else:
            origin: Origin = "anchor" if action == "anchor" else "contrast"
            case = tied_case(number, origin, image)
            if origin == "anchor":
                bank.add_anchor(case, provenance="a test")
            else:
                bank.remember(case, provenance="a test")
            kept = {
                each.id: each
                for each in expected[origin].values()
                if each.image_digest != case.image_digest
            }
            expected[origin] = kept | {case.id: case}
    anchors, contrast = (list(cases.values()) for cases in expected.values())
    snapshot = bank.snapshot()
    assert (snapshot.count_anchors, snapshot.count_contrast) == (len(anchors), len(contrast))
    key = np.random.default_rng(built).standard_normal(KEY_WIDTH, np.float32)
    exclude = data.draw(st.sampled_from([None, "image 3"]))
    seen = make_case(f"{data.draw(st.integers(0, 40))}")
    look = data.draw(st.sampled_from([None, spatial_descriptor(seen.tokens, seen.grid)]))
    found = [case.id for case in snapshot.retrieve(key, policy, exclude, look)]
    assert found == naive_retrieve(anchors, contrast, key, policy, exclude, look)
    if anchors:
        below = sum(case.score < 2.0 for case in anchors)
        assert snapshot.percentile(2.0) == pytest.approx(100 * below / len(anchors))
    bank.close()
    assert verify_memory(path) == []


def test_an_added_anchor_is_found_at_once_and_after_compaction(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(30, "anchor"))
    added = make_case("a new one", "anchor", score=4.5)
    with open_bank(path) as bank, open_bank(path, "r") as reader:
        bank.add_anchor(added, provenance="a person")
        for opened in (bank, reader):
            nearest = opened.snapshot().retrieve(added.key, RetrievalPolicy(k=1), None)
            assert_same_case(nearest[0], added)
        assert bank.compact()
        assert not bank.compact()
        for opened in (bank, reader):
            nearest = opened.snapshot().retrieve(added.key, RetrievalPolicy(k=1), None)
            assert_same_case(nearest[0], added)
            assert opened.snapshot().count_anchors == 31


def test_snapshots_outlive_the_versions_they_show(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(7, "anchor"))
    with open_bank(path) as bank:
        for case in make_cases(3, "contrast"):
            bank.remember(case, provenance="a test")
        bank.compact()
        old = bank.snapshot()
        bank.remove(["anchor-0001", "contrast-0001"])
        bank.remember(make_case("contrast-0002", score=1.5), provenance="a test")
        bank.compact()
    found = old.retrieve(np.ones(KEY_WIDTH, np.float32), EVERYTHING, None)
    by_id = {case.id: case for case in found}
    assert len(by_id) == 10
    for case in (*make_cases(7, "anchor"), *make_cases(3, "contrast")):
        assert_same_case(by_id[case.id], case)


def test_old_versions_and_unfinished_files_go_away(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path) as bank:
        for number in range(3):
            bank.add_anchor(make_case(f"new {number}", "anchor"), provenance="a test")
            bank.remember(make_case(f"c{number}"), provenance="a test")
            bank.compact()
    for name in (".anchors.seg.77.partial", "contrast-9.sqlite3", ".contrast-9.sqlite3.partial"):
        (path / name).write_text("left by a killed writer")
    assert len(verify_memory(path)) == 3
    open_bank(path).close()
    assert sorted(file.name for file in path.iterdir()) == [
        "anchors-4.sqlite3",
        "anchors.seg",
        "cases.lock",
        "cases.sqlite3",
        "contrast-3.sqlite3",
        "contrast.seg",
    ]
    assert verify_memory(path) == []


def test_what_happens_during_a_compaction_is_kept(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m")
    bank = open_bank(path)
    for case in make_cases(4, "contrast"):
        bank.remember(case, provenance="a test")
    bank.compact()
    doubtful = make_case("contrast-0001")
    object.__setattr__(doubtful, "std", 4.0)
    bank.remember(doubtful, provenance="a test")
    bank.compact()
    for name in ("x", "y", "z"):
        case = make_case(name)
        object.__setattr__(case, "std", 4.0 if name == "y" else 0.25)
        bank.remember(case, provenance="a test")

    def change_meanwhile(_: Path, to: Path) -> bool:
        if to.name != "contrast-3.sqlite3":  # what is begun once it is known what is merged
            return False
        bank.remember(make_case("x", score=1.25), provenance="a test")
        bank.remember(make_case("new"), provenance="a test")
        assert bank.evict(keep=6) == 2  # "y" and "contrast-0001"
        return True

    with once(os, "replace", change_meanwhile):
        assert bank.compact()
    expected = {"contrast-0000", "contrast-0002", "contrast-0003", "x", "z", "new"}
    for _ in range(2):
        found = {case_id: case for (_, case_id), case in all_cases(bank).items()}
        assert set(found) == expected
        assert found["x"].score == 1.25
        bank.close()
        bank = open_bank(path)
        bank.compact()
    bank.close()


@pytest.mark.parametrize("moment", ["before the swap", "after the swap"])
def test_a_compaction_that_stops_half_way_loses_nothing(tmp_path: Path, moment: str) -> None:
    path = build_anchors(tmp_path / "m", make_cases(5, "anchor"))
    bank = open_bank(path)
    bank.add_anchor(make_case("new", "anchor"), provenance="a test")
    bank.add_anchor(make_case("anchor-0002", "anchor", score=1.5), provenance="a test")
    bank.remove(["anchor-0001"])
    before = all_cases(bank)

    segment = path / "anchors.seg"
    built = segment.stat().st_ino

    def stop_before(_: Path, to: Path) -> bool:
        if to == segment:
            raise OSError(errno.ENOSPC, "the disk is full")
        return False

    def stop_after(*_: object) -> bool:
        # The new name is durable next; nothing has been taken from the WAL yet.
        if segment.stat().st_ino != built:
            raise OSError(errno.ENOSPC, "the disk is full")
        return False

    name, stop = ("replace", stop_before) if moment == "before the swap" else ("open", stop_after)
    with once(os, name, stop), pytest.raises(StoreUnwritable, match="disk is full"):
        bank.compact()
    assert (segment.stat().st_ino == built) == (moment == "before the swap")
    for _ in range(2):
        after = all_cases(bank)
        assert after.keys() == before.keys()
        for key, case in after.items():
            assert_same_case(case, before[key])
        bank.close()
        bank = open_bank(path)
    assert bank.compact()
    assert all_cases(bank).keys() == before.keys()
    bank.close()
    assert verify_memory(path) == []


@pytest.mark.parametrize("verify", [False, True])
def test_a_reader_that_is_overtaken_opens_the_next_version(tmp_path: Path, verify: bool) -> None:
    """The segment it has mapped names records that are removed just when it opens them."""
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path) as bank:
        bank.add_anchor(make_case("new", "anchor"), provenance="a test")

        def overtake(database: object, *_: object) -> bool:
            if "anchors.sqlite3" not in str(database):
                return False
            bank.compact()
            return True

        with (
            once(sqlite3, "connect", overtake),
            open_bank(path, "r", verify=verify) as reader,
        ):
            assert reader.snapshot().count_anchors == 4
            assert not (path / "anchors.sqlite3").exists()


def test_the_background_compacts_what_was_learnt(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path, policy=ContrastPolicy(compact_after=10)) as bank:
        for case in make_cases(25, "contrast"):
            bank.remember(case, provenance="a test")
    with open_bank(path, "r") as bank:  # closing has waited for the background
        contrast = bank.statistics().origins["contrast"]
    assert contrast.version >= 1
    assert contrast.cases == 25
    assert contrast.recent < 25


def test_a_failed_background_compaction_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = build_anchors(tmp_path / "m")

    def full(_: Path, to: Path) -> bool:
        if to.name == "contrast.seg":
            raise OSError(errno.ENOSPC, "the disk is full")
        return False

    with (
        caplog.at_level(logging.WARNING),
        once(os, "replace", full),
        open_bank(path, policy=ContrastPolicy(compact_after=2)) as bank,
    ):
        for case in make_cases(9, "contrast"):
            bank.remember(case, provenance="a test")
            wait_for_the_background()
        assert bank.snapshot().count_contrast == 9
    assert caplog.text.count("was not compacted") == 1


def test_who_removes_does_not_wait_for_a_gentle_pull(tmp_path: Path) -> None:
    path, pace = build_anchors(tmp_path / "m"), Pace(gently=True)
    begun = threading.Event()

    def incoming() -> Iterator[Entry]:
        begun.set()
        deadline = time.monotonic() + 20
        while pace.gentle and time.monotonic() < deadline:
            time.sleep(0.01)
        yield from ()

    with open_bank(path) as bank, ThreadPoolExecutor(1) as beside:
        bank.remember(make_case("c"), provenance="a test")
        bank.compact()
        absorbing = beside.submit(bank.absorb, "contrast", incoming(), pace)
        assert begun.wait(20)
        assert bank.remove(["c"]) == 1
        absorbing.result()
        assert not pace.gentle
        assert bank.snapshot().count_contrast == 0


def test_without_hnswlib_a_gentle_pull_of_anchors_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meiqa.memory.index.FLAT_BELOW", 10)
    other = build_anchors(tmp_path / "other", make_cases(20, "anchor"))
    with open_bank(other, "r") as bank:
        entries = [*bank.snapshot().anchors.all_entries()]
    path = build_anchors(tmp_path / "m")
    monkeypatch.setattr("meiqa.memory.bank.can_be_built", lambda: False)
    with open_bank(path) as bank:
        bank.absorb("anchor", iter(entries), Pace(gently=True))
        assert bank.snapshot().anchors.version.index is None
        assert bank.snapshot().count_anchors >= 20


def wait_for_the_background() -> None:
    for thread in threading.enumerate():
        if thread.name == "memory compaction":
            thread.join()


def test_anchors_elsewhere_are_not_copied(tmp_path: Path) -> None:
    anchors = build_anchors(tmp_path / "anchors", make_cases(3, "anchor"))
    own = tmp_path / "own"
    with MemoryBank(anchors, own, "rw", package_digest=DIGEST) as bank:
        bank.add_anchor(make_case("new", "anchor"), provenance="a test")
        bank.remove(["anchor-0001"])
        bank.remember(make_case("c"), provenance="a test")
        assert bank.compact()
        assert {case_id for _, case_id in all_cases(bank)} == {
            "anchor-0000",
            "anchor-0002",
            "c",
            "new",
        }
    assert not (own / "anchors.seg").exists()
    with open_bank(anchors, "r") as bank:
        assert bank.snapshot().count_anchors == 3


def test_a_reader_may_not_compact(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m")
    with open_bank(path, "r") as bank, pytest.raises(StoreError, match="mode 'rw'"):
        bank.compact()


def test_a_snapshot_across_a_compaction_misses_nothing(tmp_path: Path) -> None:
    """The reader has looked for versions when one appears and the WAL is emptied."""
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path) as bank, open_bank(path, "r") as reader:
        for name in ("x", "y"):
            bank.remember(make_case(name), provenance="a test")
            bank.add_anchor(make_case(name, "anchor"), provenance="a test")
        looked = []

        def overtake(looked_at: Path) -> bool:
            looked.append(str(looked_at))
            if len(looked) == 1:
                return False
            assert bank.compact()
            return True

        with once(os, "stat", overtake):
            snapshot = reader.snapshot()
        assert [Path(file).name for file in looked] == ["anchors.seg", "contrast.seg"]
        assert (snapshot.count_anchors, snapshot.count_contrast) == (5, 2)


def test_a_snapshot_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path) as bank, ThreadPoolExecutor(1) as other:
        bank.remember(make_case("x"), provenance="a test")
        begun, go_on = threading.Event(), threading.Event()

        def hold(*_: object) -> None:
            begun.set()
            assert go_on.wait(60)

        # The writer looks at the clock in the middle of what it commits as one.
        with once(time, "time", hold):
            bank.snapshot().retrieve(np.ones(KEY_WIDTH, np.float32), EVERYTHING, None)
            forgotten = other.submit(bank.forget)
            assert begun.wait(60)
            assert bank.snapshot().count_contrast == 1
            assert not forgotten.done()
            go_on.set()
        assert forgotten.result(60) == 1
        assert bank.snapshot().count_contrast == 0


def test_an_image_of_a_replaced_case_is_free_again(tmp_path: Path) -> None:
    """The hidden row of the segment has the id of a case that is about another image by now."""
    path = build_anchors(tmp_path / "m", [make_case("a", "anchor", image_digest="first")])
    with open_bank(path) as bank:
        bank.add_anchor(make_case("a", "anchor", image_digest="second"), provenance="a test")
        bank.add_anchor(make_case("b", "anchor", image_digest="first"), provenance="a test")
        assert {case_id for _, case_id in all_cases(bank)} == {"a", "b"}


def test_a_writer_keeps_the_records_of_the_writer_before(tmp_path: Path) -> None:
    """It has looked at the version before it holds the lock, and a compaction came between."""
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))

    def overtake(*_: object) -> None:
        with open_bank(path) as other:
            other.add_anchor(make_case("new", "anchor"), provenance="a test")
            other.compact()

    with once(fcntl, "flock", overtake):
        for _ in range(2):
            with open_bank(path) as bank:
                assert bank.snapshot().count_anchors == 4
                assert len(all_cases(bank)) == 4
    assert verify_memory(path) == []
