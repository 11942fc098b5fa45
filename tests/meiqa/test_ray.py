"""Bulk scoring on Ray: killed at random, quiet, and behind Ray Serve."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bulk_kills import make_photos, measured
from benchmarks.bulk_speed import watched_store
from benchmarks.interrupted_build import differences
from meiqa import cli

pytest.importorskip("ray", reason="the extra ray is not installed")

import httpx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from ray import serve

    import meiqa.ray

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_run_that_is_killed_has_each_photo_once(tiny_files: Path) -> None:
    model = ["--package", str(tiny_files / "fp32"), "--memory", str(tiny_files / "anchors")]
    found = measured(112, 5, 3, seed=1, pause_s=1.0, options=["--k", "0", *model])
    assert found["kills"] >= 1
    assert found["rows"] == found["distinct_ids"] == found["distinct_paths"] == 112
    assert found["error_rows"] == 5
    assert found["scores_compared"] == 107
    assert found["largest_difference"] <= 1e-3


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
        "meiqa: out: new photos: 4",
        "meiqa: out: 4 photos",
    ]
    assert not list((tmp_path / "home").rglob("*"))
    assert len(list((tmp_path / "out").glob("part-*"))) == 1


def test_no_photos_go_through_the_object_store(
    session: None, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meiqa.ray, "connected", nullcontext)
    photos, found = tmp_path / "photos", dict[str, Any]()
    make_photos(photos, 1, 0)
    data = (photos / "000000.jpg").read_bytes()
    for number in range(60):  # 300 MB of files
        (photos / f"large{number}.jpg").write_bytes(data + b"\0" * 5_000_000)
    model = ["--package", str(tiny_files / "fp32"), "--memory", str(tiny_files / "anchors")]
    with watched_store(found):
        assert cli.main(["bulk", str(photos), "--out", str(tmp_path / "out"), *model]) == 0
    assert found["object_store_asked"] > 0
    assert found["object_store_peak_mb"] < 20


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """Start one Ray for several tests."""
    with meiqa.ray.connected("local"):
        yield


def test_the_api_is_an_application_of_ray_serve(
    session: None, tiny_files: Path, tmp_path: Path
) -> None:
    make_photos(tmp_path / "photos", 1, 0)
    photo = (tmp_path / "photos" / "000000.jpg").read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = {"package": str(tiny_files / "fp32"), "memory": str(tiny_files / "anchors")}
    serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
    try:
        serve.run(meiqa.ray.app({**model, "max_replicas": "1"}), name="meiqa")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/", timeout=60) as client:
            found = client.post("score", files={"image": photo})
            late = client.post("score", files={"image": photo}, params={"budget_ms": 1})
    finally:
        serve.shutdown()
    assert (found.status_code, late.status_code) == (200, 503)
    assert 1 <= found.json()["score"] <= 5


def test_eval_and_memory_build_on_ray_come_to_the_same(
    session: None, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meiqa.ray, "connected", nullcontext)
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", 8, 1)
    rows = [f"{number:06}.jpg,{number / 8}\n" for number in range(8)]
    Path("labels.csv").write_text("image,mos\n" + "".join(rows))
    table = ["labels.csv", "--images", str(tmp_path / "photos"), "--mos-range", "0", "1"]
    package = ["--package", str(tiny_files / "fp32")]
    anchors = ["--memory", str(tiny_files / "anchors")]
    for name, more in (("here", []), ("ray", ["--ray", "local"])):
        options = [*table, *package, *more]
        assert cli.main(["eval", *options, *anchors, "--k", "0", "--output", f"{name}.csv"]) == 1
        assert cli.main(["memory", "build", *options, "--out", name]) == 1
    assert Path("here.csv").read_text() == Path("ray.csv").read_text()
    assert differences(Path("here"), Path("ray")) == []
