"""Pulls are measured, and bring what was put there."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hub_server import Server
from benchmarks.hub_speed import pulls


def test_pulls_are_measured(server: Server, tmp_path: Path) -> None:
    small, usual = pulls(server, tmp_path, 300)
    assert (small["tokens"], usual["tokens"]) == (4, 64)
    for row in (small, usual):
        assert row["cases"] == 300
        assert len(row["few_s"]) == 5
