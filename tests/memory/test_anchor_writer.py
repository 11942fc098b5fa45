"""An interrupted build goes on where it stopped, and ends the same."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa.errors import StoreError, StoreLocked, StoreMismatch, UsageError
from meiqa.memory import AnchorWriter, MemoryBank, RetrievalPolicy, Segment, verify_memory
from tests.memory.naive_retrieval import naive_retrieve
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    TOKEN_WIDTH,
    build_anchors,
    make_case,
    make_cases,
    python_child,
)

BUILDER = """
import os, signal, sys
from meiqa.memory import AnchorWriter
from tests.memory.samples import make_cases
path, stop_at = sys.argv[1], int(sys.argv[2])
with AnchorWriter(path, "ab12", 8, 6, resume=True) as writer:
    for number, case in enumerate(make_cases(300, "anchor")):
        if case.id in writer.known_ids:
            continue
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        writer.add(case, provenance="a laboratory")
    writer.finish()
"""


def writer_of(path: Path, **options: Any) -> AnchorWriter:
    return AnchorWriter(path, DIGEST, KEY_WIDTH, TOKEN_WIDTH, **options)


def contents(path: Path) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Arrays, and records without the moments of storing."""
    arrays = Segment.open(path / "anchors.seg").arrays
    connection = sqlite3.connect(path / "anchors.sqlite3")
    records = connection.execute("SELECT * FROM records ORDER BY revision").fetchall()
    connection.close()
    return {name: array.tolist() for name, array in arrays.items()}, [row[:-1] for row in records]


@pytest.mark.slow
def test_a_build_killed_twice_ends_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for stop_at in (100, 250):
        with python_child(BUILDER, path, stop_at) as builder:
            _, errors = builder.communicate(timeout=60)
        assert (builder.returncode, errors) == (-9, "")
        assert not path.exists()
    with writer_of(path, resume=True) as writer:
        assert {case.id for case in make_cases(192, "anchor")} <= writer.known_ids
    with python_child(BUILDER, path, -1) as builder:
        _, errors = builder.communicate(timeout=60)
    assert (builder.returncode, errors) == (0, "")
    whole = build_anchors(tmp_path / "whole", make_cases(300, "anchor"))
    assert contents(path) == contents(whole)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_an_interruption_keeps_every_anchor(tmp_path: Path) -> None:
    path = tmp_path / "m"
    cases = make_cases(5, "anchor")
    with writer_of(path, resume=True) as writer:
        for case in cases[:3]:
            writer.add(case)
    with writer_of(path, resume=True) as writer:
        assert writer.known_ids == {case.id for case in cases[:3]}
        with pytest.raises(UsageError, match="one id"):
            writer.add(cases[0])
        for case in cases[3:]:
            writer.add(case)
        writer.finish()
    with MemoryBank.open(path, package_digest=DIGEST) as bank:
        assert [record.id for record in bank.cases()] == [case.id for case in cases]


def test_the_order_of_adding_does_not_matter(tmp_path: Path) -> None:
    cases = make_cases(37, "anchor")
    forward = build_anchors(tmp_path / "f", cases)
    backward = build_anchors(tmp_path / "b", cases[::-1])
    assert contents(forward) == contents(backward)


def test_two_writers_do_not_resume_one_build(tmp_path: Path) -> None:
    with writer_of(tmp_path / "m", resume=True), pytest.raises(StoreLocked, match="process"):
        writer_of(tmp_path / "m", resume=True)


def test_a_build_for_another_package_is_not_resumed(tmp_path: Path) -> None:
    with writer_of(tmp_path / "m", resume=True) as writer:
        writer.add(make_case("a", "anchor"))
    with pytest.raises(StoreMismatch, match="begin again: rm -r"):
        AnchorWriter(tmp_path / "m", "cd34", KEY_WIDTH, TOKEN_WIDTH, resume=True)
    with writer_of(tmp_path / "m", resume=True) as writer:
        assert writer.known_ids == {"a"}


def test_a_finished_writer_says_so(tmp_path: Path) -> None:
    with writer_of(tmp_path / "m") as writer:
        writer.finish()
        with pytest.raises(StoreError, match="is closed"):
            writer.add(make_case("a", "anchor"))
    with pytest.raises(StoreError, match="already exists"):
        writer_of(tmp_path / "m", resume=True)


@pytest.mark.slow
def test_many_anchors_are_searched_by_an_index(tmp_path: Path) -> None:
    """Above the crossover the segment holds an index, which filters and finds as flat search."""
    random = np.random.default_rng(7)
    keys = random.standard_normal((5000, KEY_WIDTH), np.float32)
    cases = [
        make_case(f"{number:05d}", "anchor", key=key, tokens=0) for number, key in enumerate(keys)
    ]
    path = build_anchors(tmp_path / "m", cases)
    assert "index_links" in Segment.open(path / "anchors.seg").arrays
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        assert bank.statistics().origins["anchor"].index == "frozen"
        recall = bank.statistics().origins["anchor"].recall
        assert recall is not None
        assert recall > 0.97
        bank.add_anchor(make_case("new", "anchor", key=keys[17], tokens=0), provenance="a test")
        bank.remove(["00017"])
        anchors = [*(case for case in cases if case.id != "00017"), make_case("new", "anchor")]
        object.__setattr__(anchors[-1], "key", keys[17])
        for policy in (
            RetrievalPolicy(k=32, effort=2000),
            RetrievalPolicy(k=32, effort=2000, bins=1),
        ):
            found = bank.snapshot().retrieve(keys[17], policy, "image of 00100")
            expected = naive_retrieve(anchors, [], keys[17], policy, "image of 00100")
            assert [case.id for case in found] == expected
        bank.compact()
        found = bank.snapshot().retrieve(keys[17], RetrievalPolicy(k=1, effort=2000), None)
        assert [case.id for case in found] == ["new"]
    assert verify_memory(path) == []
