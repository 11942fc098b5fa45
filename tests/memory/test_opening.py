"""Which memory an engine opens, what happens where it cannot be written, and what that imports."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from meiqa.errors import StoreError, StoreMismatch, StoreNotFound, StoreUnwritable, UsageError
from meiqa.memory import MemoryBank, bank, create_memory, open_memory
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    TOKEN_WIDTH,
    build_anchors,
    make_case,
    make_cases,
    python_child,
)


@pytest.fixture(autouse=True)
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put three anchors where the embedded ones are looked for."""
    monkeypatch.setattr(bank, "embedded_assets", lambda: tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    return build_anchors(tmp_path / "assets" / "memory", make_cases(3, "anchor"))


@pytest.fixture
def no_directory(tmp_path: Path) -> Path:
    """Give a path at which no directory can be made, whoever asks."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "memory"


@pytest.mark.parametrize("learn", [False, True, "gated", "all"])
@pytest.mark.parametrize("name", ["mistyped", "file"])
def test_a_memory_that_is_named_must_be_there(tmp_path: Path, name: str, learn: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreNotFound, match="meiqa memory create PATH") as refusal:
        open_memory(tmp_path / name, DIGEST, learn=learn)
    assert str(tmp_path / name) in str(refusal.value)
    assert not (tmp_path / "mistyped").exists()


def test_a_memory_is_created_by_name_and_learns_beside_the_embedded_anchors(tmp_path: Path) -> None:
    assert create_memory(tmp_path / "new" / "memory", DIGEST, KEY_WIDTH, TOKEN_WIDTH)
    with open_memory(tmp_path / "new" / "memory", DIGEST) as opened:
        opened.remember(make_case("a"), provenance="a test")
    with open_memory(tmp_path / "new" / "memory", DIGEST, learn=False) as opened:
        snapshot = opened.snapshot()
    assert (snapshot.count_anchors, snapshot.count_contrast) == (3, 1)


def test_a_memory_is_created_where_none_is(tmp_path: Path) -> None:
    own = build_anchors(tmp_path / "own")
    with pytest.raises(StoreError, match="already exists"):
        create_memory(own, DIGEST, KEY_WIDTH, TOKEN_WIDTH)


def test_the_memory_of_another_package_begins_without_anchors(tmp_path: Path) -> None:
    with pytest.raises(StoreMismatch, match=r"meiqa memory build.*meiqa memory create"):
        open_memory(None, "cd34", learn=False)
    assert not create_memory(tmp_path / "new", "cd34", KEY_WIDTH, TOKEN_WIDTH)
    with open_memory(tmp_path / "new", "cd34") as opened:
        opened.remember(make_case("a"), provenance="a test")
        snapshot = opened.snapshot()
    assert (snapshot.count_anchors, snapshot.count_contrast) == (0, 1)


def test_an_empty_directory_may_be_learned_into(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with open_memory(tmp_path / "empty", DIGEST) as opened:
        assert opened.remember(make_case("a"), provenance="a test")


def test_anchors_of_its_own_replace_the_embedded_ones(tmp_path: Path) -> None:
    own = build_anchors(tmp_path / "own", make_cases(7, "anchor"))
    with open_memory(own, DIGEST, learn=False) as opened:
        assert opened.snapshot().count_anchors == 7


def test_the_users_memory_is_apart_for_each_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEIQA_MEMORY", str(tmp_path / "user"))
    open_memory(None, DIGEST, learn=False).close()
    assert not (tmp_path / "user").exists()
    open_memory(None, DIGEST).close()
    assert [path.name for path in (tmp_path / "user").iterdir()] == [DIGEST[:16]]


@pytest.mark.parametrize(
    ("learn", "admitted"), [(True, False), ("gated", False), ("all", True), (False, None)]
)
def test_what_is_learned_is_said_in_one_word(
    tmp_path: Path, learn: bool, admitted: bool | None
) -> None:
    own = build_anchors(tmp_path / "own")
    with open_memory(own, DIGEST, learn=learn) as opened:
        assert opened.writable == bool(learn)
        if admitted is not None:
            assert opened.remember(make_case("a"), provenance="t", gated=False) == admitted
    with pytest.raises(UsageError, match="got some; allowed: gated, all"):
        open_memory(own, DIGEST, learn="some")  # type: ignore[arg-type]


def test_a_second_learner_says_once_that_nothing_will_be_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = build_anchors(tmp_path / "own")
    with (
        caplog.at_level(logging.WARNING),
        open_memory(own, DIGEST),
        open_memory(own, DIGEST, learn="all") as second,
    ):
        assert not second.writable
        for _ in range(3):
            with pytest.raises(StoreError, match="read-only"):
                second.remember(make_case("a"), provenance="a test")
    assert caplog.text.count("nothing will be remembered") == 1
    assert len(caplog.records) == 1


def test_the_users_memory_is_only_read_where_it_cannot_be_written(
    no_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEIQA_MEMORY", str(no_directory))
    with caplog.at_level(logging.WARNING), open_memory(None, DIGEST) as opened:
        assert opened.snapshot().count_anchors == 3
    assert "nothing will be remembered: cannot write" in caplog.text
    assert str(no_directory) in caplog.text


def test_a_named_memory_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named").mkdir()

    def refuse(*_: object) -> MemoryBank:
        raise StoreUnwritable("cannot write the lock", seen="Read-only file system")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StoreUnwritable, match=r"Read-only file system.*--no-learn"):
        open_memory(tmp_path / "named", DIGEST)


BASE_INSTALL = """
import sys
import numpy as np
absent = ("numba", "llvmlite", "hnswlib", "scipy")
for name in absent:
    sys.modules[name] = None
from meiqa import memory
from tests.memory.samples import make_case, build_anchors
path, indexed = sys.argv[1:]
anchors = memory.bank.embedded_assets() / "memory"
digest = memory.package_digest_of(anchors)
memory.create_memory(path, digest, 8, 6)
with memory.open_memory(path, digest, learn="all") as bank:
    snapshot = bank.snapshot()
    case = next(bank.cases("anchor"))
    width, token_width = len(next(snapshot.anchors.all_entries()).features.key), 256
    found = snapshot.retrieve(np.ones(width, np.float32), memory.RetrievalPolicy(), None)
    assert len(found) == 32
    memory.spatial_descriptor(found[0].tokens, found[0].grid)
    assert 1 <= snapshot.regression.score(memory.token_features(found[0].tokens)) <= 5
    learned = make_case("a", widths=(width, found[0].tokens.shape[1]))
    assert bank.remember(learned, provenance="a test", gated=False)
    assert bank.compact()
    assert bank.statistics().origins["contrast"].cases == 1
assert memory.verify_memory(path) == []

from meiqa.errors import UsageError
from meiqa.memory import index
with memory.MemoryBank.open(indexed, package_digest="ab12") as bank:
    try:
        bank.snapshot().retrieve(np.ones(8, np.float32), memory.RetrievalPolicy(), None)
    except UsageError as error:
        print(error)
index.FLAT_BELOW = 1
try:
    build_anchors(path + "-large", [make_case("a", "anchor")])
except UsageError as error:
    print(error)
with memory.open_memory(path, digest) as bank:
    bank.remember(make_case("b", widths=(width, found[0].tokens.shape[1])), provenance="a test")
    assert bank.compact()  # learned cases are searched without an index then
print(*sorted(name for name in absent if sys.modules.get(name) is not None))
"""


@pytest.mark.slow
def test_a_memory_of_a_thousand_anchors_takes_the_base_install_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an index is needed, it is said which extra brings it."""
    pytest.importorskip("hnswlib", reason="building an index takes the extra `index`")
    monkeypatch.setattr("meiqa.memory.index.FLAT_BELOW", 1)
    indexed = build_anchors(tmp_path / "indexed", make_cases(60, "anchor"))
    with python_child(BASE_INSTALL, tmp_path / "m", indexed) as child:
        output, errors = child.communicate(timeout=300)
    assert errors == ""
    search, build, loaded = output.splitlines()
    assert search.startswith("searching the index of a memory needs numba; pip install")
    assert build.startswith("indexing a memory needs hnswlib; pip install")
    assert "[index]" in search
    assert "[index]" in build
    assert loaded == ""
