"""`meiqa rank` and `cull` print photos best first, and goes on after those that can't be judged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from meiqa import cli
from meiqa.testing import FakeEngine
from meiqa.types import Budget, CulledPhoto, Culling, Ranking

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
    assert f"{folder}/light.png   (4.76 alone, 1 compared)" in first
    assert second.endswith("1 compared)")
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


# Culling: the engine takes photos of one size for shots of one thing


@pytest.fixture
def shots(grey: Grey, tmp_path: Path) -> Path:
    for number, level in enumerate((200, 100)):
        grey(f"d/{number}.png", level)
    Image.new("L", (9, 9), 50).save(tmp_path / "d/2.png")
    (tmp_path / "d/broken.jpg").write_bytes(b"no photo")
    return tmp_path / "d"


def test_cull_marks_the_best(engine: FakeEngine, shots: Path, capsys: Output) -> None:
    assert cli.main(["cull", str(shots)]) == 1
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line[0] for line in lines] == ["*", " ", "*"]
    assert lines[1].endswith("(2 of 2, 2.57 alone, likeness 1.00)")
    assert lines[2].endswith("2.png")
    assert "broken.jpg" in output.err


def test_cull_in_json_and_csv(engine: FakeEngine, shots: Path, capsys: Output) -> None:
    assert cli.main(["cull", str(shots), "--format", "json", "--alike", "0.8"]) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [entry.get("group") for entry in entries] == [1, 1, 2, None]
    assert [entry.get("best") for entry in entries] == [True, False, True, None]
    assert [entry.get("kind") for entry in entries] == ["burst", "burst", None, None]
    assert [entry.get("kept") for entry in entries] == [True, False, True, None]
    assert [entry.get("too_close") for entry in entries] == [False, False, False, None]
    assert engine.culled["alike"] == 0.8
    assert cli.main(["cull", str(shots), "--format", "csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["place"] for row in rows] == ["1", "2", "1", ""]
    assert engine.culled["alike"] == 0.55


def test_cull_names_a_series_what_is_too_close_and_why(
    engine: FakeEngine,
    grey: Grey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    names = [str(grey(f"{n}.png", 40 * n)) for n in range(5)]
    series = tuple(
        CulledPhoto(n, name, 1.0 + n, 0.2, 1.0 + n, 0.9, kind="bracket")
        for n, name in enumerate(names[:3], 1)
    )
    shots = (
        CulledPhoto(1, names[3], 4.0, 0.2, 4.1, 1, None, "burst", True, "less motion"),
        CulledPhoto(2, names[4], 3.9, 0.2, 3.8, 0.97, None, "burst", True),
    )
    monkeypatch.setattr(engine, "cull", lambda *_, **__: Culling((series, shots)))
    page, out, bin_ = tmp_path / "p.html", tmp_path / "out", tmp_path / "bin"
    ways = ["--xmp", "--copy-to", out, "--move-rejects-to", bin_, "--list", tmp_path / "l.txt"]
    assert cli.main(["cull", *map(str, [*names, "--html", page, *ways])]) == 0
    assert [
        line[0] + line.partition("   ")[2] for line in capsys.readouterr().out.splitlines()
    ] == [
        "*(bracket, 1 of 3, 2.00 alone)",
        "*(bracket, 2 of 3, 3.00 alone)",
        "*(bracket, 3 of 3, 4.00 alone)",
        "*(1 of 2, 4.10 alone, too close to call: less motion)",
        " (2 of 2, 3.80 alone, likeness 0.97, too close to call)",
    ]
    html = page.read_text()
    assert "Group 1: bracket of 3 shots, kept whole" in html
    assert "Group 2: 2 shots<" in html
    assert "4.10 alone, too close to call: less motion" in html
    assert html.count(">kept</span>") == 3
    assert html.count(">best</span>") == 1
    assert sorted(path.name for path in out.glob("*.png")) == ["0.png", "1.png", "2.png", "3.png"]
    assert [path.name for path in bin_.glob("*.png")] == ["4.png"]
    assert (tmp_path / "l.txt").read_text().split() == names[:4]
    ratings = {Path(name).with_suffix(".xmp").read_text().count('Rating="4"') for name in names[:3]}
    assert ratings == {2}  # the stars of its best photo, twice in each sidecar


@pytest.mark.parametrize("alike", ["2", "0", "-0.5"])
def test_what_is_no_likeness_is_refused(alike: str, engine: FakeEngine, capsys: Output) -> None:
    assert cli.main(["cull", "a.jpg", "--alike", alike]) == 2
    assert "a number above 0 up to 1" in capsys.readouterr().err


def test_what_the_budget_left_out_is_told(
    engine: FakeEngine, grey: Grey, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(engine, "rank", lambda *_, **__: Ranking((), (), ("3 pairs",)))
    assert cli.main(["rank", str(grey("a.png"))]) == 0
    assert capsys.readouterr().err == "meiqa: note: 3 pairs\n"


# Pages


@pytest.mark.parametrize("command", ["rank", "cull"])
def test_a_page_beside_the_usual_output(
    command: str, engine: FakeEngine, shots: Path, tmp_path: Path, capsys: Output
) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):  # a second time it replaces its own
        assert cli.main([command, str(shots), "--html", str(page)]) == 1
        assert capsys.readouterr().out.count(".png") == 3
        assert page.read_text().count("<img ") == 3
    assert cli.main([command, str(shots), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "make it: mkdir" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["rank", "cull"])
def test_the_photo_that_the_shell_put_behind_html_is_not_overwritten(
    command: str, engine: FakeEngine, grey: Grey, capsys: Output
) -> None:
    """`meiqa rank --html *.jpg`."""
    first, second = grey("a.jpg", 9), grey("b.jpg", 99)
    before = first.read_bytes()
    assert cli.main([command, "--html", str(first), str(second)]) == 2
    assert "is no page that meiqa made; name another file" in capsys.readouterr().err
    assert cli.main([command, "--force", "--html", str(first), str(first), str(second)]) == 2
    assert "is to be read" in capsys.readouterr().err
    assert first.read_bytes() == before
    assert engine.calls == []


def test_a_page_to_standard_output_is_all_that_is_there(
    engine: FakeEngine, grey: Grey, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert cli.main(["rank", str(grey("a.png")), "--html", "-"]) == 0
    page = capsysbinary.readouterr().out
    assert page.startswith(b"<!DOCTYPE html>\n")
    assert page.endswith(b"</html>\n")
