"""The benchmark of drafting compares like with like, and finds the photographs given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.drafting import bench_drafting, drafting_text
from meiqa.engine.package import EnginePackage
from meiqa.errors import ImageError
from tests.engine.samples import PHOTOS


def test_both_ways_describe_every_photograph(
    package: EnginePackage, anchors: Path, tmp_path: Path
) -> None:
    for number, photo in enumerate(PHOTOS[:2]):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no photograph")
    result = bench_drafting(tmp_path, package=package.path, memory=anchors, threads=1, rounds=2)
    assert json.loads(json.dumps(result)) == result
    assert result["identical"]
    plain, drafted = result["plain"], result["drafted"]
    assert plain["n"] == drafted["n"] == 4
    assert (plain["accepted_per_call"], plain["drafted_per_call"]) == (0, 0)
    assert drafted["calls"] <= plain["calls"]
    assert drafted["tokens"] == plain["tokens"]
    assert result["ratio"] == pytest.approx(plain["p50_ms"] / drafted["p50_ms"], abs=0.01)
    assert result["rows_ms"].keys() == {"1", "2", "4", "8"}
    assert "texts identical" in drafting_text(result)


def test_a_folder_without_photographs(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no photos"):
        bench_drafting(tmp_path)
