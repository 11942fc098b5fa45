"""The ablation: each answer is asked for once, and the usual row is what the engine says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from benchmarks.ablation import (
    Setting,
    ablate,
    ablation_text,
    draw_neighbours,
    main,
    remembered,
    with_random_key,
)
from meiqa.engine.calibration import UNCALIBRATED
from meiqa.engine.engine import Engine
from meiqa.engine.estimates import Comparisons, Estimate, fold, preferences_of
from meiqa.engine.images import load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Prefix, VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError
from meiqa.evaluation.accuracy import judge
from meiqa.evaluation.recording import AskedOnce, Recorder
from meiqa.labels import LabelTable
from meiqa.memory import MemoryBank, RetrievalPolicy
from tests.engine.samples import ANCHORS, PHOTOS, K, calibrated_copy

SCORES = (1.5, 2.0, 4.5, 3.0, 2.5)
NEIGHBOURS = (0, 2, K)
METRICS = ("srcc", "plcc", "krcc", "rmse", "js", "effective_bins", "distinct", "tie_rate")


@pytest.fixture(scope="module")
def engine(
    package: EnginePackage, anchors: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Give the tiny model and its anchors, with K neighbours to a photo."""
    folder = tmp_path_factory.mktemp("few") / "package"
    few = calibrated_copy(package, folder, neighbours=K, reflect_above=0.0)
    with Engine.open(few, anchors, threads=1, learn=False) as engine:
        yield engine


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
def report(engine: Engine, images: Path) -> dict[str, Any]:
    """Give an ablation of five photos."""
    return ablate(engine, table(), images, neighbours=NEIGHBOURS)


