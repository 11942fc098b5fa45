"""The command that interrupts a build runs, and would see a difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.interrupted_build import differences, main
from meiqa.errors import UsageError
from meiqa.memory import Segment, write_segment
from tests.engine.samples import picture
from tests.memory.samples import build_anchors, make_case, make_cases

PHOTOGRAPHS = 192


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = []
    for seed in range(PHOTOGRAPHS):
        Image.fromarray(picture(seed, (128, 192))).save(tmp_path / f"{seed}.png")
        rows.append(f"{seed}.png,{1 + seed / 16}")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["image,mos", *rows]) + "\n")
    return table


def test_an_interrupted_build_ends_the_same(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = [str(labels), "--images", str(tmp_path), "--interruptions", "2"]
    assert main([*command, "--work", str(work)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equal"]
    assert result["anchors"] == PHOTOGRAPHS
    assert [each["signal"] for each in result["interruptions"]] == ["SIGINT", "SIGKILL"]
    assert all(0 <= each["anchors_kept"] <= PHOTOGRAPHS for each in result["interruptions"])
    assert differences(work / "whole", work / "interrupted") == []
    assert sorted(path.name for path in work.iterdir()) == ["interrupted", "whole"]


def test_a_build_that_fails_is_told(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not built"):
        main([str(labels), "--images", str(tmp_path), "--package", str(tmp_path / "none")])


def test_every_difference_is_named(tmp_path: Path) -> None:
    cases = make_cases(5, "anchor")
    first = build_anchors(tmp_path / "first", cases)
    assert differences(first, build_anchors(tmp_path / "second", cases)) == []
    other = make_case(cases[2].id, "anchor", score=1.5)
    changed = differences(first, build_anchors(tmp_path / "third", [*cases[:2], other, *cases[3:]]))
    assert "record of row 2" in changed
    assert "array sorted_scores" in changed
    fewer = differences(first, build_anchors(tmp_path / "fourth", cases[:4]))
    assert {"record of row 4", "array keys", "attribute count"} <= {*fewer}


def test_damage_is_a_difference(tmp_path: Path) -> None:
    first = build_anchors(tmp_path / "first", make_cases(5, "anchor"))
    second = Path(shutil.copytree(first, tmp_path / "second"))
    segment = Segment.open(second / "anchors.seg")
    arrays: dict[str, Any] = {name: np.array(array) for name, array in segment.arrays.items()}
    arrays["levels"][0, 0] ^= 1
    write_segment(second / "anchors.seg", arrays, segment.attributes)
    found = differences(first, second)
    assert "array levels" in found
    assert any("was altered" in each for each in found)
