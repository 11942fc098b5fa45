"""The benchmark of comparisons: all ways give the same answers, ratios are those of its rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.compare import agreement, bench_compare, table_text
from meiqa.errors import MeiqaError


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return bench_compare(neighbours=2, rounds=1, threads=1)


def test_fp32_answers_are_those_of_transformers(small: dict[str, Any]) -> None:
    exact = {n: d for n, d in small["largest_difference"].items() if "int8" not in n}
    assert {"fp32", "no_reuse", "transformers_prefix_2", "transformers_prefix_8"} <= exact.keys()
    assert max(exact.values()) <= 1e-4


def test_ratios_are_those_of_the_rows(small: dict[str, Any]) -> None:
    p50 = {name: row["p50_ms"] for name, row in small["milliseconds"].items()}
    expected = p50["transformers"] / p50["int8"]
    assert small["ratios"]["int8_vs_transformers"] == pytest.approx(expected, abs=0.01)
    assert {"vs_transformers", "vs_transformers_prefix", "vs_no_reuse"} < small["ratios"].keys()
    assert small["gemm_fraction"] > 0
    assert small["settings"]["answers"] == 4
    assert json.loads(json.dumps(small)) == small
    assert "vs_transformers_prefix" in table_text(small)


def test_ways_that_differ_get_no_ratio() -> None:
    ways = {"transformers": lambda: np.zeros(2), "fp32": lambda: np.array([0.0, 1e-3])}
    with pytest.raises(MeiqaError, match="do not agree"):
        agreement(ways)
    assert agreement({**ways, "fp32": lambda: np.full(2, 1e-5)})["fp32"] == pytest.approx(1e-5)