def row_of(report: dict[str, Any], factor: str, setting: str) -> dict[str, Any]:
    (row,) = (r for r in report["rows"] if (r["factor"], r["setting"]) == (factor, setting))
    return row


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its name."""
    return {name: value for name, value in row.items() if name not in ("factor", "setting")}


def test_the_usual_row_is_what_the_engine_says(
    report: dict[str, Any], engine: Engine, images: Path
) -> None:
    said = judge(engine, table(), images).report()
    for factor, setting in (("neighbours", str(K)), ("orders", "both"), ("key", "summary")):
        row = row_of(report, factor, setting)
        # Other rows in a call round otherwise.
        for name in METRICS:
            assert row[name] == pytest.approx(said["fused"][name], rel=1e-4, abs=1e-5)
        assert str(row["tied_pairs"]) == str(said["tied_pairs"])
        assert row["coverage95"] == said["coverage95"]
        assert row["neighbours"] == K
    initial = row_of(report, "memory", "initial score")
    assert all(initial[name] == said["initial"][name] for name in METRICS)


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


def test_it_can_be_repeated(report: dict[str, Any], engine: Engine, images: Path) -> None:
    again = ablate(engine, table(), images, neighbours=NEIGHBOURS)
    assert str(again["rows"]) == str(report["rows"])  # as text, where NaN equals itself


def test_a_contrast_memory_from_other_photos(engine: Engine, images: Path) -> None:
    others = LabelTable(("5.png", "6.png"), (1.0, 5.0), (1.0, 5.0))
    report = ablate(engine, table(SCORES[:2]), images, contrast_from=others, neighbours=(2,))
    assert report["contrast"]["cases"] == 2
    assert report["contrast"]["anchors"] == ANCHORS
    assert "learnt from another table" in ablation_text(report)


class CountingModel:
    """Notes each photo that is described and each pair that is asked about."""

    def __init__(self, model: LocalModel, calls: list[str]) -> None:
        self._model = model
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def describe(self, *arguments: Any) -> Any:
        self._calls.append("describe")
        return self._model.describe(*arguments)

    def prefer_first(self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]) -> Any:
        self._calls += ["pair"] * len(seconds)
        return self._model.prefer_first(firsts, seconds)


def test_each_pair_is_asked_about_once(engine: Engine, images: Path) -> None:
    calls: list[str] = []
    model: Any = CountingModel(cast(LocalModel, engine.model), calls)
    asked = AskedOnce(model)
    recorder, pixels = Recorder(asked, engine.memory), load_pixels(images / "0.png")
    flat = RetrievalPolicy(k=6, bins=1)
    first = recorder.recorded(pixels, flat)
    assert calls == ["describe"] + 12 * ["pair"]
    assert recorder.recorded(pixels, flat).posterior == first.posterior
    # The nearest eight are the nearest six and two more, also to another recorder.
    wider = Recorder(asked, engine.memory).recorded(pixels, replace(flat, k=8))
    assert {case.id for case in first.neighbours} < {case.id for case in wider.neighbours}
    assert (calls.count("pair"), calls.count("describe"), asked.count) == (16, 1, 16)
    recorder.recorded(load_pixels(images / "1.png"), flat)
    assert (calls.count("pair"), calls.count("describe")) == (28, 2)


def test_a_remembered_photo_is_judged_by_its_tokens(engine: Engine, anchors: Path) -> None:
    recorder = Recorder(AskedOnce(engine.model), engine.memory)
    (case, *_) = (entry.case for entry in engine.memory.snapshot().views["anchor"].all_entries())
    scored = recorder.recorded(remembered(recorder, case), RetrievalPolicy(k=2))
    assert scored.was_cached
    np.testing.assert_array_equal(scored.prefix.tokens.values, case.tokens)
    assert case.image_digest not in [other.image_digest for other in scored.neighbours]


def test_random_keys_depend_on_the_photo_alone(anchors: Path, package: EnginePackage) -> None:
    with MemoryBank.open(anchors, package_digest=package.digest) as bank:
        one, other, *_ = (entry.case for entry in bank.snapshot().views["anchor"].all_entries())
    drawn = with_random_key(one).key
    np.testing.assert_array_equal(drawn, with_random_key(replace(one, score=1.0)).key)
    assert abs(np.corrcoef(drawn, with_random_key(other).key)[0, 1]) < 0.5


def test_a_row_without_comparisons_is_one_of_none(report: dict[str, Any]) -> None:
    none = figures(row_of(report, "neighbours", "0"))
    without = figures(row_of(report, "without", "comparisons"))
    assert {name: without[name] for name in ("srcc", "rmse", "js")} == {
        name: none[name] for name in ("srcc", "rmse", "js")
    }
    # The random model prints no rating, and its grade is what comparisons start from.
    usual = figures(row_of(report, "orders", "both"))
    for name in ("rating", "grade", "regression"):
        assert str(figures(row_of(report, "without", name))) == str(usual)


def test_what_a_row_leaves_out_is_not_folded() -> None:
    """Two neighbours of score 3: the first order says that they look better, the second worse."""
    logits = np.array([[-4.0, 4.0], [-4.0, 4.0]])
    preferences = preferences_of(logits, UNCALIBRATED.temperature)
    compared = Comparisons(np.full(2, 3.0), np.full(2, 0.1), preferences, UNCALIBRATED)
    rating, grade = Estimate("rating", 2.0, 0.5), Estimate("grade", 4.0, 0.5, share=0.25)
    estimates = (rating, grade, compared)
    scored: Any = SimpleNamespace(estimates=estimates, logits=logits)

    def score(**options: Any) -> float:
        return Setting("", "", "", RetrievalPolicy(), **options).posterior(scored).score

    assert score() == fold(estimates).score
    assert score(without="grade") == fold((rating, compared)).score
    assert score(without="rating") == fold((grade, compared)).score
    assert score(without="comparisons") == 2.5
    assert score(both_orders=False) < score() - 0.1


def test_unreadable_photos_are_named(engine: Engine, images: Path) -> None:
    labels = LabelTable(("0.png", "none.png", "1.png"), (1.0, 2.0, 3.0), (1.0, 5.0))
    report = ablate(engine, labels, images, neighbours=(0,))
    assert report["n"] == 2
    assert [failure["path"] for failure in report["failures"]] == [str(images / "none.png")]
    with pytest.raises(UsageError, match="1 of 2 photos"):
        ablate(engine, LabelTable(labels.files[:2], (1.0, 2.0), (1.0, 5.0)), images)


def test_the_table_names_every_row(report: dict[str, Any]) -> None:
    text = ablation_text(report)
    assert text.startswith("Ablation: 5 photos, ")
    assert len(text.splitlines()) == 3 + len(report["rows"])


def test_it_is_run_and_drawn(
    engine: Engine,
    anchors: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table, plot = tmp_path / "t.csv", tmp_path / "neighbours.png"
    table.write_text("file,mos,split\n0.png,1,val\n1.png,4,val\n5.png,3,train\n")
    arguments = [str(table), "--images", str(images), "--split", "val", "--format", "json"]
    arguments += ["--package", str(engine.package.path), "--memory", str(anchors)]
    contrast = ["--contrast-from", str(table), "--train-split"]
    main([*arguments, "--plot", str(plot), *contrast, "train"])
    report = json.loads(capsys.readouterr().out)
    assert (report["n"], report["contrast"]["cases"]) == (2, 1)
    (axes,) = draw_neighbours(report).axes
    assert [label.get_text() for label in axes.get_xticklabels()][:3] == ["0", "1", "2"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"holds photos that are to be judged; got 2, 0\.png"):
        main([*arguments, *contrast, "val"])
