"""`meiqa rank` prints photos best first, and goes on after those that can't be judged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meiqa import cli
from meiqa.types import Budget

Grey = Callable[..., Path]
Output = pytest.CaptureFixture[str]


@pytest.fixture
def folder(grey: Grey, tmp_path: Path) -> Path:
    grey("d/dark.png", 10)
    grey("d/light.png", 240)
    (tmp_path / "d/broken.jpg").write_bytes(b"no photo")
    return tmp_path / "d"


def test_text_is_best_first(engine: Any, folder: Path, capsys: Output) -> None:
    assert cli.main(["rank", str(folder)]) == 1
    output = capsys.readouterr()
    first, second = output.out.splitlines()
    assert first.split()[:4] == ["1", "4.76", "±", "0.20"]
    assert f"{folder}/light.png   (4.66 alone, 2 compared)" in first
    assert second.endswith("2 compared, 1 down)")
    assert "broken.jpg" in output.err
    assert output.err.splitlines()[-1] == "meiqa: 1 of 3 inputs could not be assessed"


def test_json_and_csv_hold_failures_behind_the_photos(
    engine: Any, folder: Path, capsys: Output
) -> None:
    assert cli.main(["rank", str(folder), "--format", "json"]) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [entry.get("rank") for entry in entries] == [1, 2, None]
    assert entries[2].keys() == {"path", "error", "hint"}
    assert cli.main(["rank", str(folder), "--format", "csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["path"]).name for row in rows] == ["light.png", "dark.png", "broken.jpg"]
    assert rows[2]["error"]
    assert not rows[2]["score"]


def test_a_photo_named_twice_is_ranked_once(engine: Any, folder: Path, capsys: Output) -> None:
    assert cli.main(["rank", str(folder), str(folder), "--format", "json"]) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [Path(entry["path"]).name for entry in entries] == [
        *("light.png", "dark.png", "broken.jpg")
    ]


def test_options_are_handed_on(engine: Any, grey: Grey, capsys: Output) -> None:
    photo = str(grey("a.png"))
    assert cli.main(["rank", photo, "--rivals", "6", "--k", "2", "--budget-ms", "90"]) == 0
    assert engine.ranked == {"budget": Budget(ms=90), "k": 2, "rivals": 6}


def test_an_empty_directory(engine: Any, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["rank", str(tmp_path / "empty")]) == 1
    assert "holds no photos" in capsys.readouterr().err
