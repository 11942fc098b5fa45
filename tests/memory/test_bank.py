"""What was remembered stays, what was frozen does not change, and one process writes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.errors import (
    MeiqaError,
    StoreCorrupted,
    StoreError,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
    UsageError,
)
from meiqa.memory import (
    AnchorWriter,
    Case,
    MemoryBank,
    RetrievalPolicy,
    Snapshot,
    verify_memory,
)
from meiqa.memory.wal import Mode
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    TOKEN_WIDTH,
    assert_same_case,
    build_anchors,
    make_case,
    make_cases,
    python_child,
    uses_of,
)

ALL = RetrievalPolicy(k=100_000, anchor_share=0.0)


@pytest.fixture(scope="module")
def three_anchors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_anchors(tmp_path_factory.mktemp("anchors") / "m", make_cases(3, "anchor"))


@pytest.fixture
def path(tmp_path: Path, three_anchors: Path) -> Path:
    return Path(shutil.copytree(three_anchors, tmp_path / "memory"))


def open_bank(path: Path, mode: str = "rw", digest: str = DIGEST) -> MemoryBank:
    return MemoryBank.open(path, mode, package_digest=digest)  # type: ignore[arg-type]


def contrast_of(snapshot: Snapshot) -> dict[str, Case]:
    found = snapshot.retrieve(np.ones(KEY_WIDTH, np.float32), ALL, None)
    return {case.id: case for case in found if case.origin == "contrast"}


def fill(path: Path, count: int) -> list[Case]:
    cases = make_cases(count, "contrast")
    with open_bank(path) as bank:
        for case in cases:
            bank.remember(case, provenance="a test")
    return cases


@pytest.mark.parametrize("count", [0, 1, 3, 7, 97])
def test_remembered_cases_come_back_after_reopening(path: Path, count: int) -> None:
    cases = fill(path, count)
    for mode in ("r", "rw"):
        with open_bank(path, mode) as bank:
            found = contrast_of(bank.snapshot())
        assert sorted(found) == [case.id for case in cases]
        for case in cases:
            assert_same_case(found[case.id], case)


def test_a_case_reads_the_same_before_and_after_reopening(path: Path) -> None:
    with open_bank(path) as bank:
        bank.remember(make_case("a"), provenance="a test")
        before = contrast_of(bank.snapshot())["a"]
    with open_bank(path, "r") as bank:
        after = contrast_of(bank.snapshot())["a"]
    np.testing.assert_array_equal(before.tokens, after.tokens)
    np.testing.assert_array_equal(before.key, after.key)


def test_the_same_image_or_id_replaces(path: Path) -> None:
    with open_bank(path) as bank:
        for case in (
            make_case("first", image_digest="x", score=2.0),
            make_case("second", image_digest="x", score=3.0),
            make_case("third", image_digest="y"),
            make_case("third", image_digest="z", score=4.0),
        ):
            bank.remember(case, provenance="a test")
        found = contrast_of(bank.snapshot())
    assert {case.id: (case.image_digest, case.score) for case in found.values()} == {
        "second": ("x", 3.0),
        "third": ("z", 4.0),
    }


def test_numpy_scalars_are_stored_as_numbers(path: Path) -> None:
    case = make_case("a")
    for name, value in {"score": np.float32(2.5), "std": np.float64(0.5)}.items():
        object.__setattr__(case, name, value)
    object.__setattr__(case, "grid", (np.int64(2), np.int32(2)))
    with open_bank(path) as bank:
        bank.remember(case, provenance="a test")
        assert contrast_of(bank.snapshot())["a"].grid == (2, 2)


def test_a_snapshot_does_not_change(path: Path) -> None:
    with open_bank(path) as bank:
        bank.remember(make_case("a", image_digest="x"), provenance="a test")
        frozen = bank.snapshot()
        bank.remember(make_case("b"), provenance="a test")
        bank.remember(make_case("a2", image_digest="x"), provenance="a test")
        assert sorted(contrast_of(bank.snapshot())) == ["a2", "b"]
        bank.forget()
        assert bank.snapshot().count_contrast == 0
        assert frozen.count_contrast == 1
    assert_same_case(contrast_of(frozen)["a"], make_case("a", image_digest="x"))


def test_readers_follow_a_writer(path: Path) -> None:
    with open_bank(path, "r") as reader:
        assert reader.snapshot().count_contrast == 0
        with open_bank(path) as writer:
            for number in range(7):
                writer.remember(make_case(f"c{number}"), provenance="a test")
                assert len(contrast_of(reader.snapshot())) == number + 1
            writer.remember(make_case("c3", score=1.5), provenance="a test")
            assert contrast_of(reader.snapshot())["c3"].score == 1.5
            writer.forget()
        assert reader.snapshot().count_contrast == 0


def test_forgetting_since_a_moment(path: Path) -> None:
    with open_bank(path) as bank:
        bank.remember(make_case("old"), provenance="a test")
        time.sleep(0.01)
        moment = datetime.now(UTC)
        bank.remember(make_case("new"), provenance="a test")
        assert bank.forget(since=moment) == 1
        assert sorted(contrast_of(bank.snapshot())) == ["old"]
        assert bank.forget() == 1
        assert bank.forget() == 0
        with pytest.raises(UsageError, match="time zone"):
            bank.forget(since=datetime(2026, 1, 1))
        assert bank.snapshot().count_anchors == 3


def test_forgotten_photos_leave_no_trace(path: Path) -> None:
    secret = "a very private photograph"
    case = make_case("a")
    object.__setattr__(case, "summary", secret)
    with open_bank(path) as bank:
        bank.remember(case, provenance="a test")
        assert any(secret.encode() in file.read_bytes() for file in path.iterdir())
        bank.forget()
        assert not any(secret.encode() in file.read_bytes() for file in path.iterdir())


def test_a_reader_may_not_write(path: Path) -> None:
    with open_bank(path, "r") as bank:
        with pytest.raises(StoreError, match="mode 'rw'"):
            bank.remember(make_case("a"), provenance="a test")
        with pytest.raises(StoreError, match="mode 'rw'"):
            bank.forget()
    assert not (path / "cases.sqlite3").exists()


def test_unknown_modes_are_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="allowed: r, rw"):
        open_bank(path, "w")


def test_a_contrast_directory_is_created_when_written_only(path: Path, tmp_path: Path) -> None:
    contrast = tmp_path / "user" / "memory"
    with MemoryBank(path, contrast, "r", package_digest=DIGEST) as bank:
        assert bank.snapshot().count_contrast == 0
    assert not contrast.exists()
    with MemoryBank(path, contrast, "rw", package_digest=DIGEST) as bank:
        bank.remember(make_case("a"), provenance="a test")
        assert bank.snapshot().count_contrast == 1
    assert not (path / "cases.sqlite3").exists()


def test_an_unwritable_contrast_directory_is_named(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreError, match=r"cannot write .*file"):
        MemoryBank(path, tmp_path / "file" / "memory", "rw", package_digest=DIGEST)


def test_a_closed_bank_says_so_and_its_snapshots_stay(path: Path) -> None:
    bank = open_bank(path)
    bank.remember(make_case("a"), provenance="a test")
    snapshot = bank.snapshot()
    bank.close()
    bank.close()
    assert sorted(contrast_of(snapshot)) == ["a"]
    for use in (bank.snapshot, bank.forget):
        with pytest.raises(StoreError, match="is closed"):
            use()


def test_unstorable_cases_are_refused(path: Path) -> None:
    with open_bank(path) as bank:
        with pytest.raises(UsageError, match="wrong origin"):
            bank.remember(make_case("a", "anchor"), provenance="a test")
        with pytest.raises(UsageError, match="wrong shape"):
            bank.remember(make_case("a", widths=(KEY_WIDTH, 5)), provenance="a test")
        assert bank.snapshot().count_contrast == 0


def test_retrievals_are_counted_and_survive_replacement(path: Path) -> None:
    fill(path, 3)
    with open_bank(path) as bank:
        for _ in range(5):
            contrast_of(bank.snapshot())
        bank.remember(make_case("contrast-0001", score=2.0), provenance="a test")
        contrast_of(bank.snapshot())
    counts = {name: uses[0] for name, uses in uses_of(path).items()}
    assert counts == {"contrast-0000": 6, "contrast-0001": 6, "contrast-0002": 6}


def test_two_writers_do_not_meet(path: Path) -> None:
    with open_bank(path):
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}") as refusal:
            open_bank(path)
        assert refusal.value.retryable
        open_bank(path, "r").close()
    open_bank(path).close()


def test_a_failed_opening_keeps_no_lock(path: Path) -> None:
    fill(path, 1)
    content = (path / "cases.sqlite3").read_bytes()
    (path / "cases.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreCorrupted):
        open_bank(path)
    (path / "cases.sqlite3").write_bytes(content)
    open_bank(path).close()


def test_an_abandoned_bank_gives_its_lock_back(path: Path) -> None:
    bank = open_bank(path)
    bank.remember(make_case("a"), provenance="a test")
    del bank
    open_bank(path).close()


def test_threads_share_a_bank(path: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                bank.remember(make_case(f"{number}-{turn}"), provenance="a test")
                assert f"{number}-{turn}" in contrast_of(bank.snapshot())
        except BaseException as error:
            failures.append(error)

    with open_bank(path) as bank:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert bank.snapshot().count_contrast == 40


FORKED = """
import os, sys
from meiqa.errors import StoreError
from meiqa.memory import MemoryBank
bank = MemoryBank.open(sys.argv[1], "rw", package_digest="ab12")
ready, done = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    try:
        bank.snapshot()
    except StoreError as error:
        os.write(ready[1], str(error).encode())
    os.read(done[0], 1)
    os._exit(0)
