"""The benchmark of the indexes runs, and says what it claims to say."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import memory
from benchmarks.memory import bench_memory, main
from benchmarks.processes import asked_afresh
from benchmarks.vectors import clustered_vectors
from meiqa.memory.index import RECALL

COLUMNS = {"n", "index", "recall", "p50_ms", "p99_ms", "open_ms", "resident_mb"}


def asked_here(module: str, *arguments: object) -> dict[str, Any]:
    """Ask in this process, which takes no time to start; tests/benchmarks/test_opening.py does."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        importlib.import_module(module).main([*map(str, arguments)])
    return json.loads(printed.getvalue())


def no_memories(sizes: Sequence[int], *_: object, **__: object) -> dict[str, Any]:
    """Stand in for `bench_opening`, which is tested by itself."""
    columns = ("files_mb", "open_ms", "verified_ms", "resident_share", "retrieve_p50_ms")
    return {"rows": [{"n": size, **dict.fromkeys(columns, 1.5)} for size in sizes]}


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "asked_afresh", asked_here)
        patch.setattr(memory, "bench_opening", no_memories)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def small(saved: Path) -> dict[str, object]:
    return bench_memory([300, 2000], *(32, 10, 60), crossover_sizes=[100, 400], directory=saved)


def test_there_is_a_row_for_every_size_and_index(small: dict[str, list[dict[str, float]]]) -> None:
    rows = small["rows"]
    present = [kind.name for kind in memory.KINDS if kind.name not in small["absent"]]
    assert {"flat", "frozen", "hnswlib"} <= {*present}
    assert [(row["n"], row["index"]) for row in rows] == [
        (size, name) for size in (300, 2000) for name in present
    ]
    for row in rows:
        assert row.keys() >= COLUMNS
        assert row["recall"] >= 0.97
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["open_ms"] > 0
        assert row["file_mb"] > 0
    assert json.loads(json.dumps(small)) == small


def test_the_frozen_index_knows_the_effort_that_it_needs(
    small: dict[str, list[dict[str, float]]],
) -> None:
    assert [row["n"] for row in small["measured"]] == [300, 2000]
    for row in small["measured"]:
        assert row["effort"] >= 32
        assert row["recall"] >= RECALL


def test_each_index_is_opened_in_a_process_of_its_own(saved: Path, small: object) -> None:
    path = saved / "300x32-0.frozen"
    opened = asked_afresh("benchmarks.memory", "--open", "frozen", path, 32)
    assert opened["open_ms"] > 0
    assert opened["resident_mb"] < 1


def test_the_vectors_are_the_same_for_any_number_of_queries() -> None:
    first, few = clustered_vectors(200, 16, 3, seed=1)
    second, many = clustered_vectors(200, 16, 30, seed=1)
    np.testing.assert_array_equal(first, second)
    for vectors in (first, few, many):
        np.testing.assert_allclose(np.linalg.norm(vectors.astype(float), axis=1), 1, atol=1e-3)


def test_saved_indexes_are_used_again(
    small: dict[str, list[dict[str, float]]], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(keys: np.ndarray, path: Path) -> None:
        raise AssertionError(f"{path} was built again")

    kinds = tuple(memory.Kind(k.name, k.package, fail, k.open, k.approximate) for k in memory.KINDS)
    monkeypatch.setattr(memory, "KINDS", kinds)
    again = bench_memory(
        [300], 32, 10, 60, crossover_sizes=[], indexes=["hnswlib"], directory=saved
    )
    recalls = [row["recall"] for row in small["rows"] if row["index"] == "hnswlib"]
    assert [row["recall"] for row in again["rows"]] == recalls[:1]


def test_libraries_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = memory.Kind("rival", "no-such-rival", memory._save_flat, memory._open_flat)
    monkeypatch.setattr(memory, "KINDS", (memory.KINDS[0], absent))
    result = bench_memory([50], 8, 3, 4, crossover_sizes=[], directory=tmp_path)
    assert result["absent"] == ["rival"]
    assert [row["index"] for row in result["rows"]] == ["flat"]


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CROSSOVER_SIZES", ())
    monkeypatch.setattr(memory, "_ROUNDS", 1)
    arguments = ["--sizes", "50", "--queries", "4", "--directory", str(tmp_path)]
    arguments += ["--indexes", "flat", "frozen"]
    main(arguments)
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[:4] == ["n", "index", "recall", "p50_ms"]
    assert "frozen" in table
    assert table.splitlines()[4].split()[:3] == ["n", "files_mb", "open_ms"]
    main([*arguments, "--format", "json"])
    assert {row["n"] for row in json.loads(capsys.readouterr().out)["rows"]} == {50}
