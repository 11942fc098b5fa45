"""What somebody decides about photos outlives a kill, and can be taken back."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meiqa.decisions import Decisions
from meiqa.errors import DecodeError, OutputUnwritable, UsageError
from meiqa.types import CulledPhoto, Culling, Failure

SHOT = CulledPhoto(1, "a\udcff.jpg", 3.123456, 0.2, 3.0, 1.0, "A \u2028 line.", kind="burst")
FOUND = Culling(
    ((SHOT, replace(SHOT, place=2, path="b.jpg", too_close=True)),),
    (Failure("c.jpg", DecodeError("c.jpg is empty", hint="fetch it again")),),
    ("3 pairs",),
)


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from meiqa.decisions import Decisions\n"
        "decisions = Decisions(sys.argv[1])\n"
        "decisions.give({'a': 4, 'b': -1}); decisions.give({'b': 2}); decisions.undo({'b'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    file = tmp_path / "d.jsonl"
    killed = subprocess.run([sys.executable, "-c", program, file], check=False)
    assert killed.returncode == -signal.SIGKILL
    with Decisions(file) as decisions:
        assert decisions.ratings == {"a": 4, "b": -1}
        assert decisions.undo({"a", "b"}) == {"a", "b"}  # what was decided before the kill, too
        assert decisions.ratings == {}
        assert decisions.undo({"a", "b"}) == set()


def test_decisions_about_photos_that_are_not_shown_stay(tmp_path: Path) -> None:
    with Decisions(tmp_path / "d.jsonl") as decisions:
        decisions.give({"a": 1, "b": 1})
        decisions.give({"a": 2, "c": 2})
        decisions.give({"c": 3})
        assert decisions.undo({"a", "b"}) == {"a"}
        assert decisions.ratings == {"a": 1, "b": 1, "c": 3}
        assert decisions.undo({"c"}) == {"c"}
    with Decisions(tmp_path / "d.jsonl") as decisions:
        assert decisions.ratings == {"a": 1, "b": 1, "c": 2}
        assert decisions.undo({"x"}) == set()
        assert decisions.undo({"a", "c"}) == {"c"}
        assert decisions.undo({"a", "c"}) == {"a"}
        assert decisions.ratings == {"b": 1}


def test_a_decision_is_about_a_photo_not_about_its_name(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"a photo")
    with Decisions(tmp_path / "d.jsonl") as decisions:
        decisions.give({str(photo): 4})
    photo.rename(tmp_path / "elsewhere")
    with Decisions(tmp_path / "d.jsonl") as decisions:
        assert decisions.ratings == {}
    (tmp_path / "elsewhere").rename(photo)
    with Decisions(tmp_path / "d.jsonl") as decisions:
        assert decisions.ratings == {str(photo): 4}
    photo.write_bytes(b"another photo")
    with Decisions(tmp_path / "d.jsonl") as decisions:
        assert decisions.ratings == {}
        decisions.give({str(photo): 2})
        assert decisions.undo({str(photo)}) == {str(photo)}
        assert decisions.ratings == {}


def test_what_a_power_cut_left_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    with Decisions(file) as decisions:
        decisions.give({"a": 5})
        whole = file.read_bytes()
        decisions.give({"a": 1})
    for cut in range(len(whole)):
        (tmp_path / "first.jsonl").write_bytes(whole[:cut])
        with Decisions(tmp_path / "first.jsonl") as decisions:
            assert decisions.ratings == {}
    for cut in range(len(whole), len(file.read_bytes())):
        file.write_bytes(file.read_bytes()[:cut] if cut > len(whole) else whole)
        with Decisions(file) as decisions:
            assert decisions.ratings == {"a": 5}
            decisions.give({"b": 0})
        with Decisions(file) as decisions:
            assert decisions.ratings == {"a": 5, "b": 0}
            decisions.give({"a": 1})


def test_photos_are_not_judged_twice(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"a photo")
    photos = [str(photo), "c.jpg"]
    with Decisions(tmp_path / "d.jsonl") as decisions:
        assert decisions.found(photos, {"k": 1}) is None
        decisions.remember(FOUND, photos, {"k": 1})
    with Decisions(tmp_path / "d.jsonl") as decisions:
        found = decisions.found(photos, {"k": 1})
        assert found is not None
        assert found.groups == FOUND.groups
        assert found.to_dict() == FOUND.to_dict()
        assert decisions.found(photos, {"k": 2}) is None
        assert decisions.found(photos[:1], {"k": 1}) is None
        photo.write_bytes(b"another photo")
        assert decisions.found(photos, {"k": 1}) is None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Decisions(tmp_path / "d.jsonl"), pytest.raises(UsageError, match="another process"):
        Decisions(tmp_path / "d.jsonl")


def test_what_is_no_file_of_decisions_is_left_alone(tmp_path: Path) -> None:
    others = "words\n", "words", '{"a": 1}', '{"meiqa_review": 2}\n', "[]\n", '{"undo": []}\n'
    for text in others:
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(UsageError, match="something else than decisions"):
            Decisions(tmp_path / "d.jsonl")
        assert (tmp_path / "d.jsonl").read_text() == text
    with pytest.raises(OutputUnwritable, match="--journal FILE"):
        Decisions(tmp_path / "missing/d.jsonl")
