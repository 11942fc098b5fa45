"""Options at once, each alone and from scratch are measured, and are the same."""

from __future__ import annotations

from benchmarks import options
from meiqa.engine.package import EnginePackage


def test_the_ways_agree_and_are_timed(package: EnginePackage) -> None:
    found = options.report(package.path, 3)
    assert [row["asked"].partition(" ")[2] for row in found["rows"]] == [
        *("options of one token", "options of several tokens", "pairs")
    ]
    for row in found["rows"]:
        assert row["largest_difference"] < 1e-4
        assert all(row["ms"][name] > 0 for name in options.ROUNDS)
