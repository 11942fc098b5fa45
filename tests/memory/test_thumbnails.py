"""Thumbnails are kept if asked for, through compactions, and go with their anchors."""

from __future__ import annotations

import base64
import json
import sqlite3
from pathlib import Path

import pytest

from meiqa.errors import StoreCorrupted, StoreMismatch, UsageError
from meiqa.memory import AnchorWriter, MemoryBank, verify_memory
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    TOKEN_WIDTH,
    build_anchors,
    make_case,
    make_cases,
)


def jpeg(name: str) -> bytes:
    return b"\xff\xd8 not really, of " + name.encode() + b"\xff\xd9"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a memory of three anchors with thumbnails."""
    options = {"keep_thumbnails": True}
    with AnchorWriter(tmp_path / "m", DIGEST, KEY_WIDTH, TOKEN_WIDTH, **options) as writer:  # type: ignore[arg-type]
        for case in make_cases(3, "anchor"):
            writer.add(case, thumbnail=jpeg(case.id))
        writer.finish()
    return tmp_path / "m"


def exported(path: Path, out: Path) -> dict[str, bytes | None]:
    with MemoryBank.open(path, package_digest=DIGEST) as bank:
        bank.export(out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {
        row["id"]: None if row["thumbnail"] is None else base64.b64decode(row["thumbnail"])
        for row in rows
    }


def test_they_live_and_go_with_their_anchors(path: Path, tmp_path: Path) -> None:
    expected: dict[str, bytes | None] = {
        name: jpeg(name) for name in ("anchor-0000", "anchor-0001", "anchor-0002")
    }
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.add_anchor(make_case("with", "anchor"), provenance="a", thumbnail=jpeg("with"))
        bank.add_anchor(make_case("without", "anchor"), provenance="a")
        bank.remember(make_case("learnt"), provenance="a test")
        bank.remove(["anchor-0001"])
        expected |= {"with": jpeg("with"), "without": None, "learnt": None}
        del expected["anchor-0001"]
        sizes = {name: len(kept) for name, kept in expected.items() if kept}
        for _ in range(2):
            assert bank.snapshot().anchors.thumbnail_bytes() == sizes
            assert bank.statistics().origins["anchor"].thumbnails == 3
            assert exported(path, tmp_path / "cases.jsonl") == expected
            bank.compact()
        bank.rekey("image", tmp_path / "rekeyed")
    assert exported(tmp_path / "rekeyed", tmp_path / "cases.jsonl") == expected
    assert verify_memory(path) == verify_memory(tmp_path / "rekeyed") == []
    left = b"".join(file.read_bytes() for file in path.iterdir())
    assert jpeg("anchor-0000") in left
    assert jpeg("anchor-0001") not in left


def test_a_memory_without_any_has_no_room_for_them(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.add_anchor(make_case("added", "anchor"), provenance="a test")
        assert bank.snapshot().anchors.thumbnail_bytes() == {}
        bank.compact()
    for database in path.glob("*.sqlite3"):
        connection = sqlite3.connect(database)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        connection.close()
        assert "records" in tables
        assert "thumbnails" not in tables


def test_an_interrupted_build_keeps_to_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "m"
    AnchorWriter(path, DIGEST, KEY_WIDTH, TOKEN_WIDTH, keep_thumbnails=True, resume=True).suspend()
    with pytest.raises(StoreMismatch, match=r"got yes; allowed: no.*begin again: rm -r"):
        AnchorWriter(path, DIGEST, KEY_WIDTH, TOKEN_WIDTH, resume=True)
    with AnchorWriter(
        path, DIGEST, KEY_WIDTH, TOKEN_WIDTH, keep_thumbnails=True, resume=True
    ) as writer:
        with pytest.raises(UsageError, match="all anchors have a thumbnail"):
            writer.add(make_case("a", "anchor"))
        writer.add(make_case("a", "anchor"), thumbnail=jpeg("a"))
        writer.finish()
    with MemoryBank.open(path, package_digest=DIGEST) as bank:
        assert bank.snapshot().anchors.thumbnail_bytes() == {"a": len(jpeg("a"))}


def test_an_altered_one_is_found(path: Path) -> None:
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.add_anchor(make_case("added", "anchor"), provenance="a", thumbnail=jpeg("added"))
    connection = sqlite3.connect(path / "cases.sqlite3")
    connection.execute("UPDATE thumbnails SET jpeg = ?", (jpeg("another"),))
    connection.commit()
    connection.close()
    with pytest.raises(StoreCorrupted, match=r"thumbnail of revision \d+ was altered"):
        MemoryBank.open(path, package_digest=DIGEST)
    assert any("thumbnail" in finding.problem for finding in verify_memory(path))
