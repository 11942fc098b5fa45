"""The whole way of a model of one's own: its steps, what is not repeated, what a failure says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import own_model
from benchmarks.own_model import main, run, write_anchors
from meiqa.errors import MeiqaError
from meiqa.labels import LabelTable

TABLE = LabelTable(tuple(f"{n}.jpg" for n in range(40)), tuple(n / 40 for n in range(40)), (0, 1))


def test_the_photograph_that_is_scored_is_no_anchor(tmp_path: Path) -> None:
    other = write_anchors(TABLE, 12, tmp_path / "anchors.csv")
    made = LabelTable.read(tmp_path / "anchors.csv", mos_range=(1, 5))
    assert len(made) == 12
    assert other in TABLE.files
    assert other not in made.files
    exact = dict(zip(TABLE.files, TABLE.scores_1_to_5(), strict=True))
    assert made.scores == tuple(exact[file] for file in made.files)


def test_a_step_is_weighed_and_a_failure_says_what_failed(tmp_path: Path) -> None:
    row = run("doctor", ["--version"], tmp_path)
    assert row["wall_s"] > 0
    assert row["peak_mb"] > 5
    with pytest.raises(MeiqaError, match=r"`meiqa inspect nowhere` failed; got .*nowhere"):
        run("inspect", ["inspect", "nowhere"], tmp_path)


def test_finished_steps_are_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mos.csv").write_text("file,mos\na.jpg,0.1\nb.jpg,0.5\nc.jpg,0.9\n")
    used: dict[str, Any] = {"wall_s": 90.0, "cpu_s": 120.0, "peak_mb": 1234}
    names = ("export", "inspect", "memory", "calibrate", "score")
    ran: list[str] = []

    def noted(name: str, arguments: Sequence[str], work: Path) -> dict[str, Any]:
        ran.append(name)
        command = f"meiqa {shlex.join(arguments)}"
        return {"step": name, "command": command, **used, "disk_mb": {"package": 600.0}}

    monkeypatch.setattr(own_model, "run", noted)
    way = [str(tmp_path / "mos.csv"), "--images", "x", "--work", str(tmp_path)]
    for checkpoint in ("nowhere", "nowhere", "elsewhere"):
        main([checkpoint, *way])
        assert "| memory | 1.5 | 2.0 | 1,234 | package 600 |" in capsys.readouterr().out
    assert ran == [*names, *names]
