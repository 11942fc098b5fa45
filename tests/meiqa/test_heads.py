"""The score head on the command line, and grades in what is printed."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from meiqa import cli
from meiqa.commands import options
from meiqa.errors import UsageError
from meiqa.formats import result_writer
from meiqa.types import Assessment, grades_by_word

GRADES = grades_by_word([0.0, 0.01, 0.2, 0.6, 0.19])
ASSESSED = Assessment("a.jpg", 4.0, 0.3, (3.4, 4.6), 3.9, "good", 80.0, None, grades=GRADES)


@pytest.mark.parametrize("command", [["score", "a.jpg"], ["eval", "t.csv", "--images", "."]])
def test_heads_that_do_not_exist_are_refused(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--head", "softmax"]) == 2
    assert "'text', 'levels', 'grm'" in capsys.readouterr().err


def test_the_engine_gets_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def open_engine(*_: object, **given: Any) -> Any:
        asked.append(given.get("head"))
        raise UsageError("enough was seen")

    monkeypatch.setattr(options, "open_engine", open_engine)
    assert cli.main(["score", "a.jpg", "--head", "grm"]) == 2
    assert cli.main(["score", "a.jpg"]) == 2
    assert asked == ["grm", None]


def test_grades_stand_in_the_json_and_the_text() -> None:
    written = {}
    for format in ("json", "text"):
        stream = io.StringIO()
        with result_writer(format, stream) as writer:  # type: ignore[arg-type]
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
