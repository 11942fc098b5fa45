"""Damage is told, numbers are right, and other tools can read what is stored."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meiqa.errors import StoreNotFound, UsageError, install_hint
from meiqa.memory import MemoryBank, RetrievalPolicy, Segment, verify_memory, write_segment
from tests.memory.samples import DIGEST, KEY_WIDTH, build_anchors, make_case, make_cases


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Anchors, and contrast cases in a segment and beside it."""
    path = build_anchors(tmp_path_factory.mktemp("pristine") / "m", make_cases(7, "anchor"))
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        for case in make_cases(5, "contrast"):
            bank.remember(case, provenance="a test")
        bank.compact()
        for name in ("x", "y"):
            bank.remember(make_case(name), provenance="a test")
            bank.add_anchor(make_case(name, "anchor"), provenance="a test")
    return path


@pytest.fixture
def path(tmp_path: Path, pristine: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "m"))


def problems(path: Path) -> str:
    return "\n".join(f"{finding.file.name}: {finding.problem}" for finding in verify_memory(path))


def test_a_sound_memory_has_no_findings(path: Path) -> None:
    assert problems(path) == ""


def test_there_must_be_a_memory(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        verify_memory(tmp_path)


DATA = ["anchors.seg", "anchors.sqlite3", "contrast.seg", "contrast-1.sqlite3", "cases.sqlite3"]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(DATA))
def test_damage_is_found_and_never_crashes(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "m"
    shutil.copytree(pristine, path)
    content = bytearray((path / name).read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (path / name).write_bytes(content)
    found = verify_memory(path)
    if name.startswith(("anchors.sqlite3", "contrast-1")):
        assert found  # every byte counts
    for finding in found:
        assert "\n" not in finding.problem


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("by_score", np.arange(7, dtype=np.int32)[::-1] * 0, "not an order"),
        ("sorted_scores", np.arange(7.0)[::-1], "not sorted"),
        ("image_hashes", np.zeros(7, np.int64), "not found by its image"),
        ("digests", np.zeros((7, 8), np.uint8), "was altered"),
        ("offsets", np.full(8, 1000), "out of order"),
    ],
)
def test_what_does_not_fit_is_told(
    path: Path, name: str, value: np.ndarray[tuple[int], np.dtype[np.int64]], problem: str
) -> None:
    segment = Segment.open(path / "anchors.seg")
    write_segment(path / "anchors.seg", {**segment.arrays, name: value}, segment.attributes)
    assert problem in problems(path)


def test_orphans_are_told(path: Path) -> None:
    for name, statement in (
        ("cases.sqlite3", "DELETE FROM records WHERE id = 'x'"),
        (
            "cases.sqlite3",
            "DELETE FROM features WHERE revision = (SELECT max(revision) FROM records)",
        ),
        ("anchors.sqlite3", "DELETE FROM records WHERE revision = 3"),
    ):
        database = sqlite3.connect(path / name, isolation_level=None)
        database.execute(statement)
        database.close()
    told = problems(path)
    assert "vectors of revision" in told
    assert "has no vectors" in told
    assert "6 records for 7 rows" in told
    assert "no record 3" in told


def test_parts_of_two_packages_are_told(path: Path, tmp_path: Path) -> None:
    other = build_anchors(tmp_path / "other", digest="cd34")
    for name in ("anchors.seg", "anchors.sqlite3"):
        shutil.copy(other / name, path)
    assert "another engine package" in problems(path)


def test_statistics_count_and_weigh(path: Path) -> None:
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.remove(["anchor-0001"])
        bank.add_anchor(make_case("top", "anchor", score=5.0), provenance="a test")
        taken = bank.statistics()
        scores = [record.score for record in bank.cases("anchor")]
    anchors, contrast = taken.origins["anchor"], taken.origins["contrast"]
    assert (anchors.cases, anchors.recent, anchors.tombstones, anchors.version) == (9, 3, 1, 1)
    assert (contrast.cases, contrast.recent, contrast.version) == (7, 2, 1)
    assert anchors.segment_bytes == (path / "anchors.seg").stat().st_size
    assert taken.wal_bytes > 0
    assert sum(anchors.histogram) == 9
    assert anchors.histogram[-1] == sum(score >= 4.5 for score in scores)
    assert (anchors.index, anchors.recall) == ("flat", None)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_export_holds_every_record(path: Path, tmp_path: Path, kind: str) -> None:
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.snapshot().retrieve(np.ones(KEY_WIDTH, np.float32), RetrievalPolicy(), None)
        bank.remember(make_case("z"), provenance="writes the counters")
        out = tmp_path / "out"
        records = list(bank.cases())
        assert bank.export(out, kind) == len(records)  # type: ignore[arg-type]
    if kind == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'parquet'")
        rows = parquet.read_table(out).to_pylist()
    assert [(row["origin"], row["id"], row["score"]) for row in rows] == [
        (record.origin, record.id, record.score) for record in records
    ]
    assert all(len(row["key"]) == KEY_WIDTH and row["tokens"] == 4 for row in rows)
    retrieved = {row["id"]: row["retrieved"] for row in rows if row["origin"] == "contrast"}
    assert retrieved == {**{f"contrast-000{n}": 1 for n in range(5)}, "x": 1, "y": 1, "z": 0}


def test_an_export_names_the_extra_that_it_needs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with MemoryBank.open(path, "r", package_digest=DIGEST) as bank:
        with pytest.raises(UsageError, match=re.escape(install_hint("parquet"))):
            bank.export(tmp_path / "out", "parquet")
        with pytest.raises(UsageError, match="allowed: jsonl, parquet"):
            bank.export(tmp_path / "out", "csv")  # type: ignore[arg-type]
