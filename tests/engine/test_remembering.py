"""Which memory is opened, and what happens where it cannot be written."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from meiqa.engine import remembering
from meiqa.engine.remembering import open_memory
from meiqa.errors import StoreNotFound, StoreUnwritable
from meiqa.memory import MemoryBank
from tests.memory.samples import DIGEST, build_anchors, make_case, make_cases


@pytest.fixture(autouse=True)
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put three anchors where the embedded ones are looked for."""
    monkeypatch.setattr(remembering, "embedded_assets", lambda: tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    return build_anchors(tmp_path / "assets" / "memory", make_cases(3, "anchor"))


@pytest.fixture
def no_directory(tmp_path: Path) -> Path:
    """Give a path at which no directory can be made, whoever asks."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "memory"


def opened(path: Path | None, *, learn: bool) -> MemoryBank:
    return open_memory(path, DIGEST, learn=learn)


@pytest.mark.parametrize("name", ["mistyped", "file"])
def test_a_memory_to_read_must_be_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreNotFound) as refusal:
        opened(tmp_path / name, learn=False)
    assert str(tmp_path / name) in str(refusal.value)
    assert not (tmp_path / "mistyped").exists()


def test_a_memory_to_learn_into_is_created(tmp_path: Path) -> None:
    with opened(tmp_path / "new", learn=True) as bank:
        bank.remember(make_case("a"), provenance="a test")
    with opened(tmp_path / "new", learn=False) as bank:
        snapshot = bank.snapshot()
    assert (snapshot.count_anchors, snapshot.count_contrast) == (3, 1)


def test_anchors_of_its_own_replace_the_embedded_ones(tmp_path: Path) -> None:
    own = build_anchors(tmp_path / "own", make_cases(7, "anchor"))
    with opened(own, learn=False) as bank:
        assert bank.snapshot().count_anchors == 7


def test_the_users_memory_is_apart_for_each_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEIQA_MEMORY", str(tmp_path / "user"))
    opened(None, learn=False).close()
    assert not (tmp_path / "user").exists()
    opened(None, learn=True).close()
    assert [path.name for path in (tmp_path / "user").iterdir()] == [DIGEST[:16]]


def test_the_users_memory_is_only_read_where_it_cannot_be_written(
    no_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEIQA_MEMORY", str(no_directory))
    with caplog.at_level(logging.WARNING), opened(None, learn=True) as bank:
        assert bank.snapshot().count_anchors == 3
    assert "nothing will be remembered: cannot write" in caplog.text
    assert str(no_directory) in caplog.text


def test_a_named_memory_that_cannot_be_written_is_refused(no_directory: Path) -> None:
    with pytest.raises(StoreUnwritable, match="--no-learn") as refusal:
        opened(no_directory, learn=True)
    assert str(no_directory) in str(refusal.value)
