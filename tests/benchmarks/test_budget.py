"""The benchmark of budgets reports how late an engine is, and what it left out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import pytest

from meiqa.benchmarks.budget import bench_budget, table_text
from meiqa.benchmarks.photographs import made_jpeg, photographs_in
from meiqa.engine.images import load_pixels
from meiqa.engine.pipeline import Engine
from meiqa.errors import UsageError
from meiqa.types import Assessment, Budget, Neighbour


class Clockwork:
    """Takes 20 ms for each photo, whatever it is given, and the first time much longer."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> Clockwork:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def score(self, image: object, *, budget: Budget, learn: bool) -> Assessment:
        assert not learn
        time.sleep(0.2 if self.calls == 0 else 0.02)
        self.calls += 1
        asked = (Neighbour("a", "anchor", 3.0, 0.1, 0.5), Neighbour("b", "anchor", 2.0, 0.1, None))
        return Assessment(
            "x", 3.0, 0.2, (2.6, 3.4), 3.0, "fair", 50.0, None, asked, degraded=("no summary",)
        )


def opened() -> Engine:
    return cast(Engine, Clockwork())


def test_rows() -> None:
    result = bench_budget(opened, [5.0, 1000.0], photos=4)
    late, early = result["rows"]
    assert (late["budget_ms"], late["n"], late["k"]) == (5.0, 4, 1.0)
    assert late["late"] > 3
    assert early["late"] < 0.15  # the first, slow photo does not count
    assert late["p50_ms"] >= 20
    assert late["left_out"] == {"no summary": 4}
    assert not result["in_time"]
    assert json.loads(json.dumps(result)) == result
    assert "no summary (4)" in table_text(result)


def test_made_photographs_differ_and_are_the_same_in_every_run() -> None:
    one, other = photographs_in(None, 2)
    assert one == made_jpeg(0)
    assert one != other
    assert load_pixels(made_jpeg(3, (40, 60))).array.shape == (40, 60, 3)


def test_given_photographs_are_taken_by_name(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.JPG", "c.txt"):
        (tmp_path / name).write_bytes(made_jpeg(0, (20, 20)))
    given: list[Any] = list(photographs_in(tmp_path, 2))
    assert [path.name for path in given] == ["a.JPG", "b.jpg"]
    with pytest.raises(UsageError, match="too few"):
        list(photographs_in(tmp_path, 3))