print(os.read(ready[0], 1000).decode())
bank.close()
MemoryBank.open(sys.argv[1], "rw", package_digest="ab12").close()
os.write(done[1], b"x")
os.waitpid(child, 0)
print("reopened beside the child")
"""


def test_a_forked_child_neither_uses_nor_keeps_the_bank(path: Path) -> None:
    output, errors = python_child(FORKED, path).communicate(timeout=60)
    assert errors == ""
    assert "open the memory after the fork" in output
    assert "reopened beside the child" in output


def test_contrast_cases_of_another_package_are_refused(path: Path, tmp_path: Path) -> None:
    fill(path, 1)
    for digest, widths in (("cd34", (KEY_WIDTH, TOKEN_WIDTH)), (DIGEST, (KEY_WIDTH + 1, 6))):
        anchors = tmp_path / f"anchors-{digest}"
        with AnchorWriter(anchors, digest, *widths) as writer:
            writer.finish()
        for mode in ("r", "rw"):
            with pytest.raises(StoreMismatch, match=r"cases\.sqlite3"):
                MemoryBank(anchors, path, mode, package_digest=digest)


def test_a_store_refused_once_is_refused_again(path: Path, tmp_path: Path) -> None:
    foreign = build_anchors(tmp_path / "foreign", digest="cd34")
    with open_bank(foreign, digest="cd34") as bank:
        bank.remember(make_case("a"), provenance="a test")
    with open_bank(path, "r") as reader:
        shutil.copy(foreign / "cases.sqlite3", path)  # it appears under the open reader
        for _ in range(2):
            with pytest.raises(StoreMismatch, match=r"cases\.sqlite3"):
                reader.snapshot()


def test_another_schema_is_not_called_damage(path: Path) -> None:
    fill(path, 1)
    database = sqlite3.connect(path / "cases.sqlite3")
    database.execute("PRAGMA user_version = 4")
    database.close()
    with pytest.raises(StoreMismatch, match="version 4"):
        open_bank(path)


def test_a_foreign_database_is_refused(path: Path) -> None:
    sqlite3.connect(path / "cases.sqlite3").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(StoreCorrupted, match="not a memory's database"):
        open_bank(path, "r")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = build_anchors(tmp_path_factory.mktemp("pristine") / "memory")
    fill(path, 40)
    return path, (path / "cases.sqlite3").read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), mode=st.sampled_from(["r", "rw"]))
def test_damage_is_noticed(pristine: tuple[Path, bytes], data: st.DataObject, mode: str) -> None:
    path, content = pristine[0], bytearray(pristine[1])
    if data.draw(st.integers(0, 9)):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for leftover in path.glob("cases.*"):
        leftover.unlink()
    (path / "cases.sqlite3").write_bytes(content)
    try:
        with open_bank(path, mode) as bank:
            found = contrast_of(bank.snapshot())
    except (StoreCorrupted, StoreMismatch):
        return
    assert len(found) == 40
    for case in make_cases(40, "contrast"):
        assert_same_case(found[case.id], case)


WRITER = """
import sys
from meiqa.memory import MemoryBank
from tests.memory.samples import make_case
bank = MemoryBank.open(sys.argv[1], "rw", package_digest="ab12")
bank.remember(make_case("a"), provenance="a test")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_writer_elsewhere_is_named_and_its_lock_ends_with_it(path: Path) -> None:
    with python_child(WRITER, path) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(StoreLocked, match=f"process {writer.pid}"):
            open_bank(path)
        with open_bank(path, "r") as bank:
            assert bank.snapshot().count_contrast == 1
        writer.kill()
    open_bank(path).close()


