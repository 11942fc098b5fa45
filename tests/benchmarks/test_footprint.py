"""What a small device is asked for: held to bars, and laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import footprint


def judged(monkeypatch: pytest.MonkeyPatch, *, ratio: float) -> dict[str, Any]:
    """Measure a made installation of a tenth of a megabyte, and a process that scored nothing."""

    def install(wheel: Path, wheels: Path, target: Path, *extras: str) -> None:
        target.mkdir()
        (target / "module.py").write_bytes(bytes(100_000 * (1 + len(extras))))

    def score(installed: Path, place: Path, name: str, size: tuple[int, int]) -> dict[str, Any]:
        held = ("mb", "opened_mb", "afterwards_mb", "of_files_mb")
        return {"what": name, **dict.fromkeys(held, size[0] / 10)}

    monkeypatch.setattr(footprint, "_installed", install)
    monkeypatch.setattr(footprint, "_resident_row", score)
    monkeypatch.setattr(footprint, "bench_cold", lambda runs: {"ratio": ratio, "rows": {}})
    return footprint.bench_footprint(Path("meiqa.whl"), runs=1)


def test_every_bar_is_seen_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    result = judged(monkeypatch, ratio=2.6)
    assert {name: bar["seen"] for name, bar in result["bars"].items()} == {
        "installed_mb": 0.1,
        "resident_mb": 108.0,
        "cold_ratio": 2.6,
    }
    assert [bar["met"] for bar in result["bars"].values()] == [True, True, False]
    assert [row["mb"] for row in result["installed"]] == [0.1, 0.2]
    assert json.loads(json.dumps(result)) == result


def test_what_is_missed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = footprint.footprint_text(judged(monkeypatch, ratio=2.6)).splitlines()
    assert lines[-1].split() == ["cold_ratio", "2.5", "2.60", "missed"]
    assert lines[-2].split() == ["resident_mb", "250.0", "108.00", "met"]
