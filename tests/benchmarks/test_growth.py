"""What grows is measured in rows, and the memory of a process is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.growth import bench_growth, table_text
from meiqa.engine.engine import Engine
from meiqa.locations import embedded_assets

ROOT = Path(__file__).parents[2]


def test_what_grows_is_measured() -> None:
    memory: Path = embedded_assets() / "memory"
    result = bench_growth(
        lambda: Engine.open(memory=memory, learn=False),
        memory,
        neighbours=(1, 3),
        anchors=(60,),
        photos=(2,),
        files=(2, 4),  # from the second on, one is decoded while another is scored
        rounds=1,
    )
    assert json.loads(json.dumps(result)) == result
    assert [row["asked"] for row in result["neighbours"]] == [1, 3]
    assert result["anchors"][0]["p50_ms"] > 0
    assert result["photos"][0]["photos"] == 2
    assert [row["files"] for row in result["peak"]["rows"]] == [2, 4]
    assert 0.8 < result["peak"]["ratio"] < 1.25
    assert f"{result['peak']['ratio']:.3f}" in table_text(result)


def test_the_peak_is_not_that_of_the_process_before() -> None:
    held = np.ones(60_000_000)  # 480 MB
    probe = "from benchmarks.processes import peak_kb; print(peak_kb())"
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0 < int(run.stdout) * 1024 < held.nbytes / 2