def test_a_snapshot_of_what_has_not_changed_is_the_one_before(path: Path) -> None:
    with open_bank(path) as bank, open_bank(path, "r") as reader:
        for opened in (bank, reader):
            assert opened.snapshot() is opened.snapshot()
        before = reader.snapshot()
        bank.remember(make_case("a"), provenance="a test")
        assert reader.snapshot() is not before
        assert reader.snapshot() is reader.snapshot()


def test_errors_are_one_line(path: Path) -> None:
    with pytest.raises(MeiqaError) as refusal:
        open_bank(path, digest="other")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("mode", ["r", "rw"])
def test_a_directory_of_other_files_is_no_memory(
    three_anchors: Path, tmp_path: Path, mode: Mode
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(StoreNotFound, match="holds no memory, but something else; got photo"):
        MemoryBank(three_anchors, tmp_path, mode, package_digest=DIGEST)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_what_was_stored_before_there_were_devices_is_read_and_added_to(path: Path) -> None:
    fill(path, 3)
    with closing(sqlite3.connect(path / "cases.sqlite3")) as database:
        database.executescript(
            "ALTER TABLE records DROP COLUMN device; DROP TABLE outbox; PRAGMA user_version = 2"
        )
    with open_bank(path, "r") as reader:
        before = contrast_of(reader.snapshot())
        assert len(before) == 3
        with open_bank(path) as writer:
            writer.remember(make_case("later"), provenance="a test")
        after = contrast_of(reader.snapshot())
    assert after.keys() == before.keys() | {"later"}
    assert {case.device for case in after.values()} == {""}
    with open_bank(path) as bank:
        assert bank.compact()
    assert verify_memory(path) == []
