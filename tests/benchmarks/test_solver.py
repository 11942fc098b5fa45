"""The benchmark of the solvers compares answers that agree, and prints what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import solver
from benchmarks.solver import bench_solver, main


@pytest.fixture(scope="module")
def small() -> dict[str, dict[str, dict[str, float]]]:
    pytest.importorskip("choix", reason="the rival comes with the extra bench")
    return bench_solver(130, 8, 12, 90, rounds=3)


def test_rivals_give_our_answers(small: dict[str, dict[str, dict[str, float]]]) -> None:
    alone, together = small["photos"]["agreement"], small["items"]["agreement"]
    assert alone["numpy_score"] < 1e-10
    assert alone["numpy_std"] < 1e-7
    assert alone["scipy_score"] < 1e-8
    assert together["numpy_score"] < 1e-8
    assert together["scipy_score"] < 1e-5
    assert together["choix_opt_plcc"] > 0.99
    assert together["ep_probit_score"] < 0.5


def test_ratios_are_those_of_the_rows(small: dict[str, dict[str, dict[str, float]]]) -> None:
    rows = small["items"]["rows"]
    expected = rows["choix_opt"]["p50_ms"] / rows["meiqa"]["p50_ms"]
    assert small["ratios"]["vs_choix"] == pytest.approx(expected, rel=0.02)
    assert {"vs_numpy", "vs_choix", "vs_scipy"} <= small["ratios"].keys()
    assert json.loads(json.dumps(small)) == small


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("choix", reason="the rival comes with the extra bench")
    monkeypatch.setattr(solver, "_BRENT_PHOTOS", 2)
    main(["--photos", "3", "--rounds", "1"])
    assert "vs_numpy" in capsys.readouterr().out
    main(["--photos", "3", "--rounds", "1", "--format", "json"])
    assert json.loads(capsys.readouterr().out)["settings"]["photos"] == 3
