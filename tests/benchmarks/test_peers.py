"""Engines beside each other: the same tokens give the same logits, and bars say what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peer_engines import FromScratch, OnDecoder, PeerEngine, WithPrefixCache, Work
from benchmarks.peers import (
    REFERENCE,
    bars,
    main,
    markdown_text,
    peers_of,
    peers_text,
    run,
    text_work,
)
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError


@pytest.fixture
def work(checkpoint: Path) -> Work:
    return text_work(checkpoint, prefix=12, continuations=3, steps=5, threads=1)


@pytest.fixture
def opened(checkpoint: Path, package: EnginePackage) -> dict[str, Callable[[Work], PeerEngine]]:
    return {
        "scratch": partial(FromScratch, checkpoint),
        "cache": partial(WithPrefixCache, checkpoint),
        "graph": partial(OnDecoder.by_graph, package.path),
    }


def test_text_is_cut_without_a_gap(work: Work, checkpoint: Path) -> None:
    assert work.prefix.shape == (12,)
    assert work.continuations.shape == (3, 5)
    longer = text_work(checkpoint, prefix=27, continuations=1, steps=1, threads=1)
    assert np.array_equal(np.append(work.prefix, work.continuations), longer.prefix)
    with pytest.raises(UsageError, match="too few tokens"):
        text_work(checkpoint, prefix=10**6, continuations=1, steps=1, threads=1)


def test_all_read_the_same(work: Work, opened: dict[str, Callable[[Work], PeerEngine]]) -> None:
    wanted = opened["scratch"](work).score()
    assert wanted.shape[0] == 3
    for name in ("cache", "graph"):
        np.testing.assert_allclose(opened[name](work).score(), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["cache", "graph"])
def test_what_is_written_is_what_is_read(
    name: str, work: Work, opened: dict[str, Callable[[Work], PeerEngine]]
) -> None:
    engine = opened[name](work)
    write = engine.writer()
    for _ in range(2):  # what the first call appended is gone
        np.testing.assert_allclose(write(), engine.score()[0], atol=1e-4)


def test_what_is_missing_is_named(work: Work, checkpoint: Path, package: EnginePackage) -> None:
    scratch, _, *others = peers_of(checkpoint, Path("a.gguf"), [package.path])
    absent = replace(others[0], needs=("no_such_module",))
    native = next(each for each in others if each.name.endswith("native"))
    told: list[str] = []
    found = run([scratch, absent, native], work, told.append)
    assert [row["name"] for row in found["rows"]] == [REFERENCE] == told[:1]
    assert found["rows"][0]["kl"] == 0
    assert found["missing"][absent.name] == "no no_such_module installed"
    assert "no layers for the kernel" in found["missing"][native.name]
    assert absent.name not in told


def row(name: str, bits: int, ratio: float, written: float, kl: float = 0.0) -> dict[str, Any]:
    seconds = {"wall_s": 1 / ratio, "cpu_s": 2 / ratio, "ratio": ratio, "cpu_ratio": ratio}
    return {
        "name": name,
        "bits": bits,
        "written_per_s": written,
        "kl": kl,
        "peak_mb": 1.0,
        **seconds,
    }


ROWS = [
    row(REFERENCE, 32, 1.0, 5.0),
    row("llama.cpp, Q8_0", 8, 9.0, 40.0),
    row("OpenVINO, f32", 32, 5.0, 10.0),
    row("meiqa fp32, graph", 32, 6.0, 10.0),
    row("meiqa int8, graph", 8, 17.0, 20.0, kl=0.01),
    row("meiqa int8, native", 8, 99.0, 38.0, kl=0.5),
]


def test_bars_leave_out_what_is_wrong() -> None:
    beside, scratch, whole, writing = bars(ROWS)
    assert beside.found == pytest.approx(17 / 9)
    assert "1.89x, wanted 2x: MISSED" in beside.text
    assert scratch.text.endswith("17.00x, wanted 16x: met")
    assert whole.found == pytest.approx(6 / 5)
    assert writing.found == pytest.approx(20 / 40)
    wrong = [{**row, "kl": 7.0} if row["name"].startswith("meiqa") else row for row in ROWS]
    assert not [*bars(wrong)]


def test_a_report_is_read_and_laid_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {"rows": ROWS, "missing": {"llama.cpp, Q4_K_M": "no llama_cpp installed"}}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert "llama.cpp, Q4_K_M: not measured, no llama_cpp installed" in peers_text(report)
    main(["--read", str(file), "--format", "markdown"])
    printed = capsys.readouterr().out
    assert printed == markdown_text(report) + "\n"
    assert "| meiqa int8, graph | 0.06 | 0.1 | 17.0 | 17.0 | 20.0 | 0.0100 | 1 |" in printed
