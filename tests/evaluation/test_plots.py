"""The pictures are drawn: of the right size, light, and with what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meiqa.evaluation.accuracy import Judged
from meiqa.evaluation.plots import draw_all
from meiqa.types import Assessment


@pytest.fixture
def judged() -> Judged:
    random = np.random.default_rng(0)
    human = random.uniform(1, 5, 50)
    scores = np.clip(human + random.normal(0, 0.5, 50), 1, 5)
    assessments = tuple(
        Assessment("p", score, 0.5, (score - 1, score + 1), round(score), "fair", 50.0, None)
        for score in scores.tolist()
    )
    return Judged(assessments, human, (1.0, 5.0), (), 0.1)


EXTRAS = {
    "budgets": {
        "rows": [
            {"budget_ms": None, "srcc": 0.7, "gain": 0.1},
            {"budget_ms": 300.0, "srcc": 0.69},
            {"budget_ms": 100.0, "srcc": 0.65},
        ]
    },
}


@pytest.mark.parametrize("extras", [{}, EXTRAS])
def test_what_is_drawn(judged: Judged, extras: dict[str, Any], tmp_path: Path) -> None:
    paths = draw_all(judged, {**judged.report(), **extras}, tmp_path / "plots")
    names = [
        "predicted",
        "histograms",
        "reliability",
        *extras,
    ]
    assert [path.stem for path in paths] == names
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[0] > 500
        assert pixels.shape[1] > 500
        assert (pixels[0, 0] == 255).all()
        assert pixels.mean() > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
