"""`meiqa score` and `demo`, beyond what every command does."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meiqa import cli
from meiqa.cli import options
from meiqa.cli.options import Options
from meiqa.cli.score import demo_photos
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError, install_hint
from meiqa.formats import ResultWriter
from meiqa.testing import FakeEngine
from meiqa.types import Assessment, QualityWord

Grey = Callable[..., Path]
Output = pytest.CaptureFixture[str]
GRADES: dict[QualityWord, float] = {
    "bad": 0.0,
    "poor": 0.01,
    "fair": 0.2,
    "good": 0.6,
    "excellent": 0.19,
}
ASSESSED = Assessment("a.jpg", 4.0, 0.3, (3.4, 4.6), 3.9, "good", 80.0, None, grades=GRADES)


def test_the_engine_gets_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def open_package(*_: object, head: str | None, verify: bool) -> Any:
        asked.append((head, verify))
        raise UsageError("enough was seen")

    monkeypatch.setattr(EnginePackage, "open", open_package)
    assert cli.main(["score", "a.jpg", "--head", "grm"]) == 2
    assert cli.main(["score", "a.jpg", "--no-verify"]) == 2
    assert asked == [("grm", True), (None, False)]


def test_grades_stand_in_the_json_and_the_text() -> None:
    written = {}
    for format in ("json", "text"):
        stream = io.StringIO()
        with ResultWriter(format, stream) as writer:  # type: ignore[arg-type]
            writer.write(ASSESSED)
        written[format] = stream.getvalue()
    assert json.loads(written["json"])[0]["grades"] == {
        "bad": 0.0,
        "poor": 0.01,
        "fair": 0.2,
        "good": 0.6,
        "excellent": 0.19,
    }
    assert "the model's grade: fair 20 %, good 60 %, excellent 19 %" in written["text"]


def test_photos_are_clean_and_degraded_and_the_same_every_time() -> None:
    photos = {name: np.asarray(photo) for name, photo in demo_photos()}
    again = {name: np.asarray(photo) for name, photo in demo_photos()}
    assert len(photos) == 20
    assert "chelsea, clean" in photos
    for name, photo in photos.items():
        clean = photos[f"{name.split(',')[0]}, clean"]
        assert np.array_equal(photo, again[name])
        assert np.array_equal(photo, clean) == name.endswith("clean")


def test_demo_tells_of_each_photo(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("coffee, dark")
    assert "±" in lines[at + 1]
    assert lines[at + 2] == "  An even picture."
    assert lines[at + 3].startswith("  at 100 %: edges ")
    assert lines[at + 4 : at + 5] == [
        "  beats anchor 1.00 (1.00) 100 %, loses to anchor 3.00 (3.00) 100 % (3 compared)",
    ]
    assert lines[-1] == "20 photos, 0 reflections written"


def test_demo_leaves_the_users_memory_alone(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []

    def engine_of(options: Options, *, learn: bool) -> Any:
        assert learn
        assert Path(options.memory).is_dir()
        opened.append(options.memory)
        return engine

    monkeypatch.setattr(options, "engine_of", engine_of)
    assert cli.main(["demo"]) == 0
    assert not Path(opened[0]).exists()
    assert cli.main(["demo", "--memory", str(tmp_path)]) == 0
    assert opened[1] == str(tmp_path)


def test_without_scikit_image_the_command_to_install_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert cli.main(["demo"]) == 2
    assert install_hint("demo") in capsys.readouterr().err


class Piped:
    """Standard input that holds a photo."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_photo_is_read_from_standard_input(
    name: str, engine: FakeEngine, grey: Grey, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(grey("a.png", 255).read_bytes()))
    assert cli.main(["score", str(grey("b.png", 0)), name, "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["path"], row["score"]) for row in rows[1:]] == [(name, 5.0)]


def test_detail_is_given_unless_it_is_left_out(
    engine: FakeEngine, tmp_path: Path, capsys: Output
) -> None:
    photo = str(tmp_path / "photo.png")
    Image.fromarray(np.eye(200, dtype=np.uint8) * 255).save(photo)
    assert cli.main(["score", photo, "--format", "jsonl"]) == 0
    assert cli.main(["score", photo, "--format", "jsonl", "--no-detail"]) == 0
    given, without = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(given["detail"]) == {"sharpness", "motion", "noise", "place", "jpeg"}
    assert without["detail"] is None


def test_an_embedding_is_given_when_asked_for_and_in_json_only(
    engine: FakeEngine, grey: Grey, capsys: Output
) -> None:
    photo = str(grey("grey.png", 51))
    assert cli.main(["score", photo, "--format", "jsonl", "--embedding"]) == 0
    assert cli.main(["score", photo, "--format", "jsonl"]) == 0
    given, without = map(json.loads, capsys.readouterr().out.splitlines())
    assert given["embedding"] == {"digest": "ab" * 32, "values": [0.2, 0.2, 0.2]}
    assert without["embedding"] is None
    assert cli.main(["score", photo, "--embedding"]) == 2
    assert "--format text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["score", "-", "-"], "standard input holds one photo"),
        (["score", "-", "--reference", "/dev/stdin"], "standard input holds one photo"),
        (["compare", "-", "-"], "standard input holds one photo"),
        (["score", "-", "--format", "csv", "--output", "o.csv"], "standard input is none"),
    ],
)
def test_standard_input_is_read_once(
    command: list[str], said: str, engine: FakeEngine, capsys: Output
) -> None:
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err
    assert engine.calls == []


def test_a_closed_standard_input_is_an_empty_photo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meiqa", "score", "-", "--no-learn"]
    run = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("meiqa: error: - is empty")
    assert run.stderr.count("\n") == 1


def test_a_reference_is_handed_on(engine: FakeEngine, grey: Grey) -> None:
    photo, reference = str(grey("a.png")), str(grey("r.png"))
    assert cli.main(["score", photo, "--reference", reference]) == 0
    assert engine.calls[0].reference == reference


def test_a_map_is_drawn_over_nothing_but_a_map(
    engine: FakeEngine, grey: Grey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    class Seen:
        def over(self, height: int, width: int) -> Any:
            return np.full((height, width), 0.5)

    monkeypatch.setattr(engine, "patterns", lambda *_: Seen(), raising=False)
    photo, other, drawn = str(grey("a.png")), grey("b.png"), tmp_path / "map.png"
    before = other.read_bytes()
    for target in (other, Path(photo)):
        assert cli.main(["score", photo, "--map", str(target)]) == 2
    assert other.read_bytes() == before
    assert engine.calls == []
    for _ in range(2):  # a second time it replaces its own
        assert cli.main(["score", photo, "--map", str(drawn)]) == 0
        with Image.open(drawn) as opened:
            assert (opened.format, opened.size) == ("PNG", (8, 6))
    assert cli.main(["score", photo, "--map", str(other), "--force"]) == 0
    assert other.read_bytes() == drawn.read_bytes()
    assert cli.main(["score", str(drawn), "--map", str(drawn), "--force"]) == 2
    assert "is to be read" in capsys.readouterr().err
    assert cli.main(["score", "none.jpg", "--map", str(tmp_path / "none.png")]) == 1
    assert not (tmp_path / "none.png").exists()
