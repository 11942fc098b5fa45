"""Where a case lies, in a segment or beside it, changes nothing that a reader sees."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.errors import StoreError, StoreMismatch, StoreUnwritable
from meiqa.memory import (
    Case,
    ContrastPolicy,
    MemoryBank,
    RetrievalPolicy,
    layout,
    verify_memory,
)
from meiqa.memory.generation_writer import written_generation
from meiqa.memory.lock import WriterLock
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
    stratified=st.booleans(),
    exclude_above=st.sampled_from([1.0, 0.97, 0.1]),
    effort=st.just(1000),
)


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
    look = data.draw(st.sampled_from([None, layout(seen.tokens, seen.grid)]))
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


def test_snapshots_outlive_the_generations_they_show(tmp_path: Path) -> None:
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


def test_old_generations_and_unfinished_files_go_away(tmp_path: Path) -> None:
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


def test_what_happens_during_a_compaction_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_anchors(tmp_path / "m")
    bank = open_bank(path)
    for case in make_cases(4, "contrast"):
        bank.remember(case, provenance="a test")
    bank.compact()
    for name in ("x", "y", "z"):
        bank.remember(make_case(name), provenance="a test")
    frozen = bank._store.frozen

    def change_meanwhile(origin: Origin) -> Any:
        context = frozen(origin)

        class Meanwhile:
            def __enter__(self) -> Any:
                view = context.__enter__()
                bank.remember(make_case("x", score=1.25), provenance="a test")
                bank.remember(make_case("new"), provenance="a test")
                with bank._store.changing() as change:
                    change.drop("contrast", ["y", "contrast-0001"])
                return view

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        return Meanwhile()

    with monkeypatch.context() as patch:
        patch.setattr(bank._store, "frozen", change_meanwhile)
        bank._compactor.compact("contrast")
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
def test_a_compaction_that_stops_half_way_loses_nothing(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_anchors(tmp_path / "m", make_cases(5, "anchor"))
    bank = open_bank(path)
    bank.add_anchor(make_case("new", "anchor"), provenance="a test")
    bank.add_anchor(make_case("anchor-0002", "anchor", score=1.5), provenance="a test")
    bank.remove(["anchor-0001"])
    before = all_cases(bank)

    def stop(*_: object) -> None:
        raise StoreUnwritable("the disk is full")

    name = "publish" if moment == "before the swap" else "forget_merged"
    target = "meiqa.memory.segment_writer" if name == "publish" else "meiqa.memory.journal.Journal"
    with monkeypatch.context() as patch:
        patch.setattr(f"{target}.{name}", stop)
        with pytest.raises(StoreUnwritable, match="disk is full"):
            bank.compact()
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


def test_a_reader_that_is_overtaken_opens_the_next_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment it has mapped names records that are removed before it opens them."""
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path) as bank:
        bank.add_anchor(make_case("new", "anchor"), provenance="a test")
        from meiqa.memory import generation

        described = generation._described

        def overtake(*arguments: Any) -> Any:
            found = described(*arguments)
            monkeypatch.setattr(generation, "_described", described)
            bank.compact()
            return found

        monkeypatch.setattr(generation, "_described", overtake)
        with open_bank(path, "r") as reader:
            assert reader.snapshot().count_anchors == 4


def test_the_background_compacts_what_was_learnt(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path, policy=ContrastPolicy(compact_after=10)) as bank:
        for case in make_cases(25, "contrast"):
            bank.remember(case, provenance="a test")
        bank._compactor.wait()
        contrast = bank.statistics().origins["contrast"]
        assert contrast.generation >= 1
        assert contrast.cases == 25
        assert contrast.recent < 25


def test_a_failed_background_compaction_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StoreUnwritable("the disk is full")

    monkeypatch.setattr("meiqa.memory.segment_writer.publish", full)
    path = build_anchors_before(tmp_path / "m", monkeypatch)
    with (
        caplog.at_level(logging.WARNING),
        open_bank(path, policy=ContrastPolicy(compact_after=2)) as bank,
    ):
        for case in make_cases(9, "contrast"):
            bank.remember(case, provenance="a test")
            bank._compactor.wait()
        assert bank.snapshot().count_contrast == 9
    assert caplog.text.count("was not compacted") == 1


def build_anchors_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr("meiqa.memory.segment_writer.publish", os.replace)
        return build_anchors(path)


def test_anchors_elsewhere_are_not_copied(tmp_path: Path) -> None:
    anchors = build_anchors(tmp_path / "anchors", make_cases(3, "anchor"))
    own = tmp_path / "own"
    with MemoryBank.compose(anchors, own, "rw", package_digest=DIGEST) as bank:
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


def test_cases_of_an_older_format_are_refused(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m")
    (path / "contrast.sqlite3").write_bytes(b"")
    with pytest.raises(StoreMismatch, match=r"another meiqa.*rm .*contrast\.sqlite3"):
        open_bank(path)


def test_an_unpublished_generation_leaves_nothing(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(2, "anchor"))
    with open_bank(path, "r") as bank:
        identity = bank._store.identity
    before = sorted(path.iterdir())
    with written_generation(path, "anchor", identity, 2, []):
        pass
    assert sorted(path.iterdir()) == before


def test_a_snapshot_across_a_compaction_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has looked for generations when one appears and the journal is emptied."""
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path) as bank, open_bank(path, "r") as reader:
        for name in ("x", "y"):
            bank.remember(make_case(name), provenance="a test")
            bank.add_anchor(make_case(name, "anchor"), provenance="a test")
        assert reader._store._journal is not None
        refresh = reader._store._journal.refresh

        def overtake() -> None:
            monkeypatch.setattr(reader._store._journal, "refresh", refresh)
            assert bank.compact()
            refresh()

        monkeypatch.setattr(reader._store._journal, "refresh", overtake)
        snapshot = reader.snapshot()
        assert (snapshot.count_anchors, snapshot.count_contrast) == (5, 2)


def test_a_snapshot_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with open_bank(path) as bank:
        bank.remember(make_case("x"), provenance="a test")
        with bank._store.changing() as change:
            change.drop("contrast", ["x"])
            with ThreadPoolExecutor(1) as other:
                snapshot = other.submit(bank.snapshot).result(timeout=10)
            assert snapshot.count_contrast == 1
        assert bank.snapshot().count_contrast == 0


def test_an_image_of_a_replaced_case_is_free_again(tmp_path: Path) -> None:
    """The hidden row of the segment has the id of a case that is about another image by now."""
    path = build_anchors(tmp_path / "m", [make_case("a", "anchor", image_digest="first")])
    with open_bank(path) as bank:
        bank.add_anchor(make_case("a", "anchor", image_digest="second"), provenance="a test")
        bank.add_anchor(make_case("b", "anchor", image_digest="first"), provenance="a test")
        assert {case_id for _, case_id in all_cases(bank)} == {"a", "b"}


def test_a_writer_keeps_the_records_of_the_writer_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked at the generation before it holds the lock, and a compaction came between."""
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    lock = WriterLock

    def overtaken(lock_path: Path) -> WriterLock:
        monkeypatch.setattr("meiqa.memory.store.WriterLock", lock)
        with open_bank(path) as other:
            other.add_anchor(make_case("new", "anchor"), provenance="a test")
            other.compact()
        return lock(lock_path)

    monkeypatch.setattr("meiqa.memory.store.WriterLock", overtaken)
    for _ in range(2):
        with open_bank(path) as bank:
            assert bank.snapshot().count_anchors == 4
            assert len(all_cases(bank)) == 4
    assert verify_memory(path) == []
