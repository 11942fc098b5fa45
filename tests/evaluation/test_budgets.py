"""Agreement under time limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from meiqa.evaluation.accuracy import budgets_text, sweep_budgets
from meiqa.labels import LabelTable
from tests.engine.samples import PHOTOS, K, calibrated_copy


def test_budgets(package: EnginePackage, anchors: Path, tmp_path: Path) -> None:
    scores = (1.5, 2.0, 4.5, 3.0, 2.5)
    for at, pixels in enumerate(PHOTOS[: len(scores)]):
        Image.fromarray(pixels).save(tmp_path / f"{at}.png")
    table = LabelTable(tuple(f"{at}.png" for at in range(len(scores))), scores, (1.0, 5.0))
    few = calibrated_copy(package, tmp_path / "package", neighbours=K)
    with Engine.open(few, anchors, threads=1, learn=False) as engine:
        report = sweep_budgets(engine, table, tmp_path, [0.01, 1e6])
    unbounded, none, plenty = report["rows"]
    assert [row["budget_ms"] for row in report["rows"]] == [None, 0.01, 1e6]
    assert (unbounded["neighbours"], none["neighbours"], plenty["neighbours"]) == (K, 0, K)
    assert (unbounded["written"], none["written"], plenty["written"]) == (1, 0, 1)
    assert plenty["srcc"] == pytest.approx(unbounded["srcc"])
    assert (none["late"], plenty["late"], unbounded["late"]) == (1, 0, None)
    assert unbounded["p50_ms"] <= unbounded["p95_ms"] <= unbounded["p99_ms"]
    assert budgets_text(report).splitlines()[3].startswith("none")
