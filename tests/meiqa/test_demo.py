from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa import cli
from meiqa.commands import options
from meiqa.demo import demo_photos


def test_photos_are_clean_and_degraded_and_the_same_every_time() -> None:
    photos = {name: np.asarray(photo) for name, photo in demo_photos()}
    again = {name: np.asarray(photo) for name, photo in demo_photos()}
    assert len(photos) == 20
    assert "chelsea, clean" in photos
    for name, photo in photos.items():
        clean = photos[f"{name.split(',')[0]}, clean"]
        assert np.array_equal(photo, again[name])
        assert np.array_equal(photo, clean) == name.endswith("clean")


def test_demo_shows_a_row_for_each_photo(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    (row,) = [index for index, line in enumerate(lines) if line.startswith("coffee, dark")]
    assert "±" in lines[row]
    assert "An even picture." in lines[row + 1]
    assert "beats grey1 (1.00) 100 %" in lines[row + 2]
    assert lines[-1].startswith("20 photos, ")


def test_demo_leaves_the_users_memory_alone(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []

    def open_engine(package: str | None, memory: str, **_: object) -> Any:
        assert Path(memory).is_dir()
        opened.append(memory)
        return engine

    monkeypatch.setattr(options, "open_engine", open_engine)
    assert cli.main(["demo"]) == 0
    assert not Path(opened[0]).exists()
    assert cli.main(["demo", "--memory", str(tmp_path)]) == 0
    assert opened[1] == str(tmp_path)


def test_without_scikit_image_the_command_to_install_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert cli.main(["demo"]) == 2
    assert "pip install scikit-image" in capsys.readouterr().err
