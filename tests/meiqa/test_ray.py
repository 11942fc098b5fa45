"""Bulk scoring on Ray: killed at random, quiet, and behind Ray Serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bulk_kills import make_photos, measured

pytest.importorskip("ray", reason="the extra ray is not installed")


@pytest.mark.slow
def test_a_run_that_is_killed_has_each_photo_once(tiny_files: Path) -> None:
    model = ["--package", str(tiny_files / "fp32"), "--memory", str(tiny_files / "anchors")]
    found = measured(160, 5, 4, seed=1, pause_s=1.0, options=["--k", "0", *model])
    assert found["kills"] >= 2
    assert found["rows"] == found["distinct_ids"] == found["distinct_paths"] == 160
    assert found["error_rows"] == 5
    assert found["scores_compared"] == 155
    assert found["largest_difference"] <= 1e-3


@pytest.mark.slow
def test_ray_is_quiet_and_leaves_nothing(tiny_files: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 4, 0)
    model = ["--package", str(tiny_files / "fp32"), "--memory", str(tiny_files / "anchors")]
    program = (
        "import sys, meiqa.cli, meiqa.ray, ray._common.usage.usage_lib as usage\n"
        "assert not usage.usage_stats_enabled()\n"
        "sys.exit(meiqa.cli.main(sys.argv[1:]))"
    )
    home = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": "/tmp"}
    run = subprocess.run(
        [sys.executable, "-c", program, "bulk", "photos", "--out", "out", *model],
        cwd=tmp_path,
        env={**home, "MEIQA_CACHE": os.environ["MEIQA_CACHE"]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert [line.partition(", ")[0] for line in run.stderr.splitlines()] == [
        "meiqa: out: 4 photos are new",
        "meiqa: out: 4 photos",
    ]
    assert not list((tmp_path / "home").rglob("*"))
    assert len(list((tmp_path / "out").glob("part-*"))) == 1
