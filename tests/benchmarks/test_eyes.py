"""What an engine sees is counted rightly: one that sees nothing, and one that sees everything."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from benchmarks.eyes import Watcher, bench_eyes, over
from meiqa.engine.engine import Engine
from meiqa.engine.images import Pixels
from meiqa.testing import FakeEngine
from training.data import PRISTINE_SCORE
from training.distortions import LEVELS

WANTED = np.tile(PRISTINE_SCORE - np.arange(1.0, LEVELS + 1) / 2, (32, 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pristine photograph."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pristine" / "images").mkdir(parents=True)
    (folder / "pristine" / "index.csv").write_text("file,width,height\na.png,330,340\n")
    coarse = np.random.default_rng(0).integers(30, 220, (33, 34, 3), np.uint8)
    photo = Image.fromarray(coarse).resize((330, 340), Image.Resampling.BICUBIC)
    photo.save(folder / "pristine" / "images" / "a.png")
    return folder


def brightness(pixels: Pixels) -> float:
    return 1.0 + 4.0 * float(pixels.array.mean()) / 255.0


def test_every_question_is_asked_and_shares_are_shares(data: Path) -> None:
    with FakeEngine(brightness) as engine:
        report = bench_eyes(Watcher(cast(Engine, engine), WANTED), data, 1, 1)
    assert (report["photographs"], report["ladders"]) == (1, 1)
    assert len(report["types"]) == 32
    assert report["hand-held"]["pairs"] == 4
    # Of two-sided types the middle level is the photograph itself.
    assert report["types"]["gaussian blur"]["steps"] == LEVELS
    # A judge of brightness is right of the dark and wrong of the light.
    for way in ("by_scores", "by_comparing"):
        assert report["types"]["underexposure"][way] == 1.0
        assert report["types"]["overexposure"][way] == 0.0
    assert report["types"]["underexposure"]["srcc"] == 1.0
    assert report["changes"]["light x 0.12"]["fall"] > 0.5
    assert report["changes"]["mirrored"] == {"fall": 0.0, "size": 0.0, "falls": 0.0}
    assert report["plain"]["white"] == 5.0


def test_types_count_by_their_steps() -> None:
    rows = [
        {"steps": 5, "by_comparing": 1.0, "by_scores": 0.8, "srcc": 0.9},
        {"steps": 1, "by_comparing": 0.0, "by_scores": 0.0, "srcc": 0.5},
    ]
    assert over(rows) == pytest.approx(
        {"steps": 6, "by_comparing": 5 / 6, "by_scores": 4 / 6, "srcc": 0.7, "worst": 0.5}
    )
