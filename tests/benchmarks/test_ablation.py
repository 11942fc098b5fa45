"""The ablation: each answer is asked for once, and the usual row is what the engine says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meiqa.benchmarks.ablation import ablate, ablation_text
from meiqa.benchmarks.accuracy import evaluate
from meiqa.benchmarks.hurry import budgets_text, sweep_budgets
from meiqa.benchmarks.recording import Parts, Recorder, anchors_of, random_key
from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.vlm import Prefix, VisualTokens
from meiqa.errors import UsageError
from meiqa.labels import LabelTable
from tests.engine.samples import ANCHORS, PHOTOS, K, calibrated_copy

SCORES = (1.5, 2.0, 4.5, 3.0, 2.5)
NEIGHBOURS = (0, 2, K)


@pytest.fixture(scope="module")
def parts(
    package: EnginePackage, anchors: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Parts]:
    """Give the tiny model and its anchors, with K neighbours to a photo."""
    folder = tmp_path_factory.mktemp("few") / "package"
    few = calibrated_copy(package, folder, neighbours=K, reflect_above=0.0)
    with Parts.opened(few.path, anchors, threads=1) as parts:
        yield parts


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of photos 0.png, 1.png, …"""
    folder = tmp_path_factory.mktemp("images")
    for at, pixels in enumerate(PHOTOS):
        Image.fromarray(pixels).save(folder / f"{at}.png")
    return folder


def table(scores: Sequence[float] = SCORES) -> LabelTable:
    return LabelTable(tuple(f"{at}.png" for at in range(len(scores))), tuple(scores), (1.0, 5.0))


@pytest.fixture(scope="module")
def report(parts: Parts, images: Path) -> dict[str, Any]:
    """Give an ablation of five photos."""
    return ablate(parts, table(), images, neighbours=NEIGHBOURS)


def row_of(report: dict[str, Any], factor: str, setting: str) -> dict[str, Any]:
    (row,) = (r for r in report["rows"] if (r["factor"], r["setting"]) == (factor, setting))
    return row


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its name."""
    return {name: value for name, value in row.items() if name not in ("factor", "setting")}


def test_the_usual_row_is_what_the_engine_says(
    report: dict[str, Any], parts: Parts, images: Path
) -> None:
    engine = evaluate(parts.engine(), table(), images)
    for factor, setting in (("neighbours", str(K)), ("orders", "both"), ("key", "summary")):
        row = row_of(report, factor, setting)
        # Other rows in a call round otherwise.
        fused = {name: row[name] for name in engine["fused"]}
        assert fused == pytest.approx(engine["fused"], rel=1e-4, abs=1e-5)
        assert str(row["tied_pairs"]) == str(engine["tied_pairs"])
        assert row["coverage95"] == engine["coverage95"]
        assert row["neighbours"] == K
    initial = row_of(report, "memory", "initial score")
    assert {name: initial[name] for name in engine["initial"]} == engine["initial"]


def test_rows_that_ask_for_nothing_agree(report: dict[str, Any]) -> None:
    none, no_neighbours = row_of(report, "memory", "none"), row_of(report, "neighbours", "0")
    assert str(figures(none)) == str(figures(no_neighbours))
    assert none["neighbours"] == 0


def test_where_the_neighbours_come_from(report: dict[str, Any]) -> None:
    learnt = {
        name: row_of(report, "memory", name)["learnt"]
        for name in ("anchors, flat", "anchors, stratified", "contrast only", "both")
    }
    held = ANCHORS // 4
    assert report["contrast"] == {
        "source": "a quarter of the anchors",
        "anchors": ANCHORS - held,
        "cases": held,
        "gated": held,
    }
    # There are fewer cases than neighbours, so anchors fill in.
    assert learnt == {
        "anchors, flat": 0,
        "anchors, stratified": 0,
        "contrast only": held,
        "both": K // 2,
    }


def test_it_can_be_repeated(report: dict[str, Any], parts: Parts, images: Path) -> None:
    again = ablate(parts, table(), images, neighbours=NEIGHBOURS)
    assert str(again["rows"]) == str(report["rows"])  # as text, where NaN equals itself


def test_a_contrast_memory_from_other_photos(parts: Parts, images: Path) -> None:
    others = LabelTable(("5.png", "6.png"), (1.0, 5.0), (1.0, 5.0))
    report = ablate(parts, table(SCORES[:2]), images, contrast_from=others, neighbours=(2,))
    assert report["contrast"]["cases"] == 2
    assert report["contrast"]["anchors"] == ANCHORS
    assert "learnt from another table" in ablation_text(report)


class CountingVlm:
    """Notes each photo that is read and each pair that is asked about."""

    def __init__(self, vlm: LocalVlm, calls: list[str]) -> None:
        self._vlm = vlm
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)

    def describe(self, *arguments: Any) -> Any:
        self._calls.append("describe")
        return self._vlm.describe(*arguments)

    def prefer_first(self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]) -> Any:
        self._calls += ["pair"] * len(seconds)
        return self._vlm.prefer_first(firsts, seconds)


def test_each_pair_is_asked_about_once(parts: Parts, images: Path) -> None:
    calls: list[str] = []
    vlm: Any = CountingVlm(parts.vlm, calls)
    recorder = Recorder(Parts(vlm, parts.package, parts.memory, parts.policy))
    photo = recorder.photo(images / "0.png")
    cases = anchors_of(parts)
    first = recorder.posterior(photo, cases[:6])
    assert calls == ["describe"] + 12 * ["pair"]
    assert recorder.posterior(photo, cases[:6]) == first
    recorder.posterior(photo, cases[2:8], both_orders=False)
    assert calls.count("pair") == recorder.asked == 16


def test_random_keys_depend_on_the_photo_alone() -> None:
    np.testing.assert_array_equal(random_key("ab12"), random_key("ab12"))
    assert abs(np.corrcoef(random_key("ab12"), random_key("ab13"))[0, 1]) < 0.5


def test_unreadable_photos_are_named(parts: Parts, images: Path) -> None:
    labels = LabelTable(("0.png", "none.png", "1.png"), (1.0, 2.0, 3.0), (1.0, 5.0))
    report = ablate(parts, labels, images, neighbours=(0,))
    assert report["n"] == 2
    assert [failure["path"] for failure in report["failures"]] == [str(images / "none.png")]
    with pytest.raises(UsageError, match="1 of 2 photos"):
        ablate(parts, LabelTable(labels.files[:2], (1.0, 2.0), (1.0, 5.0)), images)


def test_the_table_names_every_row(report: dict[str, Any]) -> None:
    text = ablation_text(report)
    assert text.startswith("Ablation: 5 photos, ")
    assert len(text.splitlines()) == 3 + len(report["rows"])


def test_budgets(parts: Parts, images: Path) -> None:
    report = sweep_budgets(parts, table(), images, [0.01, 1e6])
    unbounded, none, plenty = report["rows"]
    assert [row["budget_ms"] for row in report["rows"]] == [None, 0.01, 1e6]
    assert (unbounded["neighbours"], none["neighbours"], plenty["neighbours"]) == (K, 0, K)
    assert (unbounded["written"], none["written"], plenty["written"]) == (1, 0, 1)
    assert plenty["srcc"] == pytest.approx(unbounded["srcc"])
    assert (none["late"], plenty["late"], unbounded["late"]) == (1, 0, None)
    assert unbounded["p50_ms"] <= unbounded["p95_ms"] <= unbounded["p99_ms"]
    assert budgets_text(report).splitlines()[3].startswith("none")
