"""Score heads side by side, on a small random model and on grades that are known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.grades import (
    calibration_error,
    grades_text,
    ladder_figures,
    main,
    mode_shares,
)
from benchmarks.screens import KINDS, rungs
from meiqa.engine.calibration import NEUTRAL_GRADED
from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError
from tests.engine.samples import picture


@pytest.fixture(scope="module")
def graded_package(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(package.path, tmp_path_factory.mktemp("graded") / "package")
    calibration = replace(package.manifest.calibration, graded=NEUTRAL_GRADED)
    EnginePackage.open(copy).rewritten(calibration=calibration)
    return copy


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for at in range(3):
        Image.fromarray(picture(50 + at, (64, 96))).save(folder / f"{at}.png")
    (folder / "labels.csv").write_text("file,mos\n0.png,1.5\n1.png,3\n2.png,4.5\n")
    return folder


@pytest.fixture(scope="module")
def report(graded_package: Path, photographs: Path, anchors: Path) -> dict[str, Any]:
    from contextlib import redirect_stdout
    from io import StringIO

    said = StringIO()
    with redirect_stdout(said):
        main(
            [
                *(str(photographs / "labels.csv"), "--images", str(photographs)),
                *("--package", str(graded_package), "--memory", str(anchors), "--threads", "1"),
                *("--screens", str(photographs), "--screens-limit", "1", "--format", "json"),
            ]
        )
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def test_every_head_is_reported(report: dict[str, Any]) -> None:
    assert list(report["heads"]) == ["text", "levels", "grm"]
    assert report["n"] == 3
    assert report["multimodal"]["graded"] == {"share": 0.0, "clear": 0.0}
    assert report["default"] == "text"
    for figures in report["heads"].values():
        assert {"srcc", "rmse", "coverage95"} == set(figures["alone"]) == set(figures["fused"])


def test_heads_score_as_the_engine_does_with_them(
    report: dict[str, Any], graded_package: Path, photographs: Path, anchors: Path
) -> None:
    human = np.array([1.5, 3.0, 4.5])
    photos = [photographs / f"{at}.png" for at in range(3)]
    for head in ("text", "levels", "grm"):
        headed = EnginePackage.open(graded_package, head=head)
        with Engine.open(headed, anchors, threads=1, learn=False) as engine:
            scores = np.array([engine.score(photo, learn=False).score for photo in photos])
        error = float(np.sqrt(np.mean((scores - human) ** 2)))
        assert report["heads"][head]["fused"]["rmse"] == pytest.approx(error, abs=1e-6)


def test_made_pictures_are_reported_by_kind(report: dict[str, Any]) -> None:
    kinds = report["screens"]["kinds"]
    assert list(kinds) == list(KINDS)
    for found in kinds.values():
        assert found["multimodal"]["graded"]["share"] == 0.0
        assert list(found["heads"]) == ["text", "levels", "grm"]
    assert kinds["photograph"]["heads"]["grm"]["moved"] == 0.0


def test_the_text_names_the_default_and_every_kind(report: dict[str, Any]) -> None:
    text = grades_text(report)
    assert "text (default)" in text
    assert all(kind in text for kind in KINDS)


def test_a_package_without_a_graded_response_is_refused(
    package: EnginePackage, photographs: Path, anchors: Path
) -> None:
    given = [str(photographs / "labels.csv"), "--images", str(photographs)]
    with pytest.raises(UsageError, match=r"no graded response.*training.graded"):
        main([*given, "--package", str(package.path), "--memory", str(anchors), "--threads", "1"])


def test_grades_that_hold_have_no_calibration_error() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(5), 20_000)
    votes = np.array([random.multinomial(1, row) for row in probabilities])
    assert calibration_error(probabilities, votes) < 0.01
    sure = np.eye(5)[probabilities.argmax(axis=1)]
    assert calibration_error(sure, votes) > 0.1


def test_shares_of_modes_tell_dips_that_can_be_seen() -> None:
    torn, nearly = [0.4, 0.1, 0.1, 0.1, 0.3], [0.1, 0.3, 0.295, 0.3, 0.005]
    one = [0.1, 0.2, 0.4, 0.2, 0.1]
    found = mode_shares([np.array(row) for row in (torn, nearly, one, one)])
    assert found == {"share": 0.5, "clear": 0.25}


def test_a_ladder_that_falls() -> None:
    scores = np.array([[[4.0, 3.0, 2.0, 1.0], [4.0, 3.5, 3.6, 1.0]]])
    found = ladder_figures(scores, scores + 0.5)
    assert found["srcc"] == pytest.approx((1.0 + 0.8) / 2)
    assert found["falling"] == pytest.approx(5 / 6)
    assert found["moved"] == pytest.approx(-0.5)


def test_pictures_are_the_same_in_every_run() -> None:
    photograph = picture(3, (96, 128))
    first, second = (list(rungs(photograph, 7)) for _ in range(2))
    assert len(first) == len(KINDS) * 2 * 4
    for one, other in zip(first, second, strict=True):
        assert one.pixels.shape == photograph.shape
        assert (one.pixels == other.pixels).all()


def test_every_kind_is_another_picture_and_every_level_another_version() -> None:
    photograph = picture(3, (96, 128))
    made = {(rung.kind, rung.ladder, rung.level): rung.pixels for rung in rungs(photograph, 7)}
    assert (made["photograph", "blur", 0] == photograph).all()
    unspoilt = [made[kind, "blur", 0].tobytes() for kind in KINDS]
    assert len(set(unspoilt)) == len(KINDS)
    for kind in KINDS:
        for ladder in ("blur", "jpeg"):
            assert len({made[kind, ladder, level].tobytes() for level in range(4)}) == 4
